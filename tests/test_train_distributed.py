"""Two processes train as one does: DDP and FSDP2, on CPUs, through gloo; and share a stream between them."""

from __future__ import annotations

import itertools
import json
import os
import socket
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
import json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
prepare = AcceleratorState.__init__
def sharding_on_cpus(self, *args, fsdp_plugin=None, **kwargs):
    prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:  # accelerate would go on without a word, and shard nothing
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
AcceleratorState.__init__ = sharding_on_cpus
from hopskip.train.recipe import load_recipe
from hopskip.train.run import run
from hopskip.train.trainer import LayerSkipTrainer
original = LayerSkipTrainer.training_step
def noting(self, model, inputs, *rest):
    with open(f"{self.args.output_dir}/seen-{self.args.process_index}.jsonl", "a") as file:
        file.writelines(json.dumps(ids) + "\\n" for ids in inputs["input_ids"].tolist())
    return original(self, model, inputs, *rest)
LayerSkipTrainer.training_step = noting
for path in sys.argv[1:]:
    AcceleratorState._reset_state()  # DDP and FSDP2 in one launch
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    run(load_recipe(Path(path)))
torch.distributed.destroy_process_group()
"""
FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
RECOMPUTED = {"fsdp": True, "fsdp_config": {**FSDP2["fsdp_config"], "activation_checkpointing": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, without dropout; two with DDP and with FSDP2; two with dropout, twice; two that share a stream."""
    folder = tmp_path_factory.mktemp("runs")
    write_checkpoint(folder / "base", "smollm2", tokenizer=True)
    rows = [{"text": f"{n} {text[: 30 + n]}"} for n, text in enumerate(CORPUS * 4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, num_processes: int, p_max: float, **training: Any) -> str:
        settings = {
            "output": str(folder / name),
            "model": {"base": str(folder / "base")},
            "data": {
                "train": str(folder / "rows.jsonl"),
                "holdout_every": 12,
                "max_length": 128,
                "streaming": training.pop("streaming", False),
            },
            "layerskip": {"p_max": p_max, "e_scale": 1.0, "rotation": 2},
            "training": {
                "max_steps": 20 if p_max == 0 else 4,
                "per_device_train_batch_size": 4 // num_processes,
                "per_device_eval_batch_size": 3,  # of four rows: accelerate fills the last batch with rows seen before
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
    run(load_recipe(Path(write("shorter", 1, 0.0, max_steps=5))))
    two = [write("ddp", 2, 0.0), write("ddp-dropout", 2, 0.6), write("ddp-again", 2, 0.6)]
    two += [write("fsdp", 2, 0.0, **FSDP2), write("fsdp-dropout", 2, 0.6, **FSDP2, save_steps=2, save_strategy="steps")]
    two += [
        write("fsdp-recomputed", 2, 0.6, **RECOMPUTED),
        write("own-means", 2, 0.6, average_tokens_across_devices=False),
    ]
    two += [write("stream", 2, 0.0, streaming=True, dataloader_num_workers=1)]
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
    on_two_nodes(script, write("nodes", 2, 0.0, max_steps=5), environment)
    return folder


def on_two_nodes(script: Path, recipe: str, environment: dict[str, str]) -> None:
    """Two launchers, as on two machines that share a file system, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for node in (0, 1):
        place = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", "1", str(script), recipe]
        launchers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [launcher.communicate()[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors[0][-4000:] + errors[1][-4000:]


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


def test_two_nodes_train_as_one(runs: Path) -> None:
    one, two = losses(runs / "shorter"), losses(runs / "nodes")
    assert len(two) == 5
    assert two == pytest.approx(one, abs=1e-4)


def test_dropout_is_reproducible(runs: Path) -> None:
    first, again, sharded = (losses(runs / name) for name in ("ddp-dropout", "ddp-again", "fsdp-dropout"))
    assert first == again
    assert sharded == pytest.approx(first, abs=1e-4)  # the same decisions, however the weights are kept
    assert first != pytest.approx(losses(runs / "ddp")[:4], abs=1e-3)


def test_recomputed_layers_drop_the_same_samples(runs: Path) -> None:
    assert losses(runs / "fsdp-recomputed") == pytest.approx(losses(runs / "fsdp-dropout"), abs=1e-4)


def test_ranks_may_have_means_of_their_own(runs: Path) -> None:
    """Where every rank divides by its own tokens, a loss of nearly the same size."""
    own, shared = losses(runs / "own-means"), losses(runs / "ddp-dropout")
    assert own == pytest.approx(shared, rel=0.2)
    assert own != pytest.approx(shared, abs=1e-6)


def test_a_stream_is_read_once_by_two_processes(runs: Path) -> None:
    """Every pass over the data has each row once, through ranks and workers."""
    seen = []
    for rank in range(2):
        lines = (runs / "stream" / f"seen-{rank}.jsonl").read_text().splitlines()
        share = [tuple(itertools.takewhile(bool, json.loads(line))) for line in lines]
        assert len(share) == 20 * 2 * 2
        assert share[:22] == share[22:44] == share[44:66]  # pass after pass, in the order of the source
        assert len(set(share[:22])) == 22
        seen += share[:22]
    assert len(set(seen)) == 44  # of 48, four of which are held out


def test_sharded_checkpoints_are_complete(runs: Path) -> None:
    checkpoint = runs / "fsdp-dropout" / "checkpoint-4"
    assert (checkpoint / "trainer_state.json").exists()
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not any((runs / "fsdp-dropout" / ".partial").glob("checkpoint-*"))
