"""Tokenizers from checkpoints: `tokenizer.json`, `tokenizer.model`, GGUF files, and what only transformers can convert.

They run on the `tokenizers` library directly: importing transformers' AutoTokenizer costs more than loading the default
model. It is imported only for folders that have neither of the two files (those of GPT-2's time: `vocab.json` with
`merges.txt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.gguf import GGUFFile
from hopskip.checkpoint.hub_cache import find_base
from hopskip.checkpoint.lora import is_adapter, read_adapter
from hopskip.checkpoint.safetensors import read_json
from hopskip.errors import CheckpointError
from hopskip.machine import require
from hopskip.text.gguf_tokenizer import tokenizer_of_gguf
from hopskip.text.sentencepiece import read_model
from hopskip.text.tokenizer import Encode, Tokenizer

_OLD_FILES = ("vocab.json", "merges.txt")
_SPECIAL_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(
    path: Path, config: ModelConfig, metadata: Mapping[str, Any] | None = None, chat_template: str | None = None
) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file; of an adapter its own, or its base's.

    Args:
        metadata: of a GGUF file, where it has been read already (`Checkpoint.metadata`).
        chat_template: in place of the model's own.

    Raises:
        CheckpointError: there is none, or it is of a kind that cannot be read.
    """
    if path.is_file():
        metadata = GGUFFile(path).metadata if metadata is None else metadata
        return tokenizer_of_gguf(path, metadata, config, chat_template)
    if is_adapter(path) and not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(find_base(read_adapter(path).base_name, path), config, chat_template=chat_template)
    return _from_folder(path, config, chat_template)


def _from_folder(folder: Path, config: ModelConfig, chat_template: str | None) -> Tokenizer:
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, "") if settings_file.exists() else {}
    file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    encode: Encode | None = None
    if file.exists():
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read ({error}); download it again") from None
    elif model_file.exists():
        inner, encode = read_model(model_file, settings)
    else:
        inner = _convert(folder)
    inner.no_truncation()
    inner.no_padding()
    special_tokens = _special_tokens(folder, settings)
    return Tokenizer(
        inner,
        special_tokens=special_tokens,
        chat_template=chat_template or _chat_templates(folder, settings),
        eos_token_ids=config.eos_token_ids,
        encode=encode,
    )


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """A tokenizer that only transformers can build."""
    if not all((folder / name).exists() for name in _OLD_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read; put the model's tokenizer.json and tokenizer_config.json "
            "beside its weights (hf download ID tokenizer.json tokenizer_config.json --local-dir FOLDER)"
        )
    transformers = require("transformers", f"the tokenizer of {folder}, which has no tokenizer.json,")
    try:
        converted = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        inner: tokenizers.Tokenizer = converted.backend_tokenizer
    except Exception as error:  # of many kinds: missing files, missing packages, unknown classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read ({reason}); put the model's tokenizer.json beside its weights"
        ) from None
    return inner


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; written as strings or as objects with a `content`."""
    map_file = folder / "special_tokens_map.json"
    found = {**(read_json(map_file, "") if map_file.exists() else {}), **settings}
    tokens = {}
    for kind in _SPECIAL_KINDS:
        value = found.get(kind)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            tokens[kind] = value
    return tokens


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name, from the places that transformers knows: `tokenizer_config.json`, where there may be a list of them,
    `additional_chat_templates/NAME.jinja`, and before both `chat_template.jinja`, the one for chats."""
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    found = given if isinstance(given, dict) else {} if given is None else {"default": given}
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return found | {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.exists()}
