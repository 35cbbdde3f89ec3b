"""Write a GGUF file with its matrices in another block type:

    python -m hopskip.evaluate.requantize IN.gguf OUT.gguf --type q8_0

For measuring speed: values that were quantized before are quantized again, so quality is lost twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gguf
from gguf.quants import dequantize, quantize

from hopskip.errors import CheckpointError, ConfigError, HopskipError

_TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
_FILE_TYPES = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
_HEADS = ("token_embd.weight", "output.weight")


def requantize(source: Path, target: Path, kind: str) -> None:
    """Copy `source` to `target`, every matrix as blocks of `kind`. Vectors stay as they are.

    With q4_0, embedding and head become q8_0 (llama.cpp's own files have Q6_K there, which the gguf package cannot
    write).

    Raises:
        ConfigError: an unknown type, or source and target are the same file.
        CheckpointError: the source cannot be read.
    """
    if kind not in _TYPES:
        raise ConfigError(f"type is {kind!r}; choose one of {', '.join(_TYPES)}")
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
    writer.add_file_type(_FILE_TYPES[kind])
    for tensor in reader.tensors:
        wanted = _TYPES["q8_0" if tensor.name in _HEADS else kind]
        if len(tensor.shape) < 2 or tensor.tensor_type == wanted:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    if field is None:
        raise CheckpointError(f"the GGUF file has no {name}; it is not a model")
    return str(field.contents())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hopskip.evaluate.requantize", description=__doc__)
    parser.add_argument("source", type=Path, help="a GGUF file")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--type", required=True, choices=list(_TYPES), help="block type of the matrices")
    arguments = parser.parse_args()
    try:
        requantize(arguments.source, arguments.target, arguments.type)
    except HopskipError as error:
        print(f"requantize: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
