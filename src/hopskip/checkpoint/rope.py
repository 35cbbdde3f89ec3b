"""Rotary position embeddings (arXiv 2104.09864) with the scalings that Llama-family checkpoints use."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopskip.errors import CheckpointError, shown

_POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim")

Floats = NDArray[np.float32]

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def is_number(value: object) -> bool:
    """An int or a float, but neither NaN nor infinite, nor too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary settings. Names follow transformers' `rope_parameters`; only the fields of its `rope_type` are used."""

    head_dim: int
    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from `factor`
    mscale: float | None = None  # yarn, as DeepSeek writes it
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    frequency_divisors: tuple[float, ...] = ()
    """GGUF files give the llama3 scaling so: one divisor for each of the head_dim / 2 frequencies."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise CheckpointError(
                    f"{name} is {shown(value)} in the model's RoPE settings; it must be a positive number"
                )
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise CheckpointError(f"{name} is {shown(value)} in the model's RoPE settings; it must be a number")
        original = self.original_max_position_embeddings
        if not is_number(original) or original < 0:
            raise CheckpointError(
                f"original_max_position_embeddings is {shown(original)} in the model's RoPE settings; it must be a "
                "number of positions"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (all earlier checkpoints)."""
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise CheckpointError(
                f"rope_type {shown(rope_type)} is not supported; hopskip has: {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
        if any(isinstance(value, Mapping) for value in scaling.values()):
            raise CheckpointError(
                f"RoPE settings that differ between layers are not supported: {shown(sorted(scaling))}"
            )
        if scaling.get("partial_rotary_factor") not in (None, 1):
            raise CheckpointError(
                f"partial_rotary_factor {shown(scaling['partial_rotary_factor'])} is not supported; it must be 1"
            )
        scaling.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
        # the field of the config itself comes first, as in transformers
        original = config.get("original_max_position_embeddings")
        if original or not scaling.get("original_max_position_embeddings"):
            scaling["original_max_position_embeddings"] = original or config.get("max_position_embeddings", 0)
        divisors = tuple(scaling.get("frequency_divisors") or ())
        if divisors and (len(divisors) != head_dim // 2 or min(divisors) <= 0):
            raise CheckpointError(
                f"{len(divisors)} RoPE divisors for {head_dim // 2} frequencies, or one is not positive"
            )
        known = {name: scaling[name] for name in cls.__dataclass_fields__ if scaling.get(name) is not None}
        if rope_type in ("linear", "llama3", "yarn") and "factor" not in known:
            raise CheckpointError(f"rope_type {shown(rope_type)} needs a 'factor' in the model's config, and has none")
        return cls(**{**known, "head_dim": head_dim, "rope_type": rope_type, "frequency_divisors": divisors})

    def check_frequencies(self) -> None:
        """Raises CheckpointError if the settings, each of them possible, give no rotation together."""
        try:
            is_finite = bool(np.isfinite(self.inverse_frequencies()).all()) and math.isfinite(self.amplitude)
        except (ValueError, ArithmeticError):
            is_finite = False
        if not is_finite:
            raise CheckpointError(
                f"the model's RoPE settings cannot be computed ({shown(self)}); download the model again"
            )

    def inverse_frequencies(self) -> Floats:
        """Rotation per position of each pair of dimensions, radians, float32 [head_dim / 2]."""
        # in float64, then rounded: the last bit is then the same on every machine
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            return self._scaled(np.power(self.rope_theta, -exponents).astype(np.float32))

    def _scaled(self, inv_freq: Floats) -> Floats:
        if self.rope_type == "linear":
            return inv_freq / np.float32(self.factor)
        if self.rope_type == "llama3":
            return self._llama3(inv_freq)
        if self.rope_type == "yarn":
            return self._yarn(inv_freq)
        if self.frequency_divisors:
            divisors: Floats = np.array(self.frequency_divisors, dtype=np.float32)
            return inv_freq / divisors
        return inv_freq

    def _llama3(self, inv_freq: Floats) -> Floats:
        """Slow rotations are stretched by `factor`, fast ones kept, those between blended."""
        turns = np.float32(self.original_max_position_embeddings / (2 * math.pi)) * inv_freq
        blend = (turns - np.float32(self.low_freq_factor)) / np.float32(self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0, 1)
        blended: Floats = (1 - blend) * inv_freq / np.float32(self.factor) + blend * inv_freq
        return blended

    def _yarn(self, inv_freq: Floats) -> Floats:
        """YaRN (arXiv 2309.00071): as llama3, with the blend linear in the dimension's index."""

        def dimension_of(num_rotations: float) -> float:
            """Index of the dimension that makes `num_rotations` turns over the original context."""
            turns = self.original_max_position_embeddings / (num_rotations * 2 * math.pi)
            return self.head_dim * math.log(turns) / (2 * math.log(self.rope_theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        index = np.arange(self.head_dim // 2, dtype=np.float32)
        stretched = np.clip((index - low) / np.float32(max(high - low, 0.001)), 0, 1)
        blended: Floats = inv_freq / np.float32(self.factor) * stretched + inv_freq * (1 - stretched)
        return blended

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin: 1 but for YaRN, which sharpens attention over the stretched context."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)

    def tables(self, length: int) -> tuple[Floats, Floats]:
        """cos and sin of every position below `length`, float32 [length, head_dim / 2] each."""
        angles = np.outer(np.arange(length, dtype=np.float32), self.inverse_frequencies()).astype(np.float64)
        cos, sin = np.cos(angles) * self.amplitude, np.sin(angles) * self.amplitude
        return cos.astype(np.float32), sin.astype(np.float32)
