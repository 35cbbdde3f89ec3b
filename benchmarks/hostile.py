"""Requests that no honest client would send, and whether the server is as good as new afterwards.

    python benchmarks/hostile.py --count 2000 [--model FOLDER]

Starts `hopskip serve`, warms it up, sends the requests, then a good one. Fails if a hostile request is answered with a
5xx, if the good one is not answered as before, or if the server's memory has grown by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

GOOD = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8, "temperature": 0}
_JSON = {"content-type": "application/json"}
_CONTEXT, _ROWS = 512, 4
_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


def hostile_bodies(chance: random.Random) -> Iterator[bytes]:
    """Endless bodies: malformed JSON, huge numbers, deep nesting, wrong types, NaN, control characters, sheer size."""
    fields = [
        "messages", "prompt", "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias",
        "response_format", "tools", "stream", "speculative", "stop_token_ids", "logprobs", "user", "tokens",
        "presence_penalty",
    ]  # fmt: skip
    values: list[Any] = [
        None, True, -1, 0, 10**40, -(10**40), 1e308, float("nan"), float("inf"), -float("inf"), "", "\x00\x01\x1b[2J",
        "\ud800", "a" * 10_000, [], {}, [[]], [None] * 100, {"": ""}, [{"role": "user"}], [-1], [2**31], [10**30],
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://169.254.169.254/"}}},
        {"type": "regex", "pattern": "(a*)*" * 50 + "("}, {"type": "grammar", "grammar": "start: start start | start"},
        {"type": "regex", "pattern": "[" * 1000}, {"enabled": "yes"}, {"exit_layer": 10**9}, {"num_draft_tokens": -1},
    ]  # fmt: skip
    while True:
        kind = chance.randrange(9)
        base = dict(GOOD) if chance.random() < 0.5 else {"prompt": "a", "max_tokens": 4}
        if kind == 0:
            yield json.dumps(base).encode()[: chance.randrange(60)]
        elif kind == 1:
            yield bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
        elif kind == 2:
            depth = chance.choice((50, 1000, 100_000))
            yield b'{"messages":' + b"[" * depth + b"]" * depth + b"}"
        elif kind == 3:
            yield b'{"max_tokens":' + b"9" * chance.choice((20, 400, 5000, 100_000)) + b',"prompt":"a"}'
        elif kind == 4 and chance.random() < 0.05:
            yield b'{"prompt":"' + b"a" * 10_000_000 + b'"}'
        elif kind == 5:
            yield json.dumps(chance.choice(values)).encode()
        else:
            for _ in range(chance.randrange(1, 4)):
                base[chance.choice(fields)] = chance.choice(values)
            yield json.dumps(base).encode()


def hostile_connections(chance: random.Random) -> Iterator[bytes]:
    """Endless things to send over a socket that is then left open or closed half way."""
    while True:
        yield chance.choice(
            (
                b"",
                b"GET",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
                b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(chance.randrange(256) for _ in range(50)),
                b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            )
        )


def attack(url: str, count: int, seed: int = 0) -> Counter[str]:
    """Send `count` hostile requests, one in five of them over a bare socket; how they were answered.

    Bare sockets stay open, 50 of them at most, and some of them ask for a long stream that they never read.
    """
    chance = random.Random(seed)
    bodies, connections = hostile_bodies(chance), hostile_connections(chance)
    address = re.fullmatch(r"http://(.+):(\d+)", url)
    assert address is not None, url
    host, port = address.groups()
    answers: Counter[str] = Counter()
    open_sockets: list[socket.socket] = []
    stream = json.dumps({"prompt": "a", "max_tokens": 100, "stream": True, "ignore_eos": True}).encode()
    slow = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        + str(len(stream)).encode() + b"\r\n\r\n" + stream
    )  # fmt: skip
    with httpx.Client(base_url=url, timeout=60) as client:
        for index in range(count):
            if index % 5 == 0:
                connection = socket.create_connection((host, int(port)), timeout=10)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                try:
                    connection.sendall(slow if index % 50 == 0 else next(connections))
                except OSError:
                    answers["refused while sending"] += 1
                open_sockets.append(connection)
                answers["socket"] += 1
                if len(open_sockets) > 50:
                    open_sockets.pop(chance.randrange(50)).close()
                continue
            try:
                answer = client.post(chance.choice(_PATHS), content=next(bodies), headers=_JSON)
                answers[str(answer.status_code)] += 1
            except httpx.TransportError as error:
                # a body that is refused unread ends in a closed connection; that is an answer too
                answers[f"closed ({type(error).__name__})"] += 1
    for connection in open_sockets:
        connection.close()
    return answers


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, int]]:
    """`hopskip serve` at a free port: its address and process id."""
    command = [sys.executable, "-m", "hopskip", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := re.search(r" at (http://\S+)", line):
                break
        else:
            raise SystemExit(f"hopskip serve has ended with {process.wait()}")
        with httpx.Client(base_url=match[1]) as client:
            for _ in range(300):
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        yield match[1], process.pid
    finally:
        process.terminate()
        process.wait(60)


def resident_bytes(pid: int) -> int:
    """Memory of a process (Linux)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    if found is None:
        raise SystemExit(f"process {pid} has ended")
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--model", help="default: hopskip's own")
    options = parser.parse_args()
    size = ["--max-model-len", str(_CONTEXT), "--max-num-seqs", str(_ROWS)]
    with serving(*size, *(["--model", options.model] if options.model else [])) as (url, pid):
        # the cache is reserved at the start, but a page of it counts as memory once it has been written to
        whole = {"prompt": [5] * (_CONTEXT - 8), "n": _ROWS, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=whole, timeout=600).raise_for_status()
        # the first grammar of all reads the vocabulary, which is kept
        grammar = {"response_format": {"type": "regex", "pattern": "[a-z]{3}"}}
        httpx.post(f"{url}/v1/chat/completions", json={**GOOD, **grammar}, timeout=60).raise_for_status()
        attack(url, 200, seed=1)  # what else is allocated once and kept: thread stacks, buffers
        good = httpx.post(f"{url}/v1/chat/completions", json=GOOD, timeout=60).json()["choices"]
        time.sleep(2)
        before = resident_bytes(pid)
        started = time.perf_counter()
        answers = attack(url, options.count)
        seconds = time.perf_counter() - started
        again = httpx.post(f"{url}/v1/chat/completions", json=GOOD, timeout=60).json()["choices"]
        time.sleep(2)
        after = resident_bytes(pid)
    report = {
        "count": options.count,
        "seconds": round(seconds, 1),
        "answers": dict(answers),
        "good_request_answered_as_before": good == again,
        "memory_before": before,
        "memory_after": after,
        "memory_growth": round(after / before - 1, 4),
    }
    print(json.dumps(report, indent=1))
    broken = any(status.startswith("5") for status in answers)
    sys.exit(1 if broken or good != again or after > 1.05 * before else 0)


if __name__ == "__main__":
    main()
