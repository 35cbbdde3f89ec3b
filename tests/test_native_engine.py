"""Speculation on the native engine: the same bits as plain decoding, in every precision, draft and batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.draft.config import DraftSource, VerifyMode
from hopskip.engine import Engine
from hopskip.native import NativeModel, available
from hopskip.weights import open_checkpoint
from tests.test_engine import PLAIN, RecordingModel, new_ids, run
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.skipif(available() is not None, reason=f"no native engine here: {available()}")

PROMPTS = [[5, 6, 7, 8] * 3, [9, 8, 7] * 20, [3]]
PARAMS = SamplingParams(max_new_tokens=40)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "q8", "q4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return NativeModel.load(open_checkpoint(folder), precision=request.param, threads=1)


@pytest.mark.parametrize("verify", ["recompute", "reuse"])
@pytest.mark.parametrize(
    ("draft", "num_draft_tokens"), [("early-exit", 1), ("early-exit", 6), ("ngram", 3), ("both", 4)]
)
def test_hidden_states_equal_plain_decodings(
    model: NativeModel, draft: DraftSource, num_draft_tokens: int, verify: VerifyMode
) -> None:
    num_accepted = num_drafted = 0
    for prompt in PROMPTS:
        plain, speculative = RecordingModel(model), RecordingModel(model)
        expected = run(Engine(plain, PLAIN), [prompt], PARAMS)[0]  # type: ignore[arg-type]
        config = SpeculativeConfig(draft=draft, num_draft_tokens=num_draft_tokens, verify=verify)
        got = run(Engine(speculative, config), [prompt], PARAMS)[0]  # type: ignore[arg-type]
        assert got.token_ids == expected.token_ids
        for position in range(expected.num_cached):
            assert torch.equal(plain.states[position], speculative.states[position]), position
        num_accepted += got.stats.num_accepted_tokens
        num_drafted += got.stats.num_draft_tokens
    assert num_accepted < num_drafted, "without a rejected draft this proves nothing"


def test_a_batch_changes_nothing(model: NativeModel) -> None:
    config = SpeculativeConfig(draft="both", num_draft_tokens=4)
    alone = [new_ids(run(Engine(model, config), [prompt], PARAMS))[0] for prompt in PROMPTS]
    assert new_ids(run(Engine(model, config), PROMPTS, PARAMS)) == alone
