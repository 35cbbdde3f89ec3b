"""Speculation on the native engine: the same bits as plain decoding, in every precision, draft and batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.isa import obstacle
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.draft.exit import ExitDrafter
from hopskip.engine import make_engine
from hopskip.sequence import Sequence
from hopskip.speculative import DraftChoice, VerifyMode
from tests.test_engine import PLAIN, RecordingModel, new_ids, run
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
        plain, speculative = RecordingModel(model), RecordingModel(model)
        expected = run(make_engine(plain, PLAIN), [prompt], PARAMS)[0]  # type: ignore[arg-type]
        config = SpeculativeConfig(draft=draft, num_draft_tokens=num_draft_tokens, verify=verify)
        got = run(make_engine(speculative, config), [prompt], PARAMS)[0]  # type: ignore[arg-type]
        assert got.token_ids == expected.token_ids
        for position in range(expected.num_cached):
            assert torch.equal(plain.states[position], speculative.states[position]), position
        num_accepted += got.stats.num_accepted_tokens
        num_drafted += got.stats.num_draft_tokens
    assert num_accepted < num_drafted, "without a rejected draft this proves nothing"


def test_a_tree_leaves_the_cache_of_plain_decoding(model: NativeBackend) -> None:
    """Keys and values of every layer, whichever branch was kept."""
    num_beside = 0
    for prompt in PROMPTS:
        plain = make_engine(model, PLAIN, max_num_seqs=1)
        config = SpeculativeConfig(draft="early-exit", num_draft_tokens=3, num_runner_ups=6)
        engine = make_engine(model, config, max_num_seqs=1)
        expected, got = (run(e, [prompt], PARAMS)[0] for e in (plain, engine))
        assert got.token_ids == expected.token_ids
        assert plain._cache is not None
        assert engine._cache is not None
        for left, right in zip(engine._cache.tensors, plain._cache.tensors, strict=True):
            assert torch.equal(left[:, 0, :, : got.num_cached], right[:, 0, :, : got.num_cached])
        chain = run(make_engine(model, replace(config, num_runner_ups=0), max_num_seqs=1), [prompt], PARAMS)[0]
        num_beside += chain.stats.num_target_passes - got.stats.num_target_passes
        assert got.stats.num_accepted_tokens < got.stats.num_draft_tokens
    assert num_beside > 0, "no runner-up was ever accepted, so nothing is proved"


def test_a_batch_changes_nothing(model: NativeBackend) -> None:
    config = SpeculativeConfig(draft="both", num_draft_tokens=4, num_runner_ups=2)
    alone = [new_ids(run(make_engine(model, config), [prompt], PARAMS))[0] for prompt in PROMPTS]
    assert new_ids(run(make_engine(model, config), PROMPTS, PARAMS)) == alone


class Counting:
    """Passes everything on, counts the calls of `draft_chains`, and can hide that there is such a thing."""

    def __init__(self, model: NativeBackend, *, has_draft_chains: bool) -> None:
        self._model = model
        self._has_draft_chains = has_draft_chains
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        if name == "draft_chains" and not self._has_draft_chains:
            raise AttributeError(name)
        return self._counted if name == "draft_chains" else getattr(self._model, name)

    def _counted(self, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
        self.num_calls += 1
        return self._model.draft_chains(*arguments, **keywords)


@pytest.mark.parametrize("min_confidence", [0.0, 0.04])
@pytest.mark.parametrize(
    ("limits", "num_calls"),
    # the last sequence samples from its best tokens, the one before is greedy with a penalty: these two always go step
    # by step
    [((5, 5, 5, 5, 5), 1), ((3, 6, 1, 4, 6), 1), ((0, 4, 0, 0, 2), 1), ((0, 0, 0, 5, 5), 0)],
)
def test_a_draft_in_one_call_is_the_draft_of_its_steps(
    model: NativeBackend, limits: tuple[int, ...], num_calls: int, min_confidence: float
) -> None:
    params = [SamplingParams()] * 3
    params += [SamplingParams(repetition_penalty=1.5), SamplingParams(temperature=1.0, top_k=50, seed=1)]
    found, num_tokens = [], 0
    for has_draft_chains in (True, False):
        counting = Counting(model, has_draft_chains=has_draft_chains)
        drafter = ExitDrafter(counting, 2, min_confidence)
        cache = model.new_cache(5, 64)
        for tensor in (cache.k_LSHTD, cache.v_LSHTD):
            tensor.zero_()
        sequences = []
        for slot, own in enumerate(params):
            ids = [(7 * slot + 3 * i) % 300 for i in range(4 + slot)]
            sequence = Sequence(ids, own, frozenset(), model.config.vocab_size)
            sequence.slot, sequence.num_cached = 4 - slot, len(ids) - 1
            prompt = torch.tensor(ids[:-1], dtype=torch.int32)
            model.run_layers(model.embed(prompt), 0, 3, Rows([Segment(4 - slot, 0, len(prompt))]), cache)
            sequences.append(sequence)
        drafts = drafter.propose(sequences, limits, cache)
        num_tokens = sum(len(draft.token_ids) for draft in drafts)
        contents = [
            ([d.token_ids, d.probs and [p.tolist() for p in d.probs]], [s.tolist() for s in d.exit_states])
            for d in drafts
        ]
        found.append((contents, cache.k_LSHTD.clone(), cache.v_LSHTD.clone()))
        assert counting.num_calls == (num_calls if has_draft_chains else 0)
    (one_call, *cache_one), (steps, *cache_steps) = found
    assert one_call == steps
    assert all(torch.equal(a, b) for a, b in zip(cache_one, cache_steps, strict=True))
    assert (num_tokens < sum(limits)) == (min_confidence > 0), "a draft that never ends early proves nothing"
