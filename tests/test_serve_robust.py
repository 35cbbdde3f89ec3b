"""A server among clients that leave, lie, flood and break off; an engine that fails; signals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
import pytest
from benchmarks.hostile import GOOD, attack
from benchmarks.soak import soak

from hopskip import LLM, ConfigError
from hopskip.serve import app
from hopskip.serve.guard import JSONLines
from hopskip.serve.memory import free_memory, parse_size
from hopskip.serve.settings import Limits, ServeSettings
from hopskip.text.grammar import GrammarConstraint
from tests.serving import MODEL, Brake, Live, live_server, tiny_llm

LONG = {"prompt": "ab", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "ab", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def llm(folder: Path) -> LLM:
    return tiny_llm(folder, max_num_seqs=4)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Live]:
    llm = tiny_llm(folder)
    llm.engine.reserve(2**28)
    with live_server(llm) as live:
        yield live


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def is_idle(live: Live) -> bool:
    return not live.server.engine.num_outstanding and not live.server.llm.engine.has_work


# -- who may ask what --------------------------------------------------------------------------------------------------


def test_every_route_but_health_wants_a_key(llm: LLM) -> None:
    key = "correct-horse"
    with live_server(llm, api_keys=("another-key", key)) as live, live.client() as client:
        routes = ["/", "/page/page.js", "/page/page.css", "/metrics", "/v1/models", "/openapi.json", "/no/such/route"]
        basic = b64encode(f"me:{key}".encode()).decode()
        wrong = ["", "Bearer", "Bearer wrong-key", f"Bearer {key}x", f"Basic {key}", "Basic !!!", f"Token {key}"]
        for route in routes:
            for given in wrong:
                answer = client.get(route, headers={"authorization": given} if given else {})
                assert answer.status_code == 401, (route, given)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert key not in answer.text
        assert client.post("/v1/completions", json=SHORT).status_code == 401
        assert client.get("/health").status_code == client.get("/health/live").status_code == 200
        for fine in (f"Bearer {key}", f"bearer {key}", f"Basic {basic}", "Bearer another-key"):
            assert client.get("/v1/models", headers={"authorization": fine}).status_code == 200
    assert key not in repr(ServeSettings(model_name="x", api_keys=(key,)))
    with pytest.raises(ConfigError, match="fewer than 8"):
        ServeSettings(model_name="x", api_keys=("short",))


def test_other_hosts_origins_and_content_types_are_refused(llm: LLM) -> None:
    settings: dict[str, Any] = {
        "allowed_hosts": ("127.0.0.1", "localhost"),
        "cors_origins": ("https://good.example",),
    }
    with live_server(llm, **settings) as live, live.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example:80"}).status_code == 421
        assert client.get("/v1/models", headers={"host": "localhost:99"}).status_code == 200
        text = {"content-type": "text/plain"}
        assert client.post("/v1/completions", content=json.dumps(SHORT), headers=text).status_code == 400
        for origin, allowed in (("https://good.example", "https://good.example"), ("https://evil.example", None)):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            answer = client.options("/v1/completions", headers=headers)
            assert answer.headers.get("access-control-allow-origin") == allowed
    with live_server(llm) as live, live.client() as client:
        answer = client.get("/v1/models", headers={"origin": "https://good.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_may_run_its_own_scripts_and_nothing_else(shared: Live) -> None:
    types = {".css": "text/css", ".js": "text/javascript"}
    with shared.client() as client:
        page = client.get("/")
        linked = re.findall(r"<(?:script|link)[^>]* (?:src|href)=\"(page/[^\"]+)\"", page.text)
        assert len(linked) == 3
        answers = [page]
        while linked:  # and what these import
            name = linked.pop()
            answers.append(client.get(f"/{name}"))
            assert answers[-1].status_code == 200, name
            assert answers[-1].headers["content-type"].partition(";")[0] == types[Path(name).suffix]
            imports = re.findall(r"^(?:import|\}) .*from \"\./([\w.-]+)\";$", answers[-1].text, flags=re.MULTILINE)
            linked += [f"page/{name}" for name in imports if f"/page/{name}" not in {a.url.path for a in answers}]
        for name in ("index.html", "no.js", "../app.py", "..%2Fapp.py", "%2Fetc%2Fpasswd"):
            assert client.get(f"/page/{name}").status_code == 404, name
    folder = Path(app.__file__).parent / "page"
    assert {a.url.path for a in answers} == {"/", *(f"/page/{f.name}" for f in folder.iterdir() if f.suffix in types)}
    for answer in answers:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "data:"
        assert policy.pop("require-trusted-types-for") == "'script'"
        assert policy.pop("script-src") == policy.pop("style-src") == policy.pop("connect-src") == "'self'"
        names = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
        assert policy == dict.fromkeys(names, "'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert not re.search(r"(src|href)=\"https?:", answer.text), "it works offline"
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"<style|<script>| style=| on[a-z]+=", page.text), "the policy would not let it in"


def test_large_requests_are_refused(llm: LLM) -> None:
    with live_server(llm, limits=Limits(body_bytes=2000)) as live, live.client() as client:
        big = json.dumps({"prompt": "a" * 3000}).encode()
        assert client.post("/v1/completions", content=big).status_code == 413
        chunks = (big[i : i + 100] for i in range(0, len(big), 100))  # without a content-length
        assert client.post("/v1/completions", content=chunks).status_code == 413
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("limits", "start", "answer"),
    [
        (
            Limits(body_seconds=0.2),
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
            b"HTTP/1.1 408",
        ),
        (Limits(header_seconds=0.2), b"POST /tokenize HTTP/1.1\r\nHost: x\r\n", b""),
    ],
    ids=["body", "headers"],
)
def test_late_requests_are_dropped(llm: LLM, limits: Limits, start: bytes, answer: bytes) -> None:
    with live_server(llm, limits=limits) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(start)
            assert connection.recv(len(answer) or 100) == answer


def test_errors_tell_nothing_of_the_inside(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with live_server(llm) as live, live.client() as client:

        async def fail(*_: object, **__: object) -> None:
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(live.server.planner, "completion", fail)
        answer = client.post("/v1/completions", json=SHORT)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


def test_logs_are_json_lines(shared: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="hopskip.serve"), shared.client() as client:
        client.post("/v1/completions", json=SHORT, headers={"x-request-id": "look-for-me"})
        until(lambda: any(getattr(r, "fields", {}).get("client_request_id") == "look-for-me" for r in caplog.records))
    record = next(r for r in caplog.records if getattr(r, "fields", {}).get("client_request_id") == "look-for-me")
    line = json.loads(JSONLines().format(record))
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["seconds"] > 0


# -- clients that leave, and that flood --------------------------------------------------------------------------------


def leave_early(live: Live, **body: Any) -> None:
    """Ask a braked server for 900 tokens, and close the connection once it is at work on them."""
    before = live.server.engine.num_outstanding
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps({**LONG, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        until(lambda: live.server.engine.num_outstanding > before)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(llm: LLM, stream: bool) -> None:
    Brake(llm.engine)  # never released: only a cancelled request can end
    with live_server(llm) as live:
        for _ in range(2):
            leave_early(live, n=4, stream=stream)
            until(lambda: is_idle(live))
        # one that waits for a row is let go as well
        with live.client() as client, client.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}):
            leave_early(live, stream=stream)
            until(lambda: live.server.engine.num_outstanding == 4)
        until(lambda: is_idle(live))


def test_a_full_queue_refuses(llm: LLM) -> None:
    Brake(llm.engine)
    with live_server(llm, max_queue=2) as live, live.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "n": 6, "stream": True}):
            refused = client.post("/v1/completions", json=SHORT)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert refused.headers["retry-after"]
        until(lambda: is_idle(live))
        assert client.post("/v1/completions", json=SHORT).status_code == 200  # too short to be braked


def test_hostile_requests(shared: Live) -> None:
    """The short form of benchmarks/hostile.py."""
    with shared.client() as client:
        before = client.post("/v1/chat/completions", json=GOOD).json()["choices"]
        answers = attack(shared.url, 150)
        assert not any(status.startswith("5") for status in answers), answers
        assert answers["400"] > 30
        assert client.post("/v1/chat/completions", json=GOOD).json()["choices"] == before
    until(lambda: is_idle(shared))


def test_soak(shared: Live) -> None:
    """The short form of benchmarks/soak.py."""
    counts = asyncio.run(soak(shared.url, 5, num_clients=16, num_tokens=8, num_texts=2))
    assert counts["wrong"] == counts["failed"] == 0, counts
    assert min(counts[kind] for kind in ("whole", "streamed", "cancelled", "dropped")) > 0, counts
    until(lambda: is_idle(shared))
    assert shared.server.llm.engine.running == ()


# -- an engine that fails ----------------------------------------------------------------------------------------------


def in_one_step(live: Live, llm: LLM, bad: object, good: object) -> tuple[httpx.Response, httpx.Response]:
    """The answers to two requests of which the second to run joins the first: their next step is a common one."""
    brake = Brake(llm.engine)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, f"{live.url}/v1/completions", json=good, timeout=60)
        until(lambda: brake.is_holding)
        second = pool.submit(httpx.post, f"{live.url}/v1/completions", json=bad, timeout=60)
        until(lambda: llm.engine.num_waiting == 1)
        brake.release()
        return second.result(), first.result()


def test_a_request_that_breaks_its_step_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = llm.engine._rounds._draft

    def poisoned(sequences: Sequence[Any]) -> Any:
        if any(s.params.seed == 666 for s in sequences):
            raise RuntimeError("poison")
        return draft(list(sequences))

    with live_server(llm) as live, live.client() as client:
        good, bad = {**LONG, "max_tokens": 60}, {"prompt": "a", "seed": 666}
        expected = client.post("/v1/completions", json=good).json()["choices"]
        monkeypatch.setattr(llm.engine._rounds, "_draft", poisoned)
        failed, unharmed = in_one_step(live, llm, bad, good)
        assert failed.status_code == 500
        assert unharmed.json()["choices"] == expected
        for _ in range(4):
            refused = client.post("/v1/completions", json=bad)
            assert refused.status_code == 500
            assert "poison" not in refused.text
            assert client.post("/v1/completions", json=SHORT).status_code == 200
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "seed": 666, "stream": True}) as stream:
            assert '"type":"server_error"' in stream.read().decode()
        assert client.get("/health").status_code == 200


def test_a_request_whose_logits_are_no_numbers_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = llm.backend.embed
    innocent: set[int] = set()

    def watch(token_ids: Sequence[int]) -> Any:
        innocent.update(token_ids)
        return embed(token_ids)

    def damage(token_ids: Sequence[int]) -> Any:
        h_ND = embed(token_ids)
        h_ND[[row for row, token in enumerate(token_ids) if token == damaged]] = float("nan")
        return h_ND

    good = {**LONG, "max_tokens": 20}
    with live_server(llm) as live, live.client() as client:
        monkeypatch.setattr(llm.backend, "embed", watch)
        expected = client.post("/v1/completions", json=good).json()["choices"]
        letter = next(letter for letter in ascii_lowercase if innocent.isdisjoint(llm.tokenizer.encode(letter)))
        bad, damaged = {"prompt": letter, "max_tokens": 5}, llm.tokenizer.encode(letter)[-1]
        monkeypatch.setattr(llm.backend, "embed", damage)
        failed, unharmed = in_one_step(live, llm, bad, good)
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        assert unharmed.json()["choices"] == expected
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(llm.backend, "embed", embed)
        assert client.post("/v1/completions", json=bad).status_code == 200


def test_a_grammar_that_fails_on_the_way_is_the_clients_fault(shared: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: GrammarConstraint, token: int) -> None:
        raise ConfigError("the grammar has become too complex")

    monkeypatch.setattr(GrammarConstraint, "accept", fail)
    body = {**SHORT, "response_format": {"type": "regex", "pattern": "[a-z]+"}}
    with shared.client() as client:
        refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, "the grammar has become too complex")
        assert "too complex" in client.post("/v1/completions", json={**body, "stream": True}).text
        assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_a_dead_engine_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(only: object = None) -> None:
        raise MemoryError

    monkeypatch.setattr(llm.engine, "step", fail)
    with live_server(llm) as live, live.client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 503
        assert client.get("/health").status_code == client.get("/health/live").status_code == 503
        assert client.get("/health").json() == {"status": "dead"}
        assert client.post("/v1/completions", json=SHORT).status_code == 503
    with live_server(llm, exit_when_dead=True) as live, live.client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 503
        live.thread.join(60)
        assert not live.thread.is_alive()
        assert live.runner.exit_code == 1


# -- the way down ------------------------------------------------------------------------------------------------------


def test_the_first_signal_drains_and_the_second_aborts(llm: LLM) -> None:
    brake = Brake(llm.engine)
    with live_server(llm, shutdown_timeout=60) as live, live.client() as client:
        body = {**LONG, "max_tokens": 40, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            live.stop()
            until(lambda: httpx.get(f"{live.url}/health").status_code == 503)
            assert httpx.get(f"{live.url}/health").json() == {"status": "draining"}
            assert httpx.get(f"{live.url}/health/live").status_code == 200
            assert httpx.post(f"{live.url}/v1/completions", json=SHORT).status_code == 503
            brake.release()
            text = stream.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
        live.thread.join(60)
        assert live.runner.exit_code == 0
    Brake(llm.engine)
    with live_server(llm, shutdown_timeout=60) as live, live.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            live.stop()
            live.stop()
            stream.read()
        live.thread.join(60)
        assert not live.thread.is_alive()
        assert live.runner.exit_code == 1


def test_a_supervised_server_comes_back_after_kill_9(folder: Path) -> None:
    tiny_llm(folder)
    command = [sys.executable, "-m", "hopskip", "serve", "--restart", "--port", "0", "-m", str(folder)]
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1"}
    supervisor = subprocess.Popen(
        [*command, "--backend", "torch", "--threads", "1", "--max-num-seqs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert supervisor.stdout is not None
    try:
        match = re.search(r"at (http://\S+) .*draft auto", supervisor.stdout.readline())
        assert match is not None
        url = match[1]
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        if not children.exists():
            pytest.skip("finding the worker needs Linux's /proc")
        # the socket is there before the model: who asks waits
        until(lambda: httpx.get(f"{url}/health", timeout=120).status_code == 200, 120)
        worker = int(children.read_text().split()[0])
        with httpx.Client(base_url=url, timeout=120) as client:
            # 16 answers of 900 tokens, two at a time: not over before the signal, however fast the machine
            with client.stream("POST", "/v1/completions", json={**LONG, "n": 16, "stream": True}) as stream:
                chunks = stream.iter_raw()
                next(chunks)
                os.kill(worker, signal.SIGKILL)
                with pytest.raises(httpx.TransportError):  # an error, and not a hang
                    list(chunks)
            # the socket stays open: who comes now waits for the new worker
            assert client.post("/v1/completions", json=SHORT).status_code == 200
        assert int(children.read_text().split()[0]) != worker
        supervisor.terminate()
        assert supervisor.wait(60) == 0
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()


# -- smaller things ----------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert [parse_size(s) for s in ("1024", "2KiB", "1.5 GiB", "3mb")] == [1024, 2048, 1610612736, 3_000_000]
    for wrong in ("", "x", "-1", "0", "1TB", "1e9", "99999999999999999999"):
        with pytest.raises(ConfigError, match="kv-memory is"):
            parse_size(wrong)
    assert 2**20 < free_memory() < 2**50


def test_the_model_is_called_by_its_own_name(shared: Live) -> None:
    with shared.client() as client:
        assert client.get(f"/v1/models/{MODEL}").json()["max_model_len"] == 1024
        assert client.get("/v1/models/other").status_code == 404
