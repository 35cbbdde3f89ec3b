"""The same request with the same seed gives the same text, whatever a server did before and does meanwhile.

    python -m benchmarks.seeds                  # 400 requests, 20 histories, the default model: some minutes
    python -m benchmarks.seeds --batches 1,16   # fewer servers

Every history asks for all requests in an order of its own, so many at once, some of them drafted for and some not, and
hangs up on some in between. The histories are dealt out to servers that step 1 to 16 sequences together, with and
without a prefix cache. The last thing printed is one JSON object; the exit code is 1 if a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any

import httpx

from benchmarks.served import serving
from hopskip import LLM, SpeculativeConfig

BEGINNINGS = (
    "You are a helpful assistant. Answer in one short sentence. ",
    "You are a pirate. Answer in one short sentence. ",
    "",
)
QUESTIONS = ("Why is the sky blue?", "Name three colours, and three more.", "1 2 3 1 2 3 1 2 3", "Tell me a story.")
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "frequency_penalty": 0.5},
    {"temperature": 0},
)


def requests_of(count: int, num_tokens: int) -> list[dict[str, Any]]:
    """Bodies for `/v1/completions`, each with a seed, all of them different; every eighth asks for three choices."""
    return [
        {
            "prompt": BEGINNINGS[i % len(BEGINNINGS)] * (1 + i % 4) + QUESTIONS[i // 3 % len(QUESTIONS)],
            "max_tokens": num_tokens // 2 + i % num_tokens,
            "seed": i // 2,
            "n": 3 if i % 8 == 5 else 1,
            **WAYS[i // 5 % len(WAYS)],
        }
        for i in range(count)
    ]


async def history(url: str, bodies: Seq[dict[str, Any]], seed: int, num_at_once: int) -> list[list[str]]:
    """The texts of all requests, asked for in a random order."""
    chance = random.Random(seed)
    order = list(range(len(bodies)))
    chance.shuffle(order)
    plain, leaves = ([chance.random() < share for _ in bodies] for share in (0.3, 0.1))
    texts: list[list[str]] = [[] for _ in bodies]
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def ask_all() -> None:
            while order:
                index = order.pop()
                body = {**bodies[index], "speculative": {"enabled": not plain[index]}}
                if leaves[index]:
                    with suppress(httpx.TimeoutException):
                        await client.post("/v1/completions", json=body, timeout=0.05)
                answer = await client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    raise RuntimeError(f"the server answered with {answer.status_code}: {answer.text[:300]}")
                texts[index] = [choice["text"] for choice in answer.json()["choices"]]

        await asyncio.gather(*(ask_all() for _ in range(num_at_once)))
    return texts


def differing(found: Seq[list[list[str]]], bodies: Seq[dict[str, Any]]) -> list[int]:
    """Numbers of the requests whose texts are not the same in all histories."""
    return [i for i in range(len(bodies)) if any(texts[i] != found[0][i] for texts in found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="in place of the default model")
    parser.add_argument("--num-requests", type=int, default=400)
    parser.add_argument("--num-histories", type=int, default=20, help="at least two for each server")
    parser.add_argument("--num-tokens", type=int, default=16)
    parser.add_argument("--batches", default="1,3,8,16", help="sequences that a server steps together")
    arguments = parser.parse_args()
    bodies = requests_of(arguments.num_requests, arguments.num_tokens)
    servers = [(int(batch), caching) for batch in arguments.batches.split(",") for caching in (True, False)]
    found = []
    for number, (batch, caching) in enumerate(servers):
        llm = LLM(
            arguments.model, speculative=SpeculativeConfig(draft="auto"), max_num_seqs=batch, prefix_caching=caching
        )
        with serving(llm) as url:
            for seed in range(number, arguments.num_histories, len(servers)):
                print(f"history {seed}: {batch} together, prefix cache {'on' if caching else 'off'}", file=sys.stderr)
                found.append(asyncio.run(history(url, bodies, seed, 2 * batch)))
        llm.close()
    wrong = differing(found, bodies)
    print(json.dumps({"settings": vars(arguments), "num_histories": len(found), "differing_requests": wrong}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
