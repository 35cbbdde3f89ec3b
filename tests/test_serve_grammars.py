"""Grammars of clients: what would crash, hang or eat the process is refused, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hopskip.errors import ConfigError
from hopskip.serve.engine_thread import BusyError
from hopskip.serve.grammars import Grammars
from hopskip.serve.settings import Limits
from hopskip.text.grammar import GrammarCompiler
from hopskip.text.json_schema import STRICT
from tests.serving import Live, live_server, tiny_llm

CRASH = {"const": -(2**63) + 1}
PRODUCT = "start: A\nA: /.*a.{12}.*/ & /.*b.{13}.*/ & /.*c.{14}.*/ & ~/.*d.{15}.*/"
"""Determinizing it takes longer than anybody waits, and no limit of the library ends it."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    llm = tiny_llm(tmp_path_factory.mktemp("model"), max_model_len=512, max_num_seqs=4)
    with live_server(llm, limits=Limits(grammar_seconds=0.5)) as server:
        yield server


def ask(live: Live, response_format: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60, "temperature": 0, **fields}
    if response_format is not None:
        body["response_format"] = response_format
    with live.client() as client:
        return client.post("/v1/chat/completions", json=body)


def test_x(live: Live) -> None:
    t=time.time()
    print(ask(live, {"type": "regex", "pattern": "[0-9]{3}"}).json(), time.time()-t); t=time.time()
    print(ask(live, {"type": "regex", "pattern": "[0-9]{3}"}).json()["choices"], time.time()-t); t=time.time()
    print(ask(live, {"type": "grammar", "grammar": PRODUCT}).text, time.time()-t); t=time.time()
    print(ask(live, {"type": "json_schema", "json_schema": {"schema": {"items":{"type":"integer", "multipleOf": 997*991},"uniqueItems":True}}}).text, time.time()-t); t=time.time()
    print(ask(live, {"type": "regex", "pattern": "((((((a{10}){10}){10}){10}){10}){10}){10}"}).text, time.time()-t); t=time.time()
    print(ask(live, {"type": "json_schema", "json_schema": {"schema": {"type":"array","maxItems":2,"items":{"enum":["a","b"]},"uniqueItems":True}}}).headers, time.time()-t); t=time.time()
    print(ask(live, {"type": "json_schema", "json_schema": {"schema": {"type":"array","maxItems":2,"items":{"enum":["a","b"]},"uniqueItems":True}}}).text, time.time()-t); t=time.time()
    print(ask(live, {"type": "json_schema", "json_schema": {"strict": True, "schema": {"type":"array","maxItems":2,"items":{"enum":["a","b"]},"uniqueItems":True}}}).text, time.time()-t); t=time.time()
    print(ask(live, {"type": "grammar", "grammar": 'start: %json {"const": -9223372036854775808}'}).text, time.time()-t); t=time.time()
    from hopskip.text import json_schema
    tools=[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"c":{"$ref":"#/$defs/C"}},"required":["c"],"$defs":{"C":{"enum":["u","v"]}}}}},
    {"type":"function","function":{"name":"g","strict":True,"parameters":{"type":"object","properties":{"c":{"$ref":"#/$defs/C"}},"required":["c"],"$defs":{"C":{"enum":["w"]}}}}}]
    print(ask(live, tools=tools,tool_choice="required").text, time.time()-t); t=time.time()
    print(ask(live, tools=tools,tool_choice={"type":"function","function":{"name":"g"}}).text, time.time()-t); t=time.time()
    assert 0
