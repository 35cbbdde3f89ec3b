"""A list of precisions, and the model in one after the other: for the commands that compare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from hopskip.cli.console import loading
from hopskip.cli.options import LoadOptions
from hopskip.errors import ConfigError

if TYPE_CHECKING:
    from hopskip.backends.base import Model
    from hopskip.checkpoint.checkpoint import Checkpoint
    from hopskip.speculative import DraftPrecision

_NAMES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "q8": "q8",
    "q4": "q4",
}

PrecisionList = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Precisions, with commas between: auto, float32, bfloat16, float16, q8, q4 (default: float32 and "
        "bfloat16, on the native backend q8 and q4 as well).",
        show_default=False,
    ),
]


def parse_precisions(text: str) -> list[str]:
    """`bf16,q8` -> `["bfloat16", "q8"]`.

    Raises:
        ConfigError: one is unknown or given twice.
    """
    names = [_NAMES.get(part.strip(), "") for part in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"precision is {text!r}; give some of {', '.join(dict.fromkeys(_NAMES.values()))}, each once")
    return names


def choose_precisions(load: LoadOptions, text: str | None) -> list[str]:
    """The precisions of a `PrecisionList`; where none is given, all that the backend has.

    Raises:
        ConfigError: one is unknown or given twice; or the options name a single one as well, without effect.
    """
    from hopskip.loading import resolve_backend

    if load.dtype != "auto" or load.quantize is not None:
        given = f"--quantize {load.quantize}" if load.quantize is not None else f"--dtype {load.dtype}"
        raise ConfigError(f"{given} has no effect here; name the precisions, such as --precision bfloat16,q8")
    if text is not None:
        return parse_precisions(text)
    backend, _ = resolve_backend(**load.arguments())
    return ["float32", "bfloat16", "q8", "q4"] if backend == "native" else ["float32", "bfloat16"]


def load_each(
    load: LoadOptions, precisions: list[str], checkpoint: Checkpoint, *, quiet: bool
) -> Iterator[tuple[str, Model]]:
    """The model in one precision after the other, with the trained exit that ships for it, if any."""
    from hopskip.llm import find_exit
    from hopskip.loading import attach_drafts, load_model
    from hopskip.speculative import SpeculativeConfig

    branch = find_exit(checkpoint, SpeculativeConfig())

    for name in precisions:
        chosen = replace(load, quantize=name) if name in ("q8", "q4") else replace(load, dtype=name)
        with loading(load.model, quiet=quiet) as progress:
            model = load_model(checkpoint, progress=progress, **chosen.arguments())
        attach_drafts(model, checkpoint, branch, _draft_precision(model, checkpoint))
        yield name, model


def _draft_precision(model: Model, checkpoint: Checkpoint) -> DraftPrecision | None:
    """That of a copy to draft with: the lowest, where that is lower than the model's own."""
    from hopskip.backends.native.backend import NativeBackend
    from hopskip.backends.native.packed import PackedWeights

    if not isinstance(model, NativeBackend):
        return None
    gains = PackedWeights.load(checkpoint, "q4").bytes_per_pass < model.weight_bytes
    return "q4" if gains else None
