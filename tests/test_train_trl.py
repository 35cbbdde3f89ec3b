"""TRL's SFTTrainer with the recipe, beside the plain Trainer with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hopskip.errors import ConfigError
from hopskip.train.base import load_transformers_tokenizer
from hopskip.train.trainer import LayerSkipConfig, LayerSkipMixin, LayerSkipTrainer
from tests.tiny import CORPUS, make_model, write_tokenizer

trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@dataclass
class MyConfig(trl.SFTConfig, LayerSkipConfig):  # type: ignore[misc]
    pass


class MySFT(LayerSkipMixin, trl.SFTTrainer):  # type: ignore[misc]
    pass


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def config(folder: Path, **changes: Any) -> MyConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 64,
        "p_max": 0.0,
        "e_scale": 1.0,
        "curriculum": "all",
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    return MyConfig(**{**settings, **changes})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, pad_token="<|endoftext|>")
    return load_transformers_tokenizer(folder)


def table(number: int) -> Any:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": CORPUS[n % 3][:20]}]}
        for n in range(number)
    ]
    return datasets.Dataset.from_list(rows)


def losses(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize("recipe", [{}, {"gradient_checkpointing": False, "kl_weight": 0.5, "ce_weight": 0.5}])
def test_sft_trains_as_the_plain_trainer(recipe: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """The same rows, the same losses of every exit; its own metrics go on."""
    args = config(tmp_path / "sft", **recipe)
    sft = MySFT(
        make_model("llama3-gqa"), args, train_dataset=table(8), eval_dataset=table(3), processing_class=tokenizer
    )
    sft.train()
    plain = LayerSkipTrainer(
        make_model("llama3-gqa"),
        config(tmp_path / "plain", **recipe),
        train_dataset=sft.train_dataset,
        eval_dataset=sft.eval_dataset,
        data_collator=sft.data_collator,
    )
    plain.train()
    for name in ("loss", "exit2_loss", "exit3_loss", "exit2_agreement", "eval_exit1_loss"):
        assert losses(sft, name), name
        assert losses(sft, name) == pytest.approx(losses(plain, name), rel=1e-3), name
    assert len(losses(sft, "mean_token_accuracy")) == 4
    assert losses(sft, "eval_exit3_loss") == pytest.approx(losses(plain, "eval_loss"), rel=1e-3)
    assert (tmp_path / "sft" / "checkpoint-4" / "trainer_state.json").exists()
    assert all("forward" not in vars(layer) for layer in sft.model.model.layers)


def test_sft_with_dropout_packing_and_adapters(tokenizer: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    args = config(tmp_path / "run", p_max=0.5, packing=True, padding_free=False, packing_strategy="wrapped")
    adapter = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    sft = MySFT(
        make_model("llama3-gqa"),
        args,
        train_dataset=table(16),
        eval_dataset=table(3),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    sft.train()
    assert sft.state.global_step == 4
    assert len(losses(sft, "exit2_loss")) == 4
    # resumed from a checkpoint, it goes on as if nothing had happened
    again = MySFT(
        make_model("llama3-gqa"),
        args,
        train_dataset=table(16),
        eval_dataset=table(3),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again, "exit2_loss") == losses(sft, "exit2_loss")


def test_trl_parser_takes_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    lines = ["output_dir: out", "p_max: 0.2", "exits: [2]", "exit_weights: [0.5]", "max_length: 64", "use_cpu: true"]
    file.write_text("\n".join([*lines, "bf16: false"]))
    (parsed,) = trl.TrlParser(MyConfig).parse_args_and_config(["--config", str(file), "--p_max", "0.3"])
    assert (parsed.p_max, parsed.exits, parsed.exit_weights, parsed.max_length) == (0.3, [2], [0.5], 64)


def test_what_sft_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing_factor is 0\.1"):
        MySFT(
            make_model("llama3-gqa"),
            config(tmp_path, label_smoothing_factor=0.1),
            train_dataset=table(2),
            processing_class=tokenizer,
        )
