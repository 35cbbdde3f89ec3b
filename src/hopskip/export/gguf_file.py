"""GGUF files, as llama.cpp loads them: metadata, tensor names, and its order of query and key rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.gguf import PERMUTED_ARCHITECTURES, ROPE_FACTORS, gguf_name
from hopskip.checkpoint.rope import RopeConfig
from hopskip.checkpoint.stored import unpermuted
from hopskip.errors import CheckpointError, ConfigError
from hopskip.export.gguf_tokenizer import tokenizer_metadata
from hopskip.export.source import Source
from hopskip.export.tensors import PLAIN_NAMES, TYPES, Bytes, Outgoing, Progress, Told, from_checkpoint, from_values

GGUFType = Literal["auto", "F32", "F16", "BF16", "Q8_0"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` -> `general.architecture`."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_NOT_COPIED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


@dataclass(frozen=True)
class Plan:
    """A GGUF file that is to be written."""

    architecture: str
    config: ModelConfig
    metadata: dict[str, Any]
    tensors: Sequence[Outgoing]
    """By their names in the file, matrices in Hugging Face's order."""

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """Write it, one tensor in memory at a time."""
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(path, self.architecture)
        try:
            for key, value in self.metadata.items():
                _add(writer, key, value)
            for tensor in self.tensors:
                kind = GGMLQuantizationType[tensor.type.name]
                shape = (*tensor.shape[:-1], tensor.num_bytes // math.prod(tensor.shape[:-1]))
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.num_bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            told = Told(progress, "writing weights", sum(tensor.num_bytes for tensor in self.tensors))
            for tensor in self.tensors:
                writer.write_tensor_data(self._in_order(tensor))
                told.add(tensor.num_bytes)
        finally:
            writer.close()

    def _in_order(self, tensor: Outgoing) -> Bytes:
        heads = {"attn_q.weight": self.config.num_attention_heads, "attn_k.weight": self.config.num_key_value_heads}
        part = tensor.name.partition(".")[2].partition(".")[2]
        blocks = tensor.whole()
        if self.architecture not in PERMUTED_ARCHITECTURES or part not in heads:
            return blocks
        ordered: Bytes = blocks[np.argsort(unpermuted(len(blocks), heads[part]))]
        return ordered


def plan_gguf(source: Source, config: ModelConfig, wanted: GGUFType, name: str) -> Plan:
    """The GGUF file of a model of this shape, which has the source's first layers.

    Args:
        wanted: type of the matrices; `auto` keeps each one's, and writes 8-bit floats with scales as bfloat16.
        name: of the model.

    Raises:
        CheckpointError: the tokenizer has no exact form in GGUF.
        ConfigError: the config has none.
    """
    checkpoint = source.checkpoint
    tensors = [
        from_checkpoint(checkpoint, own, _type_of(checkpoint, own, wanted), gguf_name(own))
        for own in expected_tensors(config)
    ]
    divisors = rope_divisors(config.rope)
    if divisors is not None:
        tensors.append(from_values(ROPE_FACTORS, divisors, "F32"))
    metadata = {
        **_general(source, name),
        "general.file_type": _file_type(source, wanted),
        "general.quantization_version": 2,
        **_shape(config),
        **tokenizer_metadata(source),
    }
    return Plan(ARCHITECTURES[config.model_type], config, metadata, tensors)


def check_gguf(path: Path, plan: Plan) -> None:
    """Read a file that was written, and compare what it says with what it was made from.

    Raises:
        CheckpointError: they differ.
    """
    found = open_checkpoint(path)
    wanted = plan.config
    for name in (
        "vocab_size",
        "num_hidden_layers",
        "head_dim",
        "num_key_value_heads",
        "tie_word_embeddings",
        "context_length",
    ):
        own, other = getattr(found.config, name), getattr(wanted, name)
        if own != other:
            raise CheckpointError(f"{path.name} says {name} {own} instead of {other}; this is a mistake of hopskip's")
    frequencies, expected = (config.rope.inverse_frequencies() for config in (found.config, wanted))
    if (
        not np.allclose(frequencies, expected, rtol=1e-5, atol=0)
        or found.config.rope.amplitude != wanted.rope.amplitude
    ):
        raise CheckpointError(f"{path.name} rotates otherwise than the model does; this is a mistake of hopskip's")


def rope_divisors(rope: RopeConfig) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """What llama.cpp divides each rotary frequency by, float32 [head_dim / 2]; None where no table is needed.

    Raises:
        ConfigError: the settings have no form in GGUF.
    """
    if rope.rope_type == "llama3" or rope.frequency_divisors:
        plain = replace(rope, rope_type="default", frequency_divisors=()).inverse_frequencies().astype(np.float64)
        divisors: np.ndarray[Any, np.dtype[np.float32]] = (plain / rope.inverse_frequencies()).astype(np.float32)
        return divisors
    written = RopeConfig(
        head_dim=rope.head_dim,
        rope_theta=rope.rope_theta,
        rope_type=rope.rope_type,
        factor=rope.factor,
        original_max_position_embeddings=rope.original_max_position_embeddings,
    )
    is_same = np.array_equal(written.inverse_frequencies(), rope.inverse_frequencies())
    if not is_same or written.amplitude != rope.amplitude:
        raise ConfigError(
            f"the model's RoPE settings ({rope.rope_type} with its own attention_factor, mscale, beta_fast, beta_slow "
            "or truncate) have no form in GGUF that all programs read; export a folder instead"
        )
    return None


def kept_type(checkpoint: Checkpoint, own: str | None = None) -> str:
    """The type of a matrix that keeps its own.

    Args:
        own: in the source; None: that of most of them.
    """
    own = own or checkpoint.quantization or PLAIN_NAMES[checkpoint.dtype]
    return PLAIN_NAMES[checkpoint.dtype] if own.startswith("F8_") else own


def _type_of(checkpoint: Checkpoint, name: str, wanted: GGUFType) -> str:
    stored = checkpoint.stored(name)
    if len(stored.shape) < 2:
        return "F32"  # llama.cpp multiplies by nothing else
    if wanted == "auto":
        return kept_type(checkpoint, stored.type.name)
    return "F32" if stored.shape[-1] % TYPES[wanted].num_values else wanted


def _file_type(source: Source, wanted: GGUFType) -> int | None:
    checkpoint = source.checkpoint
    if wanted == "auto" and checkpoint.metadata is not None:
        found: int | None = checkpoint.metadata.get("general.file_type")
        return found
    return _FILE_TYPES[kept_type(checkpoint) if wanted == "auto" else wanted]


def _general(source: Source, name: str) -> dict[str, Any]:
    own = source.checkpoint.metadata or {}
    found = {key: v for key, v in own.items() if key.startswith("general.") and key not in _NOT_COPIED}
    generation = source.checkpoint.generation
    if generation.get("do_sample") is not False:
        sampling = {f"general.sampling.{key}": generation.get(given) for given, key in _SAMPLING.items()}
        found |= {key: value for key, value in sampling.items() if value is not None}
    return {**found, "general.name": name}


def _shape(config: ModelConfig) -> dict[str, Any]:
    rope, prefix = config.rope, ARCHITECTURES[config.model_type]
    found: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": config.sliding_window,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope.rope_theta),
    }
    if rope.rope_type in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
        found["rope.scaling.original_context_length"] = int(rope.original_max_position_embeddings) or None
    return {f"{prefix}.{key}": value for key, value in found.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    """A key of the type that llama.cpp wants it to have."""
    if value is None or value == [] or value == "":
        return
    if key.endswith(("sampling.temp", "sampling.top_p", "sampling.min_p", "sampling.penalty_repeat")):
        writer.add_float32(key, float(value))
    elif key.endswith("sampling.top_k"):
        writer.add_int32(key, int(value))
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
