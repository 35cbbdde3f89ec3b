"""Tensors on their way from one file to another: read, converted and written a few rows at a time.

R: rows     B: bytes of a row as it is stored
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.stored import BLOCK_TYPES, SMALL_TYPES, BlockType, StoredTensor, plain_blocks
from hopskip.errors import ConfigError

Bytes = NDArray[np.uint8]
Progress = Callable[[str, float | None], None]
"""Told what is being done, and the share of it that is done."""
DType = Literal["auto", "float32", "bfloat16", "float16"]

TYPES = {block.name: block for block in BLOCK_TYPES.values()} | SMALL_TYPES
PLAIN_NAMES = {block.dtype: block.name for block in BLOCK_TYPES.values() if block.dtype is not None}
"""By the name of a plain type in PyTorch, its name in files."""

_VALUES_AT_ONCE = 1 << 22
_SHARD_BYTES = 5_000_000_000
"""Of a file of a checkpoint that is written in several."""


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Bytes]]
    """Its bytes, uint8 [R, B] each, from the first row to the last."""

    @property
    def num_bytes(self) -> int:
        return StoredTensor(Path(), 0, self.type, self.shape).num_bytes

    def whole(self) -> Bytes:
        """All of it, uint8 [R, B]."""
        rows = StoredTensor(Path(), 0, self.type, self.shape)
        blocks: Bytes = np.empty((rows.num_rows, rows.row_bytes), dtype=np.uint8)
        first = 0
        for chunk in self.chunks():
            blocks[first : first + len(chunk)] = chunk
            first += len(chunk)
        return blocks


def from_checkpoint(checkpoint: Checkpoint, name: str, type_name: str, new_name: str | None = None) -> Outgoing:
    """A tensor of a model in another type, or as it is stored where it has that type. Rows come in the order of
    Hugging Face, whatever the file.

    Args:
        new_name: in the file that is written.

    Raises (when the rows are read):
        ConfigError: a value is too large for the type.
    """
    stored, kind = checkpoint.stored(name), TYPES[type_name]

    def chunks() -> Iterator[Bytes]:
        order = checkpoint.row_order(name)
        step = max(1, _VALUES_AT_ONCE // stored.shape[-1])
        for first in range(0, stored.num_rows, step):
            if stored.type.name != type_name:
                yield _converted(checkpoint.rows(name, first, step), type_name, name)
            elif order is not None:
                yield stored.blocks()[order[first : first + step]]
            else:
                yield stored.blocks(first, step)

    return Outgoing(new_name or name, kind, stored.shape, chunks)


def from_values(name: str, values: NDArray[Any], type_name: str) -> Outgoing:
    """A tensor in memory. Floats are rounded to the type, whole numbers and truth values are as they are."""
    rows = values.reshape(-1, values.shape[-1])
    if TYPES[type_name].dtype is None:
        blocks = np.ascontiguousarray(rows).view(np.uint8)
    else:
        blocks = _converted(rows.astype(np.float32), type_name, name)
    return Outgoing(name, TYPES[type_name], values.shape, lambda: iter((blocks,)))


def _converted(values: NDArray[np.float32], type_name: str, name: str) -> Bytes:
    if TYPES[type_name].dtype is None:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        blocks: Bytes = quantize(values, GGMLQuantizationType[type_name])
        return blocks
    blocks = plain_blocks(np.ascontiguousarray(values), type_name)
    if type_name == "F16" and not np.isfinite(blocks.view(np.float16)).all():
        raise ConfigError(
            f"{name} has a value of {float(np.abs(values).max()):.6g}, beyond the largest of float16; "
            "use bfloat16 or float32"
        )
    return blocks


def write_shards(folder: Path, tensors: Sequence[Outgoing], progress: Progress | None = None) -> None:
    """Write tensors as `model.safetensors`; more than 5 GB as several files and an index."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
            "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        write_json(folder / "model.safetensors.index.json", index)
    told = Told(progress, "writing weights", sum(tensor.num_bytes for tensor in tensors))
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, told)


def _write_file(path: Path, tensors: Sequence[Outgoing], told: Told) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # old versions of transformers want it
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.type.name,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(np.ascontiguousarray(chunk).data)
                told.add(chunk.nbytes)


class Told:
    """Tells how many of so many bytes are written."""

    def __init__(self, progress: Progress | None, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done = progress, what, total, 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._what, self._done / self._total)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
