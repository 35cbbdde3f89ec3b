"""Rows of training data from files and Hub data sets, one at a time, in order."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hopskip.errors import ConfigError

Packing = Literal["none", "blocks", "documents"]
TooLong = Literal["error", "truncate", "drop", "split"]
LossOn = Literal["all", "assistant"]
_OURS = (".jsonl", ".json", ".txt")
"""Kinds that are read here: `datasets` wants all rows of a file to have the same fields of the same types."""
_TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
"""Kinds that `datasets` reads, by its names for them."""
_SUFFIXES = (*_OURS, *(f"{kind}.gz" for kind in _OURS), *_TABLES)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    A row is a chat or a question with its answer, in one of the spellings of `chats`, or text (`text`). Chats and
    questions go through the model's chat template, where it has one.

    Raises:
        ConfigError: a value is unknown, or would have no effect.
    """

    train: tuple[str, ...]
    """Files (.jsonl, .json, .txt, also as .gz; .parquet, .csv, .arrow), folders or patterns of them, folders of
    `Dataset.save_to_disk`, or Hub data sets by name."""
    eval: tuple[str, ...] = ()
    subset: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    where: Mapping[str, Any] | None = None
    """Only rows whose fields have these values."""
    holdout_every: int | None = None
    """Row 0 and every `holdout_every`-th after it (counted after `where`) are not trained on, but evaluated. Where a
    source has one entry only, a book say, rows of tokens are counted."""
    max_eval_rows: int | None = None
    """Evaluate on the first so many packed rows."""
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    response_field: str = "response"
    text_field: str = "text"
    loss_on: LossOn = "all"
    """`assistant`: only what the assistant says is learned."""
    max_length: int = 1024
    """Most tokens in a row."""
    too_long: TooLong = "error"
    """What to do with a document of more tokens: refuse, cut its end off, leave it out, or go on in another row."""
    packing: Packing = "none"
    """`none`: a document per row, padded. `blocks`: all documents in one stream, cut into rows. `documents`: as many
    whole documents as a row holds, none of which sees another."""
    streaming: bool = False
    """Read while training, in the order of the source, instead of before, shuffled. For what does not fit into memory;
    needs `training.max_steps`. Ranks and `training.dataloader_num_workers` share the source's entries."""
    shuffle_buffer: int | None = None
    """Draw each streamed row from a buffer of so many; None keeps the source's order."""

    def __post_init__(self) -> None:
        for name, choices in (("packing", Packing), ("too_long", TooLong), ("loss_on", LossOn)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(choices))}")
        if not self.train:
            raise ConfigError("data.train names nothing; give files or a Hub data set")
        for name in ("holdout_every", "max_eval_rows", "max_length", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ConfigError(f"{name} is {value}; it must be at least 2")
        if self.eval and self.holdout_every:
            raise ConfigError("data.eval and data.holdout_every both say what to evaluate on; leave one out")
        if self.packing == "blocks" and self.too_long not in ("error", "split"):
            raise ConfigError(f"too_long={self.too_long} has no effect with packing 'blocks', which cuts anywhere")
        if self.max_eval_rows is not None and not self.has_eval:
            raise ConfigError("max_eval_rows has no effect without anything to evaluate on: eval or holdout_every")
        if self.shuffle_buffer is not None and not self.streaming:
            raise ConfigError("shuffle_buffer has no effect without streaming: rows are shuffled anew each epoch")

    @property
    def has_eval(self) -> bool:
        return bool(self.eval or self.holdout_every)


def is_held_out(index: int, every: int | None) -> bool:
    """Whether a row is kept from training: row 0, and every `every`-th after it."""
    return every is not None and index % every == 0


def read_split(data: DataConfig, *, held_out: bool) -> Iterator[Mapping[str, Any]]:
    """The rows of the source that are trained on, or those held out."""
    own_eval = held_out and bool(data.eval)
    for index, row in enumerate(read_wanted(data, data.eval if own_eval else data.train)):
        if own_eval or is_held_out(index, data.holdout_every) == held_out:
            yield row


def read_wanted(data: DataConfig, sources: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of all sources that `where` wants."""
    where = data.where or {}
    for source in sources:
        for row in read(source, data):
            if all(row.get(key) == value for key, value in where.items()):
                yield row


def check_sources(data: DataConfig) -> None:
    """Refuse sources that are not there, without reading them.

    Raises:
        ConfigError: there is no such file, folder or data set.
    """
    for source in (*data.train, *data.eval):
        if _files(source) is None:
            next(_read_hub(source, data), None)


def read(source: str, data: DataConfig) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, of all files of a folder or pattern in order of their names, or of a Hub data set.

    Raises:
        ConfigError: there is no such thing, or it cannot be read.
    """
    files = _files(source)
    if files is None:
        yield from _read_hub(source, data)
        return
    for file in files:
        yield from _read_file(file, data.text_field)


def _files(source: str) -> list[Path] | None:
    """The files that a source names; None for a Hub data set."""
    path = Path(source)
    if path.is_file():
        return [path]
    if all((path / name).exists() for name in ("state.json", "dataset_info.json")):  # of `Dataset.save_to_disk`
        return sorted(path.glob("*.arrow"))
    pattern = str(path / "**" / "*") if path.is_dir() else source
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if name.endswith(_SUFFIXES)]
    if not files and (path.is_dir() or path.suffix or source.startswith((".", "/")) or source.count("/") > 1):
        raise ConfigError(f"data {source!r}: no such file, or a folder without {', '.join(_SUFFIXES)}; check the path")
    return files or None


def _read_file(path: Path, text_field: str) -> Iterator[Mapping[str, Any]]:
    if path.suffix in _TABLES:
        yield from _load_dataset(str(path), _TABLES[path.suffix], data_files=str(path), split="train")
        return
    name = path.name.removesuffix(".gz")
    if not name.endswith(_OURS):
        raise ConfigError(f"data {str(path)!r} is of no known kind; give {', '.join(_SUFFIXES)}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            if name.endswith(".txt"):
                yield {text_field: file.read()}
            elif name.endswith(".json"):
                yield from _objects(json.load(file), path)
            else:
                yield from _objects((json.loads(line) for line in file if line.strip()), path)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data {str(path)!r} cannot be read ({error}); write it again, as UTF-8") from None


def _objects(values: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"data {str(path)!r} is not a list of objects; give one, or a .jsonl file")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ConfigError(f"data {str(path)!r}: entry {index} is {value!r}, not an object with fields")
        yield value


def _read_hub(name: str, data: DataConfig) -> Iterator[Mapping[str, Any]]:
    yield from _load_dataset(name, name, data.subset, split=data.split)


def _load_dataset(source: str, *arguments: Any, **options: Any) -> Iterator[Mapping[str, Any]]:
    """Through the library `datasets`, row by row, without a copy on disk."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"data {source!r} needs the package datasets: pip install 'hopskip[train]'") from None
    try:
        yield from load_dataset(*arguments, **options, streaming=True)
    except Exception as error:  # of many kinds: network, missing names, broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"data {source!r} is neither a file nor a data set that can be read ({reason})") from None
