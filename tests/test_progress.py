"""What takes its time says so: a bar in a terminal, plain lines elsewhere, and nothing that is asked to be quiet."""

from __future__ import annotations

import doctest
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hopskip import LLM, SpeculativeConfig
from hopskip.backends.native import isa
from hopskip.bench import machine as bench_machine
from hopskip.bench import measure as measuring
from hopskip.bench.contenders import Contender
from hopskip.cli import app
from hopskip.cli import progress as module
from hopskip.cli.progress import line, loading, progress, silenced
from hopskip.loading import LoadConfig, open_model
from hopskip.prove import context, greedy, sampled
from hopskip.prove.proof import Proof
from tests.tiny import write_checkpoint

native = pytest.mark.skipif(isa.obstacle() is not None, reason="needs the native extension")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama2-mha", tokenizer=True)
    return folder


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come without waiting, each time that something is told."""
    monkeypatch.setattr(module, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(module, "_NEXT_LINES", 0.0)
    monkeypatch.setattr(module, "_Lines", told_only(module._Lines))


def told_only(lines: Any) -> Any:
    return lambda what, undisturbed: lines(what, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here on stderr is a terminal that can draw. (No fixture: pytest gives each phase of a test a stderr.)"""
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return stderr


def run(*arguments: str | Path, **environment: str) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment, input="")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_examples_of_docstrings() -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


# -- plain lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "first", "seconds", "shown"),
    [
        (None, 0.0, 7.4, "packing: 7 s so far"),
        (0.0, 0.0, 7.0, "packing: 0 %"),
        (0.5, 0.0, 10.0, "packing: 50 %, about 10 s left"),
        (0.5, 0.5, 10.0, "packing: 50 %"),
        (0.75, 0.5, 10.0, "packing: 75 %, about 10 s left"),
        (0.1, 0.0, 20.0, "packing: 10 %, about 3 min left"),
        (0.01, 0.0, 100.0, "packing: 1 %, about 2 h 45 min left"),
        (0.999, 0.0, 10.0, "packing: 100 %, about 1 s left"),
        (1.0, 0.0, 10.0, "packing: 100 %"),
    ],
)
def test_line(share: float | None, first: float, seconds: float, shown: str) -> None:
    assert line("packing", share, first, seconds) == shown


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress("loading", undisturbed=True) as shown:
        for now, what, share in (
            (101.9, "loading", None),  # too early
            (102.5, "loading", None),
            (103.0, "packing", 0.1),  # too soon after that
            (104.0, "packing", 0.2),
            (108.0, "packing the head", 0.6),  # a part of the same work: 0.5 of it in 5 s
            (110.0, "packing the head", 0.7),
            (114.0, "measuring", 0.2),  # other work, which begins now
        ):
            clock[0] = now
            shown.doing(what, share)
    assert capsys.readouterr().err.splitlines() == [
        "hopskip: loading: 2 s so far",
        "hopskip: packing the head: 60 %, about 4 s left",
        "hopskip: measuring: 20 %",
    ]


def test_lines_come_though_nobody_tells_anything(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "_FIRST_LINE", 0.01)
    monkeypatch.setattr(module, "_NEXT_LINES", 0.01)
    with progress("loading"):
        seen = ""
        deadline = time.monotonic() + 60
        while seen.count("loading") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            seen += capsys.readouterr().err
    assert set(seen.splitlines()) == {"hopskip: loading: 1 s so far"}
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""  # it is over


def test_what_is_quick_says_nothing(capsys: Any) -> None:
    with progress("loading") as shown:
        shown.doing("loading", 0.5)
    assert capsys.readouterr().err == ""


def test_a_stderr_that_is_closed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in (None, closed()):
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(module, "_FIRST_LINE", 0.0)
        with progress("loading", undisturbed=True) as shown:
            shown.doing("loading", 0.5)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.isatty = lambda: False  # type: ignore[method-assign]
    stream.write = refuse  # type: ignore[method-assign]
    return stream


def refuse(text: str) -> int:
    raise BrokenPipeError


# -- a bar -------------------------------------------------------------------------------------------------------------


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with progress("loading [x]") as shown:
        shown.doing("loading [x]", None)
        for share in (0.2, 0.3, 0.4, 0.5):
            shown.doing("packing weights", share)
            time.sleep(0.1)
        time.sleep(0.6)  # it is drawn ten times a second, the time that remains twice
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stderr.getvalue())
    assert "Loading [x]" in text
    assert re.search(r"Packing weights.* 50%.*\d:\d\d:\d\d", text)
    assert "\x1b[2K" in stderr.getvalue()  # taken away at its end


def test_a_bar_that_is_drawn_when_it_is_told_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with progress("measuring", undisturbed=True) as shown:
        for share in (0.25, 0.5):
            shown.doing("measuring", share)
    assert " 25%" in stderr.getvalue()
    assert " 50%" in stderr.getvalue()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "unknown"}])
@pytest.mark.usefixtures("at_once")
def test_terminals_that_cannot_draw_get_lines(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    stderr = terminal(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with progress("loading") as shown:
        shown.doing("loading", 0.5)
    assert re.fullmatch(r"hopskip: loading: 50 %\n", stderr.getvalue())


def test_an_empty_no_color_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "")
    with progress("loading"):
        pass
    assert "\x1b[" in stderr.getvalue()


def test_results_do_not_go_where_the_bar_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stdout of a command whose stderr is a terminal may be a file."""
    stderr = terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", file := io.StringIO())
    with progress("proving"):
        print("a result")
    assert file.getvalue() == "a result\n"
    assert "a result" not in stderr.getvalue()


@pytest.mark.usefixtures("at_once")
def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with silenced(True):
        for _ in progress_of("loading"):
            pass
        with loading("x") as shown, silenced(False):  # which cannot undo it
            shown.doing("packing", 0.5)
            with progress("more") as more:
                more.doing("more", 0.5)
    with progress("loading", quiet=True) as shown:
        shown.doing("loading", 0.5)
    assert stderr.getvalue() == ""
    with silenced(False), progress("loading"):
        pass
    assert stderr.getvalue() != ""


def progress_of(what: str) -> Iterator[None]:
    with progress(what) as shown:
        shown.doing(what, 0.5)
        yield


# -- who tells ---------------------------------------------------------------------------------------------------------


@native
def test_loading_tells_what_it_does(model: Path) -> None:
    told: list[tuple[str, float | None]] = []
    draft = SpeculativeConfig(draft="layer-skip", draft_precision="q4", skip_layers=(1,))
    open_model(LoadConfig(model=model, quantize="q8"), draft, lambda what, share: told.append((what, share)))
    packing = [share for what, share in told if what.startswith("packing weights")]
    copying = [share for what, share in told if what == "packing the copy in q4"]
    assert packing[-1] == copying[-1] == 1.0
    for shares in (packing, copying):
        assert len(shares) > 2
        assert shares == sorted(shares)  # type: ignore[type-var]
    told.clear()
    open_model(LoadConfig(model=model, backend="torch"), None, lambda what, share: told.append((what, share)))
    assert {what for what, _ in told} == {"loading weights"}


@pytest.mark.usefixtures("at_once")
def test_a_library_is_silent_and_tells_who_asks(model: Path, capsys: Any) -> None:
    told: list[str] = []
    LLM(model, backend="torch", speculative=SpeculativeConfig(draft="auto"), progress=lambda what, _: told.append(what))
    assert {"loading weights", "measuring costs"} <= set(told)
    LLM(model, backend="torch", speculative=SpeculativeConfig(draft="ngram"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "-n", "2", "--raw", "Hi"], "loading weights"),
        (["bench", "--num-prompts", "1", "-n", "2", "--draft", "none"], "measuring hopskip"),
        (["perplexity", "--num-tokens", "200", "--precision", "bf16"], "reading in bfloat16"),
        (["check", "--num-prompts", "2", "--precision", "float32"], "proving in float32"),
    ],
)
def test_commands_say_what_they_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(measuring, "measure", measure_nothing)
    monkeypatch.setattr(bench_machine, "measure_read_bandwidth", lambda threads: 1e9)
    for place, name in ((greedy, "greedy_proofs"), (sampled, "sampling_proofs"), (context, "context_proofs")):
        monkeypatch.setattr(place, name, prove_little)
    where = ("-m", model, "--backend", "torch", "--json")
    loud = run(*arguments, *where)
    assert loud.exit_code == 0, loud.output
    assert re.search(rf"^hopskip: {said}.*: \d+ %", loud.stderr, re.MULTILINE), loud.stderr
    json.loads(loud.stdout)  # whatever is said, stdout holds the result alone
    assert run(*arguments, *where, "--quiet").stderr == ""


def measure_nothing(contenders: list[Contender], *rest: Any, on_step: Any, **options: Any) -> list[Any]:
    on_step(contenders[0].name)
    return []


def prove_little(*arguments: Any) -> Iterator[Proof]:
    yield Proof(topic="greedy", setting="none", claim="equal", status="passed", detail="")
