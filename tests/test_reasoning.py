"""Thoughts, told from the answer however the text arrives."""

from __future__ import annotations

from typing import Any

import pytest

from hopskip.text.answer_reader import AnswerFormat, AnswerReader
from hopskip.text.grammar_build import build, match, read_vocabulary
from hopskip.text.reasoning import REASONING, ReasoningSplitter, reasoning_of_template
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tools.base import Marks, Tool, joined
from hopskip.text.tools.formats import FORMATS
from tests.tiny import VOCAB_SIZE, byte_level_tokenizer

THINK = REASONING["deepseek"]


def split(text: str, size: int, *, is_open: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(THINK, is_open=is_open)
    parts = [splitter.push(text[i : i + size]) for i in range(0, len(text), size)]
    parts.append(splitter.finish())
    return "".join(thoughts for thoughts, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(
    ("text", "is_open", "thoughts", "answer"),
    [
        ("<think>\nhm, so\n</think>\n\nyes\n", False, "hm, so", "yes\n"),
        (" \n<think>a</think>b", False, "a", "b"),
        ("hm\n</think>\n\nyes", True, "hm", "yes"),
        ("<think>\n\n</think>\n\nyes", False, "", "yes"),
        ("\n<think>\nhm</think>yes", True, "hm", "yes"),
        ("<thi", True, "<thi", ""),
        ("<thin ice</think> yes", True, "<thin ice", "yes"),
        ("no thoughts </think>", False, "", "no thoughts </think>"),
        ("a <think>b</think>", False, "", "a <think>b</think>"),
        (" a", False, "", " a"),
        ("<thin", False, "", "<thin"),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("<think>cut  \n", False, "cut", ""),
        ("a < b </thing> \n c</think>d</think>e", True, "a < b </thing> \n c", "d</think>e"),
        ("", True, "", ""),
        ("", False, "", ""),
    ],
)
def test_splitting(text: str, is_open: bool, thoughts: str, answer: str) -> None:
    for size in (1, 2, 3, 5, 1000):
        assert split(text, size, is_open=is_open) == (thoughts, answer), size


def test_which_marks() -> None:
    assert reasoning_of_template("... '</think>' ...") is THINK
    assert reasoning_of_template("[THINK] [/THINK]") is REASONING["mistral"]
    assert reasoning_of_template("nothing") is None
    assert reasoning_of_template("nothing", "deepseek") is THINK
    assert reasoning_of_template("</think>", "mistral") is REASONING["mistral"]
    assert reasoning_of_template("</think>", "none") is None


def tokenizer(*marks: str) -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(marks=marks), special_tokens={}, chat_template=None, eos_token_ids=[1])


@pytest.mark.parametrize("marks", [(), ("<think>", "</think>")])
@pytest.mark.parametrize(
    ("prompt", "state"),
    [("<|im_start|>", None), ("a<think>\n", True), ("<think>\n\n</think>\n\n", False), ("<think> a", None)],
)
def test_where_a_prompt_ends(marks: tuple[str, ...], prompt: str, state: bool | None) -> None:
    own = tokenizer(*marks)
    assert THINK.is_open(own, own.encode("before " * 20 + prompt)) is state


# -- with calls --------------------------------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected", "num_thought"),
    [
        (f"<think>{CALL}</think>{CALL}", (CALL, "", ["f"]), len(f"<think>{CALL}</think>") - len("<think")),
        (f"<think>{CALL}", (CALL, "", []), len(CALL) + 1),
        (f"so {CALL}", ("", "so", ["f"]), 0),
        ("plain", ("", "plain", []), 0),
    ],
)
def test_calls_in_thoughts_are_thoughts(text: str, expected: Any, num_thought: int) -> None:
    reader = AnswerReader(AnswerFormat(reasoning=THINK, tool_format=FORMATS["hermes"], tools=[Tool(name="f")]))
    whole = joined([*map(reader.push, text), reader.finish(is_cut=False)])
    assert (whole.reasoning, whole.content, [call.name for call in whole.calls]) == expected
    assert reader.has_calls == bool(expected[2])
    assert reader.num_reasoning_pieces == num_thought
    assert bool(whole)


def test_plain_answers() -> None:
    reader = AnswerReader(AnswerFormat())
    assert reader.push(" <think>").content == " <think>"
    assert not reader.finish(is_cut=True)


# -- grammars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [(), ("<think>", "</think>", "<tool_call>", "</tool_call>")])
@pytest.mark.parametrize(
    ("is_open", "good", "bad"),
    [
        (None, ["7", "<think>a{1}</think>\n\n7", "<think></think>7"], ["a</think>7", "<think>7"]),
        (True, ["a\n</think>\n\n7", "</think>7"], ["7", "<think>a"]),
        (False, ["7"], ["<think>", "</think>7"]),
    ],
)
def test_what_may_come_before_an_answer(marks: tuple[str, ...], is_open: bool | None, good: Any, bad: Any) -> None:
    own = tokenizer(*marks)
    vocabulary = read_vocabulary(own.inner.to_str(), VOCAB_SIZE, [1])
    before = THINK.grammar(Marks(own.added_ids), is_open=is_open)
    for kind, source in (("regex", "[0-9]"), ("json_schema", '{"enum": [7]}'), ("lark", 'start: "7"')):
        built = build(vocabulary, kind, source, before=before)  # type: ignore[arg-type]
        for text in good:
            matcher = built.matcher.deep_copy()
            assert all(matcher.consume_token(token) for token in own.encode(text)), text
            assert matcher.is_accepting(), text
        for text in bad:
            matcher = built.matcher.deep_copy()
            done = all(matcher.consume_token(token) for token in own.encode(text)) and matcher.is_accepting()
            assert not done, text


def test_texts_of_tokens_may_be_part_of_an_answer() -> None:
    """A grammar that leaves no choice but the text of a special token means the text."""
    own = tokenizer("<tool_call>", "[ARGS]")
    vocabulary = read_vocabulary(own.inner.to_str(), VOCAB_SIZE, [1])
    assert vocabulary.marks == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>")
    for text in ("x<|im_end|>y", "<tool_call>", "plain"):
        built = build(vocabulary, "lark", f'start: "{text}"')
        assert ("no_forcing" in built.text) == (text != "plain")
        matcher, error = match(vocabulary, built.text)
        assert not error
        written = b""
        while not matcher.is_stopped():
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            token = mask.bit_length() - 1
            if token == 1:
                break
            assert matcher.consume_token(token), matcher.get_error()
            written += own.token_bytes(token)
        assert written.decode() == text
