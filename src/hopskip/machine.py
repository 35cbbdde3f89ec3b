"""This machine: its processor, the packages that are installed, and the folder where hopskip keeps what it has made."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hopskip.errors import ConfigError


def cpu_name() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path | None:
    """`$HOPSKIP_CACHE`, by default `hopskip` in `$XDG_CACHE_HOME` or `~/.cache`. None if nothing is kept: an empty
    HOPSKIP_CACHE says so."""
    folder = os.environ.get("HOPSKIP_CACHE")
    if folder is not None:
        return Path(folder).expanduser() if folder else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hopskip"


def kept_path(key: Mapping[str, object], kind: str) -> Path | None:
    """The file of the cache folder that keeps what was found for such a key, JSON-ready; None if nothing is kept."""
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return None if folder is None else folder / f"{digest[:32]}.{kind}.json"


@contextmanager
def replacing_file(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all: yields another path beside it, which takes its place when the block ends well.
    Of several that do so at once, the last one's file stays.

    Args:
        flush: be sure that it is on disk first, so that not even a loss of power leaves half of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        if flush:
            flush_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where what is to be `path` is written by this thread."""
    return path.with_name(f".{path.name}.{platform.node() or 'here'}-{os.getpid()}-{threading.get_ident()}.part")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """As `replacing_file`, for a folder with all that is in it: yields an empty one beside it. What killed processes
    have left of the same folder is removed.

    Raises:
        OSError: the place cannot be written.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in leftovers(folder.parent):
        if leftover.name.startswith(f".{folder.name}.") and leftover.is_dir():
            shutil.rmtree(leftover)
    partial = _partial(folder)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush_to_disk(path)
        old = _partial(partial)
        if folder.exists():  # a folder cannot be renamed onto a full one
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_LEFTOVER = re.compile(r"\..+\.(.+)-(\d+)-\d+\.part")
_ABANDONED_AFTER = 86_400  # seconds without a change, of what another machine writes


def leftovers(folder: Path) -> list[Path]:
    """Files of `replacing_file` that killed processes have left behind."""
    found = []
    for path in folder.glob(".*.part"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match[1] == (platform.node() or "here"):
            is_abandoned = not _is_running(int(match[2]))
        else:
            is_abandoned = False
            with suppress(FileNotFoundError):
                is_abandoned = time.time() - path.stat().st_mtime > _ABANDONED_AFTER
        if is_abandoned:
            found.append(path)
    return sorted(found)


def remove_leftovers(folder: Path) -> None:
    """Remove what `leftovers` finds."""
    for path in leftovers(folder):
        path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def flush_to_disk(path: Path) -> None:
    """Of a file its content, of a folder its names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- packages that not every installation has --------------------------------------------------------------------------

_EXTRAS = {
    "torch": "torch",
    "transformers": "train",
    "accelerate": "train",
    "datasets": "train",
    "peft": "train",
    "matplotlib": "train",
    "fastapi": "serve",
    "uvicorn": "serve",
    "pydantic": "serve",
    "prometheus_client": "serve",
    "llguidance": "serve",
    "httpx": "eval",
    "ray": "ray",
    "sentencepiece": "sentencepiece",
}
"""By package, the extra of hopskip that brings it."""


def require(package: str, what: str, extra: str | None = None) -> Any:
    """A package that an extra brings, imported.

    Args:
        what: needs it.
        extra: which one to name; None: the usual one.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(_message(package, what, error, extra)) from None


def explained(error: ImportError) -> str | None:
    """What to say of a failed import; None if no extra would help."""
    package = (error.name or "").partition(".")[0]
    return _message(package, "this", error, None) if package in _EXTRAS else None


def _message(package: str, what: str, error: ImportError, extra: str | None) -> str:
    reason = "which is not installed" if isinstance(error, ModuleNotFoundError) else f"which cannot be loaded ({error})"
    return f"{what} needs {package}, {reason}; install it: pip install 'hopskip[{extra or _EXTRAS[package]}]'"
