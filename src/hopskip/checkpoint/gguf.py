"""GGUF files: the header (metadata and tensor table), the raw blocks, and the model's shape in Hugging Face terms.

The header is read here rather than by `gguf.GGUFReader`, which makes an array object of every token of the vocabulary
(2.6 s for 49,152 tokens, 0.1 s here) and trusts the counts that it finds. Blocks are dequantized by the `gguf` package.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.families import unsupported
from hopskip.checkpoint.gguf_names import part_of
from hopskip.checkpoint.kinds import refuse_pointer
from hopskip.checkpoint.stored import BLOCK_TYPES, StoredTensor, dequantize
from hopskip.errors import CheckpointError, shown

Value = bool | int | float | str | list[Any]
"""A metadata value."""


ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`general.architecture` -> Hugging Face `model_type`."""

PERMUTED_ARCHITECTURES = ("llama", "mistral")
"""Those whose query and key rows llama.cpp stores in another order, see `stored.unpermuted`."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_PARTS = {name: own for own, name in (_LAYER_NAMES | _OTHER_NAMES).items()}

ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: where llama.cpp keeps the llama3 scaling, one divisor per rotary frequency."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST_HEADER, _LONGEST_ARRAY = 1 << 28, 1 << 22  # far above any vocabulary
_MOST_DIVISORS, _LONGEST_NAME = 1 << 16, 256
_PIECE = re.compile(r"\.gguf[-.](split-\w+|part\w+)$", re.IGNORECASE)
"""How files were named that had been cut into pieces of bytes, before there were split ones."""
_VERSIONS = (2, 3)  # version 1 counted in 32 bits; no file in use has it


class GGUFFile:
    """The header of a GGUF file, checked against the file's size, and access to the blocks of its tensors.

    Raises:
        CheckpointError: not a GGUF file, a corrupt or truncated one, or one with a type that hopskip cannot read.
    """

    def __init__(self, path: Path) -> None:
        refuse_pointer(path)
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, StoredTensor] = {}
        """By GGUF name."""
        self.header_size = 0
        self.parts: dict[Path, int] = {}
        """The files that hold the tensors, and the size of each one's header in bytes."""
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._parse(_Reader(data))
        except (OSError, ValueError, struct.error, OverflowError, RecursionError) as error:
            # mmap: empty or unreadable file; struct and the reader: a count or length that points past the end
            remedy = "join the pieces first: cat" if _PIECE.search(path.name) else "copy or download it again"
            raise CheckpointError(f"{path} cannot be read as GGUF ({error}); {remedy}") from None
        self.parts[path] = self.header_size

    def _parse(self, reader: _Reader) -> None:
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        version, num_tensors, num_metadata = reader.unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version} or big-endian; hopskip reads little-endian versions 2 and 3")
        for _ in range(reader.checked_count(num_metadata, 13)):
            key = reader.string()
            if key in self.metadata:
                raise ValueError(f"metadata {shown(key)} is there twice")
            self.metadata[key] = reader.value(reader.unpack("<I")[0])
        entries = [reader.tensor_entry() for _ in range(reader.checked_count(num_tensors, 24))]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shown(alignment)}, not a power of two")
        self.header_size = end = -(-reader.position // alignment) * alignment
        for name, shape, type_id, offset in entries:
            if self.header_size + offset != end:
                # as in llama.cpp: an offset that was changed cannot go unnoticed
                raise ValueError(f"tensor {name!r} begins at byte {self.header_size + offset} instead of {end}")
            tensor = self._add_tensor(name, shape, type_id, end, reader.file_size)
            end += -(-tensor.num_bytes // alignment) * alignment

    def _add_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int, file_size: int) -> StoredTensor:
        block = BLOCK_TYPES.get(type_id)
        if block is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {_type_name(type_id)}, which hopskip does not read; it reads "
                f"{', '.join(sorted(b.name for b in BLOCK_TYPES.values()))}"
            )
        if not shape or min(shape) < 1 or shape[-1] % block.num_values:
            raise ValueError(f"tensor {name!r} has shape {list(shape)}, impossible for type {block.name}")
        if name in self.tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        tensor = StoredTensor(self.path, offset, block, shape)
        if offset + tensor.num_bytes > file_size:
            raise ValueError(f"tensor {name!r} ends at byte {offset + tensor.num_bytes}, the file at {file_size}")
        self.tensors[name] = tensor
        return tensor

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata of the architecture: `get("block_count")` reads `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def config(self) -> ModelConfig:
        """The model's shape, from the metadata.

        Raises:
            CheckpointError: an architecture or variant that is not supported, or a key is missing.
        """
        kind = self.metadata.get("general.type", "model")
        if kind != "model" or self.architecture == "clip":
            raise CheckpointError(
                f"{self.path} is no model but something beside one ({shown(kind)}); give the model's file"
            )
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path}: "
                + unsupported(f"architecture {shown(self.architecture)}", self.architecture, tuple(ARCHITECTURES))
            )
        if self.get("expert_count", 0):
            raise CheckpointError(f"{self.path} is a mixture of experts, which hopskip does not run; use a dense model")
        try:
            return ModelConfig.from_hf(self._hf_config())
        except KeyError as error:
            raise CheckpointError(f"{self.path} lacks the metadata or tensor {error.args[0]!r}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.path} has metadata of the wrong type ({error}); download it again") from None

    def _hf_config(self) -> dict[str, Any]:
        """The metadata, spelled as a Hugging Face `config.json`."""
        prefix = self.architecture
        num_heads = self.metadata[f"{prefix}.attention.head_count"]
        head_dim = self.get("attention.key_length") or self.get("rope.dimension_count")
        window = self.get("attention.sliding_window")
        eos = [self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        return {
            "model_type": ARCHITECTURES[prefix],
            # the matrix is the truth: the vocabulary may be padded
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": self.metadata[f"{prefix}.embedding_length"],
            "intermediate_size": self.metadata[f"{prefix}.feed_forward_length"],
            "num_hidden_layers": self.metadata[f"{prefix}.block_count"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.get("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.metadata[f"{prefix}.context_length"],
            "rms_norm_eps": self.metadata[f"{prefix}.attention.layer_norm_rms_epsilon"],
            "rope_parameters": self._rope_parameters(head_dim),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "sliding_window": window,
            "use_sliding_window": bool(window) and prefix in ("llama", "mistral"),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(dict.fromkeys(i for i in eos if i is not None)),
        }

    def _rope_parameters(self, head_dim: Any) -> dict[str, Any]:
        """llama.cpp's RoPE keys in transformers' words; the llama3 scaling comes as a tensor of divisors."""
        num_rotated = self.get("rope.dimension_count", head_dim)
        if num_rotated != head_dim:
            raise CheckpointError(
                f"{self.path} rotates {num_rotated} of {head_dim} dimensions; hopskip needs all of them"
            )
        parameters: dict[str, Any] = {"rope_theta": self.get("rope.freq_base", 10_000.0), "rope_type": "default"}
        kind = self.get("rope.scaling.type", "none")
        if kind != "none":
            parameters["rope_type"] = kind
            parameters["factor"] = self.get("rope.scaling.factor")
            parameters["original_max_position_embeddings"] = self.get("rope.scaling.original_context_length")
        elif old_factor := self.get("rope.scale_linear"):
            parameters |= {"rope_type": "linear", "factor": old_factor}
        if ROPE_FACTORS in self.tensors:
            divisors = self.tensors[ROPE_FACTORS]
            if divisors.num_values > _MOST_DIVISORS:
                raise ValueError(f"{ROPE_FACTORS} has {divisors.num_values} values")
            parameters["frequency_divisors"] = dequantize(divisors.blocks(), divisors.type).flatten().tolist()
        return parameters


def open_gguf(path: Path) -> GGUFFile:
    """A GGUF file; any part of a split one stands for all of them. Metadata comes from part one, tensors from all.

    Raises:
        CheckpointError: as `GGUFFile`; or a part is missing, or not of this model.
    """
    file = GGUFFile(path)
    count = file.metadata.get("split.count", 1)
    if count in (0, 1):
        return file
    part = part_of(path.name)
    if part is None or part.count != count:
        raise CheckpointError(
            f"{path} is one part of {count}, but its name does not say where the others are; name the parts "
            f"NAME-00001-of-{count:05}.gguf and so on, or join them: llama-gguf-split --merge"
            if isinstance(count, int)
            else f"{path}: split.count is {shown(count)}, not a number; download it again"
        )
    paths = [path.with_name(name) for name in part.names()]
    if missing := [other.name for other in paths if not other.is_file()]:
        raise CheckpointError(f"{path} is one part of {count}; beside it there is no {missing[0]}: download all parts")
    first = GGUFFile(paths[0])
    for index, other in enumerate(first if other == paths[0] else GGUFFile(other) for other in paths):
        own = [other.metadata.get(f"split.{key}") for key in ("no", "count", "tensors.count")]
        if own != [index, count, first.metadata.get("split.tensors.count")]:
            raise CheckpointError(f"{other.path} is not part {index + 1} of {paths[0].name}; download all parts again")
        if other is not first and (twice := first.tensors.keys() & other.tensors.keys()):
            raise CheckpointError(f"{other.path} repeats the tensor {min(twice)} of another part; download it again")
        first.tensors |= other.tensors
        first.parts |= other.parts
    if len(first.tensors) != first.metadata.get("split.tensors.count"):
        raise CheckpointError(
            f"{path}: the parts have {len(first.tensors)} tensors of {first.metadata.get('split.tensors.count')}; "
            "download all parts again"
        )
    return first


class _Reader:
    """A position in the file's bytes. Every length is checked before anything is allocated for it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.file_size = len(data)
        self.size = min(len(data), _LONGEST_HEADER)
        self.position = 0

    def take(self, count: int) -> bytes:
        start = self.position
        self.position = start + self.checked_count(count, 1)
        return self.data[start : self.position]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        self.checked_count(1, size)
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += size
        return values

    def checked_count(self, count: int, item_bytes: int) -> int:
        """`count` items of at least `item_bytes` each must fit in the rest of the file."""
        if count * item_bytes > self.size - self.position:
            raise ValueError(f"{count} items announced at byte {self.position} of {self.size}: truncated or corrupt")
        return count

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        return self.take(length).decode("utf-8")

    def value(self, type_id: int) -> Value:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            item_type, count = self.unpack("<IQ")
            return self.array(item_type, count)
        if type_id not in _SCALARS:
            raise ValueError(f"metadata of unknown type {type_id} at byte {self.position}")
        value: bool | int | float = self.unpack(_SCALARS[type_id])[0]
        return value

    def array(self, item_type: int, count: int) -> list[Any]:
        if count > _LONGEST_ARRAY:
            raise ValueError(f"an array of {count} items at byte {self.position}")
        if item_type in _SCALARS:
            code = _SCALARS[item_type][1]
            self.checked_count(count, struct.calcsize("<" + code))
            return list(self.unpack(f"<{count}{code}"))
        self.checked_count(count, 8)
        if item_type == _STRING:
            return self._strings(count)
        return [self.value(item_type) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """As `string`, without a call per string: vocabularies and merges have hundreds of thousands."""
        data, position, unpack_from, strings = self.data, self.position, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = position + 8
            position = start + unpack_from(data, position)[0]
            strings.append(data[start:position].decode("utf-8"))  # a slice past the end is short: unpack then fails
        if position > self.size:
            raise ValueError(f"a string ends at byte {position} of {self.size}")
        self.position = position
        return strings

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the rows' length last, type and offset of one tensor."""
        name = self.string()
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a tensor's name has {len(name)} characters")
        (num_dims,) = self.unpack("<I")
        if num_dims > 4:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
        dims = self.unpack(f"<{num_dims}Q")
        type_id, offset = self.unpack("<IQ")
        return name, tuple(reversed(dims)), type_id, offset


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None if it has none.

    >>> hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, suffix = gguf_name.rpartition(".")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    if block == "blk" and index.isdecimal() and part in _LAYER_NAMES:
        return f"model.layers.{index}.{_LAYER_NAMES[part]}.{suffix}"
    return None


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor that has one.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        index, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{_GGUF_PARTS[part]}.{suffix}"
    return f"{_GGUF_PARTS[stem]}.{suffix}"


def _type_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(type_id).name)
    except ValueError:
        return f"number {type_id}"
