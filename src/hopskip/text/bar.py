"""A bar that shows how many of several texts are done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_UNTIL_BAR = 1.0
"""What is done sooner needs no progress bar."""


@contextmanager
def bar_of_texts(num_texts: int, is_wanted: bool) -> Iterator[Callable[[int], None]]:
    """Show how many of several texts are done: in a terminal, and not before it has taken a second."""
    if not is_wanted or num_texts < 2 or not sys.stderr.isatty():
        yield lambda num_done: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("Generating", total=num_texts)
    start = time.monotonic()

    def show(num_done: int) -> None:
        if time.monotonic() - start > _SECONDS_UNTIL_BAR:
            bar.start()
        bar.update(task, completed=num_done)

    try:
        yield show
    finally:
        bar.stop()
