"""Packing weights: from a checkpoint's rows, or from arrays, to the strips that kernels stream.

Matrices go through the C++ packer some megabytes at a time, straight from the mapped checkpoint: none of them is ever
in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.native.formats import BLOCK, EXACT, PLAIN, STRIP, Format, strip_bytes
from hopskip.backends.native.isa import choose_isa, extension
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.errors import CheckpointError
from hopskip.machine import num_usable_cores

_CHUNK_BYTES = 32 << 20
_ALIGNMENT = 64

Bytes = NDArray[np.uint8]


class ScaleError(CheckpointError):
    """A scale does not fit float16: the matrix needs another format."""

    name = ""
    """Of the matrix, where it is one of a checkpoint's."""


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernels read it."""

    format: Format
    rows: int
    cols: int
    data: NDArray[np.int32]
    """int32 [strips, words of a strip], see `Matrix` in `native/formats.h`."""

    def unpack(self, rows: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """The values of all rows, or of some, float32 [rows, cols]."""
        chosen = np.arange(self.rows, dtype=np.int32) if rows is None else rows
        out = np.empty((len(chosen), self.cols), dtype=np.float32)
        extension.unpack(int(self.format), self.rows, self.cols, self.data, chosen, out)
        return out

    def select_rows(self, rows: NDArray[np.int32]) -> Packed:
        """The packed matrix of some rows, int32 [n], in that order."""
        out = empty_strips(self.format, len(rows), self.cols).view(np.int32)
        extension.select_rows(int(self.format), self.rows, self.cols, self.data, rows, out)
        return Packed(self.format, len(rows), self.cols, out)


def empty_strips(format: Format, rows: int, cols: int) -> Bytes:
    """Aligned memory for a packed matrix, uint8 [strips, bytes of a strip]."""
    shape = -(-rows // STRIP), strip_bytes(format, cols)
    return aligned(shape[0] * shape[1]).reshape(shape)


def aligned(num_bytes: int) -> Bytes:
    """uint8 [num_bytes], as kernels want it, not set."""
    memory = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


class Packer:
    """The C++ packer, on threads of its own."""

    def __init__(self) -> None:
        self._inner: Any = extension.Packer(choose_isa(), num_usable_cores())

    def pack_array(
        self, values: NDArray[np.float32], format: Format, weights: NDArray[np.float32] | None = None
    ) -> Packed:
        """A matrix of float32 values [rows, cols] in F32, BF16, Q8 or Q4.

        Args:
            weights: how much the errors of each column count, [cols]: Q4 only. None: all alike.

        Raises:
            CheckpointError: a value is not finite, or too large for a float16 scale.
        """
        rows, cols = values.shape
        out = empty_strips(format, rows, cols)
        if format is Format.Q4:
            weights = shares(np.ones(cols, dtype=np.float32) if weights is None else weights)
        self.pack(np.ascontiguousarray(values).view(np.uint8), "F32", cols, format, out, weights=weights)
        return Packed(format, rows, cols, out.view(np.int32))

    def strips(self, checkpoint: Checkpoint, name: str, format: Format) -> Iterator[Bytes]:
        """The strips of a checkpoint's matrix, a few at a time, uint8 [n, bytes of a strip]. Each array is overwritten
        by the next.

        Raises:
            ScaleError: see there.
            CheckpointError: a value is not finite.
        """
        stored = checkpoint.stored(name)
        rows, cols = stored.shape
        size = strip_bytes(format, cols)
        step = max(1, _CHUNK_BYTES // max(size, STRIP * cols * 4)) * STRIP
        is_exact = EXACT.get(stored.type.name) is format
        is_direct = is_exact or (
            stored.type.name in PLAIN and format in (Format.F32, Format.BF16, Format.Q8, Format.Q4)
        )
        order = checkpoint.row_order(name)
        weights = shares(_importance(checkpoint, name, cols)) if format is Format.Q4 and not is_exact else None
        buffer = aligned(-(-min(step, rows) // STRIP) * size).reshape(-1, size)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            out, places, type_name = buffer[: -(-count // STRIP)], None, stored.type.name
            if not is_direct:
                given, type_name = checkpoint.rows(name, first, count).view(np.uint8), "F32"
            elif order is None:
                given = stored.blocks(first, count)
            else:
                given, places = stored.blocks(), order[first : first + count]
            try:
                self.pack(given, type_name, cols, format, out, places, weights)
            except CheckpointError as error:
                located = type(error)(f"{name} of {checkpoint.path}: {error}")
                if isinstance(located, ScaleError):
                    located.name = name
                raise located from None
            yield out

    def pack(
        self,
        rows: Bytes,
        stored_type: str,
        cols: int,
        format: Format,
        out: Bytes,
        order: NDArray[np.int32] | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Pack rows, uint8 [n, bytes of a row], or those that `order` lists, to uint8 [strips, bytes of a strip].

        Args:
            weights: see `shares`; Q4 from plain values only.

        Raises:
            ScaleError, CheckpointError: see `strips`.
        """
        wrong: str | None = self._inner.pack(
            format=int(format), stored=stored_type, rows=rows, cols=cols, order=order, weights=weights, out=out
        )
        if wrong == "a scale does not fit float16":
            raise ScaleError(f"{wrong}; use bfloat16 weights")
        if wrong is not None:
            raise CheckpointError(f"{wrong}; the checkpoint is damaged, download it again")


def shares(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each column counts in its block: float32 [cols padded to blocks], of every block 1 in all. A block whose
    columns all count for nothing is fitted as any other."""
    blocks = np.zeros((-(-len(weights) // BLOCK), BLOCK), dtype=np.float32)
    blocks.reshape(-1)[: len(weights)] = weights
    sums = blocks.sum(axis=1, keepdims=True)
    blocks[sums[:, 0] <= 0] = 1
    normalised: NDArray[np.float32] = blocks / blocks.sum(axis=1, keepdims=True)
    return normalised.reshape(-1)


_NORM_BEFORE = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}


def _importance(checkpoint: Checkpoint, name: str, cols: int) -> NDArray[np.float32]:
    """How much each column of a matrix matters: the mean square of its input, as far as the weights tell. The input of
    the first matrices of attention and MLP is normalised, then scaled by the norm's weights; of others nothing is
    known."""
    layer, _, part = name.removesuffix(".weight").rpartition(".")
    norm = _NORM_BEFORE.get(part)
    if norm is None:
        return np.ones(cols, dtype=np.float32)
    return checkpoint.array(f"{layer.rpartition('.')[0]}.{norm}.weight") ** 2
