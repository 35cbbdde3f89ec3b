"""What a run will take, before it begins: weights, tokens, memory of each card, time. Nothing is trained or kept."""

from __future__ import annotations

import math
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import ConfigError
from hopskip.train.base import add_lora, base_config, base_tokenizer, check_base
from hopskip.train.data import Row, StreamedRows, collate, load_rows, too_long
from hopskip.train.durations import duration
from hopskip.train.footprint import Memory, count_memory
from hopskip.train.read import check_sources
from hopskip.train.recipe import Recipe
from hopskip.train.run import training_arguments, unchecked_arguments
from hopskip.train.trainer import LayerSkipTrainer

GIB = 1 << 30
_MEASURED_STEPS = 3


@dataclass(frozen=True)
class Cards:
    """What a run has to itself: how many devices, and how much memory each of them has."""

    number: int
    memory: int
    """Bytes."""
    is_gpu: bool = True

    @classmethod
    def parse(cls, text: str) -> Cards:
        """`24`: one GPU of 24 GiB, `8x80`: eight of 80.

        Raises:
            ConfigError: it is neither.
        """
        found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)", text.strip())
        number, size = (int(found[1] or 1), float(found[2])) if found else (0, 0.0)
        if number < 1 or size <= 0:
            raise ConfigError(f"card is {text!r}; give its GiB, or with their number: 24, 8x80")
        return cls(number, int(size * GIB))

    @classmethod
    def here(cls, arguments: TrainingArguments) -> Cards:
        """Those that the processes of this run have."""
        if arguments.device.type == "cuda":
            return cls(arguments.world_size, torch.cuda.get_device_properties(arguments.device).total_memory)
        own = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(arguments.world_size, own, is_gpu=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `--dry-run` prints."""

    cards: Cards
    parameters: int
    trained_parameters: int
    num_rows: int | None
    """None for a stream."""
    num_steps: int
    tokens_per_step: int
    """With padding; of a stream and of rows of one length the learned tokens too."""
    memory: Memory
    seconds_per_step: float | None
    """Measured here; None where it was not."""
    why_not_measured: str = ""

    def lines(self) -> list[str]:
        """For people."""
        memory, gib = self.memory, {name: value / GIB for name, value in vars(self.memory).items()}
        parts = [f"weights {gib['weights']:.2f}", f"gradients {gib['gradients']:.2f}"]
        parts += [f"optimizer {gib['optimizer']:.2f}", f"activations and logits {gib['work']:.2f}"]
        if memory.context:
            parts.append(f"CUDA {gib['context']:.2f}")
        device = "GPU" if self.cards.is_gpu else "process"
        rows = "streamed" if self.num_rows is None else f"{self.num_rows:,} rows"
        if self.seconds_per_step is None:
            time_text = f"not measured: {self.why_not_measured}"
        else:
            total = duration(self.seconds_per_step * self.num_steps)
            time_text = f"about {total}: {self.seconds_per_step:.3g} s a step, measured here with random weights"
        millions = [f"{n / 1e6:,.1f}M" for n in (self.parameters, self.trained_parameters, self.num_tokens)]
        return [
            f"model     {millions[0]} parameters, {millions[1]} of them trained",
            f"data      {rows}",
            f"training  {self.num_steps:,} steps of {self.tokens_per_step:,} tokens, {millions[2]} in all",
            f"memory    {memory.total / GIB:.2f} of {self.cards.memory / GIB:.2f} GiB for each {device} "
            f"({self.cards.number}): {', '.join(parts)}",
            f"time      {time_text}",
        ]

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    def check(self) -> None:
        """Raises ConfigError if the memory is not enough."""
        if self.memory.total > self.cards.memory:
            raise ConfigError(
                f"a training step takes {self.memory.total / GIB:.2f} GiB of memory, but there are "
                f"{self.cards.memory / GIB:.2f}: lower training.per_device_train_batch_size or data.max_length, set "
                "training.gradient_checkpointing, train adapters (lora), or divide the weights among GPUs (fsdp)"
            )


def plan(recipe: Recipe, cards: Cards | None = None) -> Plan:
    """Count and measure.

    Args:
        cards: of the machine to plan for; None is this one, where a step is measured too.

    Raises:
        ConfigError: the recipe cannot work; not enough memory is told by `Plan.check`.
        CheckpointError: the model's config or tokenizer cannot be read.
    """
    check_sources(recipe.data)
    check_base(recipe)
    if cards is None:
        arguments = training_arguments(recipe)
        own = Cards.here(arguments)
    else:
        own, is_here = cards, torch.cuda.is_available()
        elsewhere = {} if is_here else {"use_cpu": True}
        arguments = unchecked_arguments(replace(recipe, training={**recipe.training, **elsewhere}))
    config = base_config(recipe.model)
    context = ModelConfig.from_hf(config.to_dict()).context_length
    rows = None if recipe.data.streaming else load_rows(recipe.data, base_tokenizer(recipe.model), context)
    assert not isinstance(rows, StreamedRows)
    if recipe.data.max_length > context:
        raise too_long(recipe.data.max_length, context)
    memory = count_memory(recipe, arguments, config, num_cards=own.number, card=own.memory, is_gpu=own.is_gpu)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if recipe.lora is not None:
            model = add_lora(model, recipe.lora)
    num_steps, tokens_per_step = _steps(arguments, rows, recipe.data.max_length, own.number)
    why_not = _why_not_measured(cards, own, memory)
    return Plan(
        cards=own,
        parameters=parameters,
        trained_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        num_rows=None if rows is None else len(rows),
        num_steps=num_steps,
        tokens_per_step=tokens_per_step,
        memory=memory,
        seconds_per_step=None if why_not else measure(recipe, arguments, config, rows),
        why_not_measured=why_not,
    )


def _steps(
    arguments: TrainingArguments, rows: Sequence[Row] | None, max_length: int, num_cards: int
) -> tuple[int, int]:
    """Steps as the Trainer counts them, and tokens of one, padding included."""
    batch, together = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    rows_per_step = batch * together * num_cards
    if rows is None:
        return arguments.max_steps, rows_per_step * max_length
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    num_batches = math.ceil(len(rows) / (batch * num_cards))
    per_epoch = max(1, math.ceil(num_batches / together))
    num_steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    return num_steps, round(mean * min(rows_per_step, len(rows)))


def _why_not_measured(asked: Cards | None, own: Cards, memory: Memory) -> str:
    if asked is not None:
        return "another machine was asked for (--card)"
    if own.number > 1:
        return "several processes"
    return "a step does not fit" if memory.total > own.memory else ""


class _Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    on_step_end = on_step_begin


def measure(recipe: Recipe, arguments: TrainingArguments, config: Any, rows: Sequence[Row] | None) -> float:
    """Seconds of a step on this machine: of the fastest of a few micro-steps, random weights on the first rows."""
    batch = arguments.per_device_train_batch_size
    if rows is None:
        ids = torch.arange(recipe.data.max_length) % config.vocab_size
        rows = [{"input_ids": ids, "labels": ids}]
    some = [rows[index % len(rows)] for index in range(batch * _MEASURED_STEPS)]
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
    model.set_attn_implementation(recipe.model.attn_implementation)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **recipe.training,
            **{"max_steps": _MEASURED_STEPS, "gradient_accumulation_steps": 1, "eval_strategy": "no"},
            **{"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "load_best_model_at_end": False},
        }
        short = training_arguments(replace(recipe, output=folder, training=settings))
        trainer = LayerSkipTrainer(
            model, short, layerskip=recipe.layerskip, train_dataset=some, data_collator=collate, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    best: float = min(end - start for start, end in zip(clock.times[::2], clock.times[1::2], strict=True))
    num_micro_steps: int = arguments.gradient_accumulation_steps
    return best * num_micro_steps
