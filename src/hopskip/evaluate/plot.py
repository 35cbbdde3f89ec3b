"""A benchmark as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the plot cannot be written to {str(path)!r} ({error}); give a .png file") from None
