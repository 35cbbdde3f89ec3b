"""Write a model of a real shape with random weights, for measuring how fast it starts and runs:

    python -m benchmarks.random_model OUT --shape 8b            # a Hugging Face folder, bfloat16
    python -m benchmarks.random_model OUT.gguf --shape 1b       # a GGUF file, float16
    python -m benchmarks.random_model OUT.gguf --type Q4_K_M    # requantized by llama.cpp (llama-cpp-python)

Its tokens are those of the default model, as far as they go. What it writes makes no sense.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from hopskip.checkpoint.checkpoint import expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.gguf import GGUFFile
from hopskip.checkpoint.hub import find_model
from hopskip.errors import ConfigError

SHAPES = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Of Llama 3.2 1B and Llama 3.1 8B."""
_SHARD_BYTES = 4 << 30
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def hf_config(shape: str, max_length: int = 16_384) -> dict[str, object]:
    """The `config.json` of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "max_position_embeddings": max_length, "torch_dtype": "bfloat16", "eos_token_id": 2, **SHAPES[shape],
    }  # fmt: skip


def tensors(shape: str) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Every tensor: norms of ones, and matrices that are pieces of one stretch of random numbers."""
    pool = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32).astype(np.float16)
    for index, (name, size) in enumerate(expected_tensors(ModelConfig.from_hf(hf_config(shape))).items()):
        if len(size) == 1:
            yield name, np.ones(size, dtype=np.float16)
            continue
        values = np.resize(np.roll(pool, index * 9973), size)
        values *= np.float16(size[1] ** -0.5)
        yield name, values


def write_folder(folder: Path, shape: str) -> None:
    from safetensors.torch import save_file

    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.text.tokenizer_files import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    number = size = 0

    def flush() -> None:
        nonlocal number, size
        number, size = number + 1, 0
        save_file(shard, folder / f"model-{number:05}.safetensors")
        weight_map.update(dict.fromkeys(shard, f"model-{number:05}.safetensors"))
        shard.clear()

    for name, values in tensors(shape):
        shard[name] = torch.from_numpy(values).bfloat16()
        size += values.nbytes
        if size > _SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config(shape)))
    default = open_checkpoint(find_model())
    load_tokenizer(default.path, default.config).inner.save(str(folder / "tokenizer.json"))


def write_gguf(path: Path, shape: str) -> None:
    config = hf_config(shape)
    writer = gguf.GGUFWriter(path, "llama")
    sizes = SHAPES[shape]
    writer.add_block_count(int(sizes["num_hidden_layers"]))
    writer.add_context_length(int(str(config["max_position_embeddings"])))
    writer.add_embedding_length(int(sizes["hidden_size"]))
    writer.add_feed_forward_length(int(sizes["intermediate_size"]))
    writer.add_head_count(int(sizes["num_attention_heads"]))
    writer.add_head_count_kv(int(sizes["num_key_value_heads"]))
    writer.add_rope_dimension_count(int(sizes["head_dim"]))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(int(sizes["vocab_size"]))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, int(sizes["vocab_size"]))
    for name, values in tensors(shape):
        writer.add_tensor(gguf_name(name), values.astype(np.float32) if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """That of the default model's GGUF file, with tokens added up to the size of the vocabulary."""
    metadata = GGUFFile(find_model()).metadata
    tokens, kinds = (list(metadata[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type"))  # type: ignore[arg-type]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(metadata["tokenizer.ggml.pre"]))
    writer.add_token_list([*tokens, *(f"<unused{i}>" for i in range(vocab_size - len(tokens)))])
    writer.add_token_types([*kinds, *[5] * (vocab_size - len(tokens))])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    others = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in others:
        return f"{others[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def requantize(source: Path, target: Path, kind: str, threads: int = 2) -> None:
    """By llama.cpp's own quantizer.

    Raises:
        ConfigError: an unknown type, or llama.cpp refuses.
    """
    import llama_cpp

    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}", None)
    if number is None:
        raise ConfigError(f"type is {kind!r}, which llama.cpp does not have")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise ConfigError(f"llama.cpp cannot make {kind} of {source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--type", default=None, help="as llama.cpp names it: Q4_K_M, Q8_0, ...")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".gguf":
        write_folder(arguments.out, arguments.shape)
    elif arguments.type is None:
        write_gguf(arguments.out, arguments.shape)
    else:
        plain = arguments.out.with_suffix(".f16.gguf")
        if not plain.exists():
            write_gguf(plain, arguments.shape)
        requantize(plain, arguments.out, arguments.type)


if __name__ == "__main__":
    main()
