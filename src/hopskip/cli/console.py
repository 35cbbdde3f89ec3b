"""What the commands write: text on stdout, everything about it (errors, warnings, statistics) on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from hopskip.cli.progress import loading
from hopskip.version import stamp

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hopskip.llm import LLM, StreamPiece
    from hopskip.loading import LoadConfig
    from hopskip.sequence import SpeculativeStats, Token
    from hopskip.speculative import SpeculativeConfig

_STYLES = {
    "early-exit": "green",
    "exit-branch": "green",
    "layer-skip": "green",
    "ngram": "cyan",
    "target": "",
    "bonus": "yellow",
}
"""A colour for each origin of a token."""
_NAMES = {"ngram": "n-gram"}

# a model must not move the cursor or recolour the terminal
_CONTROL_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def print_error(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    print(f"hopskip: error: {_one_line(message)}", file=sys.stderr)


def print_note(message: str) -> None:
    """A line beside the text: dim, on stderr."""
    _stderr().print(message, style="dim", highlight=False, markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """A result on stdout, with the version of its schema and hopskip's."""
    print(json.dumps(stamp() | value, ensure_ascii=False, indent=2, allow_nan=False))


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show every warning as one line on stderr, without the place in the code that raised it."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"hopskip: warning: {_one_line(str(message))}", file=file or sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def load_llm(load: LoadConfig, speculative: SpeculativeConfig, *, quiet: bool = False, **options: Any) -> LLM:
    """Load a model, and show how far it is unless `quiet`. Takes further options of `LLM`."""
    with loading(load.model, quiet=quiet) as shown:
        from hopskip.llm import LLM

        arguments = {**vars(load), **options}
        return LLM(speculative=speculative, progress=shown.doing, **arguments)


class PieceWriter:
    """Writes a text as it comes; in a terminal with a colour for where each token came from."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(highlight=False)
        self._is_terminal = console.is_terminal
        # rich takes 0.1 ms to lay out a piece, per cents of a fast model's time for a token; so its codes are kept
        self._codes: dict[str, tuple[str, str]] = {}
        for origin in _STYLES:
            with console.capture() as capture:
                console.print(_styled("x", origin), end="")
            before, _, after = capture.get().partition("x")
            self._codes[origin] = before, after
        self._ends_line = True

    def write(self, piece: StreamPiece) -> None:
        if not piece.text:
            return
        shown = piece.text
        if self._is_terminal:
            before, after = self._codes[piece.token.origin]
            shown = f"{before}{shown.translate(_CONTROL_CHARACTERS)}{after}"
        self._ends_line = piece.text.endswith("\n")  # before writing, which Ctrl-C may cut short
        sys.stdout.write(shown)
        sys.stdout.flush()

    def end(self) -> None:
        """End the last line, if it is not ended yet."""
        if not self._ends_line:
            print(flush=True)
            self._ends_line = True


def print_statistics(stats: SpeculativeStats, tokens: Iterable[Token], ending: str, seed: int | None) -> None:
    """A table of what one generation cost and what drafting gave, on stderr."""
    console = _stderr()
    console.print()
    console.print(_statistics(stats, _legend(tokens), ending, seed))


def print_summary(stats: SpeculativeStats, ending: str) -> None:
    """The statistics in one line, for a chat."""
    parts = [f"{stats.num_tokens} tokens", f"{stats.decode_tokens_per_second:.1f} tokens/s"]
    if stats.num_drafts:
        parts.append(f"{stats.acceptance_rate:.0%} of {stats.num_draft_tokens} draft tokens accepted")
    parts.append(f"prompt {stats.num_prompt_tokens}, {stats.num_cached_prompt_tokens} of it cached")
    print_note(f"[{'; '.join([*parts, ending])}]")


def _statistics(stats: SpeculativeStats, legend: Text, ending: str, seed: int | None) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("tokens", f"{stats.num_tokens} after a prompt of {stats.num_prompt_tokens}; {ending}")
    table.add_row("", legend)
    if seed is not None:
        table.add_row("seed", str(seed))
    table.add_row("prefill", f"{stats.prefill_seconds:.3f} s, {stats.prefill_tokens_per_second:.1f} tokens/s")
    table.add_row("decode", f"{stats.decode_seconds:.3f} s, {stats.decode_tokens_per_second:.1f} tokens/s")
    if not stats.num_drafts:
        table.add_row("drafts", "none")
        return table
    table.add_row(
        "drafts",
        f"{stats.num_drafts} with {stats.num_draft_tokens} tokens, {stats.num_accepted_tokens} of them accepted "
        f"({stats.acceptance_rate:.1%})",
    )
    table.add_row("", f"mean acceptance length {stats.mean_acceptance_length:.2f}")
    shares = [f"{count / stats.num_drafts:.0%}" for count in stats.num_accepted_tokens_per_pos]
    table.add_row("", f"accepted by position {' '.join(shares)}")
    return table


def _legend(tokens: Iterable[Token]) -> Text:
    """Every origin in its colour, with the number of tokens that came from it."""
    from rich.text import Text

    counts = Counter(token.origin for token in tokens)
    shown = [origin for origin in _STYLES if counts[origin] or origin in ("ngram", "target", "bonus")]  # type: ignore[index]
    parts = [_styled(f"{_NAMES.get(origin, origin)} {counts[origin]}", origin) for origin in shown]  # type: ignore[index]
    return Text(", ").join(parts)


def _styled(text: str, origin: str) -> Text:
    from rich.text import Text

    return Text(text, style=_STYLES[origin])


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _one_line(message: str) -> str:
    return " ".join(message.split())
