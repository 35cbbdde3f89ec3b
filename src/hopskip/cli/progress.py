"""What takes longer than a second says what it is doing, on stderr: in a terminal with a bar and the time that remains,
elsewhere (a pipe, NO_COLOR, a terminal that cannot draw) with a plain line every few seconds. --quiet silences it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_FIRST_LINE, _NEXT_LINES = 2.0, 5.0
"""Seconds until something is said in plain lines, and between them."""

_is_silent: ContextVar[bool] = ContextVar("is_silent", default=False)


@contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Show no progress in this block if `silent`: what --quiet does."""
    before = _is_silent.set(silent or _is_silent.get())
    try:
        yield
    finally:
        _is_silent.reset(before)


class Progress:
    """Told what is being done; see `progress`."""

    def __init__(self, show: Callable[[str, float | None], None] | None = None) -> None:
        self._show = show

    def doing(self, what: str, share: float | None = None) -> None:
        """What is done now, and the share of it that is done, up to 1; None if nobody knows."""
        if self._show is not None:
            self._show(what, share)


@contextmanager
def progress(what: str, *, quiet: bool = False, undisturbed: bool = False) -> Iterator[Progress]:
    """Show how far the work of this block is.

    Args:
        undisturbed: show it only when told something, and wake up for nothing between: for work that is timed.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if quiet or _is_silent.get() or sys.stderr is None:
        yield Progress()
    elif draws(console):
        with _bar(what, console, undisturbed) as show:
            yield Progress(show)
    else:
        lines = _Lines(what, undisturbed)
        try:
            yield Progress(lines.show)
        finally:
            lines.end()


@contextmanager
def loading(model: str | Path | None, *, quiet: bool = False) -> Iterator[Progress]:
    """Show how far a model is, while it is found, loaded and got ready."""
    from rich.console import Console

    if quiet or _is_silent.get() or not draws(Console(stderr=True)):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with progress(f"loading {model or 'SmolLM2-135M-Instruct'}", quiet=quiet) as shown:
        yield shown


def draws(console: Console) -> bool:
    """Whether a bar can be drawn and redrawn there."""
    return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("NO_COLOR")


@contextmanager
def _bar(what: str, console: Console, undisturbed: bool) -> Iterator[Callable[[str, float | None], None]]:
    from rich.markup import escape
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        *((SpinnerColumn(style="dim"),) if not undisturbed else ()),
        *(TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn()),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # where stdout goes elsewhere, what is printed there must not be drawn above the bar
    with Bar(
        *columns,
        console=console,
        transient=True,
        auto_refresh=not undisturbed,
        redirect_stdout=sys.stdout.isatty(),
        speed_estimate_period=600,  # the time that remains, where a part takes minutes
    ) as bar:
        task = bar.add_task(escape(_sentence(what)), total=None)
        before: tuple[str, float | None] = (what, None)

        def show(what: str, share: float | None) -> None:
            nonlocal before, task
            text = escape(_sentence(what))
            if _is_other_work(*before, what, share):
                bar.remove_task(task)
                task = bar.add_task(text, total=None if share is None else 1.0)
            before = what, share
            bar.update(task, description=text, completed=share or 0.0, refresh=undisturbed)

        yield show


def _is_other_work(before: str, share_before: float | None, what: str, share: float | None) -> bool:
    """Whether the time until now tells nothing of the time that remains. Parts of one work may have names of their own:
    its share goes on rising then."""
    if share is None or share_before is None:
        return what != before or share is not share_before
    return share < share_before


class _Lines:
    """Plain lines: the first after two seconds, so that what is quick says nothing, then one every few seconds."""

    def __init__(self, what: str, undisturbed: bool) -> None:
        self._lock = threading.Lock()
        self._what, self._started = what, time.monotonic()
        self._share: float | None = None
        self._first_share = 0.0
        self._due = time.monotonic() + _FIRST_LINE
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        if not undisturbed:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def show(self, what: str, share: float | None) -> None:
        with self._lock:
            if _is_other_work(self._what, self._share, what, share):
                self._started, self._first_share = time.monotonic(), share or 0.0
            self._what, self._share = what, share
        if self._thread is None:
            self._print_if_due()

    def end(self) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(max(0.0, self._due - time.monotonic())):
            self._print_if_due()

    def _print_if_due(self) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _NEXT_LINES
        with self._lock:
            text = line(self._what, self._share, self._first_share, now - self._started)
        with suppress(OSError, ValueError):  # nobody listens any more
            print(f"hopskip: {text}", file=sys.stderr, flush=True)


def line(what: str, share: float | None, first_share: float, seconds: float) -> str:
    """What is done, how much of it, and how long the rest may take.

    >>> line("packing weights", 0.25, 0.0, 10.0), line("packing weights", None, 0.0, 10.0)
    ('packing weights: 25 %, about 30 s left', 'packing weights: 10 s so far')
    """
    if share is None:
        return f"{what}: {_duration(seconds)} so far"
    done = share - first_share
    left = f", about {_duration(seconds * (1 - share) / done)} left" if done > 0 and share < 1 else ""
    return f"{what}: {share:.0%}{left}".replace("%", " %")


def _duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 10 min`: rounded, for people."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _sentence(what: str) -> str:
    return what[:1].upper() + what[1:]
