"""Time from starting a process to the first byte of its answer: `hopskip generate` against a few lines of transformers.

Both run the default model's GGUF file from disk, in turn. Needs the `eval` extra (transformers reads a GGUF file only
with accelerate).

    python benchmarks/cold_start.py 3
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version

from hopskip.bench.turns import medians, take_turns
from hopskip.checkpoint.hub import find_model

PROMPT = "Why is the sky blue?"
TRANSFORMERS = f"""
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

path = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
chat = [{{"role": "user", "content": {PROMPT!r}}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
model.generate(**inputs, max_new_tokens=16, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
"""


def seconds_to_first_byte(command: list[str], _turn: int = 0) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{command[:3]} gave no answer (exit code {process.returncode})")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repeats", type=int, nargs="?", default=5, help="runs of each (default: 5)")
    repeats = parser.parse_args().repeats
    if repeats < 1:
        parser.error("REPEATS must be at least 1")
    commands = {
        "hopskip": [sys.executable, "-m", "hopskip", "generate", "--max-new-tokens", "16", PROMPT],
        "transformers": [sys.executable, "-c", TRANSFORMERS, str(find_model())],
    }
    contenders = {name: partial(seconds_to_first_byte, command) for name, command in commands.items()}
    take_turns(contenders, range(1))  # files come from the disk once
    seconds = take_turns(contenders, range(repeats))
    middle = medians(seconds)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("hopskip", "torch", "transformers")},
        "seconds_to_first_byte": {name: {"median": middle[name], "runs": seconds[name]} for name in commands},
        "ratio": middle["transformers"] / middle["hopskip"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
