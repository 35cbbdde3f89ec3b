"""What drafting costs where it brings nothing: `auto` over no drafting, several sequences at once.

    python -m benchmarks.batches                         # about ten minutes on two cores
    python -m benchmarks.batches --precision q8 --num-seqs 16 32

The two take turns, each batch by both before the next; decoding alone counts, prompts apart, and the ratio is the
median over the batches. Both write the same tokens, or the run fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import cycle, islice
from statistics import median

from benchmarks.sampling import PLAIN, PRECISIONS, chats
from hopskip import LLM, SamplingParams
from hopskip.bench.machine import describe_machine, measure_read_bandwidth
from hopskip.engine.engine import Engine
from hopskip.machine import num_usable_cores
from hopskip.sequence import Request


def decode(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[float, list[list[int]]]:
    """Tokens per second after the prompts, and the tokens."""
    sequences = [engine.add(Request(ids, each)) for ids, each in zip(prompts, params, strict=True)]
    while any(not sequence.is_prefilled for sequence in sequences):
        engine.step()
    num_before = sum(len(sequence.tokens) for sequence in sequences)
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - started
    tokens = [[token.id for token in sequence.tokens] for sequence in sequences]
    return (sum(map(len, tokens)) - num_before) / seconds, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    threads = num_usable_cores()
    print(describe_machine(threads, measure_read_bandwidth(threads)))
    print("precision, temperature, at once: tokens/s without drafts, with auto, ratio (median, lowest, highest)")
    most = max(arguments.num_seqs)
    for precision in arguments.precision or ("bf16", "q8"):
        plain, auto = (
            LLM(max_num_seqs=most, speculative=speculative, **PRECISIONS[precision]) for speculative in (PLAIN, None)
        )
        prompts = [plain.tokenizer.apply_chat_template(chat) for chat in chats(8)]
        for temperature in arguments.temperature:
            for num_seqs in arguments.num_seqs:
                rates: list[tuple[float, float]] = []
                for repeat in range(arguments.repeats + 1):
                    chosen = list(islice(cycle(prompts), repeat * num_seqs, (repeat + 1) * num_seqs))
                    params = [
                        SamplingParams(
                            max_new_tokens=arguments.num_tokens,
                            ignore_eos=True,
                            temperature=temperature,
                            seed=repeat * num_seqs + i if temperature else None,
                        )
                        for i in range(num_seqs)
                    ]
                    sides = [plain, auto] if repeat % 2 else [auto, plain]
                    found = {side: decode(side.engine, chosen, params) for side in sides}
                    assert found[plain][1] == found[auto][1], "a draft has changed a text"
                    rates.append((found[plain][0], found[auto][0]))
                del rates[0]  # a warm-up
                ratios = sorted(drafted / undrafted for undrafted, drafted in rates)
                print(
                    f"{precision:8} T={temperature:<4} {num_seqs:3}: {median(r[0] for r in rates):7.1f} "
                    f"{median(r[1] for r in rates):7.1f}   {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
