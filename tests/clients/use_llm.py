"""`llm`: the command and its library, through a model in extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp(prefix="llm-"))
os.environ["LLM_USER_PATH"] = str(FOLDER)  # before it is imported

import llm  # noqa: E402
from common import CITY, KEY, MODEL, QUESTION, TOO_LONG, URL, arguments_ok, check, raises, report  # noqa: E402

entry = {"model_id": "local", "model_name": MODEL, "api_base": URL, "supports_tools": True, "supports_schema": True}
(FOLDER / "extra-openai-models.yaml").write_text(json.dumps([{**entry, "api_key_name": "local"}]))
(FOLDER / "keys.json").write_text(json.dumps({"local": KEY}))


def run(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "llm"), "--model", "local", "--option", "temperature", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return done.stdout


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}"


@check("text")
def text() -> None:
    assert run("--no-stream", "--option", "max_tokens", "20", "--system", "Be brief.", QUESTION).strip()


@check("stream")
def stream() -> None:
    pieces = list(llm.get_model("local").prompt(QUESTION, stream=True, max_tokens=20))
    assert len(pieces) > 1


@check("tools")
def tools() -> None:
    # the model is free to call or not
    assert llm.get_model("local").chain(QUESTION, tools=[weather], options={"max_tokens": 50}).text()


@check("schema")
def schema() -> None:
    arguments_ok(run("--schema", json.dumps(CITY), "--option", "max_tokens", "200", QUESTION))


@check("errors")
def errors() -> None:
    error = raises(Exception, lambda: llm.get_model("local").prompt(TOO_LONG).text())
    assert "context length" in str(error), error


@check("history")
def history() -> None:
    conversation = llm.get_model("local").conversation()
    assert conversation.prompt(QUESTION, max_tokens=10).text()
    assert conversation.prompt("And more?", max_tokens=10).text()


report("llm")
