"""What can be exported, each by one function: a model or a trained exit in, a folder out.

All of them take:
    model: a Hugging Face folder, a GGUF file, or a Hub id; None: the default model.
    out: the folder to write; it is there when the function returns, complete, or not at all.
    base: what the card and the configs call the model, in place of its Hub id or path.
    force: replace `out` if it is there and not empty.
    progress: told what is being done, and the share of it that is done.
and raise:
    CheckpointError: the model or exit cannot be found, read, or written in the other format with the same meaning.
    ConfigError: an option cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.lora import is_adapter
from hopskip.checkpoint.safetensors import read_safetensors
from hopskip.checkpoint.trained_exit import TrainedExit, shipped_exit
from hopskip.errors import CheckpointError, ConfigError, ResourceError, check_choice, check_count, shown
from hopskip.export import card, two_layers
from hopskip.export.gguf_file import GGUFType, check_gguf, kept_type, plan_gguf
from hopskip.export.hf_folder import config_json, generation_json, weights, write_tokenizer
from hopskip.export.self_check import check_drafter
from hopskip.export.source import Source, open_source
from hopskip.export.tensors import PLAIN_NAMES, DType, Outgoing, Progress, from_values, write_json, write_shards
from hopskip.hf.folder import write_custom_generate
from hopskip.loading import DTYPE_NAMES
from hopskip.machine import replacing_folder

Format = Literal["folder", "gguf"]
DTypeOrQ8 = Literal["auto", "float32", "bfloat16", "float16", "q8"]
ExitDType = Literal["auto", "float32", "bfloat16"]

_GGUF_TYPES: dict[str, GGUFType] = {
    "auto": "auto",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "q8": "Q8_0",
}
_DRAFT_TOKENS = 4
"""Draft length where nobody recommends one."""


def early_exit(
    model: str | Path | None,
    out: str | Path,
    *,
    exit_layer: int | None = None,
    format: Format = "folder",
    dtype: str = "auto",
    base: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The first layers of a model as a model of its own, to draft for the whole: an ordinary checkpoint folder (vLLM's
    `draft_model`, SGLang's STANDALONE, transformers' `assistant_model`), or a GGUF file (llama.cpp's `-md`).

    Args:
        exit_layer: how many layers; None: as many as the model's makers recommend.
        dtype: of the weights; `auto` keeps a plain model's, and makes a quantized one bfloat16 in a folder. `q8` (Q8_0)
            is for GGUF.
    """
    check_choice("format", format, Format)
    chosen = _dtype(dtype, DTypeOrQ8 if format == "gguf" else DType)
    source = open_source(model, base)
    whole = source.checkpoint.config
    exit_layer = _exit_layer(whole, exit_layer)
    if exit_layer is None:
        raise ConfigError(
            "exit_layer (--exit-layer) is needed: the model recommends none; it must be between 1 and "
            f"{whole.num_hidden_layers - 1}"
        )
    num_draft_tokens = whole.recommended_num_draft_tokens or _DRAFT_TOKENS
    config = replace(
        whole, num_hidden_layers=exit_layer, recommended_exit_layer=None, recommended_num_draft_tokens=None
    )
    with _writing(out, source, force) as folder:
        name = f"{source.name}-exit{exit_layer}"
        if format == "gguf":
            plan = plan_gguf(source, config, _GGUF_TYPES[chosen], name)
            file = folder / _file_name(source, name, chosen)
            plan.write(file, progress)
            check_gguf(file, plan)
            text = card.early_exit_gguf(source, config, num_draft_tokens, file.name)
        else:
            _write_folder(source, folder, config, chosen, progress, num_draft_tokens)  # type: ignore[arg-type]
            text = card.early_exit(source, config, num_draft_tokens, Path(out).name)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return Path(out).expanduser()


def merged(
    model: str | Path | None,
    out: str | Path,
    *,
    dtype: str = "auto",
    exit_layer: int | None = None,
    base: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """A whole model as an ordinary checkpoint folder: a LoRA adapter merged into its base, or what was quantized (a
    GGUF file, 8-bit floats with scales) in a plain type.

    Args:
        model: of an adapter the base must be here already.
        dtype: of the weights; `auto` keeps the base's, and makes what was quantized bfloat16.
        exit_layer: the folder carries code by which transformers' `generate` drafts with so many layers
            (`hopskip.hf.write_custom_generate`); None: where the model's makers recommend a number.
    """
    chosen = _dtype(dtype, DType)
    source = open_source(model, base)
    path, config = source.checkpoint.path, source.checkpoint.config
    exit_layer = _exit_layer(config, exit_layer)
    is_plain = path.is_dir() and not is_adapter(path) and source.checkpoint.quantization is None
    if chosen == "auto" and is_plain and exit_layer is None:
        raise ConfigError(
            f"{path} is an ordinary checkpoint already: there is nothing to merge. Give an adapter, a GGUF file, "
            "another dtype, or an exit_layer (--exit-layer) to draft from"
        )
    with _writing(out, source, force) as folder:
        _write_folder(source, folder, config, chosen, progress)  # type: ignore[arg-type]
        if exit_layer is not None:
            write_custom_generate(folder, exit_layer, config.recommended_num_draft_tokens or _DRAFT_TOKENS)
        (folder / "README.md").write_text(card.merged(source, Path(out).name, exit_layer), encoding="utf-8")
    return Path(out).expanduser()


def _exit_layer(config: ModelConfig, given: int | None) -> int | None:
    """How many layers to draft with; None if nobody says.

    Raises:
        ConfigError: the model has no such exit.
    """
    chosen = config.recommended_exit_layer if given is None else given
    allowed = f"between 1 and {config.num_hidden_layers - 1}"
    if chosen is None:
        return None
    if check_count("exit_layer", chosen, allowed) >= config.num_hidden_layers:
        raise ConfigError(
            f"exit_layer is {chosen}; this model has {config.num_hidden_layers} layers, so it must be {allowed}"
        )
    return chosen


def gguf(
    model: str | Path | None,
    out: str | Path,
    *,
    dtype: str = "auto",
    base: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """A model, or an adapter merged into its base, as one GGUF file in a folder.

    Args:
        dtype: of the matrices; `auto` keeps each one's exactly (8-bit floats with scales become bfloat16); `q8` is
            llama.cpp's Q8_0. Norms and biases are float32.
    """
    chosen = _dtype(dtype, DTypeOrQ8)
    source = open_source(model, base)
    with _writing(out, source, force) as folder:
        plan = plan_gguf(source, source.checkpoint.config, _GGUF_TYPES[chosen], source.name)
        file = folder / _file_name(source, source.name, chosen)
        plan.write(file, progress)
        check_gguf(file, plan)
        (folder / "README.md").write_text(card.gguf(source, file.name), encoding="utf-8")
    return Path(out).expanduser()


def eagle3(
    model: str | Path | None,
    out: str | Path,
    *,
    exit_branch: str | Path | None = None,
    dtype: str = "auto",
    base: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """A trained exit as an EAGLE-3 drafter, for vLLM: see `hopskip.export.two_layers`.

    What was written is read again: names and shapes against a table (vLLM says nothing of a tensor that is missing),
    and logits against the exit's.

    Args:
        exit_branch: the exit's folder; None: the one that comes with hopskip for this model.
        dtype: of the weights; `auto` is bfloat16, in which exits are stored.
    """
    chosen = _dtype(dtype, ExitDType)
    source = open_source(model, base)
    checkpoint = source.checkpoint
    place = shipped_exit(checkpoint.fingerprint) if exit_branch is None else Path(exit_branch).expanduser()
    if place is None:
        raise ConfigError("exit_branch (--exit-branch) is needed: no trained exit comes with hopskip for this model")
    exit = TrainedExit.load(place)
    exit.check_base(checkpoint.fingerprint)
    exit.check(checkpoint.config)
    two_layers.check_exact(exit, checkpoint.config)
    plain = PLAIN_NAMES["bfloat16" if chosen == "auto" else chosen]
    if progress is not None:
        progress("making the drafter", None)
    made = two_layers.tensors(exit, checkpoint)
    outgoing = [from_values(name, values, kind or plain) for name, (kind, values) in made.items()]
    with _writing(out, source, force) as folder:
        write_shards(folder, outgoing, progress)
        write_json(folder / "config.json", two_layers.config_json(exit, checkpoint.config, source.base, plain))
        if progress is not None:
            progress("comparing logits with the exit's", None)
        difference = _check_written(folder, exit, source)
        (folder / "README.md").write_text(card.eagle3(source, exit, difference, Path(out).name), encoding="utf-8")
    return Path(out).expanduser()


def _check_written(folder: Path, exit: TrainedExit, source: Source) -> float:
    config = source.checkpoint.config
    found, _ = read_safetensors(folder / "model.safetensors")
    wanted = two_layers.shapes(exit, config)
    for name in sorted(found.keys() | wanted.keys()):
        shape = found[name].shape if name in found else None
        if shape != wanted.get(name):
            raise CheckpointError(
                f"the drafter's {name} has shape {shape} instead of {wanted.get(name)}; this is a mistake of hopskip's"
            )
    return check_drafter({n: np.asarray(t) for n, t in found.items() if t.type.dtype}, exit, config)


def _write_folder(
    source: Source,
    folder: Path,
    config: ModelConfig,
    dtype: DType,
    progress: Progress | None,
    num_draft_tokens: int | None = None,
) -> None:
    """A checkpoint folder with the source's first layers.

    Args:
        num_draft_tokens: that transformers draws from it, if it is to draft.
    """
    outgoing: list[Outgoing] = weights(source.checkpoint, config, dtype)
    settings = generation_json(source)
    if num_draft_tokens is not None:  # transformers takes these from the assistant, and from nowhere else
        settings |= {"num_assistant_tokens": num_draft_tokens, "num_assistant_tokens_schedule": "constant"}
    write_json(folder / "config.json", config_json(source, config, dtype))
    write_json(folder / "generation_config.json", settings)
    write_tokenizer(source, folder)
    write_shards(folder, outgoing, progress)


def _file_name(source: Source, name: str, dtype: str) -> str:
    kind = _GGUF_TYPES[dtype]
    return f"{name}-{kept_type(source.checkpoint) if kind == 'auto' else kind}.gguf"


def _dtype(given: str, choices: object) -> str:
    """A type under the name that hopskip has for it.

    Raises:
        ConfigError: it is none of the choices.
    """
    text = str(given).lower().removeprefix("torch.")
    name = {"q8_0": "q8"}.get(text, DTYPE_NAMES.get(text, given))
    check_choice("dtype", name, choices)
    return name


@contextmanager
def _writing(out: str | Path, source: Source, force: bool) -> Iterator[Path]:
    """An empty folder, which becomes `out` when the block ends well.

    Raises:
        ConfigError: `out` cannot be written to, or is not empty and `force` is not given.
        ResourceError: the disk is full, say.
    """
    place = Path(out).expanduser()
    _check_place(place, source, force)
    try:
        with replacing_folder(place) as folder:
            yield folder
    except OSError as error:
        raise ResourceError(
            f"{place} cannot be written ({error.strerror or error}); make room or give another folder"
        ) from None


def _check_place(place: Path, source: Source, force: bool) -> None:
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{shown(str(place))} is a file; give a folder")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not force:
        raise ConfigError(f"{place} is there already and not empty; give another folder, or replace it (--force)")
    kept = [Path.cwd(), source.checkpoint.path.resolve(), *(f.resolve() for f in (source.model_folder,) if f)]
    if inside := next((path for path in kept if path.is_relative_to(place.resolve())), None):
        raise ConfigError(f"{place} holds {inside}, so it cannot be replaced; give another folder")
