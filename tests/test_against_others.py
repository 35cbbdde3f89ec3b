"""The comparison of `benchmarks/against_others.py`: its random file, its rows, and a short run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import against_others
from benchmarks.against_others import LLAMA_1B, Row, compare, show, write_random_q8_0

from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.weights import load_tensor
from hopskip.bench.contenders import gguf_bytes_per_token
from hopskip.bench.measure import PromptResult, Result
from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.loading import LoadConfig, load_backend
from hopskip.text.tokenizer_files import load_tokenizer
from tests.tiny import byte_level_tokenizer, make_model, write_gguf


def test_the_random_file_is_a_model_of_its_shape(tmp_path: Path) -> None:
    config = replace(
        LLAMA_1B, vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    path = tmp_path / "random.gguf"
    write_random_q8_0(path, config)
    checkpoint = open_checkpoint(path)
    # a file has these in float32
    assert checkpoint.config.rms_norm_eps == pytest.approx(1e-5)
    assert checkpoint.config.rope.rope_theta == 500_000
    assert replace(checkpoint.config, rms_norm_eps=1e-5, rope=config.rope) == config
    assert {stored.type.name for stored in map(checkpoint.stored, checkpoint.names())} == {"Q8_0", "F32"}
    num_weights = sum(shape[0] * shape[1] for shape in expected_tensors(config).values() if len(shape) > 1)
    assert gguf_bytes_per_token(path) == num_weights * 34 // 32 + 4 * 256 * 7
    assert float(load_tensor(checkpoint, "model.layers.1.mlp.down_proj.weight").std()) == pytest.approx(
        512**-0.5, rel=0.02
    )
    tokenizer = load_tokenizer(path, checkpoint.config)
    assert tokenizer.decode(tokenizer.encode("hello, world")) == "hello, world"
    backend = load_backend(checkpoint, LoadConfig(backend="torch", dtype="float32"))
    hidden_ND = backend.forward(list(range(5)), Rows([Segment(0, 0, 5)]), backend.new_cache(1, 8)).hidden_ND
    logits = torch.as_tensor(backend.logits(hidden_ND))
    assert bool(logits.isfinite().all())
    assert 0.1 < float(logits.std()) < 10, "numbers of a size that a model has"


def test_rows() -> None:
    def result(name: str, rates: list[float], reason: str | None = None) -> Result:
        prompts = [
            PromptResult(
                set="s", id=str(i), num_prompt_tokens=1, prefill_tokens_per_second=1.0, decode_tokens_per_second=rate,
                tokens_per_pass=1.0, mean_acceptance_length=1.0,
            )
            for i, rate in enumerate(rates)
        ]  # fmt: skip
        contender = against_others.theirs(name, Path("x.gguf"))
        return Result(contender=contender, status="absent" if reason else "measured", reason=reason, per_prompt=prompts)

    us, them = result("us", [30.0, 20.0, 50.0]), result("them", [10.0, 20.0, 20.0])
    row = compare("speed", us, them, against_others.DECODE, 2.0, 3.0)
    assert row.value == 2.5
    assert row.passes is True
    assert row.tokens_per_second == {"llama.cpp us": 30.0, "llama.cpp them": 20.0}
    assert "2.50 x  ok     (floor >= 2.0, aim 3.0" in show(row)
    assert compare("speed", us, them, against_others.DECODE, 2.6, 3.0).passes is False
    assert "MISSED" in show(replace(row, floor=2.6))
    slower = Row(measure="cost", value=2.4, floor=2.5, aim=1.8, at_most=True, tokens_per_second={})
    assert slower.passes is True
    assert replace(slower, value=2.6).passes is False
    absent = compare("speed", us, result("them", [], "on holiday"), against_others.DECODE, 2.0, 3.0)
    assert absent.value is absent.passes is None
    assert "not measured: llama.cpp them is absent: on holiday" in show(absent)


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "tiny.gguf"
    write_gguf(model, make_model("llama2-mha"), tokenizer=byte_level_tokenizer())
    monkeypatch.setenv("HOPSKIP_CACHE", "")  # the script sets it
    options = ["--model", str(model), "--only", "prefill", "--repeats", "1", "--num-tokens", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["against_others.py", *options])
    assert against_others.main() == 0
    line, _, rest = capsys.readouterr().out.partition("\n")
    assert line.startswith("prefill of 512 tokens, q8 against llama.cpp Q8_0")
    report = json.loads(rest)
    (row,) = report["rows"]
    assert row["tokens_per_second"]["hopskip q8"] > 0
    assert row["value"] is not None or "llama.cpp" in row["reason"]
    assert report["machine"]["read_bytes_per_second"] > 0
    monkeypatch.setattr(sys, "argv", ["against_others.py", "--model", str(tmp_path / "none.gguf")])
    assert against_others.main() == 2
    assert "none.gguf does not exist" in capsys.readouterr().err
