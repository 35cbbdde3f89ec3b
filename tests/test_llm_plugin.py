"""The plugin for `llm`: with that program where it is installed, else with what of it the plugin needs."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pydantic = pytest.importorskip("pydantic")

from hopskip import LLM, ConfigError  # noqa: E402
from tests.tiny import write_checkpoint, write_tokenizer  # noqa: E402

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if importlib.util.find_spec("llm") is None:
        stub: Any = types.ModuleType("llm")
        stub.hookimpl = lambda function: function
        stub.Model = object
        stub.Options = type(
            "Options", (pydantic.BaseModel,), {"model_config": pydantic.ConfigDict(extra="forbid"), "__module__": "llm"}
        )
        monkeypatch.setitem(sys.modules, "llm", stub)
    monkeypatch.delitem(sys.modules, "hopskip.doors.llm_plugin", raising=False)
    import hopskip.doors.llm_plugin as module

    yield module
    monkeypatch.delitem(sys.modules, "hopskip.doors.llm_plugin", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llm")
    write_checkpoint(folder, tokenizer=True)
    return folder


class Asked:
    """A prompt, and the response that it gets."""

    def __init__(self, plugin: Any, text: str, system: str | None = None, schema: Any = None, **options: Any) -> None:
        self.prompt, self.system, self.schema = text, system, schema
        self.attachments: list[Any] = []
        self.options = plugin.HopskipOptions(**options)
        self.usage: dict[str, int] = {}
        self.response_json: Any = None

    def set_usage(self, **usage: int) -> None:
        self.usage = usage


def answer(model: Any, asked: Asked, *, stream: bool = True, conversation: Any = None) -> list[str]:
    return list(model.execute(asked, stream, asked, conversation))


def expected(folder: Path, messages: list[dict[str, str]], **params: Any) -> str:
    with LLM(folder) as llm:
        return llm.chat(messages, **params)[0].text


def test_it_is_registered_under_one_name(plugin: Any) -> None:
    found: list[Any] = []
    plugin.register_models(found.append)
    assert [model.model_id for model in found] == ["hopskip"]
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["entry-points"]["llm"] == {"hopskip": plugin.__name__}


def test_answers_are_the_models_and_come_in_pieces(plugin: Any, folder: Path) -> None:
    model = plugin.Hopskip()
    asked = Asked(plugin, "Hello", model=str(folder), max_tokens=12, temperature=0.9, seed=5)
    pieces = answer(model, asked)
    text = expected(folder, [{"role": "user", "content": "Hello"}], max_tokens=12, temperature=0.9, seed=5)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert answer(model, asked, stream=False) == [text]
    assert asked.usage["output"] == asked.response_json["num_tokens"] == 12
    assert asked.usage["input"] == asked.response_json["num_prompt_tokens"] > 0
    assert asked.response_json["seed"] == 5


def test_the_chat_so_far_and_the_system_prompt_are_read(plugin: Any, folder: Path) -> None:
    model = plugin.Hopskip()
    old = SimpleNamespace(prompt=SimpleNamespace(prompt="One", system="Be brief."), text=lambda: "Two")
    asked = Asked(plugin, "Three", model=str(folder), max_tokens=8)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]
    conversation = SimpleNamespace(responses=[old])
    assert "".join(answer(model, asked, conversation=conversation)) == expected(folder, chat, max_tokens=8)
    asked.system = "Be long."
    chat[0]["content"] = "Be long."
    assert plugin.messages_of(asked, conversation) == chat


def test_one_model_stays_loaded(plugin: Any, folder: Path) -> None:
    model = plugin.Hopskip()
    answer(model, Asked(plugin, "a", model=str(folder), max_tokens=2))
    _, first = model._loaded
    answer(model, Asked(plugin, "b", model=str(folder), max_tokens=3, temperature=1))
    assert model._loaded[1] is first
    answer(model, Asked(plugin, "b", model=str(folder), max_tokens=3, draft="early-exit", exit_layer=2))
    assert model._loaded[1] is not first
    assert model._loaded[1].engine.speculative.draft == "early-exit"
    with pytest.raises(Exception, match="closed"):
        first.generate("x", max_tokens=1)


def test_a_model_without_a_chat_template_goes_on_with_the_text(plugin: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_tokenizer(tmp_path, chat_template=None)
    found = "".join(answer(plugin.Hopskip(), Asked(plugin, "The fox", model=str(tmp_path), max_tokens=6)))
    with LLM(tmp_path) as llm:
        assert found == llm.generate("The fox", max_tokens=6)[0].text


def test_a_schema_gives_json(plugin: Any, folder: Path) -> None:
    pytest.importorskip("llguidance")
    import json

    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    found = answer(plugin.Hopskip(), Asked(plugin, "Hello", model=str(folder), schema=schema), stream=False)
    assert json.loads(found[0])["a"] in (1, 2)


def test_an_answer_takes_no_more_than_has_room(plugin: Any, folder: Path) -> None:
    asked = Asked(plugin, "Hello", model=str(folder), max_model_len=30)
    assert len("".join(answer(plugin.Hopskip(), asked))) > 0
    assert asked.usage["input"] + asked.usage["output"] <= 30
    assert plugin.HopskipOptions.model_fields["max_tokens"].description.startswith("Most tokens of an answer")


def test_what_cannot_be_is_refused(plugin: Any, folder: Path) -> None:
    model = plugin.Hopskip()
    with pytest.raises(ConfigError, match="exit_layer is 9"):
        answer(model, Asked(plugin, "a", model=str(folder), exit_layer=9))
    with pytest.raises(ConfigError, match="temperature is -1"):
        answer(model, Asked(plugin, "a", model=str(folder), temperature=-1))
    asked = Asked(plugin, "a", model=str(folder))
    asked.attachments = ["a picture"]
    with pytest.raises(ConfigError, match="reads text alone"):
        answer(model, asked)
    with pytest.raises(pydantic.ValidationError, match="temprature"):
        Asked(plugin, "a", temprature=1)
