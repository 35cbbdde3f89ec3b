"""`hopskip cache`: the packed weights that make a second start quick, and how to be rid of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopskip.cli.commands import App
from hopskip.cli.console import print_json
from hopskip.cli.options import JsonOption
from hopskip.cli.progress import progress

if TYPE_CHECKING:
    from hopskip.backends.native.cache import CachedFile

app = App(help="List, prune and verify packed weights on disk.\n\n$ hopskip cache list")


@app.command("list", takes_time=False)
def list_files(as_json: JsonOption = False) -> None:
    """List packed weights: of which model, in which precision, how large, when last used.

    $ hopskip cache list
    """
    files = _files()
    if as_json:
        print_json({"folder": str(_folder()), "files": [file.as_dict() for file in files]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("model", "precision", "size", "last used", "state"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for file in files:
        used = time.strftime("%Y-%m-%d", time.localtime(file.last_used))
        table.add_row(file.model or file.path.name, file.precision, _size(file.size), used, file.state)
    Console(highlight=False).print(table)
    print(f"{_size(sum(file.size for file in files))} in {_folder()}")


@app.command(takes_time=False)
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Remove all packed weights.")] = False,
    unused_for: Annotated[
        float | None,
        typer.Option(metavar="DAYS", help="Remove as well what has not been used for so long.", show_default=False),
    ] = None,
) -> None:
    """Remove what no start will read again: weights packed by other versions, damaged ones, leftovers of killed runs.

    Whatever is removed and needed again is packed anew.

    $ hopskip cache prune
    $ hopskip cache prune --unused-for 30
    """
    from hopskip.errors import ConfigError

    if unused_for is not None and not unused_for >= 0:
        raise ConfigError(f"--unused-for is {unused_for}; it must be a number of days, 0 or more")
    freed = 0
    for file in _files():
        is_old = unused_for is not None and time.time() - file.last_used >= unused_for * 86_400
        if everything or is_old or file.state != "current":
            file.path.unlink(missing_ok=True)
            print(f"removed {file.path.name}, {_size(file.size)}: {file.state}")
            freed += file.size
    print(f"{_size(freed)} freed in {_folder()}")


@app.command("verify")
def verify_files() -> None:
    """Read all packed weights, and compare them with their checksums. Damaged ones are removed, and packed anew when
    they are next needed; exit code 1 says so.

    $ hopskip cache verify
    """
    are_damaged = False
    for file in _files():
        if file.state not in ("current", "damaged"):
            continue
        try:
            with progress(f"reading {file.model or file.path.name}"):
                file.verify()
            outcome = "good"
        except (OSError, ValueError, KeyError, TypeError) as error:
            file.path.unlink(missing_ok=True)
            outcome, are_damaged = f"damaged ({error}), and removed", True
        print(f"{file.path.name} ({file.model or 'unknown model'}): {outcome}")
    if are_damaged:
        raise typer.Exit(1)


def _files() -> list[CachedFile]:
    from hopskip.backends.native.cache import cached_files

    return list(cached_files(_folder()))


def _folder() -> Path:
    from hopskip.errors import ConfigError
    from hopskip.machine import cache_folder

    folder = cache_folder()
    if folder is None:
        raise ConfigError("HOPSKIP_CACHE is empty, so nothing is kept; unset it, or set it to a folder")
    return folder


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
