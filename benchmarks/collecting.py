"""Collecting an exit's training data from answers that are given, beside decoding the same answers.

    python -m benchmarks.collecting                      # a few minutes on two cores
    python -m benchmarks.collecting --model M --precision q8

The model answers prompts of the four sets, many at once, and keeps its hidden states; then whole passes over the same
texts make the same states. The two take turns. Prints one JSON object: seconds and tokens (prompts and answers) of
both, and the ratio of their speeds, median of the turns. Needs `hopskip[train]`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from statistics import median

from hopskip.bench.machine import describe_machine, measure_read_bandwidth
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.loading import LoadConfig, load_backend
from hopskip.prompts import PROMPT_SETS, load_prompts
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.exit.answers import OwnAnswers
from hopskip.train.exit.recipe import Branch
from hopskip.train.exit.rule import FEATURES
from hopskip.train.exit.states import TeacherForced
from hopskip.train.exit.turns import Chat, Turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--num-prompts", type=int, default=16, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    checkpoint = open_checkpoint(find_model(args.model))
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    is_packed = args.precision in ("q8", "q4")
    load = LoadConfig(
        model=args.model,
        dtype="auto" if is_packed else args.precision,
        quantize=args.precision if is_packed else None,
        threads=args.threads,
    )
    backend = load_backend(checkpoint, load)
    depth = checkpoint.config.num_hidden_layers
    taps = sorted({*Branch(start=0, num_layers=1, features=FEATURES).of(depth).taps, depth})
    turns = Turns(tokenizer=tokenizer, max_prompt_tokens=1024, max_new_tokens=args.max_new_tokens)
    texts = [str(prompt.content) for name in PROMPT_SETS[:4] for prompt in load_prompts(name, args.num_prompts)]
    chats = [Chat(({"role": "user", "content": text},)) for text in texts]
    decode = OwnAnswers(
        backend,
        taps,
        max_new_tokens=args.max_new_tokens,
        max_length=1024 + args.max_new_tokens,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    read = TeacherForced(backend, taps)
    decoding, reading = [], []
    for _ in range(args.turns):
        started = time.perf_counter()
        found = [turn for own in decode([turns.dialogue(chat) for chat in chats]) for turn in own]
        decoding.append(time.perf_counter() - started)
        started = time.perf_counter()
        read([replace(turn, states_TAD=None) for turn in found])
        reading.append(time.perf_counter() - started)
    result = {
        "machine": describe_machine(backend.traits.threads, measure_read_bandwidth(backend.traits.threads)),
        "precision": args.precision,
        "texts": len(found),
        "tokens": sum(len(turn.ids_T) for turn in found),
        "answer_tokens": sum(turn.num_answer_tokens for turn in found),
        "decoding_seconds": [round(seconds, 2) for seconds in decoding],
        "reading_seconds": [round(seconds, 2) for seconds in reading],
        "reading_over_decoding": round(median(d / r for d, r in zip(decoding, reading, strict=True)), 2),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
