"""Every model family, written to disk by transformers and read back by us: the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.weights import load_weights
from hopskip.checkpoint.checkpoint import open_checkpoint
from tests.tiny import FAMILIES, VOCAB_SIZE, make_model, write_checkpoint

NUM_TOKENS = 256
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """Folder of a checkpoint, token ids [T], and transformers' logits [T, V] for them. Two families are sharded."""
    folder = tmp_path_factory.mktemp(request.param)
    is_sharded = request.param in ("llama3-gqa", "qwen3")
    model = write_checkpoint(folder, request.param, max_shard_size="100KB" if is_sharded else "1GB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 or not is_sharded
    ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    return folder, ids, reference_logits(model, ids)


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None]).logits[0]
    return logits


def load(path: Path, dtype: torch.dtype = torch.float32) -> TorchBackend:
    checkpoint = open_checkpoint(path)
    return TorchBackend(checkpoint.config, load_weights(checkpoint, dtype))


def logits_in_chunks(model: TorchBackend, ids: Tensor, chunks: Iterable[int]) -> Tensor:
    """Logits of all positions, the ids fed a chunk at a time."""
    cache = model.new_cache(1, len(ids))
    logits, start = [], 0
    for count in chunks:
        rows = Rows([Segment(slot=0, start=start, count=count)])
        hidden_ND = model.forward(ids[start : start + count].tolist(), rows, cache).hidden_ND
        logits.append(model.logits(hidden_ND))
        start += count
    assert start == len(ids)
    return torch.cat(logits)


@pytest.mark.parametrize(
    "chunks",
    [[NUM_TOKENS], [1] * NUM_TOKENS, [230, 6, *[1] * 10, 10]],
    ids=["prefill", "token-by-token", "prompt-then-rounds"],
)
def test_logits_equal_transformers(family: tuple[Path, Tensor, Tensor], chunks: list[int]) -> None:
    folder, ids, expected = family
    logits = logits_in_chunks(load(folder), ids, chunks)
    assert expected.std() > 0.1  # logits of ordinary scale: the tolerance means something
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-linear", "llama-yarn", "llama3-gqa", "mistral-window"])
def test_the_setting_is_felt(name: str, tmp_path: Path) -> None:
    """Without its scaling or window the same weights give other logits, so the comparison above can fail."""
    model = write_checkpoint(tmp_path, name)
    ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    config["sliding_window"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    difference = logits_in_chunks(load(tmp_path), ids, [NUM_TOKENS]) - reference_logits(model, ids)
    assert difference.abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama3-gqa", "llama-yarn", "llama-linear", "codellama"])
def test_both_spellings_of_rope_settings(name: str, tmp_path: Path) -> None:
    """Checkpoints from before transformers 5 say `rope_theta` and `rope_scaling` (with `type` in the oldest)."""
    write_checkpoint(tmp_path, name)
    new = open_checkpoint(tmp_path).config
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling["type"] == "default" else scaling
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).config == new
    assert new.rope.rope_type == scaling["type"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    """A half-precision checkpoint computes in float32 what transformers computes with the same rounded weights."""
    write_checkpoint(tmp_path, "qwen3", dtype=dtype)
    ids = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(2))
    assert open_checkpoint(tmp_path).dtype == str(dtype).removeprefix("torch.")
    expected = reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids)
    torch.testing.assert_close(logits_in_chunks(load(tmp_path), ids, [40]), expected, rtol=0, atol=TOLERANCE)
    unrounded = reference_logits(make_model("qwen3"), ids)
    assert (expected - unrounded).abs().max() > TOLERANCE
