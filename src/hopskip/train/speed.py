"""Tokens a second while training, and the share of the device's arithmetic that they use (MFU)."""

from __future__ import annotations

import time
from typing import Any

import torch

_SIZE = {"cpu": 1024, "cuda": 8192}
_MEASURED_SECONDS = 0.2


class Throughput:
    """Sums over micro-steps, from the beginning of one to that of the next, so that optimizer and data count; what
    comes after a pause (an evaluation, a checkpoint) begins anew."""

    def __init__(self) -> None:
        self.tokens = 0
        self.flops = 0.0
        self.seconds = 0.0
        self._begun: tuple[float, int, float] | None = None

    def begin(self, tokens: int, flops: float) -> None:
        """A micro-step of so many tokens and operations begins, and the one before has ended."""
        now = time.perf_counter()
        if self._begun is not None:
            began, past_tokens, past_flops = self._begun
            self.seconds += now - began
            self.tokens += past_tokens
            self.flops += past_flops
        self._begun = (now, tokens, flops)

    def pause(self) -> None:
        """What is under way will not be counted."""
        self._begun = None

    def take(self) -> list[float]:
        """Tokens, operations and seconds since the last time."""
        taken = [float(self.tokens), self.flops, self.seconds]
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0
        return taken


def training_flops(model: Any, num_tokens: int, length: int, num_exits: int) -> float:
    """Operations of a forward and backward pass: twice the weights a token passes through, and causal attention; three
    times that with gradients of all weights, twice with those of adapters alone. Layers that are dropped count too.

    Args:
        model: of transformers, without its PEFT wrapper.
        length: tokens of a row.
        num_exits: the last layer counted; each passes through the head.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * length
    is_adapted = not all(parameter.requires_grad for parameter in model.model.layers.parameters())
    return float(num_tokens * (2 if is_adapted else 3) * 2 * (layers + num_exits * head + attention))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product on this device, measured for a moment."""
    size = _SIZE.get(device.type, 2048)
    left = torch.ones((size, size), device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + _MEASURED_SECONDS
    (left @ left)[0, 0].item()
    while time.perf_counter() < until or best == 0.0:
        began = time.perf_counter()
        (left @ left)[0, 0].item()  # asks for a value, and so waits for it
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
