"""A server at capacity for a long time, with clients that cancel and vanish.

    python -m benchmarks.soak --minutes 20 [--model FOLDER]

Fails if a greedy answer is not that of a quiet server, if rows are left over at the end, or if memory grows by more
than 5 % after the first fifth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import httpx

from benchmarks.hostile import resident_bytes, serving

_TEXTS = ("Count from 1 to 30.", "Write a poem about rain.", "abc abc abc abc", "def main():", "Explain gravity.", "x")


def soak_requests(num_tokens: int, num_texts: int) -> list[dict[str, Any]]:
    """Greedy requests of many kinds; their answers do not depend on company."""
    bodies: list[dict[str, Any]] = []
    for index, text in enumerate(_TEXTS[:num_texts]):
        base = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": num_tokens + index}
        bodies += [
            base,
            {**base, "frequency_penalty": 0.5},
            {**base, "response_format": {"type": "regex", "pattern": "[a-z ]{10,40}"}},
            {**base, "stop": ["e", "\n"]},
            {**base, "speculative": {"enabled": False}},
        ]
    return bodies


async def soak(
    url: str, seconds: float, *, num_clients: int, num_tokens: int, num_texts: int = len(_TEXTS), seed: int = 0
) -> Counter[str]:
    """Keep `num_clients` busy: of their requests some stream, some are cancelled half way, some drop the connection.

    Returns:
        counts of `whole`, `streamed`, `cancelled`, and of answers that were `wrong` or `failed`.
    """
    chance = random.Random(seed)
    bodies = soak_requests(num_tokens, num_texts)
    counts: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def whole(body: dict[str, Any]) -> str:
            answer = await client.post("/v1/chat/completions", json=body)
            text: str = answer.json()["choices"][0]["message"]["content"]
            return text

        references = [await whole(body) for body in bodies]
        deadline = time.monotonic() + seconds

        async def run() -> None:
            while time.monotonic() < deadline:
                index = chance.randrange(len(bodies))
                kind = chance.choice(("whole", "streamed", "cancelled", "dropped"))
                try:
                    if kind == "whole":
                        right = await whole(bodies[index]) == references[index]
                    elif kind == "dropped":
                        await asyncio.wait_for(whole(bodies[index]), chance.random() * 0.3)
                        right = True
                    else:
                        text = await stream(bodies[index], chance.randrange(4) if kind == "cancelled" else None)
                        right = text == references[index] if kind == "streamed" else references[index].startswith(text)
                    counts[kind if right else "wrong"] += 1
                except asyncio.TimeoutError:
                    counts["dropped"] += 1
                except (httpx.HTTPError, KeyError):
                    counts["failed"] += 1

        async def stream(body: dict[str, Any], num_chunks: int | None) -> str:
            text = ""
            async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if num_chunks is not None:
                        num_chunks -= 1
                        if num_chunks < 0:
                            break
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            return text

        await asyncio.gather(*(run() for _ in range(num_clients)))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", help="default: hopskip's own")
    options = parser.parse_args()
    with serving(*(["--model", options.model] if options.model else [])) as (url, pid):
        fifth = options.minutes * 12
        counts = asyncio.run(soak(url, fifth, num_clients=options.clients, num_tokens=48))
        before = resident_bytes(pid)
        counts += asyncio.run(soak(url, 4 * fifth, num_clients=options.clients, num_tokens=48, seed=1))
        time.sleep(2)
        after = resident_bytes(pid)
        metrics = httpx.get(f"{url}/metrics").text
        running = next(line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{"))
    report = {
        "minutes": options.minutes,
        "answers": dict(counts),
        "rows_left": float(running.split()[-1]),
        "memory_before": before,
        "memory_after": after,
        "memory_growth": round(after / before - 1, 4),
    }
    print(json.dumps(report, indent=1))
    bad = counts["wrong"] + counts["failed"] + report["rows_left"]
    sys.exit(1 if bad or after > 1.05 * before else 0)


if __name__ == "__main__":
    main()
