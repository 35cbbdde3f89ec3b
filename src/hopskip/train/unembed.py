"""Linear layers whose weight gradients are added up in place, and how many rows of logits fit.

Autograd would make a gradient of the head's size for every chunk of tokens, and autocast a copy of the head: several
times the head's memory. Here a chunk adds to one buffer, and a head in another precision than the arithmetic is cast
block by block.

R = rows (tokens times exits), V = rows of a weight (the vocabulary), D = its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MAX_LOGITS_ON_CPU = 1 << 25
_MAX_ROWS = 8192
"""More make a matrix product no faster."""
_MIN_ROWS = 64
_LOGIT_BYTES = 16
"""Of a logit while its gradient is computed: it, its probability, a teacher's, and casts."""
_MEMORY_SHARE = 4
"""A chunk takes one part in so many of what is free."""
_BLOCK = 1 << 23
"""Weights that are cast at once."""


def rows_at_once(vocab_size: int, device: torch.device, free: int | None = None) -> int:
    """How many rows of logits to hold together: a power of two, so that little changes do not change it.

    Args:
        free: bytes of memory to go by; None asks the device.
    """
    if free is None:
        free = free_memory(device)
    rows = free // (_MEMORY_SHARE * _LOGIT_BYTES * vocab_size)
    if device.type == "cpu":
        rows = min(rows, MAX_LOGITS_ON_CPU // vocab_size)
    rows = min(max(rows, _MIN_ROWS), _MAX_ROWS)
    return 1 << (rows.bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still have on a device; what PyTorch holds back for itself counts as free."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    return int(psutil.virtual_memory().available)


class AddedInPlace(TorchFunctionMode):
    """While it is on, linear layers with these weights add their gradients to buffers in the backward pass.

    Args:
        buffers: by the `id` of a weight or bias, float32 of its shape; None for one that is not trained.
    """

    def __init__(self, buffers: Mapping[int, Tensor | None]) -> None:
        super().__init__()
        self._buffers = buffers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self._buffers:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            buffers = (self._buffers[id(weight)], None if bias is None else self._buffers[id(bias)])
            return _Linear.apply(x, weight, bias, buffers)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x W^T + b in float32, multiplied in the precision of autocast, or of the weight."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, buffers: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        kind = x_RD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        ctx.dtype, ctx.buffers, ctx.x_dtype = dtype, buffers, x_RD.dtype
        x_RD = x_RD.to(dtype)
        ctx.save_for_backward(x_RD, weight_VD)
        if weight_VD.dtype == dtype:
            y_RV = (x_RD @ weight_VD.t()).float()
        else:
            y_RV = x_RD.new_empty((len(x_RD), len(weight_VD)), dtype=torch.float32)
            for block in _blocks(weight_VD, dtype):
                y_RV[:, block] = x_RD @ weight_VD[block].to(dtype).t()
        return y_RV if bias_V is None else y_RV.add_(bias_V)

    @staticmethod
    def backward(ctx: Any, grad_RV: Tensor) -> Any:
        (x_RD, weight_VD), (weight_buffer, bias_buffer) = ctx.saved_tensors, ctx.buffers
        grad_RD = x_RD.new_zeros(x_RD.shape, dtype=torch.float32)
        for block in _blocks(weight_VD, ctx.dtype):
            own_RV = grad_RV[:, block].to(ctx.dtype)
            _add_product(grad_RD, own_RV, weight_VD[block].to(ctx.dtype))
            if weight_buffer is not None:
                _add_product(weight_buffer[block], own_RV.t(), x_RD)
        if bias_buffer is not None:
            bias_buffer.add_(grad_RV.sum(0))
        return grad_RD.to(ctx.x_dtype), None, None, None


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        to.add_(left @ right)


def _blocks(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Of rows of a weight: all together where nothing has to be cast, neither it nor its gradient in float32."""
    num_rows = len(weight_VD)
    size = num_rows if weight_VD.dtype == dtype == torch.float32 else max(1, _BLOCK // weight_VD.shape[1])
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


@contextmanager
def sparse_embedding(model: Any) -> Iterator[None]:
    """For the time of a forward pass: an embedding that is the head too gets a gradient of the rows that are looked up,
    which autograd adds to the head's, instead of one of its whole size."""
    embedding = model.get_input_embeddings()
    is_shared = isinstance(embedding, nn.Embedding) and embedding.weight is model.get_output_embeddings().weight
    if not (is_shared and embedding.weight.requires_grad):
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False
