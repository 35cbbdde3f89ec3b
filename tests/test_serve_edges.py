"""Connections that keep others away, pages of other origins, names of requests, unix sockets, drains that cut."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI

from hopskip import LLM, ConfigError
from hopskip.cli.serve import ServerOptions
from hopskip.serve.guard import JSONLines
from hopskip.serve.protocol import Connections
from hopskip.serve.run import _allow_open_files, bind_unix
from hopskip.serve.settings import Limits, ServeSettings
from tests.serving import MODEL, Brake, Live, live_server, tiny_llm

SHORT = {"prompt": "ab", "max_tokens": 3, "temperature": 0}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def llm(folder: Path) -> LLM:
    return tiny_llm(folder, max_num_seqs=4)


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with live_server(tiny_llm(folder)) as live:
        yield live


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read_answer(connection: socket.socket) -> bytes:
    """One whole answer, of a known length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(4096)
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    while len(body) < int(found[1]):
        body += connection.recv(4096)
    return head + b"\r\n\r\n" + body


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


# -- slow and many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_every_request_of_a_connection_has_its_time_for_headers(llm: LLM, num_before: int) -> None:
    with live_server(llm, limits=Limits(header_seconds=0.3)) as live, connect(live) as connection:
        for _ in range(num_before):
            connection.sendall(HEALTH)
            assert read_answer(connection).startswith(b"HTTP/1.1 200")
        ended = threading.Event()

        def trickle() -> None:
            for byte in HEALTH * 100:  # never a whole head in its time
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return
                if ended.wait(0.05):
                    return

        sending = threading.Thread(target=trickle)
        sending.start()
        try:
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        finally:
            ended.set()
            sending.join()


def test_a_long_answer_is_no_slow_request(llm: LLM) -> None:
    brake = Brake(llm.engine)
    with live_server(llm, limits=Limits(header_seconds=0.2)) as live, live.client() as client:
        with client.stream("POST", "/v1/completions", json={**SHORT, "max_tokens": 40, "stream": True}) as stream:
            chunks = stream.iter_text()
            next(chunks)
            time.sleep(0.5)
            brake.release()
            assert "".join(chunks).endswith("data: [DONE]\n\n")
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("setting", "message"), [
    ("max_connections", "2 connections are open; at most 2 may be; try again later"),
    ("max_connections_per_address", "2 connections of your address are open; at most 2 may be; try again later"),
])  # fmt: skip
def test_connections_beyond_the_cap_are_told_so(llm: LLM, setting: str, message: str) -> None:
    with live_server(llm, **{setting: 2}) as live:
        with connect(live) as first, connect(live) as second:
            for connection in (first, second):
                connection.sendall(HEALTH)
                assert read_answer(connection).startswith(b"HTTP/1.1 200")
            with connect(live) as third:
                answer = read_answer(third)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nretry-after: 1\r\n" in answer
                error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
                assert (error["message"], error["code"]) == (message, "too_many_connections")
                assert third.recv(1) == b""
            first.sendall(HEALTH)
            assert read_answer(first).startswith(b"HTTP/1.1 200")
        counted = live.runner.connections
        until(lambda: len(counted) == 0)
        with live.client() as client:
            assert client.get("/health").status_code == 200
            assert len(counted) == 1


def test_connections_are_counted_by_address() -> None:
    connections = Connections(4, 2)
    assert [connections.enter(address) for address in ("a", "a", "b", None)] == [""] * 4
    assert connections.enter(None).startswith("4 connections are open")
    connections.leave("b")
    assert connections.enter("a").startswith("2 connections of your address")
    connections.leave("a")
    assert len(connections) == 2
    assert [connections.enter("a"), connections.enter(None)] == ["", ""]


def test_caps_have_defaults_and_bounds() -> None:
    settings = ServeSettings(model_name="x")
    assert (settings.max_connections, settings.max_connections_per_address) == (1024, 256)
    for name in ("max_connections", "max_connections_per_address"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
            ServeSettings(model_name="x", **{name: 0})  # type: ignore[arg-type]


def test_files_may_be_open_as_many_as_connections() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 10, before[1]))
        _allow_open_files(before[0] - 20)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[0] - 10
        _allow_open_files(before[0] - 5)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[0] - 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("size", [20_000, 70_000])
def test_large_headers_are_refused_in_one_read_too(live: Live, size: int) -> None:
    with live.client() as client:
        answers = [client.get("/health", headers={"x-large": "a" * size}), client.get("/health?" + "a" * 20_000)]
        assert all(answer.status_code in (400, 431) for answer in answers)  # the former where it comes in pieces
        assert client.get("/health", headers={"x-large": "a" * 15_000}).status_code == 200
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 17_000 + b"\r\n\r\n"
    with connect(live) as connection:
        connection.sendall(request)
        answer = connection.recv(4096)
        assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


def test_how_large_headers_may_be(folder: Path) -> None:
    llm = tiny_llm(folder)
    with live_server(llm, limits=Limits(header_bytes=400)) as live, live.client() as client:
        answer = client.get("/health", headers={"x-large": "a" * 390})
        assert answer.status_code in (400, 431)
        assert client.get("/health", headers={"x-large": "a" * 100}).status_code == 200


# -- other origins, names of requests, HEAD ----------------------------------------------------------------------------


def test_pages_with_openais_client_may_call(llm: LLM) -> None:
    origin = "https://good.example"
    with live_server(llm, cors_origins=(origin,)) as live, live.client() as client:
        asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-request-id"
        for method in ("POST", "GET", "DELETE"):
            headers = {"origin": origin, "access-control-request-method": method}
            answer = client.options(
                "/v1/chat/completions", headers={**headers, "access-control-request-headers": asked}
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers["access-control-allow-headers"] == asked
            assert "access-control-allow-credentials" not in answer.headers
        answer = client.post("/v1/completions", json=SHORT, headers={"origin": origin})
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert exposed == ["x-request-id", "x-hopskip-dropped", "retry-after"]
        other = client.post("/v1/completions", json=SHORT, headers={"origin": "https://evil.example"})
        assert other.headers.get("access-control-allow-origin") != "https://evil.example"


def test_a_clients_name_for_a_request_is_logged_and_no_more(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="hopskip.serve"), live.client() as client:
        answers = [
            client.post("/v1/completions", json=SHORT, headers={"x-request-id": name})
            for name in ("mine", "mine", "a b" * 100)
        ]
        client.get("/health")
        until(lambda: len(caplog.records) >= 4)
    lines = [json.loads(JSONLines().format(record)) for record in caplog.records]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[0-9a-f]{24}", own) for own in ids)
    assert [answer.json()["id"] for answer in answers] == [f"cmpl-{own}" for own in ids]
    assert [line["request_id"] for line in lines][:3] == ids
    assert [line.get("client_request_id") for line in lines] == ["mine", "mine", ("a b" * 100)[:128], None]


def test_head_is_answered_where_get_is(live: Live) -> None:
    with live.client() as client:
        for path in ("/health", "/health/live", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/", "/openapi.json"):
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == client.get(path).headers["content-type"]
        assert client.head("/nothing").status_code == 404
        assert client.head("/v1/completions").status_code == 405
        assert 'method="HEAD",route="/health"' in client.get("/metrics").text


# -- unix sockets ------------------------------------------------------------------------------------------------------


def test_a_server_on_a_unix_socket(folder: Path, tmp_path: Path) -> None:
    tiny_llm(folder)
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "hopskip", "serve", "--uds", str(path), "-m", str(folder), "--draft", "none"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "PYTHONUNBUFFERED": "1"}
    command += ["--threads", "1", "--max-num-seqs", "2"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            assert f" at unix:{path} (" in process.stdout.readline()
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name", timeout=60
            ) as client:
                assert client.post("/v1/completions", json=SHORT).json()["usage"]["completion_tokens"] == 3
            with pytest.raises(ConfigError, match="cannot listen on"):
                bind_unix(path)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert not path.exists()
        finally:
            process.kill()


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    bind_unix(path).close()
    assert path.is_socket()
    bind_unix(path).close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot listen on .*socket \(.+\); use another --uds"):
        bind_unix(path)
    assert path.read_text() == "a file"
    with pytest.raises(ConfigError, match="use another --uds"):
        bind_unix(tmp_path / "no" / "folder")
    with pytest.raises(ConfigError, match="use another --uds"):
        bind_unix(tmp_path / ("long" * 40))


def test_a_unix_socket_has_no_port(tmp_path: Path) -> None:
    for more in ({"port": 9000}, {"host": "0.0.0.0"}):
        with pytest.raises(ConfigError, match="--uds leaves nothing to --host and --port; leave them out"):
            ServerOptions(uds=tmp_path, **more)
    assert ServerOptions(uds=tmp_path).uds == tmp_path


# -- drains that cut ---------------------------------------------------------------------------------------------------


def test_a_drain_that_cuts_an_answer_says_so(folder: Path) -> None:
    llm = tiny_llm(folder)
    brake = Brake(llm.engine)
    body: Any = {"model": MODEL, "prompt": "ab", "max_tokens": 900}
    go_on: Any = {"ignore_eos": True}
    outcome: dict[str, Any] = {}
    with live_server(llm, shutdown_timeout=0.1) as live, live.client() as client:

        def ask() -> None:
            outcome["whole"] = client.post("/v1/completions", json=body | go_on)

        asking = threading.Thread(target=ask)
        with OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as openai:
            stream = iter(openai.completions.create(stream=True, extra_body=go_on, **body))
            assert next(stream).choices[0].finish_reason is None
            asking.start()
            until(lambda: live.server.engine.num_outstanding == 2 and brake.is_holding)
            live.stop()
            with pytest.raises(APIError, match="has cut this answer") as cut:
                outcome["rest"] = list(stream)
        assert cut.value.code == "unavailable"
        asking.join()
        assert outcome["whole"].status_code == 503
        assert outcome["whole"].json()["error"]["code"] == "unavailable"
