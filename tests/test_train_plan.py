"""`--dry-run`: what it counts against what a training step really takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from hopskip.cli import app
from hopskip.errors import CheckpointError, ConfigError
from hopskip.train.base import add_lora, base_config
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.data import collate
from hopskip.train.footprint import count_memory
from hopskip.train.memory import CountedMemory
from hopskip.train.plan import GIB, Cards, _steps, plan
from hopskip.train.read import DataConfig
from hopskip.train.recipe import LoraRecipe, ModelRecipe, Recipe, load_recipe
from hopskip.train.run import training_arguments, unchecked_arguments
from hopskip.train.trainer import LayerSkipTrainer
from tests.tiny import write_checkpoint

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:(transformers|accelerate|peft)", "ignore::UserWarning:hopskip.train"
)

LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def small_recipe(output: Path, **changes: Any) -> Recipe:
    training = {"use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 2, **changes.pop("training", {})}
    return Recipe(
        output=str(output),
        model=ModelRecipe(config="unused", **changes.pop("model", {})),
        data=DataConfig(train=("unused",), max_length=96, packing=changes.pop("packing", "blocks")),
        layerskip=LayerSkipRecipe(p_max=0.0, rotation=2, chunk_tokens=64),
        training=training,
        **changes,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"gradient_accumulation_steps": 3}},
        {"training": {"gradient_checkpointing": True}},
        {"training": {"bf16": True, "optim": "adamw_torch"}},
        {"training": {"optim": "sgd"}, "packing": "documents"},
        {"model": {"attn_implementation": "eager"}},
        {"lora": LoraRecipe(r=4), "model": {"dtype": "bfloat16"}},
    ],
    ids=["plain", "accumulated", "recomputed", "bf16", "documents", "eager", "lora"],
)
def test_counted_without_a_machine_as_on_one(changes: dict[str, Any], tmp_path: Path) -> None:
    """Within 10 % of the bytes that the same steps really have alive together."""
    config = LlamaConfig(
        vocab_size=3000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings="bf16" in str(changes),
    )
    recipe = small_recipe(tmp_path, **changes)
    arguments = training_arguments(recipe)
    expected = count_memory(recipe, arguments, config, num_cards=1, card=8 << 30, is_gpu=False)

    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
    model.set_attn_implementation(recipe.model.attn_implementation)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert expected.weights == weights
    rows = []
    for index in range(12):
        ids = (torch.arange(96) * 7 + index) % 3000
        row = {"input_ids": ids, "labels": ids}
        rows.append(row | {"position_ids": torch.arange(96) % 40} if recipe.data.packing == "documents" else row)
    trainer = LayerSkipTrainer(
        model, arguments, layerskip=recipe.layerskip, train_dataset=rows, data_collator=collate, callbacks=[]
    )
    with CountedMemory([*model.parameters(), *model.buffers()]) as memory:
        trainer.train()
    assert expected.total == pytest.approx(weights + memory.peak, rel=0.1)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert expected.gradients == trained
    assert expected.optimizer == pytest.approx(0 if "sgd" in str(changes) else 2 * trained, rel=0.01)
    assert expected.context == 0


def test_chunks_follow_what_is_free(tmp_path: Path) -> None:
    recipe = replace(small_recipe(tmp_path), layerskip=LayerSkipRecipe(rotation=2))
    config = LlamaConfig(vocab_size=60_000, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    arguments = training_arguments(recipe)
    little, much = (
        count_memory(recipe, arguments, config, num_cards=1, card=card, is_gpu=True).total for card in (0, 8 * GIB)
    )
    assert little + 100 * 60_000 * 4 < much


def recipe_for(name: str) -> tuple[Recipe, Any]:
    recipe = load_recipe(Path(name), ["training.report_to=none", "layerskip.chunk_tokens=256"])
    return recipe, unchecked_arguments(replace(recipe, training={**recipe.training, "use_cpu": True}))


def test_one_billion_weights_on_one_card() -> None:
    """16 bytes for each weight, the head's gradient once more, and activations: what the recipe's card must have."""
    recipe, arguments = recipe_for("llama3.2-1b-one-gpu")
    memory = count_memory(recipe, arguments, LLAMA_1B, num_cards=1, card=24 * GIB, is_gpu=True)
    weights, head = 1_235_814_400, 128_256 * 2048
    assert memory.weights == memory.gradients == 4 * weights
    assert memory.optimizer == pytest.approx(8 * weights, rel=1e-3)
    assert 4 * head < memory.work < 4 * GIB
    assert memory.context == 600 << 20
    assert memory.total < 24 * GIB  # the recipe names such a card


def test_weights_are_divided_by_fsdp_alone() -> None:
    recipe, arguments = recipe_for("llama3-8b-continual")
    config = LlamaConfig(**{**LLAMA_8B.to_dict(), "num_hidden_layers": 2})
    weights = 2 * 128_256 * 4096 + 2 * 218_112_000 + 4096
    count = {"config": config, "card": 80 * GIB, "is_gpu": True}
    eight = count_memory(recipe, arguments, num_cards=8, **count)
    assert eight.weights == pytest.approx(4 * weights / 8, rel=1e-3)
    assert eight.gradients == pytest.approx(4 * weights / 8, rel=1e-3)
    assert eight.optimizer == pytest.approx(8 * weights / 8, rel=1e-3)
    gathered = 2 * (2 * 128_256 * 4096 + 2 * 218_112_000)
    assert eight.work > gathered
    sixteen = count_memory(recipe, arguments, num_cards=16, **count)
    assert sixteen.weights == pytest.approx(eight.weights / 2, rel=1e-3)
    assert sixteen.work == pytest.approx(eight.work, rel=0.05)
    arguments.fsdp = None
    two = count_memory(recipe, arguments, num_cards=2, **count)
    one = count_memory(recipe, arguments, num_cards=1, **count)
    assert two.weights == one.weights == 4 * weights
    assert two.work == one.work + one.gradients  # DDP's buckets


def test_cards() -> None:
    assert Cards.parse("24") == Cards(1, 24 * GIB)
    assert Cards.parse(" 8x79.5") == Cards(8, int(79.5 * GIB))
    for wrong in ("0x24", "x24", "8x", "24GB", "8*80", "0"):
        with pytest.raises(ConfigError, match=r"card is .*8x80"):
            Cards.parse(wrong)


def test_steps_are_the_trainers(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.zeros(length, dtype=torch.long)} for length in (10, 20, 30, 40, 50)]

    def steps(num_cards: int, **training: Any) -> tuple[int, int]:
        arguments = training_arguments(small_recipe(tmp_path, training=training))
        return _steps(arguments, rows, 96, num_cards)

    assert steps(1, max_steps=-1, num_train_epochs=2) == (6, 60)
    assert steps(1, max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2) == (3, 120)
    assert steps(2, max_steps=-1, num_train_epochs=2) == (4, 120)
    assert steps(1, max_steps=7) == (7, 60)
    assert steps(8, max_steps=7) == (7, 150)  # no more than there are
    arguments = training_arguments(small_recipe(tmp_path, training={"gradient_accumulation_steps": 4}))
    assert _steps(arguments, None, 96, 3) == (2, 2 * 4 * 3 * 96)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_checkpoint(folder / "base", "smollm2", tokenizer=True)
    rows = [json.dumps({"text": "the quick brown fox"}) for _ in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "recipe.yaml").write_text(
        f"output: {folder / 'run'}\nmodel: {{base: {folder / 'base'}}}\n"
        f"data: {{train: {folder / 'rows.jsonl'}, max_length: 64}}\n"
        "training: {max_steps: 3, use_cpu: true, save_strategy: steps, gradient_accumulation_steps: 2}\n"
    )
    return folder


def test_the_command_measures_a_step_and_trains_nothing(base: Path) -> None:
    result = CliRunner().invoke(app, ["train", "layerskip", str(base / "recipe.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    model, data, training, memory, time = result.stdout.splitlines()
    assert model == "model     0.1M parameters, 0.1M of them trained"
    assert data == "data      6 rows"
    assert training.startswith("training  3 steps of ")
    assert "GiB for each process (1): weights 0.00" in memory
    assert "CUDA" not in memory
    assert time.startswith("time      about 1 min: ")
    assert time.endswith(" s a step, measured here with random weights")
    assert not (base / "run").exists()


def test_the_command_for_other_cards(base: Path) -> None:
    command = ["train", "layerskip", str(base / "recipe.yaml"), "--dry-run", "--card"]
    result = CliRunner().invoke(app, [*command, "2x8"])
    assert result.exit_code == 0, result.output
    assert "of 8.00 GiB for each GPU (2): " in result.stdout
    assert "CUDA 0.59" in result.stdout
    assert "time      not measured: another machine was asked for (--card)" in result.stdout
    result = CliRunner().invoke(app, [*command, "0.5"])
    assert result.exit_code == 2
    assert "a training step takes 0.59 GiB of memory, but there are 0.50: lower" in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*command[:3], "--card", "24"])
    assert result.exit_code == 2
    assert "--card 24 has no effect without --dry-run" in result.output


def test_a_plan_needs_no_weights(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "base" / "config.json").read_bytes())
    recipe = load_recipe(base / "recipe.yaml", ["data.streaming=true", f"model.base={tmp_path}", "lora.r=2"])
    planned = plan(recipe, Cards.parse("24"))
    assert planned.num_rows is None
    assert planned.lines()[1] == "data      streamed"
    assert planned.tokens_per_step == 8 * 2 * 64
    assert 0 < planned.trained_parameters < planned.parameters
    too_long = load_recipe(base / "recipe.yaml", ["data.streaming=true", "data.max_length=4096"])
    with pytest.raises(ConfigError, match=r"data.max_length is 4096, but the model's context is 1024"):
        plan(too_long, Cards.parse("24"))


def test_configs_of_every_kind_of_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import make_model, write_gguf

    write_gguf(tmp_path / "model.gguf", make_model("smollm2"))
    for recipe in (
        ModelRecipe(base=str(base / "base")),
        ModelRecipe(config=str(base / "base" / "config.json")),
        ModelRecipe(base=str(tmp_path / "model.gguf")),
    ):
        assert base_config(recipe).num_hidden_layers == 3

    def away(*_: Any, **__: Any) -> None:
        raise OSError("no network\nmore")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", away)
    with pytest.raises(CheckpointError, match=r"the config of nobody/nothing cannot be had \(no network\)$"):
        base_config(ModelRecipe(base="nobody/nothing"))
