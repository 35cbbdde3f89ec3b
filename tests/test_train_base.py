"""Any checkpoint that hopskip reads as a transformers model to start training from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hopskip.backends.torch.weights import load_tensor
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import CheckpointError
from hopskip.train.base import _rope, load_transformers_tokenizer, to_transformers
from tests.tiny import FAMILIES, byte_level_tokenizer, write_checkpoint, write_gguf


@pytest.mark.parametrize("family", list(FAMILIES))
def test_any_checkpoint_in_transformers(family: str, tmp_path: Path) -> None:
    """Folders and GGUF files give transformers models with the logits of the original."""
    original = write_checkpoint(tmp_path / "folder", family, tokenizer=True)
    paths = [tmp_path / "folder"]
    if "linear" not in family and "yarn" not in family:
        write_gguf(tmp_path / "model.gguf", original, tokenizer=byte_level_tokenizer())
        paths.append(tmp_path / "model.gguf")
    ids = torch.arange(3, 40)[None]
    for path in paths:
        if family == "llama3-gqa" and path.suffix == ".gguf":
            continue  # its scaling is in a tensor that this writer does not write
        model = to_transformers(open_checkpoint(path)).eval()
        tokenizer = load_transformers_tokenizer(path)
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
        assert tokenizer("hello, world")["input_ids"] == byte_level_tokenizer().encode("hello, world").ids
        assert tokenizer.chat_template
        model.save_pretrained(tmp_path / "again")
        again = open_checkpoint(tmp_path / "again")
        assert {n: load_tensor(again, n).shape for n in again.names()} == {
            n: load_tensor(open_checkpoint(path), n).shape for n in again.names()
        }


def test_llama3_scaling_of_gguf_files_gets_its_name_back() -> None:
    named = RopeConfig(
        head_dim=64, rope_theta=5e5, rope_type="llama3", factor=32.0, original_max_position_embeddings=8192
    )
    plain = RopeConfig(head_dim=64, rope_theta=5e5)
    divisors = tuple((plain.inverse_frequencies() / named.inverse_frequencies()).tolist())
    parameters = _rope(replace(plain, frequency_divisors=divisors))
    assert parameters["rope_type"] == "llama3"
    assert parameters["factor"] == 32.0
    with pytest.raises(CheckpointError, match="use the Hugging Face folder"):
        _rope(replace(plain, frequency_divisors=(1.5,) * 32))
