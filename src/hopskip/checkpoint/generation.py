"""How the makers of a model would have its tokens chosen: `generation_config.json`, or a GGUF file's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hopskip.errors import CheckpointError, shown
from hopskip.sampling_params import SamplingParams

_GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Of the metadata `general.sampling.*`."""


def of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF file's settings, under Hugging Face's names."""
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in _GGUF_NAMES.items()}
    return {name: value for name, value in found.items() if value is not None}


def recommended_sampling(generation: Mapping[str, Any], place: object) -> dict[str, Any]:
    """Of a generation config what `SamplingParams` knows, by its names; empty for greedy decoding.

    A temperature draws, whether or not `do_sample` is there, and `do_sample` alone draws at temperature 1, as in vLLM.

    Args:
        place: where it is from, for messages.

    Raises:
        CheckpointError: a value is none that can be.
    """
    given = {name: generation.get(name) for name in _GGUF_NAMES.values()}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if generation.get("do_sample") is True:
        found.setdefault("temperature", 1.0)
    for name, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (name == "top_k" and not float(value).is_integer()):
            raise _damaged(name, value, place)
    if "top_k" in found:
        found["top_k"] = max(0, int(found["top_k"]))  # -1 keeps all tokens, too
    try:
        SamplingParams(**{**found, "temperature": found.get("temperature") or 1.0})
    except ValueError as error:
        raise CheckpointError(f"{place}: {error}; {_REMEDY}") from None
    draws = found.get("temperature", 0) > 0 and generation.get("do_sample") is not False
    return {name: value for name, value in found.items() if draws or name == "repetition_penalty"}


_REMEDY = "or leave the model's own settings aside (generation_config 'none')"


def _damaged(name: str, value: object, place: object) -> CheckpointError:
    return CheckpointError(f"{place}: {name} is {shown(value)}; it must be a number, {_REMEDY}")
