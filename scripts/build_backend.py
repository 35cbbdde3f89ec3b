"""The build backend of pyproject.toml: scikit-build-core, which finds the revision of the source noted in the package.

A checkout asks git for its revision. A wheel has no git, and neither has an sdist, which carries the note to the wheels
that are built from it. An editable installation stays a checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import scikit_build_core.build as inner
from scikit_build_core.build import *  # noqa: F403

_SOURCES = Path(__file__).resolve().parent.parent / "src"
sys.path.insert(0, str(_SOURCES))
from hopskip.version import find_revision, note_revision  # noqa: E402

Settings = dict[str, list[str] | str] | None


@contextmanager
def _noted_revision() -> Iterator[None]:
    """The note in the package, and its end in a checkout, where it would soon be wrong."""
    package = _SOURCES / "hopskip"
    revision = find_revision(package)
    note = note_revision(package, revision) if revision else None
    try:
        yield
    finally:
        if note is not None and (_SOURCES.parent / ".git").exists():
            note.unlink()


def build_wheel(folder: str, settings: Settings = None, metadata: str | None = None) -> str:
    with _noted_revision():
        return inner.build_wheel(folder, settings, metadata)


def build_sdist(folder: str, settings: Settings = None) -> str:
    with _noted_revision():
        return inner.build_sdist(folder, settings)
