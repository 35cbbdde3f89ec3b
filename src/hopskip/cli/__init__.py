"""The command line. One module per command; what they share is in `commands`, `options`, `settings`, `console`
and `progress`.

Exit codes: 0 done, 1 a proof failed or hopskip has a bug, 2 bad input (one line says what and how to put it right),
130 stopped with Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hopskip.cli.bench import app as bench_app
from hopskip.cli.cache import app as cache
from hopskip.cli.chat import chat
from hopskip.cli.check import check
from hopskip.cli.commands import App, Root, print_help
from hopskip.cli.eval import evaluate
from hopskip.cli.export import app as export
from hopskip.cli.generate import generate
from hopskip.cli.info import info
from hopskip.cli.perplexity import perplexity
from hopskip.cli.serve import serve
from hopskip.cli.trace import app as trace
from hopskip.cli.train import app as train
from hopskip.version import describe

app = App(
    name="hopskip",
    cls=Root,
    help="Run a language model as its own draft model: lossless self-speculative decoding.\n\n"
    '$ hopskip generate "Give three tips for staying healthy."\n'
    '$ cat notes.txt | hopskip generate "Summarise:"\n'
    "$ hopskip chat -m Qwen/Qwen3-0.6B",
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True, takes_time=False)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print version and revision, and exit.")] = False,
) -> None:
    if version:
        print(f"hopskip {describe()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print_help(context)


app.command()(generate)
app.command()(chat)
app.command()(info)
app.command()(serve)
app.command()(check)
app.add_typer(bench_app, name="bench")
app.command()(perplexity)
app.command("eval")(evaluate)
app.add_typer(train, name="train")
app.add_typer(export, name="export")
app.add_typer(trace, name="trace")
app.add_typer(cache, name="cache")


def main() -> None:
    """The console script `hopskip`."""
    app(prog_name="hopskip")
