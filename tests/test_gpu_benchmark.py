"""`benchmarks/gpu.py`: the whole script on tiny models on the CPU, and that a failure costs its own section only."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import pytest
import torch
from benchmarks import gpu

from hopskip.static.decoder import Generated, StaticDecoder
from hopskip.stats import SpeculativeStats


def test_the_whole_script(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu", "--tiny", "--models", "llama-3-8b", "--budget", "inf"])
    report = json.loads(capsys.readouterr().out)
    for found in [report["models"]["llama-3-8b"]]:
        assert not [name for name, section in found.items() if isinstance(section, dict) and "error" in section]
        passes = found["passes"]
        assert len(passes["verify_ms_by_rows"]) == 8
        assert min(passes["draft_step_ms"], passes["plain_ms"]) > 0
        rates = [found[f"acceptance {wanted}"] for wanted in (0.5, 0.7, 0.9)]
        drafted = [*rates, *(found[f"draft in {precision}"] for precision in ("int8", "float8", "int4"))]
        assert all(rate["same_ids"] and rate["tokens_per_second"] > 0 for rate in drafted)
        assert rates[0]["acceptance_rate_per_tested_token"] < rates[2]["acceptance_rate_per_tested_token"] <= 1
        sizes = [found[f"all in {precision}"]["plain_bytes"] for precision in ("int8", "int4")]
        assert passes["plain_bytes"] > 3 * sizes[0] > 4 * sizes[1]
    aims = report["aims"]
    assert aims["speedup at acceptance 0.7 >= 2.2"] == report["models"]["llama-3-8b"]["acceptance 0.7"]["speedup"]
    assert None not in aims.values()


def arguments(**changes: Any) -> argparse.Namespace:
    settings = {"device": "cpu", "tiny": True, "models": ["llama-2-7b"], "kernels": "auto", "budget": math.inf}
    return argparse.Namespace(**{**settings, **changes})


def test_a_section_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: gpu.Measurement, *wanted: float) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    for name in ("_speed", "_cheap_draft", "_packed"):
        monkeypatch.setattr(gpu.Measurement, name, fail)
    report = gpu.measure(arguments())
    found = report["models"]["llama-2-7b"]
    assert found["acceptance 0.7"] == {"error": "RuntimeError: out of memory"}
    assert found["passes"]["plain_ms"] > 0
    assert set(report["aims"].values()) == {None}


def test_a_model_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *rest: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu, "Measurement", build)
    models = gpu.measure(arguments(models=["llama-2-7b", "llama-3-8b"]))["models"]
    assert [model["error"] for model in models.values()] == ["OutOfMemoryError: too large"] * 2


def test_no_section_begins_after_the_budget() -> None:
    found = gpu.measure(arguments(budget=-1.0))["models"]["llama-2-7b"]
    assert found.pop("seconds") > 0
    assert all(section == {"skipped": "no time left"} for section in found.values())
    assert len(found) == 11


def test_acceptance_counts_only_tokens_that_were_looked_at() -> None:
    stats = SpeculativeStats()
    for num_accepted in (0, 2, 4):
        stats.record_draft(4, num_accepted, depth=4)
    # one token was looked at in the first round, three in the second, four in the third
    assert gpu.acceptance([Generated(stats=stats)]) == 6 / 8


def test_the_dial_turns_acceptance() -> None:
    shape = gpu.tiny(gpu.SHAPES["llama-3-8b"])
    synthetic = gpu.SyntheticModel(shape, torch.float32, torch.device("cpu"))
    config = gpu.SpeculativeConfig(draft="early-exit", exit_layer=shape.exit_layer, num_draft_tokens=4)
    decoder = StaticDecoder(synthetic.model, config, max_model_len=64)
    rates = []
    for gain in (1e-4, 0.5, 20.0):
        synthetic.set_gain(gain)
        rates.append(gpu.acceptance(decoder.generate([[1, 2, 3]], 32)))
    assert rates[0] > 0.9  # the end of the text cuts the last draft
    assert rates[0] > rates[1] > rates[2]
