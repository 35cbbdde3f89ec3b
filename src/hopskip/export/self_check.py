"""Whether an EAGLE-3 drafter gives the logits of the exit that it was made from: both computed here, with numpy.

T: tokens     A: features     D: hidden size     n: draft vocabulary     H, K: query and key-value heads
E: size of a head
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import Mixing, TrainedExit, unit_rms
from hopskip.errors import CheckpointError

Floats = NDArray[np.float32]
Tensors = Mapping[str, Floats]

TOLERANCE = 1e-4
"""Of a logit, as a share of the largest: float32 adds up in other orders."""
_NUM_TOKENS = 12


def check_drafter(drafter: Tensors, exit: TrainedExit, config: ModelConfig) -> float:
    """Compare the first draft step on random tokens and features, and the second at the last of them.

    Args:
        drafter: every tensor as it was written, float32.

    Returns:
        The largest difference of a logit, as a share of the largest logit.

    Raises:
        CheckpointError: it is above `TOLERANCE`.
    """
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((_NUM_TOKENS, config.hidden_size), dtype=np.float32)
    f_TAD = random.standard_normal((_NUM_TOKENS, len(exit.config.features), config.hidden_size), dtype=np.float32)
    layers: list[dict[str, Floats]] = [
        {name: np.asarray(tensor) for name, tensor in layer.items()} for layer in exit.layers
    ]
    mixing = Mixing({name: np.asarray(tensor) for name, tensor in exit.mixing.items()}, config.rms_norm_eps)
    norm, head = drafter["norm.weight"], drafter["lm_head.weight"]

    def of_exit(g_TD: Floats) -> Floats:
        h_TD: Floats = mixing.mix(x_TD, g_TD)
        for layer in layers:
            h_TD = _layer(layer, config, h_TD, _norm(h_TD, layer["input_layernorm.weight"], config))
        return h_TD

    def of_drafter(g_TD: Floats) -> Floats:
        h_TD = g_TD
        for index in range(len(layers) + 1):
            start = f"layers.{index}."
            layer = {name.removeprefix(start): t for name, t in drafter.items() if name.startswith(start)}
            entry_TD = _norm(h_TD if index else x_TD, layer["input_layernorm.weight"], config)
            if index == 0:
                entry_TD = np.concatenate((entry_TD, _norm(g_TD, layer["hidden_norm.weight"], config)), axis=-1)
            h_TD = _layer(layer, config, h_TD, entry_TD)
        return h_TD

    fused_TD = np.concatenate(
        [_norm(f_TAD[:, i], drafter[f"fc_norm.{i}.weight"], config) for i in range(f_TAD.shape[1])], axis=-1
    )
    worst = 0.0
    g_TD, other_TD = mixing.fuse(f_TAD), fused_TD @ drafter["fc.weight"].T
    for _ in range(2):
        h_TD, own_TD = of_exit(g_TD), of_drafter(other_TD)
        wanted, found = (_norm(h, norm, config) @ head.T for h in (h_TD, own_TD))
        worst = max(worst, float(np.abs(wanted - found).max() / np.abs(wanted).max()))
        # the next step reads what came out at the last token in place of its features
        g_TD, other_TD = (np.concatenate((g[1:], h[-1:])) for g, h in ((g_TD, h_TD), (other_TD, own_TD)))
    if not worst <= TOLERANCE:
        raise CheckpointError(
            f"the drafter's logits differ from the exit's by {worst:.1e} of the largest one, more than "
            f"{TOLERANCE:.0e}; nothing was written"
        )
    return worst


def _norm(x_TD: Floats, weight_D: Floats, config: ModelConfig) -> Floats:
    normed: Floats = unit_rms(x_TD, config.rms_norm_eps) * weight_D
    return normed


def _layer(layer: Tensors, config: ModelConfig, residual_TD: Floats, entry_TD: Floats) -> Floats:
    """A decoder layer on all tokens, from what enters its projections: as in a Llama, with biases where there are
    some, and as many key-value heads as the projections have."""

    def project(part: str) -> Floats:
        found: Floats = entry_TD @ layer[f"self_attn.{part}_proj.weight"].T + layer.get(
            f"self_attn.{part}_proj.bias", 0
        )
        return found.reshape(len(entry_TD), -1, config.head_dim).swapaxes(0, 1)

    q_HTE, k_KTE = (_rotated(project(part), config) for part in "qk")
    group = len(q_HTE) // len(k_KTE)
    k_HTE, v_HTE = k_KTE.repeat(group, axis=0), project("v").repeat(group, axis=0)
    scores = q_HTE @ k_HTE.swapaxes(1, 2) / np.float32(config.head_dim**0.5)
    scores = np.where(np.tri(len(entry_TD), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = (weights @ v_HTE).swapaxes(0, 1).reshape(len(entry_TD), -1)
    h_TD = residual_TD + attended @ layer["self_attn.o_proj.weight"].T + layer.get("self_attn.o_proj.bias", 0)
    inner = _norm(h_TD, layer["post_attention_layernorm.weight"], config)
    gate = inner @ layer["mlp.gate_proj.weight"].T
    with np.errstate(over="ignore"):
        gate = gate / (1 + np.exp(-gate))
    out: Floats = h_TD + (gate * (inner @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    return out


def _rotated(x_HTE: Floats, config: ModelConfig) -> Floats:
    cos, sin = config.rope.tables(x_HTE.shape[1])
    half = config.head_dim // 2
    first, second = x_HTE[..., :half], x_HTE[..., half:]
    turned: Floats = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned
