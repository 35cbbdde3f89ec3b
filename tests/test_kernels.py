"""The kernels of ARM64, by the program in tests/kernels, on an emulated processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.count import Core, Count

ROOT = Path(__file__).parent.parent
MISSING = [name for name in ("cmake", "aarch64-linux-gnu-g++") if shutil.which(name) is None]
if not any(map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))):
    MISSING.append("qemu-aarch64")


@pytest.mark.skipif(bool(MISSING), reason=f"scripts/test-arm needs {', '.join(MISSING)}")
def test_every_instruction_set_of_arm() -> None:
    run = subprocess.run(["scripts/test-arm"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = {tuple(line.split()[:2]) for line in run.stdout.splitlines() if ": passed" in line}
    isas = ("neon_i8mm", "neon_dotprod", "neon")
    kinds = ("products:", "rows:", "attention:", "choosing:")
    assert passed == {("all", "threads:"), *((isa, kind) for isa in isas for kind in kinds)}
    assert run.stdout.splitlines()[-3:] == [
        "max runs neon_i8mm",
        "cortex-a76 runs neon_dotprod",
        "cortex-a72 runs neon",
    ]


def test_the_script_names_what_it_knows() -> None:
    run = subprocess.run(["scripts/test-arm", "--faster"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "unknown argument '--faster'; choose --count, --here or none\n"


def test_what_a_product_costs_by_the_model() -> None:
    core = Core("any", width=4, vector_pipes=2, memory_pipes=1, bytes_per_cycle=8)
    assert Count(instructions=400, vector=100, memory=90, weight_bytes=64).cycles(core) == 100
    assert Count(instructions=400, vector=220, memory=90, weight_bytes=64).cycles(core) == 110
    assert Count(instructions=400, vector=220, memory=120, weight_bytes=64).cycles(core) == 120
    assert Count(instructions=400, vector=220, memory=120, weight_bytes=64).cycles_from_memory(core) == 120
    assert Count(instructions=400, vector=220, memory=120, weight_bytes=1024).cycles_from_memory(core) == 128
