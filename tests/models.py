"""Small decoders for tests, built in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hopskip.backends.base import Cache
from hopskip.backends.rows import Rows
from hopskip.backends.torch.backend import TorchBackend, Weights
from hopskip.backends.torch.layer import LayerWeights
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig


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


class MarkovModel:
    """A two-layer "decoder" whose logits depend on the last token only: by one table after layer 0, by another after
    layer 1. Its exact joint distributions can be written down, which those of a real decoder cannot."""

    row_exact = True
    has_own_threads = False
    device = torch.device("cpu")
    branch = None

    def __init__(self, exit_logits_VV: Tensor, target_logits_VV: Tensor) -> None:
        self.config = tiny_config(vocab_size=len(target_logits_VV), num_hidden_layers=2)
        self.tables = torch.stack((exit_logits_VV, target_logits_VV))

    def new_cache(self, num_slots: int, length: int) -> Cache:
        return Cache(self.config, num_slots, length, torch.float32)

    def embed(self, ids_N: Tensor) -> Tensor:
        return torch.stack((ids_N.float(), torch.zeros(len(ids_N))), dim=1)

    def run_layers(self, h_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
        assert len(rows) == len(h_ND)
        assert rows.max_position < cache.length
        return h_ND + torch.tensor([0.0, float(stop - start)])

    def unembed(self, h_ND: Tensor) -> Tensor:
        token_N, depth_N = h_ND[:, 0].long(), h_ND[:, 1].long()
        return self.tables[depth_N - 1, token_N]

    def greedy(self, h_ND: Tensor) -> Tensor:
        return self.unembed(h_ND).argmax(dim=-1)
