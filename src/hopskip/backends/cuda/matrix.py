"""Weights of one linear, plain or packed to 8 or 4 bits, as the kernels of this package read them.

Shape letters: N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hopskip.errors import ConfigError

Precision = Literal["int8", "float8", "int4"]
"""`int8` and `float8` (e4m3) have one scale per output, `int4` one per output and `GROUP` inputs."""

GROUP = 128
_LARGEST = {"int8": 127.0, "float8": 448.0, "int4": 7.0}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [N, K]."""

    values: Tensor
    """[N, K] in a float type, int8 or float8_e4m3fn; int4: uint8 [N, K / 2], of which byte j holds column j in its low
    half and column j + K / 2 in its high one, each plus 8. So a kernel unpacks two tiles without shuffling."""
    scales: Tensor | None = None
    """float32 [N] (int8, float8) or [N, K / GROUP] (int4); None for a plain matrix."""

    @classmethod
    def pack(cls, weights_NK: Tensor, precision: Precision | None) -> Matrix:
        """Round to the nearest value of a precision; None keeps the tensor itself.

        Raises:
            ConfigError: the precision is unknown, or K does not divide into its groups.
        """
        if precision is None:
            return cls(weights_NK)
        if precision not in get_args(Precision):
            raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(get_args(Precision))}, or None")
        columns = weights_NK.shape[1]
        if precision == "int4" and columns % (2 * GROUP):
            raise ConfigError(
                f"int4 needs matrices whose inputs are a multiple of {2 * GROUP}, and this model has one of {columns}; "
                "use int8 or float8"
            )
        width = GROUP if precision == "int4" else columns
        groups_NGW = weights_NK.float().view(len(weights_NK), -1, width)
        scales_NG = groups_NGW.abs().amax(dim=-1).clamp_min(1e-12) / _LARGEST[precision]
        scaled = (groups_NGW / scales_NG[..., None]).flatten(1)
        if precision == "float8":
            return cls(scaled.to(torch.float8_e4m3fn), scales_NG[:, 0])
        rounded = scaled.round_()
        if precision == "int8":
            return cls(rounded.to(torch.int8), scales_NG[:, 0])
        low, high = (rounded + 8).to(torch.uint8).chunk(2, dim=1)
        return cls(low | (high << 4), scales_NG)

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.values.shape
        return rows, columns * 2 if self.values.dtype == torch.uint8 else columns

    @property
    def nbytes(self) -> int:
        """What a pass reads."""
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values that the matrix stands for, [N, K]; a plain matrix's own tensor."""
        if self.scales is None:
            return self.values
        if self.values.dtype == torch.uint8:
            nibbles = torch.cat((self.values & 0xF, self.values >> 4), dim=1).float() - 8
            return (nibbles.view(len(nibbles), -1, GROUP) * self.scales[..., None]).flatten(1).to(dtype)
        return (self.values.float() * self.scales[:, None]).to(dtype)
