"""What commands share: help, names of options, completion, settings, prompts from stdin, versions of results."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.cli import aliases, app, commands, options
from hopskip.cli import prompt as prompts
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig
from hopskip.version import SCHEMA_VERSION, describe
from tests.tiny import write_checkpoint

SOURCE = Path(__file__).parents[1] / "src"


def all_commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from all_commands(each, (*path, name))


COMMANDS = dict(all_commands(get_command(app)))
GROUPS = [path for path, command in COMMANDS.items() if path and hasattr(command, "commands")]


def run(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_refused(result: Result, *named: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("hopskip: error: ")
    for text in named:
        assert text in result.stderr


class Asked:
    """Stands for a model, and keeps what it was asked for."""

    load: LoadConfig
    draft: SpeculativeConfig
    options: dict[str, Any]
    prompt: str
    params: SamplingParams

    def __init__(self) -> None:
        self.tokenizer = self
        self.has_chat_template = False
        self.recommended_sampling: dict[str, Any] = {}

    def load_llm(self, load: LoadConfig, draft: SpeculativeConfig, **options: Any) -> Asked:
        self.load, self.draft, self.options = load, draft, options
        return self

    def encode(self, prompt: str, **switches: Any) -> str:
        return prompt

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[Any]:
        self.prompt, self.params = prompt, params
        raise ConfigError("asked")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(sys.modules["hopskip.cli.generate"], "load_llm", asked.load_llm)
    return asked


def ask(*arguments: str | Path, **kwargs: Any) -> None:
    result = run("generate", *arguments, **kwargs)
    assert result.stderr == "hopskip: error: asked\n", result.stderr


@pytest.mark.parametrize("module", [aliases, commands, options, prompts], ids=lambda module: module.__name__)
def test_examples_of_docstrings(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help(path: tuple[str, ...]) -> None:
    short, long = (run(*path, option, COLUMNS="200") for option in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    assert not re.search(r"<\w+(\[\w+\])?>", short.stdout), "a type of Python's"
    examples = short.stdout.split("Examples")[1].split("\n")
    assert f"   {' '.join(('hopskip', *path))}" in "\n".join(examples)
    assert "$ hopskip" not in short.stdout


def test_examples_are_commands_that_can_be_read() -> None:
    """Every option of every example exists."""
    for command in COMMANDS.values():
        for example in command.examples:
            words = example.split("| ")[-1].split()[1:]
            path: tuple[str, ...] = ()
            while words and (*path, words[0]) in COMMANDS:
                path = (*path, words.pop(0))
            known = {name for param in COMMANDS[path].params for name in param.opts}
            assert {word for word in words if word.startswith("-")} <= known, example


def test_examples_are_not_broken_by_a_narrow_terminal() -> None:
    assert '--temperature 0.7 "Summarise:"\n' in run("generate", "-h", COLUMNS="40").stdout


def test_choices_are_shown_as_choices() -> None:
    text = run("generate", "-h", COLUMNS="200").stdout
    for choices in ("auto|float32|bfloat16|float16", "q8|q4", "auto|native|torch", "recompute|reuse"):
        assert choices in text
    draft = " ".join(re.sub(r"[│ ]+", " ", text).split())
    assert "auto|exit-branch|early-exit|" in draft
    assert "layer-skip|ngram|both|none" in draft


@pytest.mark.parametrize("path", [path for path in GROUPS if path != ("bench",)], ids=" ".join)
def test_a_bare_group_prints_its_help_and_nothing_else(path: tuple[str, ...]) -> None:
    bare = run(*path)
    assert bare.exit_code == 2
    assert bare.stderr == ""
    assert bare.stdout == run(*path, "--help").stdout


def test_bare_hopskip_prints_its_help() -> None:
    bare = run()
    assert (bare.exit_code, bare.stderr) == (0, "")
    assert bare.stdout == run("--help").stdout
    assert "generate" in bare.stdout


# -- names of options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        "-n 7",
        "-n7",
        "--max-tokens 7",
        "--max-tokens=7",
        "--predict 7",
        "--n-predict 7",
    ],
)
def test_names_of_the_number_of_tokens(asked: Asked, names: str) -> None:
    ask(*names.split(), "Hi")
    assert asked.params.max_new_tokens == 7


def test_names_that_fingers_know(asked: Asked) -> None:
    for model in ("-m", "--model", "-hf", "--hf-repo"):
        ask(model, "x", "Hi")
        assert asked.load.model == "x"
    for context in ("-c", "--ctx-size", "--max-model-len", "--context-length"):
        ask(context, "64", "Hi")
        assert asked.options["max_model_len"] == 64
    for length in ("--num-draft-tokens", "--num-speculative-tokens", "--draft-max", "--draft-n"):
        ask(length, "3", "Hi")
        assert asked.draft.num_draft_tokens == 3
    ask("--temp", "0.5", "-s", "3", "--repeat-penalty", "1.5", "-t", "2", "-q", "q8", "--kv-cache-dtype", "int8", "Hi")
    assert asked.params == SamplingParams(temperature=0.5, seed=3, repetition_penalty=1.5)
    assert asked.load == LoadConfig(threads=2, quantize="q8", kv_dtype="int8")
    for prompt in (["-p", "Hi"], ["--prompt", "Hi"], ["Hi"]):
        ask(*prompt)
        assert asked.prompt == "Hi"
    assert_refused(run("generate", "-p", "Hi", "Ho"), "'Ho'", "--prompt", "leave one out")


@pytest.mark.parametrize("option", ["--dtype", "--precision"])
def test_names_of_precisions(asked: Asked, option: str) -> None:
    for name, dtype in {"bf16": "bfloat16", "BF16": "bfloat16", "fp16": "float16", "half": "float16"}.items():
        ask(option, name, "Hi")
        assert asked.load.dtype == dtype
    for name, dtype in {"float32": "float32", "fp32": "float32", "auto": "auto"}.items():
        ask(option, name, "Hi")
        assert asked.load.dtype == dtype
    ask(option, "q8", "Hi")
    assert asked.load == LoadConfig(quantize="q8")
    assert_refused(run("generate", option, "int3", "Hi"), f"{option} is 'int3'", "auto, float32, bfloat16, float16")


def test_two_precisions_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="dtype is 'q4'"):
        LoadConfig(dtype="q4", quantize="q8")  # type: ignore[arg-type]
    assert LoadConfig(dtype="q8", quantize="q8").precision == "q8"  # type: ignore[arg-type]


def test_hidden_names_are_hidden(asked: Asked) -> None:
    text = run("generate", "-h", COLUMNS="200").stdout
    for name in ("--max-tokens", "--ctx-size", "--draft-max", "-hf", "--temp ", "--prompt"):
        assert name not in text


def test_errors_name_the_option_that_was_typed(asked: Asked) -> None:
    assert_refused(run("generate", "--max-tokens", "0", "Hi"), "--max-tokens is 0", "at least 1")
    assert_refused(run("generate", "-n", "0", "Hi"), "--max-new-tokens is 0")
    assert_refused(run("generate", "--max-tokens", "many", "Hi"), "'many'", "hopskip generate --help")
    assert_refused(run("generate", "--max-toks", "3", "Hi"), "--max-toks", "--max-tokens")


def test_what_only_a_draw_needs_is_accepted_where_nothing_is_drawn(asked: Asked) -> None:
    ask("--top-k", "40", "--top-p", "0.9", "--min-p", "0.05", "--seed", "1", "--temperature", "0", "Hi")
    assert asked.params.is_greedy


def test_num_speculative_tokens() -> None:
    config = SpeculativeConfig(num_speculative_tokens=3)
    assert config == SpeculativeConfig(num_draft_tokens=3)
    assert replace(config, num_draft_tokens=5).num_draft_tokens == 5
    assert "num_speculative_tokens" not in asdict(config)
    assert SpeculativeConfig(num_draft_tokens=3, num_speculative_tokens=3) == config
    with pytest.raises(ConfigError, match="two names of one thing"):
        SpeculativeConfig(num_draft_tokens=2, num_speculative_tokens=3)
    with pytest.raises(ConfigError, match="num_draft_tokens is 0"):
        SpeculativeConfig(num_speculative_tokens=0)


@pytest.mark.parametrize("command", ["info", "check", "perplexity", "serve", "chat"])
def test_the_model_needs_no_option_where_it_is_the_only_argument(command: str) -> None:
    if command != "serve":  # which takes its port first
        assert_refused(run(command, "/no/such/model"), "'/no/such/model' does not exist")
        assert_refused(run(command, "/no/such/model", HOPSKIP_MODEL="other"), "'/no/such/model' does not exist")
    assert_refused(run(command, "here", "--model", "there"), "here", "there", "leave one out")
    assert_refused(run(command, "here", "there"), "unexpected", "there")


# -- completion --------------------------------------------------------------------------------------------------------


def completions(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word, by the script that hopskip prints."""
    script = """
        eval "$(_HOPSKIP_COMPLETE=source_bash hopskip)"
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _hopskip_completion hopskip
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    command = folder / "hopskip"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m hopskip "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_completion_in_bash(tmp_path: Path) -> None:
    broken = tmp_path / "config.toml"
    broken.write_text("model =")
    os.environ["HOPSKIP_CONFIG"] = str(broken)  # a mistake in the settings must not show while somebody types
    try:
        assert completions(tmp_path, "hopskip", "gen") == ["generate"]
        assert completions(tmp_path, "hopskip", "generate", "--dtype", "b") == ["bfloat16"]
    finally:
        os.environ["HOPSKIP_CONFIG"] = ""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hopskip tr", {"train", "trace"}),
        ("hopskip train ", {"layerskip", "exit"}),
        ("hopskip generate --draft ", {"auto", "exit-branch", "early-exit", "layer-skip", "ngram", "both", "none"}),
        ("hopskip serve --quantize q", {"q8", "q4"}),
        ("hopskip info --mod", {"--model"}),
        ("hopskip generate -m ", set()),  # the shell's own: files
    ],
)
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_in_other_shells(line: str, offered: set[str], shell: str) -> None:
    environment = {
        "_HOPSKIP_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    text = CliRunner().invoke(app, [], env=environment, prog_name="hopskip").stdout
    found = (
        re.findall(r'"([^"]+)"(?::|\n|\))', text)
        if shell == "zsh"
        else [row.split("\t")[0] for row in text.split("\n")]
    )
    assert {name for name in found if name} >= offered
    if not offered:
        assert text.strip() in ("", "_files")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_settings_of_all_commands_and_of_one(asked: Asked, file: Path) -> None:
    file.write_text(
        'model = "shared"\nthreads = 3\ntop_k = 5\nquiet = true\nstop = ["a", "b"]\n'
        '[generate]\ntemperature = 0.5\nmodel = "own"\nmax-tokens = 9\nignore_eos = true\n[chat]\ntemperature = 2\n'
        "[bench.serve]\nnum_requests = 3\n"
    )
    ask("--config", file, "Hi")
    assert asked.load == LoadConfig(model="own", threads=3)
    wanted = SamplingParams(temperature=0.5, max_new_tokens=9, top_k=5, ignore_eos=True, stop=("a", "b"))
    assert asked.params == wanted
    ask("--config", file, "-n", "4", "--stop", "c", "-m", "mine", "Hi")
    assert asked.load.model == "mine"
    assert (asked.params.max_new_tokens, asked.params.stop) == (4, ("c",))


def test_command_line_then_environment_then_file(asked: Asked, file: Path) -> None:
    file.write_text('model = "file"')
    given = {"HOPSKIP_CONFIG": str(file)}
    ask("Hi", **given)
    assert asked.load.model == "file"
    ask("Hi", **given, HOPSKIP_MODEL="environment")
    assert asked.load.model == "environment"
    ask("-m", "line", "Hi", **given, HOPSKIP_MODEL="environment")
    assert asked.load.model == "line"
    ask("Hi", HOPSKIP_CONFIG="", HOPSKIP_MODEL="")
    assert asked.load.model is None


def test_which_file(asked: Asked, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("line.toml", "variable.toml", "xdg/hopskip/config.toml")]
    files[2].parent.mkdir(parents=True)
    for each in files:
        each.write_text(f'model = "{each.stem}"')
    usual = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HOPSKIP_CONFIG")
        ask("Hi", **usual)
        assert asked.load.model == "config"
        ask("Hi", XDG_CONFIG_HOME=str(tmp_path / "nothing"))
        assert asked.load.model is None
        patch.setenv("HOME", str(tmp_path))
        (tmp_path / ".config").symlink_to(tmp_path / "xdg")
        ask("Hi", XDG_CONFIG_HOME="")
        assert asked.load.model == "config"
    ask("Hi", **usual, HOPSKIP_CONFIG=str(files[1]))
    assert asked.load.model == "variable"
    ask("--config", files[0], "Hi", HOPSKIP_CONFIG=str(files[1]))
    assert asked.load.model == "line"
    result = run("--config", files[0], "generate", "Hi", HOPSKIP_CONFIG=str(files[1]))
    assert result.stderr == "hopskip: error: asked\n"
    assert asked.load.model == "line"
    ask("Hi", **usual, HOPSKIP_CONFIG="")
    assert asked.load.model is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("temprature = 1", ("unknown key 'temprature'", "did you mean 'temperature'?")),
        ("[generate]\nthread = 1", ("unknown key 'thread' in [generate]", "'threads'")),
        ("[chat]\ntemprature = 1", ("in [chat]", "'temperature'")),  # of any command
        ("[genrate]\nthreads = 1", ("unknown table [genrate]", "'generate'")),
        ("[bench.serv]\nurl = 1", ("unknown table [bench.serv]", "'serve'")),
        ("[generate.threads]\nx = 1", ("unknown table [generate.threads]",)),
        ("[train.exit]\nx = 1", ("unknown key 'x' in [train.exit]", "there is hours, model, quiet, yes")),
        ("[train]\nx = 1", ("unknown key 'x' in [train]", "has no options that a file")),
        ("[generate]\nzzz = 1", ("unknown key 'zzz'", "there is", "temperature")),
        ("[generate]\nprompt = 'Hi'", ("unknown key 'prompt'",)),
        ("[generate]\nconfig = 'x'", ("unknown key 'config'",)),
        ("model = 1 2", ("not valid TOML", "line 1")),
        ("[generate]\ntemperature = 'warm'", ("[generate] temperature is 'warm'",)),
        ("temperature = true", ("temperature is True", "a text or a number")),
        ("threads = [1]", ("threads is [1]", "a text or a number")),
        ("stop = [['a']]", ("stop is [['a']]", "texts or numbers")),
        ("ignore_eos = 'yes'", ("ignore_eos is 'yes'", "true or false")),
        ("ignore_eos = 1", ("ignore_eos is 1", "true or false")),
        ("threads = 1.5", ("threads is 1.5",)),
        ("top_p = 7", ("--top-p is 7.0", "(--top-p is set in ")),
        ("dtype = 'int3'", ("--dtype is 'int3'", "(--dtype is set in ")),
    ],
)
def test_mistakes_in_the_file_are_named(asked: Asked, file: Path, text: str, named: tuple[str, ...]) -> None:
    file.write_text(text)
    assert_refused(run("generate", "--config", file, "Hi"), str(file), *named)
    assert run("generate", "--config", file, "--help").exit_code == 0
    assert run("--config", file, "--version").exit_code == 0


def test_a_file_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    assert_refused(run("generate", "--config", file, "Hi"), str(file), "do not exist")
    assert_refused(run("generate", "Hi", HOPSKIP_CONFIG=str(file)), str(file), "do not exist")
    assert_refused(run("generate", "--config", tmp_path, "Hi"), str(tmp_path), "Is a directory")
    file.write_bytes(b"model = '\xff'")
    assert_refused(run("generate", "--config", file, "Hi"), str(file), "0xff")


def test_a_file_as_windows_writes_it(asked: Asked, file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfmodel = 'x'\r\nthreads = 2\r\n")
    ask("--config", file, "Hi")
    assert asked.load == LoadConfig(model="x", threads=2)


def test_a_choice_on_the_command_line_replaces_its_alternative_in_the_file(asked: Asked, file: Path) -> None:
    file.write_text('dtype = "float32"')
    ask("--config", file, "--quantize", "q8", "Hi")
    assert asked.load == LoadConfig(quantize="q8")
    file.write_text('quantize = "q8"')
    ask("--config", file, "--dtype", "bf16", "Hi")
    assert asked.load == LoadConfig(dtype="bfloat16")
    ask("--config", file, "Hi")
    assert asked.load == LoadConfig(quantize="q8")
    assert_refused(run("generate", "--quantize", "q8", "--dtype", "bf16", "Hi"), "contradict each other")


def test_the_model_of_the_environment_is_named_in_errors() -> None:
    assert_refused(run("info", HOPSKIP_MODEL="/no/such/model"), "'/no/such/model' does not exist")


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "stdin", "wanted"),
    [
        (["Summarise:"], "one\ntwo\n", "Summarise:\n\none\ntwo"),
        (["Summarise", "this:"], "one", "Summarise this:\n\none"),
        ([], "one\n", "one"),
        (["-"], "one\n\n", "one\n"),
        (["Summarise:", "-"], "one", "Summarise:\n\none"),
        (["-", "Summarise", "this."], "one", "one\n\nSummarise this."),
        (["Read", "-", "and say why"], "one", "Read\n\none\n\nand say why"),
        (["Hi"], "", "Hi"),
        (["Hi"], "\n", "Hi"),
        (["Hi"], " \r\n", "Hi"),
        (["Hi", "-"], "", "Hi"),
        (["Hi"], "\ufeffone\r\ntwo\r\n", "Hi\n\none\ntwo"),
        (["Hi"], "a\rb", "Hi\n\na\rb"),
        (["Hi"], "Grüße 你好 🙂", "Hi\n\nGrüße 你好 🙂"),
        (["Hi"], "  indented\n", "Hi\n\n  indented"),
    ],
)
def test_stdin_beside_words(asked: Asked, words: list[str], stdin: str, wanted: str) -> None:
    ask(*words, stdin=stdin.encode())
    assert asked.prompt == wanted


def test_files_beside_words(asked: Asked, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes(b"one\r\n")
    two.write_text("two\n")
    ask("--file", one, "-f", two, "Compare:")
    assert asked.prompt == "Compare:\n\none\n\ntwo"
    ask("-f", one, stdin="three\n")
    assert asked.prompt == "one\n\nthree"
    ask("-f", "-", "-f", one, stdin="three\n")
    assert asked.prompt == "three\n\none"
    assert_refused(run("generate", "-f", tmp_path / "nowhere.txt"), "nowhere.txt", "No such file")
    assert_refused(run("generate", "-f", tmp_path), str(tmp_path), "directory")
    one.write_bytes(b"\x00\x01")
    assert_refused(run("generate", "-f", one, "Hi"), "one.txt", "NUL at offset 0")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"caf\xe9", ("0xe9", "offset 3", "iconv -t UTF-8")),
        (b"\xff\xfeh\x00i\x00", ("0xff", "offset 0", "iconv -f UTF-16 -t UTF-8")),
        (b"\x7fELF\x02\x00\x01", ("NUL at offset 5",)),
    ],
)
@pytest.mark.parametrize("words", [["Summarise:"], [], ["-"]])
def test_what_is_no_text_is_refused(asked: Asked, content: bytes, named: tuple[str, ...], words: list[str]) -> None:
    assert_refused(run("generate", *words, stdin=content), "stdin", *named)


def test_no_prompt() -> None:
    assert_refused(run("generate", stdin=""), "no prompt given", "pipe it in")
    assert_refused(run("generate", "-", stdin=""), "the prompt is empty")
    assert_refused(run("generate", " ", stdin=""), "the prompt is empty")
    assert_refused(run("generate", "-", "-", stdin="x"), "only once")
    assert_refused(run("generate", "-", "-f", "-", stdin="x"), "only once")


def read_in_a_process(shell: str) -> subprocess.CompletedProcess[str]:
    """The prompt that a process reads whose stdin the shell has set up: PYTHON -c CODE is `$READ`."""
    code = "from hopskip.cli.prompt import read_prompt; print(repr(read_prompt(['Hi'])))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "READ": code, "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("shell", "wanted"),
    [
        ('"$PYTHON" -c "$READ" < /dev/null', "Hi"),
        ('"$PYTHON" -c "$READ" <&-', "Hi"),
        ('"$PYTHON" -c "$READ" 0> /dev/null', "Hi"),  # as nohup leaves it
        ('true | "$PYTHON" -c "$READ"', "Hi"),
        ('(sleep 1; echo late) | "$PYTHON" -c "$READ"', "Hi\n\nlate"),
        ('"$PYTHON" -c "$READ" <<< text', "Hi\n\ntext"),
        ('"$PYTHON" -c "$READ" & wait', "Hi"),
    ],
)
def test_stdin_of_a_process(shell: str, wanted: str) -> None:
    done = read_in_a_process(shell)
    assert (done.stdout, done.stderr) == (f"{wanted!r}\n", "")


def test_the_lines_of_a_loop_and_of_a_script_are_theirs(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntwo\n")
    loop = read_in_a_process(f'while read -r line; do "$PYTHON" -c "$READ"; done < {tmp_path / "lines"}')
    assert loop.stdout == "'Hi'\n'Hi'\n"
    assert loop.stderr.count("a script or a loop") == 1  # after the last line nothing is left to take
    (tmp_path / "script").write_text('"$PYTHON" -c "$READ"\necho done\n')
    assert read_in_a_process(f"bash < {tmp_path / 'script'}").stdout == "'Hi'\ndone\n"


def test_an_open_pipe_that_nobody_writes_to_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As under ssh without a terminal."""
    monkeypatch.setattr(prompts, "_PATIENCE", 0.05)
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert prompts.read_prompt(["Hi"]) == "Hi"
        assert "nothing came" in (said := capsys.readouterr().err)
        assert "give - to read it" in said
        os.write(writer, b"late\n")
        os.close(writer)
        assert prompts.read_prompt(["Hi", "-"]) == "Hi\n\nlate"
        assert capsys.readouterr().err == ""


def test_a_terminal_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    try:
        with os.fdopen(terminal) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert prompts.read_prompt(["Hi"]) == "Hi"
    finally:
        os.close(controller)


def test_a_long_text_names_both_sizes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama2-mha", tokenizer=True)
    result = run("generate", "-m", tmp_path, "--backend", "torch", "-n", "4", "Summarise:", stdin="word " * 5000)
    assert_refused(result, "context of 1024", "shorten")
    assert re.search(r"\d{4,} tokens", result.stderr)
    result = run("generate", "-m", tmp_path, "--backend", "torch", "-c", "32", "-n", "4", "word " * 40, stdin="")
    assert_refused(result, "context of 32")


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_say_by_which_schema_and_version(tmp_path: Path) -> None:
    stamp = {"schema_version": SCHEMA_VERSION, "hopskip_version": describe()}
    assert re.match(r"\d+\.\d+", describe())
    write_checkpoint(tmp_path, "llama2-mha", tokenizer=True)
    where = ("-m", tmp_path, "--backend", "torch")
    trace = tmp_path / "trace.jsonl"
    results = [
        run("info", *where, "--json").stdout,
        run("generate", *where, "-n", "4", "--json", "--trace", trace, "Hi", stdin="").stdout,
        trace.read_text().splitlines()[0],
        run("trace", "show", trace, "--json").stdout,
        run("cache", "list", "--json", HOPSKIP_CACHE=str(tmp_path / "cache")).stdout,
    ]
    for result in results:
        assert stamp.items() <= json.loads(result).items()


def test_version() -> None:
    assert run("--version").stdout == f"hopskip {describe()}\n"
