"""Exports as checkpoint folders: what transformers computes from them, what is in them, and that they are whole or not
there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from hopskip import LLM, SamplingParams
from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.weights import load_weights
from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.cli import app
from hopskip.errors import CheckpointError, ConfigError, ResourceError
from hopskip.export import early_exit, merged, tensors
from hopskip.text.tokenizer_files import load_tokenizer
from tests.test_fp8 import write_fp8
from tests.test_lora import write_adapter
from tests.tiny import (
    FAMILIES,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    make_model,
    write_checkpoint,
    write_gguf,
    write_tokenizer,
)

IDS = [5, 9, 200, 31, 7, 7, 64, 118]
TEXT = "The quick brown fox, naïve café 你好 12:30"


def logits_of(folder: Path, ids: list[int] = IDS) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def own_logits(path: Path, exit_layer: int) -> Any:
    """Of hopskip's early exit, on its torch backend."""
    checkpoint = open_checkpoint(path)
    backend = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    rows = Rows([Segment(0, 0, len(IDS))])
    return backend.logits(
        backend.run_layers(backend.embed(IDS), 0, exit_layer, rows, backend.new_cache(1, 64)).hidden_ND
    )


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    return tmp_path / "model"


# -- early exits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_logits_of_the_early_exit(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", family, tokenizer=True)
    out = early_exit(tmp_path / "model", tmp_path / "exit", exit_layer=2)
    torch.testing.assert_close(logits_of(out), own_logits(tmp_path / "model", 2), rtol=1e-4, atol=1e-4)
    found, source = open_checkpoint(out), open_checkpoint(tmp_path / "model")
    assert found.config == replace(source.config, num_hidden_layers=2)
    assert load_file(out / "model.safetensors").keys() == expected_tensors(found.config).keys()
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", ["llama3-gqa", "mistral", "qwen2", "qwen3-tied", "llama-linear", "llama-yarn"])
def test_an_early_exit_of_a_gguf_file(family: str, tmp_path: Path) -> None:
    scaling = {
        "llama-linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        "llama-yarn": {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 8.0,
            "llama.rope.scaling.original_context_length": 64,
        },
    }
    write_gguf(
        tmp_path / "m.gguf",
        make_model(family),
        tokenizer=byte_level_tokenizer(),
        metadata=scaling.get(family),
    )
    out = early_exit(tmp_path / "m.gguf", tmp_path / "exit", exit_layer=1)
    torch.testing.assert_close(logits_of(out), own_logits(tmp_path / "m.gguf", 1), rtol=1e-4, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].lower().startswith(config["model_type"])
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama3_is_told_by_a_files_divisors(factor: float, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from hopskip.export import gguf

    make_model("llama3-gqa", rope_parameters=scaling).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (file,) = gguf(tmp_path / "model", tmp_path / "gguf").glob("*.gguf")
    out = early_exit(file, tmp_path / "exit", exit_layer=1)
    rope = json.loads((out / "config.json").read_text())["rope_scaling"]
    assert rope == {name: value for name, value in scaling.items() if name != "rope_theta"}


def test_divisors_of_an_unknown_scaling_have_no_config(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 1, 2, 3, 4, 5, 7], dtype=np.float32)
    write_gguf(
        tmp_path / "m.gguf",
        make_model("llama2-mha"),
        tokenizer=byte_level_tokenizer(),
        extra_tensors={"rope_freqs.weight": divisors},
    )
    with pytest.raises(ConfigError, match=r"RoPE divisors are those of no known scaling.*or as GGUF"):
        early_exit(tmp_path / "m.gguf", tmp_path / "exit", exit_layer=1)
    assert not (tmp_path / "exit").exists()


@pytest.mark.parametrize(
    ("given", "stored"),
    [("auto", "BF16"), ("bf16", "BF16"), ("float32", "F32"), ("torch.float16", "F16")],
)
def test_types_of_weights(given: str, stored: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen2", dtype=torch.bfloat16, tokenizer=True).state_dict()
    out = early_exit(tmp_path / "model", tmp_path / "exit", exit_layer=1, dtype=given)
    checkpoint = open_checkpoint(out)
    assert {checkpoint.stored(name).type.name for name in checkpoint.names()} == {stored}
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, source[name].to(tensor.dtype)), name
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == names[stored]


def test_each_tensor_keeps_its_type_and_bits(model: Path, tmp_path: Path) -> None:
    """A mixed checkpoint stays one."""
    weights = load_file(model / "model.safetensors")
    weights = {name: t if "norm" in name else t.bfloat16() for name, t in weights.items()}
    save_file(weights, model / "model.safetensors")
    found = load_file(early_exit(model, tmp_path / "exit", exit_layer=2) / "model.safetensors")
    assert len(found) < len(weights)
    for name, tensor in found.items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])


def test_what_float16_cannot_hold_is_refused(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = -70_000
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers.0.mlp.up_proj.weight has a value of 70000, beyond.*use bfloat16"):
        early_exit(model, tmp_path / "exit", exit_layer=1, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_8_bit_floats_become_bfloat16(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model", "qwen")
    write_tokenizer(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    out = early_exit(tmp_path / "model", tmp_path / "exit", exit_layer=1)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    found = load_file(out / "model.safetensors")[name]
    assert torch.equal(found, torch.from_numpy(source.array(name).copy()).bfloat16())


def test_the_recommended_exit_is_taken_and_no_longer_said(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"hopskip": {"exit_layer": 2, "num_draft_tokens": 7}, "auto_map": {"AutoModel": "x.Y"}}
    (model / "config.json").write_text(json.dumps(config))
    out = early_exit(model, tmp_path / "exit")
    written = json.loads((out / "config.json").read_text())
    assert written["num_hidden_layers"] == 2
    assert not {"hopskip", "auto_map", "_name_or_path"} & written.keys()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 7
    assert generation["num_assistant_tokens_schedule"] == "constant"
    assert '"num_speculative_tokens": 7' in (out / "README.md").read_text()


def test_the_types_of_layers_are_cut_with_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "qwen3", tokenizer=True)
    out = early_exit(tmp_path / "model", tmp_path / "exit", exit_layer=2)
    assert json.loads((out / "config.json").read_text())["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"exit_layer \(--exit-layer\) is needed: the model recommends none; it must be between 1 and 2"),
        ({"exit_layer": 3}, r"exit_layer is 3; this model has 3 layers, so it must be between 1 and 2"),
        ({"exit_layer": 0}, r"exit_layer is 0; it must be between 1 and 2"),
        ({"exit_layer": 1, "dtype": "int8"}, r"dtype is 'int8'; choose one of auto, float32, bfloat16, float16"),
        ({"exit_layer": 1, "dtype": "q8"}, r"dtype is 'q8'; choose one of"),
        ({"exit_layer": 1, "format": "onnx"}, r"format is 'onnx'; choose one of folder, gguf"),
    ],
)
def test_wrong_options(model: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        early_exit(model, tmp_path / "exit", **options)
    assert not (tmp_path / "exit").exists()


def test_large_models_are_written_in_shards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(early_exit(model, tmp_path / "one", exit_layer=2) / "model.safetensors")
    monkeypatch.setattr(tensors, "_SHARD_BYTES", 100_000)
    monkeypatch.setattr(tensors, "_VALUES_AT_ONCE", 1000)  # many parts of each tensor
    shares: list[float | None] = []
    out = early_exit(model, tmp_path / "exit", exit_layer=2, progress=lambda what, share: shares.append(share))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 110_000 for file in files)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in whole.values())
    torch.testing.assert_close(logits_of(out), own_logits(model, 2), rtol=1e-4, atol=1e-4)
    assert shares == sorted(shares, key=lambda share: share or 0)
    assert shares[-1] == 1


# -- tokenizers --------------------------------------------------------------------------------------------------------


def sentencepiece_tables() -> dict[str, Any]:
    tokens = [token for token, _ in sorted(byte_fallback_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


@pytest.mark.parametrize("adds", [{}, {"add_eos_token": True}, {"add_bos_token": False, "add_space_prefix": False}])
def test_the_tokenizer_of_a_gguf_file_in_transformers(adds: dict[str, bool], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tables = sentencepiece_tables() | {f"tokenizer.ggml.{name}": value for name, value in adds.items()}
    size = len(tables["tokenizer.ggml.tokens"])
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha", vocab_size=size), metadata=tables)
    out = early_exit(tmp_path / "m.gguf", tmp_path / "exit", exit_layer=1)
    own = load_tokenizer(tmp_path / "m.gguf", open_checkpoint(tmp_path / "m.gguf").config)
    found = AutoTokenizer.from_pretrained(out)
    for text in (TEXT, "hello hello  he ll", "", " hello</s>hello"):
        assert found(text)["input_ids"] == own.encode(text), text
        assert found.decode(own.encode(text), skip_special_tokens=True) == own.decode(own.encode(text))
    assert found.bos_token == "<s>"
    assert found.eos_token == "</s>"
    chat = [{"role": "user", "content": "hello"}]
    assert found.apply_chat_template(chat, tokenize=False) == "hello"


def test_a_tokenizer_without_an_exact_form_is_refused(tmp_path: Path) -> None:
    """Pieces of one score: the library takes another one of two that overlap."""
    tables = sentencepiece_tables()
    tables["tokenizer.ggml.tokens"][-6:] = ["ui", "ic", "xa", "xb", "xc", "xd"]
    tables["tokenizer.ggml.scores"] = [0.0] * len(tables["tokenizer.ggml.tokens"])
    size = len(tables["tokenizer.ggml.tokens"])
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha", vocab_size=size), metadata=tables)
    with pytest.raises(CheckpointError, match=r"no exact form in the other format: .The quick.*becomes other ids"):
        early_exit(tmp_path / "m.gguf", tmp_path / "exit", exit_layer=1)


def test_files_beside_the_weights_are_copied(model: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "a.bin"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"of {name}")
    out = early_exit(model, tmp_path / "exit", exit_layer=1)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        *("LICENSE", "NOTICE.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "README.md"),
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    }
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text().endswith("tool_use.jinja")


# -- merged adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama2-mha", {}), ("smollm2", {"target_modules": ["lm_head", "q_proj"]}), ("qwen3", {"use_dora": True})],
)
def test_merged_is_what_our_engine_runs(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", family, tokenizer=True)
    write_adapter(tmp_path / "adapter", tmp_path / "base", **settings)
    out = merged(tmp_path / "adapter", tmp_path / "merged")
    adapter, found = open_checkpoint(tmp_path / "adapter"), open_checkpoint(out)
    assert found.config == adapter.config
    for name in adapter.names():
        assert np.array_equal(found.array(name), adapter.array(name)), name
    greedy = SamplingParams(max_new_tokens=16)
    texts = [
        LLM(path, dtype="float32").generate(["The quick"], greedy)[0].token_ids for path in (tmp_path / "adapter", out)
    ]
    assert texts[0] == texts[1]
    torch.testing.assert_close(logits_of(out), own_logits(tmp_path / "adapter", 3), rtol=1e-4, atol=1e-4)
    assert "`adapter` merged into its base `base`" in (out / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_adapters_own_tokenizer_comes_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "llama2-mha", tokenizer=True)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    write_tokenizer(tmp_path / "adapter", chat_template="own")
    out = merged(tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "own"


def test_a_folder_by_which_transformers_drafts(tmp_path: Path) -> None:
    """Of an ordinary checkpoint too; by itself where its makers recommend an exit layer."""
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    with pytest.raises(ConfigError, match="exit_layer is 3; this model has 3 layers, so it must be between 1 and 2"):
        merged(tmp_path / "model", tmp_path / "merged", exit_layer=3)
    out = merged(tmp_path / "model", tmp_path / "merged", exit_layer=2)
    source = (out / "custom_generate" / "generate.py").read_text()
    assert re.search("^EXIT_LAYER.* = 2$", source, flags=re.MULTILINE)
    assert "drafting with 2 layers" in (out / "README.md").read_text()
    assert "drafting with" not in (merged(out, tmp_path / "plain", dtype="bf16") / "README.md").read_text()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    recommended = {"exit_layer": 1, "num_draft_tokens": 6}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "hopskip": recommended}))
    source = (merged(tmp_path / "model", tmp_path / "own") / "custom_generate" / "generate.py").read_text()
    assert re.search("^EXIT_LAYER.* = 1$", source, flags=re.MULTILINE)
    assert re.search("^NUM_DRAFT_TOKENS.* = 6$", source, flags=re.MULTILINE)


def test_an_ordinary_checkpoint_needs_no_merging(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model is an ordinary checkpoint already: there is nothing to merge"):
        merged(model, tmp_path / "merged")
    assert open_checkpoint(merged(model, tmp_path / "merged", dtype="bf16")).dtype == "bfloat16"


def test_a_quantized_file_as_a_folder(tmp_path: Path) -> None:
    q4_0 = gguf_package.GGMLQuantizationType.Q4_0
    write_gguf(tmp_path / "m.Q4_0.gguf", make_model("llama2-mha"), types=q4_0, tokenizer=byte_level_tokenizer())
    out = merged(tmp_path / "m.Q4_0.gguf", tmp_path / "out", dtype="float32")
    found, source = open_checkpoint(out), open_checkpoint(tmp_path / "m.Q4_0.gguf")
    assert all(np.array_equal(found.array(name), source.array(name)) for name in source.names())
    assert found.names() == source.names()
    assert "The model `m`, which was stored as Q4_0: an ordinary checkpoint." in (out / "README.md").read_text()


# -- elsewhere ---------------------------------------------------------------------------------------------------------

WITHOUT_HOPSKIP = """
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hopskip":
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
draft = AutoModelForCausalLM.from_pretrained(sys.argv[2])
inputs = AutoTokenizer.from_pretrained(sys.argv[2])("The quick", return_tensors="pt")
for assistant in ({}, {"assistant_model": draft}):
    print(model.generate(**inputs, **assistant, do_sample=False, max_new_tokens=24, pad_token_id=2)[0].tolist())
"""


def test_it_drafts_in_transformers_where_hopskip_is_not_installed(model: Path, tmp_path: Path) -> None:
    out = early_exit(model, tmp_path / "exit", exit_layer=2)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_HOPSKIP, str(model), str(out)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    plain, drafted = found.stdout.splitlines()
    assert plain == drafted
    assert len(json.loads(plain)) > 10


# -- whole or not there ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_there_is_kept_unless_forced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    (out / "inner" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out is there already and not empty; give another folder, or .*--force"):
        early_exit(model, out, exit_layer=1)
    assert contents(out) == {"inner/mine.txt": b"mine"}
    early_exit(model, out, exit_layer=1, force=True)
    assert "inner/mine.txt" not in contents(out)
    assert "model.safetensors" in contents(out)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_an_empty_folder_and_a_missing_parent_are_fine(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert early_exit(model, out, exit_layer=1) == out
        assert (out / "README.md").exists()


@pytest.mark.parametrize("place", [".", "model", "model/.."])
def test_neither_the_model_nor_the_folder_one_is_in_is_replaced(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="so it cannot be replaced; give another folder"):
        early_exit(model, tmp_path / place, exit_layer=1, force=True)
    assert contents(tmp_path) == before


def test_a_file_in_its_place(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out' is a file; give a folder"):
        early_exit(model, tmp_path / "out", exit_layer=1, force=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_an_export_that_fails(
    error: BaseException, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    early_exit(model, out, exit_layer=1)
    before = contents(tmp_path)

    def fail(what: str, share: float | None) -> None:
        if share is not None and share > 0.5:
            raise error

    expected: Any = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ResourceError
    with pytest.raises(expected, match=r"^$|out cannot be written \(No space left on device\); make room"):
        early_exit(model, out, exit_layer=2, force=True, progress=fail)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_what_a_killed_export_left_is_removed_by_the_next(model: Path, tmp_path: Path) -> None:
    import platform

    ended = subprocess.Popen(["true"])
    ended.wait()
    node = platform.node() or "here"
    left = tmp_path / f".out.{node}-{ended.pid}-1.part"
    others = [tmp_path / f".out2.{node}-{ended.pid}-1.part", tmp_path / f".out.{node}-{os.getppid()}-1.part"]
    for folder in (left, *others):
        folder.mkdir()
        (folder / "half").write_text("half")
    early_exit(model, tmp_path / "out", exit_layer=1)
    assert not left.exists()
    assert all((folder / "half").exists() for folder in others)


def test_ctrl_c_on_the_command_line(model: Path, tmp_path: Path) -> None:
    program = """
import sys, time
from hopskip.cli import main
from hopskip.export import tensors
add = tensors.Told.add
def slow(*arguments):
    add(*arguments)
    print("writing", flush=True)
    time.sleep(20)
tensors.Told.add = slow
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "export", "gguf", str(tmp_path / "out"), "-m", str(model)],
        stdout=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- the command line and the card -------------------------------------------------------------------------------------


def test_the_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("early-exit", out, "-m", model, "--exit-layer", "1", "--dtype", "bf16", "--base", "org/tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    text = (out / "README.md").read_text()
    vllm = """--speculative-config '{"method": "draft_model", "model": "./out", "num_speculative_tokens": 4}'"""
    for wanted in (
        "base_model: org/tiny",
        "# tiny: its first 1 layers, as a draft model",
        "The first 1 of 3 layers",
        "Base: `org/tiny`\n",
        "stored as float32",
        open_checkpoint(model).fingerprint[:16],
        f"$ vllm serve org/tiny {vllm}",
        "--speculative-algorithm STANDALONE --speculative-draft-model-path ./out --speculative-num-steps 4",
        "--speculative-num-draft-tokens 5",
        "assistant_model=draft",
        "`hopskip bench -m org/tiny --setting draft=early-exit,exit_layer=1`",
    ):
        assert wanted in text, wanted
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("early-exit", "OUT", "-m", "MODEL", "--exit-layer", "9"), "--exit-layer is 9; this model has 3 layers"),
        (("early-exit", "OUT", "-m", "MODEL", "--exit-layer", "1", "--format", "x"), "--format is 'x'"),
        (("early-exit", "OUT", "-m", "MODEL", "--exit-layer", "1", "--dtype", "q8"), "--dtype is 'q8'"),
        (("gguf", "OUT", "-m", "MODEL", "--dtype", "q3"), "--dtype is 'q3'; choose one of auto, float32"),
        (("eagle3", "OUT", "-m", "MODEL"), "exit_branch (--exit-branch) is needed"),
        (("eagle3", "OUT", "-m", "MODEL", "--exit-branch", "nowhere"), "nowhere is not an exit"),
        (("merged", "OUT", "-m", "MODEL"), "is an ordinary checkpoint already"),
        (("gguf", "MODEL", "-m", "MODEL"), "is there already"),
        (("gguf", "OUT", "-m", "absent"), "'absent' does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], named: str, model: Path, tmp_path: Path) -> None:
    places = {"OUT": str(tmp_path / "out"), "MODEL": str(model)}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("hopskip: error: ")
    assert named in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "hub_id", "revision", "name"),
    [
        ("models--org--m-7B/snapshots/0123abcd", "org/m-7B", "0123abcd", "m-7B"),
        ("my-model", None, None, "my-model"),
    ],
)
def test_where_a_model_is_from(path: str, hub_id: str | None, revision: str | None, name: str, tmp_path: Path) -> None:
    from hopskip.export.source import open_source

    write_checkpoint(tmp_path / path, "llama2-mha")
    source = open_source(tmp_path / path)
    assert (source.hub_id, source.revision, source.name) == (hub_id, revision, name)
    assert source.base == (hub_id or str(tmp_path / path))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("a/m-Q8_0.gguf", "m"),
        ("m.Q4_1.gguf", "m"),
        ("m-Q8_0-00001-of-00002.gguf", "m"),
        ("Q8_0.gguf", "Q8_0"),
        ("o/m", "m"),
    ],
)
def test_names(base: str, name: str, model: Path) -> None:
    from hopskip.export.source import open_source

    assert open_source(model, base).name == name


def test_a_place_in_the_home_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert early_exit(model, "~/out", exit_layer=1) == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").exists()
