"""What all commands have in common: -h, examples in their help, other names of options, one line for every mistake."""

from __future__ import annotations

import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hopskip.cli.aliases import aliases
from hopskip.cli.console import plain_warnings, print_error
from hopskip.cli.options import with_common
from hopskip.cli.settings import replace_alternatives, source_of
from hopskip.errors import HopskipError
from hopskip.machine import explained

# the error of a wrong option or argument: click's, of which typer carries a copy but names only this subclass
_UsageError = typer.BadParameter.__mro__[1]


class App(typer.Typer):
    """A group of commands. Lines of a command's docstring that begin with `$ ` are its examples. One that may take
    longer than a second `takes_time`, and has --quiet."""

    def __init__(self, **settings: Any) -> None:
        settings = {"cls": Group, "add_completion": False, "rich_markup_mode": "markdown", **settings}
        super().__init__(pretty_exceptions_enable=False, **settings)

    def command(self, name: str | None = None, *, takes_time: bool = True, **settings: Any) -> Callable[[Any], Any]:
        decorate = super().command(name, **{"cls": Command, **settings})
        return lambda command: decorate(with_common(command, takes_time=takes_time))

    def callback(self, *, takes_time: bool = True, **settings: Any) -> Callable[[Any], Any]:
        decorate = super().callback(**settings)
        return lambda command: decorate(with_common(command, takes_time=takes_time))


class _Common:
    """Mixed into typer's command and its group."""

    params: list[Any]

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        text, self.examples = split_examples(settings.pop("help", None))
        super().__init__(name=name, help=text, **settings)  # type: ignore[call-arg]

    def get_params(self, ctx: Any) -> list[Any]:
        params = list(super().get_params(ctx))  # type: ignore[misc]
        for param in params:
            _hide_type(param)
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)  # type: ignore[misc]
        if self.examples:
            from rich.console import Console
            from rich.text import Text

            console = Console(highlight=False)
            console.print(Text(" Examples\n", style="bold"))
            for example in self.examples:
                console.print(Text(f"   {example}"), soft_wrap=True)  # one line each, however narrow: to be copied

    @property
    def takes_model(self) -> bool:
        """Whether the model may be given without --model, as the only argument."""
        if isinstance(self, TyperGroup):
            return False
        kinds = {param.param_type_name for param in self.params}
        return "argument" not in kinds and any("-m" in param.opts for param in self.params)

    def make_parser(self, ctx: Any) -> Any:
        """With the other names of options, which the help does not show."""
        shown = {id(param): param.opts for param in self.params}
        taken = [name for names in shown.values() for name in names]
        try:
            for param in self.params:
                param.opts = [*param.opts, *aliases(param.opts, taken)]
            return super().make_parser(ctx)  # type: ignore[misc]
        finally:
            for param in self.params:
                param.opts = shown[id(param)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["hopskip.arguments"] = list(args)
        takes_model = self.takes_model
        ctx.allow_extra_args = ctx.allow_extra_args or takes_model
        rest = list(super().parse_args(ctx, args))  # type: ignore[misc]
        replace_alternatives(ctx)
        if not takes_model:
            return rest
        if rest and not ctx.resilient_parsing:
            if len(rest) > 1:
                ctx.fail(f"Got unexpected extra arguments ({' '.join(rest[1:])})")
            if source_of(ctx, "model") == "COMMANDLINE":
                given = ctx.params["model"]
                ctx.fail(f"the model is given twice, as {rest[0]} and as --model {given}; leave one out")
            ctx.params["model"] = rest[0]
        return []

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except HopskipError as error:
            if ctx.invoked_subcommand is None:
                error.args = (_with_options(str(error), ctx),)
            raise


class Command(_Common, TyperCommand):
    """A command."""


class Group(_Common, TyperGroup):
    """A command with commands of its own; on its own, unless it does something then, it prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            print_help(ctx)
            ctx.exit(2)
        return super().parse_args(ctx, args)


class Root(Group):
    """The command `hopskip`, with whatever the user can put right reported as one line and exit code 2."""

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
            print_error(str(error))
            code = 2
        except ImportError as error:
            if (message := explained(error)) is None:
                raise
            print_error(message)
            code = 2
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:
            if not isinstance(error, _UsageError):
                raise
            print_error(_usage_message(error, given))
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


def print_help(ctx: Any) -> None:
    """The help of a command, on stdout."""
    print(ctx.get_help())  # typer prints a coloured one by itself, and leaves nothing


def split_examples(text: str | None) -> tuple[str | None, list[str]]:
    """A help text without its examples, and these.

    >>> split_examples("Do it.\\n\\n$ hopskip it\\n$ hopskip it --now\\n")
    ('Do it.', ['hopskip it', 'hopskip it --now'])
    """
    if text is None:
        return None, []
    lines = inspect.cleandoc(text).splitlines()
    examples = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return "\n".join(line for line in lines if not line.startswith("$ ")).strip(), examples


def _hide_type(param: Any) -> None:
    """Show no `<bool>` behind a switch and no `<str>` behind an argument: typer's types are Python's."""
    if param.param_type_name == "argument":
        param.type = copy(param.type)  # others have the same one
        param.type.get_metavar = lambda param, ctx: ""
    elif param.is_flag:
        param.metavar = ""


def _with_options(message: str, ctx: Any) -> str:
    """A message of the core, which names parameters (`exit_layer is 9`), with the options that were given in their
    place (`--exit-layer is 9`), and where they come from if not from the command line. What `--precision` or
    `--setting` stands for keeps its name."""
    given = [argument.partition("=")[0] for argument in ctx.meta.get("hopskip.arguments", ())]
    for param in ctx.command.params:
        source = source_of(ctx, param.name)
        if source not in ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP") or not param.opts:
            continue
        typed = [name for name in _names(param) if name in given and name.startswith("--")]
        option = typed[-1] if typed else param.opts[0]
        # a name of one word is a word of English as well
        name = str(param.name)
        pattern = rf"(?<!\S){name}\b" if "_" in name else rf"^{name}(?= is )|(?<!\S){name}(?==)"
        message, count = re.subn(pattern, option, message)
        if count and source != "COMMANDLINE":
            place = param.envvar if source == "ENVIRONMENT" else ctx.meta["hopskip.config"]
            message += f" ({option} is set in {place})"
    return message


def _names(param: Any) -> list[str]:
    return [*param.opts, *aliases(param.opts, ())]


def _usage_message(error: Any, arguments: Sequence[str]) -> str:
    """What is wrong with the command line: typer's own words, and the value, which they may leave out."""
    command = error.ctx.command_path if error.ctx is not None else "hopskip"
    message = error.format_message().rstrip(".")
    param = getattr(error, "param", None)
    names = _names(param) if param is not None else ()
    for option, value in _pairs(arguments):
        if option in names and value is not None and repr(value) not in message:
            message += f" (given: {value!r})"
    return f"{message}; see {command} --help"


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Every argument as an option, and what may be its value."""
    for given, following in zip(arguments, [*arguments[1:], None], strict=True):
        option, equals, inline = given.partition("=")
        yield option, inline if equals else following
