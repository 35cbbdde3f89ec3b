"""Numbers that are none, NaN and infinity: nothing makes ordinary ones of them, and no token is chosen by them.

Shape letters: N rows, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.backends.base import Backend, DraftTask
from hopskip.backends.native import isa
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.formats import Format
from hopskip.backends.native.packing import Packer
from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.engine import make_engine
from hopskip.errors import HopskipError
from hopskip.sampling import best_sums, choose_tokens
from hopskip.sequence import NoTokenError, Place, Rule
from hopskip.speculative import DraftChoice
from tests.models import tiny_model
from tests.native_cache import views
from tests.test_engine import PLAIN, new_ids, run
from tests.test_native import runnable_isas
from tests.test_native_arrays import (
    D,
    ints,
    layer,
    make_cache,
    make_exit,
    make_rows,
    matrix,
    plain_exit,
    task_arguments,
)
from tests.test_native_arrays import make_engine as small_engine
from tests.tiny import write_checkpoint

with_extension = pytest.mark.skipif(isa.obstacle() is not None, reason=isa.obstacle() or "")

QUIET, FULL = (np.array([word], dtype=np.uint32).view(np.float32)[0] for word in (0x7FC00000, 0x7FFFFFFF))
"""NaN as the processor makes it, and one that rounding to bfloat16 would carry over the end."""
NO_NUMBERS = (QUIET, FULL, np.float32("inf"), np.float32("-inf"))
PRECISIONS = ("float32", "bfloat16", "q8", "q4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_checkpoint(made, "llama3-gqa")
    return made


def load(folder: Path, precision: str, **options: Any) -> NativeBackend:
    return NativeBackend.load(open_checkpoint(folder), precision, **options)


def states(model: Backend, count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).standard_normal((count, model.config.hidden_size), dtype=np.float32)


@with_extension
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", runnable_isas())
def test_the_head_and_the_choice(folder: Path, name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of a row; the others of its block are ordinary, or zero."""
    monkeypatch.setenv("HOPSKIP_ISA", name)
    model = load(folder, precision, threads=2)
    h_ND = states(model, 9)
    good = [0, 1, 3, 4, 6, 7]
    expected_NV, best = model.logits(h_ND[good]), model.greedy(h_ND[good])
    for bad in NO_NUMBERS:
        h_ND[2, 0] = h_ND[5, 33] = h_ND[8, 63] = bad
        logits_NV, found = model.logits(h_ND), model.greedy(h_ND)
        assert np.isnan(logits_NV[[2, 5, 8]]).all()
        assert np.array_equal(logits_NV[good], expected_NV)
        assert [found[row] for row in good] == best
        assert [found[row] for row in (2, 5, 8)] == [-1, -1, -1]
        for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=3), SamplingParams(logit_bias={3: 1.0})):
            places = [Place(Rule.of(params, []), 5) for _ in h_ND]
            chosen = model.choose(h_ND, places).token_ids
            assert [row for row, token in enumerate(chosen) if token < 0] == [2, 5, 8]


@with_extension
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", runnable_isas())
def test_a_row_and_those_that_follow_it(
    folder: Path, name: str, precision: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before it in the same pass, other sequences, and whoever gets the slot next have the bits that they have
    without it."""
    monkeypatch.setenv("HOPSKIP_ISA", name)
    model = load(folder, precision, threads=2, kv_dtype=kv_dtype)
    depth, cache = model.config.num_hidden_layers, model.new_cache(2, 32)
    rows = Rows([Segment(0, 0, 20), Segment(1, 0, 4)])
    h_ND = states(model, 24)
    clean_ND = model.run_layers(h_ND, 0, depth, rows, cache).hidden_ND
    for bad in NO_NUMBERS:
        bad_ND = h_ND.copy()
        bad_ND[13, 5] = bad
        found_ND = model.run_layers(bad_ND, 0, depth, rows, cache).hidden_ND
        assert np.array_equal(found_ND[:13], clean_ND[:13])
        assert np.array_equal(found_ND[20:], clean_ND[20:])
        assert np.isnan(found_ND[13:20]).all()
        after_ND = model.run_layers(h_ND[20:], 0, depth, Rows([Segment(0, 20, 4)]), cache).hidden_ND
        assert np.isnan(after_ND).all()
        assert np.array_equal(model.run_layers(h_ND, 0, depth, rows, cache).hidden_ND, clean_ND)


@with_extension
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", runnable_isas())
def test_keys_alone(folder: Path, name: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is no number, beside values that are: it counts for those who see it, in whichever chunk it is, with
    however many threads."""
    monkeypatch.setenv("HOPSKIP_ISA", name)
    for threads in (1, 3):
        model = load(folder, "float32", threads=threads, kv_dtype=kv_dtype)
        cache, depth, length = model.new_cache(1, 800), model.config.num_hidden_layers, 790
        h_ND = states(model, length)
        clean_ND = model.run_layers(h_ND, 0, depth, Rows([Segment(0, 0, length)]), cache).hidden_ND
        before = cache.handle.bytes.copy()

        def last(start: int, model: NativeBackend = model, cache: Any = cache, depth: int = depth) -> Any:
            rows = Rows([Segment(0, start, 2)])
            return model.run_layers(h_ND[start : start + 2], 0, depth, rows, cache).hidden_ND  # noqa: B023

        for first, end in ((3, 4), (0, 256), (256, 512), (512, 700), (600, 601), (0, 700)):
            parts = views(cache, model.config.head_dim)
            for position in range(first, end):
                if parts.key_scales is not None:
                    parts.key_scales[..., position // 16, position % 16] = math.nan
                else:
                    parts.keys[..., position // 16, position % 16, 0, 0] = (
                        0xFFFF if kv_dtype == "bfloat16" else math.nan
                    )
            assert np.isnan(last(702)).all(), (first, end)
            if first > 1:
                assert np.array_equal(last(first - 2), clean_ND[first - 2 : first]), "rows before it see nothing of it"
            cache.handle.bytes[:] = before


@with_extension
def test_values_too_large_for_bfloat16() -> None:
    """Rounded to infinity they would reach rows that do not see them."""
    engine = small_engine()
    large = torch.zeros(32)
    large[5] = 3.4e38
    engine.add_layer(layer(0, v_bias=large))
    found, cache = torch.zeros(2, D), make_cache(torch.bfloat16, layers=4)
    engine.run_layers(torch.ones(2, D), found, 3, 4, make_rows(ints(0, 0), ints(0, 1)), cache)
    assert bool(found.isnan().all())


@with_extension
@pytest.mark.parametrize("part", ["input_norm", "post_norm", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_vectors_of_a_layer_are_finite(part: str, bad: float) -> None:
    size = {"q_bias": 64, "k_bias": 32, "v_bias": 32, "q_norm": 16, "k_norm": 16}.get(part, D)
    vector = torch.ones(size)
    vector[size - 1] = bad
    changes: dict[str, Any] = {part: vector}
    with pytest.raises(ValueError, match=f"has an element that is {bad}; weights must be finite"):
        small_engine().add_layer(layer(0, **changes))
    norm = torch.ones(D)
    norm[3] = bad
    with pytest.raises(ValueError, match=f"norm has an element that is {bad}"):
        small_engine().set_embedding_and_head(matrix(50, D, 30), matrix(50, D, 31), norm)


@with_extension
@pytest.mark.parametrize("by_logits", [False, True])
def test_drafts_end_where_no_token_can_be_chosen(by_logits: bool) -> None:
    """Those of the sequence alone that meets it, at once or on the way."""
    changes: dict[str, Any] = {"min_confidence": 0.0, "rules": [], "runner_ups": None, "sums": None}
    changes = {"rules": []} if by_logits else changes
    expected, found = task_arguments(**changes), task_arguments(**changes)
    found["features"][2, 0, 7] = math.nan
    for task in (expected, found):
        rows = make_rows(ints(0, 0, 1), ints(3, 4, 2))
        small_engine().draft(make_exit(), rows, make_cache(), isa.extension.DraftTask(**task))
    assert expected["counts"][1] > 0
    assert found["counts"].tolist() == [int(expected["counts"][0]), 0]
    assert torch.equal(found["tokens"][0], expected["tokens"][0])
    assert torch.equal(found["states"][0], expected["states"][0])
    # a damaged embedding: whoever drafts the token goes no further
    engine, exit = small_engine(), plain_exit()
    tokens, counts = torch.zeros((1, 6), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def draft(own: Any, start: int) -> list[int]:
        task = isa.extension.DraftTask(
            ids=ints(start), limits=ints(6), tokens=tokens, counts=counts, states=torch.zeros(1, 6, D),
            min_confidence=1e-9 if by_logits else 0.0,
        )  # fmt: skip
        own.draft(exit, make_rows(ints(0), ints(3)), make_cache(), task)
        drafted: list[int] = tokens[0, : counts.item()].tolist()
        return drafted

    whole = draft(engine, 1)
    assert len(whole) == 6
    stopping = next(token for token in whole if token != 1)
    assert whole.index(stopping) < 5
    engine.set_embedding_and_head(_damaged(stopping), matrix(50, D, 31), torch.linspace(0.5, 1.5, D))
    assert draft(engine, 1) == whole[: whole.index(stopping) + 1]


def _damaged(token: int) -> Any:
    """An embedding in float32, of which one row is no numbers."""
    weight = torch.randn((50, D), generator=torch.Generator().manual_seed(30)) * D**-0.5
    packed = Packer().pack_array(weight.numpy(), Format.F32)
    packed.data.view(np.float32).reshape(-1, D, 16)[token // 16, :, token % 16] = math.nan
    return isa.extension.Matrix(int(packed.format), 50, D, packed.data)


# -- in PyTorch, the readable version ----------------------------------------------------------------------------------


@pytest.fixture
def model() -> TorchBackend:
    return tiny_model()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pytorch_chooses_none(model: TorchBackend, bad: float) -> None:
    h_ND = torch.randn((4, 64), generator=torch.Generator().manual_seed(0))
    h_ND[1, 5] = bad
    assert [token < 0 for token in model.greedy(h_ND)] == [False, True, False, False]
    places = [Place(Rule.of(SamplingParams(temperature=t), []), 3) for t in (0.0, 1.0, 1.0, 0.0)]
    assert [token < 0 for token in model.choose(h_ND, places).token_ids] == [False, True, False, False]


def test_one_logit_is_enough() -> None:
    """Of one among many nobody can say how large it is. What is forbidden does not count."""
    logits_NV = np.zeros((3, 40), dtype=np.float32)
    logits_NV[1, 7] = math.nan
    logits_NV[2, 7] = math.inf
    rule = Rule.of(SamplingParams(), [])
    assert choose_tokens(logits_NV, [Place(rule, 0)] * 3, array_api_compat.numpy) == [0, -1, -1]
    mask = np.array([0xFFFFFF7F, 0xFF], dtype=np.uint32)
    assert choose_tokens(logits_NV, [Place(rule, 0, allowed=mask)] * 3, array_api_compat.numpy) == [0, 0, 0]
    assert best_sums(logits_NV[1], None, Place(rule, 0), 1, array_api_compat.numpy) == ([], 0.0)
    nothing = np.full(40, -math.inf, dtype=np.float32)
    assert best_sums(nothing, None, Place(rule, 0), 1, array_api_compat.numpy) == ([], 0.0)


def test_pytorchs_drafts_end_there_too(model: TorchBackend) -> None:
    def draft(start: int) -> list[list[int]]:
        task = DraftTask(
            layers=(0, 1), token_ids=[3, start], rows=Rows([Segment(0, 5, 1), Segment(1, 5, 1)]), limits=[4, 4]
        )
        cache = model.new_cache(2, 16)
        cache.clear()
        chains = model.draft(task, cache)
        assert [len(own) for own in chains.states] == [len(own) for own in chains.token_ids]
        return chains.token_ids

    start = next(
        start for start in range(97) if draft(start)[1][1] not in {*draft(start)[0], draft(start)[1][0], start}
    )
    first, second = draft(start)
    assert len(first) == len(second) == 4
    model.weights.embed_tokens[second[1]] = math.nan
    assert draft(start) == [first, second[:2]]
    model.weights.embed_tokens[start] = math.nan
    assert draft(start) == [first, []]


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_native", "draft", "temperature"),
    [
        *(pytest.param(True, draft, 0.0, marks=with_extension) for draft in ("none", "early-exit", "both")),
        *(pytest.param(True, draft, 1.0, marks=with_extension) for draft in ("none", "both")),
        (False, "none", 1.0),
        (False, "both", 0.0),
    ],
)
def test_the_sequence_that_meets_it_fails_alone(
    folder: Path, is_native: bool, draft: DraftChoice, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its prompt, or on the way; and the next one that begins alike is none the worse."""
    model: Backend = load(folder, "q8", threads=2) if is_native else tiny_model()
    params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=4 if temperature else None)
    config = PLAIN
    if draft != "none":
        config = SpeculativeConfig(draft=draft, exit_layer=2, num_draft_tokens=3, num_runner_ups=2)
    prompts = [[5, 6, 7, 8] * 5, [], [3] * 9]
    for first in range(10, 60):
        prompts[1] = [first, 8, 7] * 7
        plain = new_ids(run(make_engine(model, PLAIN), prompts, params))
        innocent = {*plain[0], *plain[2]}.union(*prompts)
        at = next((i for i, token in enumerate(plain[1]) if token not in innocent.union(plain[1][:i])), 0)
        if 0 < at < 11:
            break
    assert 0 < at < 11
    other = next(token for token in range(97) if token not in innocent.union(plain[1]))
    damaged = {other, plain[1][at]}
    prompts.append([5, 6, other, 7] * 5)
    embed = model.embed

    def damage(token_ids: Seq[int]) -> Any:
        h_ND = embed(token_ids)
        h_ND[[row for row, token in enumerate(token_ids) if token in damaged]] = math.nan
        return h_ND

    engine = make_engine(model, config, prefix_caching=True)
    with monkeypatch.context() as patched:
        patched.setattr(model, "embed", damage)
        sequences = run(engine, prompts, params)
    assert [s.finish_reason for s in sequences] == ["length", "error", "length", "error"]
    assert new_ids([sequences[0], sequences[2]]) == [plain[0], plain[2]]
    assert new_ids(sequences)[1] == plain[1][: len(sequences[1].tokens)]
    assert not sequences[3].tokens
    for failed in (sequences[1], sequences[3]):
        assert isinstance(failed.error, NoTokenError)
        assert isinstance(failed.error, HopskipError)
        assert "logits are not numbers" in str(failed.error)
    assert new_ids(run(engine, prompts, params)) == new_ids(run(make_engine(model, PLAIN), prompts, params))
