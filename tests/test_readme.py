"""What README and guide say works: examples run, commands parse, and options and links exist. All of them, in a fresh
environment: `scripts/paste-docs`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks import formats
from typer.testing import CliRunner

from hopskip.cli import app
from tests import pasting
from tests.serving import live_server, tiny_llm

ROOT = Path(__file__).parent.parent
SERVER = "http://127.0.0.1:8000"
SUBCOMMANDS = [
    ["bench", "serve"],
    ["trace", "show"],
    ["trace", "record"],
    ["trace", "replay"],
    ["train", "exit"],
    ["train", "layerskip"],
    *(["export", kind] for kind in ("early-exit", "eagle3", "merged", "gguf")),
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks("console", page) for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("page", pasting.PAGES, ids=lambda page: page.name)
def test_what_is_printed_can_be_pasted(page: Path, default_model: Path, tmp_path: Path) -> None:
    """The quick form of `scripts/paste-docs`: what takes seconds, with the hopskip of this environment."""
    path = tmp_path / "bin"
    path.mkdir()
    command = path / "hopskip"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hopskip "$@"\n')
    command.chmod(0o755)
    environment = pasting.reader_environment(tmp_path, f"{path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    with pasting.Shell(tmp_path, environment, timeout=300) as shell:
        pasting.paste_page(page, shell, quick=True, report=print)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with live_server(tiny_llm(tmp_path)) as live:
        yield live.url


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own default
@pytest.mark.parametrize(
    ("page", "code"),
    [pytest.param(page, code, id=page.name) for page in PAGES for code in blocks("python", page)],
)
def test_python_runs(
    page: Path, code: str, default_model: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written for a server of one's own asks one that runs."""
    exec(compile(code.replace(SERVER, server), page.name, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", [c for c in commands() if re.search(r"(^|[|] *)hopskip ", c)])
def test_commands_have_options_that_exist(command: str) -> None:
    """The command as it stands, with --help in front of what would start the work."""
    words = shlex.split(command.split("|")[-1], comments=True)
    assert words[0] == "hopskip"
    group = [] if len(words) < 3 or words[1:3] not in SUBCOMMANDS else [words[2]]
    help_text = CliRunner().invoke(app, [words[1], *group, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for option in (word for word in words[2:] if word.startswith("--")):
        assert option in help_text, f"{command}: no option {option}"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("scripts/")])
def test_scripts_exist(command: str) -> None:
    script = ROOT / shlex.split(command, comments=True)[0]
    assert script.stat().st_mode & 0o100, f"{script} cannot be executed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_exist(page: Path) -> None:
    for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text()):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


@pytest.mark.parametrize("table", [formats.families, formats.files, formats.scalings])
def test_what_is_read_is_listed(table: Callable[[], str]) -> None:
    """`python -m benchmarks.formats` writes these tables; a page that has one in an older state fails too."""
    text = table()
    pages = [page.name for page in PAGES if text.splitlines()[0] in page.read_text()]
    assert pages, f"no page has this table:\n{text}"
    for name in pages:
        assert any(text in page.read_text() for page in PAGES if page.name == name), f"{name} needs:\n{text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
