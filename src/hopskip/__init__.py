"""hopskip: a language model as its own draft model. See `LLM`."""

from hopskip.draft.config import SpeculativeConfig
from hopskip.errors import CheckpointError, ConfigError, HopskipError, PromptError
from hopskip.llm import LLM, GenerationResult, StreamPiece
from hopskip.sampling import SamplingParams
from hopskip.sequence import Token
from hopskip.stats import SpeculativeStats

__all__ = [
    "LLM",
    "CheckpointError",
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
__version__ = "0.1.0"
