"""All weights of a model in the native engine's formats, kept on disk so that only the first start has to pack them.

A cache file holds, in this order: 8 bytes of magic, the length of the header and a checksum of what follows (64 bits
each), the header (JSON: what is where), and the tensors, each at a multiple of 64 bytes. It is mapped, not read: its
pages are those of the system's file cache.

The folder is `$HOPSKIP_CACHE`, by default `hopskip` in `$XDG_CACHE_HOME` or `~/.cache`; an empty HOPSKIP_CACHE turns
the cache off.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hopskip.backends.native.quantize import Q4, Q8, Format, Packed, from_gguf_blocks, pack, quantize_q4, quantize_q8
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import CheckpointError
from hopskip.machine import cache_folder, replacing_file

VERSION = 3
"""Raised whenever packing or a layout changes: files of other versions are not looked at."""
_MAGIC = b"hopskip\n"
_ALIGNMENT = 64
_START = len(_MAGIC) + 16  # of the header


class PackedWeights:
    """All weights in the engine's formats, by Hugging Face name."""

    def __init__(self, config: ModelConfig, matrices: dict[str, Packed], vectors: dict[str, Tensor]) -> None:
        self.config = config
        self.matrices = matrices
        self.vectors = vectors
        """Norms and biases, float32."""

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, precision: str, progress: Callable[[float], None] | None = None
    ) -> PackedWeights:
        """Map the weights from the cache, or pack them and put them there. A damaged file is made anew.

        Raises:
            CheckpointError: a weight is not finite.
        """
        folder = cache_folder()
        if folder is None:
            return cls.from_checkpoint(checkpoint, precision, progress)
        path = folder / f"{checkpoint.fingerprint[:32]}-{precision}-{VERSION}.packed"
        try:
            return cls.read(checkpoint.config, path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}); it is being rebuilt", stacklevel=2)
        weights = cls.from_checkpoint(checkpoint, precision, progress)
        try:
            weights.write(path)
            return cls.read(checkpoint.config, path)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"packed weights cannot be cached in {folder} ({error}), so every start packs them again; "
                "set HOPSKIP_CACHE to a folder with space, or to nothing to turn the cache off",
                stacklevel=2,
            )
            return weights

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, precision: str, progress: Callable[[float], None] | None = None
    ) -> PackedWeights:
        """Pack a checkpoint; `precision` as in `NativeBackend.load`. `progress` is told the share done, up to 1."""
        matrices, vectors = {}, {}
        expected = expected_tensors(checkpoint.config)
        for index, (name, shape) in enumerate(expected.items()):
            if progress is not None:
                progress((index + 1) / len(expected))
            if len(shape) == 1:
                vectors[name] = checkpoint.tensor(name, torch.float32).contiguous()
                continue
            try:
                matrices[name] = _pack_tensor(checkpoint, name, precision)
            except CheckpointError as error:
                raise CheckpointError(f"{name} of {checkpoint.path}: {error}") from None
        return cls(checkpoint.config, matrices, vectors)

    @property
    def head(self) -> Packed:
        return self.matrices["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of weights that a full pass of one row reads: all layers and the head."""
        layers = sum(m.data.nbytes for name, m in self.matrices.items() if name.startswith("model.layers."))
        return layers + self.head.data.nbytes

    @property
    def kv_dtype(self) -> torch.dtype:
        """float32 where all weights are: halving the cache would then lose more than it gains."""
        is_float = all(matrix.format is Format.F32 for matrix in self.matrices.values())
        return torch.float32 if is_float else torch.bfloat16

    def write(self, path: Path) -> None:
        """Write a cache file, whole or not at all.

        Raises:
            OSError: the folder cannot be written, or would be left with less space than the file itself takes.
        """
        tensors = [*self.vectors.items(), *((name, matrix.data) for name, matrix in self.matrices.items())]
        entries: dict[str, dict[str, Any]] = {}
        size = 0
        for name, tensor in tensors:
            entries[name] = {"offset": size, "shape": list(tensor.shape)}
            if matrix := self.matrices.get(name):
                entries[name] |= {"format": matrix.format.name, "rows": matrix.rows, "cols": matrix.cols}
            size += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
        header = json.dumps({"tensors": entries, "size": size}).encode()
        header += b" " * (-(_START + len(header)) % _ALIGNMENT)
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * size:
            raise OSError(f"less than {2 * size / 1e9:.1f} GB are free there")
        with replacing_file(path) as partial, partial.open("wb") as file:
            checksum = zlib.crc32(header)
            file.write(bytes(_START) + header)
            for _, tensor in tensors:
                for part in (tensor.numpy().reshape(-1).view(np.uint8).data, bytes(-tensor.nbytes % _ALIGNMENT)):
                    checksum = zlib.crc32(part, checksum)
                    file.write(part)
            file.seek(0)
            file.write(_MAGIC + len(header).to_bytes(8, "little") + checksum.to_bytes(8, "little"))

    @classmethod
    def read(cls, config: ModelConfig, path: Path) -> PackedWeights:
        """Map a cache file. The arrays are private to the process: nothing that happens to them reaches the file.

        Raises:
            OSError, ValueError, KeyError, TypeError: it cannot be read, or is not what `write` wrote.
        """
        data = np.memmap(path, dtype=np.uint8, mode="c")
        if bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise ValueError("it is of another kind")
        header_size, checksum = (int(number) for number in data[len(_MAGIC) : _START].view("<u8"))
        if zlib.crc32(data[_START:].data) != checksum:
            raise ValueError("its checksum is wrong")
        start = _START + header_size
        header = json.loads(bytes(data[_START:start]))
        if len(data) - start != header["size"]:
            raise ValueError(f"it has {len(data) - start} bytes of weights instead of {header['size']}")
        matrices, vectors = {}, {}
        for name, shape in expected_tensors(config).items():
            entry: dict[str, Any] = header["tensors"][name]
            dtype = np.float32 if len(shape) == 1 else np.int32
            first, count = start + entry["offset"], int(np.prod(entry["shape"]))
            tensor = torch.from_numpy(data[first : first + 4 * count].view(dtype).reshape(entry["shape"]))
            if len(shape) == 1:
                vectors[name] = tensor
            else:
                matrices[name] = Packed(Format[entry["format"]], entry["rows"], entry["cols"], tensor)
        return cls(config, matrices, vectors)


_NORM_BEFORE = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}


def _pack_tensor(checkpoint: Checkpoint, name: str, precision: str) -> Packed:
    quantized = checkpoint.quantized(name)
    if quantized is not None and precision in ("auto", "q8", "q4"):
        exact = from_gguf_blocks(quantized.type, quantized.blocks)
        kept = ("q8", "q4") if precision == "auto" else (precision, format_of(name, precision))
        if exact is not None and type(exact).__name__.lower() in kept:
            return pack(exact, quantized.shape[1])
    if precision == "auto":
        stored = checkpoint.tensor(name).dtype if quantized is None else None
        precision = "q8" if quantized is not None else "float32" if stored == torch.float32 else "bfloat16"
    format = format_of(name, precision)
    weight_OI = checkpoint.tensor(name, torch.bfloat16 if format == "bfloat16" else torch.float32)
    if format in ("q8", "q4"):
        return pack(quantized_to(weight_OI, checkpoint, name, format), weight_OI.shape[1])
    return pack(weight_OI, weight_OI.shape[1])


def quantized_to(weight_OI: Tensor, checkpoint: Checkpoint, name: str, format: str) -> Q8 | Q4:
    """The matrix of this name in `q8` or `q4`."""
    return quantize_q8(weight_OI) if format == "q8" else quantize_q4(weight_OI, _importance(checkpoint, name))


def format_of(name: str, precision: str) -> str:
    """What a precision other than `auto` makes of a matrix. Embedding and head are never made 4 bits: there they cost
    quality out of proportion, so GGUF files of type Q4_0 do not either."""
    is_edge = name in ("model.embed_tokens.weight", "lm_head.weight")
    return "q8" if precision == "q4" and is_edge else precision


def _importance(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """How much each column of a matrix matters: the mean square of its input, as far as the weights tell. The input of
    the first matrices of attention and MLP is normalised, then scaled by the norm's weights; of others nothing is
    known."""
    layer, _, part = name.removesuffix(".weight").rpartition(".")
    norm = _NORM_BEFORE.get(part)
    if norm is None:
        return None
    layer = layer.rpartition(".")[0]
    return checkpoint.tensor(f"{layer}.{norm}.weight", torch.float32).square()
