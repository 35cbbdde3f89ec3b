"""Memory that a block of code takes, counted tensor by tensor: on any device, on fake tensors too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedMemory(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, as an allocator without gaps would, and the most at once.

    Args:
        known: tensors that were there before and count for nothing, views of them included.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __enter__(self) -> CountedMemory:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def weigh(self, tensor: Tensor, share: float) -> None:
        """From now on a tensor counts for this share of its bytes: one that several devices divide among them."""
        key = tensor.untyped_storage()._cdata
        size = int(tensor.untyped_storage().nbytes() * share)
        self._change(size - self._sizes.get(key, 0))
        self._sizes[key] = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._see(tensor)
        return output

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._change(storage.nbytes())
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self._change(-self._sizes.pop(key))

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
