"""Draft `auto` beside plain decoding, or another: every prompt set, temperature and batch size. It should never lose.

    python benchmarks/auto.py                                    # a quarter of an hour on two cores
    python benchmarks/auto.py --sets alpaca --temperatures 0 --batches 1,16
    python benchmarks/auto.py --batches 1 --temperatures 0 --quantize q8 --against both

Both engines live in this process and take turns on the same requests, step by step. There are twice as many requests
as the batch holds: who has finished makes room for the next. A rate is tokens over seconds of the steps without any
prompt, while the batch is full; "to the end" counts also those of the batch running empty, where the slowest of the
texts is alone. A ratio is the median of the repeats. Above temperature 0 the texts differ, as their drafts do, but not
their lengths. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import NamedTuple, get_args

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.bench.machine import describe_machine, measure_read_bandwidth, versions
from hopskip.engine import Engine
from hopskip.errors import HopskipError
from hopskip.machine import num_usable_cores
from hopskip.prompts import PROMPT_SETS, load_prompts
from hopskip.sequence import Request, Sequence
from hopskip.speculative import DraftChoice

FLOOR = 0.97  # against no draft
FEWEST_PROMPTS = 4


class Rate(NamedTuple):
    """Tokens per second."""

    full: float
    to_the_end: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One prompt set, temperature and batch size."""

    batch: int
    temperature: float
    set: str
    against: str
    rates: dict[str, list[Rate]]
    """Of `auto` and the other draft, by repeat."""

    @property
    def ratios(self) -> list[float]:
        return [a.full / b.full for a, b in self._pairs]

    @property
    def ratio_to_the_end(self) -> float:
        return median(a.to_the_end / b.to_the_end for a, b in self._pairs)

    @property
    def _pairs(self) -> list[tuple[Rate, Rate]]:
        return list(zip(self.rates["auto"], self.rates[self.against], strict=True))

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def __str__(self) -> str:
        spread = f"({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        where = f"batch {self.batch:3}  temperature {self.temperature:3g}  {self.set:10}"
        missed = "  MISSED" if self.against == "none" and self.ratio < FLOOR else ""
        return f"{where} {self.ratio:5.2f} x {self.against} {spread}, to the end {self.ratio_to_the_end:5.2f}{missed}"


def rates(engines: dict[str, Engine], prompts: Seq[list[int]], params: SamplingParams) -> dict[str, Rate]:
    """The engines take turns step by step, not run by run as in `hopskip.bench.turns`: whichever has written less is
    next, so that each meets the same machine at the same place of the text."""
    sequences = {
        draft: [engine.add(Request(prompt, params)) for prompt in prompts] for draft, engine in engines.items()
    }
    steps: dict[str, list[tuple[bool, int, float]]] = {draft: [] for draft in engines}
    while working := [draft for draft, engine in engines.items() if engine.has_work]:
        draft = min(working, key=lambda draft: num_written(sequences[draft]))
        engine, own = engines[draft], sequences[draft]
        num_before, num_prefilled = num_written(own), sum(s.is_prefilled for s in own)
        num_decoding = sum(s.is_prefilled for s in engine.running)
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        if num_decoding and sum(s.is_prefilled for s in own) == num_prefilled and is_decoding_only(engine):
            is_full = num_decoding == engine.max_num_seqs
            steps[draft].append((is_full, num_written(own) - num_before, seconds))
    found = {}
    for draft, own_steps in steps.items():
        _, tokens, seconds_ = zip(*own_steps, strict=True)
        _, full_tokens, full_seconds = zip(*(step for step in own_steps if step[0]), strict=True)
        found[draft] = Rate(sum(full_tokens) / sum(full_seconds), sum(tokens) / sum(seconds_))
    return found


def is_decoding_only(engine: Engine) -> bool:
    return all(s.is_prefilled for s in engine.running)


def num_written(sequences: Seq[Sequence]) -> int:
    return sum(len(sequence.tokens) for sequence in sequences)


def compare(batch: int, temperatures: Seq[float], sets: Seq[str], arguments: argparse.Namespace) -> Iterator[Cell]:
    """The cells of a batch size."""
    against: DraftChoice = arguments.against
    choices: tuple[DraftChoice, ...] = (against, "auto")
    llms: dict[str, LLM] = {
        draft: LLM(
            dtype="auto" if arguments.quantize else arguments.dtype,
            quantize=arguments.quantize,
            threads=arguments.threads,
            max_num_seqs=batch,
            speculative=SpeculativeConfig(draft=draft),
        )
        for draft in choices
    }
    engines = {draft: llm.engine for draft, llm in llms.items()}
    for temperature in temperatures:
        params = SamplingParams(max_new_tokens=arguments.num_tokens, temperature=temperature, ignore_eos=True)
        for name in sets:
            loaded = load_prompts(name, max(2 * batch, FEWEST_PROMPTS))
            prompts = [prompt.encode(llms["auto"].tokenizer) for prompt in loaded]
            rates(engines, prompts, params)  # warms up
            repeats = [rates(engines, prompts, params) for _ in range(arguments.repeats)]
            by_draft = {draft: [repeat[draft] for repeat in repeats] for draft in engines}
            yield Cell(batch=batch, temperature=temperature, set=name, against=against, rates=by_draft)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", help="auto: as the checkpoint comes")
    parser.add_argument("--quantize", choices=["q8", "q4"])
    parser.add_argument("--against", default="none", choices=[d for d in get_args(DraftChoice) if d != "auto"])
    parser.add_argument("--sets", default="alpaca,gsm8k,humaneval,mt_bench")
    parser.add_argument("--temperatures", default="0,0.7,1.2")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    sets = arguments.sets.split(",")
    if unknown := [name for name in sets if name not in PROMPT_SETS]:
        parser.error(f"--sets has {unknown[0]!r}; choose of {', '.join(PROMPT_SETS)}")
    try:
        temperatures = [float(value) for value in arguments.temperatures.split(",")]
        batches = [int(value) for value in arguments.batches.split(",")]
    except ValueError as error:
        parser.error(f"--temperatures and --batches are numbers with commas between ({error})")
    if min(batches) < 1 or arguments.repeats < 1 or arguments.num_tokens < 2:
        parser.error("--batches and --repeats must be at least 1, --num-tokens at least 2")
    found: list[Cell] = []
    try:
        bandwidth = measure_read_bandwidth(arguments.threads)
        for batch in batches:
            for cell in compare(batch, temperatures, sets, arguments):
                found.append(cell)
                print(cell, flush=True)
    except HopskipError as error:
        print(f"auto: error: {error}", file=sys.stderr)
        return 2
    for batch in batches:
        for temperature in temperatures:
            own = [cell.ratio for cell in found if (cell.batch, cell.temperature) == (batch, temperature)]
            print(f"batch {batch:3}  temperature {temperature:3g}  mean of sets {mean(own):5.2f} x {arguments.against}")
    machine = describe_machine(arguments.threads, bandwidth)
    report = {"machine": machine, "versions": versions(), "settings": vars(arguments)}
    print(json.dumps({**report, "found": [asdict(cell) | {"ratio": cell.ratio} for cell in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
