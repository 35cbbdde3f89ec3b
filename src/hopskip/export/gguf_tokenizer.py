"""The tables of a tokenizer as GGUF files have them, from a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import CheckpointError
from hopskip.export.same_ids import TEXTS, around, check_ids
from hopskip.export.source import Source
from hopskip.machine import require
from hopskip.text.gguf_tokenizer import tokenizer_of_gguf
from hopskip.text.pre_tokenizers import PRE_TOKENIZERS
from hopskip.text.sentencepiece import SPACE
from hopskip.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""
_FIRST_CHOICES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3")
"""Of several names for the same splitter, those that llama.cpp's own converter gives to models that run here."""
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_NO_SCORE = -1e6
"""Of a piece that no merge makes."""


def tokenizer_metadata(source: Source) -> dict[str, Any]:
    """Every key `tokenizer.*` of a GGUF file for this model. Those of a GGUF file are taken as they are.

    Raises:
        CheckpointError: the tokenizer is of a kind that GGUF files do not have, or would give other ids.
    """
    metadata = source.checkpoint.metadata
    if metadata is not None:
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    path, config, tokenizer = source.checkpoint.path, source.checkpoint.config, source.tokenizer
    keys = {**_vocabulary(source), **_special_ids(tokenizer, config)}
    if tokenizer.chat is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat.default.source
        if tokenizer.chat.for_tools is not tokenizer.chat.default:
            keys["tokenizer.chat_template.tool_use"] = tokenizer.chat.for_tools.source
    written = tokenizer_of_gguf(path, keys, config)
    check_ids(path, tokenizer.encode, lambda text, adds: written.encode(text, add_special_tokens=adds))
    return keys


def _vocabulary(source: Source) -> dict[str, Any]:
    folder, size = source.tokenizer_folder, source.checkpoint.config.vocab_size
    assert folder is not None
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        keys = _pieces(folder)
    else:
        keys = _of_library(source.tokenizer.inner, source.checkpoint.path)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    if len(tokens) > size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(tokens)} tokens, the model's vocabulary {size}; use the tokenizer that "
            "came with the model"
        )
    kinds += [_UNUSED] * (size - len(tokens))
    if (scores := keys.get("tokenizer.ggml.scores")) is not None:
        scores += [_NO_SCORE] * (size - len(tokens))
    tokens += [f"[PAD{index}]" for index in range(len(tokens), size)]  # vocabularies may be padded
    return keys


def _of_library(inner: tokenizers.Tokenizer, place: Path) -> dict[str, Any]:
    """Of a tokenizer of the `tokenizers` library."""
    found = json.loads(inner.to_str())
    model = found["model"]
    decoder = json.dumps(found["decoder"])
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise CheckpointError(f"{place}: a tokenizer of kind {model.get('type')!r} cannot be written as GGUF here")
    added = inner.get_added_tokens_decoder()
    by_id = {index: token for token, index in inner.get_vocab(with_added_tokens=True).items()}
    ids = range(max(by_id) + 1)
    tokens = [by_id.get(index, f"[PAD{index}]") for index in ids]
    is_byte_level = "ByteLevel" in decoder
    kinds = [_UNUSED if index not in by_id else _NORMAL for index in ids]
    for index, entry in added.items():
        kinds[index] = _CONTROL if entry.special else _USER_DEFINED
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if is_byte_level:
        keys["tokenizer.ggml.model"] = "gpt2"
        keys["tokenizer.ggml.pre"] = splitter_name(inner, bool(model.get("ignore_merges")), place)
        keys["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
        return keys
    if not model.get("byte_fallback"):
        raise CheckpointError(
            f"{place}: its tokenizer is neither byte-level nor SentencePiece's; GGUF has no such kind"
        )
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    for index, token in enumerate(tokens):
        if token == model.get("unk_token"):
            kinds[index] = _UNKNOWN
        elif kinds[index] == _NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[index] = _BYTE
    first = by_id.get(next(iter(inner.encode("a", add_special_tokens=False).ids), -1), "")
    return {
        **keys,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores.get(token, _NO_SCORE) for token in tokens],
        "tokenizer.ggml.add_space_prefix": first.startswith(SPACE),
    }


def _pieces(folder: Path) -> dict[str, Any]:
    """Of sentencepiece's own file."""
    require("sentencepiece", f"the tokenizer of {folder}, which has no tokenizer.json,")
    from gguf.vocab import SentencePieceVocab

    entries = list(SentencePieceVocab(folder).all_tokens())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text.decode("utf-8") for text, _, _ in entries],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in entries],
        "tokenizer.ggml.token_type": [int(kind) for _, _, kind in entries],
    }


def splitter_name(inner: tokenizers.Tokenizer, ignores_merges: bool, place: Path) -> str:
    """The name in GGUF files (`tokenizer.ggml.pre`) of the splitter that cuts text as a byte-level tokenizer does.

    Raises:
        CheckpointError: none does.
    """
    own = inner.pre_tokenizer
    if own is not None:
        wanted = [_cut(own, text) for text in TEXTS]
        for name in dict.fromkeys((*_FIRST_CHOICES, *PRE_TOKENIZERS)):
            row = PRE_TOKENIZERS[name]
            splitter = row.build()
            if row.ignores_merges == ignores_merges and all(
                _cut(splitter, text) == cut for text, cut in zip(TEXTS, wanted, strict=True)
            ):
                return name
    raise CheckpointError(
        f"{place}: its tokenizer cuts text in a way that llama.cpp has no name for (tokenizer.ggml.pre), so a GGUF "
        "file would give other ids; use the folder"
    )


def _cut(splitter: tokenizers.pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(text)]


def _special_ids(tokenizer: Tokenizer, config: ModelConfig) -> Mapping[str, Any]:
    """Ids of BOS and the like, and which of them a text gets."""
    named = {key: tokenizer.special_tokens.get(kind) for key, kind in _NAMED.items()}
    ids = {key: None if token is None else tokenizer.inner.token_to_id(token) for key, token in named.items()}
    before, after = around(tokenizer)
    if len(before) == 1:  # what a text gets is BOS, whatever the settings say
        ids["bos"] = before[0]
    elif ids["bos"] is None:
        ids["bos"] = config.bos_token_id
    ends = list(tokenizer.eos_token_ids)
    if ids["eos"] in ends:
        ends.remove(ids["eos"])
    elif ends:
        ids["eos"] = ends.pop(0)
    ids |= dict(zip(("eot", "eom"), ends, strict=False))
    keys: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": index for key, index in ids.items() if index is not None}
    keys["tokenizer.ggml.add_bos_token"] = before == [ids["bos"]]
    keys["tokenizer.ggml.add_eos_token"] = after == [ids["eos"]]
    return keys
