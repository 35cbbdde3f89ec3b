"""Property tests try the same examples every time, unless others are asked for."""

from __future__ import annotations

import pytest
from hypothesis import settings


def test_examples_repeat_unless_a_profile_is_named(request: pytest.FixtureRequest) -> None:
    named = request.config.getoption("--hypothesis-profile")
    assert settings.default is not None
    assert settings.default.derandomize == (named in (None, "ci"))
    assert settings.default.deadline is None or named is not None
