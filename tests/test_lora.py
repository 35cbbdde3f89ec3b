"""LoRA adapters: merged as peft merges them, or refused with the way to merge them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hopskip import LLM, SamplingParams
from hopskip.checkpoint import hub_cache
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.lora import is_adapter
from hopskip.errors import CheckpointError
from hopskip.text.tokenizer_files import load_tokenizer
from tests.tiny import make_model, write_checkpoint, write_gguf, write_tokenizer

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(folder: Path, base: Path, seed: int = 1, **settings: Any) -> Any:
    """An adapter with random weights, written by peft; returns peft's model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings})
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.uniform_(0.5, 2)
            elif "modules_to_save" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return adapted


def values(checkpoint: Checkpoint, name: str) -> Any:
    stored = checkpoint.stored(name)
    found = np.asarray(checkpoint.rows(name, 0, stored.num_rows))
    return torch.from_numpy(found.copy()).reshape(stored.shape)


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", "llama2-mha", tokenizer=True)
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])
    return tmp_path / "adapter"


PATTERNS = {
    "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
    "alpha_pattern": {"q_proj": 3, "k_proj|v_proj": 30},
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama2-mha", {}),
        ("qwen2", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
        ("qwen3", {"use_rslora": True}),
        ("llama3-gqa", PATTERNS),
        ("mistral", {"target_modules": "all-linear", "fan_in_fan_out": True}),
        ("llama2-mha", {"use_dora": True}),
        ("llama2-mha", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama2-mha", {"target_modules": ["lm_head"], "init_lora_weights": "gaussian"}),
    ],
)
def test_merged_as_by_peft(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", family)
    adapted = write_adapter(tmp_path / "adapter", tmp_path / "base", **settings)
    merged = adapted.merge_and_unload().state_dict()
    checkpoint = open_checkpoint(tmp_path / "adapter")
    plain = open_checkpoint(tmp_path / "base")
    changed = 0
    for name in checkpoint.names():
        torch.testing.assert_close(values(checkpoint, name), merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(values(checkpoint, name), values(plain, name))
    assert changed >= 2 if "lm_head" not in str(settings) else changed >= 1
    assert checkpoint.fingerprint != plain.fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once_to_the_precision_of_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "llama2-mha", dtype=dtype)
    write_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    name = "model.layers.1.self_attn.q_proj"
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down, up = (parts[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    weight = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]
    exact = (weight.double() + 3 * (up @ down)).to(torch.float32)
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert checkpoint.stored(f"{name}.weight").type == open_checkpoint(tmp_path / "base").stored(f"{name}.weight").type
    found = values(checkpoint, f"{name}.weight")
    assert torch.equal(found.to(dtype).float(), found)
    # sums of float32 differ by their order; halves of float16 are near enough to feel it
    torch.testing.assert_close(found, exact.to(dtype).float(), rtol=2**-9 if dtype == torch.float16 else 0, atol=0)
    part = torch.from_numpy(np.asarray(checkpoint.rows(f"{name}.weight", 5, 7)).copy())
    assert torch.equal(part, found[5:12])


def test_a_tied_head_that_is_changed_is_no_longer_tied(tmp_path: Path) -> None:
    """As peft computes it while the adapter is not merged: the embedding stays."""
    write_checkpoint(tmp_path / "base", "smollm2")
    write_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["lm_head"])
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert not checkpoint.config.tie_word_embeddings
    embedding = values(checkpoint, "model.embed_tokens.weight")
    assert torch.equal(embedding, values(open_checkpoint(tmp_path / "base"), "model.embed_tokens.weight"))
    assert not torch.equal(embedding, values(checkpoint, "lm_head.weight"))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_it_runs_as_the_merged_model(backend: Any, adapter: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    write_tokenizer(tmp_path / "merged")
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompt = [list(range(5, 25))]
    texts = [
        LLM(path, backend=backend).generate(prompt, params)[0].text for path in (adapter, tmp_path / "merged", base)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_base_is_found(adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, from here or from the adapter; in the cache by its id."""
    fingerprint = open_checkpoint(adapter).fingerprint
    for name, here in (
        ("base", tmp_path),
        ("../base", tmp_path.parent),
        ("base", tmp_path.parent),
        ("~/base", Path("/")),
    ):
        monkeypatch.chdir(here)
        monkeypatch.setenv("HOME", str(tmp_path))
        set_config(adapter, base_model_name_or_path=name)
        assert open_checkpoint(adapter).names() == open_checkpoint(base).names()
    monkeypatch.setattr(hub_cache, "cached_model", lambda name: base if name.repo_id == "org/model" else None)
    set_config(adapter, base_model_name_or_path="org/model")
    assert open_checkpoint(adapter).fingerprint != fingerprint  # of the config as well
    for name, message in (
        ("org/other", r"adapter for org/other, which is not here; get it \(hf download org/other"),
        ("/no/such", r"adapter for '/no/such', which does not exist here; put that model there"),
    ):
        set_config(adapter, base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(adapter)


def test_tokenizers(adapter: Path, base: Path) -> None:
    """The adapter's own where it has one, else its base's."""
    config = open_checkpoint(adapter).config
    assert load_tokenizer(adapter, config).encode("fox") == load_tokenizer(base, config).encode("fox")
    shutil.copy(base / "tokenizer.json", adapter)
    shutil.rmtree(base)
    assert load_tokenizer(adapter, config).encode("fox")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "with peft_type 'IA3', which hopskip does not merge; merge it with peft"),
        ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights 'pissa_niter_4'"),
        ({"bias": "all"}, "with bias 'all'"),
        ({"lora_bias": True}, "with lora_bias"),
        ({"layer_replication": [[0, 2]]}, "with layer_replication"),
        ({"base_model_name_or_path": None}, "does not say what its base model is"),
        ({"fine_tune_type": "lora"}, "adapter for MLX; merge it there"),
        ({"rank_pattern": {"q_proj": 2}}, "says rank 2.0 for 'model.layers.0.self_attn.q_proj.weight', which has 4"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern that cannot be read"),
        ({"use_dora": True}, "has lora_A, lora_B for .* instead of lora_A, lora_B, lora_magnitude_vector"),
    ],
)
def test_settings_that_are_not_merged(fields: dict[str, Any], message: str, adapter: Path) -> None:
    set_config(adapter, **fields)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(adapter)
    assert "\n" not in str(raised.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "has lora_A for 'model.layers.0.self_attn.q_proj' instead of"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(64)}), r"parts .*lora_B.bias\); merge it with peft"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), r"parts .*q_proj.weight\)"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 65)}),
            r"by \[64, 4\] x \[4, 65\], which does not fit its base's \[64, 64\]; use the model that it was trained on",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}), "no plain type"),
        (
            lambda t: t.update({f"{Q[:-6]}z.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}),
            "changes 'model.layers.0.self_attn.z', which its base lacks; use the model",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(330, 64)}),
            r"'lm_head.weight' of shape \[330, 64\], its base \[320, 64\]: .*vocabulary has grown, merge it with peft",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 320)}),
            r"parts .*lora_embedding_A\)",
        ),
    ],
)
def test_weights_that_are_not_merged(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, adapter: Path
) -> None:
    change_tensors(adapter, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(adapter)


def test_pickled_and_missing_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"without adapter_model\.safetensors: it is incomplete"):
        open_checkpoint(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(
        CheckpointError, match="holds pickled weights, which can run code when read; merge it with peft"
    ):
        open_checkpoint(adapter)


def test_bases_that_nothing_is_merged_into(adapter: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(adapter, second)
    set_config(second, base_model_name_or_path=str(adapter))
    with pytest.raises(CheckpointError, match="is an adapter, and so is its base"):
        open_checkpoint(second)
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "m.gguf", make_model("llama2-mha"))
    set_config(adapter, base_model_name_or_path="org/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_cache, "cached_model", lambda _: folder / "m.gguf")
        with pytest.raises(CheckpointError, match=r"a GGUF file, into which nothing is merged.*hf download org/model"):
            open_checkpoint(adapter)


def test_what_is_an_adapter(adapter: Path, base: Path) -> None:
    """A model that was merged may keep the description of its adapter; an adapter may have its base's config."""
    assert is_adapter(adapter)
    shutil.copy(base / "config.json", adapter)
    assert is_adapter(adapter)
    shutil.copy(adapter / "adapter_config.json", base)
    assert not is_adapter(base)
