"""Folders and files that are complete or not there: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hopskip import machine
from hopskip.errors import HopskipError, TrainingError

PARTIAL = ".partial"
"""Where unfinished folders lie inside an output folder; what a crash left there is removed by the next run."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write to, which takes the place of `folder` when the block ends well.

    Raises:
        TrainingError: it cannot be written (a full disk, say). What stood in its place before is untouched.
    """
    partial = folder.parent / PARTIAL / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, HopskipError):
            raise
        raise _cannot_write(folder, error, last_checkpoint(folder.parent) or "the start") from error


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """As `replacing`, for one file."""
    try:
        with machine.replacing_file(path, flush=True) as partial:
            yield partial
    except HopskipError:
        raise
    except Exception as error:
        raise _cannot_write(path, error, "what is there") from error


def publish(partial: Path, folder: Path) -> None:
    """Make a finished folder visible under its name, safely on disk first."""
    for path in [*partial.rglob("*"), partial]:
        machine.flush_to_disk(path)
    if folder.exists():  # a folder cannot be renamed onto a full one
        old = partial.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    machine.flush_to_disk(folder.parent)


def clean(output: Path) -> None:
    """Remove what a crash left half-written. If it came between two renames of `publish`, the old folder returns."""
    for old in (output / PARTIAL).glob("*.old"):
        place = output / old.stem
        if not place.exists():
            old.rename(place)
    shutil.rmtree(output / PARTIAL, ignore_errors=True)


def last_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    steps = _checkpoints(output)
    return steps[max(steps)] if steps else None


def _checkpoints(output: Path) -> dict[int, Path]:
    """The complete checkpoints, by step."""
    return {
        int(path.name.removeprefix("checkpoint-")): path
        for path in output.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and (path / "trainer_state.json").exists()
    }


def rotate(output: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints but for `limit` of them, the last and the best one always kept."""
    if not limit or limit < 0:
        return
    steps = _checkpoints(output)
    folders = [steps[step] for step in sorted(steps)]
    kept = folders[-1:]
    if best is not None and Path(best) in folders[:-1]:
        kept.insert(0, Path(best))
    others = [folder for folder in folders if folder not in kept]
    for folder in others[: max(0, len(folders) - max(limit, len(kept)))]:
        shutil.rmtree(folder)


def _cannot_write(place: Path, error: Exception, start: Path | str) -> TrainingError:
    free = shutil.disk_usage(next(p for p in place.absolute().parents if p.exists())).free
    return TrainingError(
        f"{place} cannot be written ({str(error).splitlines()[0] if str(error) else type(error).__name__}; "
        f"{free / 1e9:.2f} GB free there): make room, then run the same command again to go on from {start}"
    )
