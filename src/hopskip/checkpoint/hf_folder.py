"""What a Hugging Face checkpoint folder says of its model, and folders that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.kinds import misplaced, names_in, obstacle, refuse_pointer
from hopskip.checkpoint.quantization import Fp8Format, fp8_format
from hopskip.checkpoint.safetensors import has_weights, read_json
from hopskip.errors import CheckpointError


def read_config(folder: Path) -> tuple[ModelConfig, Fp8Format | None]:
    """The model's shape, from `config.json` and, for the EOS ids, `generation_config.json`; and how its weights are
    scaled, None for plain ones.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture or quantization is not supported.
    """
    config = read_json(folder / "config.json", "is this a complete Hugging Face checkpoint?")
    shape = ModelConfig.from_hf(config, read_generation(folder))
    quantization = folder / "hf_quant_config.json"  # where ModelOpt writes what others write into config.json
    return shape, fp8_format(config, read_json(quantization, "") if quantization.exists() else None)


def read_generation(folder: Path) -> dict[str, Any]:
    """`generation_config.json`; empty if there is none."""
    path = folder / "generation_config.json"
    return read_json(path, "") if path.exists() else {}


def refuse_folder(folder: Path) -> None:
    """Raises CheckpointError if a folder is no language model, or was cloned without its large files."""
    names = names_in(folder)
    if reason := obstacle(names, has_weights=has_weights(names)) or misplaced(folder, names):
        raise CheckpointError(f"{folder} {reason}")
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        refuse_pointer(folder / name)
