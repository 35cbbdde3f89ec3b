"""What cannot run is said in one line, with the next step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from hopskip.checkpoint import kinds
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.families import nearest, purpose
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.kinds import did_you_mean
from hopskip.errors import CheckpointError
from hopskip.text.tokenizer_files import load_tokenizer
from tests.tiny import make_model, write_checkpoint, write_gguf

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize(
    ("model_type", "family", "example"),
    [
        ("phi3", "llama", "meta-llama/Llama-3.2-1B-Instruct"),
        ("gemma3_text", "qwen3", "Qwen/Qwen3-4B"),
        ("mixtral", "mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("ministral3", "mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("qwen3_moe", "qwen3", "Qwen/Qwen3-4B"),
        ("qwen3_5", "qwen3", "Qwen/Qwen3-4B"),
        ("qwen2_5_vl", "qwen2", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("smollm3", "llama", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        ("olmo2", "llama", "meta-llama/Llama-3.2-1B-Instruct"),
        ("gpt_oss", "qwen3", "Qwen/Qwen3-4B"),
        ("gpt-oss", "qwen3", "Qwen/Qwen3-4B"),  # as GGUF files spell it
        ("deepseek2", "qwen3", "Qwen/Qwen3-4B"),
        ("llama4", "llama", "meta-llama/Llama-3.2-1B-Instruct"),
        ("starcoder2", "qwen2", "Qwen/Qwen2.5-Coder-7B-Instruct"),
    ],
)
def test_the_nearest_family(model_type: str, family: str, example: str) -> None:
    assert nearest(model_type) == f"; nearest to it is {family}, such as {example}"
    with pytest.raises(
        CheckpointError, match=f"model_type '{model_type}' is not supported; .*nearest to it is {family}"
    ):
        ModelConfig.from_hf({"model_type": model_type})


def test_a_family_that_nobody_knows() -> None:
    for unknown in ("newcomer", None, ["llama"], "xphi"):
        assert "a family that runs, such as Qwen/Qwen3-4B" in nearest(unknown)


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        *(
            (name, "an encoder")
            for name in ("bert", "modernbert", "xlm-roberta", "nomic-bert-moe", "jina-bert-v2", "mpnet")
        ),
        *((name, "an encoder-decoder") for name in ("t5", "mt5", "t5encoder", "bart", "mbart", "marian")),
        *((name, "a vision model") for name in ("vit", "clip", "siglip2", "dinov2", "sam2")),
        *((name, "a model of sound") for name in ("whisper", "wav2vec2", "speecht5")),
        *((name, "a model of images") for name in ("flux", "stable-diffusion", "sd3")),
    ],
)
def test_models_for_other_purposes(model_type: str, what: str) -> None:
    found = purpose(model_type)
    assert found is not None
    assert found.startswith(what)
    with pytest.raises(
        CheckpointError, match=rf"'{model_type}' is {what}.*which hopskip does not run; use a language model"
    ):
        ModelConfig.from_hf({"model_type": model_type})


def test_language_models_have_no_other_purpose() -> None:
    names = ("llama", "qwen2", "gemma3", "phi3", "gpt2", "opt", "mamba", "falcon_h1", "sdar", "starcoder2", "lfm2")
    assert not [name for name in names if purpose(name)]


def test_gguf_files_of_other_purposes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha"), metadata={"general.architecture": "nomic-bert"})
    with pytest.raises(
        CheckpointError, match=r"m\.gguf: architecture 'nomic-bert' is an encoder .*; use a language model"
    ):
        open_checkpoint(tmp_path / "m.gguf")


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_folders_around_a_model(tmp_path: Path) -> None:
    outer = make(tmp_path / "outer", "b/config.json", "a/config.json", "a/model.safetensors", "README.md")
    with pytest.raises(CheckpointError, match=rf"holds a model in a folder of its own; give that: {outer}/a$"):
        open_checkpoint(outer)
    cached = make(tmp_path / "models--org--name", "snapshots/0a1b2c/config.json", "refs/main")
    with pytest.raises(CheckpointError, match=r"is a folder of the Hub's cache; give the model's id, org/name$"):
        open_checkpoint(cached)
    own = make(tmp_path / "models--org--mine", "config.json", "snapshots/x/config.json")
    with pytest.raises(CheckpointError, match=r"model_type None"):
        open_checkpoint(own)


def test_names_that_are_mistyped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "models/Llama-1B/config.json", "models/qwen.gguf", "notes.txt")
    assert did_you_mean(tmp_path / "models" / "llama-1b") == f"; did you mean {tmp_path}/models/Llama-1B?"
    assert did_you_mean(tmp_path / "modles" / "Llama-1B") == f"; did you mean {tmp_path}/models?"
    assert did_you_mean(tmp_path / "models" / "qwen.guff") == f"; did you mean {tmp_path}/models/qwen.gguf?"
    assert did_you_mean(tmp_path / "models" / "something-else") == ""
    assert did_you_mean(Path("/")) == ""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"'\./modles/x' does not exist; .*; did you mean models\?$"):
        find_model("./modles/x")
    with pytest.raises(CheckpointError, match=r"'notes\.text' does not exist; .*; did you mean notes\.txt\?$"):
        find_model("notes.text")


def test_a_mistyped_path_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is asked, and then the folder that is there is named; not so where there is no such folder."""

    def offline(*_: Any, **__: Any) -> None:
        raise errors.OfflineModeIsEnabled("offline")

    make(tmp_path, "models/llama/config.json", "org-x/readme")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE.*; did you mean models/llama\?$"):
        find_model("models/lama")
    with pytest.raises(CheckpointError, match=r"a local folder or file$"):
        find_model("org/lama")


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whom it may not: root may read everything, so the system's answer is played."""
    make(tmp_path, "config.json")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); check its permissions"):
            find_model(str(tmp_path / "config.json"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); check its permissions"):
            kinds.names_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Permission denied\); check its perm"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ],
)
def test_pointers_of_git_lfs(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama2-mha", tokenizer=True)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer, .*run `git lfs pull` in its folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("files", [(), ("vocab.json",), ("vocab.txt", "merges.txt")])
def test_a_missing_tokenizer(files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked that could take long or leak its own words."""
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    write_checkpoint(tmp_path, "llama2-mha")
    make(tmp_path, *files)
    with pytest.raises(
        CheckpointError, match=r"put the model's tokenizer\.json .*hf download ID tokenizer\.json"
    ) as raised:
        load_tokenizer(tmp_path, open_checkpoint(tmp_path).config)
    assert "\n" not in str(raised.value)
