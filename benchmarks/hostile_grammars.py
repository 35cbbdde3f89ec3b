"""Grammars that no honest client would send, beside ordinary streams: whether the server lives, stalls, and lets go.

    python -m benchmarks.hostile_grammars [--count 200] [--model FOLDER]

Starts `hopskip serve` and eight streams that follow one another; measures their slowest gap, quiet and while `--count`
hostile schemas, grammars, patterns and tools arrive, sixteen at a time. Fails if a hostile request gets a 5xx, a stream
breaks, the slowest gap is more than three times the quiet one, memory stays 100 MiB above what it was, or SIGTERM
beside a hostile grammar takes longer than its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

import httpx

from benchmarks.hostile import resident_bytes, serving

_STREAMS, _AT_ONCE = 8, 16
_SHUTDOWN_SECONDS = 5
PRODUCT = "start: A\nA: /.*a.{12}.*/ & /.*b.{13}.*/ & /.*c.{14}.*/ & ~/.*d.{15}.*/"


def hostile_requests(chance: random.Random) -> list[dict[str, Any]]:
    """One of each kind, with numbers that no two calls share, so that nothing is answered from what was kept."""
    n = chance.randrange(5, 15)
    letters = "".join(chance.sample("abcdefgh", 4))
    lark = [
        PRODUCT.replace("12", str(n)),
        f"start: A\nA: ~/.*{letters[0]}.{{{n + 8}}}.*/ & /.*{letters[1]}.{{{n + 9}}}.*/",
        f"start: /[a-z]{{{n}}}/ A\nA: /.*a.{{{n}}}.*/ & /.*b.{{14}}.*/ & ~/.*d.{{15}}.*/",
        f'start: x+\nx: "a" | "{letters}" x | x "a" | x x',
        f'start: start start | "{letters}"',
    ]
    patterns = [
        f"(a{{1000}}){{{n}00}}",
        f"(({letters}|a)*)*b{{{n}}}",
        f"(.*a.{{{n}00}}){{9}}",
        "(" * 900 + letters + ")" * 900,
    ]
    value = chance.choice((-(2**63), 2**63, 2**64, 10**300, -(2**63) + n, 2**53 + 1))
    deep: dict[str, Any] = {"const": letters}
    for _ in range(55):
        deep = {"type": "object", "properties": {letters: deep}}
    schemas: list[dict[str, Any]] = [
        {"const": value},
        {"type": "integer", "minimum": value, "maximum": value + n},
        {"type": "integer", "multipleOf": 999_983 + n},
        {"type": "number", "multipleOf": 997 / 10**n},
        {"allOf": [{"type": "string", "pattern": f"^.*{c}.{{{n}}}.*$"} for c in letters + letters.upper()]},
        {"enum": [f"{chance.random()}" for _ in range(2500)]},
        {"type": "object", "properties": {f"{letters}{i}": {"type": "string"} for i in range(1500)}},
        {"anyOf": [{"type": "object", "properties": {f"{letters}{i}": {}}} for i in range(800)]},
        {"allOf": [{"anyOf": [{"properties": {f"{letters}{i}{j}": {}}} for i in range(8)]} for j in range(8)]},
        {"type": "string", "pattern": f"^({letters}{{1,500}}){{1,{n}00}}$", "minLength": 500, "maxLength": 5000},
        {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**6 + n}},
        deep,
    ]  # fmt: skip
    formats: list[dict[str, Any]] = [{"type": "grammar", "grammar": text} for text in lark]
    formats += [{"type": "regex", "pattern": pattern} for pattern in patterns]
    formats += [{"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} for schema in schemas]
    formats += [{"type": "grammar", "grammar": f"start: %json {json.dumps(schema)}"} for schema in schemas[:4]]
    return [{"prompt": "a", "max_tokens": 8, "response_format": given} for given in formats]


class Streams:
    """Ordinary streams that never cease, and the slowest gap between two of their chunks."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.slowest_gap = 0.0
        self.num_broken = 0
        self.is_ended = False

    async def follow(self, index: int) -> None:
        body = {"prompt": f"Stream {index}:", "max_tokens": 200, "stream": True, "ignore_eos": True, "temperature": 0}
        while not self.is_ended:
            last = None
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                text = ""
                async for text in answer.aiter_lines():
                    now = time.perf_counter()
                    if text:
                        self.slowest_gap = max(self.slowest_gap, now - (last or now))
                        last = now
                        end = text
            self.num_broken += end != "data: [DONE]"


async def attack(client: httpx.AsyncClient, count: int, seed: int) -> Counter[str]:
    """Send so many hostile requests; how they were answered."""
    chance = random.Random(seed)
    waiting: list[dict[str, Any]] = []
    answers: Counter[str] = Counter()

    async def send_some() -> None:
        nonlocal count
        while count > 0:
            count -= 1
            if not waiting:
                waiting.extend(hostile_requests(chance))
            answer = await client.post("/v1/completions", json=waiting.pop())
            answers[str(answer.status_code)] += 1

    await asyncio.gather(*(send_some() for _ in range(_AT_ONCE)))
    return answers


async def measure(url: str, pid: int, count: int) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        streams = Streams(client)
        following = [asyncio.create_task(streams.follow(index)) for index in range(_STREAMS)]
        await attack(client, 30, seed=1)  # what is allocated once and kept
        before = resident_bytes(pid)
        await asyncio.sleep(2)
        streams.slowest_gap = 0.0
        await asyncio.sleep(15)
        quiet, streams.slowest_gap = streams.slowest_gap, 0.0
        started = time.perf_counter()
        answers = await attack(client, count, seed=0)
        seconds = time.perf_counter() - started
        beside = streams.slowest_gap
        streams.is_ended = True
        await asyncio.gather(*following)
        after = resident_bytes(pid)
        hostile = asyncio.create_task(
            client.post(
                "/v1/completions", json={"prompt": "a", "response_format": {"type": "grammar", "grammar": PRODUCT}}
            )
        )
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        started = time.perf_counter()
        while _lives(pid) and time.perf_counter() - started < 60:
            await asyncio.sleep(0.05)
        ended = time.perf_counter() - started
        await asyncio.gather(hostile, return_exceptions=True)
    return {
        "count": count,
        "seconds": round(seconds, 1),
        "answers": dict(answers),
        "broken_streams": streams.num_broken,
        "slowest_gap_quiet_ms": round(quiet * 1e3, 1),
        "slowest_gap_beside_ms": round(beside * 1e3, 1),
        "gap_ratio": round(beside / quiet, 2),
        "memory_before": before,
        "memory_after": after,
        "sigterm_seconds": round(ended, 2),
    }


def _lives(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has asked for does not."""
    try:
        return " Z " not in open(f"/proc/{pid}/stat").read()
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--model", help="default: hopskip's own")
    options = parser.parse_args()
    arguments = ["--max-model-len", "1024", "--max-num-seqs", "16", "--shutdown-timeout", str(_SHUTDOWN_SECONDS)]
    with serving(*arguments, *(["--model", options.model] if options.model else [])) as (url, pid):
        report = asyncio.run(measure(url, pid, options.count))
    print(json.dumps(report, indent=1))
    failed = (
        any(status.startswith("5") for status in report["answers"])
        or report["broken_streams"]
        or report["gap_ratio"] > 3
        or report["memory_after"] > report["memory_before"] + 100 * 2**20
        or report["sigterm_seconds"] > _SHUTDOWN_SECONDS + 10
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
