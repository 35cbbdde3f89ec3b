"""RoPE tables against transformers' own, and the settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import CheckpointError

HEAD_DIM = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 0.7,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}


def config_of(settings: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 500_000.0, **settings}, **fields}


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_equal_transformers(name: str) -> None:
    fields = config_of(SETTINGS[name])
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=HEAD_DIM, num_attention_heads=1, **fields))
    positions = torch.arange(1500)
    cos, sin = theirs(torch.zeros(1), positions[None])
    own_cos, own_sin = RopeConfig.from_hf(config_of(SETTINGS[name]), HEAD_DIM).tables(1500)
    torch.testing.assert_close(own_cos, cos[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-4)
    torch.testing.assert_close(own_sin, sin[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-4)


def test_scalings_differ_from_each_other() -> None:
    tables = [RopeConfig.from_hf(config_of(settings), HEAD_DIM).tables(1500)[0] for settings in SETTINGS.values()]
    for index, table in enumerate(tables):
        assert all((table - other).abs().max() > 0.01 for other in tables[:index])


def test_original_length_falls_back_to_the_models_own() -> None:
    settings = {"rope_type": "yarn", "factor": 4.0}
    assert RopeConfig.from_hf(config_of(settings), HEAD_DIM).original_max_position_embeddings == 2048
    outside = config_of(settings, original_max_position_embeddings=512)
    assert RopeConfig.from_hf(outside, HEAD_DIM).original_max_position_embeddings == 512


def test_frequency_divisors_are_the_llama3_scaling() -> None:
    """GGUF files carry the llama3 scaling as divisors: the same frequencies must come out."""
    scaled = RopeConfig.from_hf(config_of(SETTINGS["llama3"]), HEAD_DIM).inverse_frequencies()
    plain = RopeConfig(head_dim=HEAD_DIM, rope_theta=500_000.0)
    divisors = tuple((plain.inverse_frequencies() / scaled).tolist())
    assert max(divisors) == pytest.approx(32.0)
    divided = RopeConfig(head_dim=HEAD_DIM, rope_theta=500_000.0, frequency_divisors=divisors)
    torch.testing.assert_close(divided.inverse_frequencies(), scaled)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "differ between layers"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta"),
        ({"rope_type": "linear", "factor": "two"}, "factor"),
        ({"rope_type": "default", "frequency_divisors": [1.0, 2.0]}, "2 RoPE divisors for 32"),
    ],
)
def test_refused_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        RopeConfig.from_hf(config_of(settings), HEAD_DIM)
