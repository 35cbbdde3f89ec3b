"""The shape of a model, read from a Hugging Face `config.json` (or from GGUF metadata by `gguf.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hopskip.checkpoint.families import SUPPORTED_MODEL_TYPES, unsupported
from hopskip.checkpoint.rope import RopeConfig, is_number
from hopskip.errors import CheckpointError, shown

_MOST_POSITIONS = 2**31 - 1  # they are counted in 32 bits
_MOST_HEAD_DIM = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder of the Llama family. Field names are those of Hugging Face's `config.json`; `context_length` says how
    long a text may be.

    The decoder is the same for every family but for four switches: grouped heads (`num_key_value_heads`), `qkv_bias`
    (Qwen2), `qk_norm` (Qwen3) and `sliding_window` (Mistral 0.1).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    recommended_exit_layer: int | None = None
    """Exit layer that the checkpoint's makers recommend for drafting (LayerSkip checkpoints), else None."""
    recommended_num_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in SUPPORTED_MODEL_TYPES:
            raise CheckpointError(
                f"model_type {self.model_type!r} is not supported; hopskip runs: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{name} is {shown(value)} in the model's config; it must be a positive integer")
        window = self.sliding_window
        if window is not None and (type(window) is not int or window < 1):
            raise CheckpointError(
                f"sliding_window is {shown(window)} in the model's config; it must be a positive integer"
            )
        if not is_number(self.rms_norm_eps) or self.rms_norm_eps < 0:
            raise CheckpointError(f"rms_norm_eps is {shown(self.rms_norm_eps)} in the model's config; it must be >= 0")
        if not all(type(token_id) is int for token_id in self.eos_token_ids):
            raise CheckpointError(
                f"eos_token_id is {shown(self.eos_token_ids)} in the model's config; it must be token ids"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; the model's config is wrong"
            )
        if self.head_dim % 2 or self.head_dim > _MOST_HEAD_DIM:
            raise CheckpointError(
                f"head_dim is {self.head_dim}; rotary embeddings need an even one, of at most {_MOST_HEAD_DIM}"
            )
        self.rope.check_frequencies()
        if not 1 <= self.context_length <= _MOST_POSITIONS:
            raise CheckpointError(
                f"the model's config gives a context of {self.context_length} positions (max_position_embeddings "
                f"{self.max_position_embeddings}, RoPE factor {self.rope.factor}), which cannot be"
            )

    @property
    def context_length(self) -> int:
        """Positions of the longest text: `max_position_embeddings`, or what linear and YaRN scaling make of it.

        Both stretch positions, so that the original context times `factor` fits: as in vLLM, and in llama.cpp. The
        original context is `original_max_position_embeddings` where the settings have it (YaRN's always should), else
        `max_position_embeddings`, which then is the length before scaling. Where a YaRN config has both and the latter
        was multiplied already (131072 = 4 x 32768), the former decides. `llama3` scaling changes nothing: its
        `max_position_embeddings` is the length after scaling.
        """
        if self.rope.rope_type not in ("linear", "yarn"):
            return self.max_position_embeddings
        original = self.rope.original_max_position_embeddings or self.max_position_embeddings
        return int(min(original * self.rope.factor, 2.0**53))

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def num_layer_parameters(self) -> int:
        """Weights of one decoder layer's linears."""
        attention = (self.qkv_size + self.num_attention_heads * self.head_dim) * self.hidden_size
        return attention + 3 * self.intermediate_size * self.hidden_size

    @property
    def num_head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights of the linears and embeddings (norms left out: they are far below one per mille)."""
        embeddings = self.num_head_parameters * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.num_layer_parameters + embeddings

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of one decoder layer: name within the layer -> shape, linears as [outputs, inputs]."""
        hidden, intermediate, head_dim = self.hidden_size, self.intermediate_size, self.head_dim
        q_size, kv_size = self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_size, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, q_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }
        if self.qkv_bias:
            layer |= {
                "self_attn.q_proj.bias": (q_size,),
                "self_attn.k_proj.bias": (kv_size,),
                "self_attn.v_proj.bias": (kv_size,),
            }
        if self.qk_norm:
            layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        return layer

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read a Hugging Face `config.json`, and the further EOS ids of a `generation_config.json` where there is one.

        Both spellings of the RoPE settings are read: `rope_theta` + `rope_scaling`, and transformers 5's
        `rope_parameters`.

        Raises:
            CheckpointError: the architecture or one of its variants is not supported, or a field is missing.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise CheckpointError(unsupported(f"model_type {shown(model_type)}", model_type, SUPPORTED_MODEL_TYPES))
        _refuse_unsupported_variants(config)
        try:
            num_heads = config["num_attention_heads"]
            max_positions = config["max_position_embeddings"]
            # two defaults of transformers that a config.json may leave unsaid
            own_head_dim = 128 if model_type == "qwen3" else config["hidden_size"] // num_heads
            head_dim = config.get("head_dim") or own_head_dim
            own_window = 4096 if model_type == "mistral" else None
            uses_window = config.get("use_sliding_window", model_type == "mistral")
            eos = [_as_tuple(source.get("eos_token_id")) for source in (config, generation_config or {})]
            recommended = config.get("hopskip") or {}
            bos = config.get("bos_token_id")
            return cls(
                model_type=model_type,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=num_heads,
                num_key_value_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=head_dim,
                max_position_embeddings=max_positions,
                rms_norm_eps=config.get("rms_norm_eps", 1e-6),
                rope=RopeConfig.from_hf(config, head_dim),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=model_type == "qwen2",
                qk_norm=model_type == "qwen3",
                sliding_window=config.get("sliding_window", own_window) if uses_window else None,
                bos_token_id=bos if type(bos) is int else None,
                eos_token_ids=tuple(dict.fromkeys(eos[0] + eos[1])),
                recommended_exit_layer=recommended.get("exit_layer"),
                recommended_num_draft_tokens=recommended.get("num_draft_tokens"),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]!r}; is this a complete checkpoint?") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise CheckpointError(
                f"the model's config has a field of the wrong type ({error}); download it again"
            ) from None


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _refuse_unsupported_variants(config: Mapping[str, Any]) -> None:
    """A variant we would compute wrongly is refused, never ignored."""
    refused: dict[str, Callable[[Any], bool]] = {
        "hidden_act": lambda v: v not in (None, "silu", "swish"),
        "attention_bias": bool,
        "mlp_bias": bool,
        "partial_rotary_factor": lambda v: v not in (None, 1, 1.0),
        "architectures": lambda v: isinstance(v, list) and bool(v) and not any(map(_makes_text, v)),
    }
    if config["model_type"] in ("qwen2", "qwen3"):  # theirs begins at some layer, Mistral's holds for all
        refused["use_sliding_window"] = bool
    for name, is_refused in refused.items():
        if is_refused(config.get(name)):
            raise CheckpointError(
                f"{name}={shown(config[name])} is not supported for model_type {config['model_type']!r}; "
                "use a checkpoint of the plain architecture (a causal language model, SiLU, no attention or MLP bias)"
            )


def _makes_text(architecture: object) -> bool:
    """Embedding models, rewarders and classifiers have the same layers, but no head over the vocabulary."""
    return str(architecture).endswith(("ForCausalLM", "LMHeadModel"))
