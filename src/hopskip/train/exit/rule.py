"""A recipe for any model, by rule: from its depth and width, whether it can write prompts, and what the machine can do
in so many hours. Needs no PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.train.exit.estimate import EFFICIENCY, exit_parameters, free_disk, tokens_of_prompt
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.recipe import make

HOURS = 1.0
"""Of work, where nobody says how many."""
FEATURES = ("50%", "90%", "100%")
"""What the last pass left behind half-way, near the end and at the end."""
OPENINGS = (
    *("", "", "", "", "", "", "", "", "Write", "How", "What", "Explain", "Describe", "Give", "Create", "Imagine"),
    *("Rewrite", "Compose", "Implement", "def ", "Write a Python function", "Can you"),
)
_SHIPPED_SETS = ("alpaca", "gsm8k", "humaneval", "mt_bench")
_LEAST_TOKENS, _MOST_TOKENS = 100_000, 100_000_000
"""To collect: fewer teach an exit next to nothing, more were never tried."""
_ONE_STEP, _UNROLLED, _UNROLL_STEPS = 1.5, 1.0, 3
"""Tokens to train on for each that is collected: first one step ahead, which costs a third, then three."""
_MOST_EPOCHS = 5
"""Over text that there is no more of: an exit learns next to nothing from the fourth pass on."""
_SEARCH = {
    "num_prompts": 8,
    "max_new_tokens": 96,
    "num_draft_tokens": [2, 3, 4],
    "num_runner_ups": [0, 1, 2],
    "repeats": 2,
}
_SHARE_OF_SEARCH = 0.1
"""Of the hours."""
_RATE_OF_WIDTH = 3e-3 * 576
"""Learning rate times hidden size: good for SmolLM2-135M, and by the usual rule for others."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a recipe must fit."""

    flops_per_second: float
    """Of matrix products in the precision of training."""
    memory_bytes: int
    """That are free, of the GPU if that is what trains."""
    disk_bytes: int
    """That are free where the run is to be."""
    has_bfloat16: bool
    """Whether it multiplies in it faster than in float32."""
    is_gpu: bool = False
    pass_seconds: float = 0.0
    """That a pass of the model takes however few tokens it has, see `Work.seconds`."""


def vocabulary_size(model: ModelConfig) -> int:
    """Of the draft vocabulary: a power of two whose rows of the head are about two thirds of a layer, so that reading
    them takes no longer; from 8,192 to 32,768, and at most half of the model's."""
    layer = sum(math.prod(shape) for shape in model.layer_tensors().values())
    rows: int = 2 ** round(math.log2(2 / 3 * layer / model.hidden_size))
    return max(1, min(max(8192, min(rows, 32_768)), model.vocab_size // 2))


def recipe_values(
    model: ModelConfig,
    machine: Machine,
    *,
    hours: float = HOURS,
    writes_prompts: bool = True,
    num_chats: int | None = None,
    tokens_of_chat: float | None = None,
    is_packed: bool = False,
) -> dict[str, Any]:
    """The sections of a recipe, as a YAML file would have them, but for `output` and `base`.

    A model that was trained by the LayerSkip recipe, as its config says or its name, has exits already: what is left to
    find is the best one of them, and its vocabulary.

    Args:
        writes_prompts: whether the model has a chat template, and so can write prompts itself.
        num_chats: in files that the user gives; None: there are none.
        tokens_of_chat: that one of them has with its answers; None: as many as a prompt and its answer usually have.
        is_packed: whether the model is stored in few bits: the native engine then runs it, and answers, as it is.
    """
    size = vocabulary_size(model)
    precision = "auto" if is_packed and not machine.is_gpu else _precision(model, machine)
    values: dict[str, Any] = {
        "collect": {"precision": precision, "max_num_seqs": _num_seqs(model, machine, precision)},
        "vocabulary": size,
        "fill_vocabulary": True,
        "precision": "bfloat16" if machine.has_bfloat16 else "float32",
        "num_workers": 2 if machine.is_gpu else 0,
        "search": {**_SEARCH, "vocabulary": [size // 2] if size > 8192 else []},
    }
    if model.recommended_exit_layer is not None:
        return {**values, **_of_trained_exits(model, writes_prompts, num_chats)}
    exit = ExitConfig(start=0, num_layers=1, features=tuple(range(1, 1 + min(3, model.num_hidden_layers))))
    num_seqs = values["collect"]["max_num_seqs"]
    tokens = _tokens(model, exit, size, machine, hours, num_seqs)
    each = tokens_of_chat or tokens_of_prompt(256)
    num_prompts = max(1, round(tokens / each))
    prompts = _prompts(num_prompts, writes_prompts, num_chats)
    if not writes_prompts and num_chats is not None:
        tokens = min(tokens, round(_MOST_EPOCHS * num_chats * each / (_ONE_STEP + _UNROLLED)))
    branch = {"start": 0, "num_layers": 1, "features": list(FEATURES)}
    if _state_bytes(model, tokens) > machine.disk_bytes / 2:
        values["collect"]["states"] = "on-the-fly"
        values["num_workers"] = 0
    return {
        **values,
        "branches": [branch],
        "prompts": prompts,
        "held_out_every": max(5, min(40, num_prompts // 32)),
        "stages": _stages(model, tokens, machine),
    }


def usual_recipe(model: ModelConfig, flops_per_second: float) -> ExitRecipe:
    """For who asks what an exit would take, with all of this machine's memory and disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = Machine(
        flops_per_second=flops_per_second,
        memory_bytes=memory,
        disk_bytes=free_disk(Path()),
        has_bfloat16=False,
    )
    recipe: ExitRecipe = make(ExitRecipe, {"output": "", **recipe_values(model, machine)}, "")
    return recipe


def _tokens(
    model: ModelConfig, exit: ExitConfig, vocabulary: int, machine: Machine, hours: float, num_seqs: int
) -> int:
    """To collect, so that this and the training on it take so long."""
    weights = exit_parameters(exit, model, vocabulary)
    flops = 2.0 * model.num_parameters + 6.0 * weights * (_ONE_STEP + _UNROLLED * _UNROLL_STEPS)
    each = flops / (EFFICIENCY * machine.flops_per_second) + machine.pass_seconds / num_seqs
    found = 3600 * hours * (1 - _SHARE_OF_SEARCH) / each
    return int(min(max(found, _LEAST_TOKENS), _MOST_TOKENS))


def _stages(model: ModelConfig, tokens: int, machine: Machine) -> list[dict[str, Any]]:
    rate = float(f"{_RATE_OF_WIDTH / max(576, model.hidden_size):.1e}")
    batch = 4096 if machine.is_gpu else 512
    first, second = (_round(share * tokens) for share in (_ONE_STEP, _UNROLLED))
    common = {"batch_tokens": batch, "eval_every": max(20_000, _round(tokens / 8))}
    return [
        {**common, "num_tokens": first, "learning_rate": rate, "decay": 0.1, "unroll_steps": 1},
        {**common, "num_tokens": second, "learning_rate": float(f"{rate * 2 / 3:.1e}"), "decay": 0.7,
         "unroll_steps": _UNROLL_STEPS, "seed": 1},
    ]  # fmt: skip


def _prompts(number: int, writes_prompts: bool, num_chats: int | None) -> Mapping[str, Any]:
    """The user's chats, as many as there is time for, and the model's own prompts where they are too few."""
    written = number - (num_chats or 0) if writes_prompts else 0
    prompts: dict[str, Any] = {} if num_chats is None else {"max_prompts": max(1, min(number, num_chats))}
    if written > 0:
        prompts |= {"self_written": written, "openings": list(OPENINGS)}
    return prompts


def _of_trained_exits(model: ModelConfig, writes_prompts: bool, num_chats: int | None) -> dict[str, Any]:
    """Exits around the recommended one, with nothing to train: enough text to measure with."""
    best, depth = model.recommended_exit_layer or 1, model.num_hidden_layers
    starts = sorted({start for start in (best // 2, best, best + best // 2) if 0 < start < depth})
    prompts = _prompts(200, writes_prompts, num_chats)
    if not prompts:
        prompts = {"files": list(_SHIPPED_SETS), "max_prompts": 200}
    return {
        "branches": [{"start": start, "num_layers": 0} for start in starts],
        "prompts": prompts,
        "held_out_every": 10,
        "stages": [],
    }


def _state_bytes(model: ModelConfig, tokens: int) -> int:
    return tokens * len(FEATURES) * model.hidden_size * 2


def _precision(model: ModelConfig, machine: Machine) -> str:
    """Of the model: the highest that leaves half of the memory to everything else."""
    room = machine.memory_bytes / 2
    if machine.is_gpu or 2 * model.num_parameters <= room:
        return "bfloat16"
    return "q8" if 34 / 32 * model.num_parameters <= room else "q4"


_WIDTHS = {"bfloat16": 2.0, "q8": 34 / 32, "q4": 18 / 32, "auto": 34 / 32}


def _num_seqs(model: ModelConfig, machine: Machine, precision: str) -> int:
    """That are decoded together: 64, or as many as the keys and values of have room."""
    kv_bytes = 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    state_bytes = 2 * len(FEATURES) * model.hidden_size
    each = (kv_bytes + state_bytes) * 1280
    room = (machine.memory_bytes - _WIDTHS[precision] * model.num_parameters) / 2
    return max(1, min(64, int(room / each)))


def _round(tokens: float) -> int:
    """To two digits.

    >>> _round(123_456)
    120000
    """
    return int(float(f"{tokens:.1e}"))
