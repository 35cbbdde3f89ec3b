"""What a run's folder was made with: the whole recipe, and what it stands for. A run goes on only under the same."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.errors import ConfigError, shown
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.checkpoint import replacing_file
from hopskip.train.exit.recipe import ExitRecipe

STORED = "recipe.json"
MAY_CHANGE = (
    *("output", "base", "device", "threads", "branches", "stages", "search", "report_to", "num_workers"),
    *("collect.max_num_seqs", "collect.server.url", "collect.server.api_key_env", "collect.server.concurrency"),
    *("collect.server.max_retries", "collect.server.timeout"),
)
"""Keys of a recipe that a folder may go on with other values of, sections with all that is in them. The weights that
`base` names count, whatever it calls them; of `branches` those with layers that were not collected are refused, and of
`stages` those that differ from what was trained, when it is their turn."""


def check_stored(recipe: ExitRecipe, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Compare a run's folder with the recipe that is to go on in it; note it there if the folder is new.

    Raises:
        ConfigError: what is there was made otherwise; the message names the first key that differs.
        TrainingError: the note cannot be written.
    """
    folder, path = recipe.folder, recipe.folder / STORED
    settings = {"recipe": asdict(recipe), "content": _content(recipe, checkpoint, tokenizer)}
    stored = read_stored(folder)
    if stored is not None:
        before, after = _flat(stored["recipe"]), settings_of(recipe)
        content = stored["content"]
        for name in sorted({*before, *after}):
            was, now = before.get(name), after.get(name)
            if was != now and not _may_change(name):
                raise ConfigError(
                    f"{folder} was made with {name} = {_said(was)}, not {_said(now)}: set it back, or use another "
                    "output"
                )
        for name, now in settings["content"].items():
            if content.get(name) != now:
                raise ConfigError(f"{folder} was made with another content of {name}; use another output")
    elif (folder / "prompts.jsonl").exists() or any((folder / "data").glob("shard-*")):
        raise ConfigError(f"{folder} holds data, but no {STORED} that says of what run; use another output")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as partial:
        partial.write_text(json.dumps(settings, indent=1, default=_plain) + "\n", encoding="utf-8")


def read_stored(folder: Path) -> dict[str, Any] | None:
    """The `recipe` and the `content` of a run's folder; None if it has none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / STORED
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored["recipe"], dict) or not isinstance(stored["content"], dict):
            raise ValueError("no recipe or no content")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); use another output") from None
    return stored


def settings_of(recipe: ExitRecipe) -> dict[str, Any]:
    """All keys of a recipe by their whole names: `prompts.seed`."""
    return _flat(asdict(recipe))


def _said(value: object) -> str:
    return "nothing" if value is None else shown(value)


def _may_change(name: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in MAY_CHANGE)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """As JSON has them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.loads(json.dumps(value, default=_plain))
    return found


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _content(recipe: ExitRecipe, checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of what names of models and files stand for."""
    own = hashlib.sha256(f"{tokenizer.inner.to_str()}{tokenizer.chat_template}".encode())
    files = {source: _digest(source) for source in (*recipe.prompts.files, *recipe.prompts.exclude)}
    return {"the model's weights": checkpoint.fingerprint, "the model's tokenizer": own.hexdigest(), **files}


def _digest(source: str) -> str:
    """Of a file, or of all files of a folder or pattern. A data set of the Hub is taken to stay as it is."""
    place = Path(source)
    names = sorted(glob.glob(str(place / "**" / "*") if place.is_dir() else source, recursive=True))
    digest = hashlib.sha256()
    for path in (Path(name) for name in names):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()
