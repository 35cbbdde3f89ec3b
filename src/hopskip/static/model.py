"""The decoder's layers at static shapes, on a cache whose write positions only the device knows.

Shape letters: B sequences, N = B R rows (R of each sequence), D hidden size, H query heads, K key/value heads, E head
dimension, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hopskip.cache import Cache
from hopskip.model import LayerWeights, Transformer
from hopskip.static.kernels import Kernels
from hopskip.static.matrix import Matrix, Precision


@dataclass(frozen=True)
class Layer:
    """A decoder layer as the kernels take it."""

    weights: LayerWeights
    """For norms and biases."""
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix

    @classmethod
    def pack(cls, weights: LayerWeights, precision: Precision | None) -> Layer:
        return cls(
            weights,
            qkv=Matrix.pack(weights.qkv_proj, precision),
            o=Matrix.pack(weights.o_proj, precision),
            gate_up=Matrix.pack(weights.gate_up_proj, precision),
            down=Matrix.pack(weights.down_proj, precision),
        )

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        return self.qkv, self.o, self.gate_up, self.down


class StaticModel:
    """All layers of a model, those of a branch that is attached to it behind them, and its cache.

    Args:
        batch_size: sequences, B.
        length: positions of the cache, T.
    """

    def __init__(self, model: Transformer, kernels: Kernels, batch_size: int, length: int) -> None:
        self.config = model.config
        self.kernels = kernels
        self.embed_tokens = model.weights.embed_tokens
        self.norm = model.weights.norm
        self.cache: Cache = model.new_cache(batch_size, length)
        for tensor in self.cache.tensors:
            tensor.zero_()  # attention multiplies what it must not see by 0, which only finite numbers bear
        cos, sin = model.config.rope.tables(length)
        self._tables = (cos.to(model.device, model.dtype), sin.to(model.device, model.dtype))

    def embed(self, ids_N: Tensor) -> Tensor:
        return F.embedding(ids_N, self.embed_tokens)

    def run_layers(self, h_ND: Tensor, layers: Seq[Layer], first: int, position_B: Tensor) -> Tensor:
        """Run `layers`, the first of which has number `first` in the cache, on R rows of each sequence from
        `position_B` on. Writes their keys and values; returns new [N, D]."""
        kernels = self.kernels
        for index, layer in enumerate(layers, start=first):
            own = layer.weights
            norms = None if own.q_norm is None or own.k_norm is None else (own.q_norm, own.k_norm)
            k_BKTE, v_BKTE = self.cache.k_LSHTD[index], self.cache.v_LSHTD[index]
            qkv = kernels.linear(h_ND, layer.qkv, norm=own.input_layernorm, bias=own.qkv_bias)
            q_NHE = kernels.rotate_and_store(qkv, norms, self._tables, position_B, k_BKTE, v_BKTE)
            out = kernels.attend(q_NHE, k_BKTE, v_BKTE, position_B)
            h_ND = kernels.linear(out, layer.o, residual=h_ND)
            inner = kernels.gated(h_ND, layer.gate_up, own.post_attention_layernorm)
            h_ND = kernels.linear(inner, layer.down, residual=h_ND)
        return h_ND

    def best(self, h_ND: Tensor, head: Matrix) -> Tensor:
        """Final norm and head: the best token of each row, int64 [N]."""
        return self.kernels.best(h_ND, head, self.norm)


def pack_layers(layers: Seq[LayerWeights], precision: Precision | None) -> list[Layer]:
    return [Layer.pack(layer, precision) for layer in layers]


def num_bytes(layers: Seq[Layer], head: Matrix) -> int:
    """Bytes of weights that a pass through these layers and a head reads."""
    return head.nbytes + sum(matrix.nbytes for layer in layers for matrix in layer.matrices)
