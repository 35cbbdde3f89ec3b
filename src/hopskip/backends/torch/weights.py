"""Weights as the PyTorch reference has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hopskip.backends.torch.layer import LayerWeights
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors

_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All weights of a decoder. `lm_head` is `embed_tokens` itself where the two are tied."""

    embed_tokens: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor


def load_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of a checkpoint, on the CPU, in memory of its own. `dtype=None` keeps the stored precision; quantized
    values are then float32."""
    stored = checkpoint.stored(name)
    out = torch.empty(stored.shape, dtype=dtype or getattr(torch, stored.type.dtype or "float32"))
    copy_into(out, checkpoint, name)
    return out


def copy_into(out: Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Write one tensor to `out`, of its shape and any precision and device; dequantized to float32, rounded once.

    Goes a few hundred rows at a time: neither the mapped file nor float32 values pile up beside a large matrix.
    """
    stored = checkpoint.stored(name)
    rows = out.view(stored.num_rows, stored.shape[-1])
    step = max(1, _CHUNK_VALUES // stored.shape[-1])
    for first in range(0, stored.num_rows, step):
        rows[first : first + step] = torch.from_numpy(np.require(checkpoint.rows(name, first, step), requirements="W"))


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Weights:
    """Load a checkpoint for `TorchBackend`, layer by layer, with q, k, v and gate, up fused.

    Needs the memory of the loaded model and little more than one matrix on top. `progress` is told the share of the
    layers that are loaded, 0 to 1.
    """
    config = checkpoint.config

    def load(*names: str) -> Tensor:
        """The named tensors, one below the other, in memory of our own (never a view of the file)."""
        shapes = [expected[name] for name in names]
        rows = [shape[0] for shape in shapes]
        fused = torch.empty((sum(rows), *shapes[0][1:]), dtype=dtype, device=device)
        first = 0
        for name, count in zip(names, rows, strict=True):
            copy_into(fused[first : first + count], checkpoint, name)
            first += count
        return fused

    def load_layer(index: int) -> LayerWeights:
        def part(*names: str) -> Tensor:
            return load(*(f"model.layers.{index}.{name}" for name in names))

        return LayerWeights.fused(config, part)

    expected = expected_tensors(config)
    embed_tokens = load("model.embed_tokens.weight")
    layers = []
    for index in range(config.num_hidden_layers):
        layers.append(load_layer(index))
        if progress is not None:
            progress((index + 1) / config.num_hidden_layers)
    return Weights(
        embed_tokens=embed_tokens,
        layers=layers,
        norm=load("model.norm.weight"),
        lm_head=embed_tokens if config.tie_word_embeddings else load("lm_head.weight"),
    )
