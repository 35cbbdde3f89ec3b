"""Bodies as Open WebUI sends them: plain chats, parameters, titles, tools, and those of its provider `llama.cpp`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from common import HISTORY, KEY, MODEL, QUESTION, TOO_LONG, TOOL, URL, arguments_ok, check, raises, report

PARAMETERS: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repeat_penalty": 1.1,
    "seed": 42,
    "stop": ["<end>"],
    "max_tokens": 30,
    "logit_bias": {},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False},
}


def post(path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{URL}{path}",
        json.dumps({"model": MODEL, **body}).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "X-OpenWebUI-User-Name": "me"},
    )
    return urllib.request.urlopen(request, timeout=300).read().decode()


def chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@check("text")
def text() -> None:
    title = f"### Task:\nGenerate a concise title.\n### Chat History:\nUSER: {QUESTION}"
    answer = json.loads(
        post("/chat/completions", stream=False, messages=[{"role": "user", "content": title}], max_completion_tokens=50)
    )
    assert answer["choices"][0]["message"]["content"]
    parameters = {name: value for name, value in PARAMETERS.items() if name != "repeat_penalty"}
    assert json.loads(post("/chat/completions", stream=False, messages=HISTORY, **parameters))["choices"]


@check("stream")
def stream() -> None:
    found = chunks(
        post("/chat/completions", stream=True, messages=HISTORY, stream_options={"include_usage": True}, max_tokens=30)
    )
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in found if each["choices"])
    assert found[-1]["usage"]["completion_tokens"] > 0


@check("tools")
def tools() -> None:
    found = chunks(
        post("/chat/completions", stream=True, messages=HISTORY, tools=[TOOL], tool_choice="required", temperature=0)
    )
    calls = [
        call for each in found for call in each["choices"][0]["delta"].get("tool_calls") or () if call["index"] == 0
    ]
    arguments_ok("".join(call["function"].get("arguments") or "" for call in calls))


@check("errors")
def errors() -> None:
    too_long = [{"role": "user", "content": TOO_LONG}]
    error = raises(urllib.error.HTTPError, lambda: post("/chat/completions", messages=too_long))
    assert json.loads(error.read())["error"]["message"]


@check("history")
def history() -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Hm", "done": True},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Rain"}]},
        {"role": "assistant", "content": "It rains and"},
    ]
    more = {"add_generation_prompt": False, "continue_final_message": True}
    assert chunks(post("/chat/completions", stream=True, messages=messages, max_tokens=10, **more))
    ended = [*messages[:3], {"role": "assistant", "content": "Rain."}, {"role": "user", "content": "Thanks"}]
    assert chunks(post("/chat/completions", stream=True, messages=ended, max_tokens=10))


report()
