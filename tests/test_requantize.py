"""GGUF files written anew in another type (`benchmarks/requantize.py`): types, errors, and the order of dimensions."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from benchmarks.requantize import requantize

from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.bench.contenders import gguf_bytes_per_token
from hopskip.bench.perplexity import negative_log_likelihoods
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.errors import CheckpointError, ConfigError, HopskipError
from hopskip.loading import LoadConfig, load_backend
from tests.tiny import make_model, write_gguf

WINDOWS = [[(7 * i * i + n) % 320 for i in range(n)] for n in (2, 40, 300)]


def test_requantize(tmp_path: Path) -> None:
    source, target = tmp_path / "f32.gguf", tmp_path / "q.gguf"
    write_gguf(source, make_model("llama2-mha"), metadata={"general.name": "tiny"})
    for kind, head, matrix in (("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q8_0", "Q4_0")):
        requantize(source, target, kind)
        checkpoint = open_checkpoint(target)
        assert checkpoint.config == open_checkpoint(source).config
        for name, wanted in (("lm_head.weight", head), ("model.layers.1.mlp.up_proj.weight", matrix)):
            assert checkpoint.stored(name).type.name == wanted
        assert checkpoint.stored("model.norm.weight").type.name == "F32"
        reader = gguf.GGUFReader(target)
        name = reader.get_field("general.name")
        assert name is not None
        assert name.contents() == "tiny"
        # all tensors but the embedding table, which is not the head here
        table = next(t for t in reader.tensors if t.name == "token_embd.weight")
        assert gguf_bytes_per_token(target) == sum(int(t.n_bytes) for t in reader.tensors) - int(table.n_bytes)
    exact = load_weights(open_checkpoint(source), torch.float32, torch.device("cpu")).layers[0].down_proj
    rounded = load_weights(open_checkpoint(target), torch.float32, torch.device("cpu")).layers[0].down_proj
    error = (exact - rounded).abs().max() / exact.abs().max()
    assert 0 < error < 0.13  # 4 bits: steps of an eighth of the largest value of a block


def test_requantize_refuses(tmp_path: Path) -> None:
    source = tmp_path / "f32.gguf"
    write_gguf(source, make_model("llama2-mha"))
    with pytest.raises(ConfigError, match="the input itself"):
        requantize(source, source, "q8_0")
    with pytest.raises(ConfigError, match="q5_k"):
        requantize(source, tmp_path / "x.gguf", "q5_k")
    with pytest.raises(CheckpointError, match="does not exist"):
        requantize(tmp_path / "none.gguf", tmp_path / "x.gguf", "q8_0")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(HopskipError, match=r"bad\.gguf cannot be read"):
        requantize(tmp_path / "bad.gguf", tmp_path / "x.gguf", "q8_0")


@pytest.mark.parametrize("family", ["llama3-gqa", "qwen2", "qwen3"])
def test_a_shuffled_model_is_the_same_function(tmp_path: Path, family: str) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_gguf(source, make_model(family))
    requantize(source, target, "f32", shuffle=1)
    before, after = (open_checkpoint(path) for path in (source, target))
    changed = {n for n in before.names() if not np.array_equal(before.array(n), after.array(n))}
    kept = {n for n in before.names() if "q_proj.bias" in n or "k_proj.bias" in n or "q_norm" in n or "k_norm" in n}
    assert changed == before.names() - kept
    load = LoadConfig(backend="torch", dtype="float32")
    found = [negative_log_likelihoods(load_backend(c, load), WINDOWS, [1, 3]) for c in (before, after)]
    for stop in (1, 3):
        np.testing.assert_allclose(found[1][stop], found[0][stop], rtol=1e-4, atol=1e-3)
    requantize(source, tmp_path / "other.gguf", "f32", shuffle=2)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(load_tensor(open_checkpoint(tmp_path / "other.gguf"), name), load_tensor(after, name))


def test_a_shuffled_model_lies_on_no_grid(tmp_path: Path) -> None:
    """What 4 bits hold without loss, they hold again; in other blocks they do not."""
    kinds = gguf.GGMLQuantizationType
    write_gguf(tmp_path / "q4_0.gguf", make_model("llama2-mha"), types=kinds.Q4_0)
    errors = []
    for shuffle in (None, 1):
        requantize(tmp_path / "q4_0.gguf", tmp_path / "f32.gguf", "f32", shuffle=shuffle)
        requantize(tmp_path / "f32.gguf", tmp_path / "again.gguf", "q4_0", pure=True)
        name = "model.layers.0.mlp.down_proj.weight"
        before, after = (load_tensor(open_checkpoint(tmp_path / f"{n}.gguf"), name) for n in ("f32", "again"))
        errors.append(float((after - before).norm() / before.norm()))
    assert errors[0] < 1e-3
    assert errors[1] > 0.02


def test_types_of_edges(tmp_path: Path) -> None:
    write_gguf(tmp_path / "f32.gguf", make_model("llama2-mha"))
    for kind, pure, edges in (("bf16", False, "BF16"), ("q4_0", False, "Q8_0"), ("q4_0", True, "Q4_0")):
        requantize(tmp_path / "f32.gguf", tmp_path / "out.gguf", kind, pure=pure)
        checkpoint = open_checkpoint(tmp_path / "out.gguf")
        assert checkpoint.stored("lm_head.weight").type.name == edges
        assert checkpoint.stored("model.embed_tokens.weight").type.name == edges
        assert checkpoint.stored("model.layers.2.mlp.down_proj.weight").type.name == kind.upper()
        assert checkpoint.stored("model.norm.weight").type.name == "F32"
    with pytest.raises(ConfigError, match="shuffle is -1"):
        requantize(tmp_path / "f32.gguf", tmp_path / "out.gguf", "f32", shuffle=-1)
    # a file that is no model
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"has no tensor blk\.0\.ffn_up\.weight"):
        requantize(tmp_path / "empty.gguf", tmp_path / "out.gguf", "f32", shuffle=1)
