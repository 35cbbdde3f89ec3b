"""The core without PyTorch: the same tokens, and an error that names the extra wherever it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hopskip import LLM, SamplingParams, SpeculativeConfig
from tests.tiny import write_checkpoint, write_tokenizer

HERE = Path(__file__).parent
PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "top_k": 5, "seed": 2},
    {"temperature": 1.5, "top_p": 0.6, "seed": 3},
    {"temperature": 1.2, "min_p": 0.1, "seed": 4},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 5},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "temperature": 0.8, "seed": 6},
    {"frequency_penalty": -0.5, "temperature": 0.8, "seed": 7},
    {"logit_bias": {40: 3.0, 41: -100.0}, "temperature": 1.0, "seed": 8},
    {"logprobs": 3},
    {"choice": ["brown fox", "red fox"]},
    {"regex": "[a-f]{4,8}[.]", "temperature": 1.0, "seed": 9},
    {
        "json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        "seed": 10,
        "temperature": 1.3,
        "top_k": 50,
    },
]
PROGRAM = """
import json, sys
from hopskip import LLM, SamplingParams, SpeculativeConfig
folder, params = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, speculative=SpeculativeConfig(exit_layer=1, num_draft_tokens=3))
for given in params:
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    result = llm.generate(["The quick"], SamplingParams(max_new_tokens=24, **given))[0]
    print(json.dumps([result.token_ids, [token.logprob for token in result.tokens]]))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(HERE / "without_torch"), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path, **environment}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "smollm2")
    write_tokenizer(folder)
    return folder


def test_ids_and_their_probabilities_are_the_same(folder: Path) -> None:
    """With every sampling parameter, drafted, in a process where importing PyTorch fails."""
    llm = LLM(folder, speculative=SpeculativeConfig(exit_layer=1, num_draft_tokens=3))
    found = run("-c", PROGRAM, str(folder), json.dumps(PARAMS))
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    for given, (token_ids, logprobs) in zip(PARAMS, lines, strict=True):
        result = llm.generate(["The quick"], SamplingParams(max_new_tokens=24, **given))[0]
        assert result.token_ids == token_ids, given
        assert [token.logprob for token in result.tokens] == logprobs, given


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--backend", "torch", "Hi"),
        ("generate", "--device", "cuda", "Hi"),
        ("check", "--against", "transformers"),
        ("train", "exit", "recipes/smollm2-135m-exit.yaml"),
        ("train", "layerskip", "recipes/from-scratch-tiny.yaml"),
    ],
)
def test_what_needs_an_extra_names_it(folder: Path, arguments: tuple[str, ...]) -> None:
    model = () if arguments[0] == "train" else ("-m", str(folder))
    found = run("-m", "hopskip", *arguments, *model)
    assert found.returncode == 2, found.stderr
    assert "pip install 'hopskip[" in found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr


@pytest.mark.parametrize("arguments", [("info",), ("check", "--num-prompts", "3", "-n", "24", "--precision", "q8")])
def test_commands_do_without(folder: Path, arguments: tuple[str, ...]) -> None:
    found = run("-m", "hopskip", *arguments, "-m", str(folder))
    assert found.returncode == 0, found.stderr
