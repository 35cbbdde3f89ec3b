"""Whether there is a GPU, and whether a model is expected to decode faster on it than on the CPU.

PyTorch takes a second or more to import, so it is asked only where a driver is there.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.machine import num_usable_cores

_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Of NVIDIA's, of either in WSL, and of AMD's driver one is there."""
_BYTES_OF_A_CARD = 300e9
"""Read per second, where the card does not say."""
_BYTES_OF_A_CORE, _MOST_BYTES_OF_A_CPU = 10e9, 80e9
_EFFICIENCY = 0.7
"""Share of a card's bandwidth that passes reach."""
_LAYER_SECONDS = 0.25e-3
"""That the host takes to launch the kernels of a layer, about 42 of them, one by one."""
_MARGIN = 1.5
"""By which a GPU must be faster: what runs on it has no exact rows, prefix cache or formats of its own."""
_ROOM, _ROOM_SHARE = 2**30, 1.2
"""Memory beside the weights, and over them."""
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_PACKED_WIDTHS = {"q8": 34 / 32, "q4": 18 / 32}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first one that PyTorch can use."""

    free_bytes: int
    bytes_per_second: float
    """That it reads from its own memory."""

    def is_worth(self, checkpoint: Checkpoint, dtype: str, native_precision: str) -> bool:
        """Whether a model fits, and is expected to decode one text clearly faster than on the native engine. Roughly:
        decoding reads all weights once a token, and on the GPU the host launches every layer's kernels.

        Args:
            dtype: it would have on the GPU.
            native_precision: and on the native engine, `auto` for the file's own.
        """
        num_values = checkpoint.config.num_parameters
        own_bytes = num_values * _WIDTHS[dtype]
        if own_bytes * _ROOM_SHARE + _ROOM > self.free_bytes:
            return False
        width = (_WIDTHS | _PACKED_WIDTHS).get(native_precision)
        stored = sum(checkpoint.stored(name).num_bytes for name in checkpoint.names())
        native_bytes = stored if width is None else num_values * width
        here = native_bytes / min(num_usable_cores() * _BYTES_OF_A_CORE, _MOST_BYTES_OF_A_CPU)
        layers = checkpoint.config.num_hidden_layers * _LAYER_SECONDS
        there = layers + own_bytes / (self.bytes_per_second * _EFFICIENCY)
        return there * _MARGIN < here


def find_gpu() -> Gpu | None:
    """None without a driver, without PyTorch, or if that cannot use the GPU."""
    if not any(Path(place).exists() for place in _DRIVERS):
        return None
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return Gpu(free_bytes=free_gpu_memory("cuda"), bytes_per_second=_bandwidth(torch.cuda.get_device_properties(0)))


def free_gpu_memory(device: str) -> int:
    """Bytes that are free on a device, `cuda` or `cuda:1`."""
    torch = importlib.import_module("torch")
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def _bandwidth(properties: Any) -> float:
    """By a card's own account, if PyTorch passes it on: two transfers a clock over the whole bus."""
    kilohertz, bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 2e3 * kilohertz * bits / 8 or _BYTES_OF_A_CARD
