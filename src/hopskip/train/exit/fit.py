"""The training loop of an exit branch: many epochs over the collected text, resumable at every checkpoint."""

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
from hopskip.train.exit.collect import Conversation
from hopskip.train.exit.distill import ExitTrainer, acceptance, distillation_loss, make_batch

_WINDOW = 64  # batches: conversations are sorted by length within this many, so that little is padding


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how to train."""

    num_tokens: int
    """Tokens to train on, counted with repetition and padding left out."""
    batch_tokens: int = 512
    learning_rate: float = 3e-3
    warmup: float = 0.02
    """Share of the tokens over which the learning rate rises."""
    decay: float = 0.3
    """Share of the tokens, at the end, over which it falls to zero; between, it stays."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    unroll_steps: int = 3
    step_discount: float = 0.8
    """The loss of unroll step j weighs this to the power j - 1."""
    hard_weight: float = 0.3
    """Weight of the model's own next token beside its distribution."""
    seed: int = 0
    eval_every: int = 100_000
    """Tokens between evaluations, which also write a checkpoint."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_tokens", "unroll_steps", "eval_every", "learning_rate", "warmup", "decay"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.hard_weight <= 1:
            raise ConfigError(f"hard_weight is {self.hard_weight}; it must be between 0 and 1")

    def rate(self, num_tokens: int) -> float:
        """Learning rate after so many tokens: warm-up, constant, linear decay."""
        done = num_tokens / self.num_tokens
        return self.learning_rate * max(0.0, min(1.0, done / self.warmup, (1 - done) / self.decay))


def fit(
    trainer: ExitTrainer,
    training: Seq[Conversation],
    held_out: Seq[Conversation],
    taps: Seq[int],
    embedding: Tensor,
    config: FitConfig,
    folder: Path,
    report: Callable[[dict[str, float | list[float]]], None] = lambda _: None,
) -> None:
    """Train until `config.num_tokens`, going on from the checkpoint in `folder` if there is one.

    Writes `log.jsonl` (an entry per evaluation) and `state.pt` to `folder`. Every file is whole at any time.

    Raises:
        ConfigError: the loss is not finite, no conversation is there, or the checkpoint is of another `config`.
        TrainingError: a checkpoint cannot be written; the last one stays.
    """
    if not training or not held_out:
        raise ConfigError(f"{len(training)} conversations to train on, {len(held_out)} held out; collect more text")
    folder.mkdir(parents=True, exist_ok=True)
    index_V = torch.full((len(embedding),), -1)
    index_V[trainer.vocabulary] = torch.arange(len(trainer.vocabulary))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trainer.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trainer.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
    progress = {"num_tokens": 0, "step": 0}
    state_path = folder / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        if state["config"] != asdict(config):
            raise ConfigError(f"{folder} was trained with {state['config']}, not {asdict(config)}; use another folder")
        trainer.load_state_dict(state["trainer"])
        optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
    next_eval = (progress["num_tokens"] // config.eval_every + 1) * config.eval_every
    recent: list[float] = []
    started, started_tokens = time.perf_counter(), progress["num_tokens"]
    batches = batches_from(training, config, progress["step"])
    while progress["num_tokens"] < config.num_tokens:
        batch = make_batch(next(batches), taps, trainer.branch, index_V, embedding).to(trainer.device)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(progress["num_tokens"])
        targets = trainer.targets(batch)
        loss = torch.zeros((), device=trainer.device)
        for step, logits in enumerate(trainer(batch, config.unroll_steps)):
            # a draft's j-th token exists from the j-th predicted position on
            part = distillation_loss(logits, targets, batch.next_P, batch.first_P >= step, config.hard_weight)
            loss = loss + config.step_discount**step * part
        if not math.isfinite(loss.item()):
            raise ConfigError(f"the loss is {loss.item()} after {progress['num_tokens']} tokens; lower learning_rate")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), config.max_grad_norm)
        optimizer.step()
        recent.append(loss.item())
        progress["num_tokens"] += len(batch.places_P)
        progress["step"] += 1
        if progress["num_tokens"] >= min(next_eval, config.num_tokens):
            next_eval += config.eval_every
            shares = evaluate(trainer, held_out, taps, index_V, embedding, config)
            entry: dict[str, float | list[float]] = {
                "num_tokens": progress["num_tokens"],
                "loss": sum(recent) / len(recent),
                "acceptance": [round(x, 4) for x in shares.tolist()],
                "mean_acceptance_length": round(1 + float(shares.sum()), 4),
                "tokens_per_second": (progress["num_tokens"] - started_tokens) / (time.perf_counter() - started),
            }
            recent = []
            state = {
                "config": asdict(config),
                "trainer": trainer.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": progress,
            }
            with replacing_file(state_path) as partial:
                torch.save(state, partial)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            report(entry)


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
def evaluate(
    trainer: ExitTrainer,
    conversations: Seq[Conversation],
    taps: Seq[int],
    index_V: Tensor,
    embedding: Tensor,
    config: FitConfig,
) -> Tensor:
    """Share of greedy drafts whose first j tokens the model would accept, float [unroll_steps]."""
    correct: list[Tensor] = []
    firsts: list[Tensor] = []
    for start in range(0, len(conversations), 8):
        batch = make_batch(conversations[start : start + 8], taps, trainer.branch, index_V, embedding)
        batch = batch.to(trainer.device)
        right = [logits.argmax(dim=-1) == batch.next_P for logits in trainer(batch, config.unroll_steps)]
        correct.append(torch.stack(right * (config.unroll_steps // len(right))))
        firsts.append(batch.first_P)
    return acceptance(torch.cat(correct, dim=1), torch.cat(firsts))
