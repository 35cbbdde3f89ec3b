"""Which hopskip this is, and by which schema its results are written."""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 1
"""Of every result that a command prints or writes. It goes up when a field changes its meaning or goes away."""


def describe() -> str:
    """The version that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hopskip")
    except PackageNotFoundError:  # run from a checkout
        from hopskip import __version__

        return __version__


def stamp() -> dict[str, Any]:
    """What every result begins with."""
    return {"schema_version": SCHEMA_VERSION, "hopskip_version": describe()}
