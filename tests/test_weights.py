"""Safetensors folders: names and shapes, damage, memory, identity."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.checkpoint.checkpoint import LAYERSKIP_RECOMMENDED, expected_tensors, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import CheckpointError
from tests.tiny import FAMILIES, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "qwen3")
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, family)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    checkpoint = open_checkpoint(tmp_path)
    assert expected_tensors(checkpoint.config) == shapes
    assert checkpoint.names() == shapes.keys()


def test_tensors_are_bit_exact_and_never_views_that_change_the_file(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        assert torch.equal(load_tensor(checkpoint, name), stored[name])
        assert torch.equal(load_tensor(checkpoint, name, torch.bfloat16), stored[name].bfloat16())
        assert checkpoint.row_order(name) is None
        load_tensor(checkpoint, name).zero_()
        assert torch.equal(load_tensor(checkpoint, name), stored[name])
    assert (checkpoint.dtype, checkpoint.quantization) == ("float32", None)


def test_load_weights_fuses_and_reports_progress(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    shares: list[float] = []
    weights = load_weights(checkpoint, torch.float32, progress=shares.append)
    attention = "model.layers.1.self_attn."
    qkv = torch.cat([load_tensor(checkpoint, f"{attention}{x}_proj.weight") for x in "qkv"])
    assert torch.equal(weights.layers[1].qkv_proj, qkv)
    mlp = "model.layers.2.mlp."
    gate_up = torch.cat([load_tensor(checkpoint, f"{mlp}{x}_proj.weight") for x in ("gate", "up")])
    assert torch.equal(weights.layers[2].gate_up_proj, gate_up)
    assert weights.lm_head is not weights.embed_tokens
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama3-gqa")
    weights = load_weights(open_checkpoint(tmp_path), torch.float32)
    assert weights.lm_head is weights.embed_tokens


@pytest.mark.parametrize("differs", [False, True])
def test_tied_checkpoint_that_stores_a_head(differs: bool, tmp_path: Path) -> None:
    """A copy of the embedding is dropped; a head of its own is believed over the config, as in transformers."""
    write_checkpoint(tmp_path, "llama3-gqa")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + float(differs)}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings is not differs
    weights = load_weights(checkpoint, torch.float32)
    torch.testing.assert_close(weights.lm_head, weights.embed_tokens + float(differs))


def test_old_rotary_buffers_are_harmless(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: torch.ones(16, dtype=torch.float64)}))
    assert name not in open_checkpoint(folder).names()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"model\.norm\.weight is \[65\] instead of \[64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "dtype 'I8'.*F32, F16, BF16"),
    ],
    ids=["missing", "unexpected", "misshapen", "dtype"],
)
def test_wrong_tensors_are_named(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], named: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


def test_many_wrong_tensors_make_one_short_error(folder: Path) -> None:
    set_config(folder, num_hidden_layers=30)
    with pytest.raises(CheckpointError, match=r"model\.layers\.10\..* and \d+ more") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1000


def test_absurd_layer_count(folder: Path) -> None:
    set_config(folder, num_hidden_layers=10**12)
    with pytest.raises(CheckpointError, match="1000000000000 layers"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"model_type": "gpt_oss"},
            "'gpt_oss'.*llama, mistral, qwen2, qwen3; nearest to it is qwen3, such as Qwen/Qwen3-4B",
        ),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe'.*; nearest to it is qwen3, such as Qwen/Qwen3-4B"),
        ({"model_type": "qwen2_vl"}, "nearest to it is qwen2"),
        ({"model_type": "mixtral"}, "nearest to it is mistral"),
        ({"model_type": "llama4"}, "nearest to it is llama"),
        ({"model_type": ["llama"]}, "model_type \\['llama'\\] is not supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures=.*a causal language model"),
        ({"architectures": ["Qwen3Model"]}, "architectures="),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": None, "head_dim": None}, "hidden_size"),
        ({"rope_parameters": 3}, "wrong type"),
        ({"num_attention_heads": 0}, "num_attention_heads|wrong type"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": ["x"]}, "eos_token_id"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": "64"}, "hidden_size|wrong type"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": float("nan")}, "vocab_size is nan"),
        ({"head_dim": 10**13}, "head_dim is 10000000000000"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"max_position_embeddings": 10**12}, "a context of 1000000000000 positions"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"sliding_window": "all", "use_sliding_window": True, "model_type": "mistral"}, "sliding_window is 'all'"),
        ({"sliding_window": -1, "use_sliding_window": True, "model_type": "mistral"}, "sliding_window is -1"),
        ({"sliding_window": 0, "use_sliding_window": True, "model_type": "mistral"}, "sliding_window is 0"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": 2.5}, "wrong type|eos_token_id"),
        ({"hopskip": "yes"}, "wrong type"),
        ({"rope_parameters": "abc"}, "wrong type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_unsupported_or_broken_config(folder: Path, fields: dict[str, Any], named: str) -> None:
    (folder / "generation_config.json").unlink()
    set_config(folder, **fields)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_incomplete_config(folder: Path, field: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=field):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("own", "generation", "union"),
    [(2, [7, 5], (2, 7, 5)), ([7, 2], 7, (7, 2)), (None, 5, (5,)), (5, None, (5,)), (None, None, ())],
)
def test_eos_ids_are_those_of_both_configs(folder: Path, own: Any, generation: Any, union: tuple[int, ...]) -> None:
    """Instruct models name the end of a turn in one of the two, and the end of a document in the other."""
    set_config(folder, eos_token_id=own)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert open_checkpoint(folder).config.eos_token_ids == union


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"], ids=["empty", "cut", "list", "deep", "latin"])
def test_broken_config_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is empty; check the path, or run its download again"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="neither a folder"):
        open_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_files_that_git_lfs_did_not_fetch(name: str, folder: Path) -> None:
    """A clone without `git lfs` leaves a few lines of text in place of each large file."""
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*run `git lfs pull` in its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["model_index.json", "unet/diffusion.safetensors"], "is a diffusers pipeline, which makes no text"),
        (["modules.json", "config.json", "model.safetensors"], "is an embedding model of sentence-transformers"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "is an adapter with peft_type None, .*merge it with peft",
        ),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "has only pickled weights.*safetensors version"),
        (["params.json", "consolidated.00.pth"], "has only pickled weights"),
        (["params.json", "consolidated.safetensors"], "its maker's own layout.*version for transformers"),
        (["config.json", "weights.npz"], "for MLX only"),
        (["config.json", "onnx/model.onnx"], "for ONNX only"),
        (["config.json", "openvino_model.xml"], "for OpenVINO only"),
        (["config.json", "tf_model.h5"], "for TensorFlow or Flax only"),
        (["config.json", "flax_model.msgpack"], "for TensorFlow or Flax only"),
        (["__0_0.distcp"], "training checkpoint in shards"),
        (["model.nemo"], "for another program only"),
    ],
)
def test_folders_of_other_kinds(files: list[str], named: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_whole_weights_is_no_matter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert open_checkpoint(folder).names()


def test_shards_without_an_index(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama2-mha", max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(load_tensor(checkpoint, name), parameter)
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shards {last.name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a" * 300, "a\0b", "", 3, None, ["x"]])
def test_an_index_that_leads_elsewhere(name: Any, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no usable 'weight_map'"):
        open_checkpoint(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=r"pickled.*safetensors version"):
        open_checkpoint(folder)


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_checkpoint(folder)


def test_shards(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama2-mha", max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    checkpoint = open_checkpoint(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(load_tensor(checkpoint, name), parameter)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shards {shards[1].name}"):
        open_checkpoint(tmp_path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match="repeats tensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            open_checkpoint(folder)
    finally:
        file.write_bytes(whole)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_header(folder: Path, data: st.DataObject) -> None:
    """Whatever bytes stand in the header: it opens, or it is a CheckpointError."""
    file = folder / "model.safetensors"
    whole = bytearray(file.read_bytes())
    header_size = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header_size - 1))] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError:
            return
        assert checkpoint.names() == expected_tensors(checkpoint.config).keys()
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [64], "data_offsets": [-400, -144]},
        {"dtype": "F32", "shape": [64], "data_offsets": [256, 0]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 255]},
        {"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": 64, "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64]},
        {"dtype": "F32", "shape": ["64"], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64.0], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, float("inf")]},
        {"dtype": "F32", "shape": [64], "data_offsets": [True, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 256, 512]},
        {"dtype": "F32", "shape": [64], "data_offsets": [2**63, 2**63 + 256]},
        {"dtype": "F32", "shape": [1] * 20 + [64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]},  # nothing of the rest belongs to a tensor
        {"dtype": ["F32"], "shape": [64], "data_offsets": [0, 256]},
        "F32",
    ],
)
def test_impossible_header_entries(folder: Path, entry: Any) -> None:
    header = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1024))
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(folder)


@pytest.mark.parametrize("change", ["overlapping", "moved", "repeated"])
def test_tensors_that_share_bytes(change: str, folder: Path) -> None:
    """Tensors fill the file one after the other, or a changed entry would give other weights without a sign of it."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    names = [f"model.layers.{index}.input_layernorm.weight" for index in (0, 1)]
    if change == "moved":
        header[names[0]]["data_offsets"] = [offset + 4 for offset in header[names[0]]["data_offsets"]]
    else:
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    text = json.dumps(header)
    if change == "repeated":
        text = text.replace(names[0], names[1])
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + whole[8 + length :])
    with pytest.raises(CheckpointError, match=r"truncated or corrupt \(tensor .* begins at byte \d+ instead of \d+"):
        open_checkpoint(folder)


def test_values_at_odd_addresses(folder: Path) -> None:
    """Old writers did not align the header: values may begin at any byte."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(struct.pack("<Q", length + 1) + whole[8 : 8 + length] + b" " + whole[8 + length :])
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        assert torch.equal(load_tensor(checkpoint, name), stored[name])


def test_fingerprint(tmp_path: Path) -> None:
    """The same weights elsewhere are the same; a fine-tune of the same shape is not."""
    write_checkpoint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_checkpoint(tmp_path / "c", seed=1)
    prints = [open_checkpoint(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name", ["layerskip-llama3.2-1B", "models--facebook--layerskip-llama3.2-1B"])
def test_layerskip_recommendations(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "snapshots" / "0a1b"
    write_checkpoint(path)  # three layers
    assert open_checkpoint(path).config.recommended_exit_layer is None  # exit 4 of 3 layers cannot be
    set_config(path, num_hidden_layers=5)
    rewrite(path, _add_two_layers)
    config = open_checkpoint(path).config
    assert (config.recommended_exit_layer, config.recommended_num_draft_tokens) == (4, 4)
    set_config(path, hopskip={"exit_layer": 2, "num_draft_tokens": 3})
    config = open_checkpoint(path).config
    assert (config.recommended_exit_layer, config.recommended_num_draft_tokens) == (2, 3)


def _add_two_layers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.0.")]:
        for index in (3, 4):
            tensors[name.replace(".0.", f".{index}.", 1)] = tensors[name].clone()


def test_every_published_layerskip_checkpoint_is_listed() -> None:
    assert LAYERSKIP_RECOMMENDED["layerskip-llama2-7B"] == (8, 6)
    assert LAYERSKIP_RECOMMENDED["layerskip-llama2-13B"] == (15, 4)
    assert len(LAYERSKIP_RECOMMENDED) == 7


MEASURE = """
import sys, torch
from pathlib import Path
from hopskip.backends.torch.weights import load_weights
from hopskip.checkpoint.checkpoint import open_checkpoint

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

(torch.ones(64, 64) @ torch.ones(64, 64)).bfloat16()
before = status("VmRSS")
weights = load_weights(open_checkpoint(Path(sys.argv[1])), torch.bfloat16)
tensors = [weights.embed_tokens, weights.norm, weights.lm_head]
for layer in weights.layers:
    tensors += [value for value in vars(layer).values() if value is not None]
print((status("VmHWM") - before) / sum(tensor.nbytes for tensor in tensors))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """Loading a 200 MB model in bfloat16 never needs more than 1.3 times its size, mapped pages of files included."""
    fields = {
        "model_type": "llama",
        "vocab_size": 16_384,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shapes = expected_tensors(ModelConfig.from_hf(fields))
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    print("peak over loaded size:", result.stdout)
    assert 0.9 < float(result.stdout) < 1.3
