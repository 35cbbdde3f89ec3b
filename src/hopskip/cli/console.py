"""What the commands write: text on stdout, everything about it (errors, warnings, statistics) on stderr."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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


def printable(text: str) -> str:
    """A text that only shows: without the characters that control a terminal, but for line ends and tabs."""
    return text.translate(_CONTROL_CHARACTERS)


def print_error(message: str) -> None:
    """One line on stderr, whatever the message holds. A terminal that is narrower breaks it between words."""
    print(_folded(printable(f"hopskip: error: {_one_line(message)}")), file=sys.stderr)


def print_note(message: str) -> None:
    """Text beside the model's: dim, on stderr. A terminal that is narrower breaks its lines between words."""
    shown = "\n".join(map(_folded, printable(message).split("\n")))
    _stderr().print(shown, style="dim", highlight=False, markup=False, soft_wrap=True)


def _folded(line: str) -> str:
    width = terminal_width()
    if width is None:
        return line
    return textwrap.fill(line, max(1, width - 1), break_long_words=False, break_on_hyphens=False)


def print_rows(rows: Iterable[tuple[str, ...]]) -> None:
    """A table on stderr; its last column is broken between words, or goes below where a terminal is narrow."""
    for line in table_lines(list(rows), (terminal_width() or 100) - 1):
        print_note(line)


def table_lines(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Lines of a table, all of its columns but the last as wide as they need.

    >>> table_lines([("a", "first"), ("bcd", "second and third")], 14)
    ['a    first', 'bcd  second', '     and third']
    """
    from rich.cells import cell_len, set_cell_size

    columns = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    num_before = sum(size + 2 for size in columns[:-1])
    fits = width - num_before >= min(columns[-1], 9)
    lines = []
    for row in rows:
        sized = [set_cell_size(cell, size) for cell, size in zip(row, columns, strict=True)]
        before = "  ".join([*sized[:-1], ""])
        if fits:
            first, *rest = textwrap.wrap(row[-1], width - num_before) or [""]
            lines += [before + first, *(" " * num_before + part for part in rest)]
        else:
            lines += [before, *(f"  {part}" for part in textwrap.wrap(row[-1], max(1, width - 2)))]
    return [line.rstrip() for line in lines]


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
        # a terminal may be told to get no colours, and is one all the same
        self._is_terminal = console.is_terminal or sys.stdout.isatty()
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
            shown = f"{before}{printable(shown)}{after}"
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


def print_summary(stats: SpeculativeStats, *, context: int, ending: str | None, seed: int | None) -> None:
    """The statistics in one line, for a chat.

    Args:
        context: most tokens of prompt and answer.
        ending: why the answer ends, where it is cut.
    """
    num_used = stats.num_prompt_tokens + stats.num_tokens
    fields = [ending] if ending is not None else []
    fields.append("1 token" if stats.num_tokens == 1 else f"{stats.num_tokens} tokens")
    if stats.num_tokens > 1:
        fields.append(f"{stats.decode_tokens_per_second:.1f} tokens/s")
        # what drafting gains over plain decoding belongs here: the fields behind are the first to be left out
        fields.append(f"{(stats.num_tokens - 1) / max(1, stats.num_target_passes):.1f} tokens a pass")
    fields.append(f"context {num_used} of {context}")
    if stats.num_drafts:
        fields.append(f"{stats.acceptance_rate:.0%} of {stats.num_draft_tokens} draft tokens accepted")
    fields.append(f"prompt {stats.num_prompt_tokens}, {stats.num_cached_prompt_tokens} of it cached")
    if seed is not None:
        fields.append(f"seed {seed}")
    width = terminal_width()
    print_note(status_line(fields, None if width is None else width - 1))


def status_line(fields: list[str], width: int | None) -> str:
    """Fields in brackets, as many from the left as fit; the first is always there.

    >>> status_line(["48 tokens", "120.0 tokens/s", "seed 7"], 30)
    '[48 tokens; 120.0 tokens/s]'
    """
    shown = fields
    while len(shown) > 1 and width is not None and len("; ".join(shown)) + 2 > width:
        shown = shown[:-1]
    return f"[{'; '.join(shown)}]"


def terminal_width() -> int | None:
    """Columns of the terminal that stderr is, as wide as it is now; None if it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or None
    except (OSError, ValueError):
        return None


def print_colour_legend() -> None:
    """What the colours of an answer mean; nothing where there are none."""
    from rich.console import Console
    from rich.text import Text

    answers = Console(highlight=False)
    if answers.color_system is None or answers.no_color or not answers.is_terminal:
        return
    meanings = {
        "exit-branch": "drafted by an exit",
        "ngram": "copied from earlier text (n-gram)",
        "bonus": "bonus after a right draft",
        "target": "the model alone",
    }
    parts = [_styled(meaning, origin) for origin, meaning in meanings.items()]
    _stderr().print(Text.assemble(("Colours: ", "dim"), Text(", ").join(parts)))


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
    if gain := _gain(stats):
        table.add_row("gain", gain)
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


def _gain(stats: SpeculativeStats) -> str:
    """What drafting has brought; empty where there was none to speak of."""
    parts = [f"{stats.tokens_per_pass:.2f} tokens a pass"] if stats.num_drafts else []
    if stats.speedup_over_plain is not None:
        parts.append(f"about {stats.speedup_over_plain:.1f} x plain decoding (estimate)")
    return "; ".join(parts)


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
