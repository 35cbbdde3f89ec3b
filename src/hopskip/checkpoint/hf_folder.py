"""The files of a Hugging Face checkpoint folder: config, shards, and the headers of its safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.stored import BLOCK_TYPES, StoredTensor
from hopskip.errors import CheckpointError

_SAFETENSORS_TYPES = {block.name: block for block in BLOCK_TYPES.values() if block.dtype is not None}

_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Buffers that old checkpoints carry; the values follow from the config."""


def read_config(folder: Path) -> ModelConfig:
    """The model's shape, from `config.json` and, for the EOS ids, `generation_config.json`.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not supported.
    """
    generation = folder / "generation_config.json"
    config = read_json(folder / "config.json", "is this a complete Hugging Face checkpoint?")
    return ModelConfig.from_hf(config, read_json(generation, "") if generation.exists() else None)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: missing, not JSON, or not an object; the message ends with `remedy`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise CheckpointError(f"{path} {reason}; {remedy or 'download the model again'}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__} instead of a JSON object; download the model again"
        )
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, else those of the index.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no usable 'weight_map'; download the model again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{folder} lacks the shards {some(missing)}; the download was not finished: run it again"
            )
        return files
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} has only pickled weights, which can run code when read, so hopskip never opens them; "
            "use a safetensors version, or convert once with transformers: from_pretrained(...).save_pretrained(...)"
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} is an adapter; merge it into its base model first (peft: merge_and_unload)")
    raise CheckpointError(f"{folder} holds neither model.safetensors nor its index; is this a complete checkpoint?")


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of one safetensors file, checked against its size, and the size of its header in bytes.

    Raises:
        CheckpointError: the file is truncated or corrupt, or has a precision that hopskip does not read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"a header of {length} bytes is announced in {size} bytes")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__" and not _HARMLESS.fullmatch(name):
                tensors[name] = _stored_tensor(path, name, entry, 8 + length, size)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is truncated or corrupt ({reason}); download it again") from None
    return tensors, 8 + length


def _stored_tensor(path: Path, name: str, entry: Mapping[str, Any], data_start: int, file_size: int) -> StoredTensor:
    block_type = _SAFETENSORS_TYPES.get(entry["dtype"])
    if block_type is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; hopskip reads {', '.join(_SAFETENSORS_TYPES)}"
        )
    shape = tuple(int(size) for size in entry["shape"])
    start, end = (data_start + int(offset) for offset in entry["data_offsets"])
    stored = StoredTensor(path, start, block_type, shape or (1,))
    if not data_start <= start <= end <= file_size:
        raise ValueError(f"tensor {name!r} ends at byte {end}, the file at {file_size}")
    if min(stored.shape) < 1 or stored.num_bytes != end - start:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} does not fill its {end - start} bytes")
    return stored


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
