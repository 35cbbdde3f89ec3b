"""The training loop of an exit: many epochs over the collected text, resumable at every checkpoint.

It runs in one process, or in several that share each optimizer step (`torchrun`), through `accelerate`.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hopskip.errors import ConfigError
from hopskip.train.checkpoint import replacing_file
from hopskip.train.exit.acceptance import Acceptance
from hopskip.train.exit.batch import Batch
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.distill import ExitTrainer, make_optimizer, num_positions
from hopskip.train.exit.feed import Feed
from hopskip.train.exit.recipe import FitConfig

_WINDOW = 64
"""Batches: conversations are sorted by length within this many, so that little is padding."""
_STATE = "state.pt"
_MAY_CHANGE = ("eval_every", "early_stopping")
"""Fields of `FitConfig` that a stage may go on with other values of."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of the log. The loss is a mean since the evaluation before."""

    num_tokens: int
    loss: float
    acceptance: list[float]
    """Share of held-out drafts whose first j tokens are all right, a draft from every position."""
    mean_acceptance_length: float
    acceptance_at_starts: list[float]
    """The same of the drafts that an engine makes, each of which begins where the one before has failed."""
    tokens_per_pass: float
    """By these."""
    tokens_per_second: float


@dataclass
class _Progress:
    """How far a stage is. All of it is in the checkpoint."""

    num_tokens: int = 0
    step: int = 0
    """Of the optimizer."""
    best: float = 0.0
    """Tokens a pass of the best evaluation."""
    num_worse: int = 0
    """Evaluations since then."""


class Stage:
    """One training of an exit.

    Args:
        identity: what else the result depends on; a checkpoint with another is refused.
        report: told of every evaluation.
        doing: told the share of the tokens that are trained on.
    """

    def __init__(
        self,
        trainer: ExitTrainer,
        feed: Feed,
        config: FitConfig,
        folder: Path,
        *,
        identity: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        report: Callable[[Evaluation], None] = lambda _: None,
        doing: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._trainer, self._feed, self._config, self._folder = trainer, feed, config, folder
        self._accelerator = accelerator or Accelerator(cpu=trainer.device.type == "cpu")
        self._report, self._doing = report, doing
        self._settings = {
            **asdict(config),
            **(identity or {}),
            "batches per step": self._num_batches,
        }
        self._model, self._optimizer = self._accelerator.prepare(
            trainer, make_optimizer(trainer, config), device_placement=[False, False]
        )
        self._progress = _Progress()
        self._log: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}
        """Weights of the best evaluation."""

    @property
    def _num_batches(self) -> int:
        """That an optimizer step takes together, of all processes."""
        return self._config.gradient_accumulation_steps * int(self._accelerator.num_processes)

    def run(self, training: Seq[Conversation], held_out: Seq[Conversation]) -> None:
        """Train until `config.num_tokens`, going on from the checkpoint in the folder if there is one. The weights of
        the best evaluation are left.

        Writes `log.jsonl` (a line per evaluation) and `state.pt`. Every file is whole at any time.

        Raises:
            ConfigError: no conversation is there, the states or the loss are not numbers, or the checkpoint is of
                another stage.
            TrainingError: a checkpoint cannot be written; the last one stays.
        """
        if not training or not held_out:
            raise ConfigError(f"{len(training)} conversations to train on, {len(held_out)} held out; collect more text")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        config, progress = self._config, self._progress
        losses: list[float] = []
        started, started_tokens = time.perf_counter(), progress.num_tokens
        batches = self._batches(training)
        while not self._is_over():
            num_before = progress.num_tokens
            losses.append(self._step([next(batches) for _ in range(config.gradient_accumulation_steps)]))
            self._doing(min(1.0, progress.num_tokens / config.num_tokens))
            is_due = num_before // config.eval_every != progress.num_tokens // config.eval_every
            if not is_due and progress.num_tokens < config.num_tokens:
                continue
            found = self._evaluate(held_out)
            evaluation = Evaluation(
                num_tokens=progress.num_tokens,
                loss=sum(losses) / len(losses),
                acceptance=found.shares,
                mean_acceptance_length=round(1 + sum(found.shares), 4),
                acceptance_at_starts=found.shares_at_starts,
                tokens_per_pass=round(1 + sum(found.shares_at_starts), 4),
                tokens_per_second=(progress.num_tokens - started_tokens) / (time.perf_counter() - started),
            )
            losses = []
            self._note(evaluation)
        if progress.num_worse:
            self._trainer.load_state_dict(self._best)
        self._accelerator.free_memory()

    def _is_over(self) -> bool:
        patience = self._config.early_stopping
        has_stopped = patience is not None and self._progress.num_worse >= patience
        return has_stopped or self._progress.num_tokens >= self._config.num_tokens

    def _batches(self, training: Seq[Conversation]) -> Iterator[Batch]:
        """Those of this process, from the step on that comes next."""
        config, rank, world = self._config, self._accelerator.process_index, self._accelerator.num_processes
        wanted = numbered_batches(training, config, self._progress.step * self._num_batches)
        own = (batch for number, batch in wanted if number % world == rank)
        return self._feed.batches(training, own, self._trainer.device)

    def _step(self, batches: Seq[Batch]) -> float:
        """One step of the optimizer; returns the loss."""
        config, accelerator, progress = self._config, self._accelerator, self._progress
        counts_2J = sum((num_positions(batch, config.unroll_steps) for batch in batches), start=torch.tensor(0))
        counts_2J = accelerator.reduce(counts_2J.to(self._trainer.device), "sum")
        for group in self._optimizer.param_groups:
            group["lr"] = config.rate(progress.num_tokens)
        self._optimizer.zero_grad()
        value = torch.zeros((), device=self._trainer.device)
        for number, batch in enumerate(batches, start=1):
            with accelerator.no_sync(self._model) if number < len(batches) else nullcontext():
                loss = self._model(batch, config, counts_2J)
                value += loss.detach()
                # gradients are averaged over the processes, and the loss is already a mean over what they have together
                accelerator.backward(loss * accelerator.num_processes)
        total = float(accelerator.reduce(value, "sum"))
        if not math.isfinite(total):
            raise self._not_finite(total, batches)
        accelerator.clip_grad_norm_(self._model.parameters(), config.max_grad_norm)
        self._optimizer.step()
        progress.num_tokens += int(counts_2J[0, 0])
        progress.step += 1
        return total

    def _not_finite(self, loss: float, batches: Seq[Batch]) -> ConfigError:
        after = f"after {self._progress.num_tokens} tokens"
        if all(batch.is_finite for batch in batches):
            return ConfigError(f"the loss is {loss} {after}; lower learning_rate")
        return ConfigError(
            f"the model's states of a conversation are not numbers ({after}); collect in another precision "
            "(collect.precision), to another output"
        )

    @torch.no_grad()
    def _evaluate(self, held_out: Seq[Conversation]) -> Acceptance:
        """Greedy drafts for what is not trained on, all processes together."""
        num_steps, accelerator = self._config.unroll_steps, self._accelerator
        found = Acceptance.none(num_steps)
        parts = [list(range(first, min(first + 8, len(held_out)))) for first in range(0, len(held_out), 8)]
        own = parts[accelerator.process_index :: accelerator.num_processes]
        for batch in self._feed.batches(held_out, own, self._trainer.device):
            right = [logits.argmax(dim=-1) == batch.next_P for logits in self._trainer.unroll(batch, num_steps)]
            found.add(torch.stack(right * (num_steps // len(right))), batch.first_P)
        device = self._trainer.device
        both = torch.stack((found.everywhere, found.at_starts)).to(device)
        return Acceptance(*accelerator.reduce(both, "sum").cpu())

    def _note(self, evaluation: Evaluation) -> None:
        """Checkpoint and log, then tell."""
        progress, accelerator = self._progress, self._accelerator
        if evaluation.tokens_per_pass >= progress.best:
            progress.best, progress.num_worse, self._best = evaluation.tokens_per_pass, 0, self._weights()
        else:
            progress.num_worse += 1
        self._log.append(asdict(evaluation))
        if accelerator.is_main_process:
            state = {
                "settings": self._settings,
                "trainer": self._trainer.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "progress": asdict(progress),
                "log": self._log,
                "best": self._best if progress.num_worse else None,
            }
            with replacing_file(self._folder / _STATE) as partial:
                torch.save(state, partial)
            self._write_log()
        accelerator.wait_for_everyone()
        numbers = {f"acceptance_{j}": share for j, share in enumerate(evaluation.acceptance_at_starts, start=1)}
        numbers |= {"loss": evaluation.loss, "tokens_per_pass": evaluation.tokens_per_pass}
        accelerator.log({f"{self._folder.parent.name}/{self._folder.name}/{k}": v for k, v in numbers.items()},
                        step=evaluation.num_tokens)  # fmt: skip
        self._report(evaluation)

    def _weights(self) -> dict[str, Tensor]:
        """A copy of them."""
        return {name: values.detach().cpu().clone() for name, values in self._trainer.state_dict().items()}

    def _write_log(self) -> None:
        with replacing_file(self._folder / "log.jsonl") as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in self._log), encoding="utf-8")

    def _resume(self) -> None:
        """Take over what `_note` wrote, if anything."""
        path = self._folder / _STATE
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self._settings.items():
            before = state["settings"].get(name)
            if before != value and name not in _MAY_CHANGE:
                raise ConfigError(
                    f"{self._folder} was trained with {name} = {before}, not {value}; set it back, use another output, "
                    "or remove the folder to train anew on what was collected"
                )
        self._trainer.load_state_dict(state["trainer"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._progress, self._log = _Progress(**state["progress"]), state["log"]
        self._best = state["best"] or self._weights()
        if self._accelerator.is_main_process:
            self._write_log()  # it may have ended between the two


def numbered_batches(conversations: Seq[Conversation], config: FitConfig, skip: int) -> Iterator[tuple[int, list[int]]]:
    """Batches without end, as indices of conversations and numbered from 0, epoch after epoch in a new order; the first
    `skip` are passed over."""
    lengths = [len(c.ids_T) for c in conversations]
    number = epoch = 0
    while True:
        rng = random.Random(f"{config.seed} {epoch}")
        order = rng.sample(range(len(lengths)), len(lengths))
        for batch in _epoch(lengths, order, config.batch_tokens, rng):
            if number >= skip:
                yield number, batch
            number += 1
        epoch += 1


def _epoch(lengths: Seq[int], order: list[int], batch_tokens: int, rng: random.Random) -> Iterator[list[int]]:
    batches: list[list[int]] = []
    window: list[int] = []
    size = 0
    for place, index in enumerate(order):
        window.append(index)
        size += lengths[index]
        if size >= _WINDOW * batch_tokens or place == len(order) - 1:
            window.sort(key=lengths.__getitem__)
            batch: list[int] = []
            for each in window:
                if batch and (len(batch) + 1) * lengths[each] > batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(each)
            batches.append(batch)
            window, size = [], 0
    rng.shuffle(batches)
    yield from batches
