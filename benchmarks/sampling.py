"""What sampling costs beside greedy decoding, and what drafting brings it.

    python -m benchmarks.sampling                        # a quarter of an hour on two cores
    python -m benchmarks.sampling --section rounds --precision q8

Sections: `rounds` (milliseconds of a round of one request, plain and with a draft of the trained exit, k = 4), `batch`
(sixteen requests at once, nothing drafted), `auto` (default drafting over plain decoding, four prompt sets), `served`
(the same through two servers, one client, a seed, with and without a JSON schema) and `vocabulary` (Llama-3.2-1B's
shape, 128k tokens, random weights: the worst case for a nucleus). Settings take turns, greedy among them; figures are
medians, and ratios over greedy. The tokens that each draws differ, so `rounds` compares rounds of the same number of
rows. Needs `hopskip[serve,eval]`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.against_others import LLAMA_1B, write_random_q8_0
from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.bench.machine import describe_machine, measure_read_bandwidth
from hopskip.draft.base import Round
from hopskip.machine import num_usable_cores
from hopskip.prompts import PROMPT_SETS, load_prompts

PRECISIONS: dict[str, dict[str, Any]] = {"bf16": {"dtype": "bfloat16"}, "q8": {"quantize": "q8"}, "default": {}}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "T=0.7": {"temperature": 0.7},
    "top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top_k 40": {"temperature": 0.7, "top_k": 40},
    "min_p 0.05": {"temperature": 0.7, "min_p": 0.05},
    "top_p, repetition 1.1": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
}
PLAIN = SpeculativeConfig(draft="none")
DRAFTED = SpeculativeConfig(draft="exit-branch", num_draft_tokens=4, num_runner_ups=0)


def params_of(setting: str, max_new_tokens: int, seed: int = 0) -> SamplingParams:
    chosen = SETTINGS[setting]
    drawn = {**chosen, "seed": seed} if "temperature" in chosen else chosen
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **drawn)


def chats(num_per_set: int) -> list[Any]:
    rows = zip(*(load_prompts(name, num_per_set) for name in PROMPT_SETS[:4]), strict=True)
    contents = [prompt.content for row in rows for prompt in row]
    return [[{"role": "user", "content": c}] if isinstance(c, str) else list(c) for c in contents]


def in_turn(turn: int) -> list[str]:
    """The settings, each turn beginning with another."""
    names = list(SETTINGS)
    return [*names[turn % len(names) :], *names[: turn % len(names)]]


def round_times(llm: LLM, prompts: list[Any], num_rows: int, max_new_tokens: int = 48) -> dict[str, float]:
    """Milliseconds of a round of so many rows, by setting."""
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    rounds: list[Round] = []
    llm.engine.on_round = rounds.append
    for index, prompt in enumerate(prompts):
        for setting in in_turn(index):
            rounds.clear()
            llm.generate([prompt], params_of(setting, max_new_tokens, index))
            # the first rounds of a request meet a cold cache
            seconds[setting] += [each.seconds for each in rounds[2:] if each.num_rows == num_rows]
    llm.engine.on_round = None
    return {setting: 1000 * median(values) for setting, values in seconds.items()}


def rounds(precision: dict[str, Any]) -> Iterator[str]:
    prompts = chats(2)
    for name, config, num_rows in (("plain", PLAIN, 1), ("drafted", DRAFTED, 5)):
        llm = LLM(speculative=config, **precision)
        round_times(llm, prompts[:1], num_rows)
        yield from table(f"{name} round, ms", round_times(llm, prompts, num_rows))


def batch(precision: dict[str, Any]) -> Iterator[str]:
    llm = LLM(speculative=PLAIN, max_num_seqs=16, **precision)
    prompts = chats(4)
    rates: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for repeat in range(len(SETTINGS) + 1):
        for setting in in_turn(repeat):
            params = [params_of(setting, 48, repeat * 16 + i) for i in range(16)]
            found: list[Round] = []
            llm.engine.on_round = found.append
            llm.generate(prompts, params)
            # prompts apart: rounds of all sixteen
            whole = [each for each in found if each.num_rows == 16]
            rates[setting].append(median(16 / each.seconds for each in whole))
    yield from table("16 at once, tokens/s", {s: median(r[1:]) for s, r in rates.items()}, more_is_better=True)


def auto(precision: dict[str, Any]) -> Iterator[str]:
    sides = {"plain": LLM(speculative=PLAIN, **precision), "auto": LLM(**precision)}
    prompts = chats(6)
    for setting in ("greedy", "T=0.7", "top_p 0.9"):
        seconds = dict.fromkeys(sides, 0.0)
        tokens, passes = 0, 0
        for index, prompt in enumerate([prompts[0], *prompts]):
            for name in sides if index % 2 else reversed(sides):
                started = time.perf_counter()
                result = sides[name].generate([prompt], params_of(setting, 96, index))[0]
                if index:  # the first is a warm-up
                    seconds[name] += time.perf_counter() - started
                    tokens += (result.stats.num_tokens - 1) * (name == "auto")
                    passes += result.stats.num_target_passes * (name == "auto")
        speedup = seconds["plain"] / seconds["auto"]
        yield f"{setting:24} auto over plain {speedup:5.2f} x, {tokens / passes:.2f} tokens a pass"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer"},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 2, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}, "country": {"type": "string", "maxLength": 30}},
            "required": ["city", "country"],
        },
    },
    "required": ["name", "age", "hobbies", "address"],
}
PEOPLE = (
    "a doctor",
    "a pirate",
    "a young painter",
    "a retired teacher",
    "a chess player",
    "a farmer",
    "a spy",
    "a baker",
)


@contextmanager
def server(llm: LLM) -> Iterator[httpx.Client]:
    from hopskip.serve.app import create_app
    from hopskip.serve.run import Runner, bind
    from hopskip.serve.settings import ServeSettings

    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    runner = Runner(
        create_app(llm, ServeSettings(model_name="default")), host="127.0.0.1", port=port, shutdown_timeout=0
    )
    thread = threading.Thread(target=lambda: asyncio.run(runner.serve([listener])), daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        yield client
    runner.should_exit = True
    thread.join()


def served(precision: dict[str, Any]) -> Iterator[str]:
    people = [
        [{"role": "user", "content": f"Describe {person} as JSON with name, age, hobbies, address."}]
        for person in PEOPLE
    ]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    cases: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "a seed": (chats(4), {"ignore_eos": True}),
        "a JSON schema": (people, {"response_format": schema}),
    }
    with server(LLM(speculative=PLAIN, **precision)) as plain, server(LLM(**precision)) as auto:
        for case, (prompts, more) in cases.items():
            seconds = {plain: 0.0, auto: 0.0}
            for index, prompt in enumerate([prompts[0], *prompts]):
                answers = []
                for client in (plain, auto) if index % 2 else (auto, plain):
                    body = {
                        "messages": prompt,
                        "max_tokens": 96,
                        "temperature": 0.7,
                        "top_p": 0.9,
                        "seed": index,
                        **more,
                    }
                    started = time.perf_counter()
                    answer = client.post("/v1/chat/completions", json=body).json()
                    seconds[client] += (time.perf_counter() - started) * (index > 0)  # the first is a warm-up
                    answers.append(answer["choices"][0]["message"]["content"])
                assert answers[0] == answers[1], "a draft has changed a text"
            yield f"served, top_p 0.9, {case:14} auto over plain {seconds[plain] / seconds[auto]:5.2f} x"


def vocabulary(_: dict[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama-1b-q8_0.gguf"
        write_random_q8_0(path, LLAMA_1B)
        llm = LLM(path, speculative=PLAIN)
        prompts = [list(range(100 + i, 130 + i)) for i in range(2 * len(SETTINGS))]
        yield from table("1B shape, 128k tokens, plain round, ms", round_times(llm, prompts, 1, max_new_tokens=10))


def table(what: str, values: dict[str, float], more_is_better: bool = False) -> Iterator[str]:
    yield what
    for setting, value in values.items():
        ratio = value / values["greedy"]
        yield f"    {setting:24} {value:9.2f}   {ratio:.3f} of greedy"


SECTIONS = {"rounds": rounds, "batch": batch, "auto": auto, "served": served, "vocabulary": vocabulary}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=SECTIONS)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    arguments = parser.parse_args()
    threads = num_usable_cores()
    print(describe_machine(threads, measure_read_bandwidth(threads)))
    for section in arguments.section or SECTIONS:
        precisions = ["q8"] if section == "vocabulary" else arguments.precision or PRECISIONS
        for precision in precisions:
            print(f"\n{section}, {precision}")
            for line in SECTIONS[section](PRECISIONS[precision]):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
