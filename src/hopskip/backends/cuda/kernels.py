"""The five operations that a decoder layer and the head are made of, and their reference in PyTorch.

Rows are those of B sequences, R of each: row b R + r stands at position `position_B[b] + r`, which only the device
knows. All shapes are static.

Shape letters: N = B R rows, D inputs, H query heads, K key/value heads, E head dimension, T positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.backends.cuda.matrix import Matrix
from hopskip.backends.torch.layer import rms_norm, rotate
from hopskip.checkpoint.config import ModelConfig


class Kernels(Protocol):
    row_exact: bool
    """True if the bits of a row never depend on how many rows, or which, are computed with it."""

    def linear(
        self,
        x_ND: Tensor,
        matrix: Matrix,
        *,
        norm: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The product with a matrix [outputs, D]: of the rows after RMSNorm with weights `norm` [D], where given; plus
        `bias` [outputs] and `residual` [N, outputs]."""
        ...

    def gated(self, x_ND: Tensor, matrix: Matrix, norm: Tensor) -> Tensor:
        """SwiGLU: RMSNorm, then silu(gate) * up, whose matrices lie one below the other: [N, outputs / 2]."""
        ...

    def best(self, x_ND: Tensor, matrix: Matrix, norm: Tensor) -> Tensor:
        """RMSNorm, head, and the index of each row's largest logit, int64 [N]; of equals the lowest."""
        ...

    def rotate_and_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor],
        position_B: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
    ) -> Tensor:
        """Split [N, (H + 2 K) E] into heads, norm (qk-norm) and rotate queries and keys, write keys and values to the
        rows' positions of `k_BKTE` and `v_BKTE`. Returns the queries [N, H, E]."""
        ...

    def attend(self, q_NHE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, position_B: Tensor) -> Tensor:
        """Let every row attend to its sequence up to itself: [N, H E]."""
        ...


class TorchKernels(Kernels):
    """Plain PyTorch: the reference, and what runs on a CPU. Attention reads the whole cache and masks it."""

    row_exact = False  # a matrix product may sum in another order when the number of rows changes

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def linear(
        self,
        x_ND: Tensor,
        matrix: Matrix,
        *,
        norm: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if norm is not None:
            x_ND = rms_norm(x_ND, norm, self._config.rms_norm_eps)
        out = F.linear(x_ND, matrix.dequantize(x_ND.dtype), bias)
        return out if residual is None else residual + out

    def gated(self, x_ND: Tensor, matrix: Matrix, norm: Tensor) -> Tensor:
        gate, up = self.linear(x_ND, matrix, norm=norm).chunk(2, dim=-1)
        return F.silu(gate) * up

    def best(self, x_ND: Tensor, matrix: Matrix, norm: Tensor) -> Tensor:
        return self.linear(x_ND, matrix, norm=norm).argmax(dim=-1)

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
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        heads = qkv.view(len(qkv), -1, config.head_dim)
        q_NHE, k_NKE, v_NKE = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            q_NHE = rms_norm(q_NHE, norms[0], config.rms_norm_eps)
            k_NKE = rms_norm(k_NKE, norms[1], config.rms_norm_eps)
        position_BR = _positions(position_B, len(qkv))
        cos, sin = (table[position_BR.flatten(), None, :] for table in tables)
        q_NHE, k_NKE = rotate(q_NHE, cos, sin), rotate(k_NKE, cos, sin)
        slot_B1 = torch.arange(len(position_B), device=qkv.device)[:, None]
        for cache, new in (k_BKTE, k_NKE), (v_BKTE, v_NKE):
            new_BRKE = new.view(*position_BR.shape, *new.shape[1:])
            cache.transpose(1, 2).index_put_((slot_B1, position_BR), new_BRKE)
        return q_NHE

    def attend(self, q_NHE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, position_B: Tensor) -> Tensor:
        position_BR = _positions(position_B, len(q_NHE))
        key_T = torch.arange(k_BKTE.shape[2], device=q_NHE.device)
        visible_BRT = key_T <= position_BR[..., None]
        if self._config.sliding_window is not None:
            visible_BRT &= key_T > position_BR[..., None] - self._config.sliding_window
        out_BHRE = F.scaled_dot_product_attention(
            q_NHE.view(*position_BR.shape, *q_NHE.shape[1:]).transpose(1, 2),
            k_BKTE,
            v_BKTE,
            attn_mask=visible_BRT[:, None],
            enable_gqa=True,
        )
        return out_BHRE.transpose(1, 2).reshape(len(q_NHE), -1)


def _positions(position_B: Tensor, num_rows: int) -> Tensor:
    """Position of each row, [B, R]."""
    rows = num_rows // len(position_B)
    return position_B[:, None] + torch.arange(rows, device=position_B.device)
