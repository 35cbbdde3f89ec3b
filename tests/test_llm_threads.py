"""One LLM, many threads; and the turns that they take."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.soak import soak_threads

from hopskip import LLM, ClosedError, HopskipError, PromptError
from hopskip.engine.turns import Turns
from hopskip.sequence import Request, Sequence
from tests.test_llm_options import thinking_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return thinking_llm(tmp_path_factory.mktemp("model"))


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each gives, or the error that it raises."""
    found: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            found[index] = works[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_any_number_of_threads_get_the_texts_of_single_calls(llm: LLM) -> None:
    counts = soak_threads(llm, num_threads=8, num_calls=12, num_tokens=5)
    assert set(counts) == {"generate", "chat", "stream", "left"}
    assert sum(counts.values()) == 96
    assert not llm.engine.has_work


def test_requests_of_several_threads_are_stepped_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first generates, and does not wait for its end."""
    num_running = []
    has_come = threading.Event()
    step = llm.engine.step

    def watched() -> None:
        step()
        num_running.append(len(llm.engine.running))
        if len(num_running) == 3:
            threading.Thread(target=second).start()
        if len(num_running) == 3 or (len(num_running) < 200 and 2 not in num_running):
            time.sleep(0.002)

    def second() -> None:
        llm.generate("x", max_tokens=5, ignore_eos=True)
        has_come.set()

    monkeypatch.setattr(llm.engine, "step", watched)
    llm.generate("The quick brown fox", max_tokens=300, ignore_eos=True)
    assert has_come.wait(30)
    assert 2 in num_running


def test_a_stream_and_generate_take_turns_in_one_thread(llm: LLM) -> None:
    whole = llm.generate("The quick brown", max_tokens=12)[0]
    pieces = []
    for piece in llm.stream("The quick brown", max_tokens=12):
        pieces.append(piece.text)
        assert llm.generate("x", max_tokens=2)[0].token_ids == llm.generate("x", max_tokens=2)[0].token_ids
    assert "".join(pieces) == whole.text


def test_a_bad_request_of_another_thread_harms_nobody(llm: LLM) -> None:
    right = llm.generate("abc", max_tokens=20)[0].text
    found = in_threads(
        lambda: llm.generate("abc", max_tokens=20)[0].text,
        lambda: llm.generate([10**6], max_tokens=20),
        lambda: llm.generate([[7], [5] * 10**5], max_tokens=20),
    )
    assert found[0] == right
    assert all(isinstance(error, PromptError) for error in found[1:])
    assert not llm.engine.has_work


def test_a_stream_that_is_forgotten_leaves(llm: LLM) -> None:
    stream = llm.stream("abc", max_tokens=200, ignore_eos=True)
    next(stream)
    assert llm.engine.has_work
    del stream
    gc.collect()
    assert not llm.engine.has_work


def test_close_frees_the_model_and_says_so(tmp_path: Path) -> None:
    with thinking_llm(tmp_path) as llm:
        backend = weakref.ref(llm.backend)
        stream = llm.stream("abc", max_tokens=200, ignore_eos=True)
        next(stream)
        started = threading.Event()

        def wait() -> None:
            started.set()
            llm.generate("abc", max_tokens=900, ignore_eos=True)

        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(in_threads(wait)))
        thread.start()
        started.wait()
        time.sleep(0.02)
    thread.join(30)
    assert isinstance(found[0], ClosedError | None)
    for call in (
        lambda: llm.generate("x"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: list(llm.stream("x")),
        lambda: list(stream),
        lambda: llm.encode("x"),
        lambda: llm.engine,
    ):
        with pytest.raises(ClosedError, match="has been closed; make a new one"):
            call()
    llm.close()
    assert "closed" in repr(llm)
    del call
    gc.collect()
    assert backend() is None


# -- turns, with an engine of the test's own ---------------------------------------------------------------------------


class Counting:
    """An engine that counts its steps, and would notice two threads in it."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.aborted: list[Sequence] = []
        self.on_step: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def step(self) -> None:
        assert self._lock.acquire(blocking=False)
        self.num_steps += 1
        self.on_step()
        self._lock.release()

    def abort(self, sequence: Sequence) -> None:
        assert self._lock.acquire(blocking=False)
        self.aborted.append(sequence)
        self._lock.release()


def sequence() -> Sequence:
    return Sequence(Request([1]), frozenset())


def test_who_waits_steps_until_it_has_what_it_waits_for() -> None:
    engine = Counting()
    turns = Turns(engine)
    assert turns.wait(lambda: engine.num_steps if engine.num_steps >= 3 else None) == 3
    assert turns.wait(lambda: "there") == "there"
    assert turns.do(lambda: 0) == 0
    assert engine.num_steps == 3


def test_many_wait_and_each_is_served() -> None:
    engine = Counting()
    turns = Turns(engine)
    works = [lambda most=most: turns.wait(lambda: True if engine.num_steps >= most else None) for most in range(1, 60)]
    assert in_threads(*works) == [True] * 59
    assert engine.num_steps == 59


def test_a_drop_in_the_middle_of_a_step_waits_for_its_end() -> None:
    """As where the garbage collector closes a stream in the thread that steps."""
    engine = Counting()
    turns = Turns(engine)
    dropped = sequence()
    engine.on_step = lambda: turns.drop([dropped]) if engine.num_steps == 1 else None
    turns.wait(lambda: True if engine.num_steps == 1 else None)
    assert engine.aborted == [dropped]


def test_an_error_is_raised_where_it_was_asked_for() -> None:
    engine = Counting()
    turns = Turns(engine)

    def fails() -> None:
        raise HopskipError("mine")

    found = in_threads(
        lambda: turns.do(fails), lambda: turns.wait(fails), lambda: turns.wait(lambda: engine.num_steps or None)
    )
    assert [str(error) for error in found[:2]] == ["mine", "mine"]
    assert found[2] >= 1
    assert turns.do(lambda: 5) == 5


def test_a_step_that_raises_passes_the_turn_on() -> None:
    engine = Counting()
    turns = Turns(engine)

    def interrupt() -> None:
        engine._lock.release()
        engine.on_step = lambda: None
        engine._lock.acquire()
        engine._lock.release()
        raise KeyboardInterrupt

    engine.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        turns.wait(lambda: None)
    assert turns.wait(lambda: True if engine.num_steps == 4 else None) is True


def test_an_order_that_is_interrupted_is_carried_out_by_the_next() -> None:
    engine = Counting()
    turns = Turns(engine)
    calls: list[int] = []

    def order() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return 7

    with pytest.raises(KeyboardInterrupt):
        turns.do(order)
    assert turns.do(lambda: 8) == 8
    assert len(calls) == 2


def test_closed_turns_serve_nobody() -> None:
    engine = Counting()
    turns = Turns(engine)
    engine.on_step = lambda: time.sleep(0.001)
    found = in_threads(lambda: turns.wait(lambda: None), lambda: turns.wait(lambda: None), lambda: turns.close())
    assert [type(error) for error in found[:2]] == [ClosedError, ClosedError]
    assert turns.is_closed
    with pytest.raises(ClosedError):
        turns.do(lambda: 1)
    with pytest.raises(ClosedError):
        turns.wait(lambda: None)
    turns.drop([sequence()])
    turns.close()
    assert engine.aborted == []
