"""The public face, on tiny checkpoints read from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hopskip import LLM, CheckpointError, ConfigError, PromptError, SamplingParams, SpeculativeConfig
from tests.tiny import has_transformers, write_checkpoint

TEXTS = ["The quick brown fox jumps over the quick brown", "naïve café 日本語 🙂", "x"]
SAMPLED = SamplingParams(max_new_tokens=40, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, tokenizer=True)
    return path


@pytest.fixture(scope="module", params=[*(["torch"] if has_transformers() else []), "native"])
def llm(folder: Path, request: pytest.FixtureRequest) -> LLM:
    config = SpeculativeConfig(draft="both", exit_layer=1, num_draft_tokens=3)
    return LLM(folder, speculative=config, dtype="float32", backend=request.param)


def test_many_prompts_of_every_kind(llm: LLM) -> None:
    ids = llm.encode(TEXTS[0])
    prompts: list[str | list[int]] = [TEXTS[0], ids, TEXTS[1]]
    results = llm.generate(prompts, SAMPLED)
    assert results[0].prompt_token_ids == results[1].prompt_token_ids == ids
    assert results[0].text == results[1].text
    for result in results:
        assert len(result.token_ids) == result.stats.num_tokens <= 40
        assert result.finish_reason in ("stop", "length")
        assert result.logprobs is None
    assert llm.generate(ids, SAMPLED)[0].text == llm.generate(TEXTS[0], SAMPLED)[0].text == results[0].text


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    for text in TEXTS:
        whole = llm.generate(text, SAMPLED)[0]
        pieces = list(llm.stream(text, SAMPLED))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [piece.token.id for piece in pieces] == whole.token_ids
        assert [piece.result is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].result is not None
        assert pieces[-1].result.text == whole.text
        for piece in pieces:
            piece.text.encode("utf-8")


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(TEXTS[0], SAMPLED)[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    params = SamplingParams(max_new_tokens=40, temperature=1.5, seed=3, stop=(stop,))
    result = llm.generate(TEXTS[0], params)[0]
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(piece.text for piece in llm.stream(TEXTS[0], params)) == result.text


def test_closing_a_stream_frees_the_engine(llm: LLM) -> None:
    stream = llm.stream(TEXTS[0], SAMPLED)
    next(stream)
    assert llm.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: Iterator[int] = iter(range(3))
    step = llm.engine.step

    def interrupted() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, SAMPLED)
    assert not llm.engine.has_work
    monkeypatch.undo()
    assert llm.generate(TEXTS[0], SAMPLED)[0].token_ids


def test_logprobs(llm: LLM) -> None:
    result = llm.generate(TEXTS[0], SamplingParams(max_new_tokens=5, logprobs=2))[0]
    assert result.logprobs is not None
    assert len(result.logprobs) == 5
    assert all(value < 0 for value in result.logprobs)


def test_nothing_is_generated_when_one_prompt_is_bad(llm: LLM) -> None:
    for bad, message in (("", "empty"), ([], "empty"), ([10**6], "token id 1000000"), ([5] * 10**5, "context")):
        with pytest.raises(PromptError, match=message):
            llm.generate([TEXTS[0], bad], SAMPLED)
        assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int3"}, "dtype is 'int3'; choose one of auto"),
        ({"backend": "abacus"}, "backend is 'abacus'"),
        ({"quantize": "q3"}, "quantize is 'q3'; choose one of q8, q4"),
        ({"quantize": "q8", "dtype": "float32"}, "contradict"),
        ({"quantize": "q8", "backend": "torch"}, "q8 needs the native"),
        ({"threads": 0}, "threads is 0"),
        ({"device": "toaster"}, "device .toaster."),
        ({"max_model_len": 10**6}, "max_model_len is 1000000"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"speculative": SpeculativeConfig(exit_layer=99)}, "exit_layer is 99"),
    ],
)
def test_options_that_cannot_work(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(folder, **settings)  # type: ignore[arg-type]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_the_default_model_answers(default_model: Path) -> None:
    """The real model, as it comes, with drafts that are accepted and some that are not."""
    assert default_model.exists()
    llm = LLM()
    story = "Once upon a time there was a little fox. The little fox lived in a little house, and every day the little"
    chat = [{"role": "user", "content": "Repeat this: one, two, three, four, five, six."}]
    params = SamplingParams(max_new_tokens=60)
    prompts: list[str | list[dict[str, str]]] = [chat, story]
    results = llm.generate(prompts, params)
    assert "two, three, four" in results[0].text
    accepted = sum(result.stats.num_accepted_tokens for result in results)
    assert 0 < accepted < sum(result.stats.num_draft_tokens for result in results)
    plain = LLM(speculative=SpeculativeConfig(draft="none")).generate(prompts, params)
    assert [result.token_ids for result in plain] == [result.token_ids for result in results]
