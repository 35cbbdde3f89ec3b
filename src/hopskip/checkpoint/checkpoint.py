"""Checkpoints on disk: one table of names and shapes, safetensors folders and GGUF files behind one interface.

Nothing is unpickled, ever. Tensors are memory-mapped one at a time, so loading needs little more than the loaded model.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.fp8 import with_scales
from hopskip.checkpoint.generation import of_gguf
from hopskip.checkpoint.gguf import PERMUTED_ARCHITECTURES, ROPE_FACTORS, hf_name, open_gguf
from hopskip.checkpoint.hf_folder import read_config, read_generation, refuse_folder
from hopskip.checkpoint.hub_cache import find_base
from hopskip.checkpoint.kinds import refuse_file, starts_as_gguf
from hopskip.checkpoint.lora import CONFIG, MERGE_BY_PEFT, WEIGHTS, is_adapter, read_adapter
from hopskip.checkpoint.safetensors import read_safetensors, some, weight_files
from hopskip.checkpoint.stored import BlockType, StoredTensor, dequantize, unpermuted
from hopskip.errors import CheckpointError

LAYERSKIP_RECOMMENDED = {
    "layerskip-llama2-7B": (8, 6),
    "layerskip-llama2-13B": (15, 4),
    "layerskip-llama2-70B": (10, 6),
    "layerskip-codellama-7B": (8, 6),
    "layerskip-codellama-34B": (8, 6),
    "layerskip-llama3-8B": (4, 4),
    "layerskip-llama3.2-1B": (4, 4),
}
"""Exit layer and draft length to start from, for the checkpoints of arXiv 2404.16710 (facebook/layerskip-*)."""


class Checkpoint:
    """A model on disk, with Hugging Face names and layouts whatever the file format. Opening it loads no weights."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: Mapping[str, StoredTensor],
        fingerprint: str,
        permuted_heads: Mapping[str, int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.fingerprint = fingerprint
        """Identity of the weights, hex: a hash of the files' headers, sizes and samples. The path plays no part. Empty
        for weights that are in no file: nothing made of them is kept."""
        self.metadata = metadata
        """What a GGUF file says besides its tensors, the tokenizer's tables among it; None for a folder."""
        self.generation = of_gguf(metadata or {}) if generation is None else generation
        """The makers' own settings for generating, as they stand, under Hugging Face's names."""
        self._tensors = tensors
        self._permuted_heads = permuted_heads or {}  # tensors whose rows llama.cpp has reordered -> number of heads
        commonest = _commonest_type(tensors.values())
        self.dtype: str = commonest.dtype or "bfloat16"
        """Precision that most weights are stored in, `float32`, `float16` or `bfloat16`; bfloat16 for a quantized file,
        whose values fit no plain type."""
        self.quantization: str | None = None if commonest.dtype else commonest.name
        """Block type that most weights are stored in (`Q4_1`), None for a plain checkpoint."""

    def names(self) -> frozenset[str]:
        """Names of the tensors: exactly those of `expected_tensors(config)`."""
        return frozenset(self._tensors)

    def stored(self, name: str) -> StoredTensor:
        """Type, shape and place of one tensor in its file. Reads nothing."""
        return self._tensors[name]

    def array(self, name: str) -> NDArray[np.float32]:
        """A whole tensor, float32."""
        stored = self._tensors[name]
        return self.rows(name, 0, stored.num_rows).reshape(stored.shape)

    def row_order(self, name: str) -> NDArray[np.int32] | None:
        """Which stored row each row of a matrix is, int32 [rows]; None: they are stored in order."""
        if name not in self._permuted_heads:
            return None
        return unpermuted(self._tensors[name].num_rows, self._permuted_heads[name])

    def rows(self, name: str, first: int, count: int) -> NDArray[np.float32]:
        """Some rows of a matrix, float32 [count, columns], needing little memory besides. May be a view of the mapped
        file; changing it never changes the file."""
        stored, order = self._tensors[name], self.row_order(name)
        if order is None:
            return stored.values(first, count)
        return dequantize(stored.blocks()[order[first : first + count]], stored.type)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder (safetensors, single or sharded) or a GGUF file; check all names and shapes.

    The folder of a LoRA adapter stands for its base model with the adapter merged into it.

    A GGUF file is known by its first letters, whatever its name. Any part of a split one stands for all of them; the
    checkpoint's path is then that of part one.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, the architecture is not supported, or tensors are
            missing, unexpected or misshapen (all of them are named).
    """
    if path.is_dir():
        return _open_adapter(path) if is_adapter(path) else _open_folder(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf" and not starts_as_gguf(path):
            refuse_file(path)
        return _open_gguf(path)
    raise CheckpointError(f"{path} does not exist; check the path, or give a Hub id (ORGANISATION/NAME)")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape: Hugging Face name -> shape, linears as [outputs, inputs]."""
    layer, hidden = config.layer_tensors(), config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def _open_folder(folder: Path) -> Checkpoint:
    refuse_folder(folder)
    config, fp8 = read_config(folder)
    config = _with_recommendations(config, folder)
    tensors: dict[str, StoredTensor] = {}
    digest = hashlib.sha256()
    for path in weight_files(folder):
        found, header_size = read_safetensors(path)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{path} repeats tensors of another shard: {some(twice)}; download the model again")
        tensors |= found
        _hash_file(digest, path, header_size)
    tensors = with_scales(tensors, fp8, folder)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        config = _resolve_tying(config, tensors)
    _check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, folder)
    return Checkpoint(folder, config, tensors, digest.hexdigest(), generation=read_generation(folder))


def _open_adapter(folder: Path) -> Checkpoint:
    adapter = read_adapter(folder)
    base_path = find_base(adapter.base_name, folder)
    if base_path.is_dir() and is_adapter(base_path):
        raise CheckpointError(f"{folder} is an adapter, and so is its base {base_path}; {MERGE_BY_PEFT}")
    base = open_checkpoint(base_path)
    if base.path.is_file():
        raise CheckpointError(
            f"{folder} is an adapter, and its base {base.path} a GGUF file, into which nothing is merged; put the "
            f"original model there (hf download {adapter.base_name})"
        )
    tensors = adapter.merged_with({name: base.stored(name) for name in base.names()})
    config = base.config
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        config = replace(config, tie_word_embeddings=False)
    _check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, folder)
    digest = hashlib.sha256(base.fingerprint.encode())
    _hash_file(digest, folder / WEIGHTS, adapter.header_size)
    digest.update((folder / CONFIG).read_bytes())
    return Checkpoint(folder, config, tensors, digest.hexdigest(), generation=base.generation)


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    config = file.config()
    # an unknown tensor keeps its GGUF name, and is then reported as unexpected
    tensors = {hf_name(name) or name: tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    _check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, file.path)
    permuted_heads: dict[str, int] = {}
    if file.architecture in PERMUTED_ARCHITECTURES:
        for index in range(config.num_hidden_layers):
            attention = f"model.layers.{index}.self_attn."
            permuted_heads[f"{attention}q_proj.weight"] = config.num_attention_heads
            permuted_heads[f"{attention}k_proj.weight"] = config.num_key_value_heads
    digest = hashlib.sha256()
    for part, header_size in file.parts.items():
        _hash_file(digest, part, header_size)
    return Checkpoint(file.path, config, tensors, digest.hexdigest(), permuted_heads, file.metadata)


def _resolve_tying(config: ModelConfig, tensors: dict[str, StoredTensor]) -> ModelConfig:
    """A tied checkpoint that stores a head as well: drop the copy, or believe it where it differs."""
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is not None and head.shape == embedding.shape and head.type == embedding.type:
        step = 1024
        if all(
            np.array_equal(head.values(first, step), embedding.values(first, step))
            for first in range(0, head.num_rows, step)
        ):
            del tensors["lm_head.weight"]
            return config
    return replace(config, tie_word_embeddings=False)


def _check_tensors(found: Mapping[str, tuple[int, ...]], config: ModelConfig, path: Path) -> None:
    if config.num_hidden_layers > len(found):  # an absurd count would make the table below endless
        raise CheckpointError(
            f"{path}: the config says {config.num_hidden_layers} layers, but there are {len(found)} tensors"
        )
    expected = expected_tensors(config)
    misshapen = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {
        "missing": some(expected.keys() - found.keys()),
        "unexpected": some(found.keys() - expected.keys()),
        "misshapen": some(misshapen),
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {names}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{path}: the tensors do not fit the model's config. {listed}. Download the model again")


def _commonest_type(tensors: Iterable[StoredTensor]) -> BlockType:
    sizes: Counter[BlockType] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.num_values
    return sizes.most_common(1)[0][0]


def _with_recommendations(config: ModelConfig, folder: Path) -> ModelConfig:
    """Fill in exit layer and draft length for a folder (or Hub cache entry) named as a facebook/layerskip-* model."""
    if config.recommended_exit_layer is not None:
        return config
    for name, (exit_layer, num_draft_tokens) in LAYERSKIP_RECOMMENDED.items():
        is_named_so = re.compile(rf"(.*--)?{re.escape(name)}", re.IGNORECASE)
        if exit_layer < config.num_hidden_layers and any(
            is_named_so.fullmatch(part) for part in folder.absolute().parts
        ):
            return replace(config, recommended_exit_layer=exit_layer, recommended_num_draft_tokens=num_draft_tokens)
    return config


def _hash_file(digest: hashlib._Hash, path: Path, header_size: int) -> None:
    """Header, size, and 16 samples of 4 KiB, so that fine-tunes of one model differ without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(header_size))
        for index in range(16):
            file.seek(header_size + (size - header_size) * index // 16)
            digest.update(file.read(4096))
