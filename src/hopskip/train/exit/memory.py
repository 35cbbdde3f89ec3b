"""How much memory collecting and training take, before they begin."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.train.exit.batch import Batch
from hopskip.train.exit.distill import ExitTrainer, make_optimizer, num_positions
from hopskip.train.exit.recipe import ExitRecipe, FitConfig
from hopskip.train.memory import CountedMemory

_WIDTHS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "q8": 34 / 32, "q4": 18 / 32}


def collecting_bytes(recipe: ExitRecipe, model: ModelConfig, stored_bytes: int | None = None) -> int:
    """Of the model, and of keys, values and states of the texts that are decoded together.

    Args:
        stored_bytes: of the model's files.
    """
    collect = recipe.collect
    length = recipe.prompts.max_prompt_tokens + collect.max_new_tokens
    kv_bytes = 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    taps = len({*recipe.taps(model.num_hidden_layers), model.num_hidden_layers})
    state_bytes = 2 * taps * model.hidden_size if collect.states == "stored" else 0
    return weight_bytes(recipe, model, stored_bytes) + collect.max_num_seqs * length * (kv_bytes + state_bytes)


def weight_bytes(recipe: ExitRecipe, model: ModelConfig, stored_bytes: int | None = None) -> int:
    """Of the model as it answers; in its own precision, as it is stored, or else two bytes a weight."""
    if recipe.collect.precision == "auto" and stored_bytes is not None:
        return stored_bytes
    return int(_WIDTHS.get(recipe.collect.precision, 2.0) * model.num_parameters)


def training_bytes(recipe: ExitRecipe, model: ModelConfig, stored_bytes: int | None = None) -> int:
    """The most that a step of any candidate has at once: counted tensor by tensor, on tensors without data; with the
    model's embedding, and the model itself if it makes the states."""
    length = min(512, recipe.prompts.max_prompt_tokens + recipe.collect.max_new_tokens)
    shapes = [exit for exit in recipe.exits(model.num_hidden_layers) if exit.num_layers]
    dtype = getattr(torch, recipe.precision)
    vocabulary = min(recipe.vocabulary, model.vocab_size)
    steps = [_step_bytes(model, exit, vocabulary, dtype, s, length) for exit in shapes for s in recipe.stages]
    resident = 2 * model.vocab_size * model.hidden_size
    if recipe.collect.states == "on-the-fly":
        resident += weight_bytes(recipe, model, stored_bytes)
    return max(steps) + resident if steps else 0


def _step_bytes(
    model: ModelConfig, exit: ExitConfig, vocabulary: int, dtype: torch.dtype, stage: FitConfig, length: int
) -> int:
    """Two optimizer steps: the second has the optimizer's state from the start."""
    rows = max(1, stage.batch_tokens // length)
    size = rows * length
    with FakeTensorMode(), CountedMemory() as counted:
        trainer = ExitTrainer(model, exit, torch.arange(vocabulary), dtype)
        optimizer = make_optimizer(trainer, stage)
        for _ in range(2):
            batch = Batch(
                torch.empty(rows, length, model.hidden_size),
                torch.empty(rows, length, len(exit.features), model.hidden_size),
                torch.empty(size, model.hidden_size),
                torch.zeros(size, dtype=torch.int64),
                torch.arange(size),
                torch.arange(size),
            )
            optimizer.zero_grad()
            loss = trainer(batch, stage, num_positions(batch, stage.unroll_steps))
            torch.autograd.backward(loss)
            del loss
            optimizer.step()
    return counted.peak
