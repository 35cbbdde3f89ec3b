"""`hopskip perplexity`: what a precision, or an early exit, costs in quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hopskip.cli.console import print_json
from hopskip.cli.options import Group, JsonOption, LoadGroupOfMany, with_options
from hopskip.cli.precisions import PrecisionList, choose_precisions, load_each
from hopskip.cli.progress import Progress, loading, progress
from hopskip.errors import ConfigError
from hopskip.options import option

if TYPE_CHECKING:
    from hopskip.backends.base import Backend
    from hopskip.bench.perplexity import Floats
    from hopskip.checkpoint.checkpoint import Checkpoint
    from hopskip.loading import LoadConfig


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What is read, and after which layers.

    Raises:
        ConfigError: it is too little to measure anything.
    """

    exit_layers: str | None = option(None, "Early exits to read as well, with commas between.", "LIST")
    against: tuple[Path, ...] = option(
        (),
        "Another file of the same model, such as a Q4_0 GGUF, run as it is stored; may be given several times.",
        "FILE",
    )
    text: tuple[Path, ...] = option(
        (),
        "A text; may be given several times (default: the prompts alpaca, gsm8k, humaneval and mt_bench, all turns of "
        "each as one text).",
        "FILE",
    )
    context: int | None = option(
        None, "Longest window that a text is cut into (default: 2048, or the model's context).", "N"
    )
    num_tokens: int | None = option(None, "Use only the first N tokens of all texts.", "N")

    def __post_init__(self) -> None:
        if self.num_tokens is not None and self.num_tokens < 2:
            raise ConfigError(f"num_tokens is {self.num_tokens}; it must be at least 2")


@with_options
def perplexity(
    *,
    precision: PrecisionList = None,
    what: Annotated[ReadingOptions, Group()],
    as_json: JsonOption = False,
    load: LoadGroupOfMany,
) -> None:
    """Measure perplexity on a text, in each precision and at early exits.

    Differences are against the first precision, read after the same layer, with their standard error. Every token of a
    window but its first counts.

    $ hopskip perplexity --precision bf16,q8,q4 --num-tokens 8000
    $ hopskip perplexity model.gguf --text article.txt --json
    """
    precisions = choose_precisions(load, precision)
    from hopskip.bench.machine import versions
    from hopskip.bench.perplexity import MAX_CONTEXT, cut_windows, places_to_read, read_text
    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.checkpoint.hub import find_model
    from hopskip.prompts import whole_prompts
    from hopskip.text.tokenizer_files import load_tokenizer

    checkpoint = open_checkpoint(find_model(load.model))
    stops = places_to_read(checkpoint.config.num_hidden_layers, _numbers(what.exit_layers))
    longest = checkpoint.config.context_length
    if what.context is not None and what.context > longest:
        raise ConfigError(f"context is {what.context}; the model's own is {longest}")
    others = [(file.name, _open_other(file, checkpoint)) for file in what.against]
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    texts = [read_text(file) for file in what.text] if what.text else whole_prompts()
    context = min(MAX_CONTEXT, longest) if what.context is None else what.context
    windows = cut_windows(tokenizer, texts, context, what.num_tokens)
    rows = _measure(
        _backends(load, precisions, checkpoint, others),
        windows,
        stops,
    )
    report = {
        "model": str(checkpoint.path),
        "text": {
            "files": [str(file) for file in what.text] or "prompts: alpaca, gsm8k, humaneval, mt_bench",
            "num_windows": len(windows),
            "num_tokens": sum(map(len, windows)) - len(windows),
        },
        "versions": versions(),
        "rows": rows,
    }
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _open_other(file: Path, checkpoint: Checkpoint) -> Checkpoint:
    from hopskip.checkpoint.checkpoint import open_checkpoint

    other = open_checkpoint(file)
    for what in ("vocab_size", "num_hidden_layers"):
        own, wanted = getattr(other.config, what), getattr(checkpoint.config, what)
        if own != wanted:
            raise ConfigError(
                f"against {str(file)!r} has a {what} of {own}, the model one of {wanted}; give another file of the "
                "same model"
            )
    return other


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise ConfigError(f"exit_layers is {text!r}; give numbers with commas between, such as 4,8,12") from None


def _backends(
    load: LoadConfig,
    precisions: list[str],
    checkpoint: Checkpoint,
    others: list[tuple[str, Checkpoint]],
) -> Iterator[tuple[str, Backend]]:
    from hopskip.loading import load_backend

    yield from load_each(load, precisions, checkpoint)
    for name, other in others:
        with loading(name) as bar:
            backend = load_backend(other, load, bar.doing)
        yield name, backend


def _measure(
    backends: Iterator[tuple[str, Backend]],
    windows: list[list[int]],
    stops: list[int],
) -> list[dict[str, Any]]:
    """A row for each model and exit."""

    from hopskip.bench.perplexity import difference, negative_log_likelihoods
    from hopskip.bench.perplexity import perplexity as perplexity_of

    first: dict[int, Floats] = {}
    rows = []
    for name, backend in backends:
        shares = iter([(number + 1) / len(windows) for number in range(len(windows))])
        with progress(f"reading in {name}") as bar:
            tell = partial(_tell, bar, f"reading in {name}", shares)
            found = negative_log_likelihoods(backend, windows, stops, tell)
        first = first or found
        for stop, nll_N in found.items():
            gap = difference(nll_N, first[stop])
            rows.append(
                {
                    "name": name,
                    "exit_layer": stop if stop < stops[-1] else None,
                    "perplexity": perplexity_of(nll_N),
                    "delta": gap.delta,
                    "delta_error": gap.error,
                    "weight_bytes": backend.traits.bytes_per_pass,
                }
            )
    return rows


def _tell(bar: Progress, what: str, shares: Iterator[float]) -> None:
    bar.doing(what, next(shares))


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    text = report["text"]
    source = text["files"] if isinstance(text["files"], str) else ", ".join(text["files"])
    console.print(
        f"{text['num_tokens']:,} tokens in {text['num_windows']} windows ({source})",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for heading in ("exit", "perplexity", "difference", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)

    def short(number: float) -> str:  # an exit that was not trained can have any perplexity
        return f"{number:.3f}" if abs(number) < 1e5 else f"{number:.2e}"

    reference = report["rows"][0]["name"]
    for row in report["rows"]:
        sign = "+" if row["delta"] >= 0 else ""
        difference = f"{sign}{short(row['delta'])} ± {short(row['delta_error'])}" if row["name"] != reference else ""
        table.add_row(
            row["name"],
            "" if row["exit_layer"] is None else str(row["exit_layer"]),
            short(row["perplexity"]),
            difference,
            f"{row['weight_bytes'] / 1e6:.1f} MB" if row["exit_layer"] is None else "",
        )
    console.print(table)
    console.print(
        f"difference: against {reference}, with its standard error; weights: bytes that a pass reads", style="dim"
    )
