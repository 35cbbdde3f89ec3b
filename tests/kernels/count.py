"""Instructions that a product of packed weights takes on ARM: counted one by one under qemu-aarch64.

What they cost is a model, not a measurement: a core starts so many instructions in a cycle, has so many pipes for
vectors and for memory, and a strip of weights takes as long as its bytes take to arrive if that is longer. Waits for
results are left out.

    python -m tests.kernels.count PROGRAM [QEMU [OBJDUMP]]
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

ROWS = (1, 2, 4, 8)
FORMATS = ("q8", "q4")
ISAS = ("neon_dotprod", "neon_i8mm")


class Core(NamedTuple):
    name: str
    width: int
    """Instructions that start in a cycle."""
    vector_pipes: int
    memory_pipes: int
    bytes_per_cycle: float
    """Of memory, if all such cores read at once: bandwidth / cores / frequency."""


CORES = (
    Core("Raspberry Pi 5 (Cortex-A76)", 4, 2, 2, 17.1 / 4 / 2.4),
    Core("Graviton 2 (Neoverse N1)", 4, 2, 2, 204.8 / 64 / 2.5),
    Core("Apple M1", 8, 4, 3, 68.3 / 4 / 3.2),
)


class Count(NamedTuple):
    """Of one product of a strip."""

    instructions: int
    vector: int
    memory: int
    weight_bytes: int

    def cycles(self, core: Core) -> float:
        """If the weights are in the first-level cache."""
        return max(self.instructions / core.width, self.vector / core.vector_pipes, self.memory / core.memory_pipes)

    def cycles_from_memory(self, core: Core) -> float:
        return max(self.cycles(core), self.weight_bytes / core.bytes_per_cycle)


def disassembled(program: str, objdump: str) -> dict[int, str]:
    """Address -> instruction."""
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", program], capture_output=True, text=True, check=True)
    return {int(m[1], 16): m[2] for m in re.finditer(r"^ *([0-9a-f]+):\t(.*)$", text.stdout, flags=re.MULTILINE)}


def executed(qemu: str, command: list[str]) -> tuple[Counter[int], int]:
    """How often each address was executed, and the bytes of weights that the program names."""
    # one instruction per block of translated code, each of which is logged
    log = subprocess.Popen(
        [qemu, "-cpu", "max", "-singlestep", "-d", "exec,nochain", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert log.stderr is not None
    assert log.stdout is not None
    counts = Counter(line.split("/", 2)[1] for line in log.stderr if line.startswith("Trace"))
    weight_bytes = int(log.stdout.read())
    if log.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return Counter({int(address, 16): count for address, count in counts.items()}), weight_bytes


def count(program: str, qemu: str, code: dict[int, str], isa: str, format_name: str, rows: int) -> Count:
    """What a second product adds to the first."""
    command = [program, "count", isa, format_name, str(rows)]
    once, _ = executed(qemu, [*command, "1"])
    twice, weight_bytes = executed(qemu, [*command, "2"])
    twice.subtract(once)
    instructions = vector = memory = 0
    for address, times in twice.items():
        is_memory = re.match(r"ld|st|prfm", code[address]) is not None
        uses_vectors = re.search(r"\b[vqds]\d+\b", code[address]) is not None
        instructions += times
        memory += times * is_memory
        vector += times * (uses_vectors and (not is_memory or code[address].startswith("ld1r")))
    return Count(instructions, vector, memory, weight_bytes)


def main(program: str, qemu: str = "qemu-aarch64-static", objdump: str = "aarch64-linux-gnu-objdump") -> None:
    code = disassembled(program, objdump)
    for isa in ISAS:
        for format_name in FORMATS:
            counts = [count(program, qemu, code, isa, format_name, rows) for rows in ROWS]
            one = counts[0]
            print(f"\n{isa}, {format_name}: a strip of {one.weight_bytes} bytes, in multiples of one row")
            print(f"{'rows':46}" + "".join(f"{rows:>8}" for rows in ROWS))
            print(f"{'instructions':46}" + "".join(f"{c.instructions:>8}" for c in counts))
            ratios = [("instructions", [c.instructions / one.instructions for c in counts])]
            for core in CORES:
                ratios += [
                    (f"{core.name}, from cache", [c.cycles(core) / one.cycles(core) for c in counts]),
                    (f"{core.name}, from memory",
                     [c.cycles_from_memory(core) / one.cycles_from_memory(core) for c in counts]),
                ]  # fmt: skip
            for name, values in ratios:
                print(f"{name:46}" + "".join(f"{value:>8.2f}" for value in values))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        raise SystemExit("usage: python -m tests.kernels.count PROGRAM [QEMU [OBJDUMP]]")
    main(*sys.argv[1:])
