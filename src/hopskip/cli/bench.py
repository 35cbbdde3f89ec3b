"""`hopskip bench`: how fast, against plain decoding and against others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hopskip.cli.bench_serve import bench_serve
from hopskip.cli.commands import App
from hopskip.cli.console import print_json
from hopskip.cli.options import DraftGroup, Group, JsonOption, LoadGroup, with_options
from hopskip.cli.progress import loading, progress
from hopskip.errors import ConfigError
from hopskip.options import option

if TYPE_CHECKING:
    from hopskip.bench.contenders import Contender
    from hopskip.bench.measure import Result
    from hopskip.loading import LoadConfig
    from hopskip.prompts import Prompt
    from hopskip.speculative import SpeculativeConfig


app = App(invoke_without_command=True)
app.command("serve")(bench_serve)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, how often, and against whom.

    Raises:
        ConfigError: a number is too small.
    """

    prompts: tuple[str, ...] = option(
        ("alpaca",),
        "alpaca, gsm8k, humaneval, mt_bench, copy, long, or a .jsonl file; may be given several times "
        "(default: alpaca).",
        "SET|FILE",
    )
    num_prompts: int = option(10, "Prompts of each set, evenly spread.", "N")
    max_new_tokens: int = option(64, "Tokens to generate per prompt (default: 64).", "N", short="-n")
    repeats: int = option(3, "Runs of every prompt; the median counts.", "N")
    against: str | None = option(
        None,
        "Opponents, with commas between: transformers, transformers-early-exit, llama.cpp, llama.cpp-lookup.",
        "LIST",
    )
    llama_cpp_model: tuple[Path, ...] = option((), "A GGUF file for llama.cpp; may be given several times.", "FILE")
    setting: tuple[str, ...] = option(
        (),
        "A further contender of ours: draft=ngram,num_draft_tokens=3 or quantize=q8,draft=none; may be given several "
        "times.",
        "KEY=VALUE,...",
    )
    plot: Path | None = option(None, "Draw the result.", "FILE.png")

    def __post_init__(self) -> None:
        for name, least in ("num_prompts", 1), ("repeats", 1), ("max_new_tokens", 2):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@app.callback()
@with_options
def bench(
    *,
    context: typer.Context,
    what: Annotated[BenchOptions, Group()],
    as_json: JsonOption = False,
    load: LoadGroup,
    draft: DraftGroup,
) -> None:
    """Measure decoding and prefill, greedy, on a CPU.

    Contenders run in processes of their own and take turns prompt by prompt; all get the same token ids, generate the
    same number of tokens, and use the same number of threads.

    $ hopskip bench
    $ hopskip bench -m model.gguf --prompts copy --prompts gsm8k --against llama.cpp
    $ hopskip bench serve --url http://127.0.0.1:8000
    """
    if context.invoked_subcommand is not None:
        return
    if load.device not in ("auto", "cpu"):
        raise ConfigError(f"device is {load.device!r}; this benchmark runs on a CPU, so leave it out")
    with loading(load.model):
        from hopskip.bench.machine import describe_machine, measure_read_bandwidth, versions
        from hopskip.bench.measure import report as report_of
        from hopskip.bench.plot import require_matplotlib, write_plot
        from hopskip.machine import num_usable_cores

        if what.plot is not None:
            require_matplotlib()
        contenders, encoded = _prepare(what, load, draft)
        threads = load.threads or num_usable_cores()
        bandwidth = measure_read_bandwidth(threads)
    results = _measure(contenders, encoded, what, threads)
    # measured at both ends: a limit that others' work has lowered would flatter everybody
    bandwidth = max(bandwidth, measure_read_bandwidth(threads))
    report = report_of(
        results,
        machine=describe_machine(threads, bandwidth),
        versions=versions(),
        settings={
            "model": load.model,
            "prompts": what.prompts,
            "num_prompts": len(encoded),
            "max_new_tokens": what.max_new_tokens,
            "repeats": what.repeats,
            "dtype": load.dtype,
            "quantize": load.quantize,
            "backend": load.backend,
            "draft": asdict(draft),
        },
    )
    if what.plot is not None:
        write_plot(report, what.plot)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    # an opponent may be absent; we may not
    if any(c["status"] != "measured" for c in report["contenders"] if c["name"].startswith("hopskip")):
        raise typer.Exit(1)


def _prepare(
    what: BenchOptions, load: LoadConfig, speculative: SpeculativeConfig
) -> tuple[list[Contender], list[tuple[Prompt, list[int]]]]:
    """The contenders, and the prompts with their token ids; whatever is wrong with the options is found here."""
    from hopskip.bench.contenders import Hopskip
    from hopskip.bench.lineup import lineup
    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.checkpoint.hub import find_model
    from hopskip.errors import PromptError
    from hopskip.prompts import load_prompts
    from hopskip.text.tokenizer_files import load_tokenizer

    checkpoint = open_checkpoint(find_model(load.model))
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    for file in what.llama_cpp_model:
        if not file.is_file():
            raise ConfigError(f"llama-cpp-model {str(file)!r} does not exist; give a GGUF file")
    prompts = [prompt for source in dict.fromkeys(what.prompts) for prompt in load_prompts(source, what.num_prompts)]
    encoded = [(prompt, prompt.encode(tokenizer)) for prompt in prompts]
    longest = max(len(ids) for _, ids in encoded) + what.max_new_tokens
    if longest > checkpoint.config.context_length:
        raise PromptError(
            f"a prompt with its {what.max_new_tokens} new tokens has {longest} tokens; the model's context holds "
            f"{checkpoint.config.context_length}"
        )
    contenders = lineup(
        checkpoint,
        load,
        speculative,
        settings=what.setting,
        against=[name.strip() for name in what.against.split(",")] if what.against else (),
        llama_cpp_models=what.llama_cpp_model,
    )
    for own_load in dict.fromkeys(contender.load for contender in contenders if isinstance(contender, Hopskip)):
        own_load.where()
    return contenders, encoded


def _measure(
    contenders: list[Contender],
    prompts: list[tuple[Prompt, list[int]]],
    what: BenchOptions,
    threads: int,
) -> list[Result]:
    """Measure, and say how far it is."""
    from hopskip.bench.measure import measure

    num_steps = len(contenders) * (1 + what.repeats * len(prompts))
    steps = count()
    # shown between runs only: a bar that redraws itself by a clock would take time from what is measured
    with progress("measuring", undisturbed=True) as bar:

        def on_step(name: str) -> None:
            bar.doing(f"measuring {name}", next(steps) / num_steps)

        return measure(
            contenders,
            prompts,
            num_tokens=what.max_new_tokens,
            repeats=what.repeats,
            threads=threads,
            on_step=on_step,
        )


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    machine, settings = report["machine"], report["settings"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['read_bytes_per_second'] / 1e9:.1f} GB/s read; "
        f"{settings['num_prompts']} prompts ({', '.join(settings['prompts'])}), {settings['max_new_tokens']} tokens, "
        f"medians of {settings['repeats']} repeats",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")  # where the terminal is narrow, names are wrapped and figures stay whole
    for heading in ("decode", "prefill", "bandwidth", "tokens/pass", "lossless", "ours / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    contenders = report["contenders"]
    absent = [c for c in contenders if c["status"] != "measured"]
    for contender in contenders:
        if contender in absent:
            continue
        ours = contenders[0]["decode_ratio_to"].get(contender["name"], {}).get("all")
        lossless = {None: "", True: "yes", False: "no"}[contender["lossless"]]
        if contender["lossless"] is False:
            lossless = f"{sum(p['matches_plain'] for p in contender['per_prompt'])}/{len(contender['per_prompt'])}"
        table.add_row(
            contender["name"],
            f"{contender['decode_tokens_per_second']:.1f}",
            f"{contender['prefill_tokens_per_second']:.0f}",
            f"{contender['mbu']:.0%}",
            f"{contender['tokens_per_pass']:.2f}",
            lossless,
            "" if ours is None else f"{ours:.2f} x",
            style=None if contender["quoted"] else "dim",
        )
    console.print(table)
    console.print("decode and prefill in tokens/s; ours is the first line", style="dim")
    over_plain = [(c["name"], c["decode_ratio_to"].get(c["lossless_against"])) for c in contenders]
    if any(ratios for _, ratios in over_plain):
        sets = list(contenders[0]["by_set"])
        table = Table(
            box=None, pad_edge=False, title="decoding, over plain decoding of the same weights", title_style="dim"
        )
        table.add_column("", overflow="fold")
        for heading in (*sets, "mean of sets", "all"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, ratios in over_plain:
            if ratios:
                table.add_row(name, *(f"{ratios[key]:.2f} x" for key in (*sets, "mean_of_sets", "all")))
        console.print(table)
    for name, ratios in over_plain:
        if ratios and name.startswith("hopskip") and ratios["all"] < 1:
            console.print(
                f"plain decoding is faster than {name} here ({ratios['all']:.2f} x): use --draft none, or auto",
                markup=False,
                soft_wrap=True,
            )
    for contender in absent:
        console.print(
            f"{contender['name']}: {contender['status']}: {contender['reason']}", markup=False, soft_wrap=True
        )
