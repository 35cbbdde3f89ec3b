"""Version and revision: from git in a checkout, from the note in a package that was built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hopskip
from hopskip import version
from hopskip.bench.machine import versions
from hopskip.cli import app
from hopskip.cli.console import print_json
from hopskip.version import describe, find_revision, note_revision


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of a package in a source tree without git."""
    folder = tmp_path / "checkout" / "src" / "hopskip"
    (folder / "data").mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").write_text("")
    return folder


def git(folder: Path, *arguments: str) -> str:
    """git as it is configured nowhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(checkout: Path) -> str:
    git(checkout, "add", ".")
    git(checkout, "commit", "--message", "x", "--no-gpg-sign")
    return git(checkout, "rev-parse", "--short=7", "HEAD")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_asks_git(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags say nothing new, a note may be old, and a hook's variables lead elsewhere."""
    checkout = package.parent.parent
    git(checkout, "init")
    revision = commit(checkout)
    git(checkout, "tag", "--annotate", "v9", "--message", "x")
    note_revision(package, "0000000")
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    assert find_revision(package) == revision
    (checkout / "pyproject.toml").write_text("changed")
    assert find_revision(package) == f"{revision}.dirty"


def test_elsewhere_the_note_counts(package: Path) -> None:
    """Also where the tree lies within a repository of something else."""
    assert find_revision(package) is None
    (package.parents[2] / ".git").mkdir()
    assert note_revision(package, "1234abc") == package / "data" / "revision"
    assert find_revision(package) == "1234abc"
    (package / "data" / "revision").write_bytes(b"\xff")
    assert find_revision(package) is None


def test_an_installed_package_in_a_repository(package: Path) -> None:
    """A folder of packages has no pyproject.toml beside it, whatever repository it is kept in."""
    (package.parents[1] / "pyproject.toml").unlink()
    (package.parents[1] / ".git").mkdir()
    note_revision(package, "1234abc")
    assert find_revision(package) == "1234abc"


@pytest.mark.parametrize("path", ["", None])
def test_without_git(path: str | None, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No git, or a folder that is no repository after all."""
    (package.parents[1] / ".git").mkdir()
    if path is not None:
        monkeypatch.setenv("PATH", path)
    assert find_revision(package) is None


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(version, "find_revision", lambda _: "1234abc")
    describe.cache_clear()
    yield f"{hopskip.__version__}+g1234abc"
    describe.cache_clear()


def test_version_is_in_what_is_written(described: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe() == described
    assert versions()["hopskip"] == described
    print_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "hopskip_version": described, "a": 1}
    assert CliRunner().invoke(app, ["--version"]).output == f"hopskip {described}\n"


def test_an_unknown_revision_is_left_out(described: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "find_revision", lambda _: None)
    assert describe() == hopskip.__version__ != described


def test_git_is_not_asked_without_need() -> None:
    """Neither by the import nor by --help."""
    code = "import hopskip.version as version; version.find_revision = None; import hopskip.cli; hopskip.cli.main()"
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)
    assert subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True).returncode == 1
