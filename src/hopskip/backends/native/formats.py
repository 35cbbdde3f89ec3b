"""The weight formats of the native engine: their sizes, and which of them a stored type is packed to.

The layout is described in `native/formats.h`.
"""

from __future__ import annotations

from enum import IntEnum

BLOCK = 32
"""Columns that share a scale."""
STRIP = 16
"""Output rows that are packed together."""
_UNIT_BYTES = _HEADER_BYTES = 64
_FACTOR_BYTES = 32  # of a block of a K-quant


class Format(IntEnum):
    """How the native engine stores a matrix. Numbers and names are those of `Format` in `native/formats.h`."""

    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3
    Q4_0 = 4
    Q5_0 = 5
    Q5_1 = 6
    IQ4 = 7
    MXFP4 = 8
    Q2_K = 9
    Q3_K = 10
    Q4_K = 11
    Q5_K = 12
    Q6_K = 13

    @property
    def is_quantized(self) -> bool:
        return self not in (Format.F32, Format.BF16)

    @property
    def bits(self) -> int:
        """Of a stored number; scales not counted."""
        return _BITS[self]


_BITS = {
    Format.F32: 32, Format.BF16: 16, Format.Q8: 8, Format.Q4: 4, Format.Q4_0: 4, Format.Q5_0: 5, Format.Q5_1: 5,
    Format.IQ4: 4, Format.MXFP4: 4, Format.Q2_K: 2, Format.Q3_K: 3, Format.Q4_K: 4, Format.Q5_K: 5, Format.Q6_K: 6,
}  # fmt: skip

EXACT = {
    "F32": Format.F32,
    "BF16": Format.BF16,
    "Q8_0": Format.Q8,
    "Q4_0": Format.Q4_0,
    "Q4_1": Format.Q4,
    "Q5_0": Format.Q5_0,
    "Q5_1": Format.Q5_1,
    "IQ4_NL": Format.IQ4,
    "IQ4_XS": Format.IQ4,
    "MXFP4": Format.MXFP4,
    "Q2_K": Format.Q2_K,
    "Q3_K": Format.Q3_K,
    "Q4_K": Format.Q4_K,
    "Q5_K": Format.Q5_K,
    "Q6_K": Format.Q6_K,
}
"""Stored types that have a format of their own, which keeps their values. Of IQ4_XS, the products of its two scales are
rounded to float16: an error of 2^-11 at most, a hundredth of the format's own."""

PLAIN = ("F32", "F16", "BF16")
"""Stored types of plain values, which the packer converts itself."""


def strip_bytes(format: Format, cols: int) -> int:
    """Bytes of 16 packed rows."""
    blocks = -(-cols // BLOCK)
    units = blocks * BLOCK * format.bits // 32
    if not format.is_quantized:
        return units * _UNIT_BYTES
    if format in (Format.Q2_K, Format.Q3_K, Format.Q4_K, Format.Q5_K, Format.Q6_K):
        return units * _UNIT_BYTES + blocks // 8 * _HEADER_BYTES + blocks * _FACTOR_BYTES
    has_minima = format in (Format.Q4, Format.Q5_1)
    return units * _UNIT_BYTES + (blocks if has_minima else -(-blocks // 2)) * _HEADER_BYTES


def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a packed matrix."""
    return -(-rows // STRIP) * strip_bytes(format, cols)


def choose_format(stored_type: str, name: str, precision: str) -> Format:
    """What a precision (see `NativeBackend.load`) makes of a matrix.

    Args:
        stored_type: as in `BLOCK_TYPES`.
        name: the tensor's; embedding and head are never made 4 bits: there they cost quality out of proportion, so
            GGUF files of type Q4_0 do not either.
    """
    own = EXACT.get(stored_type)
    if precision == "auto":
        return own if own is not None else Format.BF16 if stored_type in PLAIN else Format.Q8
    if precision in ("float32", "bfloat16", "q8"):
        return {"float32": Format.F32, "bfloat16": Format.BF16, "q8": Format.Q8}[precision]
    is_edge = name in ("model.embed_tokens.weight", "lm_head.weight")
    if own is not None and own.bits <= (Format.Q8 if is_edge else Format.Q4).bits:
        return own
    return Format.Q8 if is_edge else Format.Q4
