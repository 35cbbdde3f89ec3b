"""A run of `hopskip train exit` before it begins: its recipe, by rule where none is given, and what it will take."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hopskip.backends.gpu import find_gpu
from hopskip.backends.native import isa
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.errors import ConfigError, PromptError
from hopskip.loading import known_device
from hopskip.prompts import spread
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.durations import duration
from hopskip.train.exit.conversations import joined
from hopskip.train.exit.estimate import Work, check_start, flops_per_second, free_disk, tokens_of_prompt
from hopskip.train.exit.memory import collecting_bytes, training_bytes
from hopskip.train.exit.processes import check_trackers
from hopskip.train.exit.prompts import read_chats
from hopskip.train.exit.recipe import CollectRecipe, ExitRecipe, PromptsRecipe, folder_of
from hopskip.train.exit.rule import HOURS, Machine, recipe_values
from hopskip.train.exit.stored import read_stored
from hopskip.train.exit.turns import Chat, Turns
from hopskip.train.recipe import apply_override, make
from hopskip.train.unembed import free_memory

_LAYER_SECONDS = 0.25e-3
"""That a GPU's host takes to launch the kernels of a layer."""
_BANDWIDTH_SHARE = 0.7
_MATRIX = 4096
_LOOKED_AT = 64
"""Chats of the user's, for the length that they have."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    recipe: ExitRecipe
    checkpoint: Checkpoint
    machine: Machine
    is_begun: bool
    """Whether its folder holds a run already, which goes on."""
    tokens_of_chat: float | None = None
    """That a chat of the user's files has with its answers, where they were looked at."""

    @property
    def memory_bytes(self) -> int:
        """The most that a part of it takes, by arithmetic."""
        config, checkpoint = self.checkpoint.config, self.checkpoint
        stored = sum(checkpoint.stored(name).num_bytes for name in checkpoint.names())
        return max(collecting_bytes(self.recipe, config, stored), training_bytes(self.recipe, config, stored))

    def lines(self) -> list[str]:
        """For people."""
        recipe, config = self.recipe, self.checkpoint.config
        work, machine = Work.of(recipe, config, self.tokens_of_chat), self.machine
        depth, answers = config.num_hidden_layers, recipe.collect.answers
        names = {"model": "answered by the model", "given": "with their answers", "server": "answered by a server"}
        files = ", ".join(recipe.prompts.files)
        sources = [f"up to {recipe.prompts.max_prompts or 'all'} chats of {files}"] if files else []
        if recipe.prompts.self_written:
            sources.append(f"{recipe.prompts.self_written:,} prompts that the model writes")
        stages = ", ".join(f"{s.num_tokens:,} tokens {s.unroll_steps} ahead" for s in recipe.stages)
        is_stored = recipe.collect.states == "stored"
        shapes = "; ".join(_described(exit) for exit in recipe.exits(depth))
        return [
            f"an exit for {self.checkpoint.path.name}: {depth} layers of {config.hidden_size}, "
            f"{config.num_parameters / 1e6:,.0f} million weights",
            f"  exits      {shapes}; drafts from {min(recipe.vocabulary, config.vocab_size):,} tokens",
            f"  text       {' and '.join(sources)}, {names[answers]} in {recipe.collect.precision}: "
            f"about {work.collected_tokens:,} tokens",
            f"  training   {f'{stages}, in {recipe.precision}' if stages else 'none: exits are layers of the model'}",
            f"  disk       {work.disk_bytes / 1e9:.2f} GB in {recipe.folder}"
            f"{'' if is_stored else ': states are made on the fly'} ({machine.disk_bytes / 1e9:.0f} GB free)",
            f"  memory     {self.memory_bytes / 1e9:.1f} GB ({machine.memory_bytes / 1e9:.1f} GB free)",
            f"  time       about {duration(work.seconds(machine.flops_per_second, machine.pass_seconds))} here, by "
            "estimate, and the search for the best draft; the same command goes on after an interruption",
        ]

    def check(self) -> None:
        """Raises ConfigError if it cannot fit into memory, or if what it needs is not there."""
        check_start(self.recipe, load_tokenizer(self.checkpoint.path, self.checkpoint.config))
        check_trackers(self.recipe.report_to)
        needed = self.memory_bytes
        if needed > self.machine.memory_bytes:
            raise ConfigError(
                f"this takes about {needed / 1e9:.1f} GB of memory, and {self.machine.memory_bytes / 1e9:.1f} GB are "
                "free: lower collect.max_num_seqs or the stages' batch_tokens, or use collect.precision=q8"
            )


def _described(exit: Any) -> str:
    if not exit.num_layers:
        return f"after layer {exit.start}"
    seen = f", seeing layers {', '.join(map(str, exit.features))}" if exit.features else ""
    return f"{exit.num_layers} layer{'s' * (exit.num_layers > 1)} of its own{seen}"


def plan_by_rule(model: str | None, overrides: Seq[str], hours: float | None) -> Plan:
    """A run for a model with nothing else said, or little.

    Args:
        model: as `ExitRecipe.base`.
        overrides: `section.key=value`; they come before the rule.
        hours: of work; None: one.

    Raises:
        ConfigError: an override is wrong, or hours are given for a run that has begun or that trains nothing.
        CheckpointError: the model cannot be read.
    """
    given: dict[str, Any] = {"base": model or "default", "output": "runs/{model}-exit"}
    for override in overrides:
        apply_override(given, override)
    folder = folder_of(str(given["output"]), str(given["base"]))
    checkpoint = open_checkpoint(find_model(None if given["base"] == "default" else given["base"]))
    machine = this_machine(str(given.get("device", "auto")), folder, checkpoint)
    stored, tokens_of_chat = read_stored(folder), None
    if stored is not None:
        if hours is not None:
            raise ConfigError(f"{folder} holds a run that has begun, which --hours cannot change; use another output")
        values = {**stored["recipe"], "output": given["output"], "base": given["base"]}
    else:
        if hours is not None and checkpoint.config.recommended_exit_layer is not None:
            raise ConfigError("--hours has no effect on a model that has exits: nothing is trained; leave it out")
        values, tokens_of_chat = _by_rule(given, checkpoint, machine, HOURS if hours is None else hours)
    for override in overrides:
        apply_override(values, override)
    recipe = make(ExitRecipe, values, "")
    return Plan(
        recipe=recipe,
        checkpoint=checkpoint,
        machine=machine,
        is_begun=stored is not None,
        tokens_of_chat=tokens_of_chat,
    )


def _by_rule(
    given: dict[str, Any], checkpoint: Checkpoint, machine: Machine, hours: float
) -> tuple[dict[str, Any], float | None]:
    """A recipe's sections, and the tokens of a chat of the user's."""
    if hours <= 0:
        raise ConfigError(f"hours is {hours}; it must be above 0")
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    prompts, collect = _section(given, "prompts"), _section(given, "collect")
    if "server" in collect and "answers" not in collect:
        collect["answers"] = "server"
    has_exits = checkpoint.config.recommended_exit_layer is not None
    if not prompts.get("files") and not tokenizer.has_chat_template and not has_exits:
        raise ConfigError("the model has no chat template, so it cannot write prompts itself; give prompts.files")
    chats: list[Chat] | None = None
    tokens_of_chat = None
    if prompts.get("files"):
        own = make(PromptsRecipe, prompts, "prompts.")
        chats = read_chats(own)
        tokens_of_chat = _tokens_of(chats, tokenizer, own, make(CollectRecipe, collect, "collect."))
    found = recipe_values(
        checkpoint.config,
        machine,
        hours=hours,
        writes_prompts=tokenizer.has_chat_template and collect.get("answers") != "given",
        num_chats=None if chats is None else len(chats),
        tokens_of_chat=tokens_of_chat,
        is_packed=checkpoint.quantization is not None,
    )
    for name, section in ("prompts", prompts), ("collect", collect):
        found[name] = {**found[name], **section}
    return {**given, **found}, tokens_of_chat


def _tokens_of(chats: Seq[Chat], tokenizer: Tokenizer, prompts: PromptsRecipe, collect: CollectRecipe) -> float | None:
    """A chat's, with its answers: given ones are counted, others are taken to be as long as is usual. The mean of some
    of the chats; None if none of them has any."""
    turns = Turns(
        tokenizer=tokenizer, max_prompt_tokens=prompts.max_prompt_tokens, max_new_tokens=collect.max_new_tokens
    )
    answer = tokens_of_prompt(collect.max_new_tokens) - tokens_of_prompt(0)

    def size_of(chat: Chat) -> float:
        if collect.answers == "given":
            return sum(len(c.ids_T) for c in joined(turns.given(chat)))
        dialogue, answers = turns.dialogue(chat), list[list[int]]()
        size = 0
        while (prompt := dialogue(answers)) is not None:
            answers.append([])
            size = len(prompt)
        return size + len(answers) * answer

    found: list[float] = []
    for chat in spread(chats, _LOOKED_AT):
        with suppress(PromptError):  # it will be left out
            found.append(size_of(chat))
    return sum(found) / len(found) if any(found) else None


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{name} is {section!r}; it must be a section of keys")
    return dict(section)


def plan_of(recipe: ExitRecipe) -> Plan:
    """A run of a recipe that is given."""
    checkpoint = open_checkpoint(find_model(recipe.load.model))
    machine = this_machine(recipe.device, recipe.folder, checkpoint, recipe.threads)
    return Plan(recipe=recipe, checkpoint=checkpoint, machine=machine, is_begun=read_stored(recipe.folder) is not None)


def this_machine(device: str, folder: Path, checkpoint: Checkpoint, threads: int | None = None) -> Machine:
    """What is here to train with."""
    place = torch.device(known_device(device))
    memory, disk = free_memory(place), free_disk(folder)
    gpu = find_gpu() if place.type == "cuda" else None
    if gpu is None:
        has_bfloat16 = isa.obstacle() is None and isa.choose_isa() == "avx512"
        flops = flops_per_second(threads)
        return Machine(flops_per_second=flops, memory_bytes=memory, disk_bytes=disk, has_bfloat16=has_bfloat16)
    reading = 2 * checkpoint.config.num_parameters / (gpu.bytes_per_second * _BANDWIDTH_SHARE)
    return Machine(
        flops_per_second=_flops_of(place),
        memory_bytes=memory,
        disk_bytes=disk,
        has_bfloat16=True,
        is_gpu=True,
        pass_seconds=reading + _LAYER_SECONDS * checkpoint.config.num_hidden_layers,
    )


def _flops_of(device: torch.device) -> float:
    """Of bfloat16 products on a GPU; the best of a few."""
    left = torch.ones(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        left @ left
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) / 1e3)
    return float(2.0 * _MATRIX**3 / min(times))
