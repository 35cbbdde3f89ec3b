"""What training an exit will take, before it begins: hours, disk, and what must be installed. Needs no PyTorch."""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.errors import ConfigError
from hopskip.machine import num_usable_cores
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.exit.recipe import Branch, CollectRecipe, ExitRecipe, FitConfig, PromptsRecipe

_USUAL_PROMPTS = 4000
"""Of files that nobody has counted."""
_USUAL_SHARE = 0.7
"""Of the most tokens of an answer, that answers have."""
_USUAL_PROMPT_TOKENS = 64
_EFFICIENCY = 0.3
"""Share of a machine's matrix products that training and collecting reach: on two cores 0.2 for a model of 135 million
parameters, 0.45 for one of 1.2 billion."""


USUAL_RECIPE = ExitRecipe(
    output="",
    prompts=PromptsRecipe(self_written=4000),
    branches=(Branch(start=0, num_layers=1, features=("50%", "90%", "100%")),),
    stages=(FitConfig(num_tokens=1_500_000, unroll_steps=1), FitConfig(num_tokens=1_000_000, unroll_steps=3)),
)
"""As much work as `recipes/any-model-exit.yaml`: for who asks before there is a recipe."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much there is to do."""

    collected_tokens: int
    """Of prompts and answers, roughly."""
    trained_tokens: int
    """Of all candidates and stages."""
    collect_flops: float
    train_flops: float
    disk_bytes: int
    """For the states behind the collected tokens."""

    @classmethod
    def of(cls, recipe: ExitRecipe, model: ModelConfig) -> Work:
        """For a recipe."""
        prompts = recipe.prompts
        num_prompts = prompts.self_written + ((prompts.max_prompts or _USUAL_PROMPTS) if prompts.files else 0)
        depth = model.num_hidden_layers
        exits = [exit for exit in recipe.exits(depth) if exit.num_layers]
        work = cls._collecting(num_prompts, recipe.collect, len({*recipe.taps(depth), depth}), model)
        tokens = sum(stage.num_tokens for stage in recipe.stages)
        steps = sum(stage.num_tokens * stage.unroll_steps for stage in recipe.stages)
        train_flops = sum(6 * (exit_parameters(exit, model, recipe.vocabulary)) * steps for exit in exits)
        return cls(**{**vars(work), "trained_tokens": tokens * len(exits), "train_flops": float(train_flops)})

    @classmethod
    def _collecting(cls, num_prompts: int, collect: CollectRecipe, num_taps: int, model: ModelConfig) -> Work:
        tokens = int(num_prompts * (_USUAL_PROMPT_TOKENS + _USUAL_SHARE * collect.max_new_tokens))
        return cls(
            collected_tokens=tokens,
            trained_tokens=0,
            collect_flops=2.0 * model.num_parameters * tokens,
            train_flops=0.0,
            disk_bytes=tokens * num_taps * model.hidden_size * 2,
        )

    def seconds(self, flops_per_second: float) -> float:
        """Of collecting and training."""
        return (self.collect_flops + self.train_flops) / (_EFFICIENCY * flops_per_second)

    def described(self, flops_per_second: float) -> str:
        """In one line."""
        collecting = self.collect_flops / (_EFFICIENCY * flops_per_second)
        return (
            f"about {duration(self.seconds(flops_per_second))} here, by estimate: {duration(collecting)} to collect "
            f"{self.collected_tokens / 1e6:.1f}M tokens ({self.disk_bytes / 1e9:.1f} GB on disk), the rest to train on "
            f"{self.trained_tokens / 1e6:.1f}M; the same command goes on after an interruption"
        )


def exit_parameters(exit: ExitConfig, model: ModelConfig, vocabulary: int) -> int:
    """Weights that a token of an exit passes through, its rows of the head included."""
    layer = sum(math.prod(shape) for shape in model.layer_tensors().values())
    mixing = (len(exit.features) + 2) * model.hidden_size**2 if exit.features else 0
    return exit.num_layers * layer + mixing + vocabulary * model.hidden_size


def flops_per_second(threads: int | None = None, seconds: float = 0.3) -> float:
    """Of float32 matrix products on this machine; the best of a few.

    Args:
        threads: fewer than numpy takes by itself; None: those.
    """
    size = 1024
    left = np.ones((size, size), dtype=np.float32)
    best, ended = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < ended:
        started = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - started)
    found = 2.0 * size**3 / best
    cores = num_usable_cores()
    return found * min(1.0, (threads or cores) / cores)


def check_start(recipe: ExitRecipe, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for what would end a run after hours: a package or a chat template that is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the plot of a training needs matplotlib, not installed: pip install 'hopskip[train]'")
    if recipe.prompts.self_written and not tokenizer.has_chat_template:
        raise ConfigError(
            "the model has no chat template, so it cannot write prompts itself; give prompts.files, and self_written=0"
        )


def check_disk(work: Work, folder: Path) -> None:
    """Raises ConfigError if the states will hardly fit the disk, those that are there already counted in."""
    there = sum(path.stat().st_size for path in (folder / "data").glob("shard-*"))
    free = shutil.disk_usage(folder).free
    if work.disk_bytes - there > free:
        raise ConfigError(
            f"the states of about {work.collected_tokens / 1e6:.1f}M tokens take {work.disk_bytes / 1e9:.1f} GB, and "
            f"{folder} has {free / 1e9:.1f} GB free; give another output, or fewer prompts"
        )


def duration(seconds: float) -> str:
    """As people say it.

    >>> duration(40), duration(2000), duration(40_000), duration(400_000)
    ('1 min', '33 min', '11 h', '4.6 days')
    """
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
