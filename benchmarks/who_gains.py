"""What drafting may be expected to gain, by the size of a model and how it is stored: the table of docs/faq.md.

    python -m benchmarks.who_gains

By arithmetic on bytes, as `hopskip info` does it: nothing is loaded. Hours to train an exit are for this machine.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.random_model import hf_config
from hopskip.bench.expected import model_costs
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.stored import BLOCK_TYPES, StoredTensor
from hopskip.cli.gains import expected_gains, memory
from hopskip.machine import cpu_name, num_usable_cores

STORED = ("BF16", "Q8_0", "Q4_K")


def header_only(shape: str, stored: str) -> Checkpoint:
    """A model of a shape, all of whose weights are of one type, without any weights."""
    config = ModelConfig.from_hf(hf_config(shape))
    block = next(block for block in BLOCK_TYPES.values() if block.name == stored)
    place = Path("nowhere")
    tensors = {name: StoredTensor(place, 0, block, size) for name, size in expected_tensors(config).items()}
    return Checkpoint(place, config, tensors, fingerprint="")


def main() -> None:
    print(f"{cpu_name()}, {num_usable_cores()} cores\n")
    print("| model | stored as | a pass reads | exit of its own | copy in 8 or 4 bits | lookup | training the exit |")
    print("|---|---|---|---|---|---|---|")
    for shape in ("1b", "8b"):
        for stored in STORED:
            checkpoint = header_only(shape, stored)
            costs = model_costs(checkpoint, "native", "auto")
            copies = {name: model_costs(checkpoint, "native", name).bytes_per_pass for name in ("q8", "q4")}
            useful = {name: size for name, size in copies.items() if size < costs.bytes_per_pass}
            found = expected_gains(
                *(costs, checkpoint.config, None),
                copy_bytes=useful, exit_layer=None, is_native=True, measured=None,
            )  # fmt: skip
            ranges = {kind: [] for kind in ("exit-branch", "layer-skip", "ngram")}  # type: dict[str, list[float]]
            for gain in found.gains:
                ranges[gain.source.kind] += [gain.low, gain.high]
            cells = [f"{max(1.0, min(r)):.1f} to {max(r):.1f} x" if r else "none" for r in ranges.values()]
            hours = found.work.seconds(found.flops_per_second) / 3600
            read = memory(costs.bytes_per_pass)
            print(f"| {shape.upper()} | {stored} | {read} | {' | '.join(cells)} | about {hours:,.0f} h |")


if __name__ == "__main__":
    main()
