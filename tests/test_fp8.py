"""Folders with 8-bit weights and their scales, in each of the ways in which they are published; and other kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.isa import obstacle
from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.weights import copy_into, load_tensor, load_weights
from hopskip.bench.expected import model_costs
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.fp8 import ScaledTensor, with_scales
from hopskip.checkpoint.quantization import Fp8Format
from hopskip.checkpoint.safetensors import read_safetensors
from hopskip.errors import CheckpointError
from hopskip.train.base import to_transformers
from tests.models import tiny_config
from tests.test_families import load, logits_in_chunks
from tests.tiny import write_checkpoint

BLOCK = 24
"""Rows and columns that share a scale: 64 and 96 are a multiple of it and not."""
_QUARK = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
_FLOAT = {"num_bits": 8, "type": "float"}
_GROUP = {"targets": ["Linear"], "weights": {**_FLOAT, "strategy": "tensor"}}
_BLOCKS = {"targets": ["Linear"], "weights": {**_FLOAT, "strategy": "block", "block_structure": [BLOCK, 40]}}
_COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}

KINDS: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "deepseek": ({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, "block", "weight_scale_inv"),
    "qwen": ({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, "block-bf16", "weight_scale_inv"),
    "exact-blocks": ({"quant_method": "fp8"}, "block-32", "weight_scale_inv"),
    "autofp8": ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "weight_scale"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "row", "weight_scale"),
    "compressed-tensor": ({**_COMPRESSED, "config_groups": {"group_0": _GROUP}}, "tensor-1", "weight_scale"),
    "compressed-channel": ({**_COMPRESSED, "config_groups": {"group_0": _GROUP}}, "row-bf16", "weight_scale"),
    "compressed-block": ({**_COMPRESSED, "config_groups": {"group_0": _BLOCKS}}, "wide", "weight_scale"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "tensor", "weight_scale"),
    "modelopt-rows": ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "rows", "weight_scale"),
    "quark": ({"quant_method": "quark", "global_quant_config": {"weight": _QUARK}}, "tensor", "weight_scale"),
    "mxfp8": ({"quant_method": "mxfp8"}, "exponents", "weight_scale_inv"),
    "scale": ({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, "block", "scale"),
    "e5m2": ({"quant_method": "fp8"}, "tensor-e5m2", "weight_scale"),
}  # fmt: skip
"""By name: what config.json says, how scales are laid out, and what they are called."""
UNUSED = ("input_scale", "input_scale_ub", "k_scale", "v_scale", "output_scale", "input_zero_point")


def quantize(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """The stored values, their scales as stored, and the scale of every value, float32."""
    kind, _, variant = layout.partition("-")
    rows, columns = weight.shape
    dtype = torch.float8_e5m2 if variant == "e5m2" else torch.float8_e4m3fn
    size = int(variant) if variant.isdecimal() and kind == "block" else BLOCK
    height, width = {
        "block": (size, size),
        "wide": (size, 40),
        "row": (1, columns),
        "rows": (1, columns),
        "exponents": (1, 32),
    }.get(kind, (rows, columns))
    grid = (
        torch.rand(-(-rows // height), -(-columns // width), generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001
    )
    if kind == "exponents":
        exponents = (grid.log2().round() + 127).to(torch.uint8)
        grid, stored = torch.exp2(exponents.float() - 127), exponents
    elif variant == "bf16":
        stored = grid.bfloat16()
        grid = stored.float()
    else:
        stored = {"tensor": grid[0, 0] if not variant else grid[0], "rows": grid[:, 0]}.get(kind, grid)
    scales = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    return (weight / scales).clamp(-400, 400).to(dtype), stored.contiguous(), scales


def write_fp8(folder: Path, kind: str, family: str = "qwen3") -> dict[str, Tensor]:
    """A folder whose linears, the head excepted, are of that kind; returns the values of all tensors, float32."""
    settings, layout, name_of_scale = KINDS[kind]
    write_checkpoint(folder, family, dtype=torch.bfloat16)
    tensors, values = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name], values[name] = tensor, tensor.float()
        if name.endswith("proj.weight"):
            stored, scale, scales = quantize(tensor.float(), layout)
            module = name.removesuffix(".weight")
            tensors |= {name: stored, f"{module}.{name_of_scale}": scale}
            tensors |= {f"{module}.{unused}": torch.ones(1) for unused in UNUSED}
            values[name] = stored.float() * scales
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    set_config(folder, quantization_config=settings)
    return values


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Add, replace or (with None) drop tensors; `__` in a name stands for a point."""
    changes = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    stored = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in changes}
    save_file({**stored, **{n: t for n, t in changes.items() if t is not None}}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_stored_values_times_scales(kind: str, tmp_path: Path) -> None:
    values = write_fp8(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == values.keys()
    own_type = "F8_E5M2" if kind == "e5m2" else "F8_E4M3"
    assert (checkpoint.quantization, checkpoint.dtype) == (own_type, "bfloat16")
    for name, expected in values.items():
        assert torch.equal(load_tensor(checkpoint, name, torch.float32), expected), name
        assert torch.equal(load_tensor(checkpoint, name, torch.bfloat16), expected.bfloat16()), name
        if name.endswith("proj.weight"):
            assert load_tensor(checkpoint, name).dtype == torch.float32
            stored = checkpoint.stored(name)
            assert isinstance(stored, ScaledTensor)
            for first, count in ((0, 1), (23, 2), (25, 7), (47, 17), (40, 500)):
                assert np.array_equal(stored.values(first, count), expected[first : first + count].numpy())


def test_chunks_of_a_large_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few rows at a time, borders within blocks: as in one piece."""
    values = write_fp8(tmp_path, "deepseek")
    monkeypatch.setattr("hopskip.backends.torch.weights._CHUNK_VALUES", 7 * 64)
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in values.items():
        assert torch.equal(load_tensor(checkpoint, name, torch.float32), expected), name


def test_equal_to_transformers(tmp_path: Path) -> None:
    """Where transformers can read them without a GPU: it dequantizes exact blocks to bfloat16."""
    write_fp8(tmp_path, "exact-blocks")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    set_config(tmp_path, quantization_config={**config, "weight_block_size": [32, 32], "dequantize": True})
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters())
    ours = open_checkpoint(tmp_path)
    for name in ours.names():
        assert torch.equal(load_tensor(ours, name, torch.bfloat16), theirs[name]), name


def test_modelopt_says_so_in_a_file_of_its_own(tmp_path: Path) -> None:
    values = write_fp8(tmp_path, "modelopt")
    set_config(tmp_path, quantization_config=None)
    (tmp_path / "hf_quant_config.json").write_text(
        '{"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}'
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_tensor(open_checkpoint(tmp_path), name), values[name])
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(CheckpointError, match=r"quantized by ModelOpt \(NVFP4\)"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(obstacle() is not None, reason=f"no native engine here: {obstacle()}")
@pytest.mark.parametrize(("precision", "error"), [("auto", 0.06), ("bfloat16", 0.02), ("float32", 1e-5), ("q8", 0.06)])
def test_the_native_engine_runs_them(precision: str, error: float, tmp_path: Path) -> None:
    """With the logits of the dequantized weights, up to the precision it computes in. `auto` keeps 8 bits."""
    write_fp8(tmp_path, "deepseek")
    ids = torch.randint(300, (30,), generator=torch.Generator().manual_seed(1))
    expected = logits_in_chunks(load(tmp_path), ids, [30])
    checkpoint = open_checkpoint(tmp_path)
    model = NativeBackend.load(checkpoint, precision)
    cache = model.new_cache(1, 30)
    hidden = model.forward(ids.tolist(), Rows([Segment(slot=0, start=0, count=30)]), cache).hidden_ND
    found = torch.as_tensor(model.logits(hidden))
    assert float((found - expected).norm() / expected.norm()) < error
    layers = model_costs(checkpoint, "native", precision).bytes_by_format
    assert ("q8" in layers) is (precision in ("auto", "q8"))


def test_training_starts_from_the_dequantized_weights(tmp_path: Path) -> None:
    values = write_fp8(tmp_path, "fbgemm")
    model = to_transformers(open_checkpoint(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
    model.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").quantization is None


@pytest.mark.parametrize(
    ("tensor", "value", "named"),
    [
        ("weight_scale", None, r"there is no scale for it"),
        ("weight_scale", torch.ones(7), r"shape \[7\], which does not fit its \[96, 64\]"),
        ("weight_scale", torch.ones(2, 3, 4), r"does not fit"),
        ("weight_scale", torch.ones(1, dtype=torch.int32), r"have dtype 'I32'"),
        ("weight_zero_point", torch.ones(1), r"up_proj\.weight_zero_point' is not zero"),
        ("mystery", torch.ones(1), r"unexpected: .*mystery"),
    ],
)
def test_damaged_scales(tensor: str, value: Tensor | None, named: str, tmp_path: Path) -> None:
    write_fp8(tmp_path, "fbgemm")
    change(tmp_path, **{f"model__layers__0__mlp__up_proj__{tensor}": value})
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path)


def test_zero_points_of_zero_change_nothing(tmp_path: Path) -> None:
    values = write_fp8(tmp_path, "fbgemm")
    change(tmp_path, model__layers__0__mlp__up_proj__weight_zero_point=torch.zeros(96, 1).to(torch.float8_e4m3fn))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_tensor(open_checkpoint(tmp_path), name), values[name])


def test_weights_in_8_bits_that_the_config_does_not_mention(tmp_path: Path) -> None:
    write_fp8(tmp_path, "fbgemm")
    set_config(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"dtype 'F8_E4M3', but the config says nothing of FP8"):
        open_checkpoint(tmp_path)


def test_a_tied_head_in_8_bits(tmp_path: Path) -> None:
    """Compared by what it is worth: with the scale doubled it is a head of its own."""
    write_checkpoint(tmp_path, "llama3-gqa", dtype=torch.bfloat16)
    stored, scale, _ = quantize(
        load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].float(), "tensor"
    )
    set_config(tmp_path, quantization_config={"quant_method": "fp8"})
    pair = {"model__embed_tokens__weight": stored, "model__embed_tokens__weight_scale": scale}
    change(tmp_path, **pair, lm_head__weight=stored.clone(), lm_head__weight_scale=scale.clone())
    assert open_checkpoint(tmp_path).config.tie_word_embeddings
    change(tmp_path, lm_head__weight_scale=scale * 2)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    weights = load_weights(checkpoint, torch.float32)
    assert torch.equal(weights.lm_head, weights.embed_tokens * 2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized by AWQ,"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by GPTQ,"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized by bitsandbytes,"),
        ({"quantization_config": {"quant_method": "bitsandbytes_4bit"}}, "quantized by bitsandbytes,"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "quantized by EXL2,"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantized by AQLM,"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized by HQQ,"),
        ({"quantization_config": {"quant_method": "auto-round"}}, "quantized by AutoRound,"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantized by torchao,"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized by MXFP4,"),
        ({"quantization_config": {"quant_method": "something-new"}}, "quantized by something-new,"),
        ({"quantization_config": {"quant_method": "quark"}}, r"quantized by Quark \(of an unnamed type\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized by MLX,"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}}, r"ModelOpt \(W4A8_AWQ\)"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                     "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}},
            r"compressed-tensors \(pack-quantized, int of 4 bits\)",
        ),
        (
            {"compression_config": {"format": "int-quantized", "config_groups": {
                "group_0": _GROUP, "group_1": {"weights": {"num_bits": 8, "type": "int"}}}}},
            r"compressed-tensors \(int-quantized, int of 8 bits\)",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {},
                                     "sparsity_config": {"format": "sparse-24-bitmask"}}},
            r"compressed-tensors \(sparse-24-bitmask\)",
        ),
        ({"quantization_config": "awq"}, "must be an object"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, -1]}}, "two positive integers"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "128"}}, "two positive integers"),
    ],
)  # fmt: skip
def test_other_kinds_are_named(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    set_config(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(tmp_path)
    if "quantized by" in named:
        assert "use the original model (--quantize q4 packs it to 4 bits) or a GGUF version" in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("qzeros", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("codebooks", "AQLM"),
        ("W_q", "HQQ"),
        ("q_invperm", "EXL2"),
    ],
)
def test_kinds_that_only_the_tensors_tell(suffix: str, kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    change(tmp_path, **{f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(4, 4, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=f"is quantized by {kind}"):
        open_checkpoint(tmp_path)


def test_compressed_tensors_without_quantized_weights_are_plain(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3")
    set_config(tmp_path, quantization_config={**_COMPRESSED, "config_groups": {"g": {"weights": None}}})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization is None
    assert torch.equal(load_tensor(checkpoint, "model.norm.weight"), model.model.norm.weight)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 16M values is written to its place a million at a time, never as a whole in float32."""
    weight = torch.ones(2048, 8192, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    save_file({"m.weight": weight, "m.weight_scale_inv": torch.full((16, 64), 2.0)}, tmp_path / "model.safetensors")
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    matrix = with_scales(tensors, Fp8Format((128, 128)), tmp_path)["m.weight"]
    sizes: list[int] = []
    values = ScaledTensor.values

    def watched(self: ScaledTensor, first: int = 0, count: int | None = None) -> NDArray[np.float32]:
        found = values(self, first, count)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(ScaledTensor, "values", watched)
    out = torch.zeros(2048, 8192, dtype=torch.bfloat16)
    copy_into(out, Checkpoint(tmp_path, tiny_config(), {"m.weight": matrix}, ""), "m.weight")
    assert float(out.min()) == float(out.max()) == 2.0
    assert sizes == [1 << 20] * 16
