"""Measurements as pictures."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from hopskip.draft.base import Round
from hopskip.errors import ConfigError


def require_matplotlib() -> None:
    """Before a long measurement, not after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed: pip install 'hopskip[eval]'")


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars of decoded tokens per second, ours in colour.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    measured = [c for c in report["contenders"] if c["status"] == "measured"][::-1]
    names = [c["name"] for c in measured]
    rates = [c["decode_tokens_per_second"] for c in measured]
    figure = Figure(figsize=(8, 1 + 0.4 * len(measured)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["tab:blue" if name.startswith("hopskip") else "tab:gray" for name in names]
    axes.bar_label(axes.barh(names, rates, color=colours), fmt="%.1f", padding=3)
    axes.set_xlabel("decoded tokens per second")
    axes.set_title(f"{report['machine']['cpu']}, {report['machine']['threads']} threads", fontsize="medium")
    axes.margins(x=0.1)
    save(figure, path)


def write_trace_plot(rounds: Seq[Round], path: Path) -> None:
    """Above, what each round drafted (outlined) and how much of it was accepted, by source; below, where its time went.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    accepted: dict[str, dict[int, int]] = defaultdict(dict)
    drafted = [sum(part.num_draft_tokens for part in each.sequences) for each in rounds]
    for index, each in enumerate(rounds):
        for part in each.sequences:
            if part.source is not None:
                own = accepted[part.source]
                own[index] = own.get(index, 0) + part.num_accepted_tokens
    bottom = [0] * len(rounds)
    for source, counts in sorted(accepted.items()):
        heights = [counts.get(index, 0) for index in range(len(rounds))]
        above.bar(range(len(rounds)), heights, bottom=bottom, width=1, label=source)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    above.step(range(len(rounds)), drafted, where="mid", color="tab:gray", linewidth=0.7, label="drafted")
    above.set_ylabel("draft tokens accepted")
    above.legend(fontsize="small")
    layers = {
        name: [1e3 * getattr(each, f"{name}_seconds") for each in rounds]
        for name in ("draft", "pass", "choose", "commit")
    }
    below.stackplot(range(len(rounds)), *layers.values(), labels=list(layers), step="mid")
    below.set_ylabel("milliseconds")
    below.set_xlabel("round")
    below.legend(fontsize="small")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib, in the format that the file's name says.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the plot cannot be written to {str(path)!r} ({error}); give a .png file") from None
