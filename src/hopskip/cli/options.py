"""Groups of options that commands share: every field that its dataclass declares with `hopskip.options.option`.

Nothing here imports PyTorch before an option is used: `hopskip --help` must not wait for it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from hopskip.cli.progress import silenced
from hopskip.cli.settings import ConfigOption
from hopskip.errors import ConfigError, check_choice
from hopskip.loading import LoadConfig
from hopskip.options import option
from hopskip.sampling_params import SamplingParams
from hopskip.speculative import SpeculativeConfig


@dataclass(frozen=True)
class Group:
    """Makes a parameter of a command a group of options: `Annotated[LoadConfig, Group("Model")]`."""

    heading: str | None = None
    """Of --help; None puts them among the command's own."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """By name, where this command has other ones than are declared."""
    without: tuple[str, ...] = ()
    """Names of those that this command does not take."""
    of: Any = None
    """The dataclass, where the command wants a dict of what was given, as the defaults are not known before a model is
    loaded."""


LoadGroup = Annotated[LoadConfig, Group("Model")]
LoadGroupOfMany = Annotated[LoadConfig, Group("Model", without=("dtype", "quantize"))]
"""Of commands that run the model in several precisions, which they name themselves."""
DraftGroup = Annotated[SpeculativeConfig, Group("Drafting")]
SamplingGroup = Annotated[dict[str, Any], Group("Sampling", of=SamplingParams)]
"""Goes with `DefaultsGroup`, which says what the rest is to be."""

GenerationConfig = Literal["auto", "none"]


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What sampling options that are left out are to be."""

    generation_config: GenerationConfig = option(
        "auto",
        "auto (as the model's makers recommend in its generation config, else greedy) or none (greedy).",
        "auto|none",
    )

    def __post_init__(self) -> None:
        check_choice("generation_config", self.generation_config, GenerationConfig)


@dataclass(frozen=True, kw_only=True)
class OrGreedy(SamplingDefaults):
    """The same, with a short way to greedy decoding."""

    greedy: bool = option(False, "Always the best token, whatever the model's makers recommend: --temperature 0.")


DefaultsGroup = Annotated[OrGreedy, Group("Sampling")]


def checked_sampling(given: Mapping[str, Any], defaults: OrGreedy) -> dict[str, Any]:
    """The sampling options of a command, for `with_defaults`: a wrong one must not cost the time of loading a model.

    Raises:
        ConfigError: a value cannot be, or contradicts another.
    """
    if defaults.greedy and given.get("temperature", 0) != 0:
        raise ConfigError(f"--greedy and --temperature {given['temperature']} contradict each other; leave one out")
    chosen = {**given, "temperature": 0.0} if defaults.greedy else dict(given)
    # without a temperature, whether they have an effect is the model's matter
    SamplingParams(**{"temperature": 1.0, **chosen})
    return chosen


ContextOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Longest sequence, prompt and output (default: the model's context).",
        show_default=False,
    ),
]
"""The context to make room for, `max_model_len`."""

ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE|TEXT",
        help="A Jinja template in place of the model's own.",
        show_default=False,
    ),
]

ThinkOption = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="Let the model think first, or not, where its chat template has a switch."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]


_WIDTH_OF_CHOICES = 32


def with_common(command: Callable[..., None], *, takes_time: bool) -> Callable[..., None]:
    """Give typer a command with --config, and with --quiet if it takes its time."""

    def run(*, config: str | None = None, quiet: bool = False, **values: Any) -> None:
        with silenced(quiet):
            command(**values)

    common = [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption)]
    if takes_time:
        quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
        common.insert(0, inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=quiet))
    return _with_signature(run, command, [*inspect.signature(command, eval_str=True).parameters.values(), *common])


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command that takes groups of options: every parameter annotated with a dataclass and a `Group` is
    replaced by one option per declared field, and the command gets the dataclass.

    >>> @app.command()  # doctest: +SKIP
    ... @with_options
    ... def generate(load: LoadGroup, draft: DraftGroup) -> None: ...
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    are_open: set[str] = set()
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        places = [place for place in get_args(parameter.annotation) if isinstance(place, Group)]
        if places:
            groups[parameter.name] = places[0].of or get_args(parameter.annotation)[0]
            are_open |= {parameter.name} if places[0].of else set()
            parameters += _parameters(groups[parameter.name], places[0])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        for name, group in groups.items():
            given = _given(
                group, {item.name: values.pop(item.name) for item in _options_of(group) if item.name in values}
            )
            values[name] = given if name in are_open else group(**given)
        command(**values)

    return _with_signature(run, command, parameters)


def _with_signature(
    run: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """`run` under the name of `command`, with these parameters."""
    functools.update_wrapper(run, command)
    del run.__dict__["__wrapped__"]  # inspect would look through to the original signature
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__dict__["__signature__"] = inspect.Signature(
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run


@functools.cache
def _options_of(group: Any) -> dict[dataclasses.Field[Any], Any]:
    """The fields that are options, each with the kind of its value on the command line."""
    hints = get_type_hints(group)
    return {
        item: str if item.metadata["parse"] else _kind_of_value(hints[item.name])
        for item in dataclasses.fields(group)
        if "help" in item.metadata
    }


def _parameters(group: Any, place: Group) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group)
    for item, kind in _options_of(group).items():
        if item.name in place.without:
            continue
        declared, choices = item.metadata, _choices(hints[item.name])
        name = item.name.replace("_", "-")
        names = [
            f"--{name}/--no-{name}" if item.default is True else f"--{name}",
            *([declared["short"]] if declared["short"] else []),
        ]
        option = typer.Option(
            *names,
            metavar=_in_lines(choices) or declared["metavar"],
            envvar=declared["envvar"],
            autocompletion=_completion(choices) if choices else None,
            help=declared["help"],
            rich_help_panel=place.heading,
            show_default="(default: " not in declared["help"],
        )
        default = place.defaults.get(item.name, None if place.of else item.default)
        if default is None or get_origin(kind) is list:
            kind, default = kind | None, None
        yield inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )


def _choices(hint: Any) -> tuple[str, ...]:
    """The texts that an option may have, if only some.

    >>> _choices(Literal["q8", "q4"] | None), _choices(int | None)
    (('q8', 'q4'), ())
    """
    if get_origin(hint) in (Union, types.UnionType):
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) is Literal else ()


def _in_lines(choices: tuple[str, ...]) -> str:
    """`auto|native|torch`; where it is long, on several lines, so that it leaves room for the help beside it."""
    lines = [""]
    for choice in choices:
        if lines[-1] and len(lines[-1]) + len(choice) > _WIDTH_OF_CHOICES:
            lines.append("")
        lines[-1] += f"{choice}|"
    return "\n".join(lines).removesuffix("|")


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _kind_of_value(hint: Any) -> Any:
    """What typer is to make of the text. Choices are checked by the dataclass, whose message names the remedy.

    >>> _kind_of_value(int | None), _kind_of_value(Literal["q8", "q4"]), _kind_of_value(tuple[str, ...])
    (<class 'int'>, <class 'str'>, list[str])
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _kind_of_value(arguments[0])
    if origin is Literal:
        return str
    return list[arguments[0]] if origin is tuple else hint  # type: ignore[valid-type]


def _given(group: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values of the command line those that were given, or have a default there, as the dataclass wants them."""
    given: dict[str, Any] = {}
    for item in _options_of(group):
        value, parse = values.get(item.name), item.metadata["parse"]
        if value is not None and value != []:
            given[item.name] = parse(value) if parse else tuple(value) if isinstance(value, list) else value
    return given
