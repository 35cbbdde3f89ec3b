"""One decoder layer in PyTorch: the reference backend and the training of exits share it.

Shape letters: `...` rows (N of any mix of sequences, or B x T), D hidden size, H query heads, K key/value heads, E head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.checkpoint.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [..., H, E], keys and values [..., K, E], rotated -> [..., H, E]. What the rows see is its own affair."""

Linear = Callable[..., Tensor]
"""`linear(x, weight, bias=None)`."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer. Projections are fused as they are used: q, k, v rows in one matrix, gate and up in another."""

    input_layernorm: Tensor
    qkv_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @classmethod
    def fused(cls, config: ModelConfig, part: Callable[..., Tensor]) -> LayerWeights:
        """Put a layer together; `part(*names)` gives the named tensors of it, one below the other."""
        return cls(
            input_layernorm=part("input_layernorm.weight"),
            qkv_proj=part(*(f"self_attn.{x}_proj.weight" for x in "qkv")),
            qkv_bias=part(*(f"self_attn.{x}_proj.bias" for x in "qkv")) if config.qkv_bias else None,
            q_norm=part("self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=part("self_attn.k_norm.weight") if config.qk_norm else None,
            o_proj=part("self_attn.o_proj.weight"),
            post_attention_layernorm=part("post_attention_layernorm.weight"),
            gate_up_proj=part("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            down_proj=part("mlp.down_proj.weight"),
        )


def decoder_layer(
    hidden: Tensor,
    layer: LayerWeights,
    config: ModelConfig,
    rotation: tuple[Tensor, Tensor],
    attend: Attend,
    linear: Linear = F.linear,
) -> Tensor:
    """One layer on hidden states [..., D]; returns new ones.

    Args:
        rotation: cos and sin of the rows' positions, broadcast over heads: [..., 1, E / 2].
        linear: in place of PyTorch's own, to compute products in another precision than the rest.
    """
    eps, num_heads, num_kv_heads = config.rms_norm_eps, config.num_attention_heads, config.num_key_value_heads
    x = rms_norm(hidden, layer.input_layernorm, eps)
    qkv = linear(x, layer.qkv_proj, layer.qkv_bias).view(*x.shape[:-1], -1, config.head_dim)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=-2)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
    attended = attend(rotate(q, *rotation), rotate(k, *rotation), v)
    hidden = hidden + linear(attended.flatten(-2), layer.o_proj)
    x = rms_norm(hidden, layer.post_attention_layernorm, eps)
    gate, up = linear(x, layer.gate_up_proj).chunk(2, dim=-1)
    return hidden + linear(F.silu(gate) * up, layer.down_proj)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32 whatever the precision of `x`."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [..., heads, E]; dimension i is paired with i + E / 2, as Hugging Face checkpoints are laid out."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
