"""Speed of the native engine's passes: ms, and the share of the machine's read bandwidth, per precision.

Random weights of a chosen shape (speed does not depend on their values), or a checkpoint with --model. Every figure is
a median of passes taken in turns, so that other load on the machine hits all alike. Plain reading of the same weights
takes its turn among them; its median is the bandwidth that passes are measured against. (Of the same, as on virtual
machines some memory may be nearer than other.) The last line is one JSON object.

    python -m benchmarks.native --precisions bfloat16,q8,q4 --threads 2
    python -m benchmarks.native --precisions bfloat16,q8,q4 --contexts    # rows by context, prefill far inside a text
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hopskip.backends.base import DraftTask
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.formats import choose_format
from hopskip.backends.native.packed import PackedWeights
from hopskip.backends.native.packing import Packed, Packer, aligned
from hopskip.backends.rows import Rows, Segment
from hopskip.bench.turns import medians, take_turns
from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit

SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, head dim, vocabulary
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256),
}
CONTEXT = 8192
LONG, SHORT = 7000, 100  # positions already in the cache
ROWS_AT, ROWS = (64, 512, 1024, 4096), (1, 5, 8)
DRAFT_LAYERS, DRAFT_STEPS, DRAFT_VOCABULARY = 6, 4, 8192


def shape_config(name: str) -> ModelConfig:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[name]
    return ModelConfig(
        model_type="llama", vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, rope=RopeConfig(head_dim=head_dim, rope_theta=100_000.0),
        tie_word_embeddings=True,
    )  # fmt: skip


def random_weights(config: ModelConfig, precision: str) -> PackedWeights:
    """One random matrix per shape, copied for each layer: quantizing all of them would take minutes."""
    packer = Packer()
    packed: dict[tuple[int, ...], Packed] = {}
    matrices: dict[str, Packed] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            vectors[name] = np.ones(shape, dtype=np.float32)
            continue
        if shape not in packed:
            weight = torch.randn(shape) * shape[1] ** -0.5
            packed[shape] = packer.pack_array(weight.numpy(), choose_format("F32", name, precision))
        matrices[name] = packed[shape]
    return PackedWeights(config, matrices, vectors)


def in_one_piece(weights: PackedWeights) -> tuple[PackedWeights, Tensor]:
    """The same weights in one stretch of memory, each matrix a copy of its own, and that, int64."""
    parts = [matrix.data for matrix in weights.matrices.values()]
    whole = aligned(sum(part.nbytes for part in parts)).view(np.int32)
    matrices: dict[str, Packed] = {}
    at = 0
    for name, m in weights.matrices.items():
        room = whole[at : at + m.data.size].reshape(m.data.shape)
        room[:] = m.data
        matrices[name] = Packed(m.format, m.rows, m.cols, room)
        at += m.data.size
    return PackedWeights(weights.config, matrices, weights.vectors), torch.from_numpy(whole.view(np.int64))


def trimmed_exit(config: ModelConfig) -> TrainedExit:
    """The model's first layers and some rows of its own head."""
    return TrainedExit(
        config=ExitConfig(start=DRAFT_LAYERS, num_layers=0),
        vocabulary=np.arange(min(DRAFT_VOCABULARY, config.vocab_size), dtype=np.int32),
        layers=[],
        mixing={},
        fingerprint="",
        num_draft_tokens=DRAFT_STEPS,
    )


def passes(backend: NativeBackend, by_context: bool) -> dict[str, Callable[[], object]]:
    """Name -> one pass: all layers, and the head for the rows that would need it; and one draft of several steps."""
    generator = torch.Generator().manual_seed(0)
    alone, many = backend.new_cache(1, CONTEXT), backend.new_cache(16, 2 * SHORT)
    for cache in (alone, many):
        cache.clear()  # memory that was never written is not read from memory either

    def random_ids(count: int) -> list[int]:
        ids: list[int] = torch.randint(0, backend.config.vocab_size, (count,), generator=generator).tolist()
        return ids

    def decode(count: int, start: int) -> Callable[[], object]:
        ids, rows = random_ids(count), Rows([Segment(0, start, count)])
        return lambda: backend.greedy(backend.forward(ids, rows, alone).hidden_ND)

    def prefill(start: int) -> Callable[[], object]:
        ids, rows = random_ids(512), Rows([Segment(0, start, 512)])
        return lambda: backend.greedy(backend.forward(ids, rows, alone).hidden_ND[-1:])

    if by_context:
        found = {f"{m} row{'s'[: m - 1]} at {start}": decode(m, start) for start in ROWS_AT for m in ROWS}
        found["1 row at 8190"] = decode(1, 8190)
        found["prefill 512"] = prefill(0)
        found["prefill at 7680"] = prefill(7680)
        return found
    task = DraftTask(layers=None, token_ids=[1], rows=Rows([Segment(0, SHORT, 1)]), limits=[DRAFT_STEPS])
    each_ids, each = random_ids(16), Rows(Segment(slot, SHORT, 1) for slot in range(16))
    found = {f"{m} row{'s'[: m - 1]}": decode(m, SHORT) for m in (1, 2, 4, 6, 8, 16)}
    found["16 sequences"] = lambda: backend.greedy(backend.forward(each_ids, each, many).hidden_ND)
    found["context 7000"] = decode(1, LONG)
    found["draft"] = lambda: backend.draft(task, alone)
    found["prefill 512"] = prefill(0)
    return found


def draft_share(weights: PackedWeights) -> float:
    """Bytes of weights of a draft step over those of a full pass."""
    layers = sum(m.data.nbytes for name, m in weights.matrices.items() if name.startswith("model.layers."))
    head = weights.head
    vocabulary = min(DRAFT_VOCABULARY, head.rows)
    read = layers * DRAFT_LAYERS / weights.config.num_hidden_layers + head.data.nbytes * vocabulary / head.rows
    return read / (layers + head.data.nbytes)


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns of a few runs."""
    found = take_turns({name: partial(a_few, name, run) for name, run in runs.items()}, range(repeats))
    return {name: list(chain.from_iterable(turns)) for name, turns in found.items()}


def a_few(name: str, run: Callable[[], object], _turn: int) -> list[float]:
    """Milliseconds of the runs of a turn. As in a loop of decoding, a pass follows one of its own kind: the first run,
    which finds the caches as another has left them, is not counted."""
    run()
    times = []
    for _ in range(1 if name.startswith("prefill") else 3):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def report_on(
    backend: NativeBackend, weights: PackedWeights, whole: Tensor, repeats: int, by_context: bool
) -> dict[str, object]:
    backend.attach_exit(trimmed_exit(backend.config))
    traits = backend.traits
    torch.set_num_threads(traits.threads)
    ms = medians(measure({"read": whole.sum, **passes(backend, by_context)}, repeats))
    bandwidth = whole.nbytes / ms.pop("read") / 1e6
    if not by_context:
        ms["draft step"] = ms.pop("draft") / DRAFT_STEPS
    one = ms[f"1 row at {ROWS_AT[0]}" if by_context else "1 row"]
    kv_bytes = backend.new_cache(1, 1).bytes_per_position
    positions_of = {"1 row": SHORT, "context 7000": LONG, "1 row at 8190": 8190}
    positions_of |= {f"1 row at {start}": start for start in ROWS_AT}
    shares = {
        name: (traits.bytes_per_pass + kv_bytes * positions) / ms[name] / 1e6 / bandwidth
        for name, positions in positions_of.items()
        if name in ms
    }
    return {
        "isa": traits.instruction_set,
        "threads": traits.threads,
        "kv_dtype": backend.kv_dtype,
        "weight_bytes": traits.bytes_per_pass,
        "kv_bytes_per_position": kv_bytes,
        "read_bandwidth_gb_s": bandwidth,
        "bandwidth_share": shares,
        "ms": ms,
        "over_one_row": {name: value / (ms.get(_one_row_beside(name)) or one) for name, value in ms.items()},
        "draft_step_over_its_share": ms["draft step"] / (one * draft_share(weights)) if "draft step" in ms else None,
    }


def _one_row_beside(name: str) -> str:
    """At the same context, if the name has one."""
    return f"1 row at {name.rpartition(' at ')[2]}"


def show(precision: str, report: Any) -> None:
    print(
        f"\n{precision}: {report['weight_bytes'] / 1e6:.0f} MB per pass, {report['kv_dtype']} keys and values, "
        f"{report['isa']}, {report['threads']} threads; reading reaches {report['read_bandwidth_gb_s']:.1f} GB/s"
    )
    for name, ms in report["ms"].items():
        share = report["bandwidth_share"].get(name)
        note = f"{share:.0%} of the bandwidth" if share else ""
        if name == "draft step":
            note = f"{report['draft_step_over_its_share']:.2f} x its share of the bytes"
        print(f"  {name:15} {ms:9.2f} ms  {report['over_one_row'][name]:6.2f} x one row  {note}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of random weights")
    parser.add_argument("--precisions", default="float32,bfloat16,q8,q4")
    parser.add_argument("--contexts", action="store_true", help="rows by context instead")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--kv-dtype", choices=["float32", "bfloat16", "int8"], default=None)
    parser.add_argument("--json", action="store_true", help="print the JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()

    kv_dtype = getattr(torch, arguments.kv_dtype) if arguments.kv_dtype else None
    report: dict[str, object] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    for precision in arguments.precisions.split(","):
        if arguments.model:
            weights = PackedWeights.load(open_checkpoint(arguments.model), precision)
        else:
            weights = random_weights(shape_config(arguments.shape), precision)
        weights, whole = in_one_piece(weights)
        backend = NativeBackend(weights.config, weights, arguments.threads, kv_dtype)
        found = report_on(backend, weights, whole, arguments.repeats, arguments.contexts)
        report[precision] = found
        if not arguments.json:
            show(precision, found)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
