"""Layer dropout per sample, and the output of every layer, on a transformers model that is otherwise left alone.

A dropped sample is not multiplied by zero: the layer runs on the kept samples only, with the rows of masks and
positions that are theirs, and the dropped ones pass by unchanged.

B = samples, T = positions, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def draw_kept(rates: Sequence[float], num_samples: int, *key: int) -> list[list[int]]:
    """The samples that each layer keeps, drawn from the key (seed, step, micro-step, rank) alone: no generator has to
    be saved or restored, and computing a layer a second time (gradient checkpointing) meets the same decision."""
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random((len(rates), num_samples))
    return [np.flatnonzero(row >= rate).tolist() for row, rate in zip(draws, rates, strict=True)]


class LayerTaps:
    """Stands in for the forward pass of decoder layers while it is attached: it skips dropped samples and hands out
    each layer's output. Afterwards the layers are what they were."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.outputs: dict[int, Tensor] = {}
        """x_{l+1} [B, T, D] of each wanted layer l, of the pass under way."""
        self._layers = list(layers)
        self._is_attached = False
        self._wanted: frozenset[int] = frozenset()
        self._kept: list[Tensor | None] = [None] * len(self._layers)
        self._num_samples = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Take the layers' place until the block ends; within such a block, another one changes nothing.

        A backward pass that computes layers again (gradient checkpointing) belongs into the block: it has to drop the
        same samples.
        """
        if self._is_attached:
            yield
            return
        before = [vars(layer).get("forward") for layer in self._layers]
        for index, (layer, own) in enumerate(zip(self._layers, before, strict=True)):
            # `forward` rather than hooks, which cannot keep a layer from being called. The class's own is looked up
            # now, because FSDP changes the class of a layer that it shards.
            layer.forward = partial(self._forward, index, layer, own or partial(type(layer).forward, layer))
        self._is_attached = True
        try:
            yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own
            self._is_attached = False

    def drop(self, kept: Sequence[Sequence[int]] | None, num_samples: int, device: torch.device) -> None:
        """Set the samples that each layer keeps (None: all). It holds until the next call."""
        for index in range(len(self._kept)):
            samples = None if kept is None or len(kept[index]) == num_samples else kept[index]
            self._kept[index] = None if samples is None else torch.tensor(samples, dtype=torch.long, device=device)
        self._num_samples = num_samples

    @contextmanager
    def collect(self, layers: Sequence[int]) -> Iterator[None]:
        """Keep the outputs of these layers for the time of a forward pass, and not a moment longer; attached so long
        at least."""
        self._wanted = frozenset(layers)
        try:
            with self.attached():
                yield
        finally:
            self._wanted = frozenset()
            self.outputs.clear()

    def _forward(
        self, index: int, layer: nn.Module, own: Callable[..., Any], h_BTD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        kept = self._kept[index]
        if kept is None:
            h_BTD = _hidden(own(h_BTD, *args, **kwargs))
        elif len(kept):
            some = self._run_some(own, kept, h_BTD, args, kwargs)
            h_BTD = h_BTD.to(some.dtype).index_copy(0, kept, some)
        elif any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            # FSDP gathers the weights inside of `own`, and every rank has to take part: one sample, which adds nothing
            first = torch.zeros(1, dtype=torch.long, device=h_BTD.device)
            h_BTD = h_BTD + 0.0 * self._run_some(own, first, h_BTD, args, kwargs).sum()
        else:
            # no sample, no work; but the weights take part with a gradient of zero: DDP and FSDP wait for it
            h_BTD = h_BTD + 0.0 * sum(p.sum() for p in layer.parameters() if p.requires_grad)
        if index in self._wanted:
            self.outputs[index] = h_BTD
        return h_BTD

    def _run_some(
        self, own: Callable[..., Any], kept: Tensor, h_BTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The layer on these samples alone."""
        some_args, some_kwargs = (_rows(value, kept, self._num_samples) for value in (args, kwargs))
        return _hidden(own(h_BTD.index_select(0, kept), *some_args, **some_kwargs))


def _hidden(output: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    h_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return h_BTD


def _rows(value: Any, kept: Tensor, num_samples: int) -> Any:
    """The kept samples' rows of every tensor inside; one with a single row for all samples is left as it is."""
    if isinstance(value, Tensor):
        if value.ndim > 1 and len(value) == num_samples:
            return value.index_select(0, kept)
        return value
    if isinstance(value, tuple):
        return tuple(_rows(item, kept, num_samples) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, kept, num_samples) for key, item in value.items()}
    return value
