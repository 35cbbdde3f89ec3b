"""A trained exit as an EAGLE-3 drafter (arXiv 2503.01840) of two layers or more, which computes the same.

An exit adds what `mix` makes of the token and of the features to the features, and runs its layers on the sum. EAGLE-3
has nowhere to put `mix`, but its first layer reads the same two things. So that layer attends, with all heads, to its
own row only, and adds `mix` of it: its queries and keys are constants whose score is high at distance 0, its values are
`mix`, its MLP is zero. The exit's own layers follow.

vLLM runs it. SGLang's drafter has no biases for the constants, llama.cpp's has one layer only.

    D: hidden size     A: features     n: draft vocabulary     H, K: query and key-value heads     E: size of a head
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.errors import ConfigError
from hopskip.export.hf_folder import ARCHITECTURES, rope_scaling
from hopskip.export.tensors import TYPES

Floats = NDArray[np.float32]

SCORE = 4000.0
"""Of a row on itself in the first layer."""
_LEAST_GAP = 100.0
"""By which it must be above all others: their weights are then zero, in bfloat16 as well."""


def shapes(exit: TrainedExit, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the drafter: name -> shape, linears as [outputs, inputs]."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, len(exit.vocabulary)
    width, num_features = config.num_attention_heads * config.head_dim, len(exit.config.features)
    table: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, num_features * hidden),
        **{f"fc_norm.{index}.weight": (hidden,) for index in range(num_features)},
        "norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        "d2t": (vocabulary,),
        "t2d": (config.vocab_size,),
    }
    for index in range(exit.config.num_layers + 1):
        inputs = 2 * hidden if index == 0 else hidden
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "hidden_norm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **{f"self_attn.{part}_proj.weight": (width, inputs) for part in "qkv"},
            **{f"self_attn.{part}_proj.bias": (width,) for part in "qkv"},
            "self_attn.o_proj.weight": (hidden, width),
            "self_attn.o_proj.bias": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        table |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return table


def check_exact(exit: TrainedExit, config: ModelConfig) -> None:
    """Raises ConfigError if an exit has no such form."""
    reason = None
    width = config.num_attention_heads * config.head_dim
    if not exit.config.features:
        reason = "it sees no features of the model; export the model's own layers instead (early-exit)"
    elif exit.config.start:
        reason = f"it starts after layer {exit.config.start}, and EAGLE-3 starts at the token's embedding"
    elif config.qk_norm:
        reason = "its layers normalise queries and keys, which EAGLE-3's do not"
    elif config.sliding_window is not None:
        reason = f"its layers have a sliding window of {config.sliding_window}, which EAGLE-3's do not"
    elif width < config.hidden_size:
        reason = f"its heads hold {width} values of a row of {config.hidden_size}"
    if reason is not None:
        raise ConfigError(f"the exit cannot be written as an EAGLE-3 drafter: {reason}")


def tensors(exit: TrainedExit, checkpoint: Checkpoint) -> dict[str, tuple[str | None, NDArray[Any]]]:
    """Every tensor of the drafter, with its type's name in safetensors; None: as floats are to be stored."""
    config = checkpoint.config
    hidden, vocabulary = config.hidden_size, exit.vocabulary.astype(np.int64)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    is_drafted = np.zeros(config.vocab_size, dtype=bool)
    is_drafted[vocabulary] = True
    floats: dict[str, Floats] = {
        "fc.weight": np.asarray(exit.mixing["fuse"]),
        **{f"fc_norm.{i}.weight": np.ones(hidden, dtype=np.float32) for i in range(len(exit.config.features))},
        "norm.weight": checkpoint.array("model.norm.weight"),
        "lm_head.weight": _rows(checkpoint, head, exit.vocabulary),
        **_named(0, _mixing_layer(exit, config)),
    }
    for index, layer in enumerate(exit.layers):
        floats |= _named(index + 1, _own_layer({name: np.asarray(t) for name, t in layer.items()}, config))
    return {
        **{name: (None, values) for name, values in floats.items()},
        "d2t": ("I64", vocabulary - np.arange(len(vocabulary))),
        "t2d": ("BOOL", is_drafted),
    }


def _rows(checkpoint: Checkpoint, name: str, wanted: NDArray[np.int32]) -> Floats:
    """Some rows of a matrix, which rise; a large one is read in parts."""
    found: Floats = np.empty((len(wanted), checkpoint.config.hidden_size), dtype=np.float32)
    step = 4096
    for first in range(0, checkpoint.stored(name).num_rows, step):
        start, stop = np.searchsorted(wanted, (first, first + step))
        found[start:stop] = checkpoint.rows(name, first, step)[wanted[start:stop] - first]
    return found


def _named(index: int, layer: Mapping[str, Floats]) -> dict[str, Floats]:
    return {f"layers.{index}.{name}": values for name, values in layer.items()}


def _mixing_layer(exit: TrainedExit, config: ModelConfig) -> dict[str, Floats]:
    """The layer that adds `mix [token; features]` to the features."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    zeros = np.zeros((width, 2 * hidden), dtype=np.float32)
    values, back = zeros.copy(), np.zeros((hidden, width), dtype=np.float32)
    values[:hidden] = np.asarray(exit.mixing["mix"])
    back[:, :hidden] = np.eye(hidden)
    constant = np.tile(own_row(config.rope, config.context_length), config.num_attention_heads)
    return {
        "input_layernorm.weight": np.asarray(exit.mixing["token_norm"]),
        "hidden_norm.weight": np.asarray(exit.mixing["feature_norm"]),
        "post_attention_layernorm.weight": np.ones(hidden, dtype=np.float32),
        "self_attn.q_proj.weight": zeros,
        "self_attn.k_proj.weight": zeros,
        "self_attn.v_proj.weight": values,
        "self_attn.q_proj.bias": constant,
        "self_attn.k_proj.bias": constant,
        "self_attn.v_proj.bias": np.zeros(width, dtype=np.float32),
        "self_attn.o_proj.weight": back,
        "self_attn.o_proj.bias": np.zeros(hidden, dtype=np.float32),
        "mlp.gate_proj.weight": np.zeros((inner, hidden), dtype=np.float32),
        "mlp.up_proj.weight": np.zeros((inner, hidden), dtype=np.float32),
        "mlp.down_proj.weight": np.zeros((hidden, inner), dtype=np.float32),
    }


def _own_layer(layer: Mapping[str, Floats], config: ModelConfig) -> dict[str, Floats]:
    """A layer of the exit, with a key-value head for each query head and biases everywhere."""
    found = dict(layer)
    group = config.num_attention_heads // config.num_key_value_heads
    width = config.num_attention_heads * config.head_dim
    for part in "qkv":
        found.setdefault(
            f"self_attn.{part}_proj.bias", np.zeros(len(layer[f"self_attn.{part}_proj.weight"]), np.float32)
        )
    for part in "kv":
        for kind in ("weight", "bias"):
            name = f"self_attn.{part}_proj.{kind}"
            heads = found[name].reshape(config.num_key_value_heads, config.head_dim, -1)
            found[name] = heads.repeat(group, axis=0).reshape(width, *found[name].shape[1:])
    found["self_attn.o_proj.bias"] = np.zeros(config.hidden_size, dtype=np.float32)
    found["hidden_norm.weight"] = np.ones(config.hidden_size, dtype=np.float32)  # nobody reads it after the first layer
    return found


def own_row(rope: RopeConfig, length: int) -> Floats:
    """A vector [E] that, as query and key, scores `SCORE` with itself at distance 0 (after the factor 1/sqrt(E)), and
    far less at every other distance below `length`.

    Turned by rotary embedding, its score at distance d is the mean of cos(d w) over the frequencies w that it uses: the
    fastest ones, as many as set distance 0 off best.

    Raises:
        ConfigError: no number of them does.
    """
    frequencies = rope.inverse_frequencies().astype(np.float64)
    worst = np.full(len(frequencies), -1.0)
    for first in range(1, length, 4096):
        turns = np.cos(np.outer(np.arange(first, min(first + 4096, length)), frequencies))
        means = turns.cumsum(axis=1) / np.arange(1, len(frequencies) + 1)
        worst = np.maximum(worst, means.max(axis=0))
    best = int(worst.argmin())
    score = SCORE / rope.amplitude**2
    if SCORE * (1 - worst[best]) < _LEAST_GAP:
        raise ConfigError(
            f"the exit cannot be written as an EAGLE-3 drafter: over {length} positions the model's rotary embedding "
            f"brings every vector back to within {1 - worst[best]:.1%} of its start"
        )
    vector = np.zeros(rope.head_dim, dtype=np.float32)
    vector[: best + 1] = math.sqrt(score * math.sqrt(rope.head_dim) / (best + 1))
    return vector


def config_json(exit: TrainedExit, config: ModelConfig, base: str, type_name: str) -> dict[str, Any]:
    """The drafter's `config.json`: the plain keys of an EAGLE-3 drafter, and beside them those of `speculators`, with
    which vLLM loads the model from the drafter's folder. It says twice what vLLM's readers take from either.

    Args:
        base: how the model is called.
        type_name: of the weights, in safetensors.
    """
    rope = config.rope
    eagle = {
        "draft_vocab_size": len(exit.vocabulary),
        "target_hidden_size": config.hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(exit.config.features),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": False,
    }
    layers: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3"],
        "torch_dtype": TYPES[type_name].dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": exit.config.num_layers + 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": False,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.rope_theta,
        "rope_scaling": rope_scaling(rope),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "tie_word_embeddings": False,
        **eagle,
    }
    tokens = {
        "proposal_type": "greedy",
        "speculative_tokens": exit.num_draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        **layers,
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layers,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [tokens],
            "verifier": {"name_or_path": base, "architectures": [ARCHITECTURES[config.model_type]]},
        },
    }
