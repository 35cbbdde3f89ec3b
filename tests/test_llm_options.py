"""What a program says to an LLM: parameters by name, several texts, structure, thinking; and what it says wrongly."""

from __future__ import annotations

import io
import json
import pickle
import pydoc
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

import numpy as np
import pytest
import tokenizers
import torch

import hopskip
from hopskip import LLM, ConfigError, HopskipError, PromptError, SamplingParams, SpeculativeConfig
from hopskip.sampling_params import SamplingOptions
from tests.tiny import write_checkpoint, write_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<no>' }}{% endif %}{{ mood }}"
)
USER = {"role": "user", "content": "Name three colours."}


def thinking_llm(folder: Path, **options: Any) -> LLM:
    """A tiny random chat model, whose template has a switch for thinking."""
    write_checkpoint(folder, "smollm2")
    write_tokenizer(folder, chat_template=TEMPLATE, eos_token="<|im_end|>")
    config = SpeculativeConfig(draft="both", exit_layer=1, num_draft_tokens=3)
    return LLM(folder, **{"speculative": config, "dtype": "float32", "backend": "native", **options})


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return thinking_llm(tmp_path_factory.mktemp("model"))


# -- parameters --------------------------------------------------------------------------------------------------------


def test_fields_by_name_say_what_params_say(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=7, temperature=1.0, seed=3)
    expected = llm.generate("abc", params)[0].token_ids
    assert len(expected) == 7
    for found in (
        llm.generate("abc", max_tokens=7, temperature=1.0, seed=3),
        llm.generate("abc", max_new_tokens=7, temperature=1, seed=3),
        llm.generate("abc", replace(params, max_new_tokens=30), max_tokens=7),
        llm.generate("abc", [replace(params, seed=9)], seed=3),
        llm.generate(["abc"], sampling_params=params, use_tqdm=False),
    ):
        assert found[0].token_ids == expected
    assert [piece.token.id for piece in llm.stream("abc", max_tokens=7, temperature=1.0, seed=3)] == expected


def test_two_names_of_one_field() -> None:
    assert SamplingParams(max_tokens=5) == SamplingParams(max_new_tokens=5)
    assert SamplingParams(max_tokens=5).max_tokens == 5
    assert replace(SamplingParams(max_tokens=5), max_new_tokens=6).max_tokens == 6
    assert SamplingParams(max_tokens=5).updated(max_tokens=6).max_new_tokens == 6
    assert SamplingParams(max_tokens=5, max_new_tokens=5).max_tokens == 5
    with pytest.raises(ConfigError, match="max_tokens=5 and max_new_tokens=6 are two names for one thing"):
        SamplingParams(max_tokens=5, max_new_tokens=6)


def test_the_options_of_calls_are_the_fields_of_params() -> None:
    assert set(get_type_hints(SamplingOptions)) == {item.name for item in fields(SamplingParams)} | {"max_tokens"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 5.0}, "max_tokens is 5.0; it must be a whole number of at least 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; it must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a number: 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": False}, "temperature is False"),
        ({"temperature": np.zeros((2, 2))}, r"temperature is array\(\[\[0., 0.\], \[0., 0.\]\]\)"),
        ({"top_p": "0.9", "temperature": 1}, "top_p is '0.9'; it must be a number above 0 and at most 1"),
        ({"top_p": 0, "temperature": 1}, "top_p is 0"),
        ({"top_k": 3.5, "temperature": 1}, "top_k is 3.5"),
        ({"min_p": 2, "temperature": 1}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": None}, "presence_penalty is None"),
        ({"seed": 1.5, "temperature": 1}, "seed is 1.5"),
        ({"seed": 2**64, "temperature": 1}, "64 bits"),
        ({"seed": -(2**63) - 1, "temperature": 1}, "64 bits"),
        ({"logprobs": True}, "logprobs is True"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
        ({"stop": b"x"}, "stop is b'x'; it must be a text or a list of texts"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": ["a", ""]}, "non-empty texts"),
        ({"stop": [["a"]]}, "non-empty texts"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list of token ids"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids is 1.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; it must be numbers by token id"),
        ({"logit_bias": {"5": 1}}, "a key of logit_bias is '5'"),
        ({"logit_bias": {5: "1"}}, "logit_bias of token 5 is '1'"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 is nan"),
        ({"n": 2}, "n=2 at temperature 0"),
        ({"n": 0, "temperature": 1}, "n is 0"),
        ({"json_schema": "{"}, "which is not JSON"),
        ({"json_schema": [1]}, r"json_schema is \[1\]; it must be a JSON schema"),
        ({"regex": ""}, "regex is ''"),
        ({"grammar": b"x"}, "grammar is b'x'"),
        ({"choice": "abc"}, "choice is 'abc'; it must be a list of texts"),
        ({"choice": []}, r"choice is \[\]"),
        ({"choice": ["a", 1]}, "choice is"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice each say"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos contradicts regex"),
        ({"max_token": 5}, "no option 'max_token'; did you mean 'max_tokens'?"),
        ({"beams": 5}, "no option 'beams'; it takes max_new_tokens"),
    ],
)
def test_wrong_parameters_get_one_clear_line(llm: LLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        SamplingParams(**given)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=message):
        llm.generate("abc", **given)


def test_right_parameters_of_odd_types() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop=(text for text in ["a", "b"]),  # type: ignore[arg-type]
        stop_token_ids=[np.int32(3)],  # type: ignore[list-item]
        logit_bias={np.int64(4): float("-inf")},  # type: ignore[dict-item]
        seed=-5,
    )
    assert json.dumps([params.max_new_tokens, params.temperature, params.stop, params.stop_token_ids, params.seed])
    assert type(params.max_new_tokens) is int
    assert type(params.temperature) is float
    assert params.stop == ("a", "b")
    assert SamplingParams(stop=None, logit_bias=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(stop="ab").stop == ("ab",)


def test_params_of_other_kinds_are_refused(llm: LLM) -> None:
    for wrong in ({"max_tokens": 3}, 5, "greedy", [None], [{"max_tokens": 3}]):
        with pytest.raises(ConfigError, match="give a SamplingParams, or its fields by name"):
            llm.generate("abc", wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompts"):
        llm.generate("abc", [SamplingParams()] * 2)


def test_wrong_options_of_the_model_are_named(tmp_path: Path) -> None:
    for options, message in (
        ({"gpu_memory_utilization": 0.9}, "LLM has no option 'gpu_memory_utilization'; it takes"),
        ({"max_num_seq": 3}, "did you mean 'max_num_seqs'"),
        ({"max_num_seqs": 1.5}, "max_num_seqs is 1.5"),
        ({"max_model_len": "5"}, "max_model_len is '5'"),
        ({"threads": "4"}, "threads is '4'"),
        ({"threads": True}, "threads is True"),
        ({"model": 5}, "model is 5; give a folder, a file or a Hub id"),
        ({"speculative": {"draft": "none"}}, "speculative is {'draft': 'none'}; give a SpeculativeConfig"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(**{"model": tmp_path, **options})  # type: ignore[arg-type]
    for config, message in (
        ({"num_draft_tokens": 5.0}, "num_draft_tokens is 5.0"),
        ({"num_runner_ups": "1"}, "num_runner_ups is '1'"),
        ({"num_runner_ups": 33}, "num_runner_ups is 33; it must be 0 to 32"),
        ({"exit_layer": True}, "exit_layer is True"),
        ({"min_confidence": "high"}, "min_confidence is 'high'"),
    ):
        with pytest.raises(ConfigError, match=message):
            SpeculativeConfig(**config)


# -- prompts -----------------------------------------------------------------------------------------------------------


class Encoding(dict):  # type: ignore[type-arg]
    """As the tokenizers of transformers give it."""


class ModelMessage:
    """As the clients of APIs give it."""

    role, content = "user", "x"

    def model_dump(self) -> None: ...


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"foo": 1}, r"prompts is {'foo': 1}; give a text, a list of token ids"),
        (USER, "a chat is a list of messages: put it into one"),
        ({"prompt": "x"}, "give what it has as 'prompt'"),
        (Encoding(input_ids=[1, 2]), r"give its token ids: a list from \['input_ids'\]"),
        (np.array([1, 2]), "ndarray; give plain token ids: its .tolist"),
        (torch.tensor([[1], [2]]), r"tensor\(\[\[1\], \[2\]\]\), of type Tensor; give plain token ids"),
        ([torch.tensor([1, 2])], "prompt 0 is tensor.* its .tolist"),
        (tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).encode("a"), "give its .ids"),
        (5, "prompts is 5; give a text"),
        (1.5, "prompts is 1.5"),
        (True, "prompts is True"),
        (None, "prompts is None"),
        (b"abc", "prompts is b'abc'; give text"),
        ([b"abc"], "prompt 0 is b'abc'"),
        ({1, 2}, "prompts is {1, 2}"),
        (PurePosixPath("a.txt"), "path.read_text"),
        ("", "the prompt is empty; give some text"),
        ([], "the list of prompts is empty"),
        ([[]], "prompt 0 is empty"),
        (iter([]), "the list of prompts is empty"),
        ([None], "prompt 0 is None"),
        ([True], "prompt 0 is True"),
        ([1.0, 2.0], "prompt 0 is 1.0"),
        ([1, "a"], "the prompt has 'a' among its token ids"),
        ([[1, 2.5]], "prompt 0 has 2.5 among its token ids"),
        ([1, True], "the prompt has True among its token ids"),
        (["a", 1], "prompt 1 is 1"),
        (["a", ["b"]], r"prompt 1 is the list \['b'\]; prompts may not be nested deeper"),
        ([[[1]]], "nested deeper"),
        ([[USER, "x"]], "prompt 0 has 'x' among its messages"),
        ([{"role": "user"}], "has no content"),
        ([{"content": "x"}], "has no role"),
        ([{"role": 1, "content": "x"}], "has no role"),
        ([{"role": "user", "content": 5}], "the content of a chat message is 5; give text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "is no part of a message that this model reads"),
        ([{"role": "user", "content": ["x"]}], "'x' is no part of a message"),
        ([[ModelMessage()]], "model_dump"),
        ([ModelMessage()], "model_dump"),
        ([[object()]], "prompt 0 is a list of <object"),
    ],
)
def test_wrong_prompts_get_one_clear_line(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message) as error:
        llm.generate(prompts, max_tokens=1)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_any_iterable_is_taken_for_a_list(llm: LLM) -> None:
    ids = [result.token_ids for result in llm.generate(["abc", "de"], max_tokens=4)]

    def each() -> Iterator[str]:
        yield from ("abc", "de")

    encoded = llm.encode("abc")
    params = iter([SamplingParams(max_tokens=4)] * 2)
    assert [result.token_ids for result in llm.generate(each(), params)] == ids
    assert [result.token_ids for result in llm.generate(("abc", "de"), max_tokens=4)] == ids
    assert llm.generate(tuple(encoded), max_tokens=4)[0].token_ids == ids[0]
    assert llm.generate((i for i in encoded), max_tokens=4)[0].token_ids == ids[0]  # type: ignore[misc]
    numbers: Any = [np.int64(i) for i in encoded]
    assert llm.generate(numbers, max_tokens=4)[0].token_ids == ids[0]


# -- chats -------------------------------------------------------------------------------------------------------------


def test_chat_goes_through_the_template(llm: LLM) -> None:
    [one] = llm.chat([USER], max_tokens=6)
    assert llm.tokenizer.decode(one.prompt_token_ids) == "user: Name three colours.\nassistant: "
    assert one.token_ids == llm.generate([USER], max_tokens=6)[0].token_ids
    several = llm.chat([[USER], [{"role": "system", "content": "Be brief."}, USER]], max_tokens=6)
    assert several[0].token_ids == one.token_ids
    assert len(several[1].prompt_token_ids) > len(one.prompt_token_ids)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Name three "}, {"type": "text", "text": "colours."}]}
    ]
    assert llm.chat(parts, max_tokens=6)[0].token_ids == one.token_ids


def test_thinking_can_be_turned_off(llm: LLM) -> None:
    def prompt(**said: Any) -> str:
        return llm.tokenizer.decode(llm.chat([USER], max_tokens=1, **said)[0].prompt_token_ids)

    assert prompt(enable_thinking=False).endswith("assistant: <no>")
    assert prompt(enable_thinking=True) == prompt() == prompt(enable_thinking=None)
    assert prompt(chat_template_kwargs={"enable_thinking": False}) == prompt(enable_thinking=False)
    assert prompt(chat_template_kwargs={"mood": "glad"}).endswith("assistant: glad")
    assert not prompt(chat_template_kwargs={"add_generation_prompt": False}).endswith("assistant: ")
    streamed = list(llm.stream([USER], max_tokens=1, enable_thinking=False))[-1].result
    assert streamed is not None
    assert streamed.prompt_token_ids == llm.encode([USER], enable_thinking=False)


def test_what_a_template_has_no_use_for_is_refused(llm: LLM, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_tokenizer(tmp_path, chat_template=TEMPLATE.replace("enable_thinking", "ponder"))
    plain = LLM(tmp_path, dtype="float32", backend="native")
    with pytest.raises(ConfigError, match="thinking cannot be turned on or off"):
        plain.chat([USER], enable_thinking=True)
    with pytest.raises(ConfigError, match=r"'colour', but this model's chat template takes .*mood"):
        llm.chat([USER], chat_template_kwargs={"colour": 1})
    with pytest.raises(ConfigError, match="has 'messages'"):
        llm.chat([USER], chat_template_kwargs={"messages": []})
    with pytest.raises(ConfigError, match="give values by name"):
        llm.chat([USER], chat_template_kwargs=["mood"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="enable_thinking is 1"):
        llm.chat([USER], enable_thinking=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="enable_thinking has no effect on a prompt that is no chat"):
        list(llm.stream("abc", enable_thinking=False))


@pytest.mark.parametrize("messages", ["hi", [1, 2], ["a"], [[USER], "a"], USER, [], None])
def test_what_is_no_chat_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(PromptError):
        llm.chat(messages)


# -- several texts -----------------------------------------------------------------------------------------------------


def test_n_texts_of_each_prompt(llm: LLM) -> None:
    results = llm.generate(["abc", "de"], n=3, temperature=1.5, seed=2**64 - 2, max_tokens=8)
    assert [len(result.outputs) for result in results] == [3, 3]
    for prompt, result in zip(("abc", "de"), results, strict=True):
        assert result.outputs[0].text == result.text
        assert [output.seed for output in result.outputs] == [2**64 - 2, 2**64 - 1, 0]
        assert len({tuple(output.token_ids) for output in result.outputs}) == 3
        for output in result.outputs:
            alone = llm.generate(prompt, temperature=1.5, seed=output.seed, max_tokens=8)[0]
            assert alone.token_ids == output.token_ids
            assert alone.outputs == [alone]
    fresh = llm.generate("abc", n=2, temperature=1.5, max_tokens=8)[0]
    assert len({output.seed for output in fresh.outputs}) == 2
    mixed = llm.generate(["abc", "de"], [SamplingParams(max_tokens=2), SamplingParams(n=2, temperature=1.0)])
    assert [len(result.outputs) for result in mixed] == [1, 2]
    with pytest.raises(ConfigError, match="n is 2, but a stream has one text"):
        list(llm.stream("abc", n=2, temperature=1.0))
    assert pickle.loads(pickle.dumps(results[0])) == results[0]


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", 'a "quoted\\ \n one', "naïve 🙂"]}, '(?s)yes|no|a "quoted.* one|naïve 🙂'),
        ({"grammar": 'start: "x" /[0-9]{2}/ "y"'}, "x[0-9]{2}y"),
        ({"grammar": 'root ::= "x" digit "y"\ndigit ::= [0-9]'}, "x[0-9]y"),
        ({"json_schema": {"enum": ["red", 5]}}, '"red"|5'),
        ({"json_schema": '{"const": true}'}, "true"),
    ],
)
def test_a_text_has_the_form_that_is_asked_for(llm: LLM, structure: dict[str, Any], pattern: str) -> None:
    results = llm.generate(["abc", "de"], max_tokens=60, n=3, temperature=1.2, seed=1, **structure)
    texts = [output.text for result in results for output in result.outputs]
    streamed = "".join(piece.text for piece in llm.stream("abc", max_tokens=60, temperature=1.2, seed=1, **structure))
    assert streamed == texts[0]
    for text in texts:
        assert re.fullmatch(pattern, text), text


def test_schemas_of_pydantic(llm: LLM) -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Point", __config__={"extra": "forbid"}, x=(bool, ...), y=(bool, ...))
    found = json.loads(llm.generate("abc", max_tokens=80, json_schema=model)[0].text)
    assert set(found) == {"x", "y"}


def test_structures_that_cannot_be_used(llm: LLM) -> None:
    for structure in ({"regex": "("}, {"grammar": "no grammar"}, {"json_schema": {"type": "colour"}}):
        with pytest.raises(ConfigError, match="the grammar cannot be used"):
            llm.generate("abc", **structure)
    assert not llm.engine.has_work


def test_the_extra_is_named_where_it_is_missing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'hopskip\[structured\]'"):
        llm.generate("abc", regex="never compiled before")


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_reprs_are_short(llm: LLM) -> None:
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(max_tokens=5, temperature=0.7)) == "SamplingParams(max_new_tokens=5, temperature=0.7)"
    assert repr(SpeculativeConfig(draft="none")) == "SpeculativeConfig(draft='none')"
    [result] = llm.generate("abc", n=2, temperature=1, seed=1, max_tokens=90, ignore_eos=True)
    assert repr(result).startswith("GenerationResult(text=")
    assert "num_tokens=90, finish_reason='length', outputs=2)" in repr(result)
    assert len(repr(result)) < 250
    assert len(repr(result.stats)) < 400
    assert "num_cached_prompt_tokens" not in repr(hopskip.SpeculativeStats(num_tokens=3))
    assert repr(hopskip.Token(id=3, origin="target")) == "Token(id=3, origin='target')"
    assert "native" in repr(llm)
    assert "llama" in repr(llm)
    for piece in llm.stream("abc", max_tokens=2):
        assert len(repr(piece)) < 250
    assert len(repr(SamplingParams(stop=["x" * 1000]))) < 150


def test_completion_and_help_know_every_name() -> None:
    assert set(hopskip.__all__) <= set(dir(hopskip))
    text = pydoc.plain(pydoc.render_doc(hopskip))
    for name in hopskip.__all__:
        assert f"class {name}" in text, name
        assert getattr(hopskip, name).__doc__, name
    for words in ("enable_thinking", "Sample from the fewest tokens", "max_new_tokens: ", "finish_reason: "):
        assert words in text, words


def test_everything_public_has_a_docstring() -> None:
    for name in hopskip.__all__:
        kind = getattr(hopskip, name)
        for member, value in vars(kind).items():
            if member.startswith("_") or (is_dataclass(kind) and member in {item.name for item in fields(kind)}):
                continue
            if callable(value) or isinstance(value, property | classmethod):
                assert (value.fget if isinstance(value, property) else value).__doc__, f"{name}.{member}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_in_a_terminal_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hopskip.text.bar._SECONDS_UNTIL_BAR", -1.0)
    monkeypatch.setenv("TERM", "xterm")

    def shown(stream: io.StringIO, prompts: list[str], **options: Any) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        llm.generate(prompts, max_tokens=3, **options)
        return stream.getvalue()

    assert "Generating" in shown(Terminal(), ["a", "b", "c"])
    assert shown(io.StringIO(), ["a", "b", "c"]) == ""
    assert shown(Terminal(), ["a", "b", "c"], use_tqdm=False) == ""
    assert shown(Terminal(), ["a"]) == ""
    monkeypatch.setattr("hopskip.text.bar._SECONDS_UNTIL_BAR", 1000.0)
    assert shown(Terminal(), ["a", "b"]) == ""


def test_a_hopskip_error_is_what_everything_wrong_raises(llm: LLM) -> None:
    model: Any = llm
    for method, given in ((model.generate, None), (model.chat, "x"), (model.encode, 5)):
        with pytest.raises(HopskipError):
            method(given)


def test_a_schema_that_cannot_be_enforced_whole(llm: LLM) -> None:
    schema = {"type": "array", "maxItems": 2, "items": {"enum": ["a"]}, "uniqueItems": True}
    with pytest.warns(UserWarning, match="this is not enforced: uniqueItems at #"):
        [result] = llm.generate("abc", max_tokens=80, json_schema=schema)
    assert set(json.loads(result.text)) <= {"a"}
    with pytest.raises(ConfigError, match="strict, but this cannot be enforced: uniqueItems at #"):
        llm.generate("abc", json_schema=schema, strict_schema=True)
    with pytest.raises(ConfigError, match="strict_schema has no effect without json_schema"):
        SamplingParams(strict_schema=True)
    with pytest.raises(ConfigError, match="strict_schema is 1"):
        SamplingParams(strict_schema=1, json_schema=schema)  # type: ignore[arg-type]
