"""A server at capacity for a long time, with clients that cancel and vanish; or one LLM in the hands of many threads.

    python -m benchmarks.soak --minutes 20 [--model FOLDER]
    python -m benchmarks.soak --threads 16 --calls 200 [--model FOLDER]

A server fails if a greedy answer is not that of a quiet one, if rows are left over at the end, or if memory grows by
more than 5 % after the first fifth of the time. Threads fail if a text is not that of a single call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx

from benchmarks.hostile import resident_bytes, serving
from hopskip import LLM

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


def soak_threads(llm: LLM, *, num_threads: int, num_calls: int, num_tokens: int) -> Counter[str]:
    """Let every thread generate, chat, stream, and leave streams half way, with parameters of many kinds.

    Returns:
        counts of `generate`, `chat`, `stream`, `left`, and of texts that were `wrong`.

    Raises:
        Exception: what a call has raised.
    """
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 5, "n": 2},
        {"frequency_penalty": 0.5, "logprobs": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6, "stop": ["e", "\n"]},
        {"regex": "[a-z ]{4,40}"},
    ]
    cases = [
        (text, {**options, "max_tokens": num_tokens + index})
        for index, text in enumerate(_TEXTS)
        for options in settings
    ]

    def chat(text: str, options: dict[str, Any]) -> list[str]:
        [result] = llm.chat([{"role": "user", "content": text}], **options)
        return [output.text for output in result.outputs]

    def generate(text: str, options: dict[str, Any]) -> list[str]:
        [result] = llm.generate(text, **options)
        return [output.text for output in result.outputs]

    references = [(generate(*case), chat(*case)) for case in cases]
    counts: Counter[str] = Counter()
    errors: list[Exception] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(num_calls):
                index = chance.randrange(len(cases))
                text, options = cases[index]
                generated, chatted = references[index]
                kind = chance.choice(("generate", "chat", "stream", "left"))
                if kind == "generate":
                    is_right = generate(text, options) == generated
                elif kind == "chat":
                    is_right = chat(text, options) == chatted
                else:
                    stream = llm.stream(text, **{**options, "n": 1})
                    most = chance.randrange(4) if kind == "left" else num_tokens * 2
                    found = "".join(piece.text for piece, _ in zip(stream, range(most), strict=False))
                    is_right = found == generated[0] if kind == "stream" else generated[0].startswith(found)
                counts[kind if is_right else "wrong"] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", help="default: hopskip's own")
    parser.add_argument("--threads", type=int, help="so many on one LLM, instead of a server")
    parser.add_argument("--calls", type=int, default=200, help="of each thread")
    options = parser.parse_args()
    if options.threads is not None:
        llm = LLM(options.model)
        start = time.monotonic()
        counts = soak_threads(llm, num_threads=options.threads, num_calls=options.calls, num_tokens=8)
        seconds = time.monotonic() - start
        is_idle = not llm.engine.has_work
        print(json.dumps({"seconds": round(seconds, 1), "calls": dict(counts), "is_idle_after": is_idle}, indent=1))
        sys.exit(0 if is_idle and not counts["wrong"] else 1)
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
