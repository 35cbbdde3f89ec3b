"""Predicted beside measured speed-up: fixed settings, by the cost table of `hopskip info --measure` and acceptance.

    python benchmarks/predicted.py
    python benchmarks/predicted.py --dtype bfloat16 --lengths 1,3,5

A round of k draft tokens, each accepted with probability a if those before it were, is predicted to take k draft steps
and a pass of k + 1 rows, and to yield (1 - a^(k+1)) / (1 - a) tokens. The costs are timed here, a is counted in the
run that is measured. Both engines live in this process and take turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import get_args

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.bench.expected import measured_speedup
from hopskip.bench.machine import describe_machine, measure_read_bandwidth, versions
from hopskip.bench.turns import take_turns
from hopskip.draft.timing import measure
from hopskip.errors import HopskipError
from hopskip.llm import GenerationResult
from hopskip.loading import DType
from hopskip.machine import num_usable_cores
from hopskip.prompts import load_prompts
from hopskip.speculative import TRAINED_EXIT

SETS = ("alpaca", "gsm8k", "humaneval", "mt_bench")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One draft length of the trained exit."""

    num_draft_tokens: int
    acceptance: float
    """Share of draft tokens accepted, of those that were reached."""
    predicted: float
    measured: float

    def __str__(self) -> str:
        return (
            f"k = {self.num_draft_tokens}  a = {self.acceptance:.3f}  predicted {self.predicted:.2f} x  "
            f"measured {self.measured:.2f} x  ratio {self.predicted / self.measured:.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=get_args(DType))
    parser.add_argument("--lengths", default="1,2,3,5", help="draft lengths")
    parser.add_argument("--num-prompts", type=int, default=3, help="of each set")
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    try:
        lengths = [int(value) for value in arguments.lengths.split(",")]
    except ValueError as error:
        parser.error(f"--lengths are numbers with commas between ({error})")
    found: list[Setting] = []
    try:
        bandwidth = measure_read_bandwidth(arguments.threads)
        found = [compare(length, arguments) for length in lengths]
    except HopskipError as error:
        print(f"predicted: error: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(arguments.threads, bandwidth)
    report = {"machine": machine, "versions": versions(), "settings": vars(arguments)}
    print(json.dumps({**report, "found": [asdict(setting) for setting in found]}))
    return 0


def compare(num_draft_tokens: int, arguments: argparse.Namespace) -> Setting:
    speculative = SpeculativeConfig(draft="exit-branch", num_draft_tokens=num_draft_tokens, num_runner_ups=0)
    plain, drafting = (
        LLM(dtype=arguments.dtype, threads=arguments.threads, max_num_seqs=1, speculative=config)
        for config in (SpeculativeConfig(draft="none"), speculative)
    )
    trained_exit = drafting.backend.trained_exit
    assert trained_exit is not None, "an exit ships for the default model"
    params = SamplingParams(max_new_tokens=arguments.num_tokens, ignore_eos=True)
    prompts = [p.encode(plain.tokenizer) for name in SETS for p in load_prompts(name, arguments.num_prompts)]

    def generate(llm: LLM, prompt: list[int]) -> GenerationResult:
        return llm.generate([prompt], params)[0]

    contenders = {"plain": partial(generate, plain), "drafting": partial(generate, drafting)}
    take_turns(contenders, prompts[:1])  # warm up
    predictions: list[float] = []
    ratios: list[float] = []
    acceptance = 0.0
    for _ in range(arguments.repeats):
        found = take_turns(contenders, prompts)
        for expected, got in zip(found["plain"], found["drafting"], strict=True):
            assert got.token_ids == expected.token_ids, "the text has changed"
        seconds = {name: sum(result.stats.decode_seconds for result in results) for name, results in found.items()}
        ratios.append(seconds["plain"] / seconds["drafting"])
        acceptance = acceptance_of(found["drafting"])
        costs = measure(drafting.backend, [trained_exit])
        predictions.append(measured_speedup(costs, TRAINED_EXIT, acceptance, num_draft_tokens))
    setting = Setting(
        num_draft_tokens=num_draft_tokens,
        acceptance=acceptance,
        predicted=median(predictions),
        measured=median(ratios),
    )
    print(setting, flush=True)
    return setting


def acceptance_of(results: list[GenerationResult]) -> float:
    """Share of draft tokens accepted, of those that were reached: a draft ends at its first rejected token, or is
    accepted whole."""
    accepted = sum(result.stats.num_accepted_tokens for result in results)
    num_whole = sum((result.stats.num_accepted_tokens_per_pos or [0])[-1] for result in results)
    num_rejected = sum(result.stats.num_drafts for result in results) - num_whole
    return accepted / (accepted + num_rejected)


if __name__ == "__main__":
    sys.exit(main())
