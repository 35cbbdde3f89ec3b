"""`hopskip check --against URL`: whether speculation changes what a server writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hopskip.cli.console import print_json
from hopskip.cli.options import Group
from hopskip.cli.progress import progress
from hopskip.cli.settings import source_of
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig
from hopskip.machine import replacing_file, require
from hopskip.options import option

if TYPE_CHECKING:
    from hopskip.bench.same_texts import Comparison, Parting
    from hopskip.prompts import Prompt

_NUM_PROMPTS, _MAX_NEW_TOKENS = 20, 64
_MOST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to ask a server."""

    reference: str | None = option(
        None, "A server of the same model without speculation (default: hopskip's own turns it off).", "URL"
    )
    without: str | None = option(
        None,
        "Fields of a request that turn speculation off, such as '{\"speculative.n_max\": 0}' for llama.cpp.",
        "JSON",
    )
    prompts: str | None = option(
        None, "alpaca, gsm8k, humaneval, mt_bench, copy, long, or a .jsonl file (default: a few of each).", "SET|FILE"
    )
    concurrency: int = option(1, "Requests at a time.", "N")
    max_gap: float = option(
        0.0, "Texts that part where the two tokens' log-probabilities are so near are ties, not failures.", "GAP"
    )
    served_model_name: str | None = option(None, "Default: the first that the server lists.", "NAME")
    api_key: str | None = option(None, "The server's API key.", "KEY", envvar="HOPSKIP_API_KEY")
    badge: Path | None = option(None, "Write what shields.io draws a badge from.", "FILE.json")

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"concurrency is {self.concurrency}; it must be at least 1")
        if not self.max_gap >= 0:
            raise ConfigError(f"max_gap is {self.max_gap:g}; it must not be negative")
        if self.reference is not None and not self.reference.startswith(("http://", "https://")):
            raise ConfigError(f"reference is {self.reference!r}; give the URL of a server, with http:// before it")
        if self.reference is not None and self.without is not None:
            raise ConfigError("reference and without are two ways to decode plainly; leave one out")


ServerGroup = Annotated[ServerOptions, Group("A server, with --against URL")]


def refuse_server_options(options: ServerOptions) -> None:
    """Raises ConfigError: one was given that has no effect here. A key of the environment is nobody's wish."""
    for item in fields(options):
        if getattr(options, item.name) != item.default and not item.metadata["envvar"]:
            raise ConfigError(f"{_option(item.name)} has no effect without --against URL; leave it out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse_model_options(context: typer.Context) -> None:
    """Raises ConfigError: one of them was given, beside a server that has loaded its model already."""
    names = {item.name for item in fields(LoadConfig)} | {"precision"}
    for param in context.command.params:
        if param.name in names and source_of(context, param.name) == "COMMANDLINE":
            raise ConfigError(
                f"{_option(param.name)} has no effect on a server, which has loaded its model already; leave it out"
            )


def check_server(
    url: str,
    options: ServerOptions,
    num_prompts: int | None,
    max_new_tokens: int | None,
    as_json: bool,
) -> None:
    """Compare, and print the outcome; exit code 1 if texts differ.

    Raises:
        ConfigError: a server cannot be asked.
    """
    require("httpx", "asking a server", "eval")
    import asyncio

    from hopskip.bench.load_test import Target
    from hopskip.bench.same_texts import compare

    target = Target(
        url=url,
        model=options.served_model_name,
        api_key=options.api_key,
        max_tokens=max_new_tokens or _MAX_NEW_TOKENS,
    )
    reference = None
    if options.reference is not None:
        reference = replace(target, url=options.reference)
    elif options.without is not None:
        reference = replace(target, extra=_fields(options.without))
    prompts = _prompts(options.prompts, num_prompts)
    with progress("finding the server's model") as shown:
        found = asyncio.run(
            compare(
                target,
                prompts,
                reference=reference,
                concurrency=options.concurrency,
                max_gap=options.max_gap,
                on_progress=shown.doing,
            )
        )
    if options.badge is not None:
        _write_badge(options.badge, found)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    if not found.passed:
        raise typer.Exit(1)


def _prompts(source: str | None, num_prompts: int | None) -> list[Prompt]:
    from hopskip.prompts import load_prompts, mixed_prompts

    if source is not None:
        return load_prompts(source, num_prompts)
    return mixed_prompts(_NUM_PROMPTS if num_prompts is None else num_prompts)


def _fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"without is {text!r}; give a JSON object such as '{{\"speculative.n_max\": 0}}'")
    return found


def _write_badge(path: Path, found: Comparison) -> None:
    try:
        with replacing_file(path) as beside:
            beside.write_text(json.dumps(found.badge()) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"badge is {str(path)!r}, which cannot be written: {error.strerror}") from None


def _print(found: Comparison) -> None:
    print(f"{found.model} at {found.url}, with and without speculation: {found.summary}")
    for parting in found.partings[:_MOST_SHOWN]:
        _print_parting(parting)
    if len(found.partings) > _MOST_SHOWN:
        print(f"  and {len(found.partings) - _MOST_SHOWN} more (--json has all)")
    if found.own_partings:
        print(
            f"Without speculation it wrote {len(found.own_partings)} of {found.num_prompts} texts otherwise when asked "
            "again: its texts hang on more than the prompt."
        )
    print("passed" if found.passed else "failed")


def _print_parting(parting: Parting) -> None:
    where = f"after {parting.position} characters"
    if parting.token is not None:
        where += f", at token {parting.token}"
    gap = "unknown" if parting.gap is None else f"{parting.gap:.2g}"
    print(f"  {parting.prompt} parts {where}: {parting.expected!r}, with speculation {parting.got!r}; gap {gap}")
