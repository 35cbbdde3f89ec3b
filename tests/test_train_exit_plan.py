"""Recipes by rule, plans before a run begins, and the recipes that come with hopskip, on models of the same kind."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.cli import app
from hopskip.errors import ConfigError
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.exit import plan as plan_module
from hopskip.train.exit.batch import Batch
from hopskip.train.exit.conversations import Conversation, read_conversations
from hopskip.train.exit.distill import ExitTrainer, make_optimizer, num_positions
from hopskip.train.exit.estimate import EFFICIENCY, Work
from hopskip.train.exit.memory import _step_bytes, collecting_bytes, training_bytes, weight_bytes
from hopskip.train.exit.plan import plan_by_rule
from hopskip.train.exit.recipe import ExitRecipe, FitConfig
from hopskip.train.exit.rule import Machine, recipe_values, vocabulary_size
from hopskip.train.exit.vocabulary import by_merge_rank, draft_vocabulary
from hopskip.train.memory import CountedMemory
from hopskip.train.recipe import RECIPES, make, read_recipe
from tests.models import tiny_config
from tests.serving import live_server
from tests.tiny import byte_fallback_tokenizer, make_model, write_checkpoint, write_tokenizer

MACHINE = Machine(
    flops_per_second=1.5e11, memory_bytes=20 * 10**9, disk_bytes=100 * 10**9, has_bfloat16=True, is_gpu=False
)
GPU = Machine(
    flops_per_second=7e14,
    memory_bytes=80 * 10**9,
    disk_bytes=10**12,
    has_bfloat16=True,
    is_gpu=True,
    pass_seconds=0.015,
)


def shape(**fields: Any) -> ModelConfig:
    usual = {"model_type": "llama", "max_position_embeddings": 8192, "num_key_value_heads": 8, "head_dim": 64}
    return ModelConfig.from_hf({**usual, **fields})


SMOLLM2 = shape(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_1B = shape(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    tie_word_embeddings=True,
)  # fmt: skip
LLAMA_8B = shape(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    head_dim=128,
)  # fmt: skip
QWEN3_8B = shape(
    model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, head_dim=128,
)  # fmt: skip


def by_rule(model: ModelConfig, machine: Machine = MACHINE, **settings: Any) -> ExitRecipe:
    recipe: ExitRecipe = make(ExitRecipe, {"output": "x", **recipe_values(model, machine, **settings)}, "")
    return recipe


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_vocabularies() -> None:
    sizes = [vocabulary_size(model) for model in (SMOLLM2, LLAMA_1B, LLAMA_8B, QWEN3_8B, tiny_config())]
    assert sizes == [8192, 16384, 32768, 32768, tiny_config().vocab_size // 2]


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_work_takes_the_hours_that_are_given(hours: float) -> None:
    recipe = by_rule(SMOLLM2, hours=hours)
    seconds = Work.of(recipe, SMOLLM2).seconds(MACHINE.flops_per_second)
    assert seconds == pytest.approx(0.9 * 3600 * hours, rel=0.03)
    assert [stage.unroll_steps for stage in recipe.stages] == [1, 3]
    assert recipe.stages[0].num_tokens == pytest.approx(1.5 * recipe.stages[1].num_tokens, rel=0.05)
    assert recipe.exits(30) == (ExitConfig(start=0, num_layers=1, features=(15, 27, 30)),)
    assert [stage.learning_rate for stage in recipe.stages] == [3e-3, 2e-3]
    assert [(stage.decay, stage.seed) for stage in recipe.stages] == [(0.1, 0), (0.7, 1)]
    assert recipe.search.num_runner_ups == (0, 1, 2)
    assert recipe.search.vocabulary == ()
    assert (recipe.num_workers, recipe.precision, recipe.collect.precision) == (0, "bfloat16", "bfloat16")


def test_what_the_machine_has_decides() -> None:
    slow = by_rule(LLAMA_8B)
    assert slow.collect.precision == "q8"
    assert Work.of(slow, LLAMA_8B).collected_tokens == pytest.approx(100_000, rel=0.02), "fewer teach nothing"
    assert slow.stages[0].learning_rate == pytest.approx(4.2e-4)
    small = Machine(**{**vars(MACHINE), "memory_bytes": 9 * 10**9, "has_bfloat16": False})
    assert by_rule(LLAMA_8B, small).collect.precision == "q4"
    assert by_rule(LLAMA_8B, small).collect.max_num_seqs < 64
    assert by_rule(LLAMA_8B, small).precision == "float32"
    assert by_rule(SMOLLM2).collect.max_num_seqs == 64
    assert by_rule(SMOLLM2).collect.states == "stored"
    full = Machine(**{**vars(MACHINE), "disk_bytes": 10**9})
    assert by_rule(SMOLLM2, full).collect.states == "on-the-fly"
    fast = by_rule(LLAMA_8B, GPU, hours=8)
    work = Work.of(fast, LLAMA_8B)
    assert fast.collect.states == "on-the-fly"
    assert fast.collect.precision == "bfloat16"
    assert fast.num_workers == 0, "nothing is read"
    assert by_rule(SMOLLM2, GPU).num_workers == 2
    assert fast.stages[0].batch_tokens == 4096
    assert 3600 < work.seconds(GPU.flops_per_second, GPU.pass_seconds) < 10 * 3600
    assert work.seconds(GPU.flops_per_second, 2 * GPU.pass_seconds) > work.seconds(GPU.flops_per_second)
    assert Work.of(by_rule(SMOLLM2, GPU, hours=1e6), SMOLLM2).collected_tokens == pytest.approx(1e8, rel=0.02)


def test_what_is_packed_answers_as_it_is() -> None:
    packed = by_rule(LLAMA_8B, is_packed=True)
    assert packed.collect.precision == "auto"
    assert by_rule(LLAMA_8B, GPU, is_packed=True).collect.precision == "bfloat16"
    assert weight_bytes(packed, LLAMA_8B, 5 * 10**9) == 5 * 10**9
    assert weight_bytes(packed, LLAMA_8B) == 2 * LLAMA_8B.num_parameters
    assert weight_bytes(by_rule(SMOLLM2), SMOLLM2, 5) == 2 * SMOLLM2.num_parameters
    assert collecting_bytes(packed, LLAMA_8B, 5) == collecting_bytes(packed, LLAMA_8B, 0) + 5
    assert training_bytes(packed, LLAMA_8B, 5) == training_bytes(packed, LLAMA_8B)


def test_chats_of_the_user_come_first() -> None:
    alone = by_rule(SMOLLM2).prompts
    assert alone.self_written > 500
    assert len(set(alone.openings)) > 10
    few = recipe_values(SMOLLM2, MACHINE, num_chats=100)["prompts"]
    assert few == {
        "max_prompts": 100,
        "self_written": alone.self_written - 100,
        "openings": list(alone.openings),
    }
    enough = recipe_values(SMOLLM2, MACHINE, num_chats=10**6)["prompts"]
    assert enough == {"max_prompts": alone.self_written}
    only = recipe_values(SMOLLM2, MACHINE, num_chats=50, writes_prompts=False)
    assert only["prompts"] == {"max_prompts": 50}
    trained = sum(stage["num_tokens"] for stage in only["stages"])
    assert trained == pytest.approx(5 * 50 * (64 + 0.7 * 256), rel=0.05), "five passes over so little text"
    long = recipe_values(SMOLLM2, MACHINE, num_chats=10**6, tokens_of_chat=2 * (64 + 0.7 * 256))["prompts"]
    assert long["max_prompts"] == pytest.approx(alone.self_written / 2, rel=0.01)


def test_models_with_exits_have_nothing_to_train() -> None:
    trained = ModelConfig(**{**vars(LLAMA_1B), "recommended_exit_layer": 4})
    recipe = by_rule(trained, writes_prompts=False)
    assert [(exit.start, exit.num_layers, exit.features) for exit in recipe.exits(16)] == [
        (2, 0, ()),
        (4, 0, ()),
        (6, 0, ()),
    ]
    assert recipe.stages == ()
    assert recipe.prompts.files == ("alpaca", "gsm8k", "humaneval", "mt_bench")
    assert (recipe.vocabulary, recipe.fill_vocabulary) == (16384, True)
    assert by_rule(trained).prompts.self_written == 200
    shallow = ModelConfig(**{**vars(LLAMA_1B), "recommended_exit_layer": 1, "num_hidden_layers": 2})
    assert [exit.start for exit in by_rule(shallow).exits(2)] == [1]


# -- vocabularies -----------------------------------------------------------------------------------------------------


def test_tokens_by_merge_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=True)
    config = open_checkpoint(tmp_path).config
    tokenizer = load_tokenizer(tmp_path, config)
    found = by_merge_rank(tokenizer, 320)
    assert set(found[:1]) <= set(tokenizer.eos_token_ids)
    assert len(found) == len(set(found))
    assert not {tokenizer.inner.token_to_id("<|im_start|>"), *range(310, 320)} & set(found[: 1 + 256])
    merged = found[len(found) - (320 - 3 - 256) :]
    assert merged == sorted(merged), "a trainer numbers them as it merges them"
    assert all(token < 300 for token in by_merge_rank(tokenizer, 300))
    write_tokenizer(tmp_path, byte_fallback_tokenizer(), eos_token="</s>", bos_token="<s>")
    other = load_tokenizer(tmp_path, config)
    words = [str(other.inner.id_to_token(token)) for token in by_merge_rank(other, 320)]
    assert [word for word in words if len(word) > 1 and not word.startswith("<")] == [
        "he", "ll", "hell", "hello", "▁hello", "▁▁"
    ]  # fmt: skip


def test_draft_vocabularies_are_filled_up() -> None:
    chats = [Conversation.of([9, 9], [5, 5, 7, 3]), Conversation.of([1], [5, 7])]
    assert draft_vocabulary(chats, 2).tolist() == [5, 7]
    assert draft_vocabulary(chats, 9).tolist() == [3, 5, 7]
    assert draft_vocabulary(chats, 5, [7, 2, 1, 0]).tolist() == [1, 2, 3, 5, 7]
    assert draft_vocabulary(chats, 2, [0]).tolist() == [5, 7]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_collecting() -> None:
    recipe = by_rule(SMOLLM2)
    length, kv_bytes, state_bytes = 1024 + 256, 4 * 30 * 3 * 64, 3 * 2 * 576
    assert collecting_bytes(recipe, SMOLLM2) == weight_bytes(recipe, SMOLLM2) + 64 * length * (kv_bytes + state_bytes)
    assert weight_bytes(recipe, SMOLLM2) == 2 * SMOLLM2.num_parameters


def test_memory_of_training_is_what_a_step_has() -> None:
    """Weights, gradients, two moments; and beside them more for longer batches, unrolling, and the model itself."""
    recipe = by_rule(SMOLLM2)
    found = training_bytes(recipe, SMOLLM2)
    trained = sum(t.numel() for t in _trainer(SMOLLM2).parameters())
    embedding = 2 * SMOLLM2.vocab_size * SMOLLM2.hidden_size
    logits = 512 * 8192 * 4
    assert 16 * trained + embedding + 3 * logits < found < 16 * trained + embedding + 40 * logits
    first = recipe.stages[0]
    short = make(ExitRecipe, {**asdict(recipe), "stages": [vars(first)]}, "")
    assert training_bytes(short, SMOLLM2) < found
    on_the_fly = by_rule(SMOLLM2, Machine(**{**vars(MACHINE), "disk_bytes": 0}))
    assert training_bytes(on_the_fly, SMOLLM2) == found + weight_bytes(recipe, SMOLLM2)
    trained_model = ModelConfig(**{**vars(LLAMA_1B), "recommended_exit_layer": 4})
    assert training_bytes(by_rule(trained_model), trained_model) == 0


def test_memory_is_counted_as_it_is(tmp_path: Path) -> None:
    """A step on tensors with data has what the one on tensors without was said to have."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    stage, exit = (
        FitConfig(num_tokens=9, batch_tokens=160, unroll_steps=3),
        ExitConfig(start=0, num_layers=1, features=(1, 3)),
    )
    said = _step_bytes(checkpoint.config, exit, 100, torch.float32, stage, 40)
    with CountedMemory() as counted:
        trainer = ExitTrainer(checkpoint, exit, torch.arange(100))
        optimizer = make_optimizer(trainer, stage)
        for _ in range(2):
            places = torch.arange(160)
            x, features, final = torch.randn(4, 40, 64), torch.randn(4, 40, 2, 64), torch.randn(160, 64)
            batch = Batch(x, features, final, places % 100, places, places % 40)
            optimizer.zero_grad()
            loss = trainer(batch, stage, num_positions(batch, 3))
            torch.autograd.backward(loss)
            del loss
            optimizer.step()
    assert counted.peak == pytest.approx(said, rel=0.1)


def _trainer(model: ModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return ExitTrainer(
            model, ExitConfig(start=0, num_layers=1, features=(15, 27, 30)), torch.arange(8, device="cpu")
        )


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny one, on a machine on which an hour is no time."""
    write_checkpoint(tmp_path / "my-model", tokenizer=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "flops_per_second", lambda threads=None: 1e6)
    monkeypatch.setattr("hopskip.train.exit.rule._LEAST_TOKENS", 1000)
    return tmp_path / "my-model"


QUICK = [
    "prompts.files=chats", "collect.max_new_tokens=12", "prompts.max_prompt_tokens=100", "collect.precision=float32",
    "search.num_prompts=1", "search.max_new_tokens=6", "search.repeats=1", "search.max_repeats=1",
    "search.least_speedup=0", "threads=1",
]  # fmt: skip


def test_one_command_and_a_folder_of_chats(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "chats").mkdir()
    rows = [
        {"conversations": [{"from": "human", "value": f"number {i}"}, {"from": "gpt", "value": "no"}]}
        for i in range(40)
    ]
    (tmp_path / "chats" / "a.json").write_text(json.dumps(rows))
    command = ["train", "exit", "--model", "my-model", *QUICK]
    asked = CliRunner().invoke(app, command)
    assert asked.exit_code == 2
    assert asked.stderr.strip() == "hopskip: error: nobody is there to say yes to this plan; give --yes to begin"
    assert "an exit for my-model: 3 layers of 64" in asked.stdout
    assert "1 layer of its own, seeing layers 2, 3" in asked.stdout
    assert "chats of chats" in asked.stdout
    for part in ("GB in runs/my-model-exit (", " GB free)", "time       about "):
        assert part in asked.stdout
    assert not (tmp_path / "runs").exists()
    done = CliRunner().invoke(app, [*command, "search.num_draft_tokens=[2]", "--yes"])
    assert done.exit_code == 0, done.output
    assert "the fastest is s0-b1-f2.3 with" in done.stdout
    exit = TrainedExit.load(tmp_path / "runs" / "my-model-exit" / "exit")
    assert len(exit.vocabulary) == 160, "filled up to half the model's"
    # it goes on without being asked, with the recipe that it began with, whatever the machine's speed is now
    again = CliRunner().invoke(app, [*command, "search.num_draft_tokens=[1]"])
    assert again.exit_code == 0, again.output
    changed = CliRunner().invoke(app, [*command, "vocabulary=50"])
    assert changed.exit_code == 2
    assert "was made with vocabulary = 160, not 50" in changed.stderr
    hours = CliRunner().invoke(app, [*command, "--hours", "3"])
    assert hours.exit_code == 2
    assert "holds a run that has begun, which --hours cannot change" in hours.stderr


def test_answers_that_are_given_are_learned(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"instruction": f"number {i}", "output": f"{i} is {'very ' * 9}good"} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        "prompts.files=chats.jsonl",
        *QUICK[1:],
        "collect.answers=given",
        "prompts.max_prompts=40",
        "output=given",
        "search.num_draft_tokens=[2]",
    ]
    told = CliRunner().invoke(app, ["train", "exit", "--model", "my-model", "--yes", *settings])
    assert told.exit_code == 0, told.output
    assert "up to 40 chats of chats.jsonl, with their answers" in told.stdout
    conversations = read_conversations(tmp_path / "given" / "data")[1]
    assert len(conversations) == 40
    assert all(c.num_answer_tokens == 12 and c.states_TAD is not None for c in conversations)
    assert TrainedExit.load(tmp_path / "given" / "exit").num_draft_tokens == 2


def test_who_is_asked_may_say_no(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda text, err: next(answers))
    monkeypatch.setattr(sys.modules["hopskip.cli.train"], "_is_interactive", lambda: True)
    monkeypatch.setattr("hopskip.train.exit.run.run", lambda recipe, progress: Path("made"))
    told = CliRunner().invoke(app, ["train", "exit", "--model", "my-model"])
    assert (told.exit_code, told.stderr.strip()) == (1, "hopskip: error: nothing was begun")
    assert CliRunner().invoke(app, ["train", "exit", "--model", "my-model"]).stdout.endswith("made\n")


def test_what_is_missing_is_said_before_the_question(model: Path, tmp_path: Path) -> None:
    write_tokenizer(model, chat_template=None)
    told = CliRunner().invoke(app, ["train", "exit", "--model", "my-model"])
    assert told.exit_code == 2
    assert "no chat template, so it cannot write prompts itself; give prompts.files" in told.stderr
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    command = ["train", "exit", "--model", "my-model", "prompts.files=rows.jsonl", "report_to=nobody"]
    assert "report_to has 'nobody'" in CliRunner().invoke(app, command).stderr


def test_chats_that_a_template_refuses_are_left_out(model: Path, tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}<|im_start|>x"
    write_tokenizer(model, chat_template=template)
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = ["train", "exit", "--model", "my-model", "--yes", "prompts.files=rows.jsonl", "prompts.self_written=0"]
    told = CliRunner().invoke(app, [*command, "threads=1"])
    assert told.exit_code == 2
    assert "none of 1 chats can be used" in told.stderr
    assert "refuses these messages: no system" in told.stderr


def test_what_cannot_fit_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 10**6)
    told = CliRunner().invoke(app, ["train", "exit", "--model", "my-model", "--yes"])
    assert told.exit_code == 2
    assert "GB of memory, and 0.0 GB are free: lower collect.max_num_seqs" in told.stderr


def test_what_is_said_comes_before_the_rule(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    own = ["output=mine", "vocabulary=7", "prompts.files=rows.jsonl", "collect.answers=given", "prompts.seed=3"]
    recipe = plan_by_rule(str(model), own, None).recipe
    assert (recipe.output, recipe.vocabulary, recipe.collect.answers, recipe.prompts.seed) == ("mine", 7, "given", 3)
    assert recipe.prompts.self_written == 0
    served = plan_by_rule(str(model), ["collect.server.url=http://x/v1"], 2.0).recipe
    assert served.collect.answers == "server"
    for wrong, message in (
        ("prompts=5", "prompts is 5; it must be a section"),
        ("promts.seed=1", "unknown key 'promts'"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_by_rule(str(model), [wrong], None)
    with pytest.raises(ConfigError, match="hours is 0; it must be above 0"):
        plan_by_rule(str(model), [], 0)
    with_recipe = CliRunner().invoke(app, ["train", "exit", "smollm2-135m-exit", "--hours", "2"])
    assert with_recipe.exit_code == 2
    assert "--hours has no effect on a recipe that is given (smollm2-135m-exit)" in with_recipe.stderr


@pytest.mark.parametrize("settings", [[], ["collect.answers=given"]])
def test_chats_are_looked_at_for_their_length(model: Path, tmp_path: Path, settings: list[str]) -> None:
    """Of two turns: what is asked, and answers as they are or as they usually are."""
    messages = [{"role": role, "content": "a b c"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = load_tokenizer(model, open_checkpoint(model).config)
    plan = plan_by_rule(str(model), ["prompts.files=chats.jsonl", "collect.max_new_tokens=100", *settings], None)
    if settings:
        whole = len(tokenizer.apply_chat_template(messages, add_generation_prompt=False))
        assert plan.tokens_of_chat == whole - len(tokenizer.encode("\n")), "the end of the last turn is its last token"
    else:
        asked = len(tokenizer.apply_chat_template([*messages[:1], {"role": "assistant", "content": ""}, messages[2]]))
        assert plan.tokens_of_chat == asked + 2 * 70
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a " * 2000}) + "\n")
    assert plan_by_rule(str(model), ["prompts.files=chats.jsonl", *settings], None).tokens_of_chat is None


def test_a_layerskip_model_gets_its_best_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by its name; it has no chat template, so the prompts that come with hopskip are its text."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "layerskip-llama3.2-1B"
    write_checkpoint(folder, max_shard_size=None)
    make_model("llama3-gqa", num_hidden_layers=6).save_pretrained(folder)
    write_tokenizer(folder, chat_template=None)
    monkeypatch.chdir(tmp_path)
    quick = ["prompts.max_prompts=12", *QUICK[1:], "search.num_draft_tokens=[1]", "search.num_runner_ups=[0]"]
    hours = CliRunner().invoke(app, ["train", "exit", "--yes", "--model", folder.name, *quick, "--hours", "1"])
    assert hours.exit_code == 2
    assert "--hours has no effect on a model that has exits" in hours.stderr
    told = CliRunner().invoke(app, ["train", "exit", "--yes", "--model", folder.name, *quick])
    assert told.exit_code == 0, told.output
    assert "after layer 2; after layer 4; drafts from 160 tokens" in told.stdout
    assert "none: exits are layers of the model" in told.stdout
    exit = TrainedExit.load(tmp_path / "runs" / f"{folder.name}-exit" / "exit")
    assert exit.layers == []
    assert exit.config.start in (2, 4)
    assert len(exit.vocabulary) == 160


# -- recipes that come with hopskip -----------------------------------------------------------------------------------

RECIPES_OF = {
    "llama3.2-1b-exit": (LLAMA_1B, "llama3-gqa"),
    "llama3.1-8b-exit": (LLAMA_8B, "llama3-gqa"),
    "qwen3-8b-exit": (QWEN3_8B, "qwen3"),
}


def arithmetic(recipe: ExitRecipe, model: ModelConfig) -> str:
    work, teraflops = Work.of(recipe, model), 700
    memory = max(collecting_bytes(recipe, model), training_bytes(recipe, model))
    hours = work.seconds(teraflops * 1e12) / 3600
    return (
        f"# By arithmetic: {work.collected_tokens / 1e6:.0f}M tokens of text ({work.disk_bytes / 1e9:.2f} GB on disk), "
        f"{work.trained_tokens / 1e6:.0f}M to train on, {memory / 1e9:.0f} GB of memory;\n"
        f"# {hours:.1f} h at {EFFICIENCY:.0%} of {teraflops} TFLOP/s, answering left out.".replace("30%", "30 %")
    )


@pytest.mark.parametrize("name", RECIPES_OF)
def test_the_arithmetic_of_recipes(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    assert arithmetic(read_recipe(ExitRecipe, path), RECIPES_OF[name][0]) in path.read_text()


@pytest.mark.parametrize("name", RECIPES_OF)
def test_recipes_make_exits_of_models_of_the_same_kind(name: str, tmp_path: Path) -> None:
    """Grouped heads, tied or untied heads, normed queries, in small; a server of our own in place of vLLM."""
    pytest.importorskip("matplotlib")
    family = RECIPES_OF[name][1]
    folder = tmp_path / "model"
    make_model(family, tie_word_embeddings=RECIPES_OF[name][0].tie_word_embeddings).save_pretrained(folder)
    write_tokenizer(folder)
    chats = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "user", "content": "so?"}]} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    settings = [
        f"output={tmp_path / 'run'}", f"base={folder}", f"prompts.files={tmp_path / 'chats.jsonl'}", "threads=1",
        "prompts.max_prompt_tokens=100", "collect.max_new_tokens=10", "collect.max_num_seqs=8", "vocabulary=60",
        "held_out_every=5", "search={num_prompts: 1, max_new_tokens: 6, num_draft_tokens: [2], num_runner_ups: [1],"
        " vocabulary: [30], repeats: 1, max_repeats: 1, least_speedup: 0}",
        "stages=[{num_tokens: 300, batch_tokens: 200, unroll_steps: 1}, {num_tokens: 200, batch_tokens: 200}]",
        "num_workers=0", "device=cpu",
    ]  # fmt: skip
    is_served = read_recipe(ExitRecipe, RECIPES / f"{name}.yaml").collect.answers == "server"
    if not is_served:
        result = CliRunner().invoke(app, ["train", "exit", name, *settings])
    else:
        from hopskip import LLM

        with live_server(LLM(folder, backend="native")) as live:
            served = [*settings, f"collect.server.url={live.url}/v1"]
            result = CliRunner().invoke(app, ["train", "exit", name, *served])
    assert result.exit_code == 0, result.output
    assert ("answered by a server" in result.output) is is_served
    exit = TrainedExit.load(tmp_path / "run" / "exit")
    exit.check(open_checkpoint(folder).config)
    assert (exit.num_draft_tokens, exit.num_runner_ups) == (2, 1)
