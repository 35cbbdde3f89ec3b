"""The file of settings: options that somebody always gives, written down once.

    model = "Qwen/Qwen3-4B-GGUF:Q4_K_M"    # for every command that has the option

    [generate]
    temperature = 0.7                      # for this one

It is `$HOPSKIP_CONFIG`, by default `hopskip/config.toml` in `$XDG_CONFIG_HOME` or `~/.config`. The command line comes
before the environment, the environment before the file.
"""

from __future__ import annotations

import difflib
import itertools
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hopskip.cli.aliases import aliases
from hopskip.errors import ConfigError

_NOT_FOR_FILES = ("config", "help", "version")
_INSTEAD = {"dtype": "quantize", "quantize": "dtype"}
"""Options of which one, where it is given, takes the place of the other in a file."""


def read_settings(context: typer.Context, given: str | None) -> str | None:
    """Callback of --config: makes the file's values the defaults of a command's options.

    Raises:
        ConfigError: the file cannot be read, or has a key or a value that no option takes.
    """
    if context.resilient_parsing:  # completion
        return given
    if given is not None:
        context.meta["hopskip.config"] = given
    # its commands read the file; and no mistake in it may keep anybody from their help
    if context.parent is None or _asks_for_help(context):
        return given
    path = _file(context.meta.get("hopskip.config"))
    if path is not None:
        context.meta["hopskip.config"] = str(path)
        context.default_map = _defaults(path, context)
    return given


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings to start from (default: $HOPSKIP_CONFIG, or hopskip/config.toml in ~/.config).",
        show_default=False,
        is_eager=True,
        callback=read_settings,
    ),
]


def source_of(context: Any, name: str | None) -> str | None:
    """Where the value of a parameter comes from: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (the file) or DEFAULT."""
    source = context.get_parameter_source(name) if name is not None else None
    return None if source is None else str(source.name)


def _asks_for_help(context: typer.Context) -> bool:
    options = itertools.takewhile(lambda argument: argument != "--", context.meta["hopskip.arguments"])
    return not {*options}.isdisjoint(context.help_option_names)


def _file(given: str | None) -> Path | None:
    """The file to read; None if there is none, or an empty name says so."""
    chosen = os.environ.get("HOPSKIP_CONFIG") if given is None else given
    if chosen is not None:
        if chosen and not Path(chosen).expanduser().exists():
            raise ConfigError(f"the settings {chosen!r} do not exist; name another file, or leave it out")
        return Path(chosen).expanduser() if chosen else None
    try:
        usual = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "hopskip" / "config.toml"
    except RuntimeError:  # nobody's home is known
        return None
    return usual if usual.exists() else None


def _read(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise ConfigError(f"the settings {str(path)!r} cannot be read ({error.strerror})") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise ConfigError(f"the settings {str(path)!r} are not valid TOML: {error}") from None


def _defaults(path: Path, context: typer.Context) -> dict[str, Any]:
    """By parameter, the values that the file has for this command: shared ones, then those of its own tables."""
    values = _read(path)
    root = context.find_root().command
    _check(path, values, root, ())
    chain = []
    place: Any = context
    while place.parent is not None:
        chain.append(place.info_name)
        place = place.parent
    tables = [("", values)]
    for name in reversed(chain):
        table = tables[-1][1].get(name)
        tables.append((f"[{'.'.join(reversed(chain))}] ", table if isinstance(table, dict) else {}))
    options = _options(context.command)
    found: dict[str, Any] = {}
    for where, table in (tables[0], tables[-1]):
        for key, value in table.items():
            param = options.get(_name(key))
            if param is not None and not isinstance(value, dict):
                found[param.name] = _converted(value, param, context, f"{path}: {where}{key}")
    return found


def replace_alternatives(context: Any) -> None:
    """Take away what a file or the environment says of an option whose alternative the command line gives."""
    for name, other in _INSTEAD.items():
        if source_of(context, name) == "COMMANDLINE" and source_of(context, other) == "DEFAULT_MAP":
            default = next(param.default for param in context.command.params if param.name == other)
            context.params[other] = default


def _converted(value: Any, param: Any, context: typer.Context, place: str) -> Any:
    """The value as the command line would have given it."""
    parts = value if param.multiple and isinstance(value, list) else [value]
    if param.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{place} is {value!r}; it must be true or false")
        return value
    if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
        wanted = "texts or numbers" if param.multiple else "a text or a number"
        raise ConfigError(f"{place} is {value!r}; it must be {wanted}")
    texts = [str(part) for part in parts]
    raw: Any = texts if param.multiple else texts[0]
    try:
        param.process_value(context, raw)
    except typer.BadParameter as error:
        reason = error.format_message().rstrip(".")
        raise ConfigError(f"{place} is {value!r}: {reason}") from None
    return raw


def _check(path: Path, values: Mapping[str, Any], command: Any, above: tuple[str, ...]) -> None:
    """Every key must be an option, and every table a command.

    Raises:
        ConfigError: one is not; the message names the nearest one.
    """
    commands = getattr(command, "commands", {})
    options = {name for each in ([command] if above else _all(command)) for name in _options(each)}
    for key, value in values.items():
        if isinstance(value, dict):
            if key in commands:
                _check(path, value, commands[key], (*above, key))
                continue
            what, known = f"table [{'.'.join((*above, key))}]", set(commands)
        elif _name(key) in options:
            continue
        else:
            what, known = f"key {key!r}", {name.replace("-", "_") for name in options}
            what += f" in [{'.'.join(above)}]" if above else ""
            known_by = {
                param.name for each in ([command] if above else _all(command)) for param in _options(each).values()
            }
            raise ConfigError(f"{path}: unknown {what}; {_nearest(key, known, known_by)}")
        raise ConfigError(f"{path}: unknown {what}; {_nearest(key, known, known)}")


def _nearest(key: str, known: Iterable[str], listed: Iterable[str]) -> str:
    """The name that was meant; where none is like it, those that there are, each thing by one name."""
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there is {', '.join(sorted(listed))}" if listed else "it has no options that a file could set"


def _all(command: Any) -> list[Any]:
    """A command and all below it."""
    return [command, *(each for part in getattr(command, "commands", {}).values() for each in _all(part))]


def _options(command: Any) -> dict[str, Any]:
    """The options that a file may set, by each of their names."""
    shown = [
        param
        for param in command.params
        if param.param_type_name == "option" and not param.hidden and param.name not in _NOT_FOR_FILES
    ]
    taken = [name for param in command.params for name in param.opts]
    return {_name(name): param for param in shown for name in (*param.opts, *aliases(param.opts, taken))}


def _name(key: str) -> str:
    """`max-new-tokens`, of `--max-new-tokens` as of `max_new_tokens`."""
    return key.lstrip("-").replace("_", "-")
