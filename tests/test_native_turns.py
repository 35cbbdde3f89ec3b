"""Threads, signals and forks around the native engine: who waits for whom, and what is left behind when it fails."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from hopskip import SamplingParams
from hopskip.backends.native import isa
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.rope import RopeConfig
from hopskip.engine import Engine, make_engine
from hopskip.errors import HopskipError, ResourceError
from hopskip.sequence import Request
from tests.test_engine import PLAIN, new_ids, run
from tests.test_native_arrays import (
    HEAD_DIM,
    INTERMEDIATE,
    D,
    ints,
    layer,
    make_cache,
    make_rows,
    matrix,
    plain_exit,
    task_arguments,
)
from tests.test_native_arrays import make_engine as small_engine
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.skipif(isa.obstacle() is not None, reason=isa.obstacle() or "")
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

NUM_LAYERS = 20_000
"""A pass through so many takes seconds on any machine."""


def shape(**changes: int) -> Any:
    sizes = {"hidden_size": D, "intermediate_size": INTERMEDIATE, "num_heads": 4, "num_kv_heads": 2}
    return isa.extension.Shape(**{**sizes, "head_dim": HEAD_DIM, "vocab_size": 50, "rms_norm_eps": 1e-5, **changes})


def deep_engine(num_layers: int = NUM_LAYERS) -> Any:
    """The same layer again and again, in one layer of the cache."""
    engine, own = isa.extension.Engine("portable", 2, shape()), layer(0)
    for _ in range(num_layers):
        engine.add_layer(own, cache_layer=0)
    engine.set_embedding_and_head(matrix(50, D, 30), matrix(50, D, 31), torch.ones(D))
    set_rope(engine, 128)
    return engine


def set_rope(engine: Any, length: int, frequency: float = 0.1) -> None:
    angles = torch.outer(torch.arange(length).float(), frequency ** torch.arange(HEAD_DIM // 2))
    engine.set_rope(angles.cos(), angles.sin())


def in_a_child(function: Callable[[], None]) -> None:
    """Run something in a process of its own, so that neither its limits nor its hanging hurt others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        child = os.fork()
    if not child:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("it hangs")
        time.sleep(0.002)
    assert done[1] == 0, "see its traceback above"


# -- threads that the system does not give -----------------------------------------------------------------------------


def status(key: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


@contextmanager
def little_memory(megabytes: int) -> Iterator[None]:
    """Where so much more address space can be had: stacks of a few threads."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(status("VmSize")) * 1024 + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def no_stack_left() -> Iterator[None]:
    """Where the C library has none left of threads that have ended, or of those that a fork has left behind."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait)]
    with suppress(RuntimeError):  # it cannot start
        while not threads[-1].start():  # type: ignore[func-returns-value]
            threads.append(threading.Thread(target=end.wait))
    threads.pop()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


@on_linux
def test_threads_that_cannot_start_leave_nothing_behind() -> None:
    """No signal blocked, no thread running."""

    def in_the_child() -> None:
        sizes, before = shape(), (status("SigBlk"), status("Threads"))
        with little_memory(256), pytest.raises(RuntimeError, match="cannot start 1000 threads: the system gave"):
            isa.extension.Engine("portable", 1000, sizes)
        assert (status("SigBlk"), status("Threads")) == before
        with little_memory(256):
            isa.extension.Engine("portable", 2, sizes)
        assert (status("SigBlk"), status("Threads")) == before

    in_a_child(in_the_child)


@on_linux
def test_threads_that_cannot_start_after_a_fork_may_start_later() -> None:
    engine, h, out = small_engine(), torch.ones(3, D), torch.zeros(3, D)
    rows, cache, before = make_rows(ints(0, 0, 0), ints(0, 1, 2)), make_cache(), status("SigBlk")
    engine.run_layers(h, out, 0, 3, rows, cache)

    def in_the_child() -> None:
        again = torch.zeros(3, D)
        with little_memory(30), no_stack_left():
            running = status("Threads")
            with pytest.raises(RuntimeError, match="cannot start 2 threads: the system gave 1"):
                engine.run_layers(h, again, 0, 3, rows, cache)
            assert (status("SigBlk"), status("Threads"), bool(again.any())) == (before, running, False)
        callers = [
            threading.Thread(target=engine.run_layers, args=(h, torch.zeros(3, D), 0, 3, rows, make_cache()))
            for _ in range(8)
        ]
        for caller in callers:
            caller.start()
        engine.run_layers(h, again, 0, 3, rows, cache)
        for caller in callers:
            caller.join()
        assert torch.equal(again, out)
        deadline = time.monotonic() + 30  # the system takes a moment to forget the callers
        while status("Threads") != "2":
            assert time.monotonic() < deadline, "more than one set of them, whoever came first"
            time.sleep(0.01)

    in_a_child(in_the_child)


def test_too_many_threads_are_the_users_to_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("cannot start 7 threads")

    write_checkpoint(tmp_path)
    monkeypatch.setattr(isa.extension, "Engine", fail)
    with pytest.raises(ResourceError, match="cannot start 7 threads") as caught:
        NativeBackend.load(open_checkpoint(tmp_path), threads=7)
    assert isinstance(caught.value, HopskipError)


# -- RoPE tables of several callers ------------------------------------------------------------------------------------


def test_a_rope_table_never_shrinks() -> None:
    engine = small_engine(rope_length=16)
    set_rope(engine, 12, frequency=0.5)
    assert engine.rope_length == 16
    set_rope(engine, 16, frequency=0.5)
    found, expected, h = torch.zeros(1, D), torch.zeros(1, D), torch.linspace(-1, 1, D)[None]
    row = make_rows(ints(0), ints(15))
    engine.run_layers(h, found, 0, 3, row, make_cache())
    small_engine(rope_length=16).run_layers(h, expected, 0, 3, row, make_cache())
    assert torch.equal(found, expected), "a table of the same length has replaced the old one"
    set_rope(engine, 17)
    assert engine.rope_length == 17


def test_a_late_table_for_a_short_cache_harms_no_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    model = NativeBackend.load(open_checkpoint(tmp_path), threads=1)
    short, long = model.new_cache(1, 64), model.new_cache(1, 512)
    asks, may_go_on = threading.Event(), threading.Event()
    tables, extend = RopeConfig.tables, NativeBackend._extend_rope

    def late(self: RopeConfig, length: int) -> Any:
        if length == short.length:
            asks.set()
            may_go_on.wait(60)
        return tables(self, length)

    def extend_before_the_other(self: NativeBackend, length: int) -> None:
        extend(self, length)
        if length == long.length:
            may_go_on.set()
            other.join(60)

    monkeypatch.setattr(RopeConfig, "tables", late)
    monkeypatch.setattr(NativeBackend, "_extend_rope", extend_before_the_other)
    other = threading.Thread(target=model.forward, args=([5], Rows([Segment(0, 0, 1)]), short))
    other.start()
    assert asks.wait(60)
    found = model.forward([5], Rows([Segment(0, 500, 1)]), long)
    assert not other.is_alive()
    assert np.isfinite(found.hidden_ND).all()


# -- signals in the middle of a pass -----------------------------------------------------------------------------------


class StopError(Exception):
    pass


@contextmanager
def alarms(handler: Callable[[int, FrameType | None], None], seconds: float = 0.1) -> Iterator[None]:
    """A signal every so often."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise StopError


def test_a_pass_ends_when_a_signal_handler_raises() -> None:
    engine, cache = deep_engine(), make_cache(layers=1, length=128)
    h, rows = torch.linspace(-1, 1, 128 * D).view(128, D).contiguous(), make_rows(ints(*[0] * 128), ints(*range(128)))
    before, after, out = (torch.zeros(128, D) for _ in range(3))
    engine.run_layers(h, before, 0, 3, rows, cache)
    with alarms(stop_at_once), pytest.raises(StopError):
        engine.run_layers(h, out, 0, NUM_LAYERS, rows, cache)
    assert not out.any(), "the pass has gone on to its end"
    engine.run_layers(h, after, 0, 3, rows, cache)
    assert torch.equal(after, before)


def test_a_draft_ends_when_a_signal_handler_raises() -> None:
    engine, cache = deep_engine(), make_cache(layers=1)
    exit = plain_exit(model_layers=torch.arange(NUM_LAYERS, dtype=torch.int32))
    tokens, counts = torch.zeros((1, 10), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    task = isa.extension.DraftTask(
        ids=ints(3), limits=ints(10), tokens=tokens, counts=counts, states=torch.zeros(1, 10, D)
    )
    with alarms(stop_at_once), pytest.raises(StopError):
        engine.draft(exit, make_rows(ints(0), ints(3)), cache, task)
    assert counts.item() < 10


def test_signals_whose_handlers_return_change_nothing() -> None:
    engine, cache, calls = deep_engine(8000), make_cache(layers=1), []
    h, rows, (expected, found) = torch.ones(3, D), make_rows(ints(0, 0, 1), ints(0, 1, 0)), torch.zeros(2, 3, D)
    engine.run_layers(h, expected, 0, 8000, rows, cache)
    with alarms(lambda number, frame: calls.append(number), 0.01):
        engine.run_layers(h, found, 0, 8000, rows, cache)
    assert calls
    assert torch.equal(found, expected)


def handle_signals_beside_waiting_threads() -> None:
    engine, cache, own = deep_engine(), make_cache(layers=1, length=128), layer(0)
    task = isa.extension.DraftTask(**task_arguments(features=None, token_states=None))
    rows = make_rows(ints(*[0] * 128), ints(*range(128)))
    h, out, exit, refused = torch.ones(128, D), torch.zeros(128, D), plain_exit(), []
    few, result, ids = torch.ones(1, D), torch.zeros(1, D), torch.zeros(1, dtype=torch.int32)
    calls: list[Callable[[], object]] = [
        lambda: set_rope(engine, 256),
        lambda: engine.add_layer(own, cache_layer=0),
        lambda: engine.set_embedding_and_head(matrix(50, D, 30), matrix(50, D, 31), torch.ones(D)),
        lambda: engine.embed(ids, result),
        lambda: engine.run_layers(few, result, 0, 1, make_rows(ints(0), ints(0)), cache),
        lambda: engine.logits(few, torch.zeros(1, 50)),
        lambda: engine.greedy(few, ids),
        lambda: engine.choose(few, ids, rules=[isa.extension.Rule()], positions=[0], paths=[[]], allowed=[None]),
        lambda: engine.draft(exit, make_rows(ints(0, 1), ints(0, 0)), cache, task),
    ]
    started = [threading.Event() for _ in calls]

    def call(index: int) -> None:
        started[index].set()
        with suppress(ValueError):
            calls[index]()

    def handle(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one in calls:
            with pytest.raises(RuntimeError, match="a signal handler cannot use the model in the middle of a pass"):
                one()
            refused.append(one)
        for thread in threads:
            thread.start()
        for event in started:
            event.wait()
        time.sleep(0.1)  # for them to come to where they wait
        raise StopError

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    with alarms(handle), pytest.raises(StopError):
        engine.run_layers(h, out, 0, NUM_LAYERS, rows, cache)
    for thread in threads:
        thread.join()
    assert not out.any()
    assert refused == calls
    assert engine.rope_length == 256


def test_who_waits_for_a_turn_lets_others_run() -> None:
    """A signal handler runs in the middle of a pass, while threads wait for its end: with the GIL they would wait for
    ever. The handler itself cannot wait, and is told so."""
    in_a_child(handle_signals_beside_waiting_threads)


def test_after_an_interrupt_in_a_prompt_the_engine_answers_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    model = NativeBackend.load(open_checkpoint(tmp_path), threads=2)
    prompt, params = [(7 * i) % 300 for i in range(700)], SamplingParams(max_new_tokens=8)
    expected = new_ids(run(make_engine(model, PLAIN), [prompt, prompt[:400]], params))
    engine, layers, num_rows = make_engine(model, PLAIN), model._compiled.run_layers, []

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def run_layers(self, *arguments: Any, **options: Any) -> None:
            layers(*arguments, **options)
            num_rows.append(len(arguments[0]))
            if len(num_rows) == 3:  # what this pass has left in the cache does not count
                raise KeyboardInterrupt

    native = model._compiled
    monkeypatch.setattr(model, "_compiled", Interrupted())
    interrupt(engine, prompt, params)
    assert max(num_rows) == model.num_prefill_rows == 128
    assert new_ids(run(engine, [prompt, prompt[:400]], params)) == expected


def interrupt(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    sequence = engine.add(Request(prompt, params))
    for _ in range(2):
        engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert sequence.num_cached == 2 * 128
    engine.abort(sequence)
    assert not engine.has_work


# -- memory ------------------------------------------------------------------------------------------------------------


def resident() -> int:
    return int(status("VmRSS")) * 1024


@on_linux
def test_threads_have_room_for_the_rows_that_they_make() -> None:
    """Inputs of many rows are made once for all threads: not 24 times 37 MB."""
    wide, threads = 2**16, 24
    engine = isa.extension.Engine("portable", threads, shape(intermediate_size=wide))
    parts = {"gate": matrix(wide, D, 0), "up": matrix(wide, D, 1), "down": matrix(D, wide, 2)}
    engine.add_layer(layer(0, **parts))
    set_rope(engine, 128)
    h, rows = torch.ones(128, D), make_rows(ints(*[0] * 128), ints(*range(128)))
    cache, out, before = make_cache(layers=1, length=128), torch.zeros(128, D), resident()
    engine.run_layers(h, out, 0, 1, rows, cache)
    assert resident() - before < 8 * 128 * wide * 4
