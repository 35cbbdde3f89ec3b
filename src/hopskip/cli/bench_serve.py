"""`hopskip bench serve`: load on an OpenAI-compatible server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hopskip.cli.console import print_json
from hopskip.cli.options import JsonOption
from hopskip.cli.progress import progress
from hopskip.errors import ConfigError


def bench_serve(
    *,
    url: Annotated[str, typer.Option(metavar="URL", help="The server, for example http://127.0.0.1:8000.")],
    concurrency: Annotated[
        str, typer.Option(metavar="LIST", help="Requests at a time, with commas between: one run for each.")
    ] = "1,2,4,8,16",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET|FILE",
            help="alpaca, gsm8k, humaneval, mt_bench, copy, long, or a .jsonl file; may be given several times "
            "(default: alpaca).",
            show_default=False,
        ),
    ] = None,
    num_requests: Annotated[int, typer.Option(metavar="N", help="Requests in each run.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of each answer.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T")] = 0.0,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the first that the server lists.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="HOPSKIP_API_KEY", help="The server's API key.")
    ] = None,
    extra: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Further fields of every request, such as '{\"ignore_eos\": true}'."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure time to the first token, time per token and throughput of any OpenAI server.

    $ hopskip bench serve --url http://127.0.0.1:8000
    $ hopskip bench serve --url http://127.0.0.1:8000 --concurrency 1,8 --num-requests 32 --json
    """
    levels = _levels(concurrency)
    for name, value in (("num-requests", num_requests), ("max-new-tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url is {url!r}; it begins with http:// or https://")
    _require_httpx()
    import asyncio

    from hopskip.bench.load_test import Target, run_load, write_load_plot
    from hopskip.bench.plot import require_matplotlib
    from hopskip.prompts import load_prompts

    if plot is not None:
        require_matplotlib()
    texts = [prompt for source in prompts or ["alpaca"] for prompt in load_prompts(source)]
    target = Target(
        url=url,
        model=served_model_name,
        api_key=api_key,
        max_tokens=max_new_tokens,
        temperature=temperature,
        extra=_fields(extra),
    )
    with progress("finding the server's model") as shown:

        def on_level(concurrency: int) -> None:
            done = levels.index(concurrency) / len(levels)
            shown.doing(f"sending {num_requests} requests, {concurrency} at a time", done)

        report = asyncio.run(run_load(target, texts, levels, num_requests, on_level))
    if plot is not None:
        write_load_plot(report, plot)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if any(level["num_failed"] for level in report["levels"]):
        raise typer.Exit(1)


def _levels(text: str) -> list[int]:
    levels = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= level <= 4096 for level in levels):
        raise ConfigError(f"concurrency is {text!r}; give numbers from 1 to 4096 with commas between, such as 1,4,16")
    return levels


def _fields(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"extra is {text!r}; give a JSON object")
    return fields


def _require_httpx() -> None:
    import importlib.util

    if importlib.util.find_spec("httpx") is None:
        raise ConfigError("loading a server needs httpx, which is not installed: pip install 'hopskip[eval]'")


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("at once", "tokens/s", "requests/s", "TTFT, ms", "TPOT, ms", "failed"):
        table.add_column(heading, justify="right", no_wrap=True)

    def milliseconds(figures: dict[str, float] | None) -> str:
        return " / ".join(f"{1000 * figures[key]:.0f}" for key in ("p50", "p90", "p99")) if figures else ""

    for level in report["levels"]:
        table.add_row(
            str(level["concurrency"]),
            f"{level['tokens_per_second']:.1f}",
            f"{level['requests_per_second']:.2f}",
            milliseconds(level["first_token_seconds"]),
            milliseconds(level["seconds_per_token"]),
            str(level["num_failed"] or ""),
        )
    console.print(table)
    console.print("time to the first token (TTFT), and per token after it (TPOT): median / 90 % / 99 %", style="dim")
    for level in report["levels"]:
        for error in level["errors"]:
            console.print(f"{level['concurrency']} at a time: {error}", style="dim", markup=False)
