"""The Ray Serve application: what it refuses, and two replicas that live through a kill."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hopskip import ConfigError, SamplingParams
from hopskip.serve.ray_app import RayOptions, app
from tests.serving import tiny_llm

ROOT = Path(__file__).parents[1]
LONG = {"prompt": "ab", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_replicas": "0"}, "num_replicas is '0'"),
        ({"num_replica": "2"}, "num_replica: Extra inputs"),
        ({"max_replicas": "1"}, "max_replicas is 1, below num_replicas, 2"),
        ({"draft": "none", "exit_layer": "3"}, "exit_layer=3 has no effect"),
        ({"draft": "magic"}, "draft is 'magic'"),
        ({"max_queue": "-1"}, "max_queue is '-1'"),
        ({"kv_memory": "much"}, "kv-memory is 'much'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        app(arguments)


def test_arguments_as_texts_and_what_follows_from_them() -> None:
    options = RayOptions.model_validate(
        {"num_replicas": "2", "max_replicas": "4", "threads": "3", "allowed_hosts": "a.example, b.example"}
    )
    assert (options.most_replicas, options.num_threads) == (4, 3)
    assert options.settings().allowed_hosts == ("a.example", "b.example")
    assert RayOptions().settings().allowed_hosts == ("127.0.0.1", "localhost", "::1")
    assert RayOptions(allowed_hosts="*").settings().allowed_hosts is None


def test_the_example_configuration_is_valid() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text())
    assert config["applications"][0]["import_path"] == "hopskip.serve.ray_app:app"
    RayOptions.model_validate(config["applications"][0]["args"])


# -- the real thing ----------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)


@contextmanager
def ray_serve(folder: Path, **arguments: Any) -> Iterator[tuple[str, Callable[[], set[int]]]]:
    """`serve run` in a process of its own: the address, and a function that finds the replicas' process ids."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    application = {"name": "test", "import_path": "hopskip.serve.ray_app:app", "args": arguments}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "ray.yaml").write_text(yaml.safe_dump(config))
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HOME": str(folder),  # Ray keeps a token there
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOPSKIP_TEST_MARK": mark,
    }
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "ray.yaml")]

    def marked(title: bytes) -> set[int]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                is_ours = mark.encode() in (process / "environ").read_bytes()
                if is_ours and title in (process / "cmdline").read_bytes():
                    found.add(int(process.name))
        return found

    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", partial(marked, b"ServeReplica:")
    finally:
        running.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # Ray may miss the signal, and how it ends is not under test
            running.wait(30)
        for process in marked(b""):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        running.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def count(url: str, series: str) -> float:
    """A figure of whichever replica answers."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))


def read_stream(url: str, has_begun: threading.Event) -> str:
    """How a long stream ends: `done`, the status of its refusal, or the name of the error."""
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=300) as answer:
            for _ in answer.iter_lines():
                has_begun.set()
            return "done" if answer.status_code == 200 else str(answer.status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


def are_on_both(url: str, endings: Sequence[Future[str]]) -> bool:
    """Whether both of two replicas have some of the streams that have not ended: one of them says how many it has. Ray
    may well give the same replica several in a row, all of them while the other is still starting."""
    for _ in range(2):  # one that is just ending may have left its replica, but not yet arrived
        time.sleep(0.2)
        on_one = count(url, "hopskip_num_requests_running")
        if not 0 < on_one < sum(not ending.done() for ending in endings):
            return False
    return True


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray Serve: pip install 'hopskip[ray]'")
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finding the replicas needs Linux's /proc")
def test_two_replicas_answer_and_one_is_replaced_after_kill_9(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    plain = tiny_llm(tmp_path / "model", "none")
    expected = plain.generate(["ab"], SamplingParams(max_new_tokens=24, ignore_eos=True))[0].text
    arguments = {"model": str(tmp_path / "model"), "served_model_name": "tiny", "backend": "torch", "threads": 1}
    with ray_serve(tmp_path, num_replicas=2, max_num_seqs=8, **arguments) as (url, replicas):
        until(lambda: answers(url) and len(replicas()) == 2)

        # answers, streams and errors are those of any hopskip server
        with httpx.Client(base_url=url, timeout=60) as client:
            body = {**LONG, "max_tokens": 24}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
            streamed = client.post("/v1/completions", json={**body, "stream": True}).text
            assert streamed.count("data: ") > 3
            assert streamed.endswith("data: [DONE]\n\n")
            refused = client.post("/v1/completions", json={**body, "n": 17})
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
            assert client.get("/health", headers={"host": "evil.example"}).status_code == 421

            # a client that leaves takes its requests along: 16 answers of 900 tokens, eight at a time, last longer
            with client.stream("POST", "/v1/completions", json={**LONG, "n": 16, "stream": True}) as stream:
                next(stream.iter_raw())
            until(lambda: count(url, 'hopskip_request_success_total{finished_reason="abort"') == 16)
            assert count(url, "hopskip_num_requests_running") == 0

        # kill -9 under load: an error for those on that replica, no hang for anybody, and a new one
        victim = min(replicas())
        with ThreadPoolExecutor(64) as pool:
            endings: list[Future[str]] = []
            while not are_on_both(url, endings):
                assert len(endings) < 64, "Ray gives one replica everything"
                has_begun = threading.Event()
                endings.append(pool.submit(read_stream, url, has_begun))
                assert has_begun.wait(120)
            os.kill(victim, signal.SIGKILL)
            ended = [ending.result() for ending in endings]
        assert set(ended) == {"done", "RemoteProtocolError"}, ended
        until(lambda: len(replicas()) == 2 and victim not in replicas())
        until(lambda: answers(url))
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"] == expected
