"""A model's own generation settings: read from folders and GGUF files, the defaults of Python, commands and server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hopskip import LLM, CheckpointError, ConfigError, SamplingParams, SpeculativeConfig
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.generation import of_gguf, recommended_sampling
from hopskip.cli import app
from hopskip.sampling_params import with_defaults
from hopskip.serve.jobs import Planner
from hopskip.serve.schema import CompletionRequest
from hopskip.serve.settings import ServeSettings
from tests.tiny import make_model, write_checkpoint, write_gguf

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 1}
RECOMMENDED = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("generation", "found"),
    [
        ({}, {}),
        (QWEN, RECOMMENDED),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": -1, "min_p": 0.1}, {"temperature": 1.0, "top_k": 0, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {}),
        ({"top_p": 0.9, "max_new_tokens": 7, "num_beams": 4}, {}),
        ({"temperature": None, "top_p": None, "do_sample": None}, {}),
        ({"temperature": 1, "top_k": 20.0}, {"temperature": 1, "top_k": 20}),
    ],
)
def test_what_the_makers_recommend(generation: dict[str, Any], found: dict[str, Any]) -> None:
    assert recommended_sampling(generation, "here") == found
    with_defaults({}, found)


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 0.5, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"temperature": 0.5, "min_p": [1]}, "min_p is [1]"),
        ({"temperature": 0.5, "top_k": float("inf")}, "top_k is inf"),
    ],
)
def test_settings_that_cannot_be(generation: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        recommended_sampling(generation, "there")
    assert str(error.value).startswith(f"there: {named}")
    assert "generation_config 'none'" in str(error.value)


def test_settings_of_gguf_files(tmp_path: Path) -> None:
    keys = {"temp": 0.25, "top_k": 20, "top_p": 0.5, "min_p": 0.125, "penalty_repeat": 1.5, "mirostat": 0}
    metadata = {f"general.sampling.{key}": value for key, value in keys.items()}
    found = {"temperature": 0.25, "top_k": 20, "top_p": 0.5, "min_p": 0.125, "repetition_penalty": 1.5}
    assert of_gguf(metadata) == found
    assert of_gguf({}) == {}
    write_gguf(tmp_path / "m.gguf", make_model("smollm2"), metadata=metadata)
    assert open_checkpoint(tmp_path / "m.gguf").generation == found


def test_what_was_asked_for_comes_first() -> None:
    assert with_defaults({}, RECOMMENDED) == SamplingParams(**RECOMMENDED)  # type: ignore[arg-type]
    assert with_defaults({"top_p": 0.5}, RECOMMENDED) == SamplingParams(**{**RECOMMENDED, "top_p": 0.5})  # type: ignore[arg-type]
    assert with_defaults({"temperature": 0.2}, RECOMMENDED).top_k == 20
    for zero in (0, 0.0):
        assert with_defaults({"temperature": zero, "max_new_tokens": 3}, RECOMMENDED) == SamplingParams(
            max_new_tokens=3
        )
    assert with_defaults({}, {}) == SamplingParams()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    (folder / "generation_config.json").write_text(json.dumps(QWEN))
    return folder


def test_defaults_in_python(model: Path) -> None:
    """Drafted or not, a drawn text is the same by its seed, and what is asked for is taken as it is."""
    llm = LLM(model)
    assert llm.recommended_sampling == RECOMMENDED
    (asked,) = llm.requests("hello", max_tokens=3, top_k=5)[0]
    assert asked.params == SamplingParams(**{**RECOMMENDED, "max_new_tokens": 3, "top_k": 5})  # type: ignore[arg-type]
    assert llm.requests("hello", temperature=0)[0][0].params == SamplingParams()
    assert llm.requests("hello", SamplingParams(max_new_tokens=3))[0][0].params == SamplingParams(max_new_tokens=3)
    drawn = llm.generate("hello")[0]
    *_, streamed = llm.stream("hello")
    assert drawn.seed is not None
    assert streamed.seed is not None
    again = SamplingParams(**RECOMMENDED, seed=drawn.seed)  # type: ignore[arg-type]
    plain = LLM(model, speculative=SpeculativeConfig(draft="none"))
    assert plain.generate("hello", again)[0].token_ids == drawn.token_ids == llm.generate("hello", again)[0].token_ids
    assert llm.generate("hello", SamplingParams(max_new_tokens=2))[0].seed is None
    greedy = LLM(model, generation_config="none")
    assert greedy.generate("hello")[0].seed is None
    with pytest.raises(ConfigError, match="generation_config is 'vllm'; choose one of auto, none"):
        LLM(model, generation_config="vllm")  # type: ignore[arg-type]


def test_damaged_settings_can_be_left_aside(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match="temperature is 'warm'"):
        LLM(tmp_path)
    assert LLM(tmp_path, generation_config="none").recommended_sampling == {}


def generated(model: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["generate", "-m", str(model), "--json", "-n", "3", *options, "hello"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["settings"]["sampling"]
    assert found["max_new_tokens"] == 3
    return {name: found[name] for name in RECOMMENDED}


GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


def test_defaults_of_the_command_line(model: Path) -> None:
    assert generated(model) == RECOMMENDED
    assert generated(model, "--top-k", "5") == {**RECOMMENDED, "top_k": 5}
    assert generated(model, "--greedy") == generated(model, "--temperature", "0") == GREEDY
    assert generated(model, "--greedy", "--temperature", "0") == GREEDY
    assert generated(model, "--generation-config", "none") == GREEDY
    assert generated(model, "--generation-config", "none", "--temperature", "0.5", "--top-p", "0.5") == {
        **GREEDY,
        "temperature": 0.5,
        "top_p": 0.5,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--greedy", "--temperature", "0.5"], "--greedy and --temperature 0.5 contradict each other"),
        (["--generation-config", "vllm"], "--generation-config is 'vllm'; choose one of auto, none"),
        (["--top-p", "7"], "--top-p is 7.0"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "hello"], ["chat"]])
def test_wrong_options_cost_no_loading(command: list[str], options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [*command, "-m", "/nonexistent/model", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_defaults_of_a_server(model: Path) -> None:
    """A client's own values come first, then the makers', then OpenAI's."""

    def params(llm: LLM, **fields: Any) -> SamplingParams:
        request = CompletionRequest(prompt="hello", max_tokens=3, **fields)
        plan = asyncio.run(Planner(llm, ServeSettings(model_name="tiny")).completion(request))
        return plan.jobs[0].request.params

    def kept(found: SamplingParams) -> dict[str, Any]:
        return {name: getattr(found, name) for name in RECOMMENDED}

    llm = LLM(model)
    assert kept(params(llm)) == RECOMMENDED
    assert kept(params(llm, temperature=None, top_p=None)) == RECOMMENDED
    assert kept(params(llm, temperature=0.3, top_k=3)) == {**RECOMMENDED, "temperature": 0.3, "top_k": 3}
    assert kept(params(llm, top_p=1.0)) == {**RECOMMENDED, "top_p": 1.0}
    assert kept(params(llm, temperature=0, top_p=0.5, top_k=4, min_p=0.5, seed=3)) == GREEDY
    assert params(llm, seed=2**63 - 1).seed == 2**63 - 1
    assert kept(params(llm, temperature=0, repetition_penalty=1.5)) == {**GREEDY, "repetition_penalty": 1.5}
    plain = LLM(model, generation_config="none")
    assert kept(params(plain)) == {**GREEDY, "temperature": 1.0}
    assert params(plain, presence_penalty=0.5, min_p=0.25).min_p == 0.25
