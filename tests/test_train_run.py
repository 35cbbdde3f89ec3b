"""Whole runs on tiny models: resuming, crashes, LoRA, and checkpoints that everybody loads."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hopskip import LLM, SamplingParams
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.cli import app
from hopskip.errors import ConfigError, HopskipError, TrainingError
from hopskip.train.base import load_transformers_tokenizer
from hopskip.train.checkpoint import last_checkpoint
from hopskip.train.loss import exit_metrics
from hopskip.train.recipe import Recipe, load_recipe
from hopskip.train.report import measured_exits, read_log, recommend
from hopskip.train.run import run
from hopskip.train.trainer import LayerSkipTrainer
from tests.tiny import CORPUS, make_model, write_checkpoint

yaml = pytest.importorskip("yaml")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|accelerate|peft)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, "smollm2", tokenizer=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"{n} and {n + 1}?", "response": CORPUS[n % len(CORPUS)][: 20 + n]} for n in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(output: Path, base: Path, data: Path, *overrides: str, **training: Any) -> Recipe:
    """Twelve steps over 20 rows in batches of two times two: more than two epochs, with everything random on."""
    path = output.parent / f"{output.name}.yaml"
    settings = {
        "output": str(output),
        "model": {"base": str(base)},
        "data": {"train": str(data), "holdout_every": 8, "max_length": 256},
        "layerskip": {"p_max": 0.5, "e_scale": 1.0, "rotation": 2, "dropout_schedule": "exponential"},
        "training": {
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "logging_steps": 4,
            "save_steps": 4,
            "use_cpu": True,
            **training,
        },
    }
    path.write_text(yaml.safe_dump(settings))
    return load_recipe(path, overrides)


def weights(output: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(output / "model" / "model.safetensors")
    return tensors


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run(recipe(output, base, data)) == output / "model"
    return output


def assert_same_run(output: Path, finished: Path) -> None:
    mine, theirs = weights(output), weights(finished)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    def lines(folder: Path) -> list[dict[str, Any]]:
        timed = ("runtime", "per_second", "total_flos", "train_loss", "mfu")
        return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in read_log(folder / "log.jsonl")]

    assert lines(output) == lines(finished)


def test_a_run_learns_and_reports(finished: Path, base: Path) -> None:
    log = read_log(finished / "log.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert [line["step"] for line in log if "loss" in line] == [4, 8, 12]
    evaluated = log[-1]
    assert sorted(exit_metrics(evaluated, "loss", "eval_")) == [1, 2]
    assert all(0 <= share <= 1 for share in exit_metrics(evaluated, "agreement", "eval_").values())
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in finished.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    assert not (finished / ".partial").exists() or not any((finished / ".partial").iterdir())
    card = (finished / "model" / "README.md").read_text()
    assert "p_max: 0.5" in card
    assert f"| 1 | {evaluated['eval_exit1_loss']:.3f} |" in card


def test_the_finished_model_loads_everywhere(finished: Path) -> None:
    folder = finished / "model"
    ids = torch.randint(3, 320, (9,), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    llm = LLM(folder, backend="torch", dtype="float32")
    assert llm.tokenizer.encode("hello, world") == AutoTokenizer.from_pretrained(folder)("hello, world")["input_ids"]
    rows = Rows([Segment(slot=0, start=0, count=9)])
    with torch.inference_mode():
        hidden_ND, _ = llm.backend.forward(ids.tolist(), rows, llm.backend.new_cache(1, 16))
        logits_NV = torch.as_tensor(llm.backend.logits(hidden_ND))
        torch.testing.assert_close(logits_NV, theirs(input_ids=ids[None]).logits[0], rtol=1e-4, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    own = open_checkpoint(folder).config
    assert config["hopskip"] == {
        "exit_layer": own.recommended_exit_layer,
        "num_draft_tokens": own.recommended_num_draft_tokens,
    }
    result = llm.generate("the quick", SamplingParams(max_new_tokens=8, ignore_eos=True))[0]
    assert result.stats.num_drafts > 0  # it drafts by early exit without being told


def test_resumed_equals_uninterrupted(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, in another process; bit for bit, with the log."""
    output = tmp_path / "run"
    settings = recipe(output, base, data)

    class StopHere(Exception):  # noqa: N818
        pass

    original = LayerSkipTrainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 9:
            raise StopHere
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerSkipTrainer, "training_step", stopping)
        with pytest.raises(StopHere):
            run(settings)
    assert not (output / "model").exists()
    torch.manual_seed(99)  # whatever state the next process starts with
    run(settings)
    assert_same_run(output, finished)
    # once more, with everything done: nothing is trained any further
    run(settings)
    assert_same_run(output, finished)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hopskip.train.recipe import load_recipe
from hopskip.train.run import run
from transformers import TrainerState
save = TrainerState.save_to_json
def dying(self, path):
    if "checkpoint-8" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
TrainerState.save_to_json = dying
run(load_recipe(Path(sys.argv[1])))
"""


def test_killed_while_writing_a_checkpoint(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = recipe(output, base, data)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "run.yaml")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (output / ".partial" / "checkpoint-8" / "model.safetensors").exists()  # it was in the middle of it
    assert last_checkpoint(output) == output / "checkpoint-4"
    run(settings)
    assert_same_run(output, finished)
    assert not (output / ".partial" / "checkpoint-8").exists()


def test_other_settings_are_not_mixed_into_a_run(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.copy(finished / "recipe.yaml", output)
    with pytest.raises(ConfigError, match=r"other settings \(layerskip.p_max, training.learning_rate\)"):
        run(recipe(output, base, data, "layerskip.p_max=0.3", learning_rate=1e-3))


def test_a_loss_that_is_not_a_number_stops_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in step .*last good checkpoint is .*checkpoint-1"):
        run(recipe(output, base, data, learning_rate=1e18, lr_scheduler_type="constant", warmup_steps=1, save_steps=1))
    good = load_file(output / "checkpoint-1" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in good.values())


def test_weights_that_are_not_numbers_are_not_saved(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    original = LayerSkipTrainer._save_checkpoint

    def spoiling(self: Any, model: Any, trial: Any) -> None:
        if self.state.global_step == 8:
            next(model.parameters()).data[0, 0] = float("nan")
        original(self, model, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerSkipTrainer, "_save_checkpoint", spoiling)
        with pytest.raises(TrainingError, match=r"weights are not numbers after step 8.*checkpoint-4"):
            run(recipe(output, base, data))
    assert last_checkpoint(output) == output / "checkpoint-4"


def test_a_full_disk(base: Path, data: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a limit, as they cannot on a full disk."""
    output = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = LayerSkipTrainer._save_checkpoint

    def limited(self: Any, model: Any, trial: Any) -> None:
        if self.state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        original(self, model, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerSkipTrainer, "_save_checkpoint", limited)
        try:
            with pytest.raises(TrainingError, match=r"checkpoint-8 cannot be written .*go on from .*checkpoint-4"):
                run(recipe(output, base, data))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_checkpoint(output) == output / "checkpoint-4"
    assert not (output / ".partial" / "checkpoint-8").exists()


def test_lora(base: Path, data: Path, tmp_path: Path) -> None:
    """Adapters are kept apart and worked into the finished model, which differs from its base by them alone."""
    from peft import PeftModel

    output = tmp_path / "run"
    run(recipe(output, base, data, "lora.r=2", "save_dtype=bfloat16"))
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in adapter)
    merged, original = weights(output), load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    changed = {n for n in merged if not torch.equal(merged[n], original[n].bfloat16())}
    assert changed == {name for name in original if name.endswith("_proj.weight")}
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(output / "adapter"))
    expected = wrapped.merge_and_unload().state_dict()
    torch.testing.assert_close(merged["model.norm.weight"].float(), expected["model.norm.weight"].bfloat16().float())
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(merged[name], expected[name].bfloat16())


def test_from_scratch_with_distillation_and_packing(base: Path, data: Path, tmp_path: Path) -> None:
    """A shape, a tokenizer, packed documents, KL to the last layer, an exit said in the recipe."""
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(base / "config.json", shape)
    overrides = [f"model.base=null model.config={shape} model.tokenizer={base} data.packing=documents".split()][0]
    output = tmp_path / "run"
    kl = ["layerskip.kl_weight=0.5", "layerskip.ce_weight=0.5", "draft.exit_layer=2", "draft.num_draft_tokens=3"]
    run(recipe(output, base, data, *overrides, *kl, max_steps=4, learning_rate=1e-3))
    config = open_checkpoint(output / "model").config
    assert (config.recommended_exit_layer, config.recommended_num_draft_tokens) == (2, 3)


def test_ordinary_training_is_the_trainers_own(base: Path, data: Path, tmp_path: Path) -> None:
    """Without dropout and exits the loss is transformers' own, to the last step."""
    from transformers import Trainer, TrainingArguments, set_seed

    from hopskip.train.data import collate, load_rows
    from hopskip.train.run import training_arguments

    settings = recipe(tmp_path / "run", base, data, "layerskip={p_max: 0, e_scale: 0}")
    run(settings)
    arguments = training_arguments(settings)
    assert isinstance(arguments, TrainingArguments)
    arguments.remove_unused_columns, arguments.output_dir = False, str(tmp_path / "theirs")
    set_seed(arguments.seed)
    tokenizer = load_transformers_tokenizer(base)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=load_rows(settings.data, tokenizer, 1024),
        data_collator=collate,
    )
    trainer.train()
    ours = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_recommendation_follows_cost_and_agreement() -> None:
    assert recommend({}, 8, 1.0) is None
    assert recommend({2: 0.9, 4: 0.91}, 8, 0.5) == (2, 5)  # nearly as good at half the cost
    assert recommend({2: 0.4, 6: 0.9}, 8, 0.0) == (2, 1)  # 1.4 / 1.25 tokens a pass beat 1.9 / 1.75
    log = [{"exit1_loss": 2.0, "exit1_agreement": 0.1}, {"exit1_loss": 1.0, "exit1_agreement": 0.4}]
    assert measured_exits(log, 3) == {1: (1.0, 0.4)}
    assert measured_exits([*log, {"eval_exit1_loss": 1.5, "eval_exit1_agreement": 0.3}], 3) == {1: (1.5, 0.3)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=missing.jsonl"], "no such file"),
        (["data.max_length=4096"], "the model's context is 1024"),
        (["data.max_length=8"], "a document has .* tokens"),
        (["model.base=missing"], "'missing' does not exist"),
        (["lora.target_modules=[nothing]"], "lora: .*nothing"),
        (["model.attn_implementation=flex_attention"], "masks that cannot be selected"),
    ],
)
def test_mistakes_cost_no_training(overrides: list[str], message: str, base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(HopskipError, match=message):
        run(recipe(tmp_path / "run", base, data, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layerskip.exits=[2, 3]"], "exits name 3; in a model of 3 layers they end at 2"),
        (["draft.exit_layer=3"], "draft.exit_layer is 3; the model has 3 layers"),
        (["draft.exit_layer=0"], "draft.exit_layer is 0; the model has 3 layers"),
        (["lora.target_modules=[q_proj, lm_head]"], "lora.target_modules name lm_head: head and embedding are one"),
        (["lora.target_modules=[model.embed_tokens]"], "lora.target_modules name model.embed_tokens: head and emb"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_weights_load(
    overrides: list[str], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        run(recipe(tmp_path / "run", tmp_path / "base", data, *overrides))
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_exported(base: Path, data: Path, tmp_path: Path) -> None:
    """Though the last one is worse, and older ones are deleted; also when the run was interrupted after it."""
    settings: dict[str, Any] = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
    }
    settings["lr_scheduler_type"] = "constant"
    best = {"load_best_model_at_end": True, "metric_for_best_model": "exit2_agreement", "learning_rate": 5e-2}
    output = tmp_path / "run"
    run(recipe(output, base, data, **settings, **best))
    log = read_log(output / "log.jsonl")
    shares = {line["step"]: line["eval_exit2_agreement"] for line in log[:-1] if "eval_loss" in line}
    step = max(shares, key=lambda step: shares[step])
    assert step < 6
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{step}", "checkpoint-6"}
    expected = load_file(output / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{step}")
    shutil.rmtree(output / "model")
    run(recipe(output, base, data, **settings, **best))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())


def test_a_stream_is_resumed_where_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    """With workers and a buffer, in a later pass over the data."""
    overrides = ["data.streaming=true", "data.shuffle_buffer=4"]
    settings = {"dataloader_num_workers": 2, "max_steps": 8}
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    for output in outputs:
        run(recipe(output, base, data, *overrides, **settings))
    assert_same_run(outputs[0], outputs[1])
    shutil.rmtree(outputs[1] / "model")
    shutil.rmtree(outputs[1] / "checkpoint-8")
    run(recipe(outputs[1], base, data, *overrides, **settings))
    assert_same_run(outputs[0], outputs[1])


def test_other_models_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(ConfigError, match="model_type 'gpt2' cannot be trained"):
        LayerSkipTrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))


def test_the_command(base: Path, data: Path, tmp_path: Path) -> None:
    recipe(tmp_path / "run", base, data)
    command = ["train", "layerskip", str(tmp_path / "run.yaml"), "training.max_steps=2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "run" / "model")
    result = CliRunner().invoke(app, [*command, "layerskip.p_mx=0.3"])
    assert result.exit_code == 2
    assert "did you mean 'p_max'?" in result.output


def test_make_model_is_trainable_in_every_family(tmp_path: Path) -> None:
    """A step of every family, with and without recomputed activations, gives the same loss."""
    from transformers import TrainingArguments

    from hopskip.train.curriculum import LayerSkipRecipe
    from hopskip.train.data import collate

    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(4):
        ids = torch.randint(3, 320, (12,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.clone()})
    for family in ("llama3-gqa", "mistral-window", "qwen2", "qwen3-tied"):
        losses = []
        for recomputes in (False, True):
            model = make_model(family)
            model.set_attn_implementation("sdpa")
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=4,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                gradient_checkpointing=recomputes,
            )
            config = LayerSkipRecipe(p_max=0.6, e_scale=1.0, curriculum="all")
            trainer = LayerSkipTrainer(model, arguments, layerskip=config, train_dataset=rows, data_collator=collate)
            trainer.train()
            losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
