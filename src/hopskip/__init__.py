"""hopskip: a language model as its own draft model. Start with `LLM`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopskip.errors import CheckpointError, ClosedError, ConfigError, HopskipError, PromptError
    from hopskip.llm import LLM, GenerationResult, StreamPiece
    from hopskip.sampling_params import SamplingParams
    from hopskip.sequence import SpeculativeStats, Token
    from hopskip.serve.async_llm import AsyncLLM
    from hopskip.speculative import SpeculativeConfig

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "serve.async_llm",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "ConfigError": "errors",
    "GenerationResult": "llm",
    "HopskipError": "errors",
    "PromptError": "errors",
    "SamplingParams": "sampling_params",
    "SpeculativeConfig": "speculative",
    "SpeculativeStats": "sequence",
    "StreamPiece": "llm",
    "Token": "sequence",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "GenerationResult",
    "HopskipError",
    "PromptError",
    "SamplingParams",
    "SpeculativeConfig",
    "SpeculativeStats",
    "StreamPiece",
    "Token",
]


def __getattr__(name: str) -> Any:
    """Import on first use: importing PyTorch takes a second that `hopskip --help` need not wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What completion and `help` show: the lazy names too."""
    return sorted({*globals(), *__all__})
