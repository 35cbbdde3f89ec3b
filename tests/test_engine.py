"""The engine on small random decoders: losslessness, stopping, admission, the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hopskip import ConfigError, PromptError, SamplingParams, SpeculativeConfig
from hopskip.backends.base import Backend
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.isa import obstacle
from hopskip.backends.table import TableBackend
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.draft.base import Draft
from hopskip.draft.make import resolve
from hopskip.engine import Engine, make_engine
from hopskip.prove import recorder
from hopskip.sequence import Request, Sequence
from tests.models import table_model, tiny_config, tiny_model
from tests.properties import examples
from tests.tiny import write_checkpoint

PROMPTS = [
    torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() * 2 for n in (1, 3, 9, 20, 33)
]
PLAIN = SpeculativeConfig(draft="none")
GREEDY = SamplingParams(max_new_tokens=40)
with_extension = pytest.mark.skipif(obstacle() is not None, reason=f"no native engine here: {obstacle()}")


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Sequence]:
    each = params if isinstance(params, list) else [params] * len(prompts)
    sequences = [engine.add(Request(prompt, p)) for prompt, p in zip(prompts, each, strict=True)]
    while engine.has_work:
        engine.step()
    return sequences


def new_ids(sequences: list[Sequence]) -> list[list[int]]:
    return [[token.id for token in s.tokens] for s in sequences]


@pytest.fixture(scope="module")
def model() -> Backend:
    return tiny_model()


@pytest.fixture(scope="module")
def plain_ids(model: Backend) -> list[list[int]]:
    return new_ids(run(make_engine(model, PLAIN), PROMPTS, GREEDY))


@pytest.mark.parametrize("verify", ["recompute", "reuse"])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
@pytest.mark.parametrize(
    ("draft", "exit_layer"),
    [("early-exit", 1), ("early-exit", 3), ("early-exit", 5), ("ngram", None), ("both", 1), ("both", 3), ("both", 5)],
)
def test_greedy_speculation_is_lossless(
    model: Backend,
    plain_ids: list[list[int]],
    draft: str,
    exit_layer: int | None,
    num_draft_tokens: int,
    verify: str,
) -> None:
    config = SpeculativeConfig(
        draft=draft,  # type: ignore[arg-type]
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
        verify=verify,  # type: ignore[arg-type]
    )
    sequences = run(make_engine(model, config), PROMPTS, GREEDY)
    assert new_ids(sequences) == plain_ids
    drafted = sum(s.stats.num_draft_tokens for s in sequences)
    accepted = sum(s.stats.num_accepted_tokens for s in sequences)
    assert 0 < accepted < drafted, "a draft that is never rejected, or never accepted, proves nothing"


@pytest.mark.parametrize("verify", ["recompute", "reuse"])
def test_speculation_is_lossless_with_penalties_and_bias(model: Backend, verify: str) -> None:
    params = SamplingParams(
        max_new_tokens=60, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={5: 1.5}
    )
    expected = run(make_engine(model, PLAIN), PROMPTS, params)
    config = SpeculativeConfig(draft="both", exit_layer=5, num_draft_tokens=4, verify=verify)  # type: ignore[arg-type]
    sequences = run(make_engine(model, config), PROMPTS, params)
    assert new_ids(sequences) == new_ids(expected)
    assert new_ids(sequences) != new_ids(run(make_engine(model, PLAIN), PROMPTS, SamplingParams(max_new_tokens=60)))
    assert 0 < sequences[2].stats.num_accepted_tokens < sequences[2].stats.num_draft_tokens


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("draft", ["early-exit", "ngram", "both"])
def test_recompute_is_bit_identical_in_bfloat16(draft: str, num_draft_tokens: int) -> None:
    """Hidden states, not only ids, equal those of plain decoding at the verify shape."""
    model = tiny_model(torch.bfloat16)
    for prompt in PROMPTS:
        config = SpeculativeConfig(draft=draft, num_draft_tokens=num_draft_tokens)  # type: ignore[arg-type]
        params = SamplingParams(max_new_tokens=100)
        (expected,) = recorder.run(
            model, [prompt], PLAIN, params, max_num_seqs=1, rows_per_sequence=num_draft_tokens + 1
        )
        (got,) = recorder.run(model, [prompt], config, params, max_num_seqs=1)
        assert got.token_ids == expected.token_ids
        assert recorder.same_bits(got.states, expected.states)
    # the last prompt is one that both accepts and rejects
    assert 0 < got.stats.num_accepted_tokens < got.stats.num_draft_tokens


@pytest.mark.parametrize("draft", ["early-exit", "both"])
def test_runner_ups_are_lossless_and_save_passes(model: Backend, plain_ids: list[list[int]], draft: str) -> None:
    config = SpeculativeConfig(draft=draft, exit_layer=5, num_draft_tokens=4, num_runner_ups=5)  # type: ignore[arg-type]
    sequences = run(make_engine(model, config), PROMPTS, GREEDY)
    assert new_ids(sequences) == plain_ids
    chains = run(make_engine(model, replace(config, num_runner_ups=0)), PROMPTS, GREEDY)
    assert sum(s.stats.num_target_passes for s in sequences) < sum(s.stats.num_target_passes for s in chains)
    for sequence in sequences:
        stats = sequence.stats
        assert len(stats.num_accepted_tokens_per_pos) <= 4
        assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens < stats.num_draft_tokens


def test_a_draft_that_ends_early_by_confidence_is_lossless(model: Backend, plain_ids: list[list[int]]) -> None:
    config = SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=6, min_confidence=0.2)
    sequences = run(make_engine(model, config), PROMPTS, GREEDY)
    assert new_ids(sequences) == plain_ids
    always = run(make_engine(model, SpeculativeConfig(exit_layer=5, num_draft_tokens=6)), PROMPTS, GREEDY)
    assert sum(s.stats.num_draft_tokens for s in sequences) < sum(s.stats.num_draft_tokens for s in always)
    assert sum(s.stats.acceptance_rate for s in sequences) > sum(s.stats.acceptance_rate for s in always)


def test_sampling_is_seeded_and_ignores_companions(model: Backend) -> None:
    config = SpeculativeConfig(draft="both", exit_layer=5, num_draft_tokens=4)
    params = [SamplingParams(max_new_tokens=20, temperature=1.0, top_k=20, seed=i) for i in range(len(PROMPTS))]
    together = new_ids(run(make_engine(model, config), PROMPTS, params))
    alone = [new_ids(run(make_engine(model, config), [p], [q]))[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert together == alone
    others = [SamplingParams(max_new_tokens=20, temperature=1.0, top_k=20, seed=99)] * len(PROMPTS)
    assert new_ids(run(make_engine(model, config), PROMPTS, others)) != together
    unseeded = SamplingParams(max_new_tokens=20, temperature=1.0)
    assert (
        new_ids(run(make_engine(model, config), [PROMPTS[0]] * 2, unseeded))[0]
        != new_ids(run(make_engine(model, config), [PROMPTS[0]], unseeded))[0]
    )


@settings(max_examples=examples(1 / 3))
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from(["early-exit", "ngram", "both", "none"]),
    st.sampled_from(["recompute", "reuse"]),
)
def test_any_mix_of_requests_gives_each_its_own_answer(
    requests: list[tuple[int, int, bool]], max_num_seqs: int, draft: str, verify: str
) -> None:
    """Ragged prompts, lengths and sampling, more requests than slots: each as if it were alone."""
    model = tiny_model(num_hidden_layers=3)
    prompts = [PROMPTS[n % 5][:n] or [n] for n, _, _ in requests]
    params = [
        SamplingParams(max_new_tokens=m, logprobs=1)
        if greedy
        else SamplingParams(max_new_tokens=m, frequency_penalty=1.0)
        for _, m, greedy in requests
    ]
    config = SpeculativeConfig(draft="none") if draft == "none" else SpeculativeConfig(draft=draft, verify=verify)  # type: ignore[arg-type]
    sequences = run(make_engine(model, config, max_num_seqs=max_num_seqs), prompts, params)
    for sequence, prompt, own in zip(sequences, prompts, params, strict=True):
        assert sequence.tokens, "every request generates"
        assert new_ids([sequence]) == new_ids(run(make_engine(model, PLAIN), [prompt], own))
        assert sequence.finish_reason == "length"
        stats = sequence.stats
        assert stats.num_tokens == len(sequence.tokens) == own.max_new_tokens
        assert stats.num_tokens == 1 + stats.num_target_passes + stats.num_accepted_tokens
        assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens
        assert sequence.num_cached == len(sequence.token_ids) - 1


@pytest.mark.parametrize("draft", ["early-exit", "ngram", "none"])
def test_one_new_token(model: Backend, plain_ids: list[list[int]], draft: str) -> None:
    config = SpeculativeConfig(draft=draft)  # type: ignore[arg-type]
    sequences = run(make_engine(model, config), PROMPTS, SamplingParams(max_new_tokens=1))
    assert new_ids(sequences) == [ids[:1] for ids in plain_ids]
    assert sequences[0].stats.decode_tokens_per_second == 0


def test_the_earliest_eos_counts_also_inside_a_draft(model: Backend, plain_ids: list[list[int]]) -> None:
    ids = plain_ids[3]
    late, early = ids[12], next(token for token in ids[6:] if token != ids[12])
    expected = min(ids.index(late), ids.index(early)) + 1
    config = SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=6)
    for eos in ((late, early), (early, late)):
        sequence = run(make_engine(model, config, eos_token_ids=eos), [PROMPTS[3]], GREEDY)[0]
        assert new_ids([sequence])[0] == ids[:expected]
        assert sequence.finish_reason == "stop"
        assert sequence.stats.num_tokens == expected
    ignoring = SamplingParams(max_new_tokens=40, ignore_eos=True)
    assert new_ids(run(make_engine(model, config, eos_token_ids=[late]), [PROMPTS[3]], ignoring))[0] == ids


@pytest.mark.parametrize(
    ("is_native", "draft", "num_runner_ups"),
    [
        *(pytest.param(True, *each, marks=with_extension) for each in (("early-exit", 0), ("both", 3))),
        (False, "early-exit", 4),
        (False, "ngram", 0),
    ],
)
def test_nothing_is_drafted_after_the_end_of_the_text(
    model: Backend, tmp_path: Path, is_native: bool, draft: str, num_runner_ups: int
) -> None:
    """After an EOS or a stop token; unless it does not end the text."""
    if is_native:
        write_checkpoint(tmp_path)
        model = NativeBackend.load(open_checkpoint(tmp_path), threads=1)
    config = SpeculativeConfig(draft=draft, num_draft_tokens=6, num_runner_ups=num_runner_ups or None)  # type: ignore[arg-type]
    prompts = [[*PROMPTS[3], *PROMPTS[2]], PROMPTS[4]]

    def drafted(ends: Seq[int], **params: Any) -> tuple[list[list[int]], list[Draft]]:
        engine = make_engine(model, config, eos_token_ids=ends)
        drafts: list[Draft] = []
        propose = engine._rounds._draft

        def watched(sequences: list[Sequence]) -> list[Draft]:
            drafts.extend(found := propose(sequences))
            return found

        engine._rounds._draft = watched  # type: ignore[method-assign]
        return new_ids(run(engine, prompts, SamplingParams(max_new_tokens=24, **params))), drafts

    def num_after(drafts: list[Draft], ends: Seq[int]) -> int:
        """Tokens that follow one of these in a draft."""
        parents = [(d, d.parents or range(-1, len(d.token_ids) - 1)) for d in drafts]
        return sum(d.token_ids[parent] in ends for d, own in parents for parent in own if parent >= 0)

    _, free = drafted([])
    counts = Counter(token for d in free for token in d.token_ids[: d.num_chained - 1])
    ends = [token for token, _ in counts.most_common(4)]
    ignored, not_ended = drafted(ends, ignore_eos=True)
    assert num_after(not_ended, ends) > 0, "this proves nothing"
    plain = make_engine(model, PLAIN, eos_token_ids=[])
    assert ignored == new_ids(run(plain, prompts, SamplingParams(max_new_tokens=24)))
    for own, stops in (ends, ()), ([], tuple(ends)):
        ids, found = drafted(own, stop_token_ids=stops)
        plain = make_engine(model, PLAIN, eos_token_ids=own)
        assert ids == new_ids(run(plain, prompts, SamplingParams(max_new_tokens=24, stop_token_ids=stops)))
        assert num_after(found, ends) == 0
        assert all(d.exit_states is None or len(d.exit_states) == d.num_chained for d in found)
        assert all(len(d.buckets) == d.num_chained for d in found)


def test_every_stop_position_inside_a_draft(model: Backend, plain_ids: list[list[int]]) -> None:
    """However a draft is cut, what follows on the same engine is unharmed."""
    engine = make_engine(model, SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=6), max_num_seqs=1)
    for length in range(1, 30):
        seen: list[int] = []

        def is_stop(token: int, seen: list[int] = seen, length: int = length) -> bool:
            seen.append(token)
            return len(seen) == length

        sequence = engine.add(Request(PROMPTS[2], GREEDY, is_stop))
        while engine.has_work:
            engine.step()
        assert seen == plain_ids[2][:length]
        assert sequence.finish_reason == "stop"


def test_abort_frees_the_slot(model: Backend, plain_ids: list[list[int]]) -> None:
    engine = make_engine(model, PLAIN, max_num_seqs=1)
    running, waiting, last = (engine.add(Request(prompt, GREEDY)) for prompt in PROMPTS[:3])
    engine.step()
    engine.abort(waiting)
    engine.abort(running)
    engine.abort(running)
    while engine.has_work:
        engine.step()
    assert [s.finish_reason for s in (running, waiting, last)] == ["abort", "abort", "length"]
    assert new_ids([last])[0] == plain_ids[2]
    assert not waiting.tokens


@pytest.mark.parametrize("draft", ["none", "early-exit"])
def test_a_cached_prefix_is_used_and_changes_nothing(model: Backend, draft: str) -> None:
    config = SpeculativeConfig(draft=draft)  # type: ignore[arg-type]
    engine = make_engine(model, config, prefix_caching=True)
    first = run(engine, [PROMPTS[4]], GREEDY)[0]
    follow_up = [*first.token_ids, 7, 8, 9]
    second = run(engine, [follow_up], GREEDY)[0]
    assert second.stats.num_cached_prompt_tokens == len(first.token_ids) - 1
    assert new_ids([second]) == new_ids(run(make_engine(model, PLAIN, prefix_caching=False), [follow_up], GREEDY))
    again = run(engine, [PROMPTS[4]], GREEDY)[0]
    assert again.stats.num_cached_prompt_tokens == len(PROMPTS[4]) - 1
    assert new_ids([again]) == new_ids([first])


def test_a_growing_cache_keeps_what_it_holds(model: Backend) -> None:
    engine = make_engine(model, PLAIN)
    early = engine.add(Request(PROMPTS[1], SamplingParams(max_new_tokens=200)))
    for _ in range(5):
        engine.step()
    long_prompt = PROMPTS[4] * 12
    assert len(long_prompt) > 512, "longer than one prefill pass and than the first cache"
    late = engine.add(Request(long_prompt, GREEDY))
    while engine.has_work:
        engine.step()
    assert new_ids([early]) == new_ids(run(make_engine(model, PLAIN), [PROMPTS[1]], SamplingParams(max_new_tokens=200)))
    assert new_ids([late]) == new_ids(run(make_engine(model, PLAIN), [long_prompt], GREEDY))


def test_origins_tell_who_proposed_a_token() -> None:
    """Drafts of a model whose exit is its last layer are all accepted; every round ends with a bonus token."""
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    engine = make_engine(table_model(table, table), SpeculativeConfig(draft="early-exit", num_draft_tokens=3))
    sequence = run(engine, [[1]], SamplingParams(max_new_tokens=9))[0]
    assert [t.origin for t in sequence.tokens] == ["target", *(["early-exit"] * 3 + ["bonus"]) * 2]
    assert sequence.stats.mean_acceptance_length == 4
    assert sequence.stats.num_accepted_tokens_per_pos == [2, 2, 2]
    never = make_engine(table_model(-table, table), SpeculativeConfig(draft="early-exit", num_draft_tokens=3))
    sequence = run(never, [[1]], SamplingParams(max_new_tokens=9))[0]
    assert {t.origin for t in sequence.tokens} == {"target"}
    assert sequence.stats.mean_acceptance_length == 1


def test_logprobs_are_the_models_own(model: Backend, plain_ids: list[list[int]]) -> None:
    params = SamplingParams(max_new_tokens=40, logprobs=3)
    config = SpeculativeConfig(draft="early-exit", exit_layer=5)
    sequences = run(make_engine(model, config), PROMPTS, params)
    assert new_ids(sequences) == plain_ids
    for plain, token in zip(
        run(make_engine(model, PLAIN), PROMPTS, params)[2].tokens, sequences[2].tokens, strict=True
    ):
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 3
        assert max(token.top_logprobs.values()) == token.logprob == pytest.approx(plain.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 1, "prompt is empty"),
        ([1, 97], 1, "token id 97; the model's ids are 0 to 96"),
        ([-1], 1, "token id -1"),
        ([1] * 50, 15, r"50 tokens and max_new_tokens is 15: more than the context of 64; use max_new_tokens <= 14"),
        ([1] * 64, 1, "context of 64; shorten the prompt"),
    ],
)
def test_prompts_that_cannot_be_served(model: Backend, prompt: list[int], max_new_tokens: int, message: str) -> None:
    engine = make_engine(model, PLAIN, max_model_len=64)
    with pytest.raises(PromptError, match=message):
        engine.add(Request(prompt, SamplingParams(max_new_tokens=max_new_tokens)))
    assert not engine.has_work


def test_the_last_position_of_the_context_can_be_used(model: Backend) -> None:
    config = SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=6)
    sequence = run(make_engine(model, config, max_model_len=64), [[1] * 40], SamplingParams(max_new_tokens=24))[0]
    assert len(sequence.token_ids) == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "magic"}, "draft is 'magic'; choose one of auto, exit-branch"),
        ({"draft": "early-exit", "exit_layer": 0}, "exit_layer is 0; this model has 6 layers"),
        ({"draft": "early-exit", "exit_layer": 6}, "between 1 and 5"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"draft": "both", "num_draft_tokens": -2}, "num_draft_tokens is -2"),
        ({"min_confidence": 1.0}, "min_confidence is 1.0"),
        ({"draft": "none", "num_draft_tokens": 3}, "num_draft_tokens=3 has no effect with draft 'none'"),
        ({"draft": "ngram", "exit_layer": 3}, "exit_layer=3 has no effect with draft 'ngram'"),
        ({"verify": "twice"}, "verify is 'twice'"),
    ],
)
def test_bad_speculation_is_refused(model: Backend, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(model, SpeculativeConfig(**settings))  # type: ignore[arg-type]


def test_defaults_follow_the_checkpoints_recommendation() -> None:
    assert resolve(SpeculativeConfig(), tiny_model().config).draft == "ngram"
    recommended = tiny_model(recommended_exit_layer=2, recommended_num_draft_tokens=5).config
    resolved = resolve(SpeculativeConfig(), recommended)
    assert (resolved.draft, resolved.exit_layer, resolved.num_draft_tokens) == ("early-exit", 2, 5)
    assert resolve(SpeculativeConfig(exit_layer=3), recommended).exit_layer == 3


def test_pytorch_keeps_to_one_thread_beside_a_model_with_its_own() -> None:
    class Watched(TableBackend):
        def embed(self, token_ids: Seq[int]) -> NDArray[np.float32]:
            seen.append(torch.get_num_threads())
            return super().embed(token_ids)

        stepping = NativeBackend.stepping

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = make_engine(
            Watched(tiny_config(), *np.zeros((2, 6, 6), dtype=np.float32)), SpeculativeConfig(draft="none")
        )
        engine.add(Request([1, 2], SamplingParams(max_new_tokens=3)))
        while engine.has_work:
            engine.step()
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
