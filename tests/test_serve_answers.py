"""Answers and chunks in OpenAI's shapes, from pieces written by hand; what one more piece costs."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hopskip import SamplingParams
from hopskip.sequence import Request, Score, Sequence, Token
from hopskip.serve import schema
from hopskip.serve.answers import Answer, event
from hopskip.serve.batch import Batch, Generation, Job, Piece
from hopskip.serve.engine_thread import GenerationError, UnavailableError
from hopskip.serve.jobs import Plan
from hopskip.text.answer_reader import AnswerFormat
from hopskip.text.reasoning import REASONING
from hopskip.text.tokenizer import TextStream
from hopskip.text.tools.base import Tool
from hopskip.text.tools.formats import FORMATS

USER = schema.Message(role="user", content="?")
CALLS = AnswerFormat(tool_format=FORMATS["hermes"], tools=[Tool(name="f")])
THOUGHTS = AnswerFormat(reasoning=REASONING["deepseek"])
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """Token 0 is `a`, and so on."""

    def push(self, token_id: int) -> str:
        return LETTERS[token_id]

    def flush(self) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return LETTERS[token_id].encode()

    def is_silent(self, token_id: int, **_: Any) -> bool:
        return False

    def decode_raw(self, token_ids: Seq[int], **_: Any) -> str:
        return "".join(LETTERS[i] for i in token_ids)


def llm(**speculative: Any) -> Any:
    """What answers look at: 30 layers, an exit after the third, a trained one after the fifth."""
    defaults = {"exit_layer": 3, "skip_layers": None}
    return SimpleNamespace(
        tokenizer=Letters(),
        backend=SimpleNamespace(
            config=SimpleNamespace(num_hidden_layers=30),
            trained_exit=SimpleNamespace(config=SimpleNamespace(start=5)),
        ),
        engine=SimpleNamespace(speculative=SimpleNamespace(**{**defaults, **speculative})),
    )


def batch_of(number: int, exit_layer: int | None = None, **job: Any) -> Batch:
    batch = Batch(lambda _: None)
    for _ in range(number):
        params = SamplingParams(max_new_tokens=100)
        request = Request([1, 2, 3], params, exit_layer=exit_layer)
        sequence = Sequence(request, frozenset())
        sequence.stats.num_cached_prompt_tokens = 2
        sequence.prompt_scores = [Score(-0.5, 1, {2: -0.5, 4: -2.0}), Score(-3.0, 7, {5: -1.0, 6: -1.5})]
        text = TextStream(Letters(), ())
        batch.generations.append(Generation(Job(request=request, **job), sequence, text, batch))
    return batch


def tell(generation: Generation, *steps: Seq[Piece], finish_reason: Any = "stop") -> None:
    """Give a generation's steps to whoever reads them, then its end."""
    for step in steps:
        generation.deliver(list(step))
    generation.sequence.finish_reason = finish_reason
    generation.sequence.stats.num_tokens = sum(map(len, steps))
    generation.deliver(None)


def piece(text: str, id: int = 0, origin: Any = "target", **token: Any) -> Piece:
    return Piece(Token(id, origin, **token), text)


def completion(**fields: Any) -> schema.CompletionRequest:
    return schema.CompletionRequest(prompt="?", **fields)


def chat(**fields: Any) -> schema.ChatRequest:
    return schema.ChatRequest(messages=[USER], **fields)


def make(request: schema.Generation, batch: Batch, model: Any = None, **plan: Any) -> Answer:
    made = Plan(jobs=[], **{"num_choices": len(batch.generations), **plan})
    return Answer(request, made, batch, model or llm(), "tiny", "1")


def whole(*arguments: Any, **plan: Any) -> dict[str, Any]:
    return asyncio.run(make(*arguments, **plan).whole())


def chunks(*arguments: Any, **plan: Any) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [json.loads(json.dumps(chunk)) async for chunk in make(*arguments, **plan).chunks()]

    return asyncio.run(collect())


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_a_whole_completion() -> None:
    """Two prompts with two choices each, their steps in any order."""
    batch = batch_of(4)
    for index in (2, 0, 3, 1):
        tell(batch.generations[index], [piece(f"{index}a"), piece("b")], [piece("c")], finish_reason="length")
    batch.generations[1].sequence.stats.num_draft_tokens = 5
    batch.generations[1].sequence.stats.num_accepted_tokens = 3
    answer = whole(completion(), batch, num_choices=2, echoes=["x ", "y "])
    assert answer.pop("created") > 1_700_000_000
    texts = ["x 0abc", "x 1abc", "y 2abc", "y 3abc"]
    assert answer == {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": "length"} for i, text in enumerate(texts)
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 12,
            "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 3,
                "rejected_prediction_tokens": 2,
            },
            "speedup_over_plain": None,
        },
    }


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_whole_chat(reason: str) -> None:
    batch = batch_of(1)
    tell(batch.generations[0], [piece("a")], [piece("b")], finish_reason=reason)
    answer = whole(chat(), batch)
    assert (answer["id"], answer["object"]) == ("chatcmpl-1", "chat.completion")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab", "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
    ]


def test_a_streamed_completion() -> None:
    """Echoes come first; a step that shows nothing has no chunk; figures come last."""
    batch = batch_of(2)
    first, second = batch.generations
    first.deliver([piece("a")])
    tell(second, [piece("")], [piece("b"), piece("c")])
    tell(first, [piece("d")], finish_reason="length")
    request = completion(stream=True, stream_options={"include_usage": True})
    got = chunks(request, batch, echoes=["x "])
    assert {(c["id"], c["object"], c["model"]) for c in got} == {("cmpl-1", "text_completion", "tiny")}
    assert all(c["usage"] is None for c in got[:-1])
    parts = [c["choices"][0] for c in got[:-1]]
    assert [(p["index"], p["text"], p["finish_reason"]) for p in parts] == [
        (0, "x ", None),
        (1, "x ", None),
        (0, "a", None),
        (1, "bc", None),
        (1, "", "stop"),
        (0, "d", None),
        (0, "", "length"),
    ]
    assert all(p["logprobs"] is None and "hopskip" not in p for p in parts)
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["prompt_tokens"] == 3
    assert got[-1]["usage"]["completion_tokens"] == 4


def test_an_answer_that_the_server_cuts_is_no_whole_one() -> None:
    batch = batch_of(2)
    tell(batch.generations[0], [piece("a")], finish_reason="abort")
    with pytest.raises(UnavailableError, match="shutting down and has cut this answer; try again elsewhere"):
        whole(chat(), batch)
    batch = batch_of(1)
    tell(batch.generations[0], [piece("a")], finish_reason="abort")
    cancelled = make(chat(), batch)
    cancelled.cancel()
    assert asyncio.run(cancelled.whole())["choices"][0]["finish_reason"] == "length", "who cancels knows"
    batch = batch_of(1)
    tell(batch.generations[0], [piece("a")], finish_reason="abort")
    stream = make(chat(stream=True), batch).chunks()

    async def read() -> None:
        assert [(await anext(stream))["choices"][0]["delta"].get("content") for _ in range(2)] == ["", "a"]
        with pytest.raises(UnavailableError):
            await anext(stream)

    asyncio.run(read())


def test_a_streamed_chat() -> None:
    batch = batch_of(1)
    tell(batch.generations[0], [piece("a")], [piece("b")])
    got = chunks(chat(stream=True), batch)
    assert not any("usage" in c for c in got)
    assert {c["object"] for c in got} == {"chat.completion.chunk"}
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in got] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "a"}, None),
        ({"content": "b"}, None),
        ({}, "stop"),
    ]


@pytest.mark.parametrize("before", ["", "so: "])
@pytest.mark.parametrize("num_calls", [0, 1, 2])
def test_calls(before: str, num_calls: int) -> None:
    """What looks like the beginning of a call comes with the end, if it is none."""
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    text = before + call * num_calls if num_calls else f"{before}<tool_"
    expected = [{"name": "f", "arguments": '{"a": 1}'}] * num_calls
    told = "tool_calls" if num_calls else "stop"
    for size in (3, 1000):
        steps = [[piece(text[i : i + size])] for i in range(0, len(text), size)]
        batch = batch_of(1)
        tell(batch.generations[0], *steps)
        choice = whole(chat(), batch, answer=CALLS)["choices"][0]
        shown = before.strip() if num_calls else text
        assert choice["message"]["content"] == (shown or None)
        assert [c["function"] for c in choice["message"].get("tool_calls", [])] == expected
        assert all(set(c) == {"id", "type", "function"} for c in choice["message"].get("tool_calls", []))
        assert choice["finish_reason"] == told

        batch = batch_of(1)
        tell(batch.generations[0], *steps)
        parts = [c["choices"][0] for c in chunks(chat(stream=True), batch, answer=CALLS)]
        assert "".join(p["delta"].get("content", "") for p in parts) == shown
        assert together(parts) == expected
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + [told]


def together(parts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The functions that a stream calls: its first delta of each has id and name, the others fragments."""
    functions: list[dict[str, str]] = []
    for call in [call for part in parts for call in part["delta"].get("tool_calls", [])]:
        if "id" in call:
            assert (call["index"], call["type"], set(call)) == (
                len(functions),
                "function",
                {"index", "id", "type", "function"},
            )
            functions.append({**call["function"]})
        else:
            assert (call["index"], set(call)) == (len(functions) - 1, {"index", "function"})
            assert set(call["function"]) == {"arguments"}
            functions[-1]["arguments"] += call["function"]["arguments"]
    return functions


def test_arguments_come_as_they_are_generated() -> None:
    batch = batch_of(1)
    texts = ['<tool_call>{"name": "f", ', '"arguments": {"a": ', '"x', "y", '"}}', "</tool_call>"]
    tell(batch.generations[0], *([piece(text)] for text in texts))
    parts = [c["choices"][0]["delta"] for c in chunks(chat(stream=True), batch, answer=CALLS)]
    [first, *others] = [call for part in parts for call in part.get("tool_calls", [])]
    assert first["function"] == {"name": "f", "arguments": '{"a": '}
    assert [call["function"]["arguments"] for call in others] == ['"x', "y", '"}']


def test_a_call_that_is_cut_is_a_part_of_one() -> None:
    batch = batch_of(1)
    tell(batch.generations[0], [piece('<tool_call>{"name": "f", "arguments": {"a": "x')], finish_reason="length")
    choice = whole(chat(), batch, answer=CALLS)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "x'}


def test_thoughts() -> None:
    texts = ["<think>", "hm", ", so", "</think>", "\n\n", "yes"]
    for stream in (False, True):
        batch = batch_of(1)
        tell(batch.generations[0], *([piece(text)] for text in texts))
        request = chat(stream=stream, stream_options={"include_usage": True} if stream else None)
        if not stream:
            answer = whole(request, batch, answer=THOUGHTS)
            message = answer["choices"][0]["message"]
            assert (message["reasoning_content"], message["reasoning"], message["content"]) == (
                "hm, so",
                "hm, so",
                "yes",
            )
            usage = answer["usage"]
        else:
            *got, last = chunks(request, batch, answer=THOUGHTS)
            deltas = [chunk["choices"][0]["delta"] for chunk in got]
            thoughts = [delta for delta in deltas if "reasoning" in delta]
            assert thoughts == [{"reasoning_content": text, "reasoning": text} for text in ("hm", ", so")]
            assert [delta["content"] for delta in deltas if delta.get("content")] == ["yes"]
            usage = last["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 4
    batch = batch_of(1)
    tell(batch.generations[0], [piece("yes")])
    assert "reasoning" not in whole(chat(), batch, answer=THOUGHTS)["choices"][0]["message"]


def test_a_failure_is_raised_at_once() -> None:
    batch = batch_of(2)
    batch.generations[0].deliver([piece("a")])
    batch.generations[1].deliver(GenerationError("failed"))
    with pytest.raises(GenerationError, match="failed"):
        whole(completion(), batch)  # the first one has not ended


def test_events() -> None:
    assert event({"a": "é", "b": 1}) == 'data: {"a":"é","b":1}\n\n'.encode()
    assert event("[DONE]") == b"data: [DONE]\n\n"
    others = "\x85\u2028\u2029"  # some clients take these for ends of lines
    assert event({"a": others}) == b'data: {"a":"\\u0085\\u2028\\u2029"}\n\n'


# -- tokens ------------------------------------------------------------------------------------------------------------


def scored(*texts: str) -> list[Piece]:
    """Pieces of tokens a, b, .. with log-probabilities, the next letter as the alternative."""
    return [
        piece(text, i, logprob=-float(i), top_logprobs={i: -float(i), i + 1: -float("inf")})
        for i, text in enumerate(texts)
    ]


def test_log_probabilities_of_a_completion() -> None:
    """Offsets count on from chunk to chunk, behind the echo; text that is held back moves them where it comes."""
    pieces = scored("ab", "", "cde", "f")
    for stream, expected in ((False, [[0, 2, 2, 5]]), (True, [[0, 2], [2], [5]])):
        batch = batch_of(1)
        tell(batch.generations[0], pieces[:2], pieces[2:3], pieces[3:])
        request = completion(logprobs=2, stream=stream)
        if stream:
            parts = [c["choices"][0] for c in chunks(request, batch)]
            assert parts[-1]["logprobs"] is None
            got = [p["logprobs"] for p in parts[:-1]]
        else:
            got = [whole(request, batch)["choices"][0]["logprobs"]]
        assert [g["text_offset"] for g in got] == expected
        assert [t for g in got for t in g["tokens"]] == ["a", "b", "c", "d"]
        assert [p for g in got for p in g["token_logprobs"]] == [0, -1, -2, -3]
        assert [p for g in got for p in g["top_logprobs"]][2] == {"c": -2, "d": -9999}


def echoed(number: int, batch: Batch, stream: bool) -> list[dict[str, Any]]:
    """Texts and log-probabilities of the parts of an echoed prompt and its answer."""
    request = completion(logprobs=number, echo=True, stream=stream)
    if not stream:
        return [whole(request, batch, echoes=["bcd"])["choices"][0]]
    return [c["choices"][0] for c in chunks(request, batch, echoes=["bcd"])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("number", "best"),
    [(0, [None, {"c": -0.5}, {"d": -3}, {"a": 0}]), (1, [None, {"c": -0.5}, {"f": -1, "d": -3}, {"a": 0, "b": -9999}])],
)
def test_log_probabilities_of_an_echo(stream: bool, number: int, best: list[Any]) -> None:
    """They come with the prompt, in a stream once it is read; the token itself is always among the best."""
    batch = batch_of(1)
    [token] = scored("x")
    tell(batch.generations[0], [token if number else piece("x", logprob=0.0, top_logprobs={})])
    parts = echoed(number, batch, stream)
    assert [p["text"] for p in parts] == (["bcd", "x", ""] if stream else ["bcdx"])
    told = [p["logprobs"] for p in parts if p["logprobs"] is not None]
    assert [t for g in told for t in g["tokens"]] == ["b", "c", "d", "a"]
    assert [p for g in told for p in g["token_logprobs"]] == [None, -0.5, -3, 0]
    assert [p for g in told for p in g["top_logprobs"]] == best
    assert [o for g in told for o in g["text_offset"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone(stream: bool) -> None:
    batch = batch_of(1)
    tell(batch.generations[0], finish_reason="length")
    parts = echoed(0, batch, stream)
    assert [(p["text"], p["finish_reason"]) for p in parts] == (
        [("bcd", None), ("", "length")] if stream else [("bcd", "length")]
    )
    assert parts[0]["logprobs"]["token_logprobs"] == [None, -0.5, -3]


@pytest.mark.parametrize("is_chat", [False, True])
def test_log_probabilities_of_a_prompt(is_chat: bool) -> None:
    batch = batch_of(1)
    tell(batch.generations[0], [piece("a")])
    answer = whole((chat if is_chat else completion)(prompt_logprobs=1), batch)
    assert (answer if is_chat else answer["choices"][0])["prompt_logprobs"] == [
        None,
        {"2": {"logprob": -0.5, "rank": 1, "decoded_token": "c"}},
        {"3": {"logprob": -3, "rank": 7, "decoded_token": "d"}, "5": {"logprob": -1, "rank": 1, "decoded_token": "f"}},
    ]
    batch = batch_of(1)
    tell(batch.generations[0], [piece("a")])
    answer = whole((chat if is_chat else completion)(), batch)
    assert "prompt_logprobs" not in (answer if is_chat else answer["choices"][0])


def test_usage_goes_with_every_chunk_if_asked_for() -> None:
    batch = batch_of(2)
    first, second = batch.generations
    first.deliver([piece("a"), piece("")])
    tell(second, [piece("b")])
    tell(first, [piece("c")])
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = [c["usage"] for c in chunks(chat(stream=True, stream_options=options), batch, num_choices=2)]
    assert [u["completion_tokens"] for u in got] == [0, 0, 2, 3, 3, 4, 4, 2]
    assert got[3] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    for option in options:
        batch = batch_of(1)
        tell(batch.generations[0], [piece("a")])
        first_chunk = chunks(chat(stream=True, stream_options={option: True}), batch)[0]
        assert first_chunk.get("usage") is None


def test_log_probabilities_of_a_chat() -> None:
    first = {"token": "a", "logprob": 0, "bytes": [97]}
    second = {"token": "b", "logprob": -9999, "bytes": [98]}
    expected = {"content": [{**first, "top_logprobs": [first, second]}], "refusal": None}
    batch = batch_of(1)
    tell(batch.generations[0], scored("a"))
    assert whole(chat(logprobs=True, top_logprobs=2), batch)["choices"][0]["logprobs"] == expected
    batch = batch_of(1)
    tell(batch.generations[0], [piece("c", 2, logprob=-3.0, top_logprobs={0: -1.0, 1: -2.0})])
    [told] = whole(chat(logprobs=True, top_logprobs=2), batch)["choices"][0]["logprobs"]["content"]
    assert [t["token"] for t in told["top_logprobs"]] == ["a", "b", "c"], "the token itself is always there"
    batch = batch_of(1)
    tell(batch.generations[0], [piece("c", 2, logprob=-3.0, top_logprobs={})])
    [told] = whole(chat(logprobs=True), batch)["choices"][0]["logprobs"]["content"]
    assert (told["token"], told["top_logprobs"]) == ("c", []), "unless no best ones are asked for"
    batch = batch_of(1)
    tell(batch.generations[0], scored(""))
    parts = [c["choices"][0] for c in chunks(chat(logprobs=True, stream=True), batch)]
    assert [p["logprobs"] for p in parts] == [None, expected, None], "also where no text is shown"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_with_all_about_them(stream: bool) -> None:
    batch = batch_of(1)
    tell(batch.generations[0], scored("", "b"))
    request = chat(return_tokens=True, stream=stream)
    if stream:
        parts = [c["choices"][0] for c in chunks(request, batch)]
        assert "hopskip" not in parts[0]
        assert parts[-1]["hopskip"]["tokens"] == []
        assert parts[-1]["hopskip"]["stats"]["num_tokens"] == 2
        details = parts[1]["hopskip"]
    else:
        details = whole(request, batch)["choices"][0]["hopskip"]
    assert details["stats"]["num_tokens"] == 2
    assert details["tokens"][1] == {
        "id": 1,
        "text": "b",
        "token": "b",
        "origin": "target",
        "layer": 30,
        "logprob": -1,
        "top": [{"token": "b", "logprob": -1}, {"token": "c", "logprob": -9999}],
    }
    assert [t["text"] for t in details["tokens"]] == ["", "b"]


@pytest.mark.parametrize(
    ("origin", "job", "speculative", "layer"),
    [
        ("target", {}, {}, 30),
        ("bonus", {}, {}, 30),
        ("ngram", {}, {}, None),
        ("exit-branch", {}, {}, 5),
        ("early-exit", {}, {}, 3),
        ("early-exit", {"exit_layer": 7}, {}, 7),
        ("layer-skip", {}, {"skip_layers": (1, 2, 4)}, 27),
    ],
)
def test_layers_that_a_token_took(origin: str, job: Any, speculative: Any, layer: int | None) -> None:
    batch = batch_of(1, **job)
    tell(batch.generations[0], [piece("a", origin=origin)])
    choice = whole(completion(return_tokens=True), batch, llm(**speculative))["choices"][0]
    assert choice["hopskip"]["tokens"][0]["layer"] == layer


# -- what a piece costs ------------------------------------------------------------------------------------------------


class Counted(str):
    """A text that counts how often a length was asked for, of any of them."""

    num_asked = 0

    def __len__(self) -> int:
        Counted.num_asked += 1
        return super().__len__()


def num_characters(thing: object) -> int:
    """Of all texts that an object's attributes hold, lists looked into."""
    held = [x for value in vars(thing).values() for x in (value if isinstance(value, list) else [value])]
    return sum(len(x) for x in held if isinstance(x, str))


@pytest.mark.parametrize("with_tools", [False, True])
def test_a_stream_costs_the_same_at_its_end_as_at_its_start(with_tools: bool) -> None:
    """No piece is looked at again: nobody has it any more, and no text is kept that grows."""
    number = 500
    batch = batch_of(1)
    request = completion(logprobs=1, return_tokens=True, stream=True)
    answer = make(request, batch, **({"answer": CALLS} if with_tools else {}))
    choice = answer._choices[0]
    keepers: list[object] = [answer, choice, choice._reader, *([choice._reader._calls] if with_tools else [])]
    kept = [num_characters(thing) for thing in keepers]
    alive: list[weakref.ref[Piece]] = []
    Counted.num_asked = 0

    async def read(parts: AsyncIterator[dict[str, Any]]) -> None:
        offset = 0
        for i in range(number):
            new = piece(Counted("four"), logprob=-1.0)
            alive.append(weakref.ref(new))
            batch.generations[0].deliver([new])
            del new
            part = (await anext(parts))["choices"][0]
            assert part["text"] == "four"
            assert part["logprobs"]["text_offset"] == [offset]
            offset += 4
            assert [num_characters(thing) for thing in keepers] == kept, i
            assert sum(ref() is not None for ref in alive) <= 1, i
        await cast("Any", parts).aclose()

    asyncio.run(read(answer.chunks()))
    assert Counted.num_asked <= 3 * number


class Handed(list[Any]):
    """A list that counts the items that its slices have handed out."""

    num_items = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_items += len(found) if isinstance(index, slice) else 1
        return found


def test_taking_costs_what_is_new() -> None:
    stream = TextStream(Letters(), ["never"])
    tokens, pieces = Handed(), Handed()
    stream._pieces = pieces
    for i in range(500):
        stream.push(i % 26)
        tokens.append(i)
        assert [token for token, _ in stream.take(tokens, is_finished=False)] == [i]
        assert len(stream._held) < len("never")
    assert tokens.num_items == pieces.num_items == 500
