"""The command line: what a text must look like, and whether the model thinks first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hopskip import LLM
from hopskip.cli import app
from hopskip.sampling_params import text_or_file
from tests.test_llm_options import thinking_llm

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return thinking_llm(folder)


def run(command: str, llm: LLM, folder: Path, *arguments: str | Path, stdin: str | None = None) -> Result:
    given = [command, "-m", folder, "--dtype", "float32", "--draft", "none", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in given], input=stdin)


def answer(llm: LLM, folder: Path, *arguments: str | Path) -> dict[str, Any]:
    result = run("generate", llm, folder, "--json", *arguments, "Hello")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_schema_inline_and_in_a_file(llm: LLM, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    expected = llm.chat([{"role": "user", "content": "Hello"}], json_schema=SCHEMA, max_tokens=100)[0].text
    assert set(json.loads(expected)) == {"a"}
    for given in (json.dumps(SCHEMA), str(file), f"@{file}"):
        found = answer(llm, folder, "--json-schema", given, "-n", "100")
        assert found["text"] == expected
        assert found["settings"]["sampling"]["json_schema"] == SCHEMA


def test_a_grammar_inline_and_in_a_file(llm: LLM, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "grammar.gbnf"
    file.write_text('root ::= "x" [0-9] "y"\n')
    for given in (file.read_text(), str(file), f"@{file}", 'start: "x" /[0-9]/ "y"'):
        assert re.fullmatch("x[0-9]y", answer(llm, folder, "--grammar", given)["text"])


def test_a_regular_expression(llm: LLM, folder: Path) -> None:
    assert re.fullmatch("@[ab]{5}", answer(llm, folder, "--regex", "@[ab]{5}")["text"])


def test_thinking(llm: LLM, folder: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    for option, value in (("--no-think", False), ("--think", True)):
        expected = llm.chat(chat, enable_thinking=value, max_tokens=9)[0].token_ids
        assert answer(llm, folder, option, "-n", "9")["token_ids"] == expected
    assert answer(llm, folder, "--no-think", "-n", "9")["token_ids"] != answer(llm, folder, "-n", "9")["token_ids"]


def test_a_chat_takes_them_too(llm: LLM, folder: Path) -> None:
    result = run("chat", llm, folder, "--regex", "[ab]{5}", "--no-think", stdin="Hello\nAgain\n")
    assert result.exit_code == 0, result.output
    assert len(re.findall("[ab]{5}", result.stdout)) == 2
    chat = [{"role": "user", "content": "Hello"}]
    assert result.stdout.startswith(llm.chat(chat, regex="[ab]{5}", enable_thinking=False)[0].text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json-schema", "nowhere.json"], "--json-schema is 'nowhere.json'; give a JSON object, or a file"),
        (["--json-schema", "@nowhere.json"], "the file 'nowhere.json' cannot be read (No such file"),
        (["--json-schema", "{a"], "--json-schema is '{a', which is not JSON"),
        (["--json-schema", "[1]"], "give a JSON object"),
        (["--grammar", "@nowhere"], "the file 'nowhere' cannot be read"),
        (["--grammar", ""], "grammar is ''"),
        (["--regex", "("], "the grammar cannot be used"),
        (["--regex", "a", "--grammar", 'start: "a"'], "each say what the text looks like"),
        (["--regex", "a", "--ignore-eos"], "contradicts"),
        (["--raw", "--think"], "--raw and --think contradict"),
    ],
)
def test_what_cannot_be_is_refused(llm: LLM, folder: Path, arguments: list[str], message: str) -> None:
    result = run("generate", llm, folder, *arguments, "Hello")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_a_model_without_a_switch_says_so(llm: LLM, tmp_path: Path) -> None:
    from tests.tiny import write_checkpoint

    write_checkpoint(tmp_path, tokenizer=True)
    for command in ("generate", "chat"):
        result = run(command, llm, tmp_path, "--no-think", *(["Hello"] if command == "generate" else []), stdin="Hi\n")
        assert result.exit_code == 2, result.output
        assert "thinking cannot be turned on or off" in result.stderr


def test_what_is_too_long_or_odd_for_a_path_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("x" * 5000, "a\0b", "start: /a/"):
        assert text_or_file(text) == text
    Path("g").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        text_or_file("g")
