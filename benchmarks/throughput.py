"""Many requests at once: our engine and server against one request at a time, and against batches of transformers.

    python benchmarks/throughput.py    # 16 requests of 64 to 128 tokens, bf16: a few minutes on two cores

Greedy, the default model, the same token ids for everybody, nothing kept from earlier prompts. Contenders take turns,
each in a process of its own; a rate is tokens asked for over seconds until all of them are there, prompts included, and
the best of the repeats counts. transformers pads on the left and runs to the longest request, in the faster of fp32 and
bf16. Then single requests, through HTTP and straight to the engine. Beside each ratio stands what the project asks of
itself. The last thing printed is one JSON object; the exit code is 1 if batching changed any token. Needs
`hopskip[serve,eval]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Protocol, get_args

import httpx

from benchmarks.served import serving
from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.bench.machine import describe_machine, measure_read_bandwidth, versions
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.errors import HopskipError
from hopskip.loading import DType
from hopskip.machine import num_usable_cores
from hopskip.prompts import load_prompts
from hopskip.sequence import Request
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer

PLAIN = SpeculativeConfig(draft="none")
SERVED = SpeculativeConfig(draft="auto")
"""As `hopskip serve` drafts unless told otherwise."""
ENGINE, PLAIN_BATCH, ALONE, SERVER = "engine", "engine, plain", "engine, plain, one at a time", "server"
TRANSFORMERS = ("transformers float32", "transformers bfloat16")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt, and how many tokens are asked for."""

    prompt_ids: list[int]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all contenders share."""

    model: Path
    dtype: DType
    threads: int
    batch: int
    """Requests at once."""

    def load(self, speculative: SpeculativeConfig, max_num_seqs: int) -> LLM:
        return LLM(
            self.model,
            speculative=speculative,
            dtype=self.dtype,
            threads=self.threads,
            max_num_seqs=max_num_seqs,
            prefix_caching=False,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """All requests of one turn."""

    seconds: float
    ids: list[list[int]]


class Contender(Protocol):
    """Lives in a process of its own."""

    def __call__(self, requests: list[Task]) -> Run: ...

    def close(self) -> None: ...


class Batch:
    """Our engine, all requests at once."""

    def __init__(self, setup: Setup, speculative: SpeculativeConfig, max_num_seqs: int) -> None:
        self._engine = setup.load(speculative, max_num_seqs).engine

    def __call__(self, requests: list[Task]) -> Run:
        started = time.perf_counter()
        sequences = [
            self._engine.add(Request(r.prompt_ids, SamplingParams(max_new_tokens=r.num_tokens, ignore_eos=True)))
            for r in requests
        ]
        while self._engine.has_work:
            self._engine.step()
        seconds = time.perf_counter() - started
        return Run(seconds=seconds, ids=[[token.id for token in s.tokens] for s in sequences])

    def close(self) -> None:
        pass


class Served:
    """Our server, in a thread, and an HTTP client, in another: all requests at once."""

    def __init__(self, setup: Setup) -> None:
        self._stack = ExitStack()
        url = self._stack.enter_context(serving(setup.load(SERVED, setup.batch)))
        self._client = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
        self._loop = asyncio.new_event_loop()

    def __call__(self, requests: list[Task]) -> Run:
        return self._loop.run_until_complete(self._send(requests))

    async def _send(self, requests: list[Task]) -> Run:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(
                self._client.post(
                    "/v1/completions",
                    json={"prompt": r.prompt_ids, "max_tokens": r.num_tokens, "temperature": 0, "ignore_eos": True},
                )
                for r in requests
            )
        )
        seconds = time.perf_counter() - started
        for answer, request in zip(answers, requests, strict=True):
            if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != request.num_tokens:
                raise RuntimeError(f"the server answered with {answer.status_code}: {answer.text[:300]}")
        return Run(seconds=seconds, ids=[])

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._stack.close()


class TransformersBatch:
    """`generate` of transformers, one batch."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        import torch

        from hopskip.checkpoint.in_transformers import load_in_transformers

        torch.set_num_threads(setup.threads)
        self._model = load_in_transformers(setup.model, getattr(torch, dtype))
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def __call__(self, requests: list[Task]) -> Run:
        import torch

        longest = max(len(r.prompt_ids) for r in requests)
        started = time.perf_counter()
        padding = [longest - len(r.prompt_ids) for r in requests]
        out = self._model.generate(
            torch.tensor([[0] * n + r.prompt_ids for n, r in zip(padding, requests, strict=True)]),
            attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
            max_new_tokens=max(r.num_tokens for r in requests),
            do_sample=False,
        )
        seconds = time.perf_counter() - started
        ids = [row[longest:].tolist()[: r.num_tokens] for row, r in zip(out, requests, strict=True)]
        return Run(seconds=seconds, ids=ids)

    def close(self) -> None:
        pass


def load(name: str, setup: Setup) -> Contender:
    if name in TRANSFORMERS:
        return TransformersBatch(setup, name.split()[1])
    if name == SERVER:
        return Served(setup)
    return {
        ENGINE: partial(Batch, setup, SERVED, setup.batch),
        PLAIN_BATCH: partial(Batch, setup, PLAIN, setup.batch),
        ALONE: partial(Batch, setup, PLAIN, 1),
    }[name]()


class Process:
    """A contender in a process of its own."""

    _contender: Contender

    def __init__(self, name: str, setup: Setup) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), Process._start, (name, setup))

    def run(self, requests: list[Task]) -> Run:
        return self._pool.submit(Process._run, requests).result()

    def close(self) -> None:
        self._pool.submit(Process._close).result()
        self._pool.shutdown()

    @staticmethod
    def _start(name: str, setup: Setup) -> None:
        Process._contender = load(name, setup)

    @staticmethod
    def _run(requests: list[Task]) -> Run:
        return Process._contender(requests)

    @staticmethod
    def _close() -> None:
        Process._contender.close()
        del Process._contender


@dataclass(frozen=True, kw_only=True)
class Row:
    """A ratio beside what is asked of it."""

    measure: str
    value: float
    floor: float
    at_most: bool = False

    @property
    def passes(self) -> bool:
        return self.value <= self.floor if self.at_most else self.value >= self.floor

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.measure:60} {self.value:6.3f} {'ok' if self.passes else 'MISSED':6} (asked: {sign} {self.floor})"


def requests_of(tokenizer: Tokenizer, count: int, shortest: int, longest: int) -> list[Task]:
    """Prompts of four kinds in turn, and lengths spread evenly from `shortest` to `longest`, in random order."""
    columns = [load_prompts(name, -(-count // 4)) for name in ("alpaca", "gsm8k", "humaneval", "mt_bench")]
    prompts = [prompt for row in zip(*columns, strict=True) for prompt in row][:count]
    lengths = [shortest + i * (longest - shortest) // max(1, count - 1) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return [Task(prompt_ids=p.encode(tokenizer), num_tokens=n) for p, n in zip(prompts, lengths, strict=True)]


def rate(run: Run, requests: list[Task]) -> float:
    return sum(r.num_tokens for r in requests) / run.seconds


def measure(setup: Setup, requests: list[Task], repeats: int) -> dict[str, Any]:
    """Rates in tokens/s and latencies in seconds, by contender; every repeat of them.

    The turns are its own, not those of `hopskip.bench.turns`: contenders are processes that come one after the other,
    one of them has another part of the requests each time, and single requests stand between the repeats.
    """
    rates: dict[str, list[float]] = {}
    single: dict[str, list[list[float]]] = {}
    ids: dict[str, dict[int, list[int]]] = {}
    with ExitStack() as stack:
        ours = {name: stack.enter_context(process(name, setup)) for name in (ENGINE, PLAIN_BATCH, ALONE, SERVER)}
        short = [Task(prompt_ids=r.prompt_ids, num_tokens=8) for r in requests]
        for name, contender in ours.items():
            tell(f"{name}: warming up")
            contender.run(short[:2] if name == ALONE else short)
        theirs: dict[str, Process] = {}
        warm: dict[str, float] = {}
        for name in TRANSFORMERS:
            tell(f"{name}: warming up")
            theirs[name] = stack.enter_context(process(name, setup))
            theirs[name].run(short[:2])
            warm[name] = theirs[name].run(short[:4]).seconds
        faster = min(warm, key=lambda name: warm[name])
        contenders = {**ours, faster: theirs[faster]}
        for repeat in range(repeats):
            for name, contender in contenders.items():
                tell(f"{name}: run {repeat + 1} of {repeats}")
                # a quarter of them is enough where they come one after the other; another quarter each time
                chosen = range(len(requests)) if name != ALONE else range(repeat % 4, len(requests), 4)
                mine = [requests[i] for i in chosen]
                run = contender.run(mine)
                rates.setdefault(name, []).append(rate(run, mine))
                ids.setdefault(name, {}).update(zip(chosen, run.ids, strict=False))
            for index, request in enumerate(requests[:4]):
                tell(f"single requests: run {repeat + 1} of {repeats}")
                for name in (ENGINE, SERVER) if repeat % 2 else (SERVER, ENGINE):
                    single.setdefault(name, [[] for _ in requests[:4]])[index].append(ours[name].run([request]).seconds)
    tell("")
    reference = {**ids[PLAIN_BATCH], **ids[ALONE]}
    differing = [i for i in reference if not ids[ENGINE][i] == ids[PLAIN_BATCH][i] == reference[i]]
    return {"rates": rates, "single_seconds": single, "transformers": faster, "warm": warm, "differing": differing}


@contextmanager
def process(name: str, setup: Setup) -> Iterator[Process]:
    started = Process(name, setup)
    try:
        yield started
    finally:
        started.close()


def tell(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{what:60}\r", end="", file=sys.stderr, flush=True)
    elif what:
        print(what, file=sys.stderr, flush=True)


def compare(found: dict[str, Any], batch: int) -> list[Row]:
    best = {name: max(values) for name, values in found["rates"].items()}
    latency = [
        min(served) / min(own)
        for served, own in zip(found["single_seconds"][SERVER], found["single_seconds"][ENGINE], strict=True)
    ]
    alone, plain = best[ALONE], best[PLAIN_BATCH]
    theirs = best[found["transformers"]]
    through_http = "single request: time through HTTP over engine's own"
    return [
        Row(measure=f"server, {batch} at once, over plain one at a time", value=best[SERVER] / alone, floor=4),
        Row(measure=f"engine, {batch} at once, over plain one at a time", value=best[ENGINE] / alone, floor=4),
        Row(measure=f"server, {batch} at once, over {found['transformers']}", value=best[SERVER] / theirs, floor=3),
        Row(measure=f"engine, {batch} at once, over plain batching", value=best[ENGINE] / plain, floor=0.97),
        Row(measure=through_http, value=median(latency), floor=1.05, at_most=True),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or GGUF file, in place of the default model")
    parser.add_argument("--dtype", default="bfloat16", choices=get_args(DType))
    parser.add_argument("--num-requests", type=int, default=16, help="at least 4")
    parser.add_argument("--min-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    if arguments.num_requests < 4 or arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--num-requests must be at least 4, --repeats and --threads at least 1")
    if not 1 <= arguments.min_tokens <= arguments.max_tokens:
        parser.error("--min-tokens must be at least 1 and at most --max-tokens")
    try:
        model = arguments.model or find_model()
        tokenizer = load_tokenizer(model, open_checkpoint(model).config)
        requests = requests_of(tokenizer, arguments.num_requests, arguments.min_tokens, arguments.max_tokens)
        setup = Setup(model=model, dtype=arguments.dtype, threads=arguments.threads, batch=len(requests))
        bandwidth = measure_read_bandwidth(arguments.threads)
        found = measure(setup, requests, arguments.repeats)
    except HopskipError as error:
        print(f"throughput: error: {error}", file=sys.stderr)
        return 2
    for name, values in found["rates"].items():
        print(f"{name:60} {max(values):6.1f} tokens/s")
    rows = compare(found, len(requests))
    print(*rows, sep="\n")
    same = "all equal" if not found["differing"] else f"requests {found['differing']} differ"
    print(f"greedy tokens at once, with and without drafts, and one at a time: {same}")
    report = {
        "machine": describe_machine(arguments.threads, bandwidth),
        "versions": versions(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "num_prompt_tokens": [len(r.prompt_ids) for r in requests],
        "num_tokens": [r.num_tokens for r in requests],
        "tokens_per_second": found["rates"],
        "single_seconds": found["single_seconds"],
        "transformers_warm_up_seconds": found["warm"],
        "differing_requests": found["differing"],
        "rows": [{**asdict(row), "passes": row.passes} for row in rows],
    }
    print(json.dumps(report, indent=2))
    return 1 if found["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
