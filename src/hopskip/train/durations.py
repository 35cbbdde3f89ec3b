"""How long something takes, as people say it."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Rounded, in the unit that suits it.

    >>> duration(40), duration(2000), duration(40_000), duration(400_000)
    ('1 min', '33 min', '11 h', '4.6 days')
    """
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
