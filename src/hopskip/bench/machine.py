"""Where a measurement was made: processor, memory bandwidth, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from typing import Any

import torch

from hopskip.machine import cpu_name, num_usable_cores
from hopskip.version import describe

_BUFFER_BYTES = 256 << 20
"""Far above any last-level cache, so that a sum over it streams from memory."""
_PACKAGES = ("torch", "transformers", "llama-cpp-python", "numpy")


def measure_read_bandwidth(threads: int, repeats: int = 9) -> float:
    """Bytes per second that `threads` threads read from memory: the best of several sums over a large buffer.

    The best, not the median: it is the limit that decoding is held against, and a disturbance only lowers it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = torch.ones(_BUFFER_BYTES // 4)
        half = len(buffer) // 2
        seconds = []
        for _ in range(repeats):
            # a sum has one stream of loads per thread, a dot product two; processors differ in what they need
            started = time.perf_counter()
            torch.sum(buffer)
            middle = time.perf_counter()
            torch.dot(buffer[:half], buffer[half:])
            seconds += [middle - started, time.perf_counter() - middle]
    finally:
        torch.set_num_threads(before)
    return _BUFFER_BYTES / min(seconds)


def describe_machine(threads: int, read_bandwidth: float) -> dict[str, Any]:
    """What a reader needs to judge a number: JSON-ready."""
    return {
        "cpu": cpu_name(),
        "num_cores": num_usable_cores(),
        "threads": threads,
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "read_bytes_per_second": read_bandwidth,
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Versions of everything that takes part, ours with its revision; None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "hopskip": describe()}
    return found | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
