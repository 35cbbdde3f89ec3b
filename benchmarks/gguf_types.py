"""How close the native engine and llama.cpp come to what a GGUF file of each type says, and how large it is in memory:

    python -m benchmarks.gguf_types --tokens 2000

The model is the default one, widened with zeros until its rows are multiples of 256 (its function stays the same), and
written in each type by llama.cpp's own quantizer (llama-cpp-python). KL is the mean divergence of the next token's
distribution from that of PyTorch in float32 on the file's dequantized weights, over prompts of the set `long`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.random_model import add_tokenizer, gguf_name, requantize
from hopskip.backends.base import Backend
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.errors import ConfigError
from hopskip.machine import cpu_name
from hopskip.prompts import load_prompts
from hopskip.text.tokenizer_files import load_tokenizer

TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_S",
    "IQ3_XXS", "Q2_K", "IQ2_S", "TQ2_0", "BF16",
)  # fmt: skip
WINDOW = 512
_MULTIPLE = 256


def write_wide(path: Path) -> None:
    """The default model in float32, with a hidden size and heads that are multiples of 256."""
    checkpoint = open_checkpoint(find_model())
    config = checkpoint.config
    hidden = -(-config.hidden_size // _MULTIPLE) * _MULTIPLE
    heads = hidden // config.head_dim
    kv_heads = heads * config.num_key_value_heads // config.num_attention_heads
    shrink = math.sqrt(config.hidden_size / hidden)  # RMSNorm divides by the mean over more elements
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps * shrink**2)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, config.vocab_size)
    for name in sorted(checkpoint.names()):
        values = load_tensor(checkpoint, name, torch.float32).numpy()
        part = name.removesuffix(".weight").rpartition(".")[2]
        rows = hidden if part in ("q_proj", "o_proj", "down_proj") else values.shape[0]
        if part in ("k_proj", "v_proj"):
            rows = kv_heads * config.head_dim
        if values.ndim == 1:
            values, rows = values * np.float32(shrink), hidden
        cols = () if values.ndim == 1 else (config.intermediate_size if part == "down_proj" else hidden,)
        wide = np.zeros((rows, *cols), dtype=np.float32)
        wide[tuple(slice(size) for size in values.shape)] = values
        if part in ("q_proj", "k_proj"):  # llama.cpp's order of rows
            wide = wide.reshape(-1, 2, config.head_dim // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(wide))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(backend: Backend, window: Seq[int]) -> Tensor:
    cache = backend.new_cache(1, len(window))
    hidden_ND = backend.forward(window, Rows([Segment(0, 0, len(window))]), cache).hidden_ND
    return torch.as_tensor(backend.logits(hidden_ND))


def llama_logits(llama: Any, window: Seq[int]) -> Tensor:
    llama.reset()
    llama.eval(list(window))
    scores: NDArray[np.float32] = llama.scores[: len(window)]
    return torch.from_numpy(scores.copy())


def divergence(exact: Tensor, found: Tensor) -> float:
    """Summed over rows."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (exact, found))
    return float((p.exp() * (p - q)).sum())


def compare(path: Path, windows: Seq[Seq[int]], threads: int) -> tuple[float, float, str]:
    """KL of the native engine and of llama.cpp, per token, and the formats that the native engine uses."""
    import llama_cpp

    checkpoint: Checkpoint = open_checkpoint(path)
    exact = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    native = NativeBackend.load(checkpoint, threads=threads)
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=WINDOW,
        n_batch=WINDOW,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    sums = [0.0, 0.0]
    for window in windows:
        expected = logits_of(exact, window)
        for i, found in enumerate((logits_of(native, window), llama_logits(llama, window))):
            sums[i] += divergence(expected, found)
    llama.close()
    tokens = sum(map(len, windows))
    sizes: Counter[str] = Counter()
    for matrix in native._weights.matrices.values():
        sizes[matrix.format.name.lower()] += matrix.data.nbytes
    formats = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.most_common())
    return sums[0] / tokens, sums[1] / tokens, formats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    default = open_checkpoint(find_model())
    tokenizer = load_tokenizer(default.path, default.config)
    ids = [i for prompt in load_prompts("long") for i in prompt.encode(tokenizer)][: arguments.tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    print(f"{cpu_name()}, {len(ids)} tokens in windows of {WINDOW}\n")
    print("| type | file | KL, hopskip | KL, llama.cpp | ratio | in memory as |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "f32.gguf"
        write_wide(plain)
        for kind in arguments.types:
            path = Path(folder) / f"{kind}.gguf"
            try:
                requantize(plain, path, kind, arguments.threads)
            except ConfigError as error:
                print(f"| {kind} | {error} |", flush=True)
                continue
            own, theirs, formats = compare(path, windows, arguments.threads)
            size = path.stat().st_size / 1e6
            print(f"| {kind} | {size:.0f} MB | {own:.1e} | {theirs:.1e} | {own / theirs:.2f} | {formats} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
