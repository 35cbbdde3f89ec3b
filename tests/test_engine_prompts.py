"""Prompts: what they start from, who waits for whom, and how long they may keep others waiting."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.backends.base import Backend, Pass
from hopskip.backends.rows import Array, Cache, Rows
from hopskip.backends.torch.backend import TorchBackend
from hopskip.draft.base import Draft, Drafter
from hopskip.engine import Engine, make_engine
from hopskip.engine.slots import common_prefix
from hopskip.sequence import Request, Sequence
from tests.models import tiny_model

PLAIN = SpeculativeConfig(draft="none")
FEW = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def model() -> TorchBackend:
    return tiny_model(num_hidden_layers=2)


def engine_of(model: Backend, max_num_seqs: int = 4, **options: Any) -> Engine:
    """With all of its rows there, as a server has them."""
    engine = make_engine(model, PLAIN, max_num_seqs=max_num_seqs, max_model_len=500, prefix_caching=True, **options)
    engine.reserve(2**30)
    return engine


def finish(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("somebody waits for ever")


def ask(engine: Engine, *prompts: list[int], params: SamplingParams = FEW, **request: Any) -> list[Sequence]:
    sequences = [engine.add(Request(prompt, params, **request)) for prompt in prompts]
    finish(engine)
    return sequences


def new_ids(sequence: Sequence) -> list[int]:
    return [token.id for token in sequence.tokens]


def alone(model: Backend, prompt: list[int], params: SamplingParams = FEW) -> list[int]:
    [sequence] = ask(make_engine(model, PLAIN, prefix_caching=False), prompt, params=params)
    return new_ids(sequence)


def num_cached(sequence: Sequence) -> int:
    return sequence.stats.num_cached_prompt_tokens


SYSTEM = list(range(20))


def chat(number: int, length: int = 100) -> list[int]:
    """A prompt that begins as all of them do."""
    rest = np.random.default_rng(number).integers(20, 90, length - len(SYSTEM) - 1)
    return [*SYSTEM, 20 + number, *rest.tolist()]


# -- what a prompt starts from -----------------------------------------------------------------------------------------


def test_strangers_with_the_same_system_prompt_evict_nobody(model: TorchBackend) -> None:
    engine = engine_of(model, 16)
    [first] = ask(engine, chat(0, 300))
    strangers = [ask(engine, chat(i))[0] for i in range(1, 13)]
    [second] = ask(engine, [*first.token_ids, 90, 91, 92])
    assert num_cached(second) == len(first.token_ids) - 1
    assert [num_cached(s) for s in strangers] == [len(SYSTEM)] * 12
    assert engine.prefix_stats.num_copies == 12
    assert engine.prefix_stats.num_copied_tokens == 12 * len(SYSTEM)
    assert engine.prefix_stats.num_evictions == 0
    assert new_ids(second) == alone(model, [*first.token_ids, 90, 91, 92])


def test_the_row_used_longest_ago_goes_first(model: TorchBackend) -> None:
    engine = engine_of(model, 3)
    chats = [ask(engine, chat(i))[0].token_ids for i in range(3)]
    chats[0] = ask(engine, [*chats[0], 95])[0].token_ids  # 1 is the oldest now
    ask(engine, chat(3))
    assert engine.prefix_stats.num_evictions == 1
    assert num_cached(ask(engine, [*chats[0], 96])[0]) == len(chats[0]) - 1
    assert num_cached(ask(engine, [*chats[2], 96])[0]) == len(chats[2]) - 1
    assert num_cached(ask(engine, [*chats[1], 96])[0]) == len(SYSTEM)


def test_a_branch_of_a_conversation_leaves_it_as_it_was(model: TorchBackend) -> None:
    engine = engine_of(model)
    [first] = ask(engine, chat(0, 200))
    [branch] = ask(engine, [*first.token_ids[:100], 95, 96])
    assert num_cached(branch) == 100
    assert num_cached(ask(engine, [*first.token_ids, 95])[0]) == len(first.token_ids) - 1
    assert new_ids(branch) == alone(model, [*first.token_ids[:100], 95, 96])


def test_the_last_turn_with_another_end_goes_on_in_place(model: TorchBackend) -> None:
    engine = engine_of(model, 2)
    [first] = ask(engine, chat(0, 200))
    ask(engine, chat(1))
    [again] = ask(engine, [*first.token_ids[:190], 95, 96])
    assert again.slot == first.slot
    assert (engine.prefix_stats.num_copies, engine.prefix_stats.num_evictions) == (1, 0)  # the system prompt's copy


def test_only_requests_with_the_same_salt_share(model: TorchBackend) -> None:
    engine = engine_of(model)
    found = [ask(engine, chat(0), cache_salt=salt)[0] for salt in (None, "a", "b", "a", None)]
    assert [num_cached(s) for s in found] == [0, 0, 0, 99, 99]
    engine = engine_of(model)
    sequences = [engine.add(Request(chat(0), FEW, cache_salt=salt)) for salt in ("a", "b", "a")]
    finish(engine)
    assert [num_cached(s) for s in sequences] == [0, 0, 99]


# -- prompts that come together ----------------------------------------------------------------------------------------


def test_equal_prompts_that_come_together_are_computed_once(model: TorchBackend) -> None:
    engine = engine_of(model, 8)
    params = [SamplingParams(max_new_tokens=6, temperature=1.0, seed=i) for i in range(8)]
    sequences = [engine.add(Request(chat(0, 300), p)) for p in params]
    finish(engine)
    assert sum(s.num_prompt_tokens - num_cached(s) for s in sequences) == 300 + 7
    assert [new_ids(s) for s in sequences] == [alone(model, chat(0, 300), p) for p in params]


def test_what_prompts_begin_with_is_computed_once(model: TorchBackend) -> None:
    engine = engine_of(model)
    prompts = [chat(0, 200), [*chat(0, 150), 95, 96], [*chat(0, 200), 94]]
    sequences = ask(engine, *prompts)
    assert [num_cached(s) for s in sequences] == [0, 150, 200]
    assert [new_ids(s) for s in sequences] == [alone(model, prompt) for prompt in prompts]


def test_who_waits_for_the_beginning_of_a_long_prompt_does_not_wait_for_its_end(
    model: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "num_prefill_rows", 64)
    engine = engine_of(model)
    long = engine.add(Request(chat(0, 400), FEW))
    short = engine.add(Request([*chat(0, 50), 95], FEW))
    while not short.is_prefilled:
        engine.step()
    assert num_cached(short) == 50
    assert long.num_cached <= 50 + 64


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_if_the_one_they_wait_for_leaves_another_takes_its_place(model: TorchBackend, num_steps: int) -> None:
    engine = engine_of(model)
    sequences = [engine.add(Request(chat(0, 300), FEW)) for _ in range(3)]
    for _ in range(num_steps):
        engine.step()
    engine.abort(sequences[0])
    finish(engine)
    assert {tuple(new_ids(s)) for s in sequences[1:]} == {tuple(alone(model, chat(0, 300)))}
    assert sum(s.num_prompt_tokens - num_cached(s) for s in sequences[1:]) <= 301


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_the_common_beginning(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected
    assert common_prefix([*a, *b], [*a, 9]) == len(a)


# -- what a trained exit has seen --------------------------------------------------------------------------------------


class _Recorder(Drafter):
    """Watches like a trained exit; drafts nothing."""

    taps: tuple[int, ...] | None = ()

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, int]] = []
        self.passes: list[tuple[int, int, int]] = []

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        self.passes += [(segment.slot, segment.start, segment.count) for segment in rows.segments]

    def copy(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        return [Draft() for _ in sequences]


def test_a_drafter_is_told_of_copies_and_shown_the_last_copied_token(model: TorchBackend) -> None:
    drafter = _Recorder()
    engine = Engine(model, SpeculativeConfig(draft="ngram"), drafter, max_num_seqs=4, prefix_caching=True)
    engine.reserve(2**30)
    [first] = ask(engine, chat(0))
    drafter.passes.clear()
    [second] = ask(engine, chat(1))
    assert drafter.copies == [(first.slot, second.slot, len(SYSTEM))]
    assert drafter.passes[0][:2] == (second.slot, len(SYSTEM) - 1)
    assert num_cached(second) == len(SYSTEM) - 1


# -- time --------------------------------------------------------------------------------------------------------------


class _Timed(TorchBackend):
    """A model whose rows take a second for each layer, by a clock of its own."""

    now = 0.0

    def run_layers(
        self, hidden_ND: Array, start: int, stop: int, rows: Rows, cache: Cache, taps: Seq[int] = ()
    ) -> Pass:
        _Timed.now += 1e-4 * max(8, len(rows)) * (stop - start)
        return super().run_layers(hidden_ND, start, stop, rows, cache, taps)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    model = tiny_model()
    model.__class__ = _Timed
    monkeypatch.setattr(_Timed, "now", 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: _Timed.now)
    return model


def warmed(model: TorchBackend) -> Engine:
    """An engine that has seen how long things take."""
    engine = make_engine(model, PLAIN, prefix_caching=False)
    ask(engine, [1, 2] * 40, [3, 4] * 300)
    return engine


def test_a_newcomer_waits_for_no_long_prompt(timed: TorchBackend) -> None:
    engine = warmed(timed)
    started = _Timed.now
    ask(engine, [5] * 30, params=SamplingParams(max_new_tokens=1))
    quiet = _Timed.now - started
    long = engine.add(Request([6] * 1500, FEW))
    engine.step()
    engine.step()
    short, started = engine.add(Request([5] * 30, SamplingParams(max_new_tokens=20))), _Timed.now
    while not short.is_prefilled:
        engine.step()
    assert _Timed.now - started <= 6 * quiet
    gaps = []
    while not short.is_finished:
        before = _Timed.now
        engine.step()
        gaps.append(_Timed.now - before)
    assert max(gaps) <= 6 * (8e-4 * 6), "a round, and the prompt's share"
    assert not long.is_prefilled
    finish(engine)
    assert new_ids(long) == alone(timed, [6] * 1500)
    assert new_ids(short) == alone(timed, [5] * 30, SamplingParams(max_new_tokens=20))


def test_a_long_prompt_is_read_at_full_speed_beside_nobody(timed: TorchBackend) -> None:
    engine = warmed(timed)
    started = _Timed.now
    ask(engine, [6] * 1536, params=SamplingParams(max_new_tokens=1))
    assert _Timed.now - started == pytest.approx(1536 * 6e-4), "no row twice, and no pass of a few rows"


def test_a_long_prompt_does_not_starve(timed: TorchBackend) -> None:
    """Short ones come all the time, and yet it gets its share."""
    engine = warmed(timed)
    long, started = engine.add(Request([6] * 1000, FEW)), _Timed.now
    while not long.is_prefilled:
        while engine.num_waiting + len(engine.running) < 4:
            engine.add(Request([5] * 30, SamplingParams(max_new_tokens=1)))
        engine.step()
        assert _Timed.now - started < 10 * 1000 * 6e-4


def test_a_pass_that_rests_goes_on_without_those_that_leave(timed: TorchBackend) -> None:
    engine = warmed(timed)
    kept, dropped = (engine.add(Request([token] * length, FEW)) for token, length in ((7, 60), (8, 100)))
    decoding = engine.add(Request([9] * 3, SamplingParams(max_new_tokens=300)))
    engine.step()
    while not engine._prefill._resting:
        engine.step()
    engine.abort(dropped)
    heir = engine.add(Request([10] * 120, FEW))
    finish(engine)
    assert heir.slot == dropped.slot
    for sequence, prompt in ((kept, [7] * 60), (heir, [10] * 120)):
        assert new_ids(sequence) == alone(timed, prompt)
    assert len(decoding.tokens) == 300


# -- clients -----------------------------------------------------------------------------------------------------------


def test_whose_requests_are_few_goes_first(model: TorchBackend) -> None:
    engine = engine_of(model, 4)
    many = [engine.add(Request([1, i], FEW, client="many")) for i in range(8)]
    other = engine.add(Request([2, 3], FEW, client="other"))
    engine.step()
    assert other in engine.running
    assert [s in engine.running for s in many] == [True] * 3 + [False] * 5


def test_no_client_has_more_rows_than_it_may(model: TorchBackend) -> None:
    engine = engine_of(model, 4)
    engine.max_seqs_per_client = 3
    sequences = [engine.add(Request([1, i], FEW, client="a")) for i in range(6)]
    anonymous = [engine.add(Request([2, i], FEW)) for i in range(2)]
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, sum(s in engine.running for s in sequences))
    assert most == 3
    assert all(s.finish_reason == "length" for s in [*sequences, *anonymous])
