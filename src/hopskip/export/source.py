"""What is exported: an opened model, what it is called, and where its tokenizer's files lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.gguf_names import own_tag, part_of
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.hub_cache import DEFAULT_MODEL, find_base
from hopskip.checkpoint.hub_names import HubName, parse_hub_name
from hopskip.checkpoint.lora import is_adapter, read_adapter
from hopskip.checkpoint.safetensors import read_json
from hopskip.errors import CheckpointError
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer

_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/(?P<revision>[0-9a-f]{7,40})")


@dataclass(frozen=True)
class Source:
    """A model to export."""

    checkpoint: Checkpoint
    base: str
    """What others are to call it: a Hub id, or the path that was given."""
    revision: str | None
    """Of the Hub's repository, where it is from there."""

    @property
    def name(self) -> str:
        """For titles and file names: without owner, folder and quantization."""
        last = Path(self.base).name
        if not last.lower().endswith(".gguf"):
            return last or Path(self.base).resolve().name
        part, tag = part_of(last), own_tag(last)
        stem = part.prefix if part else last[: -len(".gguf")]
        return stem[: -len(tag) - 1] if tag and len(stem) > len(tag) + 1 else stem

    @property
    def hub_id(self) -> str | None:
        """`OWNER/NAME`; None for what is known by a path."""
        return self.base if self.revision or self.base == DEFAULT_MODEL or _hub_name(self.base) else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        checkpoint = self.checkpoint
        return load_tokenizer(checkpoint.path, checkpoint.config, checkpoint.metadata)

    @property
    def model_folder(self) -> Path | None:
        """The folder with the model's config: of an adapter its base's; None for a GGUF file."""
        path = self.checkpoint.path
        if not path.is_dir():
            return None
        return find_base(read_adapter(path).base_name, path) if is_adapter(path) else path

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder with the tokenizer's files; None for a GGUF file."""
        path = self.checkpoint.path
        has_own = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
        return path if path.is_dir() and has_own else self.model_folder

    @property
    def stored_as(self) -> str:
        """How its weights are stored, for people."""
        return self.checkpoint.quantization or self.checkpoint.dtype


def open_source(model: str | Path | None, base: str | None = None) -> Source:
    """Find and open a model.

    Args:
        model: as for `find_model`.
        base: what to call it, in place of its Hub id or path.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    path = find_model(model)
    checkpoint = open_checkpoint(path)
    match = _SNAPSHOT.search(path.absolute().as_posix())
    found = f"{match['owner']}/{match['name']}" if match else DEFAULT_MODEL if model is None else str(model)
    return Source(checkpoint, base or found, match["revision"] if match else None)


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder; empty if there is none."""
    return read_json(folder / name, "") if (folder / name).exists() else {}


def _hub_name(name: str) -> HubName | None:
    try:
        found = None if Path(name).exists() else parse_hub_name(name)
    except CheckpointError:
        return None
    return found if found is not None and found.repo_id == name else None
