"""Where a measurement was made: processor, memory bandwidth, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hopskip.backends.native.isa import choose_isa, obstacle
from hopskip.machine import cpu_name, num_usable_cores
from hopskip.version import describe

_BUFFER_BYTES = 256 << 20
"""Far above any last-level cache, so that a walk over it streams from memory."""
_PACKAGES = ("torch", "transformers", "llama-cpp-python", "numpy")


def measure_read_bandwidth(threads: int, repeats: int = 9) -> float:
    """Bytes per second that `threads` threads read from memory: the best of several walks over a large buffer.

    The best, not the median: it is the limit that decoding is held against, and a disturbance only lowers it.
    """
    parts = np.array_split(np.ones(_BUFFER_BYTES // 8, dtype=np.int64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.max, parts))  # of numpy's reductions the one that waits for memory alone
            seconds.append(time.perf_counter() - started)
    return _BUFFER_BYTES / min(seconds)


def describe_machine(threads: int, read_bandwidth: float) -> dict[str, Any]:
    """What a reader needs to judge a number: JSON-ready."""
    return {
        "cpu": cpu_name(),
        "num_cores": num_usable_cores(),
        "threads": threads,
        "instruction_set": None if obstacle() else choose_isa(),
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
