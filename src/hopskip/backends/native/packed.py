"""All weights of a model in the native engine's formats, kept on disk so that only the first start has to pack them.

A cache file holds, in this order: 8 bytes of magic, the length of the header and its checksum (64 bits each), the
header (JSON: what is where, with a checksum of each tensor), and the tensors, each at a multiple of 64 bytes. It is
mapped, not read: its pages are those of the system's file cache.

The whole is checked after writing, by `hopskip check` and by `hopskip cache verify`. A start checks the header, the
size, samples, and that nobody has changed the file: it is read-only, and its header knows its time of change. Where
that is another (the file was copied), the whole is checked once.

The folder is `$HOPSKIP_CACHE`, by default `hopskip` in `$XDG_CACHE_HOME` or `~/.cache`; an empty HOPSKIP_CACHE turns
the cache off.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.native.formats import Format, choose_format, matrix_bytes, strip_bytes
from hopskip.backends.native.packing import Bytes, Packed, Packer, ScaleError, aligned
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import CheckpointError
from hopskip.machine import cache_folder, num_usable_cores, remove_leftovers, replacing_file

VERSION = 4
"""Raised whenever packing or a layout changes: files of other versions are not looked at."""
SUFFIX = ".packed"
_MAGIC = b"hopskip\n"
_ALIGNMENT = 64
_START = len(_MAGIC) + 16  # of the header
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 4

Progress = Callable[[float], None]
T = TypeVar("T")


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: a matrix in a format, or a float32 vector."""

    offset: int
    size: int
    format: Format | None
    shape: tuple[int, ...]


class PackedWeights:
    """All weights in the engine's formats, by Hugging Face name."""

    def __init__(
        self,
        config: ModelConfig,
        matrices: dict[str, Packed],
        vectors: dict[str, NDArray[np.float32]],
        file: BinaryIO | None = None,
    ) -> None:
        self.config = config
        self.matrices = matrices
        self.vectors = vectors
        """Norms and biases, float32."""
        self._path: Path | None = None  # of the file that they are mapped from
        if file is not None:
            self._path, self._handle, self._state = Path(file.name), os.dup(file.fileno()), _state(file.fileno())
            finalize(self, os.close, self._handle)

    @classmethod
    def load(cls, checkpoint: Checkpoint, precision: str, progress: Progress | None = None) -> PackedWeights:
        """Map the weights from the cache, or pack them and put them there. A damaged file is made anew.

        Raises:
            CheckpointError: a weight is not finite.
        """
        folder = cache_folder() if checkpoint.fingerprint else None
        if folder is None:
            return cls.from_checkpoint(checkpoint, precision, progress)
        path = packed_path(folder, checkpoint, precision)
        try:
            return cls.read(checkpoint.config, path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}); it is being rebuilt", stacklevel=2)
        try:
            remove_leftovers(folder)
            write(checkpoint, precision, path, progress)
            return cls.read(checkpoint.config, path)
        except OSError as error:
            warnings.warn(
                f"packed weights cannot be cached in {folder} ({error}), so every start packs them again; "
                "set HOPSKIP_CACHE to a folder with space, or to nothing to turn the cache off",
                stacklevel=2,
            )
            return cls.from_checkpoint(checkpoint, precision, progress)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, precision: str, progress: Progress | None = None) -> PackedWeights:
        """Pack a checkpoint in memory; `precision` as in `NativeBackend.load`. `progress` is told the share done, up to
        1."""

        def make(entries: dict[str, _Entry]) -> PackedWeights:
            data = aligned(_size(entries))
            for _, position, part in _parts(checkpoint, entries, progress):
                data[position : position + part.size] = part
            return cls(checkpoint.config, *_tensors(entries, data))

        return _in_a_layout(checkpoint, precision, make)

    @classmethod
    def read(cls, config: ModelConfig, path: Path) -> PackedWeights:
        """Map a cache file.

        Raises:
            OSError, ValueError, KeyError, TypeError: it cannot be read, or is not what `write` wrote.
        """
        with path.open("rb") as file:
            header, data = _open(file)
            entries = {}
            for name, shape in expected_tensors(config).items():
                entries[name] = entry = _entry(header["tensors"][name])
                if entry.shape != shape:
                    raise ValueError(f"{name} is {entry.shape} instead of {shape}")
            if _state(file.fileno())[1] != header["changed"] * 10**9:  # copied, or written to
                _check_all(header, data)
                with suppress(OSError):
                    os.utime(path, (header["changed"], header["changed"]))
            return cls(config, *_tensors(entries, data), file)

    def check_unchanged(self) -> None:
        """Of mapped weights, look whether the file is still the same: what is read after a change would be other text,
        or nothing at all.

        Raises:
            CheckpointError: it has been written to, or cut short.
        """
        if self._path is not None and _state(self._handle) != self._state:
            raise CheckpointError(
                f"the packed weights {self._path} have been changed while in use; start again to rebuild them"
            )

    def verify(self) -> None:
        """Read all of the file that the weights are mapped from, if they are, and compare it with its checksums.

        Raises:
            CheckpointError: it is damaged.
        """
        if self._path is not None:
            try:
                verify(self._path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"the packed weights {self._path} are damaged ({error}); remove them with: hopskip cache verify"
                ) from None

    @property
    def head(self) -> Packed:
        return self.matrices["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of weights that a full pass of one row reads: all layers and the head."""
        layers = sum(m.data.nbytes for name, m in self.matrices.items() if name.startswith("model.layers."))
        return layers + self.head.data.nbytes

    @property
    def kv_dtype(self) -> str:
        """float32 where all weights are: halving the cache would then lose more than it gains."""
        is_float = all(matrix.format is Format.F32 for matrix in self.matrices.values())
        return "float32" if is_float else "bfloat16"


def packed_path(folder: Path, checkpoint: Checkpoint, precision: str) -> Path:
    """Where the weights of a checkpoint are kept."""
    return folder / f"{checkpoint.fingerprint[:32]}-{precision}-{VERSION}{SUFFIX}"


def write(checkpoint: Checkpoint, precision: str, path: Path, progress: Progress | None = None) -> None:
    """Write a cache file, whole or not at all, and read-only.

    Raises:
        OSError: the folder cannot be written, or has too little space.
        CheckpointError: a weight is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _in_a_layout(checkpoint, precision, lambda entries: _write(checkpoint, entries, path, progress))


def read_header(path: Path) -> dict[str, Any]:
    """What a cache file says of itself: `model`, where the checkpoint was, `size`, `tensors`. Its samples are checked.

    Raises:
        OSError, ValueError, KeyError, TypeError: as `PackedWeights.read`.
    """
    with path.open("rb") as file:
        return _open(file)[0]


def verify(path: Path) -> None:
    """Check the whole of a cache file.

    Raises:
        OSError, ValueError, KeyError, TypeError: as `PackedWeights.read`.
    """
    with path.open("rb") as file:
        _check_all(*_open(file))


# -- layout ------------------------------------------------------------------------------------------------------------


def _in_a_layout(checkpoint: Checkpoint, precision: str, make: Callable[[dict[str, _Entry]], T]) -> T:
    """What `make` makes in a layout that suits the weights. A matrix of blocks whose scales turn out not to fit their
    own format is packed to 8 bits."""
    unsuited: set[str] = set()
    while True:
        try:
            return make(_layout(checkpoint, precision, unsuited))
        except ScaleError as error:  # noqa: PERF203 (once in a blue moon)
            if checkpoint.stored(error.name).type.dtype is not None or error.name in unsuited:
                raise
            unsuited.add(error.name)


def _layout(checkpoint: Checkpoint, precision: str, unsuited: Collection[str]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    position = 0
    for name, shape in expected_tensors(checkpoint.config).items():
        format, size = None, 4 * shape[0]
        if len(shape) == 2:
            format = choose_format(checkpoint.stored(name).type.name, name, precision)
            format = Format.Q8 if name in unsuited else format
            size = matrix_bytes(format, *shape)
        entries[name] = _Entry(position, size, format, shape)
        position += size + -size % _ALIGNMENT
    return entries


def _size(entries: Mapping[str, _Entry]) -> int:
    last = list(entries.values())[-1]
    return last.offset + last.size + -last.size % _ALIGNMENT


def _tensors(entries: Mapping[str, _Entry], data: Bytes) -> tuple[dict[str, Packed], dict[str, NDArray[np.float32]]]:
    """The matrices and vectors that lie in `data`."""
    matrices, vectors = {}, {}
    for name, entry in entries.items():
        own = data[entry.offset : entry.offset + entry.size]
        if entry.format is None:
            vectors[name] = own.view(np.float32)
        else:
            rows, cols = entry.shape
            words = own.view(np.int32).reshape(-1, strip_bytes(entry.format, cols) // 4)
            matrices[name] = Packed(entry.format, rows, cols, words)
    return matrices, vectors


def _parts(
    checkpoint: Checkpoint, entries: Mapping[str, _Entry], progress: Progress | None
) -> Iterator[tuple[str, int, Bytes]]:
    """The packed weights in the order of the layout: of which tensor, where, and some of its bytes."""
    packer = Packer()
    total = _size(entries)
    for name, entry in entries.items():
        position = entry.offset
        if entry.format is None:
            vector = checkpoint.array(name)
            if not np.isfinite(vector).all():
                raise CheckpointError(f"{name} of {checkpoint.path}: a weight is infinite or not a number")
            parts: Iterable[Bytes] = [vector.view(np.uint8)]
        else:
            parts = (strips.reshape(-1) for strips in packer.strips(checkpoint, name, entry.format))
        for part in parts:
            yield name, position, part
            position += part.size
            if progress is not None:
                progress(position / total)
    if progress is not None:
        progress(1.0)


# -- the file ----------------------------------------------------------------------------------------------------------


def _write(checkpoint: Checkpoint, entries: Mapping[str, _Entry], path: Path, progress: Progress | None) -> None:
    size = _size(entries)
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(f"less than {size / 1e9:.1f} GB are free there")
    checksums = dict.fromkeys(entries, 0)
    model, changed = str(checkpoint.path), int(time.time())
    with replacing_file(path) as partial, partial.open("w+b") as file:
        start = file.write(_header(model, entries, checksums, checksums, changed))  # its size is what matters now
        for name, position, part in _parts(checkpoint, entries, progress):
            checksums[name] = zlib.crc32(part.data, checksums[name])
            file.seek(start + position)
            file.write(part.data)
        file.truncate(start + size)
        file.flush()
        data = np.memmap(file, dtype=np.uint8, mode="r")[start:]
        samples = {name: zlib.crc32(_sample(data, entry)) for name, entry in entries.items()}
        file.seek(0)
        file.write(_header(model, entries, checksums, samples, changed))
        file.flush()
        try:
            _check_all(*_open(file))
        except ValueError as error:
            raise OSError(f"it reads back otherwise than it was written: {error}") from None
        os.fchmod(file.fileno(), 0o444)
        os.utime(partial, (changed, changed))


def _header(
    model: str,
    entries: Mapping[str, _Entry],
    checksums: Mapping[str, int],
    samples: Mapping[str, int],
    changed: int,
) -> bytes:
    """The same number of bytes, whatever the checksums."""
    tensors = {
        name: {
            "offset": entry.offset,
            "size": entry.size,
            "format": None if entry.format is None else entry.format.name,
            "shape": list(entry.shape),
            "checksum": f"{checksums[name]:08x}",
            "samples": f"{samples[name]:08x}",
        }
        for name, entry in entries.items()
    }
    header = json.dumps({"model": model, "size": _size(entries), "changed": changed, "tensors": tensors}).encode()
    header += b" " * (-(_START + len(header)) % _ALIGNMENT)
    return _MAGIC + len(header).to_bytes(8, "little") + zlib.crc32(header).to_bytes(8, "little") + header


def _open(file: BinaryIO) -> tuple[dict[str, Any], Bytes]:
    """Header and tensors of a cache file, with its samples checked."""
    data: Bytes = np.memmap(file, dtype=np.uint8, mode="r")
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise ValueError("it is of another kind")
    header_size, checksum = (int(number) for number in data[len(_MAGIC) : _START].view("<u8"))
    start = _START + header_size
    if zlib.crc32(data[_START:start].data) != checksum:
        raise ValueError("the checksum of its header is wrong")
    header = json.loads(bytes(data[_START:start]))
    data = data[start:]
    if len(data) != header["size"]:
        raise ValueError(f"it has {len(data)} bytes of weights instead of {header['size']}")
    for name, tensor in header["tensors"].items():
        if zlib.crc32(_sample(data, _entry(tensor))) != int(tensor["samples"], 16):
            raise ValueError(f"the weights of {name} are not what was written")
    return header, data


def _check_all(header: Mapping[str, Any], data: Bytes) -> None:
    def check(name: str) -> None:
        tensor = header["tensors"][name]
        entry = _entry(tensor)
        if zlib.crc32(data[entry.offset : entry.offset + entry.size].data) != int(tensor["checksum"], 16):
            raise ValueError(f"the checksum of {name} is wrong")

    with ThreadPoolExecutor(num_usable_cores()) as pool:
        for _ in pool.map(check, header["tensors"]):
            pass


def _entry(tensor: Mapping[str, Any]) -> _Entry:
    format = None if tensor["format"] is None else Format[tensor["format"]]
    return _Entry(tensor["offset"], tensor["size"], format, tuple(tensor["shape"]))


def _sample(data: Bytes, entry: _Entry) -> bytes:
    """Some pages from all over a tensor."""
    last = max(0, entry.size - _SAMPLE_BYTES)
    starts = [entry.offset + last * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)]
    return b"".join(data[start : min(start + _SAMPLE_BYTES, entry.offset + entry.size)].tobytes() for start in starts)


def _state(handle: int) -> tuple[int, int]:
    """Size of an open file, and when it was last changed, in nanoseconds."""
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns
