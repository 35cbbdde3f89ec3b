"""Tokenizers from the tables of GGUF files, with the ids that llama.cpp gives (`special=True`).

Where llama.cpp and a model's own tokenizer.json differ, it is llama.cpp that is followed: a file was made and tested
with it. It does not normalize (Qwen2's own tokenizer composes accents first), puts a space before the text behind each
special token of a SentencePiece vocabulary (as Llama 2's own tokenizer does, and Mistral's later ones do not), and
knows a few tokens by their text where a file does not mark them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import CheckpointError
from hopskip.text.pre_tokenizers import PRE_TOKENIZERS, REFUSED, PreTokenizer
from hopskip.text.sentencepiece import merging_encoder, vocabulary_only
from hopskip.text.tokenizer import Encode, Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
_OTHER_KINDS = {
    "bert": "WordPiece",
    "t5": "Unigram",
    "rwkv": "RWKV's",
    "plamo2": "PLaMo's",
    "gemma4": "Gemma's",
    "hybriddna": "DNA",
    "whitespace": "word",
}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""What llama.cpp takes where a SentencePiece file names none."""

_CONTROL_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~["),
        # infilling: by Qwen and StarCoder, DeepSeek, CodeLlama, GLM and Falcon
        *(f"<{word}>" for part in ("prefix", "suffix", "middle", "pad") for word in (f"|fim_{part}|", f"fim-{part}")),
        *(f"<fim_{part}>" for part in ("prefix", "suffix", "middle", "pad")),
        *(f"<\uff5cfim▁{part}\uff5c>" for part in ("begin", "hole", "end")),
        *(f"{space}<{part}>" for part in ("PRE", "SUF", "MID") for space in ("", "▁")),
        *(f"<|{code}{part}|>" for part in ("prefix", "suffix", "middle") for code in ("code_", "")),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>", "<PAD>", "[PAD]"),
    )
)
"""Tokens that llama.cpp takes for control tokens whatever the file says: files of many converters say otherwise."""


def tokenizer_of_gguf(
    path: Path, metadata: Mapping[str, Any], config: ModelConfig, chat_template: str | None = None
) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Args:
        chat_template: in place of the file's own.

    Raises:
        CheckpointError: there is none, it is of a kind that cannot be read, or its tables are damaged.
    """
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(f"{path} holds no tokenizer; use a complete file, or the model's Hugging Face folder")
    kind = metadata.get("tokenizer.ggml.model")
    encode: Encode | None = None
    try:
        if kind == "llama":
            inner, encode = _sentencepiece(metadata)
        elif kind == "gpt2":
            inner = _byte_level(metadata, _pre_tokenizer(path, metadata))
        else:
            what = f"{_OTHER_KINDS[kind]} vocabulary ({kind!r})" if kind in _OTHER_KINDS else f"vocabulary {kind!r}"
            raise CheckpointError(f"{path}: its {what} is not supported; use the model's Hugging Face folder")
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception; tables may be missing or malformed
        raise CheckpointError(f"{path}: the tokenizer's tables are corrupt ({error!r}); download it again") from None
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: _token_id(metadata, key) for name, key in named.items()}
    special_tokens = {f"{name}_token": tokens[index] for name, index in found.items() if index is not None}
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    templates: Any = {name: metadata[key] for name, key in keys.items() if key in metadata}
    return Tokenizer(
        inner,
        special_tokens=special_tokens,
        chat_template=chat_template or templates,
        eos_token_ids=config.eos_token_ids,
        encode=encode,
    )


def _pre_tokenizer(path: Path, metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise CheckpointError(
            f"{path} does not name its pre-tokenizer (tokenizer.ggml.pre), as files of early 2024 and before; without "
            "it text would be cut into other tokens than the model knows. Use a newer file, or the model's Hugging "
            "Face folder"
        )
    row = PRE_TOKENIZERS.get(str(name))
    if row is None:
        reason = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise CheckpointError(
            f"{path}: pre-tokenizer {name!r} is not supported{reason}; use the model's Hugging Face folder"
        )
    return row


def _token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    """The id of `bos`, `eos`, `unknown` or `padding`, if the vocabulary has such a token."""
    default = _SENTENCEPIECE_IDS.get(key) if metadata.get("tokenizer.ggml.model") == "llama" else None
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    # an id beyond the vocabulary counts for nothing
    for index in (metadata.get(f"tokenizer.ggml.{key}_token_id"), default):
        if isinstance(index, int) and 0 <= index < num_tokens:
            return index
    return None


def _around(metadata: Mapping[str, Any], *, adds_bos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and behind a text.

    Args:
        adds_bos: where the file does not say.
    """
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {key: _token_id(metadata, key) if is_wanted else None for key, is_wanted in wanted.items()}
    bos, eos = (() if index is None else (index,) for index in (ids["bos"], ids["eos"]))
    return bos, eos


def _added_tokens(metadata: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens that are found in a text before it is cut into words."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or []
    if kinds and len(kinds) < len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(kinds)} token types")
    is_phi3 = any(name in str(metadata.get("general.name")).lower() for name in ("phi-3", "phi3"))
    added = {}
    for index, (token, kind) in enumerate(zip(tokens, kinds or [1] * len(tokens), strict=False)):
        is_special = kind in (_UNKNOWN, _CONTROL) or token in _CONTROL_TEXTS
        if token and (is_special or kind == _USER_DEFINED):
            rstrip = is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
            added[index] = AddedToken(token, normalized=False, special=is_special, rstrip=rstrip)
    return added


def _byte_level(metadata: Mapping[str, Any], row: PreTokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of a byte-level (`gpt2`) vocabulary."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # of a merge that comes twice, the first gives the rank
    merges: Any = [tuple(merge.split(" ", 1)) for merge in dict.fromkeys(metadata["tokenizer.ggml.merges"])]
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=row.ignores_merges))
    inner.pre_tokenizer = row.build()
    inner.decoder = decoders.ByteLevel()
    added = _added_tokens(metadata).values()
    inner.add_special_tokens([token for token in added if token.special])
    inner.add_tokens([token for token in added if not token.special])
    bos, eos = _around(metadata, adds_bos=row.adds_bos)
    if bos or eos:
        named = [(tokens[index], index) for index in dict.fromkeys((*bos, *eos))]
        single = [*(tokens[index] for index in bos), "$A", *(tokens[index] for index in eos)]
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return inner


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, Encode]:
    """The tokenizer of a SentencePiece (`llama`) vocabulary."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = [float(score) for score in metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)]
    if len(scores) < len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(scores)} scores")
    added = _added_tokens(metadata)
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unk_id = _token_id(metadata, "unknown")
    bos, eos = _around(metadata, adds_bos=True)
    encode = merging_encoder(tokens, scores, unk_id=unk_id or 0, added=added, has_prefix=has_prefix, bos=bos, eos=eos)
    pieces = {token: index for index, token in enumerate(tokens)}
    return vocabulary_only(pieces, added, tokens[unk_id or 0], has_prefix=has_prefix), encode
