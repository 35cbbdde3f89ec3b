"""The command line: what it prints, and one clear line for everything that a user can get wrong."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.backends.native import isa
from hopskip.cli import app
from hopskip.cli.options import DraftGroup, Group, LoadGroup, with_options
from hopskip.loading import BackendName, DType, LoadConfig, Quantize
from hopskip.speculative import DraftChoice, VerifyMode
from tests.tiny import byte_level_tokenizer, make_model, write_checkpoint, write_gguf, write_tokenizer

SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of three layers and 1,024 tokens of context."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama2-mha", tokenizer=True)
    return folder


@pytest.fixture(scope="module")
def base_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without chat template."""
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, "llama2-mha")
    write_tokenizer(folder, chat_template=None)
    return folder


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generate(model: Path, *arguments: str | Path, **kwargs: Any) -> Result:
    return run("generate", "-m", model, "--backend", "torch", *arguments, **kwargs)


def subprocess_arguments(*arguments: str | Path) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "hopskip", *map(str, arguments)],
        "env": {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100"},
    }


# -- bad input ---------------------------------------------------------------------------------------------------------


def assert_refused(result: Result, *named: str) -> None:
    """One line on stderr that names these, nothing on stdout, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("hopskip: error: ")
    for text in named:
        assert text in result.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--exit-layer", "3"], ("--exit-layer is 3", "between 1 and 2")),
        (["--exit-layer", "0"], ("--exit-layer is 0", "between 1 and 2")),
        (["--num-draft-tokens", "-1"], ("--num-draft-tokens is -1", "at least 1")),
        (["--num-draft-tokens", "0"], ("--num-draft-tokens is 0", "draft 'none'")),
        (["--min-confidence", "1.5"], ("--min-confidence is 1.5", "below 1")),
        (["--draft", "magic"], ("--draft is 'magic'", "early-exit, layer-skip, ngram, both, none")),
        (["--verify", "maybe"], ("'maybe'", "recompute, reuse")),
        (["--draft", "none", "--exit-layer", "1"], ("--exit-layer=1", "leave one out")),
        (["--draft", "none", "--verify", "reuse"], ("--verify=reuse", "leave one out")),
        (["--dtype", "float8"], ("--dtype is 'float8'", "auto, float32, bfloat16, float16")),
        (["--quantize", "q3"], ("'q3'", "q8, q4")),
        (["--kv-dtype", "int4"], ("'int4'", "bfloat16, int8")),
        (["--kv-dtype", "int8", "--backend", "torch"], ("--kv-dtype=int8", "native CPU backend", "leave it out")),
        (["--quantize", "q8", "--dtype", "float32"], ("--quantize=q8", "--dtype=float32", "leave one out")),
        (["--backend", "tpu"], ("'tpu'", "auto, native, torch")),
        (["--device", "warp"], ("'warp'", "'cpu' or 'cuda'")),
        (["--threads", "0"], ("--threads is 0", "at least 1")),
        (["--max-new-tokens", "0"], ("--max-new-tokens is 0", "at least 1")),
        (["-n", "2000"], ("2000", "context of 1024", "use --max-new-tokens <=")),
        (["-n", "many"], ("--max-new-tokens", "'many'", "--help")),
        (["--temperature=warm"], ("--temperature", "'warm'", "--help")),
        (["--temperature", "-1"], ("--temperature is -1.0", "0 (greedy) or above")),
        (["--top-p", "0", "--temperature", "1"], ("--top-p is 0.0", "above 0")),
        (["--stop", ""], ("--stop is", "non-empty")),
        (["--raw", "--system", "Be brief."], ("--raw", "--system")),
        (["--exit-layer"], ("--exit-layer", "'Hello'", "--help")),
        (["--exit", "3"], ("--exit", "--help")),
    ],
)
def test_wrong_options(model: Path, options: list[str], named: tuple[str, ...]) -> None:
    assert_refused(generate(model, *options, "Hello"), *named)


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "corrupt-gguf", "empty-gguf", "no-weights", "pickled", "text"]
)
@pytest.mark.parametrize("command", ["generate", "chat", "info"])
def test_bad_model_files(tmp_path: Path, command: str, kind: str) -> None:
    path, reason = bad_model(tmp_path, kind)
    arguments = ["info", str(path)] if command == "info" else [command, "-m", str(path)]
    assert_refused(run(*arguments, *(["Hello"] if command == "generate" else [])), str(path), reason)


def bad_model(folder: Path, kind: str) -> tuple[Path, str]:
    """A path that is no model, and what the error must say of it."""
    if kind == "missing":
        return folder / "nowhere", "does not exist"
    if kind in ("corrupt-gguf", "empty-gguf"):
        path = folder / "model.gguf"
        write_gguf(path, make_model("llama2-mha"), tokenizer=byte_level_tokenizer())
        content = path.read_bytes()
        path.write_bytes(b"GGUF\x03" + b"\xff" * len(content) if kind == "corrupt-gguf" else b"")
        return path, "cannot be read as GGUF"
    if kind == "text":
        path = folder / "model.txt"
        path.write_text("weights")
        return path, "neither a folder"
    write_checkpoint(folder, "llama2-mha", tokenizer=True)
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return folder, "truncated or corrupt"
    weights.unlink()
    if kind == "pickled":
        (folder / "pytorch_model.bin").write_bytes(b"")
        return folder, "never opens them"
    return folder, "complete checkpoint"


def test_prompt_too_long(model: Path) -> None:
    assert_refused(generate(model, "-n", "1", "a b " * 1000), "context of 1024", "shorten the prompt")


def test_invalid_utf8_on_stdin(model: Path) -> None:
    assert_refused(generate(model, "-", stdin=b"caf\xe9"), "not valid UTF-8", "0xe9", "offset 3", "iconv")
    assert_refused(run("chat", "-m", model, "--backend", "torch", stdin=b"caf\xe9\n"), "not valid UTF-8", "iconv")


@pytest.mark.parametrize("arguments", [[], [""], [" "], ["-"]])
def test_no_prompt(model: Path, arguments: list[str]) -> None:
    assert_refused(generate(model, *arguments, stdin=""), "prompt")


def test_system_message_needs_a_template(base_model: Path) -> None:
    assert_refused(generate(base_model, "--system", "Be brief.", "Hello"), "--system", "no chat template")


def test_chat_needs_a_template(base_model: Path) -> None:
    assert_refused(run("chat", "-m", base_model, "--backend", "torch", stdin="Hi\n"), "no chat template", "generate")


def test_model_given_twice(model: Path) -> None:
    assert_refused(run("info", model, "-m", "other"), str(model), "other", "leave one out")


def test_unknown_command() -> None:
    assert_refused(run("generat"), "'generat'", "'generate'", "--help")


def test_bugs_show_a_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise ZeroDivisionError

    monkeypatch.setattr(LLM, "stream", fail)
    with pytest.raises(ZeroDivisionError):
        generate(model, "Hello")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "obstacle", lambda: "the extension\nis not built")
    result = run("info", model)
    assert result.exit_code == 0
    assert re.fullmatch(r"hopskip: warning: running on torch, .*: the extension is not built\n", result.stderr)


# -- generate ----------------------------------------------------------------------------------------------------------


def expected(model: Path, prompt: Any, **speculative: Any) -> Any:
    llm = LLM(model, backend="torch", speculative=SpeculativeConfig(**speculative))
    return llm.generate(prompt, SamplingParams(max_new_tokens=40, ignore_eos=True))[0]


def test_generate_streams_the_text(model: Path) -> None:
    result = generate(model, "-n", "40", "--ignore-eos", "Hello,", "world")
    wanted = expected(model, [{"role": "user", "content": "Hello, world"}])
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == wanted.text.rstrip("\n")
    assert "40 after a prompt of" in result.stderr
    assert "cut at --max-new-tokens 40" in result.stderr
    assert "tokens/s" in result.stderr


def test_generate_raw_and_system(model: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    texts = {
        generate(model, "-n", "40", "--ignore-eos", *options, "Hello").stdout.rstrip("\n"): prompt
        for options, prompt in (
            (("--raw",), "Hello"),
            (("--system", "Be brief."), chat),
            ((), chat[1:]),
        )
    }
    assert len(texts) == 3
    for text, prompt in texts.items():
        assert text == expected(model, prompt).text.rstrip("\n")


def test_generate_without_template_continues_the_prompt(base_model: Path) -> None:
    result = generate(base_model, "-n", "40", "--ignore-eos", "Hello")
    assert result.stdout.rstrip("\n") == expected(base_model, "Hello").text.rstrip("\n")


def test_stdin_is_the_prompt_less_one_line_end(model: Path) -> None:
    options = ("-n", "20", "--raw", "--ignore-eos", "--json")
    from_stdin = json.loads(generate(model, *options, "-", stdin="Grüße\r\n").stdout)
    assert from_stdin["token_ids"] == json.loads(generate(model, *options, "Grüße").stdout)["token_ids"]
    assert from_stdin["token_ids"] != json.loads(generate(model, *options, "Grüße\n").stdout)["token_ids"]


@pytest.mark.parametrize(
    ("options", "speculative"),
    [
        (["--draft", "none"], {"draft": "none"}),
        (["--draft", "ngram"], {"draft": "ngram"}),
        (
            ["--exit-layer", "2", "--num-draft-tokens", "3", "--verify", "reuse"],
            {"draft": "early-exit", "exit_layer": 2, "num_draft_tokens": 3, "verify": "reuse"},
        ),
        (["--draft", "both", "--min-confidence", "0.1"], {"draft": "both", "min_confidence": 0.1}),
    ],
)
def test_json(model: Path, options: list[str], speculative: dict[str, Any]) -> None:
    result = generate(model, "-n", "40", "--ignore-eos", "--raw", "--json", *options, "Hello")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    wanted = expected(model, "Hello", **speculative)
    assert found["text"] == wanted.text
    assert found["token_ids"] == wanted.token_ids
    assert found["origins"] == [token.origin for token in wanted.tokens]
    assert found["finish_reason"] == "length"
    assert found["stats"]["num_accepted_tokens_per_pos"] == wanted.stats.num_accepted_tokens_per_pos
    assert found["stats"]["mean_acceptance_length"] == wanted.stats.mean_acceptance_length
    assert speculative.items() <= found["settings"]["speculative"].items()
    assert found["settings"]["sampling"]["max_new_tokens"] == 40
    assert found["settings"]["backend"] == "torch"
    assert found["model"]["name"] == str(model)
    assert found["model"]["num_hidden_layers"] == 3


def test_sampling_options_reach_the_sampler(model: Path) -> None:
    def sample(*options: str) -> str:
        return str(
            json.loads(generate(model, "-n", "30", "--raw", "--ignore-eos", "--json", *options, "Hi").stdout)["text"]
        )

    hot = ("--temperature", "1.5")
    assert sample(*hot, "--seed", "1") == sample(*hot, "--seed", "1") != sample(*hot, "--seed", "2")
    greedy = sample()
    assert sample(*hot, "--top-k", "1") == greedy
    assert sample(*hot, "--top-p", "0.000001") == greedy
    assert sample(*hot, "--min-p", "1") == greedy
    for penalty in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert sample(penalty, "5") != greedy
    stop = greedy[10:14]
    assert sample("--stop", stop) == greedy[: greedy.index(stop)]


def test_terminal_colours(model: Path) -> None:
    options = ("-n", "200", "--ignore-eos", "--raw", "Hello")
    plain = generate(model, *options)
    coloured = generate(model, *options, FORCE_COLOR="1", TERM="xterm", COLUMNS="40")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", coloured.stdout)
    visible = "".join(c for c in plain.stdout if c == "\n" or c.isprintable())
    assert "".join(c for c in shown if c == "\n" or c.isprintable()) == visible  # nothing wrapped, nothing lost
    assert "\x1b[36m" in coloured.stdout  # an accepted n-gram draft
    assert "\x1b[" not in plain.stdout


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the fifth piece of every stream."""
    stream = LLM.stream

    def interrupt(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(stream(*arguments), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupt)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_leaves_valid_json(model: Path) -> None:
    result = generate(model, "--ignore-eos", "--raw", "--json", "Hello")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert found["finish_reason"] == "abort"
    assert len(found["token_ids"]) == 5
    assert found["stats"]["num_tokens"] >= 5


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_keeps_text_and_statistics(model: Path) -> None:
    result = generate(model, "--ignore-eos", "--raw", "Hello")
    assert result.exit_code == 130
    assert result.stdout.strip()
    assert "stopped by Ctrl-C" in result.stderr
    assert result.stderr.count("Traceback") == 0


def test_help_names_all_choices() -> None:
    text = run("generate", "--help", COLUMNS="300").stdout
    for choices in (DType, Quantize, BackendName, DraftChoice, VerifyMode):
        for choice in get_args(choices):
            assert choice in text


@pytest.mark.parametrize("arguments", [["--version"], ["generate", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    code = (
        "import sys; from hopskip.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    started = subprocess_arguments()
    subprocess.run([sys.executable, "-c", code, *arguments], env=started["env"], check=True, capture_output=True)


def test_groups_of_options() -> None:
    """What is not given is as declared, or as the command has it; what is given has the type of the field."""
    found: list[tuple[LoadConfig, SpeculativeConfig, SamplingParams]] = []

    @with_options
    def command(
        *,
        load: LoadGroup,
        draft: DraftGroup,
        params: Annotated[SamplingParams, Group("Sampling", {"max_new_tokens": 1024})],
    ) -> None:
        found.append((load, draft, params))

    one = Typer()
    one.command()(command)
    drafting = ["--skip-layers", "11+10", "--min-confidence", "0.5"]
    for arguments in ([], ["-m", "x", "--threads", "2", *drafting, "--stop", "a", "--stop", "b", "--ignore-eos"]):
        result = CliRunner().invoke(one, arguments)
        assert result.exit_code == 0, result.output
    assert found == [
        (LoadConfig(), SpeculativeConfig(), SamplingParams(max_new_tokens=1024)),
        (
            LoadConfig(model="x", threads=2),
            SpeculativeConfig(skip_layers=(10, 11), min_confidence=0.5),
            SamplingParams(max_new_tokens=1024, stop=("a", "b"), ignore_eos=True),
        ),
    ]


def test_preparing_is_shown_as_loading_is(model: Path) -> None:
    """Draft auto measures costs, which takes a second, where they are not remembered."""
    options = ("-n", "2", "--raw", "--draft", "auto", "Hello")
    shown = generate(model, *options, FORCE_COLOR="1", TERM="xterm", COLUMNS="200").stderr
    assert f"Loading {model}" in shown
    assert "Measuring costs" in shown
    quiet = generate(model, *options).stderr
    assert "Measuring" not in quiet


# -- a real process ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that can go on for long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("long")
    write_checkpoint(folder, "llama2-mha", tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200_000}))
    return folder


def test_ctrl_c_ends_cleanly(long_model: Path) -> None:
    options: list[str | Path] = ["-m", long_model, "--backend", "torch", "-n", "150000", "--ignore-eos"]
    process = subprocess.Popen(
        **subprocess_arguments("generate", *options, "--draft", "ngram", "Hello"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=take_interrupts,
    )
    assert process.stdout is not None
    try:
        first = os.read(process.stdout.fileno(), 1)
        assert first  # it has begun
        process.send_signal(signal.SIGINT)
        rest, error = (bytes(part) for part in process.communicate(timeout=300))
    finally:
        process.kill()
    assert process.returncode == 130, error.decode()
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in error
    assert b"stopped by Ctrl-C" in error
    assert b"tokens/s" in error


def test_error_of_a_real_process() -> None:
    done = subprocess.run(
        **subprocess_arguments("generate", "--quiet", "-m", "/no/such/model", "Hi"), capture_output=True
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"hopskip: error: model '/no/such/model' does not exist")
    assert done.stderr.count(b"\n") == 1


def test_chat_in_a_terminal(long_model: Path) -> None:
    """Ctrl-C stops the answer and keeps the chat; Ctrl-D ends it."""
    controller, terminal = pty.openpty()
    options: list[str | Path] = ["-m", long_model, "--backend", "torch", "-n", "150000", "--ignore-eos"]
    arguments = subprocess_arguments("chat", *options)
    arguments["env"] |= {"TERM": "dumb"}
    process = subprocess.Popen(
        **arguments, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(terminal)

    seen = b""

    def wait_for(pattern: bytes) -> None:
        """Read until the pattern comes, and no further than its end."""
        nonlocal seen
        deadline = time.monotonic() + 300
        while (found := re.search(pattern, seen)) is None:
            ready, _, _ = select.select([controller], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {seen!r}"
            seen += os.read(controller, 4096)
        seen = seen[found.end() :]

    try:
        wait_for(rb"> ")
        os.write(controller, b"Hello\n")
        wait_for(rb"Hello\r\n.")  # the answer has begun
        os.write(controller, b"\x03")
        wait_for(rb"stopped by Ctrl-C")
        wait_for(rb"> ")
        os.write(controller, b"/help\n")
        wait_for(rb"Ctrl-C +stops an answer")
        wait_for(rb"> ")
        os.write(controller, b"\x04")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def take_interrupts() -> None:
    """A shell starts what it runs in the background with Ctrl-C ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def own_terminal() -> None:
    import fcntl
    import termios

    take_interrupts()

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# -- chat --------------------------------------------------------------------------------------------------------------


def chat(model: Path, lines: list[str], *options: str | Path) -> Result:
    stdin = "".join(f"{line}\n" for line in lines)
    return run("chat", "-m", model, "--backend", "torch", "--ignore-eos", *options, stdin=stdin)


def cached(result: Result) -> list[tuple[int, int]]:
    """Prompt tokens of each turn, and how many of them were cached."""
    return [(int(n), int(c)) for n, c in re.findall(r"prompt (\d+), (\d+) of it cached", result.stderr)]


def test_chat_remembers_and_reuses_the_prefix(model: Path) -> None:
    result = chat(model, ["Hello", "", "And now?"], "-n", "20")
    assert result.exit_code == 0
    (first, first_cached), (second, second_cached) = cached(result)
    assert first_cached == 0
    assert first <= second_cached < second
    assert second > first + 20  # the first answer is part of the second prompt


def test_chat_reset_starts_anew(model: Path) -> None:
    result = chat(model, ["Hello", "/reset", "Hello"], "-n", "20", "--system", "Be brief.")
    (first, _), (second, _) = cached(result)
    assert first == second
    assert "a new chat" in result.stderr


def test_chat_commands(model: Path) -> None:
    result = chat(model, ["/help", "/nonsense now", "/exit", "Hello"], "-n", "20")
    assert result.exit_code == 0
    assert "/clear               start a new chat" in result.stderr
    assert "no command /nonsense; " in result.stderr
    assert cached(result) == []  # /exit ends before the last line
    assert result.stdout == ""


def test_chat_says_when_the_context_is_full(model: Path) -> None:
    result = chat(model, ["Hello", "And now?", "/clear", "Hello"], "-n", "2000")
    assert result.exit_code == 0
    assert result.stderr.count("[cut: the context of 1024 tokens is full; 1001 tokens; ") == 2
    assert result.stderr.count('the oldest exchange is dropped, from "Hello"]') == 1  # "And now?" had no room beside it
    assert len(cached(result)) == 3
    assert cached(result)[0][0] == cached(result)[2][0]


def test_chat_says_when_an_answer_is_cut(model: Path) -> None:
    assert "cut at --max-new-tokens 5" in chat(model, ["Hello"], "-n", "5").stderr


# -- info --------------------------------------------------------------------------------------------------------------


def test_info(model: Path) -> None:
    result = run("info", model, "--backend", "torch", "--dtype", "bfloat16", COLUMNS="120")
    assert result.exit_code == 0
    for text in (str(model)[:40], "3 layers", "torch, cpu", "bfloat16", "exit layer", "speed-up", "context 1,024"):
        assert text in result.stdout


def test_info_json(model: Path) -> None:
    found = json.loads(run("info", "-m", model, "--backend", "torch", "--json").stdout)
    assert found["config"]["num_hidden_layers"] == 3
    assert found["exit_layer"] == 1
    assert not found["is_exit_layer_recommended"]
    assert [row["exit_layer"] for row in found["exits"]] == [1, 2]
    h = found["head_in_layers"]
    for row in found["exits"]:
        assert row["draft_step_cost"] == pytest.approx((row["exit_layer"] + h) / (3 + h))
        speedups = [gain["speedup"] for gain in row["expected"]]
        assert speedups == sorted(speedups)
        assert all((gain["num_draft_tokens"] == 0) == (gain["speedup"] == 1) for gain in row["expected"])
    assert found["memory"]["weight_bytes"] == 4 * found["num_parameters"]


def test_info_shows_the_recommended_exit(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recommended"
    write_checkpoint(folder, "llama2-mha")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hopskip": {"exit_layer": 2, "num_draft_tokens": 5}}))
    text = run("info", folder, "--backend", "torch", COLUMNS="120").stdout
    assert "2 (recommended by the model's makers)" in text
    assert "early-exit, up to 5 tokens" in text


@pytest.mark.skipif(isa.obstacle() is not None, reason="needs the native extension")
def test_info_names_the_instruction_set(model: Path) -> None:
    assert json.loads(run("info", model, "--json").stdout)["isa"] == isa.choose_isa()
