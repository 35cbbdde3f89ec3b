"""`hopskip perplexity`: what a precision, or an early exit, costs in quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hopskip.cli.console import print_json
from hopskip.cli.options import Group, JsonOption, LoadGroup, ModelArgument, at, with_options
from hopskip.cli.precisions import PrecisionList, choose_precisions, load_each
from hopskip.errors import ConfigError
from hopskip.options import option

if TYPE_CHECKING:
    from hopskip.backends.base import Backend
    from hopskip.bench.perplexity import Floats
    from hopskip.checkpoint.checkpoint import Checkpoint
    from hopskip.loading import LoadConfig


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What is read, and after which layers."""

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
    max_tokens: int | None = option(None, "Use only the first N tokens of all texts.", "N")


@with_options
def perplexity(
    place: ModelArgument = None,
    *,
    precision: PrecisionList = None,
    what: Annotated[ReadingOptions, Group()],
    as_json: JsonOption = False,
    load: LoadGroup,
) -> None:
    """Measure perplexity on a text, in each precision and at early exits.

    Differences are against the first precision, read after the same layer, with their standard error. Every token of a
    window but its first counts.
    """
    load = at(load, place)
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
    windows = cut_windows(tokenizer, texts, context, what.max_tokens)
    rows = _measure(
        _backends(load, precisions, checkpoint, others),
        windows,
        stops,
        len(precisions) + len(others),
        quiet=as_json,
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

    # quiet: a terminal shows one progress bar at a time, and `_measure` has it
    yield from load_each(load, precisions, checkpoint, quiet=True)
    for name, other in others:
        yield name, load_backend(other, load)


def _measure(
    backends: Iterator[tuple[str, Backend]],
    windows: list[list[int]],
    stops: list[int],
    num_backends: int,
    *,
    quiet: bool,
) -> list[dict[str, Any]]:
    """A row for each model and exit, with a progress bar in a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from hopskip.bench.perplexity import difference, negative_log_likelihoods
    from hopskip.bench.perplexity import perplexity as perplexity_of

    console = Console(stderr=True)
    first: dict[int, Floats] = {}
    rows = []
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=num_backends * len(windows))
        for name, backend in backends:
            bar.update(task, description=name)
            found = negative_log_likelihoods(backend, windows, stops, lambda: bar.update(task, advance=1))
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
