"""The Triton kernels: numbers against PyTorch's, by Triton's interpreter on the CPU.

Triton comes with the CUDA builds of PyTorch on Linux; without it these tests are skipped. That a row's bits do not
depend on its companions is a matter of the device, and not tested here.
"""
# ruff: noqa: E402 (the first import may skip the rest)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from hopskip.backends.cuda.kernels import TorchKernels
from hopskip.backends.cuda.matrix import Matrix, Precision
from hopskip.backends.cuda.triton_kernels import Tiling, TritonKernels, candidate_tilings, default_tiling
from tests.models import tiny_config

pytestmark = [
    # Triton 3.6 takes arrays of one number for numbers, which NumPy 2.4 no longer does
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.skipif(
        triton.__version__ < "3.7" and np.__version__ >= "2.4", reason="Triton 3.6's interpreter needs NumPy < 2.4"
    ),
]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("num_rows", [1, 5, 17])
def test_products_are_those_of_pytorch(precision: Precision | None, num_rows: int) -> None:
    """An odd number of outputs, and more rows than a tile has."""
    config = tiny_config()
    kernels, reference = TritonKernels(config), TorchKernels(config)
    x, norm = random(num_rows, 256), random(256)
    odd, even = Matrix.pack(random(99, 256), precision), Matrix.pack(random(140, 256), precision)
    bias, residual = random(99), random(num_rows, 99)
    settings: list[dict[str, Any]] = [{}, {"norm": norm, "bias": bias}, {"residual": residual}]
    for extra in settings:
        torch.testing.assert_close(
            kernels.linear(x, odd, **extra), reference.linear(x, odd, **extra), rtol=1e-4, atol=1e-3
        )
    torch.testing.assert_close(kernels.gated(x, even, norm), reference.gated(x, even, norm), rtol=1e-4, atol=1e-2)
    assert torch.equal(kernels.best(x, odd, norm), reference.best(x, odd, norm))


def test_of_equal_logits_the_lowest_wins() -> None:
    kernels = TritonKernels(tiny_config())
    weights = torch.ones(70, 64)
    weights[:3] = -1
    assert kernels.best(torch.ones(2, 64), Matrix(weights), torch.ones(64)).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("num_rows", "window", "num_heads", "num_kv_heads", "head_dim"),
    [(1, None, 4, 2, 16), (9, None, 4, 1, 32), (3, 40, 4, 2, 16), (3, None, 3, 3, 24)],
)
def test_attention_is_that_of_pytorch(
    num_rows: int, window: int | None, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Two sequences, one of which reaches over several splits and the other not over one."""
    config = tiny_config(
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim, sliding_window=window
    )
    kernels, reference = TritonKernels(config), TorchKernels(config)
    length, position_B = 300, torch.tensor([270, 5])
    qkv = random(2 * num_rows, (num_heads + 2 * num_kv_heads) * head_dim)
    norms = (random(head_dim), random(head_dim))
    tables = (random(length, head_dim // 2), random(length, head_dim // 2))
    caches = [random(2, num_kv_heads, length, head_dim) for _ in range(2)]
    own = [cache.clone() for cache in caches]
    for given in norms, None:
        q = reference.rotate_and_store(qkv, given, tables, position_B, caches[0], caches[1])
        torch.testing.assert_close(kernels.rotate_and_store(qkv, given, tables, position_B, own[0], own[1]), q)
        for found, expected in zip(own, caches, strict=True):
            torch.testing.assert_close(found, expected)
        expected = reference.attend(q, caches[0], caches[1], position_B)
        torch.testing.assert_close(kernels.attend(q, caches[0], caches[1], position_B), expected, rtol=1e-4, atol=1e-4)


def test_tilings_follow_the_matrix_only() -> None:
    kernels = TritonKernels(tiny_config(), {(99, 256, torch.float32, "plain"): Tiling(32, 128)})
    x, matrix = random(3, 256), Matrix(random(99, 256))
    torch.testing.assert_close(kernels.linear(x, matrix), x @ matrix.values.T, rtol=1e-4, atol=1e-3)
    for precision in (None, "int8", "int4"):
        packed = Matrix.pack(random(9000, 256).bfloat16(), precision)
        tilings = [default_tiling(packed), *candidate_tilings(packed)]
        assert len(set(tilings)) > 3
        assert all(t.block_k == 128 for t in tilings) == (precision == "int4"), "a step over K is a group of scales"
