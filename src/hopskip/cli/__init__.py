"""The command line. One module per command; what they share is in `options` and `console`.

Exit codes: 0 done, 1 a proof failed or hopskip has a bug, 2 bad input (one line says what and how to put it right),
130 stopped with Ctrl-C.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hopskip.cli.bench import app as bench_app
from hopskip.cli.cache import app as cache
from hopskip.cli.chat import chat
from hopskip.cli.check import check
from hopskip.cli.console import plain_warnings, print_error
from hopskip.cli.generate import generate
from hopskip.cli.info import info
from hopskip.cli.perplexity import perplexity
from hopskip.cli.serve import serve
from hopskip.cli.trace import app as trace
from hopskip.cli.train import app as train
from hopskip.errors import HopskipError
from hopskip.version import describe

# the error of a wrong option or argument: click's, of which typer carries a copy but names only this subclass
_UsageError = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """The commands, with whatever the user can put right reported as one line and exit code 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal may lack characters that a model writes
        given = sys.argv[1:] if args is None else args
        kwargs["standalone_mode"] = False  # errors come here, and exit codes as the value returned
        try:
            with plain_warnings():
                code = super().main(args, *rest, **kwargs)
        except HopskipError as error:
            print_error(self._with_options(str(error), given))
            code = 2
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:
            if not isinstance(error, _UsageError):
                raise
            print_error(_usage_message(error, given))
            code = 2
        sys.exit(code if isinstance(code, int) else 0)

    def _with_options(self, message: str, arguments: Sequence[str]) -> str:
        """A message of the core, which names parameters (`exit_layer is 9`), with the options that were given in
        their place (`--exit-layer is 9`). What `--precision` or `--setting` stands for keeps its name."""
        given = {argument.partition("=")[0] for argument in arguments}
        for parameter in (parameter for command in self.commands.values() for parameter in command.params):
            name = str(parameter.name)
            if given.intersection(parameter.opts):
                # a name of one word is a word of English as well
                pattern = rf"(?<!\S){name}\b" if "_" in name else rf"^{name}(?= is )|(?<!\S){name}(?==)"
                message = re.sub(pattern, parameter.opts[0], message)
        return message


def _usage_message(error: Any, arguments: Sequence[str]) -> str:
    """What is wrong with the command line: typer's own words, and the value, which they may leave out."""
    command = error.ctx.command_path if error.ctx is not None else "hopskip"
    message = error.format_message().rstrip(".")
    names = getattr(getattr(error, "param", None), "opts", ())
    for given, following in zip(arguments, [*arguments[1:], None], strict=True):
        option, equals, inline = given.partition("=")
        value = inline if equals else following
        if option in names and value is not None and repr(value) not in message:
            message += f" (given: {value!r})"
    return f"{message}; see {command} --help"


app = typer.Typer(
    name="hopskip",
    cls=_Commands,
    help="Run a language model as its own draft model: lossless self-speculative decoding.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print version and revision, and exit.")] = False,
) -> None:
    if version:
        print(f"hopskip {describe()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(generate)
app.command()(chat)
app.command()(info)
app.command()(serve)
app.command()(check)
app.add_typer(bench_app, name="bench")
app.command()(perplexity)
app.add_typer(train, name="train")
app.add_typer(trace, name="trace")
app.add_typer(cache, name="cache")


def main() -> None:
    """The console script `hopskip`."""
    app(prog_name="hopskip")
