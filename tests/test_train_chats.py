"""Spellings of chat data: the same chat, whoever wrote it down."""

from __future__ import annotations

from typing import Any

import pytest

from hopskip.errors import ConfigError
from hopskip.train.chats import chat_of, is_empty, tools_of

ASKED = {"role": "user", "content": "Who jumps?"}
SAID = {"role": "assistant", "content": "The fox."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"messages": [{**ASKED, "tool_calls": None, "name": None}, SAID]},  # as a table fills what a row lacks
        {"messages": [{"role": "human", "content": "Who jumps?"}, {"role": "gpt", "content": "The fox."}]},
        {"conversations": [{"from": "human", "value": "Who jumps?"}, {"from": "gpt", "value": "The fox."}]},
        {"conversations": [{"from": "User", "value": "Who jumps?"}, {"from": "MODEL", "value": "The fox."}]},
        {"conversation": [ASKED, SAID], "id": 3},
        {"messages": None, "conversations": [ASKED, SAID]},
        {"conversations": ["Who jumps?", "The fox."]},
        {"prompt": "Who jumps?", "response": "The fox."},
        {"prompt": "Who jumps?", "completion": "The fox."},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": [ASKED], "response": "The fox."},
        {"prompt": [ASKED, SAID]},
        {"instruction": "Who jumps?", "input": "", "output": "The fox."},
        {"instruction": "Who jumps?", "output": "The fox.", "text": "### Instruction: ..."},
        {"instruction": "Who jumps?", "context": "", "response": "The fox."},
        {"input": "Who jumps?", "output": "The fox."},
        {"question": "Who jumps?", "answer": "The fox."},
        {"turns": ["Who jumps?", "And then?"], "response": "The fox."},
    ],
)
def test_spellings(row: dict[str, Any]) -> None:
    assert chat_of(row) == [ASKED, SAID]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Who?", "response": ""}, True),
        ({"prompt": "", "response": "The fox."}, True),
        ({"instruction": "Who?", "output": None}, True),
        ({"turns": ["Who?"], "answer": ""}, True),
        ({"messages": []}, True),
        ({"conversations": None, "id": 3}, True),
        ({"prompt": "Who?"}, False),  # nobody was to answer here
        ({"response": ""}, False),
        ({"prompt": "Who?", "reply": "The fox."}, False),
    ],
)
def test_rows_with_nothing_in_them(row: dict[str, Any], expected: bool) -> None:
    assert chat_of(row) is None
    assert is_empty(row) is expected


def test_rows_with_nothing_in_fields_that_are_named() -> None:
    named = {"messages_field": "chat", "prompt_field": "q", "response_field": "a"}
    assert is_empty({"q": "Who?", "a": ""}, **named)
    assert is_empty({"chat": []}, **named)
    assert not is_empty({"prompt": "Who?", "response": "", "messages": []}, **named)


def test_speakers_take_turns() -> None:
    chat = chat_of({"conversations": ["a", "b", "c"]})
    assert chat is not None
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_who_the_assistant_is(field: str) -> None:
    assert chat_of({field: "Be brief.", "question": "Who jumps?", "response": "The fox."}) == [SYSTEM, ASKED, SAID]
    assert chat_of({field: "Be brief.", "messages": [ASKED, SAID]}) == [SYSTEM, ASKED, SAID]
    assert chat_of({field: "Be long.", "messages": [SYSTEM, ASKED, SAID]}) == [SYSTEM, ASKED, SAID]
    developer = {"role": "developer", "content": "x"}
    assert chat_of({field: "Be long.", "messages": [developer, ASKED]}) == [developer, ASKED]


def test_instructions_with_something_to_work_on() -> None:
    for field in ("input", "context"):
        chat = chat_of({"instruction": "Translate.", field: "Fuchs", "output": "fox"})
        assert chat == [{"role": "user", "content": "Translate.\n\nFuchs"}, {"role": "assistant", "content": "fox"}]
    assert chat_of({"question": "Who?", "context": "The fox jumps.", "answer": "It."}) == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "It."},
    ]


def test_tools_and_their_answers() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    assert chat_of({"messages": [ASKED, call]}) == [ASKED, call]
    chat = chat_of(
        {"conversations": [{"from": "function_call", "value": "add"}, {"from": "observation", "value": "5"}]}
    )
    assert chat == [{"role": "assistant", "content": "add"}, {"role": "tool", "content": "5"}]
    assert tools_of({"tools": []}) is None
    assert tools_of({}) is None


def test_named_fields_take_the_place_of_usual_ones() -> None:
    row = {"q": "Who jumps?", "a": "The fox.", "instruction": "no", "output": "no", "conversations": None}
    assert chat_of(row, prompt_field="q", response_field="a") == [ASKED, SAID]
    assert chat_of(row, prompt_field="other", response_field="a") is None
    assert chat_of(row, prompt_field="q", response_field="other") is None
    dialogue = {"dialogue": [ASKED, SAID], "conversations": ["no"]}
    assert chat_of(dialogue, messages_field="dialogue") == [ASKED, SAID]
    assert chat_of(dialogue, messages_field="other") is None


@pytest.mark.parametrize(
    "row", [{"text": "Who jumps?"}, {"prompt": "Who jumps?"}, {"response": "The fox."}, {"prompt": "", "response": "x"}]
)
def test_what_is_no_chat(row: dict[str, Any]) -> None:
    assert chat_of(row) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Who jumps?"}, "a chat is a list of objects with role and content, not 'Who jumps"),
        ({"messages": [ASKED, "The fox."]}, "but one is 'The fox.'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "but one is {'role': 3"),
        ({"messages": [{"role": "user"}]}, "but one is {'role': 'user'}"),
        ({"prompt": 3, "response": "x"}, "not 3"),
        ({"prompt": "x", "response": {"a": 1}}, "not {'a': 1}"),
    ],
)
def test_what_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat_of(row)
