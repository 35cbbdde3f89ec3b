"""Tokens a second, operations, and what a run says of itself while it trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.data import collate
from hopskip.train.report import RunLog
from hopskip.train.speed import Throughput, peak_flops, training_flops
from hopskip.train.trainer import LayerSkipTrainer
from tests.tiny import make_model


def test_micro_steps_count_from_beginning_to_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 12.0, 13.5, 20.0, 21.0))
    monkeypatch.setattr("hopskip.train.speed.time.perf_counter", lambda: next(now))
    throughput = Throughput()
    throughput.begin(5, 50.0)
    assert throughput.take() == [0, 0, 0]
    throughput.begin(7, 70.0)
    throughput.begin(9, 90.0)
    assert throughput.take() == [12, 120, 3.5]
    assert throughput.take() == [0, 0, 0]
    throughput.pause()  # the nine tokens took an unknown time
    throughput.begin(1, 10.0)
    throughput.begin(1, 10.0)
    assert throughput.take() == [1, 10, 1]


def test_operations_of_a_pass() -> None:
    model: Any = make_model("qwen3-tied")  # heads of 16, four of them; 64 wide, 3 layers, 320 tokens
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    expected = 30 * 3 * 2 * (layers + 2 * 320 * 64 + 3 * 4 * 16 * 10)
    assert training_flops(model, num_tokens=30, length=10, num_exits=2) == expected
    next(model.model.layers.parameters()).requires_grad_(False)
    assert training_flops(model, num_tokens=30, length=10, num_exits=2) == expected * 2 / 3


def test_the_device_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


def test_logs_have_tokens_per_second(tmp_path: Path) -> None:
    ids = torch.arange(3, 15)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
    )
    log = RunLog(tmp_path / "log.jsonl")
    trainer = LayerSkipTrainer(
        make_model("smollm2"),
        arguments,
        layerskip=LayerSkipRecipe(rotation=2),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
        data_collator=collate,
        callbacks=[log],
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["tokens_per_second"] > 0 and line["mfu"] > 0 for line in lines)


def test_the_rest_is_told_at_the_pace_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter((100.0, 700.0, 701.0))
    monkeypatch.setattr("hopskip.train.report.time.perf_counter", lambda: next(now))
    log = RunLog(tmp_path / "log.jsonl")
    state = SimpleNamespace(is_world_process_zero=True, global_step=10, max_steps=40)
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, logs={"loss": 1.0})  # nothing done yet
    state.global_step = 20
    log.on_log(None, state, None, logs={"loss": 1.0, "tokens_per_second": 1000.0})
    state.global_step = 40
    log.on_log(None, state, None, logs={"loss": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 10/40  loss 1.000",
        "step 20/40  loss 1.000, 1,000 tokens/s, 20 min left",
        "step 40/40  loss 1.000",
    ]
