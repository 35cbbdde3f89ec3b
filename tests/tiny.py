"""Tiny random checkpoints on disk: every family, written by transformers itself where it is installed, with small
tokenizers; GGUF files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hopskip.checkpoint.checkpoint import expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.safetensors import write_safetensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCAB_SIZE = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _rope(theta: float = 10_000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama2-mha": {"num_key_value_heads": 4},
    "llama3-gqa": {
        "tie_word_embeddings": True,
        **_rope(500_000.0, **_LLAMA3, original_max_position_embeddings=64),
    },
    "llama-linear": _rope(rope_type="linear", factor=4.0),
    "llama-yarn": _rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64),
    "llama-head-dim": {"head_dim": 24, "num_key_value_heads": 1},
    "codellama": {"num_key_value_heads": 4, **_rope(1_000_000.0)},
    "smollm2": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **_rope(100_000.0),
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 48},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2.5-tied": {"model_type": "qwen2", "tie_word_embeddings": True, **_rope(1_000_000.0)},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}
"""By name, what its config says besides `_SHAPE`. Scalings are set so that a few hundred tokens feel them."""


def has_transformers() -> bool:
    try:
        return importlib.util.find_spec("transformers") is not None
    except ImportError:  # kept away by a test of what does without it
        return False


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model whose biases and norms are random too (transformers starts them at 0 and 1).

    Args:
        changes: of the family's config.

    Without transformers, other random weights, in something that `write_gguf` and `write_checkpoint` take for a model.
    """
    settings = {"model_type": "llama", **_SHAPE, **FAMILIES[family], **changes}
    if not has_transformers():
        return _Weights(settings, seed)  # type: ignore[return-value,unused-ignore]
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[settings.pop("model_type")]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


class _Weights:
    """What a model of transformers is to the functions here: a config, and tensors by name."""

    class Config:
        def __init__(self, settings: Mapping[str, Any]) -> None:
            head_dim = settings["hidden_size"] // settings["num_attention_heads"]
            self.__dict__ |= {"head_dim": head_dim, "rms_norm_eps": 1e-6, **_rope(), **settings}

        def to_dict(self) -> dict[str, Any]:
            return dict(vars(self))

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        self.config = self.Config(settings)
        generator = np.random.default_rng(seed)
        self._tensors: dict[str, NDArray[np.float32]] = {}
        for name, shape in expected_tensors(ModelConfig.from_hf(self.config.to_dict())).items():
            values = generator.standard_normal(shape) * (0.5 if name.endswith("bias") else 0.15)
            self._tensors[name] = (generator.uniform(0.5, 1.5, shape) if "norm" in name else values).astype(np.float32)

    def state_dict(self) -> dict[str, NDArray[np.float32]]:
        return self._tensors

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_dict()))
        eos = {name: vars(self.config)[name] for name in ("bos_token_id", "eos_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(eos))
        write_safetensors(folder / "model.safetensors", {name: ("F32", t) for name, t in self._tensors.items()})


def write_checkpoint(
    folder: Path,
    family: str = "llama3-gqa",
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    tokenizer: bool = False,
) -> PreTrainedModel:
    """Write a tiny checkpoint with transformers' own `save_pretrained`; returns the model that was written."""
    model = make_model(family, seed)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    if tokenizer:
        write_tokenizer(folder)
    return model


CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it?",
    "def main():\n    print('hello, world')\n    return 0\n",
    "Grüße aus Köln, naïve café, 你好世界, こんにちは, Привет 🙂🚀",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def byte_level_tokenizer(*, marks: Sequence[str] = (), special_marks: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens, the special ones first.

    Args:
        marks: added tokens that texts show, as `<tool_call>` is with Qwen.
        special_marks: those that they do not, as `[TOOL_CALLS]` is with Mistral.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[
            AddedToken(token, normalized=False, special=True) for token in (*SPECIAL_TOKENS, *special_marks, *marks)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in marks
    return Tokenizer.from_str(json.dumps(settings))


def byte_fallback_tokenizer() -> Tokenizer:
    """A tokenizer built as Llama 2's: `▁` for spaces, byte tokens for unknown characters, BOS before every text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyzé.,!", "he", "ll", "hell", "hello", "▁hello", "▁▁"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, **settings: Any) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as a chat model has them."""
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**defaults, **settings}))


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(hf_name: str) -> str:
    stem, suffix = hf_name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, index, part = stem.split(".", 3)
        return f"blk.{index}.{_GGUF_NAMES[part]}.{suffix}"
    return f"{_GGUF_NAMES[stem]}.{suffix}"


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's converter does for the `llama` architecture (`LlamaModel.permute`)."""
    heads = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return heads.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    types: Mapping[str, gguf.GGMLQuantizationType] | gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    raw_blocks: Mapping[str, np.ndarray] | None = None,
    tokenizer: Tokenizer | None = None,
    architecture: str | None = None,
) -> None:
    """Write a transformers model as llama.cpp's converter would. One-dimensional tensors stay float32.

    `types` is the block type of all matrices, or of each by GGUF name (float32 for the rest). `metadata` overrides or
    (with None) drops keys. `raw_blocks`, by GGUF name, are written as they are in place of the model's own matrices.
    """
    config = model.config
    arch = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
    }
    if tokenizer is not None:
        keys |= _tokenizer_keys(tokenizer)
    keys |= metadata or {}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        _add(writer, key, value)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = np.asarray(parameter.float() if hasattr(parameter, "float") else parameter)
        if arch == "llama" and (name.endswith(("q_proj.weight", "k_proj.weight"))):
            values = permute(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        own = gguf_name(name)
        kind = types if isinstance(types, gguf.GGMLQuantizationType) else types.get(own, gguf.GGMLQuantizationType.F32)
        if values.ndim < 2:
            kind = gguf.GGMLQuantizationType.F32
        blocks = (raw_blocks or {}).get(own)
        if blocks is None:
            blocks = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(own, blocks, raw_dtype=kind)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
