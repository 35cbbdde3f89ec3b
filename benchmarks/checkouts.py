"""This checkout beside another: the same requests in turn, as `no change may cost speed` needs a figure.

    git worktree add --detach /tmp/before COMMIT    # and build it: scripts/install in it, or copy its compiled module
    python -m benchmarks.checkouts /tmp/before --precision bf16 --case plain --case auto

Each side is a process with its own `src` and compiled module; both stay loaded, and take turns request by request. A
case is `plain` or `auto` (one request at a time), `batch` (all prompts at once, undrafted) or `served` (eight clients,
drafting as `hopskip serve` does). A ratio is the speed of this checkout over the other: of all tokens over all seconds,
and the median of the pairs. Greedy ids are compared as well. Needs `hopskip[serve]` for `served`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from hopskip.bench.machine import describe_machine, measure_read_bandwidth
from hopskip.machine import num_usable_cores
from hopskip.prompts import Content, load_prompts

HERE = Path(__file__).resolve().parent.parent
PRECISIONS: dict[str, dict[str, str]] = {"default": {}, "bf16": {"dtype": "bfloat16"}, "q8": {"quantize": "q8"}}
CASES = ("plain", "auto", "batch", "served")
SETS = ("alpaca", "gsm8k", "humaneval", "mt_bench")

WORKER = """
import concurrent.futures, json, subprocess, sys, time, urllib.request
from hopskip import LLM, SamplingParams, SpeculativeConfig
setup = json.loads(sys.argv[1])
models, server = {}, None

def model(draft):
    if draft not in models:
        models[draft] = LLM(speculative=SpeculativeConfig(draft=draft), max_num_seqs=16, **setup["precision"])
    return models[draft]

def post(prompt, params):
    body = {"messages": prompt, "max_tokens": params["max_new_tokens"], "ignore_eos": True, "temperature": 0, **params}
    del body["max_new_tokens"]
    request = urllib.request.Request(f"http://127.0.0.1:{setup['port']}/v1/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer = json.load(answer)
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

def serve():
    flags = [f"--{key}={value}" for key, value in setup["precision"].items()]
    server = subprocess.Popen([sys.executable, "-m", "hopskip", "serve", "--port", str(setup["port"]), *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{setup['port']}/health") and server
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.1)

try:
    for line in sys.stdin:
        task = json.loads(line)
        case, prompts, params = task["case"], task["prompts"], task["params"]
        if case == "served":
            server = server or serve()
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                started = time.perf_counter()
                answers = list(pool.map(lambda prompt: post(prompt, params), prompts))
                seconds = time.perf_counter() - started
            texts, tokens = [text for text, _ in answers], sum(count for _, count in answers)
        else:
            llm = model("auto" if case == "auto" else "none")
            params = SamplingParams(**{"ignore_eos": True, **params})
            started = time.perf_counter()
            results = llm.generate(prompts, params)
            seconds = time.perf_counter() - started
            texts, tokens = [r.token_ids for r in results], sum(len(r.token_ids) for r in results)
        print("answer", json.dumps({"seconds": seconds, "tokens": tokens, "texts": texts}), flush=True)
finally:
    if server:
        server.terminate()
"""


class Side:
    """One checkout, in a process of its own."""

    def __init__(self, checkout: Path, precision: str, port: int) -> None:
        self._checkout = checkout
        setup = {"precision": PRECISIONS[precision], "port": port}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
            cwd=checkout,
        )

    def run(self, case: str, prompts: list[Any], params: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"case": case, "prompts": prompts, "params": params}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                found: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return found
        raise SystemExit(f"the process of {self._checkout} ended")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def compare(case: str, sides: list[Side], prompts: list[Any], params: dict[str, Any], repeats: int) -> str:
    """One line: speeds of both, their ratio, and whether they wrote the same."""
    groups = [[prompt] for prompt in prompts] if case in ("plain", "auto") else [prompts[:16]]
    for side in sides:
        side.run(case, groups[0], {**params, "max_new_tokens": 16})
    rates: list[list[float]] = [[], []]
    totals = [[0, 0.0], [0, 0.0]]
    same = True
    for repeat in range(repeats):
        for index, group in enumerate(groups):
            order = (0, 1) if (repeat + index) % 2 == 0 else (1, 0)
            found = {at: sides[at].run(case, group, params) for at in order}
            same &= found[0]["texts"] == found[1]["texts"]
            for at in order:
                rates[at].append(found[at]["tokens"] / found[at]["seconds"])
                totals[at][0] += found[at]["tokens"]
                totals[at][1] += found[at]["seconds"]
    ours, theirs = (tokens / seconds for tokens, seconds in totals)
    pairs = median(a / b for a, b in zip(*rates, strict=True))
    return (
        f"{case:7} {ours:7.1f} tokens/s, before {theirs:7.1f}: {ours / theirs:.3f} x, median of {len(rates[0])} pairs"
        f" {pairs:.3f} x, {'the same text' if same else 'OTHER TEXT'}"
    )


def chat(content: Content) -> list[Any]:
    return [{"role": "user", "content": content}] if isinstance(content, str) else list(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout, its compiled module in src/hopskip")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--num-prompts", type=int, default=4, help="of each of the four sets")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument(
        "--params", type=json.loads, default={}, help='sampling, as JSON: {"temperature": 0.7, "seed": 1}'
    )
    arguments = parser.parse_args()
    threads = num_usable_cores()
    print(describe_machine(threads, measure_read_bandwidth(threads)))
    rows = zip(*(load_prompts(name, arguments.num_prompts) for name in SETS), strict=True)
    prompts = [chat(prompt.content) for row in rows for prompt in row]
    params = {"max_new_tokens": arguments.max_new_tokens, **arguments.params}
    for precision in arguments.precision or PRECISIONS:
        sides = [Side(HERE, precision, 8741), Side(arguments.before.resolve(), precision, 8742)]
        for case in arguments.case or CASES:
            print(f"{precision:8}", compare(case, sides, prompts, params, arguments.repeats), flush=True)
        for side in sides:
            side.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
