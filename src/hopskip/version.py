"""Which hopskip this is: its version, the revision of its source, and by which schema its results are written."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from hopskip import __version__

SCHEMA_VERSION = 1
"""Of every result that a command prints or writes. It goes up when a field changes its meaning or goes away."""

_PACKAGE = Path(__file__).parent
_NOTE = Path("data", "revision")
"""Where the build (`scripts/build_backend.py`) notes the revision, within the package."""


@cache
def describe() -> str:
    """Version and revision, `0.1.0+g1234abc`; the version alone where the revision is not known.

    `.dirty` follows the revision of a checkout whose files have been changed. Asked for the first time in a checkout,
    this runs git, which takes some milliseconds.
    """
    revision = find_revision(_PACKAGE)
    return f"{__version__}+g{revision}" if revision else __version__


def stamp() -> dict[str, Any]:
    """What every result begins with."""
    return {"schema_version": SCHEMA_VERSION, "hopskip_version": describe()}


def find_revision(package: Path) -> str | None:
    """The revision that a package's folder is of: git's word in a checkout, else what was noted when it was built."""
    checkout = package.parent.parent
    if (checkout / ".git").exists() and (checkout / "pyproject.toml").exists():
        return _ask_git(checkout)
    try:
        return (package / _NOTE).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def note_revision(package: Path, revision: str) -> Path:
    """Write down a revision within the package, for when there is no git; returns the file."""
    (package / _NOTE).write_text(revision + "\n", encoding="ascii")
    return package / _NOTE


def _ask_git(checkout: Path) -> str | None:
    import subprocess  # most runs need not wait for it

    # a hook of git's own sets GIT_DIR and others, which lead to the repository of the hook
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=.dirty", "--exclude=*", "--abbrev=7"]
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a repository that it does not trust
        return None
    return found.stdout.strip() or None
