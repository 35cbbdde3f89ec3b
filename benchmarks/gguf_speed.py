"""Speed on GGUF files beside llama.cpp, both in turns in one run (llama-cpp-python):

    python -m benchmarks.random_model 1b.gguf --type Q4_K_M
    python -m benchmarks.gguf_speed 1b.gguf --threads 2

Prefill of `--prompt` tokens and decoding of one sequence behind it, greedy, without drafting. Medians; a ratio is
llama.cpp's time over hopskip's. With --rows, also a pass of several rows over one of one row, on hopskip alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.rows import Rows, Segment
from hopskip.bench.turns import medians, take_turns
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.machine import cpu_name

_STEPS = 8  # tokens of a turn


class Native:
    """One sequence on the native engine."""

    def __init__(self, path: Path, threads: int, length: int) -> None:
        self.backend = NativeBackend.load(open_checkpoint(path), threads=threads)
        self.cache = self.backend.new_cache(1, length)
        self.position = 0

    def run(self, ids: list[int]) -> int:
        """The best token after these."""
        for start in range(0, len(ids), self.backend.num_prefill_rows):
            part = ids[start : start + self.backend.num_prefill_rows]
            rows = Rows([Segment(0, self.position, len(part))])
            hidden_ND = self.backend.forward(part, rows, self.cache).hidden_ND
            self.position += len(part)
        return self.backend.greedy(hidden_ND[-1:])[0]

    def rewind(self, position: int) -> None:
        self.position = position

    def rows_seconds(self, count: int) -> float:
        """A pass of so many rows, with the head's best tokens; its place in the cache is taken back."""
        ids, rows = [1 + i for i in range(count)], Rows([Segment(0, self.position, count)])
        started = time.perf_counter()
        self.backend.greedy(self.backend.forward(ids, rows, self.cache).hidden_ND)
        return time.perf_counter() - started


class LlamaCpp:
    """One sequence on llama.cpp, by its own calls."""

    def __init__(self, path: Path, threads: int, length: int) -> None:
        import llama_cpp

        self.llama: Any = llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=512, n_threads=threads, n_threads_batch=threads, flash_attn=True,
            verbose=False,
        )  # fmt: skip
        self._logits = llama_cpp.llama_get_logits_ith
        self._vocab_size = self.llama.n_vocab()

    def run(self, ids: list[int]) -> int:
        self.llama.eval(ids)
        logits = np.ctypeslib.as_array(self._logits(self.llama.ctx, -1), shape=(self._vocab_size,))
        return int(logits.argmax())

    def rewind(self, position: int) -> None:
        self.llama.n_tokens = position


def decode_seconds(contender: Native | LlamaCpp, position: int, token: int) -> float:
    """Of one token."""
    contender.rewind(position)
    started = time.perf_counter()
    for _ in range(_STEPS):
        token = contender.run([token])
    return (time.perf_counter() - started) / _STEPS


def prefill_seconds(contender: Native | LlamaCpp, ids: list[int]) -> float:
    contender.rewind(0)
    started = time.perf_counter()
    contender.run(ids)
    return time.perf_counter() - started


def in_turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one run to warm up."""

    def timed(run: Callable[[], float], _turn: int) -> float:
        return run()

    found = take_turns({name: partial(timed, run) for name, run in runs.items()}, range(repeats + 1))
    return medians({name: seconds[1:] for name, seconds in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prefills", type=int, default=3, help="0: not measured, for long prompts")
    parser.add_argument("--rows", type=int, nargs="*", default=[2, 4, 6, 8, 12, 16])
    arguments = parser.parse_args()
    print(f"{cpu_name()}, {arguments.threads} threads, {arguments.prompt} tokens before")
    for path in arguments.files:
        measure(path, arguments.threads, arguments.prompt, arguments.repeats, arguments.prefills, arguments.rows)


def measure(path: Path, threads: int, prompt: int, repeats: int, prefills: int, rows: list[int]) -> None:
    """Print the lines of one file."""
    ids = [3 + i * 7919 % 40_000 for i in range(prompt)]
    native = Native(path, threads, prompt + 32)
    contenders: dict[str, Native | LlamaCpp] = {"hopskip": native, "llama.cpp": LlamaCpp(path, threads, prompt + 32)}
    prefill = partial(prefill_seconds, ids=ids)
    if prefills:
        seconds = in_turns({name: partial(prefill, contender) for name, contender in contenders.items()}, prefills)
        report(path, "prefill", {name: prompt / taken for name, taken in seconds.items()})
    else:
        for contender in contenders.values():
            prefill(contender)
    decode = partial(decode_seconds, position=prompt, token=5)
    seconds = in_turns({name: partial(decode, contender) for name, contender in contenders.items()}, repeats)
    report(path, "decode", {name: 1 / taken for name, taken in seconds.items()})
    native.rewind(prompt)
    passes = in_turns({str(count): partial(native.rows_seconds, count) for count in (1, *rows)}, repeats * 3)
    shares = ", ".join(f"{count} rows {passes[str(count)] / passes['1']:.2f}" for count in rows)
    print(f"{path.name:16} passes   one row {passes['1'] * 1e3:.1f} ms; {shares}", flush=True)


def report(path: Path, what: str, rates: dict[str, float]) -> None:
    both = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    print(f"{path.name:16} {what:8} {both} tokens/s: {rates['hopskip'] / rates['llama.cpp']:.2f} x", flush=True)


if __name__ == "__main__":
    main()
