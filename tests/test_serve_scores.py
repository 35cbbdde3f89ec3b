"""Log-probabilities of prompts over HTTP, as harnesses ask for them; and what else a request may say of its text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from hopskip import LLM, SpeculativeConfig
from tests.serving import TOOLS_TEMPLATE, live_server
from tests.tiny import write_checkpoint, write_tokenizer

CONTEXTS = ["The quick brown fox", "Grüße aus Köln"]
ENDINGS = [" jumps over the lazy dog.", " sleeps.", ", naïve café", " 你好"]
USER = {"role": "user", "content": "Hi there"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Any]:
    folder = tmp_path_factory.mktemp("model")
    written = write_checkpoint(folder, "llama3-gqa")
    write_tokenizer(folder, chat_template=TOOLS_TEMPLATE)
    speculative = SpeculativeConfig(draft="early-exit", exit_layer=1, num_draft_tokens=3)
    return LLM(folder, backend="native", dtype="float32", speculative=speculative), written


@pytest.fixture(scope="module")
def client(model: tuple[LLM, Any]) -> Iterator[httpx.Client]:
    with live_server(model[0]) as live, live.client() as client:
        yield client


def logprobs_of(written: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """[N, V], after each token."""
    with torch.no_grad():
        found: np.ndarray[Any, Any] = written(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
    return found


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_multiple_choice_as_a_harness_asks_for_it(client: httpx.Client, model: tuple[LLM, Any]) -> None:
    """The request and the arithmetic of lm-eval's `local-completions`."""
    llm, written = model
    pairs = [(llm.tokenizer.encode(context), llm.tokenizer.encode(end)) for context in CONTEXTS for end in ENDINGS]
    prompts = [context + end for context, end in pairs]
    body: dict[str, Any] = {
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "seed": 1,
    }
    choices = post(client, "/v1/completions", **body)["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(pairs)))
    for (context, end), choice in zip(pairs, choices, strict=True):
        expected_NV = logprobs_of(written, context + end)
        told = {name: values[len(context) : -1] for name, values in choice["logprobs"].items()}
        places = range(len(context) - 1, len(context + end) - 1)
        expected = [expected_NV[place, token] for place, token in zip(places, end, strict=True)]
        assert told["token_logprobs"] == pytest.approx(expected, abs=1e-4)
        assert sum(told["token_logprobs"]) == pytest.approx(sum(expected), abs=1e-4)
        is_greedy = all(
            token == max(top, key=top.__getitem__)
            for token, top in zip(told["tokens"], told["top_logprobs"], strict=True)
        )
        assert is_greedy == all(expected_NV[p].argmax() == t for p, t in zip(places, end, strict=True))
        assert all(token in top for token, top in zip(told["tokens"], told["top_logprobs"], strict=True))
        assert all(1 <= len(top) <= 2 for top in told["top_logprobs"])
    # the prompt alone, whether it goes out as ids or as text, whole or as a stream
    text = CONTEXTS[0] + ENDINGS[0]
    for prompt in (text, llm.tokenizer.encode(text)):
        alone = post(client, "/v1/completions", prompt=prompt, max_tokens=0, logprobs=0, echo=True)
        [choice] = alone["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert alone["usage"]["completion_tokens"] == 0
        assert alone["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert "".join(choice["logprobs"]["tokens"]) == text
        assert [
            text[a:b]
            for a, b in zip(
                choice["logprobs"]["text_offset"], [*choice["logprobs"]["text_offset"][1:], None], strict=True
            )
        ] == choice["logprobs"]["tokens"]
        expected_NV = logprobs_of(written, llm.tokenizer.encode(text))
        ids = llm.tokenizer.encode(text)
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            [expected_NV[place, token] for place, token in enumerate(ids[1:])], abs=1e-4
        )
    silent = post(client, "/v1/completions", prompt=text, max_tokens=0, echo=True)
    assert (silent["choices"][0]["text"], silent["choices"][0]["logprobs"]) == (text, None)


@pytest.mark.parametrize("n", [1, 2])
def test_streamed_echoes_say_the_same(client: httpx.Client, n: int) -> None:
    import json

    body: dict[str, Any] = {
        "prompt": ["The quick", "def"],
        "max_tokens": 5,
        "logprobs": 2,
        "echo": True,
        "seed": 3,
        "n": n,
    }
    whole = post(client, "/v1/completions", **body)["choices"]
    events = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event.startswith("data: {")]
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            told = [value for part in own if part["logprobs"] for value in part["logprobs"][name]]
            assert told == values


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs(client: httpx.Client, model: tuple[LLM, Any], path: str) -> None:
    llm, written = model
    is_chat = "chat" in path
    given: dict[str, Any] = {"messages": [USER]} if is_chat else {"prompt": "The quick brown"}
    ids = llm.encode([USER] if is_chat else "The quick brown")
    answer = post(client, path, **given, max_tokens=2, prompt_logprobs=2)
    told = (answer if is_chat else answer["choices"][0])["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == len(ids)
    for expected_V, token, entry in zip(logprobs_of(written, ids), ids[1:], told[1:], strict=False):
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(expected_V[token], abs=1e-4)
        assert own["rank"] == 1 + (expected_V > expected_V[token]).sum()
        assert own["decoded_token"] == llm.tokenizer.token_bytes(token).decode("utf-8", "replace")
        assert {int(i) for i in entry} == {token, *np.argsort(-expected_V)[:2].tolist()}
        assert [e["rank"] for i, e in entry.items() if int(i) != token] == [r for r in (1, 2) if r != own["rank"]]
    error = client.post(path, json={**given, "prompt_logprobs": 0, "stream": True}).json()["error"]
    assert (error["param"], error["message"]) == (
        "prompt_logprobs",
        "prompt_logprobs come with whole answers only; leave stream out",
    )
    alone = post(client, path, **given, max_tokens=0, prompt_logprobs=0)
    assert [len(entry or ()) for entry in (alone if is_chat else alone["choices"][0])["prompt_logprobs"]] == [0] + [
        1
    ] * (len(ids) - 1)


# -- ends, words, special tokens ---------------------------------------------------------------------------------------


def test_ends_wait_and_words_are_kept_away(client: httpx.Client, model: tuple[LLM, Any]) -> None:
    llm, _ = model
    [special] = llm.tokenizer.encode("<|endoftext|>")
    body: dict[str, Any] = {"prompt": "The quick", "temperature": 0, "max_tokens": 12}
    free = post(client, "/v1/completions", **body, ignore_eos=True)["choices"][0]["text"]
    letter = next(c for c in free[1:] if c.isascii() and c.isprintable() and c != free[0])
    held = post(client, "/v1/completions", **body, stop=letter, min_tokens=12)
    assert held["usage"]["completion_tokens"] == 12
    assert post(client, "/v1/completions", **body, stop=letter)["choices"][0]["text"] == free[: free.index(letter)]
    assert letter not in post(client, "/v1/completions", **body, bad_words=[letter])["choices"][0]["text"]
    bias = {str(special): 100}
    for skip, text in (True, ""), (False, "<|endoftext|>" * 12):
        assert (
            post(client, "/v1/completions", **body, logit_bias=bias, skip_special_tokens=skip)["choices"][0]["text"]
            == text
        )
    stopped = post(client, "/v1/completions", **body, logit_bias=bias, stop=["never", "<|endoftext|>"])
    assert (stopped["usage"]["completion_tokens"], stopped["choices"][0]["finish_reason"]) == (1, "stop")
    error = client.post("/v1/completions", json={**body, "min_tokens": 13}).json()["error"]
    assert error["message"] == "min_tokens is 13, but the answer may have at most 12 tokens; lower it"


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1, "seed": 4}])
def test_drafts_change_nothing(client: httpx.Client, how: dict[str, Any]) -> None:
    body: dict[str, Any] = {"prompt": "The quick", "max_tokens": 30, "ignore_eos": True, "bad_words": ["e", "a"], **how}
    body |= {"min_tokens": 20, "stop": ["i", "o"]}
    drafted = post(client, "/v1/completions", **body)["choices"]
    assert drafted == post(client, "/v1/completions", **body, speculative={"enabled": False})["choices"]


# -- chats that go on, and tokens --------------------------------------------------------------------------------------


def test_the_last_message_goes_on(client: httpx.Client, model: tuple[LLM, Any]) -> None:
    llm, _ = model
    chat = [USER, {"role": "assistant", "content": "Once upon a "}]
    rendered = llm.tokenizer.render_chat(chat, add_generation_prompt=False)
    body = {"messages": chat, "continue_final_message": True}
    for more in ({}, {"add_generation_prompt": False}):
        ids = post(client, "/tokenize", **body, **more)["tokens"]
        assert llm.tokenizer.decode(ids, skip_special_tokens=False) == rendered[: rendered.index("Once upon a ") + 12]
    answer = post(client, "/v1/chat/completions", **body, temperature=0, max_tokens=6)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    same = post(client, "/v1/completions", prompt=ids, temperature=0, max_tokens=6)
    assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    open_ended = post(client, "/tokenize", messages=chat, add_generation_prompt=False)["tokens"]
    assert llm.tokenizer.decode(open_ended, skip_special_tokens=False) == rendered
    for wrong, message in (
        ({"add_generation_prompt": True}, "continue_final_message and add_generation_prompt contradict each other"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the last message cannot be continued"),
    ):
        for path in ("/tokenize", "/v1/chat/completions"):
            error = client.post(path, json={**body, **wrong}).json()["error"]
            assert error["message"].startswith(message)


def test_a_template_may_trim() -> None:
    from hopskip.text.chat_template import cut_after

    assert cut_after("<a>x y </a>", "x y ") == "<a>x y "
    assert cut_after("<a>x y</a>", " x y ") == "<a>x y"
    assert cut_after("<a>x</a><a>x </a>", " x ") == "<a>x</a><a>x "


def test_tokens_and_their_texts(client: httpx.Client, model: tuple[LLM, Any]) -> None:
    llm, _ = model
    text = "Grüße <|im_end|>!"
    told = post(client, "/tokenize", prompt=text, return_token_strs=True)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert "<|im_end|>" in told["token_strs"]
    assert told["max_model_len"] == llm.engine.max_model_len
    assert post(client, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
    assert post(client, "/tokenize", prompt=text)["token_strs"] is None
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with_tools = post(client, "/tokenize", messages=[USER], tools=tools)["tokens"]
    assert "weather" in llm.tokenizer.decode(with_tools)
    error = client.post("/tokenize", json={"prompt": "a", "tools": tools}).json()["error"]
    assert error["message"] == "tools go with messages, not with a prompt; leave them out"


def test_a_bos_can_be_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.tiny import byte_fallback_tokenizer

    folder = tmp_path_factory.mktemp("bos")
    write_checkpoint(folder, "llama3-gqa")
    write_tokenizer(folder, byte_fallback_tokenizer(), bos_token="<s>", eos_token="</s>")
    llm = LLM(folder, backend="native", speculative=SpeculativeConfig(draft="none"))
    with live_server(llm) as live, live.client() as client:
        for asked, has_bos in ((None, True), (True, True), (False, False)):
            ids = post(client, "/tokenize", prompt="hello", add_special_tokens=asked)["tokens"]
            assert (ids[0] == 1) is has_bos
            usage = post(client, "/v1/completions", prompt="hello", add_special_tokens=asked, max_tokens=1)["usage"]
            assert usage["prompt_tokens"] == len(ids)
            chat = post(client, "/tokenize", messages=[USER], add_special_tokens=asked)["tokens"]
            assert (chat[0] == 1) is (asked is True)
            usage = post(client, "/v1/chat/completions", messages=[USER], add_special_tokens=asked, max_tokens=1)[
                "usage"
            ]
            assert usage["prompt_tokens"] == len(chat)
