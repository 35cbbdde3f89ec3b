"""`hopskip trace`: what happened in each round, and how else the text could have been drafted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hopskip.cli.commands import App
from hopskip.cli.console import print_json
from hopskip.cli.options import JsonOption, LoadGroup, with_options
from hopskip.cli.progress import loading, progress

if TYPE_CHECKING:
    from hopskip.draft.base import Round

app = App(
    help="Look into traces of decoding.\n\n"
    '$ hopskip generate --trace trace.jsonl "Name three colours."\n'
    "$ hopskip trace show trace.jsonl"
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A trace.")]
_NUM_SHOWN = 5  # fixed settings, the best first


@app.command(takes_time=False)
def show(
    file: FileArgument,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the rounds to this file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sum up the rounds of a trace that `hopskip generate --trace` has written, by the source of their drafts.

    $ hopskip trace show trace.jsonl
    $ hopskip trace show trace.jsonl --plot rounds.png
    """
    from hopskip.errors import ConfigError
    from hopskip.trace import read_trace

    rounds = read_trace(file).rounds
    if not rounds:
        raise ConfigError(f"{file} holds no rounds to show; a record for replays is read by trace replay")
    if plot is not None:
        from hopskip.bench.plot import require_matplotlib, write_trace_plot

        require_matplotlib()
        write_trace_plot(rounds, plot)
    summary = summarize(rounds)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)


@app.command()
@with_options
def record(
    file: FileArgument,
    *,
    prompts: Annotated[
        list[str], typer.Option(metavar="SET|FILE", help="Prompts, as for bench; may be given several times.")
    ] = ["alpaca", "gsm8k", "humaneval", "mt_bench"],  # noqa: B006 (typer copies it)
    num_prompts: Annotated[int, typer.Option(metavar="N", help="Prompts of each set.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", help="Tokens per text.")] = 128,
    load: LoadGroup,
) -> None:
    """Record texts for replays: at each position, what every source would have drafted.

    Decodes plainly and drafts by every source at each token, so it takes a few times as long as generating the texts.

    $ hopskip trace record texts.jsonl --prompts gsm8k --num-prompts 8
    """
    from hopskip.bench.replay import record as record_texts
    from hopskip.errors import ConfigError
    from hopskip.loading import open_model
    from hopskip.prompts import load_prompts
    from hopskip.speculative import SpeculativeConfig
    from hopskip.trace import Proposals, TraceWriter

    if max_new_tokens < 2:
        raise ConfigError(f"--max-new-tokens is {max_new_tokens}; a replay needs at least 2")
    chosen = [prompt for source in prompts for prompt in load_prompts(source, num_prompts)]
    found: list[Proposals] = []
    with loading(load.model) as bar:
        opened = open_model(load, SpeculativeConfig(draft="auto"), bar.doing)

        def keep(proposals: Proposals) -> None:
            bar.doing("recording texts", proposals.request / len(chosen))
            found.append(proposals)

        known = record_texts(
            opened.backend,
            (prompt.encode(opened.tokenizer) for prompt in chosen),
            max_new_tokens=max_new_tokens,
            eos_token_ids=opened.tokenizer.eos_token_ids,
            identity=opened.identity,
            progress=bar.doing,
            on_proposals=keep,
        )
    with TraceWriter(file, {"prompts": prompts, **vars(load), **known}) as out:
        for proposals in found:
            out(proposals)


@app.command()
def replay(file: FileArgument, as_json: JsonOption = False) -> None:
    """Replay recorded texts with draft auto and with every fixed setting, by the cost table of the recording.

    Prints the regret of draft auto: its time over that of the setting which was best in hindsight.

    $ hopskip trace replay texts.jsonl
    """
    from hopskip.bench.replay import replay as replay_texts
    from hopskip.trace import read_trace

    with progress(f"replaying {file}"):
        found = replay_texts(read_trace(file))
    if as_json:
        print_json(found.as_dict())
        return
    from rich.console import Console
    from rich.table import Table

    plain = next(outcome for outcome in found.fixed if outcome.setting == "none")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("setting", "tokens/s", "speed-up", "tokens a round"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for outcome in dict.fromkeys([found.auto, *found.fixed[:_NUM_SHOWN], plain]):
        table.add_row(
            outcome.setting,
            f"{outcome.tokens_per_second:.1f}",
            f"{plain.seconds / outcome.seconds:.2f}x",
            f"{outcome.num_tokens / outcome.num_rounds:.2f}",
            style="bold" if outcome is found.auto else "",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nRegret of auto against {found.fixed[0].setting!r}, the best of {len(found.fixed)} fixed settings in "
        f"hindsight: {found.regret:+.1%}"
    )


def summarize(rounds: Iterable[Round]) -> dict[str, Any]:
    """Counts and mean times, in all and by source; in a batch a round counts for each of its sources."""
    times = ("draft_seconds", "pass_seconds", "choose_seconds", "commit_seconds")
    groups: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for each in rounds:
        total["num_rounds"] += 1
        total["num_rows"] += each.num_rows
        for name in times:
            total[name] += getattr(each, name)
        for part in each.sequences:
            own = groups.setdefault(part.source or "none", Counter())
            for name in ("num_draft_tokens", "num_accepted_tokens", "num_committed"):
                own[name] += getattr(part, name)
                total[name] += getattr(part, name)
            own["num_drafts"] += 1
    seconds = sum(total[name] for name in times)
    return {
        **total,
        "seconds": seconds,
        "tokens_per_second": total["num_committed"] / seconds if seconds else 0.0,
        "sources": {name: dict(counts) for name, counts in sorted(groups.items())},
    }


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("source", "rounds", "drafted", "accepted", "", "tokens a round"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source, counts in summary["sources"].items():
        drafted, accepted = counts["num_draft_tokens"], counts["num_accepted_tokens"]
        table.add_row(
            source,
            str(counts["num_drafts"]),
            str(drafted),
            str(accepted),
            f"{accepted / drafted:.0%}" if drafted else "",
            f"{counts['num_committed'] / counts['num_drafts']:.2f}",
        )
    console.print(table)
    parts = [
        f"{name.removesuffix('_seconds')} {1e3 * summary[name] / summary['num_rounds']:.2f}"
        for name in ("draft_seconds", "pass_seconds", "choose_seconds", "commit_seconds")
    ]
    console.print(
        f"\n{summary['num_committed']} tokens in {summary['num_rounds']} rounds, "
        f"{summary['tokens_per_second']:.1f} tokens/s; ms a round: {', '.join(parts)}"
    )
