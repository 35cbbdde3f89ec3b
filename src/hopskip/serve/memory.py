"""How much memory there is, and sizes as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hopskip.backends.gpu import free_gpu_memory
from hopskip.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes.

    >>> parse_size("1.5GiB")
    1610612736

    Raises:
        ConfigError: it is no size, or none at all.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*(|[KMG]I?)B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"kv-memory is {text!r}; give a size such as 800MiB or 4GiB")
    return size


def free_memory(device: str = "cpu") -> int:
    """Bytes that this process can still get: of the card for a GPU, else of the machine, and of the container it may
    run in.

    Args:
        device: as a backend's `Traits` have it, such as `cuda:0 (NVIDIA H100)`.
    """
    if device.startswith("cuda"):
        return free_gpu_memory(device.split()[0])
    free = [_available()]
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            if most != "max":
                free.append(int(most) - int((Path("/sys/fs/cgroup") / usage).read_text()))
        except (OSError, ValueError):  # noqa: PERF203
            continue
    return max(0, min(free))


def _available() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    # no such file outside Linux: half of all memory is then a cautious guess
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
