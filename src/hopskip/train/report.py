"""What a run leaves for its reader: a progress bar, a log, a model card, and a recommendation for drafting."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from hopskip.draft.costs import expected_speedup
from hopskip.machine import replacing_file
from hopskip.train.durations import duration
from hopskip.train.loss import exit_metrics
from hopskip.version import describe

MAX_DRAFT_TOKENS = 8
_MAX_SHOWN_EXITS = 4
_COLUMNS = ("{task.description}", BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())


class RunLog(TrainerCallback):  # type: ignore[misc]
    """Writes what the Trainer logs to a JSON-lines file, and shows progress: a bar in a terminal, else lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = (0, 0.0)
        """Step and time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._began = (state.global_step, time.perf_counter())
        # a resumed run repeats the steps after its checkpoint, and what comes after the last step
        steps = itertools.takewhile(lambda line: "train_runtime" not in line, read_log(self.path))
        kept = [line for line in steps if line["step"] <= state.global_step]
        with replacing_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal and not os.environ.get("NO_COLOR"):
            columns = [TextColumn(c) if isinstance(c, str) else c for c in _COLUMNS]
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        text = summary(logs) + self._remaining(state)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {text}", file=sys.stderr, flush=True)

    def _remaining(self, state: Any) -> str:
        """How long the rest will take, at the pace of this process so far."""
        done, rest = state.global_step - self._began[0], state.max_steps - state.global_step
        if done <= 0 or rest <= 0:
            return ""
        return f", {duration((time.perf_counter() - self._began[1]) / done * rest)} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a crash cut off is left out."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def summary(logs: Mapping[str, float]) -> str:
    """One line: the loss, and of a few exits their loss and how often they agree with the last layer.

    >>> summary({"loss": 2.5, "exit4_loss": 3.0, "exit4_agreement": 0.5, "exit8_loss": 2.4, "exit8_agreement": 1.0})
    'loss 2.500, exit 4: 3.000 50 %, exit 8: 2.400'
    >>> summary({"loss": 2.5, "tokens_per_second": 1234.5, "mfu": 0.25})
    'loss 2.500, 1,234 tokens/s (25 % MFU)'
    """
    prefix = "eval_" if "eval_loss" in logs else ""
    if f"{prefix}loss" not in logs:
        return ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, int | float))
    parts = [f"{prefix}loss {logs[f'{prefix}loss']:.3f}"]
    losses, agreement = exit_metrics(logs, "loss", prefix), exit_metrics(logs, "agreement", prefix)
    exits = sorted(losses)
    if len(exits) > _MAX_SHOWN_EXITS:
        exits = [exits[i * (len(exits) - 1) // (_MAX_SHOWN_EXITS - 1)] for i in range(_MAX_SHOWN_EXITS)]
    for exit_layer in exits:
        agrees = agreement.get(exit_layer, 1.0)
        parts.append(
            f"exit {exit_layer}: {losses[exit_layer]:.3f}" + (f" {agrees:.0%}".replace("%", " %") if agrees < 1 else "")
        )
    if "tokens_per_second" in logs:
        share = f" ({logs['mfu']:.0%} MFU)".replace("%", " %") if "mfu" in logs else ""
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s{share}")
    return ", ".join(parts)


def measured_exits(log: Sequence[Mapping[str, Any]], num_layers: int) -> dict[int, tuple[float, float]]:
    """Loss and agreement of every exit: of the last evaluation, else of the last time that each was trained."""
    found: dict[int, tuple[float, float]] = {}
    for prefix in ("eval_", ""):
        for line in log:
            losses, agreement = exit_metrics(line, "loss", prefix), exit_metrics(line, "agreement", prefix)
            found |= {e: (losses[e], agreement[e]) for e in losses.keys() & agreement.keys() if e < num_layers}
        if found:
            break
    return dict(sorted(found.items()))


def recommend(agreement: Mapping[int, float], num_layers: int, head_layers: float) -> tuple[int, int] | None:
    """Exit layer and draft length with the greatest expected speed, from each exit's agreement with the last layer.

    Speed is `expected_speedup`: every draft token is accepted with the same probability, and bytes are what costs.
    `head_layers` is the size of the head in layers. None without any measured exit.
    """
    best = None
    for exit_layer, share in agreement.items():
        step_cost = (exit_layer + head_layers) / (num_layers + head_layers)
        for length in range(1, MAX_DRAFT_TOKENS + 1):
            speed = expected_speedup(share, length, step_cost)
            if best is None or speed > best[0]:
                best = speed, exit_layer, length
    return best[1:] if best else None


def model_card(
    *, name: str, base: str, settings: str, exits: Mapping[int, tuple[float, float]], draft: Mapping[str, int]
) -> str:
    """README.md of a finished model. `settings` is the recipe as YAML."""
    table = "\n".join(
        f"| {exit_layer} | {loss:.3f} | {math.exp(min(loss, 50)):.2f} | {agreement:.1%} |"
        for exit_layer, (loss, agreement) in exits.items()
    )
    is_hub_id = base.count("/") == 1 and not Path(base).exists()
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [layerskip, self-speculative-decoding]",
    ]
    if is_hub_id:
        front.insert(0, f"base_model: {base}")
    newline = "\n"
    drafting = (
        f"Recommended for drafting: exit layer {draft['exit_layer']}, {draft['num_draft_tokens']} draft tokens "
        "(`hopskip` in `config.json`); hopskip uses them by itself.\n"
        if draft
        else "No exit was measured, so none is recommended for drafting.\n"
    )
    return f"""---
{newline.join(front)}
---

# {name}

Trained with [hopskip](https://pypi.org/project/hopskip) {describe()} by the LayerSkip recipe
([arXiv 2404.16710](https://arxiv.org/abs/2404.16710)): its early layers can draft for all of them. An ordinary
checkpoint otherwise, for transformers, vLLM and others.

{drafting}
```console
$ hopskip generate --model {name} "Once upon a time"
```

## Exits

Cross-entropy and perplexity of every exit through the shared norm and head, and how often its best token is the last
layer's (an estimate of the acceptance rate).

| exit | cross-entropy | perplexity | agreement |
|---|---|---|---|
{table}

## Recipe

```yaml
{settings.strip()}
```
"""
