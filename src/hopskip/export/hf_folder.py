"""An ordinary checkpoint folder: config, tokenizer and weights, as transformers, vLLM and SGLang load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers, processors

from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import ConfigError
from hopskip.export.same_ids import around, check_ids
from hopskip.export.source import Source, settings_of
from hopskip.export.tensors import PLAIN_NAMES, DType, Outgoing, from_checkpoint, write_json
from hopskip.text.sentencepiece import SPACE
from hopskip.text.tokenizer import Tokenizer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_OF_THE_SOURCE = (
    *("quantization_config", "compression_config", "auto_map", "_name_or_path", "_attn_implementation", "torch_dtype"),
    "transformers_version",
)
"""Keys of a config that would be wrong beside other weights, or name files that are not there."""
_LLAMA3: tuple[dict[str, Any], ...] = tuple(
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
)
"""Of Llama 3.1 and 3.3, and of Llama 3.2."""


def plain_type(checkpoint: Checkpoint, name: str, dtype: DType) -> str:
    """In which type a tensor goes to a folder: its own if that is a plain one and `dtype` is `auto`."""
    own = checkpoint.stored(name).type
    if dtype != "auto":
        return PLAIN_NAMES[dtype]
    return own.name if checkpoint.quantization is None and own.dtype else PLAIN_NAMES[checkpoint.dtype]


def weights(checkpoint: Checkpoint, config: ModelConfig, dtype: DType) -> list[Outgoing]:
    """The tensors of a model of this shape, which has the checkpoint's first layers."""
    return [from_checkpoint(checkpoint, n, plain_type(checkpoint, n, dtype)) for n in expected_tensors(config)]


def config_json(source: Source, config: ModelConfig, dtype: DType) -> dict[str, Any]:
    """The `config.json` of a model of this shape: the source's own, with what has changed."""
    folder = source.model_folder
    found = _spelled(config) if folder is None else settings_of(folder, "config.json")
    found = {name: value for name, value in found.items() if name not in _OF_THE_SOURCE}
    depth = config.num_hidden_layers
    found["num_hidden_layers"] = depth
    if isinstance(found.get("layer_types"), list):
        found["layer_types"] = found["layer_types"][:depth]
    found["architectures"] = [ARCHITECTURES[config.model_type]]
    found["tie_word_embeddings"] = config.tie_word_embeddings
    found["torch_dtype"] = source.checkpoint.dtype if dtype == "auto" else dtype  # all versions know it
    if config.recommended_exit_layer is None:
        found.pop("hopskip", None)
    return found


def _spelled(config: ModelConfig) -> dict[str, Any]:
    """A config as Hugging Face writes it, with the older names, which all versions read."""
    fields = (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "bos_token_id"),
    )
    found: dict[str, Any] = {name: getattr(config, name) for name in fields}
    eos = config.eos_token_ids
    found |= {"hidden_act": "silu", "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}
    found["rope_theta"] = config.rope.rope_theta
    if scaling := rope_scaling(config.rope):
        found["rope_scaling"] = scaling
    if config.model_type == "mistral" or config.sliding_window is not None:
        found["sliding_window"] = config.sliding_window
    return found


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """A RoPE scaling as older versions of transformers spell it, which all read; None if there is none.

    Raises:
        ConfigError: it comes from a GGUF file's table, which is that of no known scaling.
    """
    if rope.frequency_divisors:  # how GGUF files have Llama 3's scaling
        wanted = rope.inverse_frequencies()
        for settings in _LLAMA3:
            named = replace(rope, rope_type="llama3", frequency_divisors=(), **settings)
            if np.allclose(named.inverse_frequencies(), wanted, rtol=1e-5, atol=0):
                return {"rope_type": "llama3", **settings}
        raise ConfigError(
            "the file's RoPE divisors are those of no known scaling, so no config.json can say them; "
            "export from the model's Hugging Face folder, or as GGUF"
        )
    if rope.rope_type == "default":
        return None
    if rope.rope_type == "llama3":
        return {"rope_type": "llama3", **{name: getattr(rope, name) for name in _LLAMA3[0]}}
    plain = RopeConfig(head_dim=rope.head_dim)
    others = [name for name in RopeConfig.__dataclass_fields__ if name not in ("head_dim", "rope_theta", "rope_type")]
    settings = {name: getattr(rope, name) for name in others if getattr(rope, name) != getattr(plain, name)}
    return {"rope_type": rope.rope_type, "factor": rope.factor, **settings}


def generation_json(source: Source) -> dict[str, Any]:
    """The `generation_config.json`: the makers' own settings, and the tokens that end a text."""
    folder, config = source.model_folder, source.checkpoint.config
    found = dict(source.checkpoint.generation)
    if folder is None:
        found = {"do_sample": bool(found.get("temperature")), **found} if found else found
        found |= {"bos_token_id": config.bos_token_id, "eos_token_id": list(source.tokenizer.eos_token_ids)}
    return {name: value for name, value in found.items() if value is not None and name != "transformers_version"}


def write_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer's files: copies of the source's, or written from the tables of a GGUF file; and the model's terms.

    Raises:
        CheckpointError: there are none, or a GGUF file's tokenizer has no exact form in `tokenizer.json`.
    """
    for origin, patterns in ((source.tokenizer_folder, _TOKENIZER_FILES), (source.model_folder, _TERMS)):
        for pattern in patterns if origin is not None else ():
            assert origin is not None
            for file in sorted(origin.glob(pattern)):
                if file.is_file():
                    place = folder / file.relative_to(origin)
                    place.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, place)
    if source.tokenizer_folder is None:
        _write_tables(source, folder)


def _write_tables(source: Source, folder: Path) -> None:
    tokenizer, metadata = source.tokenizer, source.checkpoint.metadata
    assert metadata is not None
    inner = tokenizer.inner
    if metadata["tokenizer.ggml.model"] == "llama":
        inner = _with_merges(tokenizer, metadata)
    check_ids(
        source.checkpoint.path, tokenizer.encode, lambda text, adds: inner.encode(text, add_special_tokens=adds).ids
    )
    inner.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.checkpoint.config.context_length,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", settings)


def _with_merges(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A SentencePiece vocabulary as the `tokenizers` library has it: merges in the order of the pieces' scores."""
    found = json.loads(tokenizer.inner.to_str())
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    added = {token["content"] for token in found["added_tokens"]}
    found["model"]["merges"] = list(_merges(tokens, scores, added))
    inner = tokenizers.Tokenizer.from_str(json.dumps(found))
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
    inner.normalizer = normalizers.Sequence(steps)
    before, after = around(tokenizer)
    inner.post_processor = processors.TemplateProcessing(
        single=[*(tokens[index] for index in before), "$A", *(tokens[index] for index in after)],
        special_tokens=[(tokens[index], index) for index in dict.fromkeys((*before, *after))],
    )
    return inner


def _merges(tokens: list[str], scores: list[float], added: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make a piece, those of the highest score first."""
    pieces = {token: index for index, token in enumerate(tokens) if token not in added}
    found = [
        (scores[index], -pieces[piece[:cut]], -pieces[piece[cut:]], piece[:cut], piece[cut:])
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    for *_, left, right in sorted(found, reverse=True):
        yield left, right
