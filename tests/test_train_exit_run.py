"""From a recipe to an exit that drafts: the prompts, and whole runs by the command line."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from typer.testing import CliRunner

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.cli import app, progress
from hopskip.errors import ConfigError
from hopskip.train.exit.distill import ExitTrainer
from hopskip.train.exit.processes import check_trackers, make_accelerator
from hopskip.train.exit.prompts import self_prompts
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.exit.run import run
from hopskip.train.recipe import make
from hopskip.version import stamp
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return open_checkpoint(folder)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_that_the_model_writes_itself(checkpoint: Checkpoint) -> None:
    """They are what the whole model samples after the head of a user turn, as `LLM` has it, less the unfinished."""
    llm = LLM(checkpoint.path, speculative=SpeculativeConfig(draft="none"), max_num_seqs=8)
    settings = {"openings": ("", "hello"), "max_tokens": 80, "seed": 5}
    found = list(self_prompts(llm.tokenizer, llm.engine, 50, **settings))  # type: ignore[arg-type]
    params = SamplingParams(max_new_tokens=80, temperature=1.0, top_k=50)
    heads = [llm.tokenizer.encode("<|im_start|>user\n" + text, add_special_tokens=False) for text in ("", "hello")]
    results = llm.generate([heads[i % 2] for i in range(50)], [replace(params, seed=5 + i) for i in range(50)])
    texts = [("", "hello")[i % 2] + result.text for i, result in enumerate(results) if result.finish_reason == "stop"]
    expected = [text.strip() for text in texts if len(text.split()) >= 4]
    assert found == list(dict.fromkeys(expected))
    assert 0 < len(found) < 50


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_recipe_makes_an_exit_that_drafts(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("_FIRST_LINE", "_NEXT_LINES"):  # say all that is told
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr(sys.modules["hopskip.cli.train"], "progress", partial(progress.progress, undisturbed=True))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i} and {i * i}"}) + "\n" for i in range(12)))
    excluded = tmp_path / "excluded.jsonl"
    excluded.write_text(json.dumps({"turns": ["number 3 and 9"]}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
output: {tmp_path / "run"}
base: {checkpoint.path}
prompts: {{files: [{prompts}], exclude: [{excluded}]}}
collect: {{precision: float32, max_new_tokens: 12}}
branches: [{{start: 0, num_layers: 1, features: [2, 3]}}, {{start: 1, num_layers: 0}}]
vocabulary: 40
stages: [{{num_tokens: 200, batch_tokens: 60, eval_every: 100, unroll_steps: 2}}]
held_out_every: 3
search: {{num_prompts: 1, max_new_tokens: 8, num_draft_tokens: [1, 2], vocabulary: [8],
  repeats: 1, max_repeats: 1, least_speedup: 0}}
threads: 1
"""
    )
    result = CliRunner().invoke(app, ["train", "exit", str(recipe)])
    assert result.exit_code == 0, result.output
    assert f"GB in {tmp_path / 'run'}" in result.output
    assert (
        f"try it: hopskip generate --model {checkpoint.path} --exit-branch {tmp_path / 'run' / 'exit'}" in result.output
    )
    best = TrainedExit.load(tmp_path / "run" / "exit")
    best.check_base(checkpoint.fingerprint)
    best.check(checkpoint.config)
    assert len(best.vocabulary) <= 40
    shares = best.notes["held_out_acceptance"]
    assert len(shares) == best.num_draft_tokens
    assert all(0 <= later <= earlier <= 1 for earlier, later in itertools.pairwise(shares))
    candidates = json.loads((tmp_path / "run" / "search.json").read_text())["candidates"]
    assert stamp().items() <= best.notes.items()
    for done in ("collecting text", "training s0-b1-f2.3, stage 1 of 1"):
        assert re.search(rf"^hopskip: {done}: \d+ %", result.stderr, re.MULTILINE), result.stderr
    assert len(candidates) == 2 * 2 * 2 * 3  # exits, vocabularies, draft lengths, runner-ups
    fastest = max(candidates, key=lambda found: found["over_plain_decoding"])
    assert fastest["vocabulary"] == len(best.vocabulary)
    assert (fastest["start"], fastest["num_draft_tokens"]) == (best.config.start, best.num_draft_tokens)
    coverage = {found["vocabulary"]: found["held_out_coverage"] for found in candidates}
    assert len(coverage) == 2
    assert coverage[8] < coverage[max(coverage)]
    assert "number 3 and 9" not in (tmp_path / "run" / "prompts.jsonl").read_text()
    assert (tmp_path / "run" / "s0-b1-f2.3" / "acceptance.png").stat().st_size > 5000
    speculative = SpeculativeConfig(draft="exit-branch", exit_branch=tmp_path / "run" / "exit")
    generated = LLM(checkpoint.path, speculative=speculative).generate(
        "number", SamplingParams(max_new_tokens=8, ignore_eos=True)
    )[0]
    assert generated.stats.num_drafts > 0
    for setting in ("stages=[]", "search.vocabulary=[40]"):
        wrong = CliRunner().invoke(app, ["train", "exit", str(recipe), setting])
        assert wrong.exit_code == 2
        assert setting.split("=")[0] in wrong.output
    # nothing to train: no stage is needed
    overrides = [f"output={tmp_path / 'plain'}", "stages=[]", "branches=[{start: 1, num_layers: 0}]"]
    plain = CliRunner().invoke(app, ["train", "exit", str(recipe), *overrides])
    assert plain.exit_code == 0, plain.output
    assert TrainedExit.load(tmp_path / "plain" / "exit").layers == []
    # what gains nothing is not chosen, and another model has a folder of its own
    overrides = ["output=" + str(tmp_path / "{model}"), *overrides[1:], "search.least_speedup=99"]
    (tmp_path / "mine").symlink_to(checkpoint.path)
    slow = CliRunner().invoke(app, ["train", "exit", str(recipe), "--model", str(tmp_path / "mine"), *overrides])
    assert slow.exit_code == 2
    assert "no candidate is worth using" in slow.output
    assert not (tmp_path / "mine" / "exit").exists()
    assert not (tmp_path / "run" / "mine").exists()


def test_a_run_can_start_from_another_models_exit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer = ExitTrainer(checkpoint, ExitConfig(start=0, num_layers=1, features=(2, 3)), torch.arange(320))
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    trainer.trained_exit("of another model", 2).save(tmp_path / "initial")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(6)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
output: {tmp_path / "run"}
base: {checkpoint.path}
prompts: {{files: [{tmp_path / "prompts.jsonl"}]}}
collect: {{precision: float32, max_new_tokens: 12}}
branches: [{{start: 0, num_layers: 1, features: [2, 3]}}]
initial: {tmp_path / "initial"}
stages: [{{num_tokens: 1, learning_rate: 1.0, eval_every: 1, unroll_steps: 1}}]  # its one step has a rate of zero
precision: bfloat16
held_out_every: 3
search: {{num_prompts: 1, max_new_tokens: 8, num_draft_tokens: [1], num_runner_ups: [0],
  repeats: 1, max_repeats: 1, least_speedup: 0}}
threads: 1
"""
    )
    result = CliRunner().invoke(app, ["train", "exit", str(recipe)])
    assert result.exit_code == 0, result.output
    found = TrainedExit.load(tmp_path / "run" / "exit")
    found.check_base(checkpoint.fingerprint)
    for name, tensor in TrainedExit.load(tmp_path / "initial").tensors().items():
        assert np.array_equal(found.tensors()[name], tensor), name
    wrong = CliRunner().invoke(app, ["train", "exit", str(recipe), "branches=[{start: 1, num_layers: 1}]"])
    assert wrong.exit_code == 2
    assert "add it to branches" in wrong.output


# -- processes and trackers -------------------------------------------------------------------------------------------


def test_trackers_are_known_at_the_start() -> None:
    check_trackers([])
    with pytest.raises(ConfigError, match=r"report_to has 'nobody'; choose of aim, .*wandb"):
        check_trackers(["nobody"])
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    missing = next(name for name in ("clearml", "comet_ml", "aim") if name not in available)
    with pytest.raises(ConfigError, match=rf"report_to has '{missing}', which is not installed: pip install"):
        check_trackers(["tensorboard", missing] if "tensorboard" in available else [missing])


class Tracker(GeneralTracker):  # type: ignore[misc]
    """Keeps what it is told."""

    name = "mine"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, object] = {}
        self.is_finished = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: object) -> None:
        assert step is not None
        self.told.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


def test_a_tracker_is_told_of_settings_and_evaluations(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(9)))
    tracker = Tracker()
    monkeypatch.setattr("hopskip.train.exit.run.check_trackers", lambda names: None)
    monkeypatch.setattr(
        "hopskip.train.exit.processes.Accelerator", lambda **options: Accelerator(**{**options, "log_with": tracker})
    )
    values = {
        "output": str(tmp_path / "run"),
        "base": str(checkpoint.path),
        "prompts": {"files": [str(tmp_path / "prompts.jsonl")]},
        "collect": {"precision": "float32", "max_new_tokens": 12},
        "branches": [{"start": 0, "num_layers": 1}],
        "stages": [{"num_tokens": 60, "eval_every": 30, "unroll_steps": 1, "batch_tokens": 20}],
        "held_out_every": 3,
        "search": {"num_prompts": 1, "max_new_tokens": 4, "num_draft_tokens": [1], "num_runner_ups": [0], "repeats": 1,
                   "max_repeats": 1, "least_speedup": 0},
        "device": "cpu",
    }  # fmt: skip

    recipe = make(ExitRecipe, values, "")
    made = make_accelerator("cpu", ["mine"], tmp_path, {"prompts.seed": 3, "prompts.files": ["x"]})
    assert tracker.config == {"prompts.seed": 3}
    monkeypatch.setattr("hopskip.train.exit.run.make_accelerator", lambda *arguments: made)
    run(recipe, report=lambda line: None)
    assert tracker.is_finished
    steps = [step for step, _ in tracker.told]
    assert steps == sorted(steps)
    assert steps[-1] >= 60
    assert set(tracker.told[0][1]) == {f"s0-b1/stage-0/{name}" for name in ("loss", "tokens_per_pass", "acceptance_1")}


def test_another_training_leaves_no_precision_behind(tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    assert make_accelerator("cpu", [], tmp_path, {}).mixed_precision == "no"
    AcceleratorState._reset_state()
