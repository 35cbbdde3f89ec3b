"""Where chat templates come from: several of one model, files of users; and tools where a template knows none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hopskip import LLM, ConfigError, PromptError, SpeculativeConfig
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.cli import app as command
from hopskip.text.chat import encode_chat, render_chat, tool_format_of
from hopskip.text.chat_template import read_template
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from tests.tiny import byte_level_tokenizer, make_model, write_checkpoint, write_gguf, write_tokenizer

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {}}}
PLAIN = "plain {{ messages[-1]['content'] }}"
FOR_TOOLS = "tools {{ tools | length }} <tool_call>"


def tokenizer_of(folder: Path, **settings: Any) -> Tokenizer:
    write_checkpoint(folder, "smollm2")
    write_tokenizer(folder, **settings)
    return load_tokenizer(folder, open_checkpoint(folder).config)


# -- several templates -------------------------------------------------------------------------------------------------


def check_both(tokenizer: Tokenizer) -> None:
    assert render_chat(tokenizer, CHAT) == "plain Hello"
    assert render_chat(tokenizer, CHAT, tools=TOOLS) == "tools 1 <tool_call>"
    assert render_chat(tokenizer, CHAT, tools=[]) == "plain Hello"
    assert tool_format_of(tokenizer).name == "hermes"
    assert tool_format_of(tokenizer, "json").name == "json"
    assert tokenizer.chat_template == PLAIN
    assert encode_chat(tokenizer, CHAT) == tokenizer.encode("plain Hello", add_special_tokens=False)


def test_a_list(tmp_path: Path) -> None:
    named = [{"name": name, "template": text} for name, text in (("tool_use", FOR_TOOLS), ("default", PLAIN))]
    check_both(tokenizer_of(tmp_path, chat_template=named))


def test_files(tmp_path: Path) -> None:
    """They come before what the settings say; a name that means nothing here is left alone."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(FOR_TOOLS)
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{% not Jinja")
    check_both(tokenizer_of(tmp_path, chat_template=PLAIN))
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    check_both(tokenizer_of(tmp_path, chat_template="other"))


def test_only_one_of_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_template=[{"name": "tool_use", "template": PLAIN}])
    assert render_chat(tokenizer, CHAT) == "plain Hello"
    assert tokenizer_of(tmp_path, chat_template=[]).chat is None


def test_a_gguf_file(tmp_path: Path) -> None:
    keys = {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tool_use": FOR_TOOLS}
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("smollm2"), metadata=keys, tokenizer=byte_level_tokenizer())
    config = open_checkpoint(path).config
    check_both(load_tokenizer(path, config))
    assert render_chat(load_tokenizer(path, config, chat_template="mine"), CHAT) == "mine"


# -- templates of users ------------------------------------------------------------------------------------------------


def test_a_template_of_the_user(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    file = tmp_path / "mine.txt"
    file.write_text("é {{ messages[0]['content'] }}", encoding="utf-8")
    for given in (file, str(file), "é {{ messages[0]['content'] }}"):
        with LLM(tmp_path, chat_template=given, speculative=SpeculativeConfig(draft="none")) as llm:
            assert llm.tokenizer.render_chat(CHAT) == "é Hello"


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "wrong.jinja").write_text("{% for %}")
    for given, reason in (
        (
            tmp_path / "none.jinja",
            r"none\.jinja' cannot be read \(No such file or directory\); give a file with a Jinja",
        ),
        (str(tmp_path / "latin"), r"latin' cannot be read \(it is not UTF-8\)"),
        (tmp_path / "wrong.jinja", r"the chat template '.*wrong\.jinja' is not valid Jinja: Expected"),
        ("{% for %}", "the chat template is not valid Jinja: Expected"),
        (7, "chat_template is 7; give a file, or the text of a template"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_template(given)  # type: ignore[arg-type]
    assert read_template("a\nb") == "a\nb"


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_of(tmp_path, eos_token="<|im_end|>")
    arguments = [
        "generate",
        "-m",
        str(tmp_path),
        "--chat-template",
        "{{ messages[0]['content'] * 3 }}",
        "--json",
        "-n",
        "1",
    ]
    with pytest.raises(SystemExit) as ending:
        command([*arguments, "Hello"])
    assert ending.value.code == 0
    assert json.loads(capsys.readouterr().out)["stats"]["num_prompt_tokens"] == len(
        load_tokenizer(tmp_path, open_checkpoint(tmp_path).config).encode("HelloHelloHello")
    )
    for wrong, reason in (
        ([*arguments, "--raw", "Hello"], "--raw and --chat-template contradict each other"),
        (["generate", "-m", str(tmp_path), "--chat-template", "none.jinja", "Hello"], "'none.jinja' cannot be read"),
        (["serve", "-m", str(tmp_path), "--chat-template", "none.jinja", "--port", "0"], "'none.jinja' cannot be read"),
        (
            ["serve", "-m", str(tmp_path), "--tool-format", "xml", "--port", "0"],
            "--tool-format is 'xml'; choose one of auto",
        ),
    ):
        with pytest.raises(SystemExit) as ending:
            command(wrong)
        assert ending.value.code == 2
        assert reason in " ".join(capsys.readouterr().err.split())


# -- tools where the template knows none -------------------------------------------------------------------------------


def test_tools_are_told_of_in_the_template_s_own_words(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    text = render_chat(tokenizer, CHAT, tools=TOOLS)
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert json.dumps(TOOLS[0]) in text
    assert text.endswith("</tool_call><|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    other = render_chat(tokenizer, CHAT, tools=TOOLS, tool_format=tool_format_of(tokenizer, "llama3"))
    assert '{"name": <function-name>, "parameters": <args-json-object>}' in other
    history = [
        *CHAT,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ]
    told = render_chat(tokenizer, history, add_generation_prompt=False)
    assert "<tool_call>\n" in told
    assert told.endswith("<|im_start|>user\n<tool_response>\nx\n</tool_response><|im_end|>\n")
    assert render_chat(tokenizer, CHAT) == tokenizer.render_chat(CHAT)


def test_templates_that_refuse_system_messages(tmp_path: Path) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    text = render_chat(tokenizer_of(tmp_path, chat_template=refusing), CHAT, tools=TOOLS)
    assert text.startswith("plain # Tools\n")
    assert text.endswith("</tool_call>\n\nHello")
    tokenizer = tokenizer_of(tmp_path, chat_template="{{ raise_exception('never') }}")
    with pytest.raises(PromptError, match="never"):
        render_chat(tokenizer, [{"role": "assistant", "content": "x"}], tools=TOOLS)


def test_ids_are_such_as_the_template_takes(tmp_path: Path) -> None:
    source = "{% if tools %}{% endif %}[TOOL_CALLS]{{ messages[0].tool_calls[0].id }} {{ messages[1].tool_call_id }}"
    history: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "x", "tool_call_id": "call_1"},
    ]
    asked, answered = render_chat(tokenizer_of(tmp_path, chat_template=source), history)[12:].split()
    assert asked == answered
    assert len(asked) == 9


def test_bad_messages_are_told_of_first(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    with pytest.raises(PromptError, match="has no role"):
        render_chat(tokenizer, ["x"], tools=TOOLS)  # type: ignore[list-item]
    with pytest.raises(PromptError, match="this model has no chat template"):
        render_chat(tokenizer_of(tmp_path, chat_template=None), CHAT, tools=TOOLS)
