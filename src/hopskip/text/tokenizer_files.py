"""Tokenizers from checkpoints: `tokenizer.json`, the tables of GGUF files, and what only transformers can convert.

They run on the `tokenizers` library directly: importing transformers' AutoTokenizer costs more than loading the default
model. It is imported only for checkpoints that come with neither `tokenizer.json` nor a byte-level GGUF table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.gguf import GGUFFile
from hopskip.checkpoint.hf_folder import read_json
from hopskip.errors import CheckpointError
from hopskip.text.tokenizer import Tokenizer

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")
_ADD_BOS = "tokenizer.ggml.add_bos_token"
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPECIAL_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file.

    Raises:
        CheckpointError: there is none, or it is of a kind that cannot be read.
    """
    return _from_gguf(path, config) if path.is_file() else _from_folder(path, config)


def _from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, "") if settings_file.exists() else {}
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read ({error}); download it again") from None
    else:
        inner = _convert(folder)
    inner.no_truncation()
    inner.no_padding()
    special_tokens = _special_tokens(folder, settings)
    own_eos = special_tokens.get("eos_token")
    return Tokenizer(
        inner,
        special_tokens=special_tokens,
        chat_template=_chat_template(folder, settings),
        eos_token_ids=config.eos_token_ids or _ids(inner, [own_eos] if own_eos else []),
    )


def _convert(source: Path) -> tokenizers.Tokenizer:
    """A tokenizer that only transformers can build: `tokenizer.model` files, sentencepiece tables in GGUF files."""
    from transformers import AutoTokenizer

    try:
        if source.is_file():
            converted = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        else:
            converted = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        inner: tokenizers.Tokenizer = converted.backend_tokenizer
    except Exception as error:  # of many kinds: missing files, missing packages, unknown classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{source} has no tokenizer that can be read ({reason}); put the model's tokenizer.json beside its weights"
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


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` where there is one, as in transformers; else of tokenizer_config.json, the one for chat."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


@dataclass(frozen=True)
class _Split:
    """How a byte-level vocabulary cuts text into words before merging."""

    pattern: str | None = None
    """None: one digit at a time, then GPT-2's own pattern."""
    ignores_merges: bool = False
    """A word that is a token as a whole stays whole, whatever the merges say."""
    adds_bos: bool = False
    """Where the file does not say."""
    normalizer: normalizers.Normalizer | None = None


_LLAMA3 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignores_merges=True,
    adds_bos=True,
)
_QWEN2 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    normalizer=normalizers.NFC(),
)
_SPLITS = {
    "smollm": _Split(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""By `tokenizer.ggml.pre`. A wrong pattern would give wrong ids without a sign of it, so an unknown one is refused."""


def _from_gguf(path: Path, config: ModelConfig) -> Tokenizer:
    metadata = GGUFFile(path).metadata
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(f"{path} holds no tokenizer; use a complete file, or the model's Hugging Face folder")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        split = _SPLITS.get(str(metadata.get("tokenizer.ggml.pre")))
        if split is None:
            raise CheckpointError(
                f"{path}: pre-tokenizer {metadata.get('tokenizer.ggml.pre')!r} is not supported (those that are: "
                f"{', '.join(_SPLITS)}); use the model's Hugging Face folder"
            )
        try:
            inner = _byte_level(metadata, split)
        except Exception as error:  # the library raises plain Exception; tables may be missing or malformed
            raise CheckpointError(f"{path}: the tokenizer's tables are corrupt ({error}); download it again") from None
    else:
        inner = _convert(path)
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special_tokens[f"{name}_token"] = tokens[token_id]
    template: Any = metadata.get("tokenizer.chat_template")
    # a GGUF file has no generation_config.json; the chat template tells what ends a turn
    end_of_turn = [token for token in _END_OF_TURN if template and token in template]
    return Tokenizer(
        inner,
        special_tokens=special_tokens,
        chat_template=template,
        eos_token_ids=(*config.eos_token_ids, *_ids(inner, end_of_turn)),
    )


def _byte_level(metadata: Mapping[str, Any], split: _Split) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata of a byte-level (`gpt2`) vocabulary describes."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignores_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    if split.pattern is None:
        words: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    else:
        words = pre_tokenizers.Split(Regex(split.pattern), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    if split.normalizer is not None:
        inner.normalizer = split.normalizer
    inner.decoder = decoders.ByteLevel()
    by_kind = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in by_kind if k == _CONTROL])
    inner.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in by_kind if k == _USER_DEFINED])
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(bos_id, int) and 0 <= bos_id < len(tokens) and metadata.get(_ADD_BOS, split.adds_bos):
        bos = tokens[bos_id]
        inner.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return inner


def _ids(inner: tokenizers.Tokenizer, tokens: Iterable[str]) -> list[int]:
    return [index for index in map(inner.token_to_id, tokens) if index is not None]
