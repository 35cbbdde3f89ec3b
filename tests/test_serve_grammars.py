"""Grammars of clients: what would crash, hang or eat the process is refused, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hopskip import LLM
from hopskip.errors import BusyError, ConfigError
from hopskip.serve.grammars import Grammars
from hopskip.serve.settings import Limits
from hopskip.text import grammar, grammar_build, grammar_worker
from hopskip.text.grammar import GrammarCompiler
from tests.serving import Live, live_server, tiny_llm

PRODUCT = "start: A\nA: /.*a.{12}.*/ & /.*b.{13}.*/ & /.*c.{14}.*/ & ~/.*d.{15}.*/"
"""Determinizing it takes longer than anybody waits, and no limit of the library ends it."""
LARGE = "(a{1000}){1000}"
"""Takes a quarter of a gigabyte."""
DUPLICATES = {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b"]}, "uniqueItems": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("model"), max_model_len=1024, max_num_seqs=4)


@pytest.fixture(scope="module")
def live(llm: LLM) -> Iterator[Live]:
    with live_server(llm, limits=Limits(grammar_seconds=1)) as server:
        yield server


def ask(live: Live, response_format: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60, "temperature": 0, **fields}
    if response_format is not None:
        body["response_format"] = response_format
    with live.client() as client:
        return client.post("/v1/chat/completions", json=body)


def message(answer: Any) -> str:
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def with_grammars(llm: LLM, work: Callable[[Grammars], Awaitable[None]], **limits: Any) -> None:
    """Do this with fresh workers, in a loop of its own."""

    async def run() -> None:
        grammars = Grammars(GrammarCompiler(llm.tokenizer, llm.backend.config.vocab_size), Limits(**limits))
        try:
            await work(grammars)
        finally:
            await grammars.close()

    asyncio.run(run())


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_a_hostile_grammar_is_refused_and_the_next_one_served(live: Live) -> None:
    assert message(ask(live, {"type": "grammar", "grammar": PRODUCT})) == (
        "the grammar takes longer than 1 s to compile; make it simpler"
    )
    assert re.fullmatch(
        "[0-9]{3}", ask(live, {"type": "regex", "pattern": "[0-9]{3}"}).json()["choices"][0]["message"]["content"]
    )


@pytest.mark.parametrize("schema", [{"const": -(2**63)}, {"enum": [1234567890123456789]}, {"const": 2**64}])
def test_numbers_that_would_lose_digits(live: Live, schema: dict[str, Any]) -> None:
    assert "would lose digits" in message(
        ask(live, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    )
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}},
    }
    assert "at tool:f#/properties/a" in message(ask(live, tools=[tool], tool_choice="required"))
    assert "would lose digits" in message(
        ask(live, {"type": "grammar", "grammar": f"start: %json {json.dumps(schema)}"})
    )


def test_what_is_dropped_is_told(live: Live) -> None:
    for given in (
        {"type": "json_schema", "json_schema": {"schema": DUPLICATES}},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": DUPLICATES}},
        {"type": "json_object", "schema": DUPLICATES},
    ):
        answer = ask(live, given)
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) is not None
        assert answer.json()["hopskip"] == {"dropped": ["uniqueItems at #"]}
        assert answer.headers["x-hopskip-dropped"] == "uniqueItems at #"
        streamed = ask(live, given, stream=True)
        assert streamed.headers["x-hopskip-dropped"] == "uniqueItems at #"
        chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert [c["hopskip"] for c in chunks if "hopskip" in c] == [{"dropped": ["uniqueItems at #"]}]
    plain = ask(live, {"type": "json_object", "schema": {"enum": ["a"]}})
    assert plain.json()["choices"][0]["message"]["content"] == '"a"'
    assert "x-hopskip-dropped" not in plain.headers
    assert "hopskip" not in plain.json()
    strict = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": DUPLICATES}}
    assert "strict, but this cannot be enforced: uniqueItems at #" in message(ask(live, strict))


def test_a_header_is_plain_text(live: Live) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"é\r\nx": {"type": "array", "uniqueItems": True, "maxItems": 2}, "b": {"not": {}}},
    }
    answer = ask(live, {"type": "json_object", "schema": schema}, max_tokens=1)
    assert answer.headers["x-hopskip-dropped"] == "uniqueItems at #/properties/\\xe9  x; not at #/properties/b"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"c": {"$ref": "#/$defs/C"}, "again": {"$ref": "#"}},
                "required": ["c"],
                "$defs": {"C": {"enum": [letter]}},
            },
        },
    }
    for name, letter in (("f", "u"), ("g", "v"))
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_definitions_of_tools(live: Live, choice: Any) -> None:
    answer = ask(
        live, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=400, temperature=1, seed=3
    ).json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["c"] == {"f": "u", "g": "v"}[call["function"]["name"]]
    assert choice == "required" or call["function"]["name"] == "g"


def test_each_tool_is_strict_for_itself(live: Live) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "strict": f, "parameters": {"type": "object", "properties": {"a": DUPLICATES}}},
        }
        for f in (False, None)
    ]
    answer = ask(live, tools=tools, tool_choice="required", max_tokens=1)
    assert answer.headers["x-hopskip-dropped"] == "uniqueItems at tool:f#/properties/a"
    tools[1]["function"]["strict"] = True  # type: ignore[index]
    assert "uniqueItems at tool:f#/properties/a" in message(ask(live, tools=tools, tool_choice="required"))


def test_choices_of_one_request_do_not_share_their_grammar(live: Live) -> None:
    answer = ask(live, {"type": "regex", "pattern": "[a-z]{3}[0-9]{3}"}, n=3, temperature=2, seed=5).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert all(re.fullmatch("[a-z]{3}[0-9]{3}", text) for text in texts)
    assert len(set(texts)) == 3


# -- the processes -----------------------------------------------------------------------------------------------------


def test_others_are_served_meanwhile(llm: LLM) -> None:
    async def work(grammars: Grammars) -> None:
        hostile = asyncio.create_task(grammars.compile("lark", PRODUCT))
        while not grammars._num_waiting:
            await asyncio.sleep(0)
        await grammars.compile("regex", "[0-9]+")
        assert not hostile.done()
        hostile.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hostile
        await grammars.compile("regex", "[a-z]+")

    with_grammars(llm, work, grammar_seconds=60)


def test_the_queue_is_bounded(llm: LLM) -> None:
    async def work(grammars: Grammars) -> None:
        waiting = [asyncio.create_task(grammars.compile("lark", PRODUCT)) for _ in range(2)]
        while grammars._num_waiting < 2:
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 grammars wait"):
            await grammars.compile("regex", "a")
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await grammars.compile("regex", "a")

    with_grammars(llm, work, grammar_seconds=60, num_grammars=2, num_grammar_workers=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory so")
def test_a_grammar_that_takes_too_much_memory(llm: LLM) -> None:
    async def work(grammars: Grammars) -> None:
        for _ in range(2):
            with pytest.raises(ConfigError, match="takes too much memory"):
                await grammars.compile("regex", LARGE)
        await grammars.compile("regex", "a")

    with_grammars(llm, work, grammar_seconds=60, grammar_bytes=2**25)


def test_a_process_that_crashes_is_replaced(llm: LLM) -> None:
    async def work(grammars: Grammars) -> None:
        await grammars.compile("regex", "a")
        [worker] = grammars._idle
        assert worker._process is not None
        crashing = asyncio.create_task(grammars.compile("lark", PRODUCT))
        while grammars._idle:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        os.kill(worker._process.pid, signal.SIGSEGV)
        with pytest.raises(ConfigError, match="compiling it fails"):
            await crashing
        [replacement] = grammars._idle
        assert replacement is not worker
        await replacement.started()
        pid = replacement._process.pid if replacement._process else None
        # the same one is refused at once, and costs no process
        with pytest.raises(ConfigError, match="compiling it fails"):
            await grammars.compile("lark", PRODUCT)
        [again] = grammars._idle
        assert again._process is not None
        assert again._process.pid == pid

    with_grammars(llm, work, grammar_seconds=60)


def test_the_processes_end_with_the_server(llm: LLM) -> None:
    pids: list[int] = []

    async def work(grammars: Grammars) -> None:
        await grammars.compile("regex", "a")
        pids.extend(worker._process.pid for worker in grammars._idle if worker._process)

    with_grammars(llm, work)
    [pid] = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_cannot_start(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(grammars: Grammars) -> None:
        with pytest.raises(ConfigError, match="does not start"):
            await grammars.compile("regex", "a")

    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with_grammars(llm, work)


def test_the_process_has_no_secrets_and_no_weights(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(grammars: Grammars) -> None:
        await grammars.compile("regex", "a")
        [worker] = grammars._idle
        assert worker._process is not None
        environment = Path(f"/proc/{worker._process.pid}/environ")
        if environment.exists():
            assert "HOPSKIP_API_KEY" not in environment.read_text()

    monkeypatch.setenv("HOPSKIP_API_KEY", "secret-secret")
    with_grammars(llm, work)
    code = (
        "import sys, hopskip.text.grammar_worker; "
        "print([m for m in sys.modules if m in ('torch', 'numpy', 'fastapi', 'tokenizers') or 'native' in m])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"


def test_a_server_ends_in_time_while_a_grammar_is_compiled(llm: LLM) -> None:
    with live_server(llm, limits=Limits(grammar_seconds=300)) as live:
        asking = threading.Thread(target=lambda: _quietly(lambda: ask(live, {"type": "grammar", "grammar": PRODUCT})))
        asking.start()
        while not live.server.planner._grammars._num_waiting:
            time.sleep(0.01)
        started = time.monotonic()
        live.stop()
        live.thread.join(20)
        assert not live.thread.is_alive()
        assert time.monotonic() - started < 15
    asking.join()


def _quietly(work: Callable[[], Any]) -> None:
    with suppress(Exception):
        work()


# -- what a process does -----------------------------------------------------------------------------------------------


def test_the_walk_finds_slow_masks(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    compiler = GrammarCompiler(llm.tokenizer, llm.backend.config.vocab_size)
    vocabulary = grammar_build.read_vocabulary(**compiler.vocabulary_source())
    job = {"kind": "regex", "text": "[a-z]{20}", "strict": False, "before": ""}
    answer = grammar_worker._try(vocabulary, job)
    assert answer["dropped"] == []
    assert compiler.adopt(answer["grammar"], ["x"], keep=True).dropped == ("x",)
    monkeypatch.setattr(grammar_worker, "SLOWEST_MASK", -1)
    with pytest.raises(ConfigError, match="too complex: finding the tokens that may come next takes"):
        grammar_worker._try(vocabulary, job)


class Steps:
    """A matcher that allows one token after the other, and counts."""

    def __init__(self, allowed: list[int]) -> None:
        self.allowed = allowed
        self.taken: list[int] = []

    def deep_copy(self) -> Steps:
        self.taken.append(-1)
        return self

    def compute_bitmask(self) -> bytes:
        left = self.taken[::-1].index(-1)
        return (1 << self.allowed[left]).to_bytes(8, "little") if left < len(self.allowed) else bytes(8)

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return False

    def consume_token(self, token: int) -> None:
        self.taken.append(token)


def test_the_walk_takes_tokens_that_are_allowed() -> None:
    steps = Steps([5, 0, 63])
    assert grammar_worker._walk(steps) < 0.1
    assert steps.taken == [-1, 5, 0, 63] * 4


def test_a_mask_that_takes_too_long_ends_its_own_text(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial follows a few texts only; what it has not met is stopped where it is met."""
    compiler = GrammarCompiler(llm.tokenizer, llm.backend.config.vocab_size)
    built = compiler.compile("regex", "[0-9]+")
    text = grammar_build.build(compiler._vocabulary(), "regex", "[0-9]+").text
    adopted = compiler.adopt(text, [], keep=False)
    slow_clock = iter(range(100))
    monkeypatch.setattr(grammar, "time", SimpleNamespace(thread_time=lambda: 0.06 * next(slow_clock)))
    adopted.masks([])
    monkeypatch.setattr(grammar, "time", SimpleNamespace(thread_time=lambda: 0.11 * next(slow_clock)))
    for constraint in (adopted, adopted.copy()):
        with pytest.raises(ConfigError, match=r"too complex: finding the tokens that may come next takes over 0\.1 s"):
            constraint.masks([])
    built.masks([])  # one's own may take its time
