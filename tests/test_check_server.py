"""`hopskip check --against URL`: it passes where texts are equal, and says where and how far they part."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hopskip.bench.load_test import Target
from hopskip.bench.same_texts import Comparison, Parting, common_length, compare, gap_at
from hopskip.cli import app
from hopskip.errors import ConfigError
from hopskip.prompts import Prompt, mixed_prompts
from tests.serving import MODEL, Live, live_server, tiny_llm

PROMPTS = [Prompt("set", str(number), f"say {number}") for number in range(4)]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tiny_llm(tmp_path_factory.mktemp("model"))) as live:
        yield live


class Scripted:
    """A server that writes what it is told to: for each prompt a text of words, by what the request says."""

    def __init__(self, **texts: str) -> None:
        self.texts = texts
        """`drafted`, `plain`, `again` (of the second time that the same is asked plainly), each of prompt 1; whoever is
        not named writes as `plain`. Other prompts get the same from all."""
        self.requests: list[dict[str, Any]] = []
        self.has_logprobs = True

    def answer(self, body: dict[str, Any]) -> dict[str, Any] | str:
        self.requests.append(body)
        if body.get("logprobs") and not self.has_logprobs:
            return "no logprobs here"
        prompt = body["messages"][0]["content"]
        text, finish = "one two three", "stop"
        if prompt == "say 1":
            is_plain = body.get("off") is True
            asked = sum(r["messages"] == body["messages"] and r.get("off") is True for r in self.requests)
            which = ("again" if asked == 2 and "again" in self.texts else "plain") if is_plain else "drafted"
            text = self.texts.get(which, self.texts["plain"])
            text, _, finish = text.partition("|")
        choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": finish or "stop"}
        if body.get("logprobs"):
            pieces = [piece if i == 0 else f" {piece}" for i, piece in enumerate(text.split(" "))]
            choice["logprobs"] = {
                "content": [
                    {
                        "token": piece,
                        "logprob": -1.0,
                        "bytes": list(piece.encode()),
                        "top_logprobs": [
                            {"token": piece, "logprob": -1.0, "bytes": list(piece.encode())},
                            {"token": " f", "logprob": -1.5, "bytes": list(b" f")},
                            {"token": " fi", "logprob": -1.25, "bytes": list(b" fi")},
                            {"token": " six", "logprob": -1.0, "bytes": list(b" six")},
                        ],
                    }
                    for piece in pieces
                ]
            }
        return {"choices": [choice]}


@contextmanager
def serving(script: Scripted) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            answer = script.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(answer, str):
                self.reply(400, {"error": {"message": answer}})
            else:
                self.reply(200, answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def parting(position: int, expected: str, got: str, token: int | None, gap: float | None = None) -> Parting:
    return Parting(prompt="set/1", position=position, expected=expected, got=got, token=token, gap=gap)


def compared(url: str, **options: Any) -> Comparison:
    target = Target(url=url, max_tokens=5)
    return asyncio.run(compare(target, PROMPTS, reference=replace(target, extra={"off": True}), **options))


# -- ours --------------------------------------------------------------------------------------------------------------


def test_hopskips_own_server_passes(live: Live, tmp_path: Path) -> None:
    """Its speculation is turned off by a field of the request that it is known to have."""
    badge = tmp_path / "badge.json"
    arguments = ["check", "--against", f"{live.url}/v1", "--num-prompts", "3", "--max-tokens", "6", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--badge", str(badge), "--concurrency", "2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert (found["model"], found["num_prompts"], found["max_tokens"], found["concurrency"]) == (MODEL, 3, 6, 2)
    assert found["partings"] == found["own_partings"] == []
    assert found["summary"] == "3 of 3 texts equal"
    assert json.loads(badge.read_text()) == {
        "schemaVersion": 1,
        "label": "lossless speculation",
        "message": "3 of 3 texts equal",
        "color": "brightgreen",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"badge.json"}


def test_what_is_asked_of_it(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with speculation, twice without; as many prompts and tokens as are said to be the usual number."""
    bodies: list[dict[str, Any]] = []
    planner = live.server.planner
    real = planner.chat

    async def chat(request: Any) -> Any:
        bodies.append(request.model_dump(exclude_unset=True))
        request.max_tokens = 1
        return await real(request)

    monkeypatch.setattr(planner, "chat", chat)
    result = CliRunner().invoke(app, ["check", "--against", live.url], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{MODEL} at {live.url}, with and without speculation: 20 of 20 texts equal",
        "passed",
    ]
    switches = [body.get("speculative", {}).get("enabled") for body in bodies]
    assert switches == [False] * 20 + [None] * 20 + [False] * 20
    expected = [p.content if isinstance(p.content, str) else p.content[0]["content"] for p in mixed_prompts(20)]
    assert [body["messages"][0]["content"] for body in bodies[20:40]] == expected
    assert {(body["max_tokens"], body["temperature"], body["model"]) for body in bodies} == {(64, 0, MODEL)}


# -- texts that part ---------------------------------------------------------------------------------------------------


def test_where_texts_part() -> None:
    script = Scripted(plain="one two three four", drafted="one two five")
    with serving(script) as url:
        seen: list[tuple[str, float]] = []
        found = compared(url, on_progress=lambda what, share: seen.append((what, share)))
        tied = compared(url, max_gap=0.25)
        just_not = compared(url, max_gap=0.2499)
    assert not found.passed
    assert found.summary == "3 of 4 texts equal"
    assert found.badge()["color"] == "red"
    assert found.partings == (parting(8, "three four", "five", 2, 0.25),)
    assert found.own_partings == ()
    assert (tied.passed, tied.summary) == (True, "3 of 4 texts equal, 1 tied")
    assert not just_not.passed
    assert seen[0] == ("asking without speculation", 0.0)
    assert seen[-1] == ("asking without again", 1.0)
    assert [share for _, share in seen] == sorted(share for _, share in seen)


@pytest.mark.parametrize(
    ("texts", "has_logprobs", "expected"),
    [
        # the reference knows no such token among its best
        ({"plain": "one two", "drafted": "one nine"}, True, parting(4, "two", "nine", 1)),
        # one text ends earlier
        ({"plain": "one two", "drafted": "one"}, True, parting(3, " two", "(stop)", 1)),
        ({"plain": "one", "drafted": "one two|length"}, True, parting(3, "(stop)", " two", 1)),
        # the same text for another reason
        ({"plain": "one", "drafted": "one|length"}, True, parting(3, "(stop)", "(length)", 1)),
        ({"plain": "one two", "drafted": "one five"}, False, parting(4, "two", "five", None)),
        # asked again, the reference writes another text than the one that was compared
        ({"plain": "one two", "drafted": "one five", "again": "one six"}, True, parting(4, "two", "five", 1, 0.25)),
    ],
)
def test_kinds_of_partings(texts: dict[str, str], has_logprobs: bool, expected: Parting) -> None:
    script = Scripted(**texts)
    script.has_logprobs = has_logprobs
    with serving(script) as url:
        found = compared(url, max_gap=0.2)
    assert found.partings == (expected,)
    assert not found.passed
    assert len(found.own_partings) == ("again" in texts)
    assert all((own.token, own.gap) == (1, 0.0) for own in found.own_partings)
    assert {r["top_logprobs"] for r in script.requests if "logprobs" in r} == {20}, "as many as the API gives"


def test_one_way_to_decode_plainly(live: Live) -> None:
    with serving(Scripted(plain="one two", drafted="one five")) as url:
        arguments = ["check", "--against", url, "--without", '{"off": true}', "--num-prompts", "2"]
        result = CliRunner().invoke(app, arguments)
        both = CliRunner().invoke(app, [*arguments, "--reference", live.url])
    assert result.exit_code == 0, "it answers the package's prompts alike"
    assert both.exit_code == 2
    assert "leave one out" in both.output


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join('{"prompt": "say 1"}' for _ in range(12)))
    plain, drafted = Scripted(plain="one two"), Scripted(plain="one five")
    with serving(plain) as reference, serving(drafted) as url:
        arguments = ["check", "--against", url, "--reference", reference, "--prompts", str(prompts)]
        result = CliRunner().invoke(app, arguments)
        tied = CliRunner().invoke(app, [*arguments, "--max-gap", "0.3", "--served-model-name", "mine"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"scripted at {url}, with and without speculation: 0 of 12 texts equal"
    assert lines[1].endswith(" parts after 4 characters, at token 1: 'two', with speculation 'five'; gap 0.25")
    assert lines[11:] == ["  and 2 more (--json has all)", "failed"]
    assert tied.exit_code == 0
    assert tied.stdout.splitlines()[0].endswith("0 of 12 texts equal, 12 tied")
    assert {body["model"] for body in drafted.requests[12:]} == {"mine"}
    assert len(plain.requests) == 2 * (2 * 12 + 12)  # twice all of them, and each that parts once more


def test_a_reference_that_does_not_repeat_itself_is_told() -> None:
    with serving(Scripted(plain="one two", again="one six")) as url:
        found = compared(url)
        assert found.passed
        assert [p.got for p in found.own_partings] == ["six"]


def test_prefixes_and_bytes() -> None:
    assert common_length("", "a") == 0
    assert common_length("ab", "abc") == common_length("abc", "ab") == 2
    euro = "€".encode()
    tokens: list[dict[str, Any]] = [
        {"token": "\ufffd", "bytes": list(euro[:2]), "logprob": -1.0},
        {"token": "\ufffd", "bytes": list(euro[2:]), "logprob": -1.0},
        {"token": "x", "bytes": [120], "logprob": -1.0, "top_logprobs": [{"token": "y", "logprob": -3.0}]},
    ]
    assert gap_at(tokens, 1, "€y") == (2, 2.0)
    assert gap_at([], 0, "y") == (None, None)
    assert gap_at(tokens, 7, "€xabcdefg") == (None, None)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "localhost:8000"], "give 'transformers', or the URL of a server, with http:// before it"),
        (["--against", "http://127.0.0.1:9"], "no OpenAI server lists its models there"),
        (["--against", "http://127.0.0.1:9", "--precision", "q8"], "--precision has no effect on a server"),
        (["--against", "http://127.0.0.1:9", "--model", "x"], "--model has no effect on a server"),
        (["--against", "http://127.0.0.1:9", "--concurrency", "0"], "--concurrency is 0; it must be at least 1"),
        (["--against", "http://127.0.0.1:9", "--max-gap", "-1"], "--max-gap is -1; it must not be negative"),
        (["--against", "http://127.0.0.1:9", "--reference", "x"], "--reference is 'x'; give the URL"),
        (["--against", "http://127.0.0.1:9", "--without", "{}"], "give a JSON object such as"),
        (["--against", "http://127.0.0.1:9", "--without", "off"], "--without is 'off'; give a JSON object"),
        (["--against", "http://127.0.0.1:9", "--max-tokens", "1"], "a proof needs at least 2"),
        (["--badge", "x.json"], "--badge has no effect without --against URL; leave it out"),
        (["--concurrency", "2", "--against", "transformers"], "--concurrency has no effect without --against URL"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_a_model_of_the_environment_is_no_wish(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_MODEL", "elsewhere")
    arguments = ["check", "--against", live.url, "--num-prompts", "1", "--max-tokens", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_other_servers_must_say_how_to_decode_plainly() -> None:
    with serving(Scripted(plain="x")) as url, pytest.raises(ConfigError, match=r"not hopskip's server.*--without"):
        asyncio.run(compare(Target(url=url), PROMPTS))


def test_answers_that_cannot_be_read(tmp_path: Path) -> None:
    script = Scripted(plain="x")
    with serving(script) as url:
        script.answer = lambda body: "too long"  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match=r"^http://\S+ refuses a request with status 400: too long$"):
            compared(url)
        script.answer = lambda body: {"choices": []}  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="gives no answer to a chat that can be read"):
            compared(url)
    with serving(Scripted(plain="one")) as url:
        arguments = ["check", "--against", url, "--without", '{"off": 1}', "--num-prompts", "1"]
        result = CliRunner().invoke(app, [*arguments, "--badge", str(tmp_path)])
        assert result.exit_code == 2
        assert "cannot be written" in result.output
