"""How many examples property tests try."""

from __future__ import annotations

from hypothesis import settings


def examples(factor: float = 1) -> int:
    """A multiple of what the profile says."""
    assert settings.default is not None
    return int(factor * settings.default.max_examples)
