"""The text that an exit is trained on: chats of files, their tokens, answers of servers, states by whole passes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
import torch

from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.engine import Engine
from hopskip.errors import ConfigError, PromptError, TrainingError
from hopskip.loading import BackendName, LoadConfig, load_backend
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.exit.answers import OwnAnswers
from hopskip.train.exit.conversations import joined
from hopskip.train.exit.prompts import read_chats, read_prompts, write_prompts
from hopskip.train.exit.recipe import CollectRecipe, PromptsRecipe, ServerRecipe
from hopskip.train.exit.server import ask_server
from hopskip.train.exit.states import TeacherForced
from hopskip.train.exit.turns import Chat, Turns
from tests.tiny import byte_fallback_tokenizer, write_checkpoint, write_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint.path, checkpoint.config)


def said(*messages: str) -> tuple[dict[str, str], ...]:
    """`system: ..`, `user: ..`, .."""
    return tuple(dict(zip(("role", "content"), message.split(": ", 1), strict=True)) for message in messages)


CHAT = Chat(said("system: Be kind.", "user: Hello?", "assistant: Hi!", "user: And now?", "assistant: Well."))


# -- files ------------------------------------------------------------------------------------------------------------


def test_chats_of_files(tmp_path: Path) -> None:
    """In every spelling; without repetitions and what is excluded."""
    rows = [
        {"prompt": "first"},
        {"turns": ["second", "and then?"], "system": "Be kind."},
        {"messages": said("system: x", "user: third", "assistant: yes", "user: why?")},
        {"conversations": [{"from": "human", "value": "fourth"}, {"from": "gpt", "value": "no"}]},
        {"instruction": "fifth", "input": "4", "output": "5"},
        {"question": "sixth"},
        {"prompt": " first "},
        {"prompt": "excluded"},
        {"messages": said("user: a", "assistant: b", "user: excluded ")},
        {"messages": said("system: nobody asks")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "not.jsonl").write_text(json.dumps({"turns": ["other", "excluded"]}) + "\n")
    settings = PromptsRecipe(files=(str(tmp_path / "rows.jsonl"),), exclude=(str(tmp_path / "not.jsonl"),))
    found = read_chats(settings)
    assert [chat.messages for chat in found] == [
        said("user: first"),
        said("system: Be kind.", "user: second", "user: and then?"),
        said("system: x", "user: third", "assistant: yes", "user: why?"),
        said("user: fourth", "assistant: no"),
        said("user: fifth\n\n4", "assistant: 5"),
        said("user: sixth"),
    ]
    some = read_chats(replace(settings, max_prompts=2))
    assert len(some) == 2
    assert some == read_chats(replace(settings, max_prompts=2))
    seeds = {tuple(chat.asked for chat in read_chats(replace(settings, max_prompts=2, seed=i))) for i in range(30)}
    assert {asked for some in seeds for asked in some} == {chat.asked for chat in found}, "each has a chance"
    assert [chat.asked for chat in read_chats(replace(settings, where={"question": "sixth"}))] == [("sixth",)]
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"text": "x", "title": "y"}) + "\n")
    with pytest.raises(ConfigError, match=r"no chat and no prompt, but text, title; name its fields"):
        read_chats(replace(settings, files=(str(tmp_path / "wrong.jsonl"),)))
    named = PromptsRecipe(files=(str(tmp_path / "wrong.jsonl"),), prompt_field="title", response_field="text")
    assert read_chats(named)[0].messages == said("user: y", "assistant: x")


def test_hub_data_sets_by_split_and_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*names: Any, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((*names, split, streaming))
        return [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_chats(PromptsRecipe(files=("owner/set",), split="train_sft", subset="en"))
    read_chats(PromptsRecipe(files=("owner/set",)))
    assert asked == [("owner/set", "en", "train_sft", True), ("owner/set", None, "train", True)]


def test_prompts_are_written_once_and_read_as_they_were(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def engine() -> Engine:
        raise AssertionError("it is not needed")

    tools = ({"type": "function", "function": {"name": "f"}},)
    chats = [CHAT, Chat(said("user: b"), tools), *(Chat(said(f"user: {i}")) for i in range(20))]
    settings = PromptsRecipe(files=("x",), max_prompt_tokens=77)
    told: list[str] = []
    path = tmp_path / "prompts.jsonl"
    write_prompts(settings, chats, tokenizer, engine, path, lambda chat: chat.asked != ("3",), told.append)
    found = read_prompts(path)
    assert sorted(map(repr, found)) == sorted(repr(chat) for chat in chats if chat.asked != ("3",))
    assert found != [chat for chat in chats if chat.asked != ("3",)], "in a random order"
    assert told == ["1 of 22 chats are left out: too long, without an answer, or refused by the chat template"]
    with pytest.raises(ConfigError, match=r"none of 22 chats can be used: .* 77 tokens"):
        write_prompts(settings, chats, tokenizer, engine, path, lambda chat: False, told.append)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ()}, "neither files nor self_written"),
        ({"max_prompts": 0}, r"prompts\.max_prompts is 0; it must be at least 1"),
        ({"max_prompt_tokens": 0}, r"prompts\.max_prompt_tokens is 0"),
        ({"files": (), "self_written": 5, "max_prompts": 5}, "choose among files"),
        ({"files": (), "self_written": 5, "subset": "x"}, "choose among files"),
        ({"files": (), "self_written": 5, "where": {"a": 1}}, "choose among files"),
    ],
)
def test_impossible_prompts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptsRecipe(**{"files": ("x",), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "them"}, r"collect\.answers is 'them'; choose one of model, given, server"),
        ({"states": "no"}, r"collect\.states is 'no'; choose one of stored, on-the-fly"),
        ({"answers": "server"}, "belong together"),
        ({"server": ServerRecipe(url="http://x")}, "belong together"),
        ({"max_new_tokens": 0}, r"collect\.max_new_tokens is 0; it must be at least 1"),
        ({"max_num_seqs": 0}, r"collect\.max_num_seqs is 0"),
    ],
)
def test_impossible_collections(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CollectRecipe(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "localhost:1"}, r"collect\.server\.url is 'localhost:1'; give one such as http"),
        ({"concurrency": 0}, r"collect\.server\.concurrency is 0; it must be at least 1"),
        ({"max_retries": -1}, r"collect\.server\.max_retries is -1; it must be at least 0"),
        ({"timeout": 0}, r"collect\.server\.timeout is 0; it must be above 0"),
    ],
)
def test_impossible_servers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerRecipe(**{"url": "http://x", **change})


# -- chats as tokens --------------------------------------------------------------------------------------------------


def turns_of(tokenizer: Tokenizer, max_prompt_tokens: int = 1000, max_new_tokens: int = 100) -> Turns:
    return Turns(tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)


def test_every_answer_has_its_history(tokenizer: Tokenizer) -> None:
    first, second = turns_of(tokenizer).given(CHAT)
    for turn, history, answer in (first, CHAT.messages[:2], "Hi!"), (second, CHAT.messages[:4], "Well."):
        assert turn.prompt == tokenizer.apply_chat_template(history)
        ids = turn.ids_T[turn.is_answer_T].tolist()
        assert ids == [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_ids[-1]]
        assert tokenizer.decode(ids) == answer
    (both,) = joined([first, second])
    assert both.num_answer_tokens == first.num_answer_tokens + second.num_answer_tokens


def test_answers_that_are_cut_off_have_no_end(tokenizer: Tokenizer) -> None:
    whole = turns_of(tokenizer).given(CHAT)
    open_ended = turns_of(tokenizer).given(replace(CHAT, unfinished=(4,)))
    assert whole[0].ids_T.tolist() == open_ended[0].ids_T.tolist()
    assert whole[1].ids_T.tolist()[:-1] == open_ended[1].ids_T.tolist()
    short = turns_of(tokenizer, max_new_tokens=2).given(CHAT)
    assert [turn.num_answer_tokens for turn in short] == [2, 2]


def test_a_chat_ends_where_its_history_is_too_long(tokenizer: Tokenizer) -> None:
    size = len(tokenizer.apply_chat_template(CHAT.messages[:4]))
    assert len(turns_of(tokenizer, size).given(CHAT)) == 2
    assert len(turns_of(tokenizer, size - 1).given(CHAT)) == 1
    assert turns_of(tokenizer, 3).given(CHAT) == []
    assert turns_of(tokenizer, 3).dialogue(CHAT)([]) is None
    answers = [tokenizer.encode("Hi!")]
    assert turns_of(tokenizer, size).dialogue(CHAT)(answers) == tokenizer.apply_chat_template(CHAT.messages[:4])
    assert turns_of(tokenizer, size - 1).dialogue(CHAT)(answers) is None


def test_a_dialogue_goes_on_with_the_models_own_answers(tokenizer: Tokenizer) -> None:
    next_prompt = turns_of(tokenizer).dialogue(CHAT)
    assert next_prompt([]) == tokenizer.apply_chat_template(CHAT.messages[:2])
    own = [*tokenizer.encode("Oh."), tokenizer.eos_token_ids[-1]]
    expected = [*CHAT.messages[:2], {"role": "assistant", "content": "Oh."}, CHAT.messages[3]]
    assert next_prompt([own]) == tokenizer.apply_chat_template(expected)
    assert next_prompt([own, own]) is None
    with_tool = Chat(said("user: a", "assistant: b", "tool: c", "user: d"))
    assert [question[-1]["content"] for question in with_tool.questions] == ["a"], (
        "what a tool said answers another call"
    )
    opened = Chat(said("assistant: Welcome.", "user: a", "user: b", "system: c"))
    assert opened.questions == [said("user: a"), said("user: b")]
    assert turns_of(tokenizer).given(Chat(said("assistant: Welcome.", "user: a"))) == []


def test_a_template_may_write_answers_otherwise_than_it_opens_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As of models that think: the prompt opens a thought, what is written down leaves it out."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if tools %}[{{ tools | length }}]{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant <think>{% endif %}"
    )
    write_tokenizer(tmp_path, chat_template=template)
    tokenizer = load_tokenizer(tmp_path, checkpoint.config)
    first, second = turns_of(tokenizer).given(CHAT)
    assert tokenizer.decode(first.ids_T[first.is_answer_T].tolist()) == "Hi!"
    assert int(first.ids_T[-1]) in tokenizer.eos_token_ids
    assert len(joined([first, second])) == 2
    with_tools = replace(CHAT, tools=({}, {}))
    assert turns_of(tokenizer).given(with_tools)[0].prompt == tokenizer.apply_chat_template(
        CHAT.messages[:2], tools=[{}, {}]
    )
    prompt = turns_of(tokenizer).dialogue(with_tools)([])
    assert prompt is not None
    assert "[2]" in tokenizer.decode(prompt)


def test_a_chat_ends_where_its_template_refuses_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As those that want user and assistant to take turns."""
    template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    write_tokenizer(tmp_path, chat_template=template)
    turns = turns_of(load_tokenizer(tmp_path, checkpoint.config))
    later = Chat(said("user: a", "assistant: b", "user: c", "user: d", "assistant: e"))
    assert len(turns.given(later)) == 1
    assert turns.dialogue(Chat(said("user: a", "system: b", "user: c")))([[5]]) is None
    for refused in (turns.given, lambda chat: turns.dialogue(chat)([])):
        with pytest.raises(PromptError, match="roles must alternate"):
            refused(Chat(said("system: a", "user: b", "assistant: c")))


def test_without_a_template_the_first_question_is_the_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_fallback_tokenizer(), chat_template=None, eos_token="</s>", bos_token="<s>")
    tokenizer = load_tokenizer(tmp_path, checkpoint.config)
    assert not tokenizer.has_chat_template
    (turn,) = turns_of(tokenizer).given(Chat(said("user: hello", "assistant: hell", "user: a", "assistant: b")))
    assert turn.prompt == tokenizer.encode("hello")
    assert turn.ids_T[turn.is_answer_T].tolist() == [tokenizer.inner.token_to_id("hell"), 2]
    next_prompt = turns_of(tokenizer).dialogue(Chat(said("user: hello", "user: a")))
    assert next_prompt([]) == tokenizer.encode("hello")
    assert next_prompt([[5]]) is None


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("num_rows", [7, 512])
def test_states_of_whole_passes_are_those_of_decoding(
    checkpoint: Checkpoint, tokenizer: Tokenizer, backend: BackendName, num_rows: int
) -> None:
    """Two turns of many chats, of which the second has the first one's states too."""
    model = load_backend(checkpoint, LoadConfig(backend=backend, dtype="float32", device="cpu", threads=1))
    model.num_prefill_rows = num_rows
    own = OwnAnswers(
        model, [1, 3], max_new_tokens=9, max_length=300, eos_token_ids=tokenizer.eos_token_ids, max_num_seqs=3
    )
    chats = [Chat(said(f"user: {'so ' * i}", "user: and then?")) for i in range(34)]
    ended: list[int] = []
    found = own([turns_of(tokenizer).dialogue(chat) for chat in chats], ended.append)
    assert ended == list(range(1, 35))
    assert {len(each) for each in found} == {2}
    conversations = [conversation for each in found for conversation in joined(each)]
    again = TeacherForced(model, [1, 3])([replace(c, states_TAD=None) for c in conversations])
    assert len(again) == len(conversations)
    for before, after in zip(conversations, again, strict=True):
        assert before.states_TAD is not None
        assert after.states_TAD is not None
        assert after.states_TAD.shape == (len(before.ids_T) - 1, 2, 64)
        if backend == "native":
            assert torch.equal(before.states_TAD, after.states_TAD), "rows have the same bits in any pass"
        torch.testing.assert_close(before.states_TAD, after.states_TAD, rtol=0.02, atol=0.02)


def test_answers_without_taps_have_no_states(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    model = load_backend(checkpoint, LoadConfig(dtype="float32", device="cpu", threads=1))
    own = OwnAnswers(model, [], max_new_tokens=9, max_length=300, eos_token_ids=tokenizer.eos_token_ids)
    ((turn,),) = own([turns_of(tokenizer).dialogue(Chat(said("user: a")))])
    assert turn.states_TAD is None
    assert own([turns_of(tokenizer, 2).dialogue(Chat(said("user: a")))]) == [[]]


# -- servers ----------------------------------------------------------------------------------------------------------


class Stub:
    """A server that answers each question with itself, in capitals.

    Args:
        statuses: of the first requests, before it begins to answer.
    """

    def __init__(self, statuses: Sequence[int] = ()) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.statuses = list(statuses)
        self.refuses = ""
        """Chats with this in the last message."""
        self.ends_after = 10**9
        """Requests, after which it fails."""
        self.most_at_once = self._at_once = 0
        self._lock = Lock()

    def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "first"}, {"id": "second"}]}
        assert path == "/v1/chat/completions"
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            number = len(self.bodies)
            status = self.statuses.pop(0) if self.statuses else 200
        if number > self.ends_after:
            return 503, {"error": {"message": "gone"}}
        if status != 200:
            return status, {"error": {"message": f"not now\nplease {status}"}}
        asked = body["messages"][-1]["content"]
        if self.refuses and self.refuses in asked:
            return 400, {"error": "too long"}
        message: dict[str, Any] = {"role": "assistant", "content": asked.upper(), "reasoning_content": None}
        if "think" in asked:
            message["reasoning_content"] = "Hm."
        if "tool" in asked:
            message |= {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        reason = "length" if "long" in asked else "stop"
        return 200, {"choices": [{"message": message, "finish_reason": reason}]}


@contextmanager
def serving(stub: Stub) -> Iterator[ServerRecipe]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            with stub._lock:
                stub._at_once += 1
                stub.most_at_once = max(stub.most_at_once, stub._at_once)
            size = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(size)) if size else {}
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = stub.answer(self.path, body, headers)
            content = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            with stub._lock:
                stub._at_once -= 1
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            if status == 429:
                self.send_header("retry-after", "7")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield ServerRecipe(url=f"http://127.0.0.1:{httpd.server_port}/v1", concurrency=4, max_retries=2)
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Instead of waiting."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("hopskip.train.exit.server.asyncio.sleep", sleep)
    return found


QUESTIONS = [Chat(said("system: s", f"user: question {i}", "assistant: old", f"user: again {i}")) for i in range(10)]


def test_a_server_answers_turn_after_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    shares: list[float] = []
    with serving(stub := Stub()) as recipe:
        settings = replace(recipe, api_key_env="MY_KEY")
        found = ask_server(settings, QUESTIONS, tmp_path / "a.jsonl", max_new_tokens=33, doing=shares.append)
    assert [chat.messages for chat in found] == [
        said(
            "system: s", f"user: question {i}", f"assistant: QUESTION {i}", f"user: again {i}", f"assistant: AGAIN {i}"
        )
        for i in range(10)
    ]
    assert len(stub.bodies) == 20
    assert {(b["model"], b["max_tokens"], b["temperature"], "tools" in b) for b in stub.bodies} == {
        ("first", 33, 0, False)
    }
    assert {headers["authorization"] for headers in stub.headers} == {"Bearer secret"}
    assert shares == [i / 10 for i in range(1, 11)]
    assert stub.most_at_once <= 4


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with serving(Stub()) as recipe:
        expected = ask_server(recipe, QUESTIONS, path, max_new_tokens=9)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    with serving(stub := Stub()) as recipe:
        assert ask_server(replace(recipe, model="second"), QUESTIONS, path, max_new_tokens=9) == expected
    assert len(stub.bodies) == 8
    assert {body["model"] for body in stub.bodies} == {"second"}
    with serving(stub := Stub()) as recipe:
        assert ask_server(recipe, QUESTIONS, path, max_new_tokens=9) == expected
    assert not stub.bodies


def test_thoughts_calls_and_answers_that_were_cut(tmp_path: Path) -> None:
    tools = ({"type": "function"},)
    chats = [Chat(said("user: think", "user: long")), Chat(said("user: a tool", "user: more"), tools)]
    with serving(stub := Stub()) as recipe:
        first, second = ask_server(recipe, chats, tmp_path / "a.jsonl", max_new_tokens=9)
    assert first.messages[1] == {"role": "assistant", "content": "THINK", "reasoning_content": "Hm."}
    assert first.unfinished == (3,)
    assert second.messages[1:] == (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    )
    assert second.tools == tools
    assert [body.get("tools") for body in stub.bodies if body["messages"][0]["content"] == "a tool"] == [list(tools)]


def test_what_may_pass_is_tried_again(tmp_path: Path, pauses: list[float]) -> None:
    with serving(stub := Stub([503, 429])) as recipe:
        (found,) = ask_server(recipe, [Chat(said("user: a"))], tmp_path / "a.jsonl", max_new_tokens=9)
    assert found.messages[-1]["content"] == "A"
    assert len(stub.bodies) == 3
    assert pauses == [1, 7]
    with (
        serving(stub := Stub([500, 500, 500])) as recipe,
        pytest.raises(TrainingError, match=r"does not answer \(500: not now please 500\), tried 3 times; .*go on"),
    ):
        ask_server(recipe, [Chat(said("user: a"))], tmp_path / "b.jsonl", max_new_tokens=9)
    with pytest.raises(TrainingError, match=r"does not answer \(ConnectError"):
        ask_server(recipe, [Chat(said("user: a"))], tmp_path / "b.jsonl", max_new_tokens=9)


def test_a_server_that_goes_away_has_answered_what_it_has(tmp_path: Path, pauses: list[float]) -> None:
    path = tmp_path / "a.jsonl"
    stub = Stub()
    stub.ends_after = 12
    with serving(stub) as recipe, pytest.raises(TrainingError, match="gone"):
        ask_server(recipe, QUESTIONS, path, max_new_tokens=9)
    assert 0 < len(path.read_text().splitlines()) < 10
    with serving(Stub()) as recipe:
        assert len(ask_server(recipe, QUESTIONS, path, max_new_tokens=9)) == 10


def test_chats_that_it_refuses_are_left_out(tmp_path: Path) -> None:
    stub, told = Stub(), list[str]()
    stub.refuses = "again 3"
    with serving(stub) as recipe:
        found = ask_server(recipe, QUESTIONS, tmp_path / "a.jsonl", max_new_tokens=9, report=told.append)
        assert [chat.messages[1]["content"] for chat in found] == [f"question {i}" for i in range(10) if i != 3]
        assert told == [f"{recipe.url} refused 1 of 10 chats, the first with: 400: too long"]
        stub.refuses = "question"
        with pytest.raises(ConfigError, match="refused every chat, the first with: 400: too long"):
            ask_server(recipe, QUESTIONS, tmp_path / "b.jsonl", max_new_tokens=9)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_ends_at_once(tmp_path: Path, status: int) -> None:
    with (
        serving(stub := Stub([status])) as recipe,
        pytest.raises(ConfigError, match=rf"says {status}: not now please {status}; check collect\.server"),
    ):
        ask_server(replace(recipe, concurrency=1), QUESTIONS, tmp_path / "a.jsonl", max_new_tokens=9)
    assert len(stub.bodies) == 1


def test_what_is_no_such_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    for answer, message in (
        (b"<html>", "does not answer with JSON"),
        ({"data": []}, "lists no model; name one"),
    ):
        monkeypatch.setattr(stub, "answer", lambda *_, answer=answer: (200, answer))
        with serving(stub) as recipe, pytest.raises(ConfigError, match=message):
            ask_server(recipe, QUESTIONS, tmp_path / "a.jsonl", max_new_tokens=9)
    monkeypatch.setattr(stub, "answer", lambda *_: (200, {"choices": []}))
    with serving(stub) as recipe, pytest.raises(TrainingError, match=r"answers with .*, which is no completion"):
        ask_server(replace(recipe, model="x"), QUESTIONS, tmp_path / "a.jsonl", max_new_tokens=9)


def test_our_own_server_answers_as_the_engine_does(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from tests.serving import live_server, tiny_llm

    llm = tiny_llm(tmp_path / "model")
    turns = turns_of(llm.tokenizer, max_new_tokens=8)
    chats = [Chat(said("system: Be kind.", f"user: {i}", "user: and then?")) for i in range(5)]
    own = OwnAnswers(
        llm.engine.backend, [], max_new_tokens=8, max_length=300, eos_token_ids=llm.tokenizer.eos_token_ids
    )
    expected = own([turns.dialogue(chat) for chat in chats])
    with live_server(llm) as live:
        recipe = ServerRecipe(url=f"{live.url}/v1", concurrency=3, max_retries=0)
        found = ask_server(recipe, chats, tmp_path / "answers.jsonl", max_new_tokens=8)
    for chat, own_turns in zip(found, expected, strict=True):
        texts = [llm.tokenizer.decode(turn.ids_T[turn.is_answer_T].tolist()) for turn in own_turns]
        assert [m.get("content", "") for m in chat.messages if m["role"] == "assistant"] == texts[: len(own_turns)]
