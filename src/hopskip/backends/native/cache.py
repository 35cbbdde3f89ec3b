"""The files that hopskip keeps: packed weights, measured costs, and what killed processes have left of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hopskip.backends.native.packed import SUFFIX, VERSION, read_header, verify
from hopskip.machine import leftovers

State = Literal["current", "outdated", "damaged", "leftover"]

_NAME = re.compile(rf"[0-9a-f]{{32}}-(\w+)-(\d+){re.escape(SUFFIX)}")


@dataclass(frozen=True)
class CachedFile:
    """Packed weights on disk."""

    path: Path
    state: State
    """`outdated` is what another version of hopskip wrote, which this one does not read; `leftover` what a killed
    process began."""
    size: int
    """Bytes."""
    last_used: float
    """Seconds since 1970."""
    precision: str = ""
    model: str = ""
    """Where the checkpoint was."""

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}

    def verify(self) -> None:
        """Read all of it.

        Raises:
            OSError, ValueError, KeyError, TypeError: it is not what was written.
        """
        verify(self.path)


def cached_files(folder: Path) -> Iterator[CachedFile]:
    """All packed weights of a cache folder, by name."""
    abandoned = leftovers(folder)
    for path in sorted([*folder.glob(f"*{SUFFIX}"), *abandoned]):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        state: State = "leftover"
        precision = model = ""
        if path not in abandoned:
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            precision, state = name[1], "outdated"
            if int(name[2]) == VERSION:
                try:
                    state, model = "current", str(read_header(path)["model"])
                except (OSError, ValueError, KeyError, TypeError):
                    state = "damaged"
        yield CachedFile(path, state, found.st_size, max(found.st_atime, found.st_mtime), precision, model)
