"""What training an exit will take, before it begins: hours, disk, and what must be installed. Needs no PyTorch."""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.errors import ConfigError
from hopskip.machine import num_usable_cores
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.durations import duration
from hopskip.train.exit.recipe import CollectRecipe, ExitRecipe

_USUAL_PROMPTS = 4000
"""Of files that nobody has counted."""
_USUAL_SHARE = 0.7
"""Of the most tokens of an answer, that answers have."""
_USUAL_PROMPT_TOKENS = 64
EFFICIENCY = 0.3
"""Share of a machine's matrix products that training and collecting reach: on two cores 0.2 for a model of 135 million
parameters, 0.45 for one of 1.2 billion."""


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
    decoding_passes: float = 0.0
    """That answering takes: one for a token of each of the texts that are decoded together. None where it is given."""

    @classmethod
    def of(cls, recipe: ExitRecipe, model: ModelConfig, tokens_of_chat: float | None = None) -> Work:
        """For a recipe.

        Args:
            tokens_of_chat: that a chat of the recipe's files has with its answers; None: as many as a prompt and its
                answer usually have.
        """
        prompts = recipe.prompts
        usual = tokens_of_prompt(recipe.collect.max_new_tokens)
        num_chats = (prompts.max_prompts or _USUAL_PROMPTS) if prompts.files else 0
        collected = int(prompts.self_written * usual + num_chats * (tokens_of_chat or usual))
        is_stored = recipe.collect.states == "stored"
        depth = model.num_hidden_layers
        exits = [exit for exit in recipe.exits(depth) if exit.num_layers]
        work = cls._collecting(collected, recipe.collect, len({*recipe.taps(depth), depth}), model)
        tokens = sum(stage.num_tokens for stage in recipe.stages)
        steps = sum(stage.num_tokens * stage.unroll_steps for stage in recipe.stages)
        train_flops = sum(6.0 * (exit_parameters(exit, model, recipe.vocabulary)) * steps for exit in exits)
        if not is_stored:  # a pass over each batch
            train_flops += 2.0 * model.num_parameters * tokens * len(exits)
        return replace(
            work,
            trained_tokens=tokens * len(exits),
            train_flops=train_flops,
            disk_bytes=work.disk_bytes if is_stored else 4 * work.collected_tokens,
        )

    @classmethod
    def _collecting(cls, tokens: int, collect: CollectRecipe, num_taps: int, model: ModelConfig) -> Work:
        share = 1 - _USUAL_PROMPT_TOKENS / tokens_of_prompt(collect.max_new_tokens)
        answered = share * tokens if collect.answers == "model" else 0.0
        has_pass = collect.answers == "model" or collect.states == "stored"
        return cls(
            collected_tokens=tokens,
            trained_tokens=0,
            collect_flops=2.0 * model.num_parameters * tokens if has_pass else 0.0,
            train_flops=0.0,
            disk_bytes=tokens * num_taps * model.hidden_size * 2,
            decoding_passes=answered / collect.max_num_seqs,
        )

    def seconds(self, flops_per_second: float, pass_seconds: float = 0.0) -> float:
        """Of collecting and training.

        Args:
            pass_seconds: that a pass takes however few tokens it has: on a GPU, which reads all weights and is told of
                every layer. A CPU that decodes many texts together is busy with multiplying.
        """
        return self._collecting_seconds(flops_per_second, pass_seconds) + self.train_flops / (
            EFFICIENCY * flops_per_second
        )

    def _collecting_seconds(self, flops_per_second: float, pass_seconds: float) -> float:
        return self.collect_flops / (EFFICIENCY * flops_per_second) + self.decoding_passes * pass_seconds

    def described(self, flops_per_second: float, pass_seconds: float = 0.0) -> str:
        """In one line."""
        collecting = duration(self._collecting_seconds(flops_per_second, pass_seconds))
        return (
            f"about {duration(self.seconds(flops_per_second, pass_seconds))} here, by estimate: {collecting} to "
            f"collect {self.collected_tokens / 1e6:.1f}M tokens ({self.disk_bytes / 1e9:.1f} GB on disk), the rest to "
            f"train on {self.trained_tokens / 1e6:.1f}M; the same command goes on after an interruption"
        )


def tokens_of_prompt(max_new_tokens: int) -> float:
    """That a prompt and its answer have, roughly."""
    return _USUAL_PROMPT_TOKENS + _USUAL_SHARE * max_new_tokens


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
    free = free_disk(folder)
    if work.disk_bytes - there > free:
        raise ConfigError(
            f"the states of about {work.collected_tokens / 1e6:.1f}M tokens take {work.disk_bytes / 1e9:.1f} GB, and "
            f"{folder} has {free / 1e9:.1f} GB free; give another output, or fewer prompts"
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free
