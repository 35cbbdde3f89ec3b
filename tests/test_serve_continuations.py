"""Texts that go on where the prompt ends, on a vocabulary that writes spaces into its words; and their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hopskip import LLM, SpeculativeConfig
from tests.serving import live_server
from tests.tiny import byte_fallback_tokenizer, write_checkpoint, write_tokenizer

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "smollm2")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    write_tokenizer(folder, byte_fallback_tokenizer(), **tokens)
    return LLM(folder, speculative=SpeculativeConfig(draft="none"), backend="native", max_num_seqs=2)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[httpx.Client]:
    with live_server(llm) as live, live.client() as client:
        yield client


def ask(client: httpx.Client, path: str = "completions", **body: Any) -> Any:
    answer = client.post(f"/v1/{path}", json={"max_tokens": 12, "temperature": 1, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def as_text(tokens: list[str]) -> str:
    """What tokens join to, those that are parts of a character put together."""

    def decoded(found: re.Match[str]) -> str:
        return bytes(int(byte, 16) for byte in re.findall(r"\\x(..)", found[0])).decode("utf-8", "replace")

    joined = "\0".join(token for token in tokens if token not in ("</s>", "<s>", "<unk>"))
    return re.sub(r"(?:\0?bytes:(?:\\x..)+)+", decoded, joined).replace("\0", "")


def test_a_first_space_is_kept(llm: LLM, client: httpx.Client) -> None:
    hello: int = llm.tokenizer.inner.token_to_id("▁hello") or 0
    only: dict[str, Any] = {"logit_bias": {str(hello): 100}, "max_tokens": 2, "logprobs": 1}
    for prompt in ("hello", "a\nhello", [1, hello]):
        found = ask(client, prompt=prompt, **only)
        assert found["text"] == " hello hello"
        assert found["logprobs"]["tokens"] == [" hello", " hello"]
    assert ask(client, prompt="hello", echo=True, logit_bias={str(hello): 100}, max_tokens=1)["text"] == "hello hello"
    at_start = ask(client, prompt=[1], **only)
    assert at_start["text"] == "hello hello"
    assert at_start["logprobs"]["tokens"] == ["hello", " hello"]
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 1}
    told = ask(client, "chat/completions", **chat, logit_bias={str(hello): 100}, max_tokens=2)
    assert told["message"]["content"] == " hello hello"
    [first, _] = told["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == (" hello", list(b" hello"))
    assert llm.generate("hello", logit_bias={hello: 100.0}, max_tokens=1)[0].text == " hello"


def test_tokens_join_to_the_text(client: httpx.Client) -> None:
    grammar = {"type": "regex", "pattern": "[a-c é漢ж🙂]{16}"}
    for seed in range(6):
        for prompt in ("hello", [1]):
            found = ask(client, prompt=prompt, seed=seed, logprobs=2, max_tokens=80, response_format=grammar)
            assert as_text(found["logprobs"]["tokens"]) == found["text"]
            assert len(found["text"]) in (15, 16)  # at the start of all a space is not shown


def test_parts_of_a_character(client: httpx.Client) -> None:
    grammar = {"type": "regex", "pattern": "жa"}
    found = ask(client, prompt="hello", logprobs=0, response_format=grammar)
    assert found["text"] == "жa"
    assert found["logprobs"]["tokens"][:3] == [r"bytes:\xd0", r"bytes:\xb6", "a"]
    assert as_text(found["logprobs"]["tokens"]) == "жa"
