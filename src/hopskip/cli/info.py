"""`hopskip info`: what a model is, how it would run here, and what drafting with it may gain."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from hopskip.cli.console import print_json
from hopskip.cli.gains import count, expected_gains, memory
from hopskip.cli.options import JsonOption, LoadGroup, with_options
from hopskip.cli.progress import loading

if TYPE_CHECKING:
    from pathlib import Path

    from hopskip.bench.expected import ModelCosts
    from hopskip.checkpoint.config import ModelConfig
    from hopskip.checkpoint.trained_exit import TrainedExit
    from hopskip.draft.costs import Costs
    from hopskip.loading import LoadConfig

_ACCEPTANCES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
_MAX_EXITS = 8  # rows of the table
_MEASURE_SECONDS = 5.0
_LONG_CONTEXT = 4096
"""Beside the short one for which costs are measured."""


@with_options
def info(
    *,
    as_json: JsonOption = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model, and time its passes and draft steps here.")
    ] = False,
    load: LoadGroup,
) -> None:
    """Show a model's size, how it would run here, what each draft may gain, and what an exit of its own would take.

    Reads the checkpoint's header only, unless it is to measure; so it is quick with models of any size.

    $ hopskip info
    $ hopskip info Qwen/Qwen3-0.6B
    $ hopskip info model.gguf --measure --json > model.json
    """
    facts = _collect(load)
    costs = _measure(facts, load) if measure else None
    expected = expected_gains(
        *(facts.costs, facts.config, facts.trained_exit),
        copy_bytes=facts.copy_bytes,
        exit_layer=facts.exit_layer,
        is_native=facts.backend == "native",
        measured=costs,
    )
    if as_json:
        measured = {} if costs is None else {"measured": _measured(costs, facts)}
        print_json(facts.as_dict() | {"expected_gains": expected.as_dict()} | measured)
        return
    _print_facts(facts)
    expected.print()
    if facts.exit_layer is not None:
        _print_exits(facts)
    if costs is not None:
        _print_measured(costs, facts)


@dataclass(frozen=True, kw_only=True)
class _Facts:
    path: Path
    config: ModelConfig
    stored_as: str
    backend: str
    isa: str | None
    """Instruction set of the native backend."""
    device: str
    threads: int
    costs: ModelCosts
    default_draft: str
    trained_exit: TrainedExit | None
    """The trained exit that ships for the model."""
    exit_layer: int | None
    """None for a model of one layer, which has no early exit."""
    num_draft_tokens: int
    copy_bytes: dict[str, int]
    """Memory of the copies of lower precision that could draft, by precision."""

    @property
    def exits(self) -> list[int]:
        """Exit layers to show: all of a shallow model, else an even spread and the one that is used."""
        possible = range(1, self.config.num_hidden_layers)
        step = -(-len(possible) // _MAX_EXITS) or 1
        return sorted({*possible[step - 1 :: step], *([self.exit_layer] if self.exit_layer else [])})

    def as_dict(self) -> dict[str, Any]:
        config, costs = self.config, self.costs
        return {
            "path": str(self.path),
            "config": asdict(config),
            "context_length": config.context_length,
            "num_parameters": config.num_parameters,
            "stored_as": self.stored_as,
            "widened": list(costs.widened),
            "backend": self.backend,
            "isa": self.isa,
            "device": self.device,
            "threads": self.threads,
            "memory": {
                "weight_bytes": costs.total_bytes,
                "weight_bytes_by_format": costs.bytes_by_format,
                "bytes_per_pass": costs.bytes_per_pass,
                "kv_bytes_per_token": costs.kv_bytes_per_token,
                "draft_copy_bytes": self.copy_bytes,
            },
            "default_draft": self.default_draft,
            "exit_branch": None
            if self.trained_exit is None
            else {
                **asdict(self.trained_exit.config),
                "vocabulary": len(self.trained_exit.vocabulary),
                "num_draft_tokens": self.trained_exit.num_draft_tokens,
                "memory_bytes": self.exit_bytes,
                "kv_bytes_per_token": self.exit_kv_bytes,
            },
            "exit_layer": self.exit_layer,
            "is_exit_layer_recommended": self.is_recommended,
            "num_draft_tokens": self.num_draft_tokens,
            "head_in_layers": costs.head_in_layers,
            "exits": [
                {
                    "exit_layer": exit_layer,
                    "draft_step_cost": costs.draft_step_cost(exit_layer),
                    "expected": [_gain(acceptance, costs.draft_step_cost(exit_layer)) for acceptance in _ACCEPTANCES],
                }
                for exit_layer in self.exits
            ],
        }

    @property
    def exit_bytes(self) -> int:
        """Memory of the trained exit: its layers and a copy of the head's rows, in 8 bits on the native engine."""
        assert self.trained_exit is not None
        num_weights = sum(math.prod(tensor.shape) for tensor in self.trained_exit.tensors().values())
        num_weights += len(self.trained_exit.vocabulary) * self.config.hidden_size
        return num_weights * 34 // 32 if self.backend == "native" else num_weights * 2

    @property
    def exit_kv_bytes(self) -> int:
        assert self.trained_exit is not None
        return self.costs.kv_bytes_per_token * self.trained_exit.config.num_layers // self.config.num_hidden_layers

    @property
    def is_recommended(self) -> bool:
        return self.config.recommended_exit_layer is not None


def _gain(acceptance: float, step_cost: float) -> dict[str, float]:
    from hopskip.bench.expected import best_num_draft_tokens
    from hopskip.draft.costs import expected_speedup

    best = best_num_draft_tokens(acceptance, step_cost)
    return {
        "acceptance": acceptance,
        "num_draft_tokens": best,
        "speedup": expected_speedup(acceptance, best, step_cost),
    }


def _collect(load: LoadConfig) -> _Facts:
    from hopskip.backends.native.isa import choose_isa
    from hopskip.bench.expected import model_costs
    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.checkpoint.hub import find_model
    from hopskip.draft.make import resolve
    from hopskip.loading import find_exit
    from hopskip.speculative import DraftPrecision, SpeculativeConfig

    checkpoint = open_checkpoint(find_model(load.model))
    kind, device = load.where(checkpoint)
    config = checkpoint.config
    is_native = kind == "native"
    trained_exit = find_exit(checkpoint, SpeculativeConfig())
    default = resolve(SpeculativeConfig(), config, trained_exit, row_exact=is_native)
    exit_layer = None
    if config.num_hidden_layers > 1:
        exit_layer = resolve(SpeculativeConfig(draft="early-exit"), config).exit_layer
    costs = model_costs(checkpoint, kind, load.precision, load.kv_dtype)
    copies = {
        name: model_costs(checkpoint, kind, name, "auto").bytes_per_pass
        for name in get_args(DraftPrecision)
        if is_native
    }
    assert default.draft is not None
    assert default.num_draft_tokens is not None
    return _Facts(
        path=checkpoint.path,
        config=config,
        stored_as=checkpoint.quantization or checkpoint.dtype,
        backend=kind,
        isa=choose_isa() if is_native else None,
        device=device,
        threads=load.threads or _default_threads(kind),
        costs=costs,
        default_draft=default.draft,
        trained_exit=trained_exit,
        exit_layer=exit_layer,
        num_draft_tokens=default.num_draft_tokens,
        copy_bytes={name: size for name, size in copies.items() if size < costs.bytes_per_pass},
    )


def _default_threads(kind: str) -> int:
    if kind == "native":
        from hopskip.machine import num_usable_cores

        return num_usable_cores()
    import torch

    return torch.get_num_threads()


def _print_facts(facts: _Facts) -> None:
    from rich.console import Console
    from rich.table import Table

    config, costs = facts.config, facts.costs
    head = f"{costs.head_in_layers:.1f} layers" + (", tied to the embedding" if config.tie_word_embeddings else "")
    formats = ", ".join(f"{name} {memory(num_bytes)}" for name, num_bytes in costs.bytes_by_format.items())
    isa = f" ({facts.isa})" if facts.isa else ""
    context = config.context_length
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", str(facts.path))
    table.add_row(
        "shape",
        f"{config.model_type}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads on {config.num_key_value_heads}, vocabulary {config.vocab_size:,}, "
        f"context {context:,}",
    )
    table.add_row("parameters", f"{count(config.num_parameters)}; the head is as large as {head}")
    table.add_row("stored as", facts.stored_as)
    table.add_row("runs on", f"{facts.backend}{isa}, {facts.device}, {facts.threads} threads")
    widened = f"; {', '.join(costs.widened)}: no native format, so in q8" if costs.widened else ""
    table.add_row("weights", formats + widened)
    table.add_row(
        "keys, values",
        f"{memory(costs.kv_bytes_per_token)} a token, {memory(costs.kv_bytes_per_token * context)} at full context",
    )
    table.add_row("default draft", f"{facts.default_draft}, up to {facts.num_draft_tokens} tokens")
    if facts.trained_exit is not None:
        exit_config = facts.trained_exit.config
        features = ", ".join(map(str, exit_config.features))
        table.add_row(
            "trained exit",
            f"{exit_config.num_layers} layer(s) after layer {exit_config.start} of the model"
            + (f", seeing its layers {features}" if features else "")
            + f"; {len(facts.trained_exit.vocabulary):,} tokens; {memory(facts.exit_bytes)} and "
            f"{memory(facts.exit_kv_bytes)} a token",
        )
    if facts.copy_bytes:
        sizes = ", ".join(f"{name} {memory(num_bytes)}" for name, num_bytes in facts.copy_bytes.items())
        table.add_row("draft copies", f"with --draft-precision: {sizes}")
    if facts.exit_layer is None:
        table.add_row("exit layer", "none: a model of one layer has no early exit")
    else:
        source = "recommended by the model's makers" if facts.is_recommended else "default: a quarter of the layers"
        table.add_row("exit layer", f"{facts.exit_layer} ({source})")
    Console(highlight=False).print(table, soft_wrap=False)


def _print_exits(facts: _Facts) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Early-exit drafts: best draft length and expected speed-up, by acceptance rate",
        title_justify="left",
        title_style="bold",
        caption="By arithmetic, for one sequence: a pass costs the bytes of weights that it reads. A draft step costs "
        "c full passes; k tokens, each accepted with probability a, gain (1 + a + .. + a^k) / (1 + k c).",
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("exit", justify="right")
    table.add_column("c", justify="right")
    for acceptance in _ACCEPTANCES:
        table.add_column(f"{acceptance:.0%}", justify="right", no_wrap=True)
    for exit_layer in facts.exits:
        step_cost = facts.costs.draft_step_cost(exit_layer)
        gains = [_gain(acceptance, step_cost) for acceptance in _ACCEPTANCES]
        cells = [f"k={g['num_draft_tokens']} {g['speedup']:.2f}x" if g["num_draft_tokens"] else "-" for g in gains]
        style = "bold" if exit_layer == facts.exit_layer else ""
        table.add_row(str(exit_layer), f"{step_cost:.2f}", *cells, style=style)
    console = Console(highlight=False)
    console.print()
    console.print(table)


def _measure(facts: _Facts, load: LoadConfig) -> Costs:
    """Time the trained exit, if there is one, and the early exits of the table."""
    from functools import partial

    from hopskip.draft.timing import measure
    from hopskip.loading import open_model
    from hopskip.speculative import SpeculativeConfig, early_exit

    speculative = SpeculativeConfig(draft="exit-branch" if facts.trained_exit else "none")
    with loading(load.model) as bar:
        backend = open_model(load, speculative, bar.doing).backend
        exits = [] if backend.trained_exit is None else [backend.trained_exit]
        progress = partial(bar.doing, "measuring costs")
        return measure(backend, [*exits, *map(early_exit, facts.exits)], _MEASURE_SECONDS, progress)


def _contexts(facts: _Facts) -> tuple[int, ...]:
    """For which measured costs are shown: a short one and a long one."""
    from hopskip.draft.costs import CONTEXT

    longest = min(_LONG_CONTEXT, facts.config.context_length)
    return (CONTEXT, longest) if longest > CONTEXT else (CONTEXT,)


def _measured(costs: Costs, facts: _Facts) -> dict[str, Any]:
    """JSON-ready: the table, and for each source, context and acceptance the best length and its expected speed-up."""
    from hopskip.bench.expected import best_measured

    best = {
        "ngram" if source is None else str(source): [
            {"acceptance": a, "context": context, "num_draft_tokens": k, "speedup": speedup}
            for context in _contexts(facts)
            for a in _ACCEPTANCES
            for k, speedup in [best_measured(costs, source, a, context)]
        ]
        for source in (None, *costs.drafts)
    }
    return {**costs.as_json(), "expected": best}


def _print_measured(costs: Costs, facts: _Facts) -> None:
    from rich.console import Console
    from rich.table import Table

    from hopskip.bench.expected import best_measured

    console = Console(highlight=False)
    style: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "padding": (0, 1, 0, 0)}
    passes = Table(
        title="Measured: ms of a verify pass with the head, by its rows and the positions before them", **style
    )
    passes.add_column("at", justify="right", no_wrap=True)
    for rows in costs.layers:
        passes.add_column(str(rows), justify="right", no_wrap=True)
    drafts = Table(
        title="Measured: a draft step, with best draft length and expected speed-up by acceptance rate",
        caption=f"For one sequence, greedy, {facts.threads} threads. Lookup (ngram) takes no time of its own.",
        caption_justify="left",
        **style,
    )
    drafts.add_column("source", no_wrap=True)
    drafts.add_column("at", justify="right", no_wrap=True)
    drafts.add_column("ms", justify="right", no_wrap=True)
    for acceptance in _ACCEPTANCES:
        drafts.add_column(f"{acceptance:.0%}", justify="right", no_wrap=True)
    for context in _contexts(facts):
        seconds = [costs.pass_seconds(rows, context) for rows in costs.layers]
        passes.add_row(
            f"{context:,}", *(f"{1e3 * each:.1f}" if each < 0.1 else f"{1e3 * each:.0f}" for each in seconds)
        )
        passes.add_row("x", *(f"{each / seconds[0]:.2f}" for each in seconds))
    for source in (None, *costs.drafts):
        for context in _contexts(facts):
            found = [best_measured(costs, source, acceptance, context) for acceptance in _ACCEPTANCES]
            cells = [f"{k} {speedup:.2f}x" if k else "-" for k, speedup in found]
            step = ""
            if source is not None:
                one, two = (costs.draft_seconds(source, length, context) for length in (1, 2))
                step = f"{1e3 * (two - one):.2f}"
            drafts.add_row("ngram" if source is None else str(source), f"{context:,}", step, *cells)
    for table in (passes, drafts):
        console.print()
        console.print(table)
