"""A list of precisions, and the model in one after the other: for the commands that compare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from hopskip.cli.progress import loading
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig, Quantize

if TYPE_CHECKING:
    from hopskip.backends.base import Backend
    from hopskip.checkpoint.checkpoint import Checkpoint

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


def choose_precisions(load: LoadConfig, text: str | None) -> list[str]:
    """The precisions of a `PrecisionList`; where none is given, all that the backend has.

    Raises:
        ConfigError: one is unknown or given twice.
    """
    if text is not None:
        return parse_precisions(text)
    kind, _ = load.where()
    return ["float32", "bfloat16", "q8", "q4"] if kind == "native" else ["float32", "bfloat16"]


def load_each(load: LoadConfig, precisions: list[str], checkpoint: Checkpoint) -> Iterator[tuple[str, Backend]]:
    """The model in one precision after the other, with what may draft for it: the trained exit that ships for it, and a
    copy in the lowest precision, where that is lower than the model's own."""
    from hopskip.loading import find_exit, load_backend
    from hopskip.speculative import SpeculativeConfig

    trained_exit = find_exit(checkpoint, SpeculativeConfig())
    _, device = load.where()  # of all: precisions are compared in one place
    for name in precisions:
        chosen: dict[str, Any] = {"quantize" if name in get_args(Quantize) else "dtype": name}
        with loading(load.model) as bar:
            backend = load_backend(checkpoint, replace(load, device=device, **chosen), bar.doing)
            if trained_exit is not None:
                backend.attach_exit(trained_exit)
            if copy := backend.useful_copy(checkpoint):
                backend.attach_copy(checkpoint, copy)
        yield name, backend
