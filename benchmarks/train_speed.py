"""Tokens a second of the LayerSkip trainer, over transformers' own Trainer on the same model and data.

    python -m benchmarks.train_speed [--layers 12 --hidden 448 --vocabulary 4096] [--bf16] [--steps 8] [--rounds 5]

A Llama of about 30 million weights by default, rows of random tokens. The two train in turn, `--steps` steps each,
`--rounds` times; the first step of every turn is not counted. Prints one JSON object: medians, and their quotients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hopskip.machine import cpu_name, num_usable_cores
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.data import Row, collate
from hopskip.train.trainer import LayerSkipTrainer

OFF = LayerSkipRecipe(p_max=0.0, e_scale=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=448)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rotation", type=int, default=8)
    parser.add_argument("--p-max", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, arguments.vocabulary, (arguments.batch * arguments.steps, arguments.length), generator=generator
    )
    rows: list[Row] = [{"input_ids": row, "labels": row} for row in ids]
    recipe = LayerSkipRecipe(p_max=arguments.p_max, e_scale=0.2, rotation=min(arguments.rotation, arguments.layers))
    settings: dict[str, LayerSkipRecipe | None] = {"Trainer": None, "no dropout, no exits": OFF, "the recipe": recipe}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(arguments.rounds):
        for name, layerskip in settings.items():
            torch.manual_seed(0)
            seconds[name] += step_seconds(LlamaForCausalLM(config), rows, layerskip, arguments)
    tokens = arguments.batch * arguments.length
    speeds = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    report = {
        "machine": cpu_name(),
        "torch": torch.__version__,
        **vars(arguments),
        "parameters": sum(p.numel() for p in LlamaForCausalLM(config).parameters()),
        "tokens_per_second": speeds,
        "over_the_trainer": {name: speed / speeds["Trainer"] for name, speed in speeds.items()},
    }
    print(json.dumps(report, indent=2))


class _Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def step_seconds(
    model: LlamaForCausalLM, rows: list[Row], layerskip: LayerSkipRecipe | None, arguments: argparse.Namespace
) -> list[float]:
    """Of every step but the first, which fills caches and makes the optimizer's state."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch,
            max_steps=arguments.steps,
            logging_steps=10,
            save_strategy="no",
            bf16=arguments.bf16,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        options = {"train_dataset": rows, "data_collator": collate, "callbacks": [clock]}
        if layerskip is None:
            args.remove_unused_columns = False
            trainer = Trainer(model, args, **options)
        else:
            trainer = LayerSkipTrainer(model, args, layerskip=layerskip, **options)
        trainer.train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]


if __name__ == "__main__":
    main()
