"""RoPE tables against transformers' own, and the settings that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hopskip import LLM, SamplingParams
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import CheckpointError, ConfigError, PromptError
from tests.tiny import write_checkpoint

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
    torch.testing.assert_close(torch.from_numpy(own_cos), cos[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-4)
    torch.testing.assert_close(torch.from_numpy(own_sin), sin[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-4)


def test_scalings_differ_from_each_other() -> None:
    tables = [RopeConfig.from_hf(config_of(settings), HEAD_DIM).tables(1500)[0] for settings in SETTINGS.values()]
    for index, table in enumerate(tables):
        assert all(np.abs(table - other).max() > 0.01 for other in tables[:index])


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


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 2048),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, 2048),
        # as in vLLM: what the model was trained on, times the factor
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 5120),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        # Qwen's advice: the config as it was, and these
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 8192),
        # the length multiplied already
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 1024}, 4096),
        # Llama 3.1: the length after scaling
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}}, 2048),
    ],
)
def test_scaling_extends_the_context(fields: dict[str, Any], context: int) -> None:
    config = ModelConfig.from_hf(SHAPE | fields)
    assert config.context_length == context
    assert config.max_position_embeddings == 2048


SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 9,
    "max_position_embeddings": 2048,
}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"frequency_divisors": [1e-320] * 8}, "cannot be computed"),
        (
            {
                "rope_type": "yarn",
                "factor": 4e4,
                "original_max_position_embeddings": 1,
                "mscale": 1.7e308,
                "mscale_all_dim": 1,
            },
            "cannot be computed",
        ),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor is inf"),
        ({"rope_type": "linear", "factor": 1e300}, r"a context of \d+ positions .*RoPE factor 1e\+300.*cannot be"),
        ({"rope_type": "linear", "factor": 1e-9}, r"a context of 0 positions"),
        ({"rope_type": "linear", "factor": "4"}, "factor is '4'"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "512"},
            "is '512'.*number of positions",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -1}, "is -1.*number of positions"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": "1"}, "attention_factor is '1'"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": float("nan")}, "mscale is nan"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "cannot be computed"),
        ({"rope_type": "dynamic", "factor": 4.0}, "rope_type 'dynamic' is not supported; hopskip has: default, linear"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "rope_type 'longrope' is not supported"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_hf(SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **settings}})


def test_a_text_longer_than_the_original_context(tmp_path: Path) -> None:
    """The engine takes what the scaling makes room for, and no more."""
    model = write_checkpoint(tmp_path, "llama-yarn", tokenizer=True)
    assert model.config.max_position_embeddings == 1024
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] |= {"factor": 2.0, "original_max_position_embeddings": 64}
    config["max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(model=tmp_path, device="cpu")
    assert llm.engine.max_model_len == 128
    prompt = list(range(3, 103))
    (result,) = llm.generate([prompt], SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert len(result.token_ids) == 20
    with pytest.raises(PromptError, match="the context of 128"):
        llm.generate([prompt], SamplingParams(max_new_tokens=29, ignore_eos=True))
    with pytest.raises(ConfigError, match="the model's context allows 2 to 128"):
        LLM(model=tmp_path, device="cpu", max_model_len=129)
