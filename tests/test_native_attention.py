"""Attention of the native engine: random shapes against a reference in float64 that reads the engine's own cache, and
bitwise against the same rows in other company.

Shape letters: N rows, D hidden size, H query heads, K key/value heads, T positions, E head dimension.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hopskip.backends.native import isa as isa_module
from hopskip.backends.native.backend import KV_DTYPES, NativeBackend
from hopskip.backends.native.packed import PackedWeights
from hopskip.backends.rows import Cache, Rows, Segment
from hopskip.checkpoint.checkpoint import expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig
from tests.models import tiny_config
from tests.native_cache import fill_with_garbage, set_vectors, vectors
from tests.packing import ArrayCheckpoint
from tests.properties import examples

pytestmark = pytest.mark.skipif(isa_module.obstacle() is not None, reason=isa_module.obstacle() or "")

ISAS = [] if isa_module.obstacle() else [name for name in isa_module.ISAS if isa_module.extension.runs_here(name)]
HIDDEN = 32
LONGEST = 10_000


class Case(NamedTuple):
    config: ModelConfig
    segments: tuple[Segment, ...]
    kv_dtype: str
    seed: int


def random_checkpoint(config: ModelConfig, seed: int) -> ArrayCheckpoint:
    """Random matrices, norms of ones, and a decoder layer that does nothing but attend."""
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        if "down_proj" in name:
            return torch.zeros(shape)
        scaled: Tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        return scaled

    return ArrayCheckpoint(config, {name: make(name, shape) for name, shape in expected_tensors(config).items()})


def make_case(seed: int) -> Case:
    rng = random.Random(seed)
    head_dim = rng.choice([2, 4, 6, 16, 30, 32, 48, 62, 64, 80, 96, 112, 128, 256, 512])
    kv_heads = rng.choice([1, 1, 2, 3])
    group = rng.choice([1, 2, 3, 4, 5, 7, 8, 16]) if head_dim < 256 else rng.choice([1, 2, 5])
    config = tiny_config(
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=rng.choice([None, None, None, 1, 3, 17, 255, 256, 300, 4097]),
        rope=RopeConfig(head_dim=head_dim),
    )
    is_long = rng.random() < 0.1
    segments = []
    for slot in rng.sample(range(4), rng.choice([1, 1, 1, 2, 4])):
        longest = LONGEST if is_long else 1100
        start = rng.choice([0, 1, 15, 16, 17, 200, 254, 255, 256, 257, 511, rng.randrange(longest)])
        if is_long and rng.random() < 0.5:
            start = rng.choice([4094, 4096, 8190, 8192, rng.randrange(longest)])
        count = rng.choice([1, 1, 2, 3, 5, 8, 9, 16, rng.randint(1, 64)])
        parents = None
        if rng.random() < 0.4:
            parents = tuple(-1 if row == 0 else rng.randint(max(0, row - rng.choice([1, 3, 64])), row - 1)
                            for row in range(count))  # fmt: skip
        elif rng.random() < 0.1:
            count = rng.randint(65, 300)
        segments.append(Segment(slot, start, count, parents))
    if any(segment.parents is not None for segment in segments):  # a pass with trees is a pass of drafts
        segments = [s if s.count <= 64 else Segment(s.slot, s.start, 64) for s in segments]
    return Case(config, tuple(segments), rng.choice(KV_DTYPES), seed)


def expected_rows(case: Case, weights: ArrayCheckpoint, x_ND: Tensor, k_SKTE: Tensor, v_SKTE: Tensor) -> Tensor:
    """Hidden states after the layer, by keys and values as they lie in the cache."""
    config, name = case.config, "model.layers.0.self_attn."
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x_ND = x_ND.double()
    normed_ND = x_ND * (x_ND.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    q_NHE = (normed_ND @ weights.tensor(name + "q_proj.weight").double().T).view(-1, heads, size)
    o_DH = weights.tensor(name + "o_proj.weight").double()
    cos, sin = (torch.from_numpy(table).double() for table in config.rope.tables(k_SKTE.shape[2]))
    out, first = [], 0
    for segment in case.segments:
        for row in range(segment.count):
            position = segment.start + segment.depths[row]
            path = segment.places_to(row) if segment.parents is not None else range(segment.start, position + 1)
            places = [*range(segment.start), *path]
            if config.sliding_window is not None:
                places = places[-config.sliding_window :]
            a_HE, b_HE = q_NHE[first + row].chunk(2, dim=-1)
            c_E, s_E = cos[position, : size // 2], sin[position, : size // 2]
            q_HE = torch.cat([a_HE * c_E - b_HE * s_E, b_HE * c_E + a_HE * s_E], dim=-1)
            k_KTE, v_KTE = (x[segment.slot][:, places].double() for x in (k_SKTE, v_SKTE))
            q_KGE = q_HE.view(kv_heads, heads // kv_heads, size)
            weights_KGT = (q_KGE @ k_KTE.mT * size**-0.5).softmax(-1)
            out.append(x_ND[first + row] + o_DH @ (weights_KGT @ v_KTE).flatten())
        first += segment.count
    return torch.stack(out)


def pieces(rng: random.Random, segment: Segment) -> list[Segment]:
    """The same rows in several passes; a tree stays whole."""
    if segment.parents is not None:
        return [segment]
    cuts = sorted(rng.sample(range(1, segment.count), min(segment.count - 1, rng.choice([1, 3, 7]))))
    return [Segment(segment.slot, segment.start + a, b - a) for a, b in pairwise([0, *cuts, segment.count])]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(1.5))
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_are_right_and_their_bits_their_own(isa: str, seed: int) -> None:
    case = make_case(seed)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    rng, config = random.Random(case.seed), case.config
    weights = random_checkpoint(config, case.seed)
    packed = PackedWeights.from_checkpoint(weights, "float32")  # type: ignore[arg-type]
    model, other = (NativeBackend(config, packed, threads, case.kv_dtype) for threads in rng.sample([1, 2, 3, 5], 2))
    monkeypatch.undo()
    assert model.traits.instruction_set == isa
    generator = torch.Generator().manual_seed(case.seed)
    x_ND = torch.randn((sum(s.count for s in case.segments), HIDDEN), generator=generator)
    length = max(s.start + s.count for s in case.segments) + rng.choice([0, 1, 40])
    shape = (1, 4, config.num_key_value_heads, length, config.head_dim)
    k, v = (torch.randn(shape, generator=generator) * 2 for _ in range(2))
    for segment in case.segments:  # what must not be read
        for values in (k, v):
            values[:, segment.slot, :, segment.start :] = 1e6 if case.kv_dtype == "int8" else float("nan")

    def filled(model: NativeBackend) -> Cache:
        cache = model.new_cache(4, length)
        fill_with_garbage(cache)
        set_vectors(cache, k, v)
        return cache

    def run(model: NativeBackend, segments: list[Segment], rows: Tensor, cache: Cache) -> Tensor:
        return torch.as_tensor(model.run_layers(rows.numpy(), 0, 1, Rows(segments), cache).hidden_ND)

    cache = filled(model)
    found_ND = run(model, [*case.segments], x_ND, cache)
    k_now, v_now = (values[0] for values in vectors(cache, config.head_dim))
    expected_ND = expected_rows(case, weights, x_ND, k_now, v_now)
    is_exact = case.kv_dtype != "int8" or isa in ("avx2", "neon", "portable")  # others multiply bytes
    error = (found_ND - expected_ND).abs().max() / (expected_ND - x_ND).abs().max()
    assert error < (2e-5 if is_exact else 0.04), (float(error), case)

    cache, first = filled(other), 0
    starts = {}
    for segment in case.segments:
        starts[segment], first = first, first + segment.count
    for segment in rng.sample(case.segments, len(case.segments)):
        own_ND = x_ND[starts[segment] :][: segment.count]
        outs = [
            run(other, [piece], own_ND[piece.start - segment.start :][: piece.count], cache)
            for piece in pieces(rng, segment)
        ]
        assert torch.equal(torch.cat(outs), found_ND[starts[segment] :][: segment.count])
        for before, values in zip((k_now, v_now), vectors(cache, config.head_dim), strict=True):
            valid = slice(segment.start + segment.count)
            assert torch.equal(values[0, segment.slot, :, valid], before[segment.slot, :, valid])
