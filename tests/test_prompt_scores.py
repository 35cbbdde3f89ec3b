"""Log-probabilities of prompts: those of transformers on the same weights, in pieces, beside others, after a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hopskip import LLM, ConfigError, SamplingParams, SpeculativeConfig
from hopskip.engine.scores import ROWS_WITH_SCORES
from tests.tiny import VOCAB_SIZE, write_checkpoint

IDS = torch.randint(3, VOCAB_SIZE, (ROWS_WITH_SCORES * 2 + 40,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray[Any, Any]]:
    """A folder, and the log-probabilities [N, V] after each of IDS."""
    folder = tmp_path_factory.mktemp("model")
    written = write_checkpoint(folder, "llama3-gqa", tokenizer=True)
    with torch.no_grad():
        logits = written(torch.tensor([IDS])).logits[0].double()
    return folder, logits.log_softmax(-1).numpy()


def load(folder: Path, backend: Any, draft: str = "none", **options: Any) -> LLM:
    exit_layer = 1 if draft == "early-exit" else None
    speculative = SpeculativeConfig(draft=draft, exit_layer=exit_layer)  # type: ignore[arg-type]
    return LLM(folder, backend=backend, dtype="float32", speculative=speculative, **options)


@pytest.mark.parametrize(("backend", "draft"), [("native", "none"), ("native", "early-exit"), ("torch", "none")])
def test_scores_are_those_of_transformers(model: tuple[Path, Any], backend: str, draft: str) -> None:
    folder, expected_NV = model
    llm = load(folder, backend, draft)
    for number in (0, 3):
        lengths = (1, 2, 33, ROWS_WITH_SCORES, ROWS_WITH_SCORES + 1, len(IDS))
        # all at once; the first pass leaves them all in the cache, so that the second could start from there
        for _ in range(2):
            results = llm.generate(
                [IDS[:length] for length in lengths],
                max_tokens=4,
                prompt_logprobs=number,
                ignore_eos=True,
                use_tqdm=False,
            )
            for length, result in zip(lengths, results, strict=True):
                scores = result.prompt_logprobs
                assert scores is not None
                assert scores[0] is None
                assert len(scores) == length
                assert result.stats.num_cached_prompt_tokens == 0
                for position in range(1, length):
                    score, logprobs_V = scores[position], expected_NV[position - 1]
                    assert score is not None
                    token = IDS[position]
                    assert score.logprob == pytest.approx(logprobs_V[token], abs=1e-4)
                    assert (
                        abs(score.rank - 1 - (logprobs_V > logprobs_V[token]).sum())
                        <= (np.abs(logprobs_V - logprobs_V[token]) < 1e-4).sum() - 1
                    )
                    assert list(score.top_logprobs.values()) == pytest.approx(
                        np.sort(logprobs_V)[::-1][:number].tolist(), abs=1e-4
                    )
                    if number:
                        assert next(iter(score.top_logprobs)) == logprobs_V.argmax()


def test_the_text_that_follows_is_the_same(model: tuple[Path, Any]) -> None:
    llm = load(model[0], "native")
    params: dict[str, Any] = {"max_tokens": 8, "use_tqdm": False}
    plain = llm.generate([IDS], **params)[0]
    assert plain.prompt_logprobs is None
    assert llm.generate([IDS], prompt_logprobs=0, **params)[0].token_ids == plain.token_ids
    # a prompt that has been read for its scores serves others
    assert llm.generate([IDS], **params)[0].stats.num_cached_prompt_tokens == len(IDS) - 1


def test_a_prompt_can_be_read_for_its_scores_alone(model: tuple[Path, Any]) -> None:
    folder, expected_NV = model
    llm = load(folder, "native", max_model_len=len(IDS))
    [beside, result] = llm.generate(
        [IDS[:9], IDS], [SamplingParams(max_tokens=5, ignore_eos=True), SamplingParams(max_tokens=0, prompt_logprobs=0)]
    )
    assert len(beside.token_ids) == 5
    assert (result.text, result.tokens, result.finish_reason) == ("", [], "length")
    assert result.stats.num_tokens == 0
    assert result.stats.prefill_seconds > 0
    assert result.prompt_logprobs is not None
    total = sum(score.logprob for score in result.prompt_logprobs if score is not None)
    expected = expected_NV[np.arange(len(IDS) - 1), IDS[1:]].sum()
    assert total == pytest.approx(expected, abs=1e-4 * len(IDS))
    with pytest.raises(ConfigError, match=f"prompt_logprobs is 1000; the vocabulary has only {VOCAB_SIZE} tokens"):
        llm.generate([IDS[:3]], prompt_logprobs=1000)


def test_passes_with_scores_are_small(model: tuple[Path, Any]) -> None:
    llm = load(model[0], "torch")
    counts: list[int] = []
    embed = llm.backend.embed

    def count(token_ids: Any) -> Any:
        counts.append(len(token_ids))
        return embed(token_ids)

    llm.backend.embed = count  # type: ignore[method-assign]
    llm.generate([IDS], max_tokens=0, prompt_logprobs=0)
    assert max(counts) == ROWS_WITH_SCORES
    counts.clear()
    llm.generate([IDS[::-1]], max_tokens=1)
    assert max(counts) > ROWS_WITH_SCORES
