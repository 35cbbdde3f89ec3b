"""Answers have the shapes that the description of the API tells."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from hopskip.serve import models
from tests.serving import MODEL

USER = {"role": "user", "content": "Hi"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"enum": [{}]}}}]
UNSURE = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True, "maxItems": 2}}}
COMMON: list[dict[str, Any]] = [
    {},
    {"return_tokens": True, "seed": 3},
    {"response_format": UNSURE, "max_tokens": 30},
    {"prompt_logprobs": 1},
    {"temperature": 0},
    {"speculative": {"race": True}, "return_tokens": "origins"},
]
TEXT: list[dict[str, Any]] = [{"logprobs": 2, "n": 2}, {"echo": True, "logprobs": 0}, {"echo": True, "max_tokens": 0}]
CHAT: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 1},
    {"tools": TOOLS, "tool_choice": "required", "max_tokens": 60, "parallel_tool_calls": False},
]
CASES = [
    *(("/v1/completions", {"prompt": "ab ab", **case}) for case in COMMON + TEXT),
    *(("/v1/chat/completions", {"messages": [USER], **case}) for case in COMMON + CHAT),
]


@pytest.mark.parametrize(("path", "body"), CASES)
def test_answers(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    is_chat = "chat" in path
    body = {"max_tokens": 4, **body}
    whole = models.ChatCompletion if is_chat else models.Completion
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    told: Any = whole.model_validate_json(answer.content, strict=True)
    assert told.usage is not None
    assert told.usage.completion_tokens_details is not None
    if "prompt_logprobs" in body:
        return
    chunk = models.ChatChunk if is_chat else models.Completion
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = client.post(path, json={**body, "stream": True, "stream_options": options}).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        chunk.model_validate_json(event.removeprefix("data: "), strict=True)
    if "tools" in body:
        assert told.choices[0].message.tool_calls[0].function.name == "f"


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/models", None, models.ModelList),
        (f"/v1/models/{MODEL}", None, models.ModelCard),
        ("/health", None, models.Health),
        ("/health/live", None, models.Health),
        ("/tokenize", {"prompt": "ab", "return_token_strs": True}, models.Tokens),
        ("/tokenize", {"messages": [USER]}, models.Tokens),
        ("/detokenize", {"tokens": [5]}, models.Prompt),
        ("/detokenize", {"tokens": [-5]}, models.Error),
        ("/v1/completions", {"prompt": ""}, models.Error),
        ("/v1/models/other", None, models.Error),
        ("/other", None, models.Error),
    ],
)
def test_other_answers(client: httpx.Client, path: str, body: Any, shape: Any) -> None:
    answer = client.get(path) if body is None else client.post(path, json=body)
    shape.model_validate_json(answer.content, strict=True)
    assert (answer.status_code >= 400) is (shape is models.Error)


def test_the_description_has_every_answer(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            found = operation["responses"]["200"]["content"]
            if path == "/metrics":
                assert list(found) == ["text/plain"]
                continue
            assert found["application/json"]["schema"], path
            if not path.startswith("/v1/messages"):
                refused = operation["responses"]["400"]["content"]["application/json"]["schema"]
                assert schemas[refused["$ref"].rpartition("/")[2]]["required"] == ["error"], path
    for path, name in ("/v1/completions", "Completion"), ("/v1/chat/completions", "ChatCompletion"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{name}")
        assert "[DONE]" in content["text/event-stream"]["schema"]["description"]
    for name in ("ChatRequest", "CompletionRequest"):
        parameters = schemas[name]["properties"]
        assert schemas[name]["additionalProperties"] is False
        for parameter in (
            "min_tokens",
            "bad_words",
            "structured_outputs",
            "prompt_logprobs",
            "add_special_tokens",
            "store",
        ):
            assert parameter in parameters, parameter
    assert schemas["CompletionRequest"]["properties"]["min_tokens"]["description"].startswith("Nothing ends the text")
    assert schemas["CompletionTokensDetails"]["properties"]["accepted_prediction_tokens"]["description"]
