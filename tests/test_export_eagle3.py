"""Trained exits as EAGLE-3 drafters: the table of tensors, the config, and that the numbers are the exit's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.rope import RopeConfig
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.cli import app
from hopskip.errors import CheckpointError, ConfigError
from hopskip.export import eagle3, two_layers
from hopskip.export.self_check import check_drafter
from tests.models import tiny_config
from tests.test_exit_branch import VOCABULARY, random_branch
from tests.tiny import make_model

TABLE = {
    "fc.weight": ("BF16", (64, 128)),
    "fc_norm.0.weight": ("BF16", (64,)),
    "fc_norm.1.weight": ("BF16", (64,)),
    "norm.weight": ("BF16", (64,)),
    "lm_head.weight": ("BF16", (160, 64)),
    "d2t": ("I64", (160,)),
    "t2d": ("BOOL", (320,)),
    **{
        f"layers.{index}.{name}": ("BF16", shape)
        for index, inputs in ((0, 128), (1, 64))
        for name, shape in {
            "input_layernorm.weight": (64,),
            "hidden_norm.weight": (64,),
            "post_attention_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (64, inputs),
            "self_attn.k_proj.weight": (64, inputs),
            "self_attn.v_proj.weight": (64, inputs),
            "self_attn.q_proj.bias": (64,),
            "self_attn.k_proj.bias": (64,),
            "self_attn.v_proj.bias": (64,),
            "self_attn.o_proj.weight": (64, 64),
            "self_attn.o_proj.bias": (64,),
            "mlp.gate_proj.weight": (96, 64),
            "mlp.up_proj.weight": (96, 64),
            "mlp.down_proj.weight": (64, 96),
        }.items()
    },
}
"""What vLLM's drafter has, for the family below and features of 2 layers."""
FEATURES = ExitConfig(start=0, num_layers=1, features=(1, 3))


def stored(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: (t["dtype"], tuple(t["shape"])) for name, t in header.items() if name != "__metadata__"}


def write_exit(folder: Path, family: str = "llama3-gqa", config: ExitConfig = FEATURES, **changes: Any) -> TrainedExit:
    """A model and a random exit for it, in `model` and `exit`."""
    make_model(family, **changes).save_pretrained(folder / "model")
    checkpoint = open_checkpoint(folder / "model")
    exit = random_branch(checkpoint, config)[1]
    exit.save(folder / "exit")
    return exit


def export(folder: Path, **options: Any) -> Path:
    return eagle3(folder / "model", folder / "out", exit_branch=folder / "exit", **options)


def test_tensors_and_config(tmp_path: Path) -> None:
    exit = write_exit(tmp_path)
    out = export(tmp_path, base="org/tiny")
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert stored(out / "model.safetensors") == TABLE
    tensors = load_file(out / "model.safetensors")
    ids = torch.arange(160)
    assert torch.equal(tensors["d2t"] + ids, VOCABULARY)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), VOCABULARY)
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["lm_head.weight"], embedding[VOCABULARY].bfloat16())
    config = json.loads((out / "config.json").read_text())
    wanted = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3"],
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": False,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "bos_token_id": 0,
        "eos_token_id": [1],
        "tie_word_embeddings": False,
        "draft_vocab_size": 160,
        "target_hidden_size": 64,
        "eagle_aux_hidden_state_layer_ids": [1, 3],
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": False,
    }
    speculators = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": wanted,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": "org/tiny", "architectures": ["LlamaForCausalLM"]},
        },
    }
    assert config == {**wanted, **speculators}
    assert exit.num_draft_tokens == 3


# -- the same function, computed here once more by torch ---------------------------------------------------------------


class Drafter:
    """vLLM's equations, float32: rows of (token, features of the token before), no cache."""

    def __init__(self, folder: Path, rope: RopeConfig) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.w = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
        self.rope = rope
        self.least_own_weight = 1.0

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[name], self.config["rms_norm_eps"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def layer(self, index: int, entry: Tensor, residual: Tensor) -> Tensor:
        size, p = self.config["head_dim"], f"layers.{index}."
        q, k, v = (
            self.linear(entry, f"{p}self_attn.{n}_proj").view(len(entry), -1, size).transpose(0, 1) for n in "qkv"
        )
        cos, sin = (torch.from_numpy(t).repeat(1, 2) for t in self.rope.tables(len(entry)))

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        scores = turn(q) @ turn(k).transpose(1, 2) / size**0.5
        weights = scores.masked_fill(torch.ones(len(entry), len(entry)).triu(1).bool(), -torch.inf).softmax(-1)
        if index == 0:
            self.least_own_weight = min(self.least_own_weight, float(weights.diagonal(dim1=1, dim2=2).min()))
        h = residual + self.linear((weights @ v).transpose(0, 1).flatten(1), f"{p}self_attn.o_proj")
        y = self.norm(h, f"{p}post_attention_layernorm.weight")
        gate = F.silu(self.linear(y, f"{p}mlp.gate_proj"))
        return h + self.linear(gate * self.linear(y, f"{p}mlp.up_proj"), f"{p}mlp.down_proj")

    def step(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and fused features of each row -> output of each, logits."""
        both = (self.norm(x, "layers.0.input_layernorm.weight"), self.norm(g, "layers.0.hidden_norm.weight"))
        h = self.layer(0, torch.cat(both, -1), g)
        for index in range(1, self.config["num_hidden_layers"]):
            h = self.layer(index, self.norm(h, f"layers.{index}.input_layernorm.weight"), h)
        return h, F.linear(self.norm(h, "norm.weight"), self.w["lm_head.weight"])

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.linear(torch.cat([self.norm(f, f"fc_norm.{i}.weight") for i, f in enumerate(features)], -1), "fc")


@pytest.mark.parametrize(
    ("family", "config", "changes"),
    [
        ("llama3-gqa", FEATURES, {}),
        ("llama2-mha", ExitConfig(start=0, num_layers=2, features=(3,)), {}),
        ("qwen2", ExitConfig(start=0, num_layers=1, features=(1, 2, 3)), {}),
        ("llama-yarn", FEATURES, {}),
        ("llama-head-dim", FEATURES, {}),
        ("mistral", FEATURES, {}),
    ],
    ids=["gqa", "two-layers", "biases", "yarn", "wide-heads", "mistral"],
)
def test_it_drafts_what_the_exit_drafts(
    family: str, config: ExitConfig, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Against the exit on our torch backend, through its draft steps."""
    from hopskip.backends.base import DraftTask
    from hopskip.backends.rows import Rows, Segment
    from hopskip.backends.torch.backend import TorchBackend
    from hopskip.backends.torch.weights import load_weights

    exit = write_exit(tmp_path, family, config, **changes)
    checkpoint = open_checkpoint(tmp_path / "model")
    drafter = Drafter(export(tmp_path, dtype="float32"), checkpoint.config.rope)
    backend = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    backend.attach_exit(exit)
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    drafted: set[int] = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(320, (9,), generator=generator).tolist()
        features = [torch.randn(9, 64, generator=generator) for _ in config.features]
        task = DraftTask(
            layers=None,
            precision=None,
            token_ids=ids,
            rows=Rows([Segment(0, 0, 9)]),
            limits=[4],
            min_confidence=0.0,
            last_token_ids=[frozenset()],
            features_NAD=torch.stack(features, 1),
        )
        wanted = backend.draft(task, backend.new_cache(1, 32)).token_ids[0]
        x, g = embedding[ids], drafter.fuse(features)
        found: list[int] = []
        for _ in wanted:
            h, logits = drafter.step(x, g)
            found.append(int(VOCABULARY[logits[-1].argmax()]))
            x, g = torch.cat((x, embedding[found[-1:]])), torch.cat((g, h[-1:]))
        assert found == wanted
        drafted |= set(found)
    assert len(drafted) > 2
    assert drafter.least_own_weight == 1


@pytest.mark.parametrize(
    ("head_dim", "theta", "length"), [(16, 10_000.0, 1024), (64, 10_000.0, 4096), (128, 500_000.0, 32_768)]
)
def test_a_row_scores_far_above_all_others(head_dim: int, theta: float, length: int) -> None:
    rope = RopeConfig(head_dim=head_dim, rope_theta=theta)
    half = head_dim // 2
    vector = two_layers.own_row(rope, length).astype(np.float64)
    assert not vector[half:].any()
    positions = np.arange(0, length)
    scores = (np.cos(np.outer(positions, rope.inverse_frequencies())) * vector[:half] ** 2).sum(axis=1) / head_dim**0.5
    assert scores[0] == pytest.approx(two_layers.SCORE, rel=1e-6)
    assert scores[0] - scores[1:].max() > 100


def test_a_rotation_that_always_comes_back_is_refused() -> None:
    """So slow that neighbours are the same."""
    rope = RopeConfig(head_dim=4, rope_type="linear", factor=1000.0)
    with pytest.raises(
        ConfigError, match=r"over 64 positions the model's rotary embedding brings every vector back to"
    ):
        two_layers.own_row(rope, 64)


UNUSED = ("norm.weight", "lm_head.weight", "layers.1.hidden_norm.weight", "layers.0.post_attention_layernorm.weight")
"""Both sides read the first two; nobody the third; the last meets zeros, as one of gate_proj and up_proj alone does."""


@pytest.mark.parametrize("changed", [n for n, (kind, _) in TABLE.items() if kind == "BF16" and n not in UNUSED])
def test_the_check_notices_every_tensor(changed: str, tmp_path: Path) -> None:
    exit = write_exit(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "model")
    tensors = {n: t.float().numpy() for n, t in load_file(export(tmp_path) / "model.safetensors").items()}
    assert check_drafter(tensors, exit, checkpoint.config) < 1e-5
    noise = np.random.default_rng(0)
    for name in tensors if "layers.0.mlp" in changed else [changed]:
        if "layers.0.mlp" in name or name == changed:
            size = 30 if changed.endswith(("0.self_attn.q_proj.bias", "0.self_attn.k_proj.bias")) else 1
            tensors[name] = tensors[name] + size * noise.standard_normal(tensors[name].shape, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"the drafter's logits differ from the exit's by .* nothing was written"):
        check_drafter(tensors, exit, checkpoint.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.mlp.down_proj.weight"), r"layers.1.mlp.down_proj.weight has shape None instead of"),
        (lambda t: t.update({"extra": ("F32", np.zeros(3))}), r"extra has shape \(3,\) instead of None"),
        (lambda t: t.update({"d2t": ("I64", np.zeros(3, np.int64))}), r"d2t has shape \(3,\) instead of \(160,\)"),
    ],
)
def test_names_and_shapes_are_checked(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_exit(tmp_path)
    make = two_layers.tensors

    def changed(exit: TrainedExit, checkpoint: Checkpoint) -> Mapping[str, Any]:
        tensors = make(exit, checkpoint)
        change(tensors)
        return tensors

    monkeypatch.setattr(two_layers, "tensors", changed)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path)
    assert not (tmp_path / "out").exists()


# -- exits that have no such form --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (ExitConfig(start=2, num_layers=1), {}, r"it sees no features of the model; .*\(early-exit\)"),
        (ExitConfig(start=1, num_layers=1, features=(2,)), {}, "it starts after layer 1"),
        (FEATURES, {"qk_norm": True}, "its layers normalise queries and keys"),
        (FEATURES, {"sliding_window": 48}, "its layers have a sliding window of 48"),
        (FEATURES, {"head_dim": 8}, "its heads hold 32 values of a row of 64"),
    ],
)
def test_what_has_no_such_form(config: ExitConfig, changes: dict[str, Any], reason: str) -> None:
    exit = TrainedExit(config, np.arange(3, dtype=np.int32), [], {}, "", 4)
    if "head_dim" in changes:
        changes["rope"] = RopeConfig(head_dim=8)
    with pytest.raises(ConfigError, match=f"cannot be written as an EAGLE-3 drafter: {reason}"):
        two_layers.check_exact(exit, tiny_config(**changes))
    two_layers.check_exact(replace(exit, config=FEATURES), tiny_config())


def test_an_exit_of_another_model_is_refused(tmp_path: Path) -> None:
    write_exit(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ConfigError, match="this exit was trained for another model"):
        export(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "q8"])
def test_types(dtype: str, tmp_path: Path) -> None:
    write_exit(tmp_path)
    with pytest.raises(ConfigError, match=rf"dtype is '{dtype}'; choose one of auto, float32, bfloat16"):
        export(tmp_path, dtype=dtype)


# -- the exit that ships -----------------------------------------------------------------------------------------------


def test_the_shipped_exit(default_model: Path, tmp_path: Path) -> None:
    arguments = ["export", "eagle3", str(tmp_path / "out"), "--base", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    tensors = stored(tmp_path / "out" / "model.safetensors")
    assert tensors["layers.0.self_attn.v_proj.weight"] == ("BF16", (576, 1152))
    assert tensors["lm_head.weight"] == ("BF16", (8192, 576))
    assert len(tensors) == 8 + 2 * 14
    text = (tmp_path / "out" / "README.md").read_text()
    for wanted in (
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n",
        "EAGLE-3 drafter of 2 layers",
        "It is for vLLM only",
        "Acceptance per position, held out: 65.2%, 41.8%, 25.4%, 12.9%.",
        "first 15, 27 and 30 layers, and drafts 8,192 of 49,152 tokens",
        "stored as Q4_1",
        "$ vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --speculative-config "
        """'{"method": "eagle3", "model": "./out", "num_speculative_tokens": 4}'""",
        "$ vllm serve ./out\n",
    ):
        assert wanted in text, wanted
