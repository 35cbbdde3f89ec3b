"""Plots of training: exits of a model trained by the LayerSkip recipe, and drafts of a trained exit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hopskip.errors import ConfigError
from hopskip.train.loss import exit_metrics


def plot_exits(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and agreement of every exit over the steps: lines for training, dots for evaluations.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = _new_figure(9, 7)
    from matplotlib import colormaps

    above, below = figure.subplots(2, 1, sharex=True)
    exits = sorted({e for line in log for prefix in ("", "eval_") for e in exit_metrics(line, "loss", prefix)})
    for exit_layer in exits:
        colour = colormaps["viridis"](exit_layer / max(exits))
        for axes, kind in ((above, "loss"), (below, "agreement")):
            for prefix, style in (("", "-"), ("eval_", "o")):
                points = [
                    (line["step"], values[exit_layer])
                    for line in log
                    if exit_layer in (values := exit_metrics(line, kind, prefix))
                ]
                label = f"exit {exit_layer}" if not prefix else None
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label) if points else None
    evaluated = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    if evaluated:
        above.plot(*zip(*evaluated, strict=True), "k^", label="last layer, evaluated")
    above.set_ylabel("cross-entropy")
    above.legend(fontsize="x-small", ncols=4)
    below.set_ylabel("best token is the last layer's")
    below.set_ylim(0, 1)
    below.set_xlabel("step")
    figure.savefig(path)


def plot_acceptance(folder: Path, path: Path) -> None:
    """Acceptance over training tokens, from the logs of an exit's stages.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = _new_figure(7, 4.5)
    axes = figure.subplots()
    curves: dict[int, list[tuple[int, float]]] = {}
    done = 0
    for stage in sorted(folder.glob("stage-*")):
        log = [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for evaluation in log:
            for step, share in enumerate(evaluation["acceptance"]):
                curves.setdefault(step, []).append((done + evaluation["num_tokens"], share))
        done += log[-1]["num_tokens"]
    for step, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=f"first {step + 1} right")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("share of held-out drafts")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install 'hopskip[train]'") from None
    return Figure(figsize=(width, height), layout="constrained")
