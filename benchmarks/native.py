"""Speed of the native engine's passes: ms, GB/s and share of the machine's read bandwidth, per precision.

Random weights of a chosen shape (speed does not depend on their values), or a checkpoint with --model. Every figure is
a median of passes taken in turns, so that other load on the machine hits all alike. The last line is one JSON object.

    python benchmarks/native.py --precisions bfloat16,q8,q4 --threads 2
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hopskip.cache import Cache, Rows, Segment
from hopskip.config import ModelConfig
from hopskip.native import NativeModel
from hopskip.packed import PackedWeights
from hopskip.quantize import Packed, pack, quantize_q4, quantize_q8
from hopskip.rope import RopeConfig
from hopskip.weights import expected_tensors, open_checkpoint

SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, head dim, vocabulary
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256),
}
CONTEXT = 8192
LONG, SHORT = 7000, 100  # positions already in the cache


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
    packed: dict[tuple[int, ...], Packed] = {}
    matrices: dict[str, Packed] = {}
    vectors: dict[str, Tensor] = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            vectors[name] = torch.ones(shape)
            continue
        if shape not in packed:
            weight = torch.randn(shape) * shape[1] ** -0.5
            if precision in ("q8", "q4"):
                packed[shape] = pack((quantize_q8 if precision == "q8" else quantize_q4)(weight), shape[1])
            else:
                packed[shape] = pack(weight.to(getattr(torch, precision)), shape[1])
        first = packed[shape]
        matrices[name] = Packed(first.format, first.rows, first.cols, first.data.clone())
    return PackedWeights(config, matrices, vectors)


def read_bandwidth(threads: int) -> float:
    """GB/s that plain reading of 512 MiB reaches with the threads: the limit that passes are measured against."""
    data = torch.ones(1 << 29, dtype=torch.uint8).view(torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        data.max()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return data.nbytes / min(seconds) / 1e9


def passes(model: NativeModel, cache: Cache) -> dict[str, Callable[[], object]]:
    """Name -> one pass: all layers, and the head for the rows that would need it."""
    layers = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)

    def decode(rows: Rows) -> Callable[[], object]:
        ids = torch.randint(0, model.config.vocab_size, (len(rows),), generator=generator)
        return lambda: model.greedy(model.run_layers(model.embed(ids), 0, layers, rows, cache))

    def prefill(count: int) -> Callable[[], object]:
        ids = torch.randint(0, model.config.vocab_size, (count,), generator=generator)
        rows = Rows([Segment(0, 0, count)])
        return lambda: model.greedy(model.run_layers(model.embed(ids), 0, layers, rows, cache)[-1:])

    def draft() -> object:
        return model.draft_greedy(torch.tensor([1]), Rows([Segment(0, SHORT, 1)]), [4], cache, exit_layer=6)

    found = {f"rows {m}": decode(Rows([Segment(0, SHORT, m)])) for m in (1, 2, 4, 6, 8, 16)}
    found["16 sequences"] = decode(Rows(Segment(slot, SHORT, 1) for slot in range(16)))
    found["draft 4 x 6 layers"] = draft
    found["context 7000"] = decode(Rows([Segment(0, LONG, 1)]))
    found["prefill 512"] = prefill(512)
    return found


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            for _ in range(1 if name.startswith("prefill") else 3):
                start = time.perf_counter()
                run()
                if repeat:  # the first round warms up
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of random weights")
    parser.add_argument("--precisions", default="float32,bfloat16,q8,q4")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()

    report: dict[str, object] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    for precision in arguments.precisions.split(","):
        if arguments.model:
            model = NativeModel.load(open_checkpoint(arguments.model), precision, arguments.threads)
        else:
            config = shape_config(arguments.shape)
            model = NativeModel(config, random_weights(config, precision), arguments.threads)
        cache = model.new_cache(16, CONTEXT)
        for tensor in (cache.k_LSHTD, cache.v_LSHTD):  # what a long context would have left there
            tensor[:, 0].normal_()
            tensor[:, 1:, :, : SHORT + 1].normal_()
        bandwidth = read_bandwidth(model.threads)
        times = measure(passes(model, cache), arguments.repeats)
        one = times["rows 1"]
        rate = model.weight_bytes / one / 1e6
        print(
            f"\n{precision}: {model.weight_bytes / 1e6:.0f} MB per pass, {model.isa}, {model.threads} threads; "
            f"{rate:.1f} GB/s, {rate / bandwidth:.0%} of {bandwidth:.1f}"
        )
        for name, milliseconds in times.items():
            print(f"  {name:20} {milliseconds:9.2f} ms  {milliseconds / one:6.2f} x one row")
        report[precision] = {
            "isa": model.isa, "threads": model.threads, "weight_bytes": model.weight_bytes,
            "read_bandwidth_gb_s": bandwidth, "gb_s": rate, "bandwidth_share": rate / bandwidth, "ms": times,
        }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
