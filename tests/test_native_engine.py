"""Speculation on the native engine: the same bits as plain decoding, in every precision, draft and batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.isa import obstacle
from hopskip.backends.rows import Rows, Segment
from hopskip.backends.steps import StepwiseBackend
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.draft.exit import ExitDrafter
from hopskip.engine import make_engine
from hopskip.prove import recorder
from hopskip.sequence import Request, Sequence
from hopskip.speculative import DraftChoice, VerifyMode, early_exit
from tests.native_cache import vectors
from tests.test_engine import PLAIN, new_ids, run
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"no native engine here: {obstacle()}")

PROMPTS = [[5, 6, 7, 8] * 3, [9, 8, 7] * 20, [3]]
PARAMS = SamplingParams(max_new_tokens=40)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "q8", "q4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeBackend:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return NativeBackend.load(open_checkpoint(folder), precision=request.param, threads=1)


@pytest.mark.parametrize("verify", ["recompute", "reuse"])
@pytest.mark.parametrize(
    ("draft", "num_draft_tokens"), [("early-exit", 1), ("early-exit", 6), ("ngram", 3), ("both", 4)]
)
def test_hidden_states_equal_plain_decodings(
    model: NativeBackend, draft: DraftChoice, num_draft_tokens: int, verify: VerifyMode
) -> None:
    num_accepted = num_drafted = 0
    for prompt in PROMPTS:
        config = SpeculativeConfig(draft=draft, num_draft_tokens=num_draft_tokens, verify=verify)
        (expected,) = recorder.run(model, [prompt], PLAIN, PARAMS, max_num_seqs=1)
        (got,) = recorder.run(model, [prompt], config, PARAMS, max_num_seqs=1)
        assert got.token_ids == expected.token_ids
        assert recorder.same_bits(got.states, expected.states)
        num_accepted += got.stats.num_accepted_tokens
        num_drafted += got.stats.num_draft_tokens
    assert num_accepted < num_drafted, "without a rejected draft this proves nothing"


def test_a_tree_leaves_the_cache_of_plain_decoding(model: NativeBackend) -> None:
    """Keys and values of every layer, whichever path was kept."""
    num_beside = 0
    for prompt in PROMPTS:
        plain = make_engine(model, PLAIN, max_num_seqs=1)
        config = SpeculativeConfig(draft="early-exit", num_draft_tokens=3, num_runner_ups=6)
        engine = make_engine(model, config, max_num_seqs=1)
        expected, got = (run(e, [prompt], PARAMS)[0] for e in (plain, engine))
        assert got.token_ids == expected.token_ids
        contents = (vectors(e._slots.cache, model.config.head_dim) for e in (engine, plain))
        for left, right in zip(*contents, strict=True):
            assert torch.equal(left[:, 0, :, : got.num_cached], right[:, 0, :, : got.num_cached])
        chain = run(make_engine(model, replace(config, num_runner_ups=0), max_num_seqs=1), [prompt], PARAMS)[0]
        num_beside += chain.stats.num_target_passes - got.stats.num_target_passes
        assert got.stats.num_accepted_tokens < got.stats.num_draft_tokens
    assert num_beside > 0, "no runner-up was ever accepted, so nothing is proved"


def test_a_batch_changes_nothing(model: NativeBackend) -> None:
    config = SpeculativeConfig(draft="both", num_draft_tokens=4, num_runner_ups=2)
    alone = [new_ids(run(make_engine(model, config), [prompt], PARAMS))[0] for prompt in PROMPTS]
    assert new_ids(run(make_engine(model, config), PROMPTS, PARAMS)) == alone


@pytest.mark.parametrize("eos_token_ids", [frozenset(), frozenset(range(0, 300, 3))])
@pytest.mark.parametrize("min_confidence", [0.0, 0.04])
@pytest.mark.parametrize("num_runner_ups", [0, 3])
@pytest.mark.parametrize("limits", [(5, 5, 5, 5, 5), (3, 6, 1, 4, 6), (0, 4, 0, 0, 2), (0, 0, 0, 5, 5)])
def test_a_draft_in_one_call_is_the_draft_of_its_steps(
    model: NativeBackend,
    limits: tuple[int, ...],
    num_runner_ups: int,
    min_confidence: float,
    eos_token_ids: frozenset[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [SamplingParams()] * 2 + [SamplingParams(ignore_eos=True, stop_token_ids=(2**40, 7, 8))]
    params += [SamplingParams(repetition_penalty=1.5), SamplingParams(temperature=1.0, top_k=50, seed=1)]
    found = []
    for goes_by_steps in (False, True):
        if goes_by_steps:
            monkeypatch.setattr(model, "draft", partial(StepwiseBackend.draft, cast(Any, model)))
        drafter = ExitDrafter(model, early_exit(2), min_confidence, num_runner_ups)
        cache = model.new_cache(5, 64)
        cache.clear()
        sequences = []
        for slot, own in enumerate(params):
            ids = [(7 * slot + 3 * i) % 300 for i in range(4 + slot)]
            sequence = Sequence(Request(ids, own), eos_token_ids)
            sequence.slot, sequence.num_cached = 4 - slot, len(ids) - 1
            model.forward(ids[:-1], Rows([Segment(4 - slot, 0, len(ids) - 1)]), cache)
            sequences.append(sequence)
        drafts = drafter.propose(sequences, limits, cache)
        contents = [(d.token_ids, d.parents, d.exit_states is not None and d.exit_states.tolist()) for d in drafts]
        found.append((contents, *vectors(cache, model.config.head_dim)))
        assert any(draft.token_ids for draft in drafts)
    (one_call, *cache_one), (steps, *cache_steps) = found
    assert one_call == steps
    assert all(torch.equal(a, b) for a, b in zip(cache_one, cache_steps, strict=True))
