"""From starting a process to the first token of a model, when its weights are packed for the first time and when they
are packed already, and what memory it takes:

    python -m benchmarks.random_model 8b --shape 8b
    python -m benchmarks.first_start 8b --quantize q4 q8

The checkpoint is read once before, into the system's file cache. Packed weights go to a folder of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hopskip.machine import cpu_name

_START = """
import sys
from pathlib import Path
from hopskip import LLM, SamplingParams, SpeculativeConfig
llm = LLM(sys.argv[1], quantize=sys.argv[2], speculative=SpeculativeConfig(draft="none"))
llm.generate(["Hello"], SamplingParams(max_new_tokens=1, ignore_eos=True))
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(fields["RssAnon"].split()[0]) / 1e6)
"""


def start(model: Path, quantize: str, cache: str) -> tuple[float, float]:
    """Seconds, and gigabytes that are not mapped files."""
    started = time.perf_counter()
    command = [sys.executable, "-c", _START, str(model), quantize]
    done = subprocess.run(command, env={**os.environ, "HOPSKIP_CACHE": cache}, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started, float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["q4", "q8"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(cpu_name())
    for quantize in arguments.quantize:
        for file in arguments.model.glob("*.safetensors"):
            with file.open("rb") as content:
                while content.read(1 << 24):
                    pass
        with tempfile.TemporaryDirectory() as cache:
            starts = [start(arguments.model, quantize, cache) for _ in range(arguments.repeats + 1)]
        later = ", ".join(f"{seconds:.1f}" for seconds, _ in starts[1:])
        memory = max(size for _, size in starts)
        print(
            f"{quantize}: first start {starts[0][0]:.1f} s, later ones {later} s; {memory:.2f} GB beside mapped files"
        )


if __name__ == "__main__":
    main()
