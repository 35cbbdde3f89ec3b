"""Safetensors folders and files: which files there are, the tensors that their headers announce, and writing them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.kinds import refuse_pointer
from hopskip.checkpoint.stored import BLOCK_TYPES, FP8_TYPES, SMALL_TYPES, StoredTensor
from hopskip.errors import CheckpointError, shown

PLAIN_TYPES = {block.name: block for block in BLOCK_TYPES.values() if block.dtype is not None}
"""Types of weights that need no scale."""
_WEIGHT_TYPES = {**PLAIN_TYPES, **FP8_TYPES}
_SAFETENSORS_TYPES = {**_WEIGHT_TYPES, **SMALL_TYPES}

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_FILE_NAME = re.compile(r"[\w. -]{1,200}")
_LONGEST_HEADER = 100_000_000  # as the safetensors library
_MOST_NUMBERS, _LONGEST_NAME = 10, 256

_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Buffers that old checkpoints carry; the values follow from the config."""


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: missing, not JSON, or not an object; the message ends with `remedy`.
    """
    refuse_pointer(path)
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


def has_weights(names: Iterable[str]) -> bool:
    """Whether the files of a folder are those of a safetensors checkpoint, as far as the names tell."""
    return any(name in ("model.safetensors", _INDEX) or _SHARD.fullmatch(name) for name in names)


def whole_checkpoint(folder: Path) -> bool:
    """Whether a folder has a config and all of its safetensors files."""
    try:
        return (folder / "config.json").exists() and all(file.is_file() for file in weight_files(folder))
    except CheckpointError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, else those of the index, else all shards by name.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    index = folder / _INDEX
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index, "").get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) and _are_names(weight_map.values()) else set()
        if not names:
            raise CheckpointError(f"{index} has no usable 'weight_map'; download the model again")
    else:
        shards = [match for file in folder.glob("*.safetensors") if (match := _SHARD.fullmatch(file.name))]
        names = {f"model-{n:05}-of-{m[2]}.safetensors" for m in shards[:1] for n in range(1, int(m[2]) + 1)}
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks the shards {some(missing)}; the download was not finished: run it again")
    if not names:
        raise CheckpointError(f"{folder} holds neither model.safetensors nor its index; is this a complete checkpoint?")
    return [folder / name for name in sorted(names)]


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(name, str) and _FILE_NAME.fullmatch(name) for name in values)


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of one safetensors file, and the size of its header in bytes. They fill the file exactly, one after
    the other, as the format demands: so an entry that was changed cannot go unnoticed.

    Raises:
        CheckpointError: the file is truncated or corrupt, or has a precision that hopskip does not read.
    """
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes is announced in {size} bytes")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = _stored_tensor(path, name, entry, 8 + length, size)
        end = 8 + length
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
            if tensor.offset != end:
                raise ValueError(f"tensor {name!r} begins at byte {tensor.offset} instead of {end}")
            end += tensor.num_bytes
        if end != size:
            raise ValueError(f"the tensors end at byte {end}, the file at {size}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is truncated or corrupt ({reason}); download it again") from None
    return {name: tensor for name, tensor in tensors.items() if not _HARMLESS.fullmatch(name)}, 8 + length


def _stored_tensor(path: Path, name: str, entry: Mapping[str, Any], data_start: int, file_size: int) -> StoredTensor:
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a tensor's name has {len(name)} characters")
    shape, offsets = entry["shape"], entry["data_offsets"]
    block_type = _SAFETENSORS_TYPES.get(entry["dtype"])
    if block_type is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {shown(entry['dtype'])}; hopskip reads {', '.join(_WEIGHT_TYPES)}"
        )
    numbers = [*shape, *offsets]
    if not all(type(number) is int and 0 <= number <= file_size for number in numbers) or len(numbers) > _MOST_NUMBERS:
        raise ValueError(f"tensor {name!r} has impossible sizes or offsets")
    start, end = (data_start + offset for offset in offsets)
    stored = StoredTensor(path, start, block_type, tuple(shape) or (1,))
    if not start <= end <= file_size:
        raise ValueError(f"tensor {name!r} ends at byte {end}, the file at {file_size}")
    if min(stored.shape) < 1 or stored.num_bytes != end - start:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} does not fill its {end - start} bytes")
    return stored


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """A safetensors file of tensors, each with its type's name in the format: of one that numpy lacks, its bits."""
    entries, end = {}, 0
    for name, (dtype, values) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).data)


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
