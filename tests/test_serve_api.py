"""The OpenAI protocol: with the `openai` client, by hand, and by everything that the document of the API allows."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai import APIStatusError, OpenAI

from hopskip import LLM, SamplingParams
from hopskip.serve.settings import Limits
from tests.serving import MODEL, Live, live_server, tiny_llm

MESSAGES: list[Any] = [{"role": "user", "content": "Hi there"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    folder = tmp_path_factory.mktemp("model")
    return {draft: tiny_llm(folder, draft) for draft in ("both", "early-exit", "ngram", "none")}


@pytest.fixture(scope="module")
def live(llms: dict[str, LLM]) -> Iterator[Live]:
    with live_server(llms["both"]) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client


@pytest.fixture(scope="module")
def openai(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(llms: dict[str, LLM]) -> str:
    """The greedy answer to MESSAGES by plain decoding: 24 tokens."""
    return llms["none"].generate([MESSAGES], SamplingParams(max_new_tokens=24))[0].text


# -- the openai client -------------------------------------------------------------------------------------------------


def test_chat(openai: OpenAI, expected: str) -> None:
    answer = openai.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=24, seed=3)
    choice = answer.choices[0]
    assert choice.message.content == expected
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens


def test_streamed_chat(openai: OpenAI, expected: str) -> None:
    chunks: list[Any] = list(
        openai.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24


def test_completions(openai: OpenAI, llms: dict[str, LLM]) -> None:
    """Several prompts, as texts and as token ids, echoed, several choices."""
    prompts = ["The quick brown", "def main"]
    ids = [llms["both"].tokenizer.encode(p) for p in prompts]
    plain = [r.text for r in llms["none"].generate(prompts, SamplingParams(max_new_tokens=8))]
    for given_prompt in (prompts, ids):
        answer = openai.completions.create(
            model=MODEL, prompt=given_prompt, temperature=0, max_tokens=8, echo=True, n=2
        )
        texts = [c.text for c in answer.choices]
        assert texts == [prompts[0] + plain[0]] * 2 + [prompts[1] + plain[1]] * 2
        assert [c.index for c in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 32
    streamed = openai.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=8, stream=True)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == plain


def test_logprobs(openai: OpenAI, llms: dict[str, LLM]) -> None:
    chat = openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob < 0
        assert entry.token.startswith("bytes:") or bytes(entry.bytes or ()).decode() == entry.token
    completion = openai.completions.create(model=MODEL, prompt="abc", temperature=0, max_tokens=6, logprobs=2)
    legacy = completion.choices[0].logprobs
    assert legacy is not None
    assert legacy.tokens is not None
    assert legacy.token_logprobs is not None
    assert legacy.text_offset is not None
    assert len(legacy.tokens) == len(legacy.token_logprobs) == len(legacy.text_offset) == 6
    reference = llms["none"].generate(["abc"], SamplingParams(max_new_tokens=6, logprobs=2))[0]
    assert legacy.token_logprobs == pytest.approx(reference.logprobs, abs=1e-3)


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_schema(openai: OpenAI, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["red", "green"]}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "kind", "n"],
        "additionalProperties": False,
    }
    for stream in (False, True):
        answer: Any = openai.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=temperature,
            max_tokens=200,
            seed=1,
            stream=stream,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        )
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )
        value = json.loads(text)
        assert list(value) == ["ok", "kind", "n"]
        assert value["kind"] in ("red", "green")


def test_tools(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=600,
        seed=1,  # whatever a random model says, its grammar allows endless white space
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    follow_up: Any = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": dict(call.function)}]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    named: Any = {"type": "function", "function": {"name": "weather"}}
    chunks: list[Any] = list(
        openai.chat.completions.create(
            model=MODEL,
            messages=follow_up,
            max_tokens=600,
            seed=1,
            tools=TOOLS,
            tool_choice=named,
            stream=True,
        )
    )
    deltas = list(chain.from_iterable(c.choices[0].delta.tool_calls or [] for c in chunks))
    assert [delta.function.name for delta in deltas] == ["weather"] + [None] * (len(deltas) - 1)
    assert len(deltas) > 3, "piece by piece"
    assert json.loads("".join(delta.function.arguments for delta in deltas))["city"] in ("Rome", "Oslo")
    assert not any(c.choices[0].delta.content for c in chunks)
    free = openai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, tools=TOOLS, temperature=0)
    assert free.choices[0].message.content


def test_errors_are_openais(openai: OpenAI) -> None:
    with pytest.raises(APIStatusError) as refused:
        openai.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert refused.value.status_code == 404
    assert refused.value.code == "model_not_found"
    with pytest.raises(APIStatusError, match="maximum context length is 1024 tokens") as refused:
        openai.completions.create(model=MODEL, prompt=[5] * 2000)
    assert (refused.value.status_code, refused.value.code) == (400, "context_length_exceeded")
    assert [m.id for m in openai.models.list()] == [MODEL]
    assert openai.models.retrieve(MODEL).id == MODEL


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_seeds_stops_and_biases(client: httpx.Client, llms: dict[str, LLM], expected: str) -> None:
    def text(**body: Any) -> str:
        answer = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 24, **body})
        assert answer.status_code == 200, answer.text
        content: str = answer.json()["choices"][0]["message"]["content"]
        return content

    assert text(seed=1) == text(seed=1) != text(seed=2)
    stop = expected[5:7]
    assert text(temperature=0, stop=stop) == expected[: expected.index(stop)]
    x = llms["both"].tokenizer.encode("x")[0]
    assert text(temperature=0, logit_bias={str(x): 100}) == "x" * 24
    assert text(temperature=0, logit_bias={str(x): 100}, stop_token_ids=[x]) == ""
    several = client.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 7}
    ).json()
    assert len({c["message"]["content"] for c in several["choices"]}) == 3


def test_tokens_and_their_origins(client: httpx.Client, expected: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "return_tokens": True}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    tokens = answer["hopskip"]["tokens"]
    assert "".join(t["text"] for t in tokens) == expected
    assert {t["origin"] for t in tokens} <= {"early-exit", "ngram", "target", "bonus"}
    assert {(t["origin"], t["layer"]) for t in tokens} <= {
        ("early-exit", 2), ("ngram", None), ("target", 3), ("bonus", 3),
    }  # fmt: skip
    assert all(t["logprob"] == t["top"][0]["logprob"] for t in tokens)
    assert answer["hopskip"]["stats"]["num_draft_tokens"] > 0
    assert answer["logprobs"] is None
    off = client.post("/v1/chat/completions", json={**body, "speculative": {"enabled": False}}).json()["choices"][0]
    assert {t["origin"] for t in off["hopskip"]["tokens"]} == {"target"}
    assert off["message"] == answer["message"]
    shallow = client.post(
        "/v1/chat/completions", json={**body, "speculative": {"exit_layer": 1, "num_draft_tokens": 2}}
    )
    assert shallow.json()["choices"][0]["message"] == answer["message"]
    assert len(shallow.json()["choices"][0]["hopskip"]["stats"]["num_accepted_tokens_per_pos"]) <= 2


def test_tokenize_and_back(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "Grüße, 你好 🙂"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "Grüße, 你好 🙂"}
    chat = client.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["count"] == len(chat["tokens"]) > 5


def test_what_clients_that_count_tokens_ask_for(client: httpx.Client, llms: dict[str, LLM]) -> None:
    told = client.get("/tokenizer_info").json()
    assert told == {"chat_template": llms["both"].tokenizer.chat_template, **llms["both"].tokenizer.special_tokens}
    assert told["eos_token"] == "<|im_end|>"


def test_metrics_have_the_names_that_routers_scrape(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"prompt": "abc abc abc", "max_tokens": 8})
    text = client.get("/metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    label = f'{{model_name="{MODEL}"}}'
    for prefix in ("vllm:", "hopskip_"):
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert f"{prefix}{name}{label}" in values
        for name in (
            "prompt_tokens_total",
            "generation_tokens_total",
            "spec_decode_num_drafts_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
            "time_to_first_token_seconds_count",
            "request_time_per_output_token_seconds_count",
            "inter_token_latency_seconds_count",
            "e2e_request_latency_seconds_count",
        ):
            assert values[f"{prefix}{name}{label}"] > 0, name
        accepted = [
            v for k, v in values.items() if k.startswith(f"{prefix}spec_decode_num_accepted_tokens_per_pos_total")
        ]
        assert sum(accepted) == values[f"{prefix}spec_decode_num_accepted_tokens_total{label}"]
    assert values[f"hopskip_mean_acceptance_length_count{label}"] > 0


def test_metrics_count_requests_as_vllm_does(llms: dict[str, LLM]) -> None:
    """A prompt counts once, however many texts it gets; the histograms agree with the usage that clients are told."""
    with live_server(llms["none"]) as live, live.client() as client:

        def value(name: str) -> list[float]:
            text = client.get("/metrics").text
            pattern = rf'^(?:vllm:|hopskip_){name}{{model_name="{MODEL}"}} (\S+)$'
            return [float(found) for found in re.findall(pattern, text, flags=re.MULTILINE)]

        assert value("num_preemptions_total") == [0, 0]
        body = {"prompt": ["abc abc", "x y"], "n": 3, "max_tokens": 5, "ignore_eos": True}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        alone = client.post("/v1/completions", json={"prompt": "abc", "echo": True, "max_tokens": 0}).json()["usage"]
        num_prompt = usage["prompt_tokens"] + alone["prompt_tokens"]
        assert usage["completion_tokens"] == 30
        for name, expected in {
            "prompt_tokens_total": num_prompt,
            "generation_tokens_total": 30,
            "request_prompt_tokens_sum": num_prompt,
            "request_prompt_tokens_count": 3,
            "request_generation_tokens_sum": 30,
            "request_generation_tokens_count": 7,
            "request_params_n_sum": 7,
            "request_params_n_count": 3,
            "request_params_max_tokens_sum": 30,
            "request_params_max_tokens_count": 7,
            "request_prefill_time_seconds_count": 7,
            "request_decode_time_seconds_count": 7,
            "request_inference_time_seconds_count": 7,
            "e2e_request_latency_seconds_count": 7,
            "num_preemptions_total": 0,
        }.items():
            assert value(name) == [expected, expected], name
        for name in ("request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"):
            assert min(value(name)) > 0, name
        parts = value("request_prefill_time_seconds_sum")[0] + value("request_decode_time_seconds_sum")[0]
        assert value("request_inference_time_seconds_sum")[0] == pytest.approx(parts)
        text = client.get("/metrics").text
        edges = [
            float(edge)
            for edge in re.findall(r'^vllm:request_prompt_tokens_bucket{le="([\d.]+)"', text, flags=re.MULTILINE)
        ]
        assert edges[:4] == [1, 2, 5, 10]
        assert edges[-1] == 500_000


def test_the_dashboard_asks_for_metrics_that_exist(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"prompt": "abc abc abc", "max_tokens": 8})
    text = client.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for name, pairs in re.findall(r"^(hopskip_\w+)(?:\{(.*)\})? ", text, flags=re.MULTILINE):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', pairs))
    dashboard = (Path(__file__).parents[1] / "deploy" / "grafana-dashboard.json").read_text()
    json.loads(dashboard)
    queries = re.findall(r'"expr": "(.*)"', dashboard)
    assert len(queries) > 10
    for query in queries:
        names = re.findall(r"hopskip_\w+", query)
        assert names, query
        assert set(names) <= labels.keys(), query
        wanted = set(re.findall(r"by \((\w+)\)", query)) | set(re.findall(r"(\w+)=\\\"", query))
        assert wanted <= labels[names[0]], query


# -- every parameter with every way to speculate -----------------------------------------------------------------------

SPECULATIVE = [None, {"enabled": False}, {"num_draft_tokens": 0}, {"num_draft_tokens": 2}, {"exit_layer": 1}]
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
COMMON: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"model": MODEL}, True),
    ({"model": None}, True),
    ({"temperature": 0}, True),
    ({"temperature": 0, "top_p": 0.5, "seed": 1, "top_k": 4}, True),
    ({"temperature": 2.1}, False),
    ({"top_p": 0.3}, True),
    ({"top_p": 0}, False),
    ({"top_k": 3}, True),
    ({"min_p": 0.2}, True),
    ({"n": 3}, True),
    ({"n": 17}, False),
    ({"n": 0}, False),
    ({"stop": "e"}, True),
    ({"stop": ["e", "t"]}, True),
    ({"stop": ["x"] * 17}, False),
    ({"stop": [""]}, True),
    ({"stop_token_ids": [4]}, True),
    ({"seed": -5}, True),
    ({"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.2}, True),
    ({"presence_penalty": 3}, False),
    ({"logit_bias": {"5": 3, "6": -100}}, True),
    ({"logit_bias": {"999": 3}}, False),
    ({"logit_bias": {"x": 3}}, False),
    ({"ignore_eos": True}, True),
    ({"response_format": {"type": "text"}}, True),
    ({"response_format": {"type": "json_object"}}, True),
    ({"response_format": SCHEMA_FORMAT}, True),
    ({"response_format": SCHEMA_FORMAT, "ignore_eos": True}, False),
    ({"response_format": SCHEMA_FORMAT, "n": 2, "temperature": 0.5, "stop": "R"}, True),
    ({"response_format": {"type": "regex", "pattern": "a+b"}}, True),
    ({"response_format": {"type": "regex", "pattern": "("}}, False),
    ({"response_format": {"type": "grammar", "grammar": 'start: "a" | "bc"'}}, True),
    ({"response_format": {"type": "grammar", "grammar": "start: start start | start"}}, False),
    ({"response_format": {"type": "yaml"}}, False),
    ({"stream": True}, True),
    ({"stream": True, "stream_options": {"include_usage": True}, "n": 2}, True),
    ({"stream_options": {"include_usage": True}}, False),
    ({"return_tokens": True}, True),
    ({"user": "me"}, True),
    ({"max_tokens": 0}, False),
    ({"max_tokens": 5000, "stop_token_ids": [*range(300)]}, True),
    ({"min_tokens": 3, "stop": "e"}, True),
    ({"min_tokens": 4}, False),
    ({"bad_words": ["e", "th"]}, True),
    ({"bad_words": [""]}, False),
    ({"skip_special_tokens": False}, True),
    ({"prompt_logprobs": 2}, True),
    ({"prompt_logprobs": 2, "max_tokens": 0}, True),
    ({"prompt_logprobs": 0, "stream": True}, False),
    ({"prompt_logprobs": 21}, False),
    ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, True),
    ({"mirostat": 1}, False),
]
COMPLETION: list[tuple[dict[str, Any], bool]] = [
    ({"echo": True}, True),
    ({"logprobs": 0}, True),
    ({"logprobs": 5}, True),
    ({"logprobs": 21}, False),
    ({"logprobs": 1, "echo": True}, True),
    ({"logprobs": 1, "echo": True, "stream": True, "n": 2}, True),
    ({"max_tokens": 0, "echo": True}, True),
    ({"max_tokens": 0, "echo": True, "logprobs": 2, "prompt": ["a", "bcd"]}, True),
    ({"add_special_tokens": False}, True),
    ({"suffix": "x"}, False),
    ({"best_of": 2}, False),
    ({"prompt": [5, 6, 7]}, True),
    ({"prompt": [[5], [6, 7]]}, True),
    ({"prompt": ["a", "b"]}, True),
    ({"prompt": []}, False),
    ({"prompt": ""}, False),
    ({"prompt": [400]}, False),
    ({"prompt": ["a"] * 65}, False),
]
CHAT: list[tuple[dict[str, Any], bool]] = [
    ({"logprobs": True}, True),
    ({"logprobs": True, "top_logprobs": 4}, True),
    ({"top_logprobs": 4}, False),
    ({"logprobs": True, "top_logprobs": 21}, False),
    ({"max_completion_tokens": 2, "max_tokens": None}, True),
    ({"max_completion_tokens": 2}, False),
    ({"max_completion_tokens": 3}, True),
    ({"tools": TOOLS}, True),
    ({"tools": TOOLS, "tool_choice": "none"}, True),
    ({"tools": TOOLS, "tool_choice": "required"}, True),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}, True),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "news"}}}, False),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, False),
    ({"tool_choice": "required"}, False),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, True),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, False),
    ({"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": "b", "name": "c"}]}, True),
    ({"add_generation_prompt": False}, True),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "I"}], "continue_final_message": True}, True),
    ({"continue_final_message": True, "add_generation_prompt": True}, False),
    ({"messages": [{"role": "user"}]}, False),
    ({"messages": []}, False),
]


@pytest.mark.parametrize("draft", ["both", "early-exit", "ngram", "none"])
def test_every_parameter_with_every_way_to_speculate_answers_or_refuses(llms: dict[str, LLM], draft: str) -> None:
    cases = [("/v1/completions", {"prompt": "ab ab ab", "max_tokens": 3, **p}, ok) for p, ok in COMMON + COMPLETION] + [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, **p}, ok) for p, ok in COMMON + CHAT
    ]

    def works(speculative: dict[str, Any]) -> bool:
        if "exit_layer" in speculative:
            return draft in ("both", "early-exit")
        return draft != "none" or speculative.get("num_draft_tokens", 0) == 0

    async def send(client: httpx.AsyncClient, path: str, body: dict[str, Any], ok: bool, index: int) -> None:
        # all ways with the plain request, one of them with each other parameter
        ways = SPECULATIVE if len(body) == 2 else [SPECULATIVE[index % len(SPECULATIVE)]]
        for way in ways:
            answer = await client.post(path, json=body if way is None else {**body, "speculative": way})
            is_fine = ok and works(way or {})
            assert answer.status_code == 200 if is_fine else 400 <= answer.status_code < 500, (body, way, answer.text)
            if is_fine and body.get("stream"):
                assert answer.text.endswith("data: [DONE]\n\n")
            elif not is_fine:
                assert answer.json()["error"]["message"]

    async def send_all(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            await asyncio.gather(*(send(client, *case, index) for index, case in enumerate(cases)))

    # all at once: on a busy machine a grammar may have to wait before it is compiled
    with live_server(llms[draft], max_queue=1000, limits=Limits(grammar_seconds=60)) as live:
        asyncio.run(send_all(live.url))
        assert live.server.engine.num_outstanding == 0


# -- everything that the API's own document allows ---------------------------------------------------------------------


def test_no_request_that_the_document_allows_breaks_the_server(live: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    found: Any = schema.get_all_operations()
    operations = [result.ok() for result in found]
    assert len(operations) == 18
    limit_of = {
        "/v1/completions": "max_tokens",
        "/v1/chat/completions": "max_completion_tokens",
        "/v1/messages": "max_tokens",
        "/v1/responses": "max_output_tokens",
    }
    assert limit_of.keys() <= {operation.path for operation in operations}
    for operation in operations:
        num_examples = 12 if operation.method == "post" else 3

        @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case[Any]) -> None:
            limit = limit_of.get(case.operation.path)
            if isinstance(case.body, dict) and limit is not None:
                case.body.pop("max_tokens", None)
                case.body[limit] = 2  # a long answer is no error, only slow
            response = case.call(timeout=60)
            assert response.status_code < 500, response.text
            if "text/event-stream" not in response.headers["content-type"][0]:
                case.operation.validate_response(response)

        check()


def test_log_probabilities_are_valid_json() -> None:
    from hopskip.serve.logprobs import finite

    assert finite(-math.inf) == -9999
    assert finite(math.nan) == -9999
    assert finite(-1.5) == -1.5
    assert finite(None) is None
