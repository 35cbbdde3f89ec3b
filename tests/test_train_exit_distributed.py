"""Two processes train an exit as one does, through gloo; and what a kill interrupts goes on bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.train.exit.conversations import read_conversations
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.exit.run import run
from hopskip.train.recipe import make
from tests.tiny import write_checkpoint

pytest.importorskip("matplotlib")

BEGIN = """
import json, os, random, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import hopskip.train.exit.collect as collect
from dataclasses import replace
from hopskip.train.exit.processes import agreed
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.exit.run import run
from hopskip.train.recipe import make
collect.SHARD_CHATS = 8
recipes = [make(ExitRecipe, json.loads(recipe), "") for recipe in sys.argv[1:]]
"""
TOGETHER = """
for recipe in recipes:
    recipe = agreed(replace(recipe, vocabulary=recipe.vocabulary + int(os.environ["RANK"])))
    run(recipe, report=lambda line: print(line, flush=True))
torch.distributed.destroy_process_group()
"""
KILLED = """
replace = Path.replace

def attempt(recipe, last):
    # In a process of its own, which kills itself at an event: whatever is told, and before and after each file is put
    # into place. Returns how many there were, or None.
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        num_events = 0
        def event(*told):
            nonlocal num_events
            num_events += 1
            if num_events == last:
                os.kill(os.getpid(), signal.SIGKILL)
        def watched(self, target):
            event()
            result = replace(self, target)
            event()
            return result
        Path.replace = watched
        run(recipe, report=lambda line: None, progress=event)
        os.write(writing, str(num_events).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return int(os.read(reading, 100)) if status == 0 else None

whole, killed = recipes
num_events = attempt(whole, 0)
rng = random.Random(0)
kills = 0
while attempt(killed, rng.randrange(1, num_events // 3) if kills < 8 else 0) is None:
    kills += 1
print(kills)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_checkpoint(folder / "model", tokenizer=True)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"turns": [f"number {i}", "and then?"]}) + "\n" for i in range(30))
    )
    return folder


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    stage = {"num_tokens": 900, "batch_tokens": 100, "eval_every": 200, "unroll_steps": 2, "learning_rate": 1e-3}
    return {
        "output": str(folder / name),
        "base": str(folder / "model"),
        "prompts": {"files": [str(folder / "prompts.jsonl")]},
        "collect": {"precision": "float32", "max_new_tokens": 12, **changes.pop("collect", {})},
        "branches": [{"start": 0, "num_layers": 1, "features": ["50%", "100%"]}],
        "vocabulary": 100,
        "stages": [{**stage, **changes.pop("stage", {})}],
        "held_out_every": 5,
        "search": {"num_prompts": 1, "max_new_tokens": 6, "num_draft_tokens": [1], "num_runner_ups": [0], "repeats": 1,
                   "max_repeats": 1, "least_speedup": 0},
        "device": "cpu",
        "threads": 1,
        **changes,
    }  # fmt: skip


def state(folder: Path, name: str) -> dict[str, Any]:
    (path,) = (folder / name).glob("s0-b1-*/stage-0/state.pt")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def test_two_processes_train_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each collects shards of its own and has every other batch; and made anew by each, the states are the same."""
    monkeypatch.setattr("hopskip.train.exit.collect.SHARD_CHATS", 8)
    one = settings(folder, "one", stage={"gradient_accumulation_steps": 2})
    run(make(ExitRecipe, one, ""), report=lambda line: None)
    both = {"two": "stored", "on-the-fly": "on-the-fly"}
    recipes = [json.dumps(settings(folder, name, collect={"states": states})) for name, states in both.items()]
    (folder / "together.py").write_text(BEGIN + TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(folder / "together.py"), *recipes]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("try it:") == 2, "the first process reports"
    for name in both:
        assert len(list((folder / name / "data").glob("*"))) == 4
        expected, found = state(folder, "one"), state(folder, name)
        assert found["progress"]["step"] == expected["progress"]["step"] > 2
        for weights, tensor in found["trainer"].items():
            torch.testing.assert_close(tensor, expected["trainer"][weights], rtol=1e-3, atol=1e-5)
        for ours, theirs in zip(found["log"], expected["log"], strict=True):
            assert ours["num_tokens"] == theirs["num_tokens"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["acceptance"] == pytest.approx(theirs["acceptance"], abs=0.02)
        TrainedExit.load(folder / name / "exit")
    assert read_conversations(folder / "on-the-fly" / "data")[1][0].states_TAD is None


def test_a_run_that_is_killed_goes_on_bit_by_bit(folder: Path) -> None:
    """Up to eight times, at random moments."""
    (folder / "killed.py").write_text(BEGIN + KILLED)
    recipes = [json.dumps(settings(folder, name, stage={"eval_every": 100})) for name in ("whole", "killed")]
    command = [sys.executable, str(folder / "killed.py"), *recipes]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3
    expected, found = state(folder, "whole"), state(folder, "killed")
    assert found["progress"] == expected["progress"]
    for name, tensor in expected["trainer"].items():
        assert torch.equal(tensor, found["trainer"][name]), name
    for each in (found, expected):
        for line in each["log"]:
            del line["tokens_per_second"]
    assert found["log"] == expected["log"]
    (log,) = (folder / "killed").glob("s0-b1-*/stage-0/log.jsonl")
    assert len(log.read_text().splitlines()) == len(found["log"])
