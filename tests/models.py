"""Small decoders for tests, built in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hopskip import SpeculativeConfig
from hopskip.backends.base import Backend
from hopskip.backends.table import TableBackend
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.layer import LayerWeights
from hopskip.backends.torch.weights import Weights
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig
from hopskip.draft.base import Drafter
from hopskip.draft.make import resolve
from hopskip.engine import Engine


def tiny_config(**changes: object) -> ModelConfig:
    settings: dict[str, object] = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(head_dim=16),
        "tie_word_embeddings": False,
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> TorchBackend:
    """A random decoder whose early exits agree with its last layer now and then: later layers change little."""
    config = tiny_config(**changes)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    ones = torch.ones(hidden, dtype=dtype)
    layers = [
        LayerWeights(
            input_layernorm=ones,
            qkv_proj=random(config.qkv_size, hidden, scale=0.2),
            o_proj=random(hidden, config.num_attention_heads * config.head_dim, scale=0.05),
            post_attention_layernorm=ones,
            gate_up_proj=random(2 * inner, hidden, scale=0.2),
            down_proj=random(hidden, inner, scale=0.05),
        )
        for _ in range(config.num_hidden_layers)
    ]
    embed_tokens = random(config.vocab_size, hidden, scale=1.0)
    lm_head = random(config.vocab_size, hidden, scale=0.2)
    return TorchBackend(config, Weights(embed_tokens=embed_tokens, layers=layers, norm=ones, lm_head=lm_head))


def table_model(exit_logits_VV: Tensor, target_logits_VV: Tensor) -> TableBackend:
    """A "decoder" whose exact joint distributions can be written down."""
    return TableBackend(tiny_config(), exit_logits_VV.numpy(), target_logits_VV.numpy())


def engine_with(drafter: Drafter, backend: Backend, speculative: SpeculativeConfig, **options: Any) -> Engine:
    """An engine that drafts by a drafter of the test's own."""
    config = resolve(speculative, backend.config, backend.trained_exit, row_exact=backend.traits.row_exact)
    return Engine(backend, config, drafter, **options)
