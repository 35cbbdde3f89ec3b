"""The training loop of an exit: many epochs over the collected text, resumable at every checkpoint."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hopskip.errors import ConfigError
from hopskip.train.checkpoint import replacing_file
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.distill import Batch, ExitTrainer, acceptance, distillation_loss, make_batch
from hopskip.train.exit.recipe import FitConfig

_WINDOW = 64
"""Batches: conversations are sorted by length within this many, so that little is padding."""
_STATE = "state.pt"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of the log. The loss is a mean since the evaluation before."""

    num_tokens: int
    loss: float
    acceptance: list[float]
    """Share of held-out drafts whose first j tokens are all right."""
    mean_acceptance_length: float
    tokens_per_second: float


ToBatch = Callable[[Seq[Conversation]], Batch]


def fit(
    trainer: ExitTrainer,
    training: Seq[Conversation],
    held_out: Seq[Conversation],
    taps: Seq[int],
    embedding: Tensor,
    config: FitConfig,
    folder: Path,
    report: Callable[[Evaluation], None] = lambda _: None,
    doing: Callable[[float], None] = lambda share: None,
) -> None:
    """Train until `config.num_tokens`, going on from the checkpoint in `folder` if there is one.

    Writes `log.jsonl` (a line per evaluation) and `state.pt` to `folder`. Every file is whole at any time. `doing` is
    told the share of the tokens that are trained on.

    Raises:
        ConfigError: the loss is not finite, no conversation is there, or the checkpoint is of another `config`.
        TrainingError: a checkpoint cannot be written; the last one stays.
    """
    if not training or not held_out:
        raise ConfigError(f"{len(training)} conversations to train on, {len(held_out)} held out; collect more text")
    folder.mkdir(parents=True, exist_ok=True)
    to_batch = _batch_maker(trainer, taps, embedding)
    optimizer = _optimizer(trainer, config)
    num_tokens, step = _resume(folder / _STATE, trainer, optimizer, config)
    next_eval = (num_tokens // config.eval_every + 1) * config.eval_every
    losses: list[float] = []
    started, started_tokens = time.perf_counter(), num_tokens
    batches = batches_from(training, config, step)
    while num_tokens < config.num_tokens:
        batch = to_batch(next(batches))
        losses.append(_train_on(batch, trainer, optimizer, config, num_tokens))
        num_tokens += len(batch.places_P)
        step += 1
        doing(min(1.0, num_tokens / config.num_tokens))
        if num_tokens >= min(next_eval, config.num_tokens):
            next_eval += config.eval_every
            shares = evaluate(trainer, held_out, to_batch, config.unroll_steps)
            evaluation = Evaluation(
                num_tokens=num_tokens,
                loss=sum(losses) / len(losses),
                acceptance=[round(x, 4) for x in shares.tolist()],
                mean_acceptance_length=round(1 + float(shares.sum()), 4),
                tokens_per_second=(num_tokens - started_tokens) / (time.perf_counter() - started),
            )
            losses = []
            _save(folder / _STATE, trainer, optimizer, config, num_tokens, step)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(asdict(evaluation)) + "\n")
            report(evaluation)


def _batch_maker(trainer: ExitTrainer, taps: Seq[int], embedding: Tensor) -> ToBatch:
    """Makes batches of conversations for this exit, on its device."""
    index_V = torch.full((len(embedding),), -1)
    index_V[trainer.vocabulary] = torch.arange(len(trainer.vocabulary))

    def to_batch(conversations: Seq[Conversation]) -> Batch:
        return make_batch(conversations, taps, trainer.exit_config, index_V, embedding).to(trainer.device)

    return to_batch


def _optimizer(trainer: ExitTrainer, config: FitConfig) -> torch.optim.AdamW:
    matrices = [p for p in trainer.parameters() if p.ndim > 1]
    vectors = [p for p in trainer.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )


def _train_on(
    batch: Batch, trainer: ExitTrainer, optimizer: torch.optim.Optimizer, config: FitConfig, num_tokens: int
) -> float:
    """One step of the optimizer after `num_tokens` tokens; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = config.rate(num_tokens)
    targets = trainer.targets(batch)
    loss = torch.zeros((), device=trainer.device)
    for step, logits in enumerate(trainer(batch, config.unroll_steps)):
        # a draft's j-th token exists from the j-th predicted position on
        part = distillation_loss(logits, targets, batch.next_P, batch.first_P >= step, config.hard_weight)
        loss = loss + config.step_discount**step * part
    value = loss.item()
    if not math.isfinite(value):
        raise ConfigError(f"the loss is {value} after {num_tokens} tokens; lower learning_rate")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(trainer.parameters(), config.max_grad_norm)
    optimizer.step()
    return value


def _resume(path: Path, trainer: ExitTrainer, optimizer: torch.optim.Optimizer, config: FitConfig) -> tuple[int, int]:
    """Take over what `_save` wrote, if anything; the tokens and the steps that are done."""
    if not path.exists():
        return 0, 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["config"] != asdict(config):
        raise ConfigError(f"{path.parent} was trained with {state['config']}, not {asdict(config)}; use another folder")
    trainer.load_state_dict(state["trainer"])
    optimizer.load_state_dict(state["optimizer"])
    return state["progress"]["num_tokens"], state["progress"]["step"]


def _save(
    path: Path,
    trainer: ExitTrainer,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    num_tokens: int,
    step: int,
) -> None:
    state = {
        "config": asdict(config),
        "trainer": trainer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {"num_tokens": num_tokens, "step": step},
    }
    with replacing_file(path) as partial:
        torch.save(state, partial)


def batches_from(conversations: Seq[Conversation], config: FitConfig, skip: int) -> Iterator[list[Conversation]]:
    """Batches without end, epoch after epoch in a new order; the first `skip` are passed over."""
    number = 0
    epoch = 0
    while True:
        rng = random.Random(f"{config.seed} {epoch}")
        order = rng.sample(range(len(conversations)), len(conversations))
        for batch in _epoch(conversations, order, config.batch_tokens, rng):
            if number >= skip:
                yield batch
            number += 1
        epoch += 1


def _epoch(
    conversations: Seq[Conversation], order: list[int], batch_tokens: int, rng: random.Random
) -> Iterator[list[Conversation]]:
    batches: list[list[Conversation]] = []
    window: list[Conversation] = []
    size = 0
    for place, index in enumerate(order):
        window.append(conversations[index])
        size += len(conversations[index].ids_T)
        if size >= _WINDOW * batch_tokens or place == len(order) - 1:
            window.sort(key=lambda c: len(c.ids_T))
            batch: list[Conversation] = []
            for conversation in window:
                if batch and (len(batch) + 1) * len(conversation.ids_T) > batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(conversation)
            batches.append(batch)
            window, size = [], 0
    rng.shuffle(batches)
    yield from batches


@torch.no_grad()
def evaluate(trainer: ExitTrainer, conversations: Seq[Conversation], to_batch: ToBatch, unroll_steps: int) -> Tensor:
    """Share of greedy drafts whose first j tokens the model would accept, float [unroll_steps]."""
    correct: list[Tensor] = []
    firsts: list[Tensor] = []
    for start in range(0, len(conversations), 8):
        batch = to_batch(conversations[start : start + 8])
        right = [logits.argmax(dim=-1) == batch.next_P for logits in trainer(batch, unroll_steps)]
        correct.append(torch.stack(right * (unroll_steps // len(right))))
        firsts.append(batch.first_P)
    return acceptance(torch.cat(correct, dim=1), torch.cat(firsts))
