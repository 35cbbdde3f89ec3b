"""Two processes train as one does: DDP and FSDP2, on CPUs, through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hopskip.train.recipe import load_recipe
from hopskip.train.report import read_log
from hopskip.train.run import run
from tests.tiny import CORPUS, write_checkpoint

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|accelerate|peft)")

SCRIPT = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from accelerate.state import AcceleratorState
from hopskip.train.recipe import load_recipe
from hopskip.train.run import run
for path in sys.argv[1:]:
    AcceleratorState._reset_state()  # DDP and FSDP2 in one launch
    run(load_recipe(Path(path)))
torch.distributed.destroy_process_group()
"""
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, without dropout; two with DDP and with FSDP2; two with dropout, twice."""
    folder = tmp_path_factory.mktemp("runs")
    write_checkpoint(folder / "base", "smollm2", tokenizer=True)
    rows = [{"text": text[: 30 + n]} for n, text in enumerate(CORPUS * 4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, num_processes: int, p_max: float, **training: Any) -> str:
        settings = {
            "output": str(folder / name),
            "model": {"base": str(folder / "base")},
            "data": {"train": str(folder / "rows.jsonl"), "holdout_every": 12, "max_length": 128},
            "layerskip": {"p_max": p_max, "e_scale": 1.0, "rotation": 2},
            "training": {
                "max_steps": 20 if p_max == 0 else 4,
                "per_device_train_batch_size": 4 // num_processes,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                **training,
            },
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    run(load_recipe(Path(write("one", 1, 0.0))))
    two = [write("ddp", 2, 0.0), write("ddp-dropout", 2, 0.6), write("ddp-again", 2, 0.6)]
    two += [write("fsdp", 2, 0.0, **FSDP2), write("fsdp-dropout", 2, 0.6, **FSDP2, save_steps=2, save_strategy="steps")]
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        *two,
    ]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-8000:]
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind: str, runs: Path) -> None:
    one, two = losses(runs / "one"), losses(runs / kind)
    assert len(one) == 20
    assert one[-1] < one[0] - 0.3
    assert two == pytest.approx(one, abs=1e-4)
    expected, found = (read_log(runs / name / "log.jsonl")[-1] for name in ("one", kind))
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-3)
    mine, theirs = (load_file(runs / name / "model" / "model.safetensors") for name in (kind, "one"))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4)


def test_dropout_is_reproducible(runs: Path) -> None:
    first, again, sharded = (losses(runs / name) for name in ("ddp-dropout", "ddp-again", "fsdp-dropout"))
    assert first == again
    assert sharded == pytest.approx(first, abs=1e-4)  # the same decisions, however the weights are kept
    assert first != pytest.approx(losses(runs / "ddp")[:4], abs=1e-3)


def test_sharded_checkpoints_are_complete(runs: Path) -> None:
    checkpoint = runs / "fsdp-dropout" / "checkpoint-4"
    assert (checkpoint / "trainer_state.json").exists()
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not any((runs / "fsdp-dropout" / ".partial").glob("checkpoint-*"))
