"""Write a GGUF file with its matrices in another type:

    python -m benchmarks.requantize IN.gguf OUT.gguf --type q8_0

For measuring. Values that were quantized before are quantized again, so quality is lost twice; or, between blocks of a
similar kind, hardly at all, because the values lie on a grid of few levels already. With --shuffle the dimensions of
the model are reordered first. That leaves its function alone, but a block then holds weights of many old blocks, which
share no grid: a quantizer meets them as it would meet weights that were never quantized.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from hopskip.errors import CheckpointError, ConfigError, HopskipError

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_EDGES = ("token_embd.weight", "output.weight")
_READ_HIDDEN = (
    "token_embd", "attn_norm", "attn_q", "attn_k", "attn_v", "ffn_norm", "ffn_gate", "ffn_up", "output_norm", "output",
)  # fmt: skip
"""Tensors whose columns are the hidden dimensions."""


def requantize(source: Path, target: Path, kind: str, *, pure: bool = False, shuffle: int | None = None) -> None:
    """Copy `source` to `target`, every matrix as values or blocks of `kind`. Vectors keep their type.

    Args:
        pure: with q4_0, embedding and head become q4_0 too. By default they become q8_0 (llama.cpp's own files have
            Q6_K there, which the gguf package cannot write).
        shuffle: a seed; reorder the model's dimensions first.

    Raises:
        ConfigError: an unknown type, a seed below 0, or source and target are the same file.
        CheckpointError: the source cannot be read, or is not a decoder of the Llama family (to be shuffled).
    """
    if kind not in _TYPES:
        raise ConfigError(f"type is {kind!r}; choose one of {', '.join(_TYPES)}")
    if shuffle is not None and shuffle < 0:
        raise ConfigError(f"shuffle is {shuffle}; it is a seed, 0 or above")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the input itself; give another name for the output")
    try:
        reader = gguf.GGUFReader(source)
    except FileNotFoundError:
        raise CheckpointError(f"{source} does not exist; give a GGUF file") from None
    except Exception as error:  # of many kinds, by what is corrupt
        raise CheckpointError(f"{source} cannot be read as GGUF ({error})") from None
    writer = gguf.GGUFWriter(target, _text(reader, "general.architecture"))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    order = _Shuffle(reader, shuffle) if shuffle is not None else None
    block_type, file_type = _TYPES[kind]
    edge_type, _ = _TYPES["q8_0" if kind == "q4_0" and not pure else kind]
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        wanted = edge_type if tensor.name in _EDGES else block_type if len(tensor.shape) > 1 else tensor.tensor_type
        if order is None and tensor.tensor_type == wanted:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        if order is not None:
            values = np.ascontiguousarray(order.apply(tensor.name, values))
        writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Shuffle:
    """Random orders of the hidden dimensions, of those inside the MLP, and of those that a head's values have."""

    def __init__(self, reader: Any, seed: int) -> None:
        shapes = {tensor.name: tensor.shape for tensor in reader.tensors}  # in GGUF's order: columns, rows
        for name in ("blk.0.ffn_up.weight", "blk.0.attn_output.weight"):
            if name not in shapes:
                raise CheckpointError(f"the GGUF file has no tensor {name}; it is not a model that can be shuffled")
        random = np.random.default_rng(seed)
        self._hidden = random.permutation(int(shapes["blk.0.ffn_up.weight"][0]))
        self._inner = random.permutation(int(shapes["blk.0.ffn_up.weight"][1]))
        num_heads = _number(reader, "attention.head_count")
        num_kv_heads = _number(reader, "attention.head_count_kv", num_heads)
        head_dim = int(shapes["blk.0.attn_output.weight"][0]) // num_heads
        within = random.permutation(head_dim)
        self._values = (np.arange(num_kv_heads)[:, None] * head_dim + within).ravel()
        self._outputs = (np.arange(num_heads)[:, None] * head_dim + within).ravel()

    def apply(self, name: str, values: Any) -> Any:
        """A tensor [rows, columns] or [columns] in the new order."""
        part, _, kind = name.removeprefix("blk.").lstrip("0123456789.").rpartition(".")
        rows = {
            "attn_v": self._values, "attn_output": self._hidden,
            "ffn_gate": self._inner, "ffn_up": self._inner, "ffn_down": self._hidden,
        }  # fmt: skip
        columns = dict.fromkeys(_READ_HIDDEN, self._hidden) | {"attn_output": self._outputs, "ffn_down": self._inner}
        if part in rows:  # a bias has the rows of its matrix
            values = values[rows[part]]
        return values[..., columns[part]] if part in columns and kind == "weight" else values


def _text(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    if field is None:
        raise CheckpointError(f"the GGUF file has no {name}; it is not a model")
    return str(field.contents())


def _number(reader: Any, key: str, default: int | None = None) -> int:
    name = f"{_text(reader, 'general.architecture')}.{key}"
    field = reader.get_field(name)
    number = default if field is None else int(field.contents())
    if number is None:
        raise CheckpointError(f"the GGUF file has no {name}; it is not a model")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requantize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a GGUF file")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--type", required=True, choices=list(_TYPES), help="type of the matrices")
    parser.add_argument("--pure", action="store_true", help="q4_0 for embedding and head as well, not q8_0")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="reorder the model's dimensions first")
    arguments = parser.parse_args()
    try:
        requantize(arguments.source, arguments.target, arguments.type, pure=arguments.pure, shuffle=arguments.shuffle)
    except HopskipError as error:
        print(f"requantize: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
