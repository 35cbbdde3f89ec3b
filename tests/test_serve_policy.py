"""What becomes of parameters: those that change nothing, those that cannot be done, those that are misspelt; and how
clients are told."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from openai import OpenAI

from hopskip import LLM, ConfigError
from hopskip.serve.jobs import _plain_message
from hopskip.serve.schema import Message
from hopskip.serve.settings import Limits, ServeSettings
from tests.serving import MODEL, Live, live_server

USER = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {"messages": [USER], "max_tokens": 3, "temperature": 0}
TEXT: dict[str, Any] = {"prompt": "ab", "max_tokens": 3, "temperature": 0}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


def choices(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json={**PATHS[path], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def refusal(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={**PATHS.get(path, {}), **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


# -- what changes nothing ----------------------------------------------------------------------------------------------

HARMLESS: list[dict[str, Any]] = [
    {"store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "flex", "verbosity": "low"},
    {"prompt_cache_key": "x", "prompt_cache_retention": "24h", "safety_identifier": "y"},
    {"prediction": {"type": "content", "content": "Hi"}, "request_id": "r", "priority": 3, "cache_prompt": True},
    {"spaces_between_special_tokens": False, "structured_outputs": None, "user": 5},
    {"top_k": -1},
    {"top_k": 0},
    {"stop": ""},
    {"stop": []},
    {"stop": ["", ""]},
    {"seed": "42"},
    {"max_tokens": "3", "temperature": "0.0", "n": 1.0, "top_p": "1", "min_p": ".0"},
    {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "include_stop_str_in_output": False},
    {"functions": [], "function_call": "auto", "mirostat": 0, "typical_p": 1, "return_token_ids": False},
    dict.fromkeys(["logit_bias", "top_k", "min_p", "seed", "stop", "n", "ignore_eos", "model", "speculative"]),
    dict.fromkeys(["stream", "stream_options", "response_format", "mirostat", "nonsense", "cache_salt"]),
    {"response_format": {"type": "text", "json_schema": None}, "speculative": {"num_draft_tokens": None}},
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", HARMLESS, ids=lambda body: next(iter(body)))
def test_what_changes_nothing_is_accepted(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert choices(client, path, **body) == choices(client, path)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"modalities": ["text"], "parallel_tool_calls": True, "tool_choice": "auto"}),
        ("/v1/chat/completions", {"tools": [], "top_logprobs": 0, "logprobs": False, "max_completion_tokens": 3}),
        ("/v1/completions", {"suffix": "", "best_of": 1, "echo": None, "logprobs": None}),
    ],
)
def test_what_changes_nothing_on_one_route(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert choices(client, path, **body) == choices(client, path)


def test_obfuscation_of_streams_is_accepted(client: httpx.Client) -> None:
    body = {**TEXT, "stream": True, "stream_options": {"include_obfuscation": True}}
    assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


# -- messages ----------------------------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "function_call": None}
        | {"tool_calls": None, "parsed": None, "reasoning": None, "provider_specific_fields": {}},
        {"role": "assistant", "content": "x"},
    ),
    ({"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "content": ""}),
    ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
    ({"role": "assistant", "content": "Yes.", "refusal": "No."}, {"role": "assistant", "content": "Yes."}),
    (
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "index": 0, "custom": None}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}],
        },
    ),
    (
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": " "}}]},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
    ),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 2}}}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "", "type": "function", "function": {"name": "f", "arguments": {"a": 2}}}],
        },
    ),
    (
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, "b"]},
        {"role": "user", "content": "ab"},
    ),
    (
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "a"}, {"text": "b"}, {"type": "refusal", "refusal": "c"}],
        },
        {"role": "assistant", "content": "abc"},
    ),
    ({"role": "developer", "content": [{"type": "input_text", "text": "a"}]}, {"role": "system", "content": "a"}),
    (
        {"role": "tool", "content": "a", "tool_call_id": "c1", "name": "f"},
        {"role": "tool", "content": "a", "tool_call_id": "c1", "name": "f"},
    ),
]


@pytest.mark.parametrize(("sent", "seen"), MESSAGES)
def test_messages_come_back_as_sdks_give_them(client: httpx.Client, sent: dict[str, Any], seen: dict[str, Any]) -> None:
    assert _plain_message(Message.model_validate(sent)) == seen
    choices(client, "/v1/chat/completions", messages=[USER, sent, USER])


def test_an_answer_can_be_sent_back_as_it_is(live: Live) -> None:
    with OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as openai:
        history: list[Any] = [USER]
        for _ in range(2):
            answer = openai.chat.completions.create(model=MODEL, messages=history, max_tokens=4)
            history += [answer.choices[0].message.model_dump(), USER]
        history += [answer.choices[0].message, USER]
        assert openai.chat.completions.create(model=MODEL, messages=history, max_tokens=4).usage is not None


# -- what is refused, and in which words -------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temprature": 1}, "temprature is not a parameter of this API; did you mean temperature?", "temprature"),
    (
        {"max_new_tokens": 1},
        "max_new_tokens is not a parameter of this API; did you mean max_tokens?",
        "max_new_tokens",
    ),
    (
        {"guided_json": {}},
        "guided_json is not a parameter of this API; did you mean structured_outputs.json?",
        "guided_json",
    ),
    ({"mirostat": 2}, "mirostat is not a parameter of this API; leave it out", "mirostat"),
    (
        {"speculative": {"enable": 1}},
        "speculative.enable is not a parameter of this API; did you mean enabled?",
        "speculative.enable",
    ),
    (
        {"structured_outputs": {"jsn": {}, "regex": "a"}},
        "structured_outputs.jsn is not a parameter of this API; did you mean json?",
        "structured_outputs.jsn",
    ),
    ({"max_tokens": True}, "max_tokens: Input should be a valid integer", "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer", "max_tokens"),
    ({"max_tokens": "1e3"}, "max_tokens: Input should be a valid integer", "max_tokens"),
    ({"max_tokens": -2}, "max_tokens: Input should be greater than or equal to -1", "max_tokens"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1, or ask for echo or prompt_logprobs", "max_tokens"),
    ({"temperature": "inf"}, "temperature: Input should be a valid number", "temperature"),
    ({"top_k": -2}, "top_k: Input should be greater than or equal to -1", "top_k"),
    ({"stop": 5}, "stop: Input should be a valid string; or Input should be a valid list", "stop"),
    ({"stop": ["a", 5]}, "stop.1: Input should be a valid string", "stop.1"),
    ({"stop": ["a"] * 17}, "the number of stop texts is 17; at most 16 is allowed here", "stop"),
    ({"stop": "a" * 257}, "the length of a stop text is 257; at most 256 is allowed here", "stop"),
    ({"n": 17}, "n is 17; at most 16 is allowed here", "n"),
    ({"logit_bias": {"x": 1}}, "logit_bias has the key 'x'; keys are token ids", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5: Input should be less than or equal to 100", "logit_bias.5"),
    ({"stream_options": {}}, "stream_options: it has no effect without stream=true; leave it out", "stream_options"),
    (
        {"response_format": {"type": "yaml"}},
        "response_format: 'type' must be one of 'text', 'json_object', 'json_schema', 'regex', 'grammar'",
        "response_format",
    ),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema: Field required",
        "response_format.json_schema",
    ),
    (
        {"structured_outputs": {}},
        "structured_outputs: give exactly one of json, regex, choice, grammar and json_object",
        "structured_outputs",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs: give exactly one of json, regex, choice, grammar and json_object",
        "structured_outputs",
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "response_format and structured_outputs each say what the text looks like; leave one out",
        "structured_outputs",
    ),
]
BAD_GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "regex", "pattern": "("}}, "response_format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"response_format": {"type": "text"}, "structured_outputs": {"grammar": "start: x"}}, "structured_outputs"),
]
WRONG_CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": None}, "messages: Field required", "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0: images are not supported: this model reads text only; leave the part out",
        "messages.0.content.0",
    ),
    (
        {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]},
        "messages.1.content.1: sounds are not supported: this model reads text only; leave the part out",
        "messages.1.content.1",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "poem"}]}]},
        "messages.0.content.0: parts of type 'poem' are not supported: this model reads text only; leave the part out",
        "messages.0.content.0",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text: Field required",
        "messages.0.content.0.text",
    ),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "messages.0.content: Input should be a valid string; or Input should be a valid list",
        "messages.0.content",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0: a message of user has no content", "messages.0"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
        "messages.0: tool_calls belong to assistant messages, not to those of user",
        "messages.0",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]},
        "the arguments of tool call 'c1' are not JSON",
        "messages",
    ),
    ({"modalities": ["text", "audio"]}, "modalities: this model answers with text only; leave it out", "modalities"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function: Field required", "tool_choice.function"),
    ({"tool_choice": "required"}, "tool_choice asks for a call, but there are no tools", "tool_choice"),
    ({"top_logprobs": 2}, "top_logprobs has no effect without logprobs=true; leave it out", "top_logprobs"),
    (
        {"max_completion_tokens": 4},
        "max_tokens and max_completion_tokens are the same thing; leave max_tokens out",
        "max_tokens",
    ),
    (
        {"max_tokens": None, "max_completion_tokens": 0},
        "max_completion_tokens is 0; it must be at least 1, or ask for echo or prompt_logprobs",
        "max_completion_tokens",
    ),
]
WRONG_TEXT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": 5}, "prompt: Input should be a valid string; or Input should be a valid list", "prompt"),
    ({"prompt": ["a", 5]}, "prompt.1: Input should be a valid string", "prompt.1"),
    ({"prompt": [5, 6, "a", 7]}, "prompt.2: Input should be a valid integer", "prompt.2"),
    ({"prompt": [[5], [6, "a"]]}, "prompt.1.1: Input should be a valid integer", "prompt.1.1"),
    ({"prompt": [5, 320]}, "a token id of the prompt is 320; at most 319 is allowed here", "prompt"),
    ({"prompt": [[5], [6, 999]]}, "a token id of the prompt is 999; at most 319 is allowed here", "prompt"),
    ({"suffix": "a"}, "suffix is not supported: this model only continues texts; leave it out", "suffix"),
    ({"best_of": 2}, "best_of=2 is not supported; leave it out, or make it equal to n", "best_of"),
    ({"prompt": ["a"] * 65}, "the number of prompts is 65; at most 64 is allowed here", "prompt"),
    ({"prompt": ["a"] * 64, "n": 3}, "prompts x n is 192; at most 128 is allowed here", "n"),
]
CASES = [
    *(("/v1/chat/completions", *case) for case in WRONG + WRONG_CHAT),
    *(("/v1/completions", *case) for case in WRONG + WRONG_TEXT),
]


@pytest.mark.parametrize(("path", "body", "message", "param"), CASES)
def test_clients_are_told_what_is_wrong(
    client: httpx.Client, path: str, body: dict[str, Any], message: str, param: str | None
) -> None:
    error = refusal(client, path, **body)
    assert (error["message"], error["param"]) == (message, param)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("body", "param"), BAD_GRAMMARS)
def test_whose_grammar_cannot_be_used(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    error = refusal(client, path, **body)
    assert error["param"] == param
    assert "grammar cannot be used" in error["message"]


def test_what_goes_wrong_later_is_told_of_its_parameter_too(client: httpx.Client) -> None:
    empty = refusal(client, "/v1/completions", prompt="")
    assert (empty["param"], empty["message"]) == ("prompt", "the prompt is empty; give some text")
    assert refusal(client, "/v1/completions", prompt=[])["param"] == "prompt"
    assert refusal(client, "/tokenize", prompt="")["param"] == "prompt"
    last = [USER, {"role": "assistant", "content": ""}]
    assert refusal(client, "/v1/chat/completions", messages=last, continue_final_message=True)["param"] == "messages"


def test_log_probabilities_of_prompts_have_a_limit(llm: LLM) -> None:
    with live_server(llm, limits=Limits(num_prompt_logprobs=24)) as live, live.client() as client:
        fits: dict[str, Any] = {"prompt": [[5] * 4] * 2, "max_tokens": 0}
        choices(client, "/v1/completions", **fits, echo=True, logprobs=2)
        choices(client, "/v1/completions", **fits, prompt_logprobs=2)
        choices(client, "/v1/completions", **fits | {"max_tokens": 1}, echo=True)
        for over, param in (
            ({"echo": True, "logprobs": 3}, "echo"),
            ({"prompt_logprobs": 3}, "prompt_logprobs"),
            ({"echo": True, "logprobs": 1, "prompt_logprobs": 3}, "prompt_logprobs"),
            ({"prompt_logprobs": 2, "n": 2}, "prompt_logprobs"),
        ):
            error = refusal(client, "/v1/completions", **fits, **over)
            assert error["param"] == param
            assert "log-probabilities of prompts is" in error["message"]
    assert Limits().num_prompt_logprobs == 2**20


@pytest.mark.parametrize("content", [b"", b'{"prompt":', b"[]", b"5", b'"text"'])
def test_bodies_that_are_no_objects(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body must be a JSON object, sent with the header")


def test_what_does_not_fit_is_clamped_or_told_in_openais_words(client: httpx.Client) -> None:
    for asked in (1000, -1, 2**31 - 1):
        answer = client.post(
            "/v1/completions", json={**TEXT, "prompt": [5] * 1000, "max_tokens": asked, "ignore_eos": True}
        )
        assert answer.json()["usage"]["completion_tokens"] == 24, asked
    assert client.post("/v1/completions", json={"prompt": [5] * 1020, "ignore_eos": True}).status_code == 200
    assert (
        client.post("/v1/completions", json={"prompt": "ab", "ignore_eos": True}).json()["usage"]["completion_tokens"]
        == 16
    )
    error = refusal(client, "/v1/completions", prompt=[5] * 1024)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert error["message"] == (
        "This model's maximum context length is 1024 tokens. However, your prompt resulted in 1024 tokens. "
        "Please reduce the length of the prompt."
    )
    error = refusal(client, "/v1/chat/completions", messages=[{"role": "user", "content": "word " * 2000}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].endswith("Please reduce the length of the messages.")


def test_more_choices_than_the_queue_ever_holds_are_refused_for_good(llm: LLM) -> None:
    with live_server(llm, max_queue=0) as live, live.client() as client:
        most = llm.engine.max_num_seqs
        assert client.post("/v1/completions", json={**TEXT, "prompt": ["a"] * most}).status_code == 200
        assert "at most" in refusal(client, "/v1/completions", prompt=["a"] * (most + 1))["message"]


# -- parameters of nobody ----------------------------------------------------------------------------------------------

UNKNOWN = {"temprature": 1, "mirostat": 0, "speculative": {"enable": True}}


@pytest.mark.parametrize(("policy", "logged"), [("ignore", []), ("warn", ["temprature", "speculative.enable"])])
def test_unknown_parameters_can_be_ignored(
    llm: LLM, policy: Any, logged: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with live_server(llm, unknown_params=policy) as live, live.client() as client:
        for path in PATHS:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="hopskip.serve"):
                assert choices(client, path, **UNKNOWN) == choices(client, path)
            assert [getattr(record, "fields", {})["params"] for record in caplog.records] == (
                [logged] if logged else []
            )
        assert client.post("/tokenize", json={"prompt": "a", "x": 1}).status_code == 200
        assert refusal(client, "/v1/completions", n=0)["param"] == "n"


def test_unknown_parameters_are_refused_everywhere(client: httpx.Client) -> None:
    for path, body in ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]}):
        assert client.post(path, json=body).status_code == 200
        assert refusal(client, path, **body, x=1)["message"] == "x is not a parameter of this API; leave it out"
    neither = refusal(client, "/tokenize")
    assert (neither["message"], neither["param"]) == ("give either prompt or messages", None)
    long = refusal(client, "/detokenize", tokens=[5], **{"x" * 70: 1})
    assert long["param"] == "x" * 64
    assert ServeSettings(model_name="x").unknown_params == "reject"
    with pytest.raises(ConfigError, match="unknown_params is 'drop'; choose one of reject, ignore, warn"):
        ServeSettings(model_name="x", unknown_params="drop")  # type: ignore[arg-type]


# -- what the text looks like ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("outputs", "texts"),
    [
        ({"json": {"enum": ["x", "yz"]}}, {'"x"', '"yz"'}),
        ({"json": '{"enum": [12]}'}, {"12"}),
        ({"regex": "a{3}"}, {"aaa"}),
        ({"choice": ["ab", "cd"]}, {"ab", "cd"}),
        ({"grammar": 'start: "ab"'}, {"ab"}),
        ({"grammar": 'root ::= "ab"', "disable_fallback": True}, {"ab"}),
    ],
)
def test_structured_outputs(client: httpx.Client, path: str, outputs: dict[str, Any], texts: set[str]) -> None:
    for choice in choices(client, path, max_tokens=50, temperature=1, n=2, structured_outputs=outputs):
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) in texts
        assert choice["finish_reason"] == "stop"


def test_the_schema_may_stand_beside_the_type(client: httpx.Client) -> None:
    body = {"response_format": {"type": "json_schema", "schema": {"enum": [12]}}, "max_tokens": 9}
    assert choices(client, "/v1/completions", **body)[0]["text"] == "12"


def test_structured_outputs_any_object(client: httpx.Client) -> None:
    answers = [
        choices(client, "/v1/completions", max_tokens=40, seed=5, temperature=1, **asked)
        for asked in (
            {"structured_outputs": {"json_object": True}},
            {"response_format": {"type": "json_object"}},
        )
    ]
    assert answers[0] == answers[1]
    assert answers[0][0]["text"].startswith("{")


def test_settings_of_a_start() -> None:
    """The option of the command line reaches the settings."""
    from hopskip.cli.serve import ServerOptions
    from hopskip.serve.ray_app import RayOptions

    options = ServerOptions()
    assert (options.unknown_params, options.tool_format, options.reasoning_format) == ("reject", "auto", "auto")
    given = RayOptions(unknown_params="warn", tool_format="json", reasoning_format="none").settings()
    assert (given.unknown_params, given.tool_format, given.reasoning_format) == ("warn", "json", "none")
