# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton's language has no types.)
"""The operations of `kernels.py` in Triton, for few rows: every weight is streamed once for up to 16 of them.

A row's bits never depend on its companions: tiles have one shape whatever the number of rows, sums over K run in one
order, and attention is split at fixed positions. So a draft's verify pass gives the very tokens of plain decoding, and
costs what one token costs until arithmetic, not memory, is the limit.

Seven kernels make a layer: qkv (with its norm), rotate and store, two for attention, output projection (with the
residual), gate and up (with norm and SwiGLU), down (with the residual).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hopskip.backends.cuda.kernels import Kernels
from hopskip.backends.cuda.matrix import GROUP, Matrix
from hopskip.checkpoint.config import ModelConfig

Epilogue = Literal["plain", "gated", "best"]
_BLOCK_M = 16
"""Rows of a tile: the least that tensor cores take. Fewer are padded, which costs no memory traffic."""
_MAX_SPLITS = 64
_MIN_SPLIT = 128
_FORMATS = {torch.int8: "rows", torch.float8_e4m3fn: "rows", torch.uint8: "int4"}


@dataclass(frozen=True)
class Tiling:
    """How a matrix product is cut up. A function of the matrix's shape and format only, never of the rows."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4


class TritonKernels(Kernels):
    """For CUDA devices of compute capability 8.0 and above (float8: 8.9).

    Args:
        tilings: by outputs, inputs, type of the stored values and epilogue; what is not named gets `default_tiling`.
    """

    row_exact = True

    def __init__(
        self, config: ModelConfig, tilings: dict[tuple[int, int, torch.dtype, Epilogue], Tiling] | None = None
    ) -> None:
        self._config = config
        self.tilings = tilings or {}

    def linear(
        self,
        x_ND: Tensor,
        matrix: Matrix,
        *,
        norm: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        out = x_ND.new_empty((len(x_ND), matrix.shape[0]))
        self._launch(x_ND, matrix, "plain", out, norm=norm, bias=bias, residual=residual)
        return out

    def gated(self, x_ND: Tensor, matrix: Matrix, norm: Tensor) -> Tensor:
        out = x_ND.new_empty((len(x_ND), matrix.shape[0] // 2))
        self._launch(x_ND, matrix, "gated", out, norm=norm)
        return out

    def best(self, x_ND: Tensor, matrix: Matrix, norm: Tensor) -> Tensor:
        num_tiles = triton.cdiv(matrix.shape[0], self._tiling(matrix, "best").block_n)
        # each tile leaves its best logit, so that logits never go to memory
        logits = x_ND.new_empty((len(x_ND), num_tiles), dtype=torch.float32)
        ids = x_ND.new_empty((len(x_ND), num_tiles), dtype=torch.int64)
        self._launch(x_ND, matrix, "best", logits, norm=norm, ids=ids)
        return ids.gather(1, logits.argmax(dim=-1, keepdim=True)).squeeze(1)

    def rotate_and_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor],
        position_B: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
    ) -> Tensor:
        config = self._config
        num_heads, num_kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q_NHE = qkv.new_empty((len(qkv), num_heads, head_dim))
        q_norm, k_norm = norms or (qkv, qkv)
        _rotate_and_store[(len(qkv), num_heads + 2 * num_kv_heads)](
            qkv, q_norm, k_norm, *tables, position_B, q_NHE, k_BKTE, v_BKTE,
            len(qkv) // len(position_B), k_BKTE.shape[2], config.rms_norm_eps,
            H=num_heads, K=num_kv_heads, HALF=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim // 2),
            HAS_NORMS=norms is not None, num_warps=1,
        )  # fmt: skip
        return q_NHE

    def attend(self, q_NHE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, position_B: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = q_NHE.shape
        batch, num_kv_heads, length, _ = k_BKTE.shape
        rows, group = num_rows // batch, num_heads // num_kv_heads
        split = max(_MIN_SPLIT, triton.next_power_of_2(triton.cdiv(length, _MAX_SPLITS)))
        num_splits = triton.cdiv(length, split)
        block_e = triton.next_power_of_2(max(16, head_dim))
        sums = q_NHE.new_empty((num_rows, num_heads, num_splits, head_dim), dtype=torch.float32)
        weights = q_NHE.new_empty((2, num_rows, num_heads, num_splits), dtype=torch.float32)
        out = q_NHE.new_empty((num_rows, num_heads * head_dim))
        # queries of one tile share a key/value head; more rows go to further tiles, so a tile's shape is fixed
        block_q = max(16, triton.next_power_of_2(group))
        rows_per_tile = block_q // group
        window = self._config.sliding_window or length
        _attend_split[(num_splits, num_kv_heads * triton.cdiv(rows, rows_per_tile), batch)](
            q_NHE, k_BKTE, v_BKTE, position_B, sums, weights[0], weights[1],
            rows, length, num_splits, window, head_dim**-0.5 * 1.4426950408889634,
            H=num_heads, K=num_kv_heads, E=head_dim, BLOCK_E=block_e, SPLIT=split, BLOCK_T=64,
            BLOCK_Q=block_q, ROWS=rows_per_tile, num_warps=4, num_stages=2,
        )  # fmt: skip
        _attend_merge[(num_rows, num_heads)](
            sums, weights[0], weights[1], position_B, out, rows, num_splits, window,
            H=num_heads, E=head_dim, BLOCK_E=block_e, SPLIT=split, BLOCK_S=triton.next_power_of_2(num_splits),
            num_warps=4,
        )  # fmt: skip
        return out

    def _tiling(self, matrix: Matrix, epilogue: Epilogue) -> Tiling:
        key = (*matrix.shape, matrix.values.dtype, epilogue)
        return self.tilings[key] if key in self.tilings else default_tiling(matrix)

    def _launch(
        self,
        x_ND: Tensor,
        matrix: Matrix,
        epilogue: Epilogue,
        out: Tensor,
        *,
        norm: Tensor | None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> None:
        outputs, inputs = matrix.shape
        tiling = self._tiling(matrix, epilogue)
        form = _FORMATS.get(matrix.values.dtype, "plain")
        depth = inputs // 2 if form == "int4" else inputs
        grid = (triton.cdiv(outputs, tiling.block_n), triton.cdiv(len(x_ND), _BLOCK_M))

        def present(tensor: Tensor | None) -> Tensor:
            return x_ND if tensor is None else tensor  # never read: the switches below say so

        _linear[grid](
            x_ND, matrix.values, present(matrix.scales), present(norm), present(bias), present(residual), out,
            present(ids), len(x_ND), outputs, depth, grid[0], self._config.rms_norm_eps,
            FORMAT=form, NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
            EPILOGUE=epilogue, EVEN=depth % tiling.block_k == 0,
            BLOCK_M=_BLOCK_M, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip


def default_tiling(matrix: Matrix) -> Tiling:
    """Wide tiles where there are enough of them for every multiprocessor, narrow ones else."""
    outputs, _ = matrix.shape
    if matrix.values.dtype == torch.float32:
        return Tiling(16, 64, num_stages=3)
    block_n = 32 if outputs >= 8192 else 16
    return Tiling(block_n, GROUP if matrix.values.dtype == torch.uint8 else 256)


def candidate_tilings(matrix: Matrix) -> list[Tiling]:
    """Tilings worth timing on a device for a matrix of this format."""
    if matrix.values.dtype == torch.uint8:  # a step over K is a group of scales
        return [Tiling(n, GROUP, w, s) for n, w, s in ((16, 4, 4), (32, 4, 4), (32, 4, 6), (64, 4, 4), (64, 8, 4))]
    sizes = ((16, 256, 4, 4), (16, 512, 8, 4), (32, 128, 4, 5), (32, 256, 4, 4), (64, 128, 4, 5),
             (64, 256, 8, 3))  # fmt: skip
    return [Tiling(n, k, w, s) for n, k, w, s in sizes]


@triton.jit(do_not_specialize=["M"])  # one binary, so one order of sums, for every number of rows
def _linear(
    x, weights, scales, norm, bias, residual, out, ids, M, N, K, num_tiles, eps,
    FORMAT: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EPILOGUE: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of x [M, D] times weights [N, D]; K is D, or D / 2 where a byte holds two columns."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(column, N - 1)
    if EPILOGUE == "gated":
        # gate and up of one output as neighbours in the tile
        row = tl.minimum(column // 2, N // 2 - 1) + (column % 2) * (N // 2)
    k = tl.arange(0, BLOCK_K)
    row_start = row.to(tl.int64) * K
    x_stride = K * 2 if FORMAT == "int4" else K
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = (first + k < K) | EVEN
        x_tile = tl.load(
            x + m[:, None] * x_stride + first + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0
        )
        w_pointers = weights + row_start[None, :] + first + k[:, None]
        w_tile = tl.load(w_pointers) if EVEN else tl.load(w_pointers, mask=inside[:, None], other=0)
        if NORM:
            wide = x_tile.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(norm + first + k, mask=inside, other=0.0).to(tl.float32)
            x_tile = (wide * factor[None, :]).to(x_tile.dtype)
        if FORMAT == "int4":
            num_groups = x_stride // BLOCK_K
            x_high = tl.load(x + m[:, None] * x_stride + K + first + k[None, :], mask=(m < M)[:, None], other=0.0)
            if NORM:
                wide = x_high.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
                factor = tl.load(norm + K + first + k).to(tl.float32)
                x_high = (wide * factor[None, :]).to(x_high.dtype)
            group = row * num_groups + first // BLOCK_K
            low = ((w_tile & 0xF).to(tl.int8) - 8).to(x_tile.dtype)
            high = ((w_tile >> 4).to(tl.int8) - 8).to(x_tile.dtype)
            sums += tl.dot(x_tile, low, input_precision="ieee") * tl.load(scales + group)[None, :]
            sums += tl.dot(x_high, high, input_precision="ieee") * tl.load(scales + group + num_groups // 2)[None, :]
        else:
            sums = tl.dot(x_tile, w_tile.to(x_tile.dtype), sums, input_precision="ieee")
    if NORM:
        # the scale of a row is known only now; it is a factor of the whole row
        sums *= tl.rsqrt(squares / x_stride + eps)[:, None]
    if FORMAT == "rows":
        sums *= tl.load(scales + row)[None, :]
    if BIAS:
        sums += tl.load(bias + row).to(tl.float32)[None, :]
    if EPILOGUE == "gated":
        gate, up = tl.split(tl.reshape(sums, [BLOCK_M, BLOCK_N // 2, 2]))
        half = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        place = m[:, None] * (N // 2) + half[None, :]
        tl.store(out + place, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty),
                 mask=(m < M)[:, None] & (half < N // 2)[None, :])  # fmt: skip
    elif EPILOGUE == "best":
        sums = tl.where((column < N)[None, :], sums, float("-inf"))
        best, index = tl.max(sums, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(out + m * num_tiles + tile, best, mask=m < M)
        tl.store(ids + m * num_tiles + tile, (tile * BLOCK_N + index).to(tl.int64), mask=m < M)
    else:
        place = m[:, None] * N + column[None, :]
        stored = (m < M)[:, None] & (column < N)[None, :]
        if RESIDUAL:
            sums += tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["R"])
def _rotate_and_store(
    qkv, q_norm, k_norm, cos, sin, position, q_out, k_cache, v_cache, R, T, eps,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """One head of one row. Dimension i is paired with i + HALF."""
    n, head = tl.program_id(0), tl.program_id(1)
    b = n // R
    p = tl.load(position + b) + n % R
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    source = qkv + n * ((H + 2 * K) * 2 * HALF) + head * 2 * HALF + i
    first, second = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    if head < H + K:
        x, y = first.to(tl.float32), second.to(tl.float32)
        if HAS_NORMS:
            scale = tl.rsqrt(tl.sum(x * x + y * y, 0) / (2 * HALF) + eps)
            norm = q_norm if head < H else k_norm
            x *= scale * tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)
            y *= scale * tl.load(norm + HALF + i, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + p * HALF + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + p * HALF + i, mask=inside, other=0.0).to(tl.float32)
        first, second = (x * c - y * s).to(first.dtype), (y * c + x * s).to(second.dtype)
    if head < H:
        target = q_out + (n * H + head) * 2 * HALF + i
    else:
        cache = k_cache if head < H + K else v_cache
        kv_head = (head - H) % K
        target = cache + ((b * K + kv_head).to(tl.int64) * T + p) * 2 * HALF + i
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _attend_split(
    q, k_cache, v_cache, position, sums, maxima, totals, R, T, num_splits, window, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows' queries of one key/value head over positions split * SPLIT and on; logits in units of log2(e)."""
    split, b = tl.program_id(0), tl.program_id(2)
    kv_head = tl.program_id(1) % K
    G: tl.constexpr = H // K
    query = tl.arange(0, BLOCK_Q)
    r = tl.program_id(1) // K * ROWS + query // G
    live = (query < ROWS * G) & (r < R)
    p = tl.load(position + b)
    last = p + tl.minimum(tl.program_id(1) // K * ROWS + ROWS, R) - 1
    oldest = p + tl.program_id(1) // K * ROWS - window + 1
    start = split * SPLIT
    if (start > last) | (start + SPLIT <= oldest):
        return  # none of these rows sees it; the merge knows
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    head_row = (b * R + r) * H + kv_head * G + query % G
    queries = tl.load(q + head_row[:, None] * E + e[None, :], mask=live[:, None] & inside[None, :], other=0.0)
    base = (b * K + kv_head).to(tl.int64) * T * E
    # a finite floor: where a row has seen nothing yet, the difference of two infinities would be no number
    maximum = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for t0 in range(start, tl.minimum(start + SPLIT, last + 1), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        known = t <= last
        keys = tl.load(k_cache + base + t[None, :] * E + e[:, None], mask=known[None, :] & inside[:, None], other=0.0)
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        visible = (t[None, :] <= p + r[:, None]) & (t[None, :] > p + r[:, None] - window)
        logits = tl.where(visible, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(logits - new_maximum[:, None])
        values = tl.load(v_cache + base + t[:, None] * E + e[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        maximum = new_maximum
    place = head_row * num_splits + split
    tl.store(maxima + place, maximum, mask=live)
    tl.store(totals + place, total, mask=live)
    tl.store(sums + place[:, None] * E + e[None, :], acc, mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["R"])
def _attend_merge(
    sums, maxima, totals, position, out, R, num_splits, window,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One head of one row: weigh the splits that it sees."""
    n, head = tl.program_id(0), tl.program_id(1)
    p = tl.load(position + n // R) + n % R
    split = tl.arange(0, BLOCK_S)
    seen = (split < num_splits) & (split * SPLIT <= p) & ((split + 1) * SPLIT > p - window + 1)
    e = tl.arange(0, BLOCK_E)
    place = (n * H + head) * num_splits + split
    maximum = tl.load(maxima + place, mask=seen, other=-1e30)
    weight = tl.where(seen, tl.exp2(maximum - tl.max(maximum, 0)), 0.0)
    total = tl.sum(weight * tl.load(totals + place, mask=seen, other=0.0), 0)
    parts = tl.load(sums + place[:, None] * E + e[None, :], mask=seen[:, None] & (e < E)[None, :], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / total
    tl.store(out + (n * H + head) * E + e, merged.to(out.dtype.element_ty), mask=e < E)
