"""The command `hopskip bench`: its report, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from typer.testing import Result as ClickResult

from hopskip.bench import measure as measuring
from hopskip.bench.contenders import Contender
from hopskip.bench.measure import Result
from hopskip.cli import app
from hopskip.version import stamp
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return folder


def invoke(checkpoint: Path, *arguments: str) -> ClickResult:
    short = ["-n", "8", "--num-prompts", "2", "--repeats", "1", "--backend", "torch", "--threads", "1"]
    return CliRunner().invoke(app, ["bench", "--model", str(checkpoint), *short, *arguments])


def test_command_reports_json(checkpoint: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    arguments = ["--against", "transformers,llama.cpp", "--draft", "ngram", "--prompts", "alpaca", "--prompts", "gsm8k"]
    pytest.importorskip("matplotlib")
    result = invoke(checkpoint, *arguments, "--json", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == [*stamp(), "machine", "versions", "settings", "contenders"]
    assert found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in found["versions"]["torch"]
    contenders = {c["name"]: c for c in found["contenders"]}
    assert list(contenders)[:4] == ["hopskip", "hopskip-plain", "transformers-float32", "transformers-bfloat16"]
    for name in list(contenders)[:4]:
        entry = contenders[name]
        assert entry["status"] == "measured"
        assert entry["decode_tokens_per_second"] > 0
        assert entry["prefill_tokens_per_second"] > 0
        assert entry["mbu"] > 0
        assert entry["mean_acceptance_length"] >= 1
        assert [p["set"] for p in entry["per_prompt"]] == ["alpaca", "alpaca", "gsm8k", "gsm8k"]
        assert set(entry["by_set"]) == {"alpaca", "gsm8k"}
    assert contenders["hopskip"]["lossless"] is True
    theirs = [c for name, c in contenders.items() if name.startswith("transformers")]
    assert [c["quoted"] for c in sorted(theirs, key=lambda c: c["decode_tokens_per_second"])] == [False, True]
    assert contenders["hopskip"]["quoted"]
    assert contenders["hopskip-plain"]["lossless"] is None
    assert set(contenders["hopskip"]["decode_ratio_to"]) == set(list(contenders)[1:4])
    assert list(contenders.values())[4]["status"] == "absent"  # the checkpoint is no GGUF file
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_prints_a_table(checkpoint: Path) -> None:
    result = invoke(checkpoint, "--draft", "none")
    assert result.exit_code == 0, result.output
    assert "hopskip-plain" in result.stdout
    assert "mean of sets" not in result.stdout, "there is nothing to set beside plain decoding"
    assert "…" not in result.stdout
    assert "mean of sets" in invoke(checkpoint, "--draft", "ngram").stdout
    assert "GB/s read" in result.stdout


@pytest.mark.parametrize(("ratio", "is_told"), [(0.91, True), (1.0, False), (1.4, False)])
def test_a_slower_draft_is_told_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, is_told: bool
) -> None:
    monkeypatch.setattr(measuring, "ratio", lambda *_: ratio)
    text = " ".join(invoke(checkpoint, "--draft", "ngram").stdout.split())
    assert (f"plain decoding is faster than hopskip here ({ratio:.2f} x)" in text) == is_told
    assert "faster than hopskip-plain" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--repeats", "-1"], "repeats is -1"),
        (["-n", "1"], "--max-new-tokens is 1"),
        (["-n", "5000"], "the model's context holds 1024"),
        (["--against", "vllm"], "'vllm'"),
        (["--against", "llama.cpp", "--llama-cpp-model", "none.gguf"], "none.gguf"),
        (["--setting", "quantize=q8"], ": quantize=q8 needs the native CPU backend"),
        (["--dtype", "int3"], "int3"),
        (["--exit-layer", "3"], "--exit-layer is 3; this model has"),
        (["--threads=0"], "--threads is 0"),
        (["--device", "cuda"], "'cuda'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint: Path, arguments: list[str], message: str) -> None:
    result = invoke(checkpoint, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_failure_of_our_own_is_exit_code_1(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(contenders: list[Contender], *rest: object, **options: object) -> list[Result]:
        return [Result(contender=c, status="failed", reason="broken") for c in contenders]

    monkeypatch.setattr(measuring, "measure", fail)
    result = invoke(checkpoint)
    assert result.exit_code == 1
    assert "hopskip: failed: broken" in result.stdout
