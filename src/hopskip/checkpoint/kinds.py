"""What a file or folder is, when it is nothing that hopskip reads: one line that says so, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from hopskip.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"

_HEADS = (
    (_POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"),
    (b"PK\x03\x04", "holds pickled weights, which can run code when read; use a safetensors or GGUF version"),
    (b"\x80\x02", "holds pickled weights, which can run code when read; use a safetensors or GGUF version"),
    (b"<!", "is a web page, not a model; download the file itself (on the Hub: its address with /resolve/)"),
    (b"<html", "is a web page, not a model; download the file itself (on the Hub: its address with /resolve/)"),
    (b"FUGG", "is a big-endian GGUF file; use the little-endian one"),
    (b"tjgg", "is of the old GGML format; use a GGUF version of the model"),
    (b"lmgg", "is of the old GGML format; use a GGUF version of the model"),
    (b"algg", "is of the old GGML format; use a GGUF version of the model"),
    (b"fmgg", "is of the old GGML format; use a GGUF version of the model"),
)

_FOLDERS = (
    ("model_index.json", "is a diffusers pipeline, which makes no text; use a language model"),
    ("modules.json", "is an embedding model of sentence-transformers, which makes no text; use a language model"),
    ("adapter_config.json", "is an adapter without adapter_model.safetensors; merge it into its base model with peft "
     "(merge_and_unload), and give the folder that this writes"),
)  # fmt: skip
_WEIGHTS_OF_OTHERS = (
    (("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt"), "has only pickled weights, which can run code when read, so "
     "hopskip never opens them; use a safetensors version, or convert once with transformers: "
     "from_pretrained(...).save_pretrained(...)"),
    (("consolidated*.safetensors", "params.json"), "has its maker's own layout only; use the version for transformers "
     "(config.json beside model.safetensors)"),
    (("*.npz", "weights.*.safetensors"), "has weights for MLX only; use the original model or a GGUF version"),
    (("*.onnx", "*.onnx_data", "onnx/*"), "has weights for ONNX only; use the original model or a GGUF version"),
    (("openvino_model*.xml",), "has weights for OpenVINO only; use the original model or a GGUF version"),
    (("tf_model*.h5", "*.msgpack"), "has weights for TensorFlow or Flax only; use another version of the model"),
    (("*.distcp", "*/mp_rank_*", "zero_to_fp32.py"), "is a training checkpoint in shards; gather it into safetensors "
     "with the program that wrote it"),
    (("*.nemo", "*.engine", "*.mlpackage/*", "*.tflite", "*.task", "*.llamafile"),
     "has weights for another program only; use the original model or a GGUF version"),
)  # fmt: skip


def names_in(folder: Path) -> list[str]:
    """The files of a folder and of the folders in it, as paths within it.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}); check its permissions") from None
    return [file.relative_to(folder).as_posix() for depth in ("*", "*/*") for file in folder.glob(depth)]


def misplaced(folder: Path, names: Iterable[str]) -> str | None:
    """Where the model is, as the rest of a sentence, if a folder is one around it or has nothing in it; else None.

    Args:
        names: see `names_in`.
    """
    names = set(names)
    if not names:
        return "is empty; check the path, or run its download again"
    if "config.json" in names:
        return None
    if folder.name.startswith("models--") and "snapshots" in names:
        return f"is a folder of the Hub's cache; give the model's id, {'/'.join(folder.name.split('--')[1:])}"
    inner = sorted(name for name in names if name.endswith("/config.json"))
    if inner:
        example = folder / inner[0].rpartition("/")[0]
        return f"holds a model in a folder of its own; give that: {example}"
    return None


def did_you_mean(path: Path) -> str:
    """`; did you mean models/llama?`: the nearest name there is to a path that does not exist; nothing if none is near.

    Looked for where the path leaves what exists: of `modles/llama` that is `modles`.
    """
    missing = path
    while not missing.parent.is_dir() and missing != missing.parent:
        missing = missing.parent
    try:
        there = {file.name.lower(): file for file in sorted(missing.parent.iterdir())}
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name.lower(), list(there), n=1)
    return f"; did you mean {there[close[0]]}?" if close else ""


def starts_as_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its first letters; its name does not matter (Ollama's blobs have none)."""
    return _head(path)[:4] == b"GGUF"


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError if a file is what Git LFS leaves in place of one that was not fetched."""
    if path.is_file() and _head(path).startswith(_POINTER):
        raise CheckpointError(f"{path} {_HEADS[0][1]}")


def refuse_file(path: Path) -> None:
    """Raises CheckpointError: what a file is that is no GGUF file."""
    head = _head(path)
    for start, what in _HEADS:
        if head.startswith(start):
            raise CheckpointError(f"{path} {what}")
    if head[8:9] == b"{" or path.suffix.lower() in (".safetensors", ".json"):
        raise CheckpointError(f"{path} is one file of a checkpoint; give its folder, {path.parent}")
    raise CheckpointError(f"{path} is neither a folder with safetensors files nor a GGUF file; hopskip reads those")


def obstacle(names: Iterable[str], *, has_weights: bool) -> str | None:
    """Why a folder with these files cannot run, as the rest of a sentence; None if nothing speaks against it.

    Args:
        has_weights: it has safetensors files where a checkpoint has them.
    """
    names = set(names)
    for name, what in _FOLDERS:
        if name in names and not (name == "adapter_config.json" and has_weights):
            return what
    if has_weights:
        return None
    for patterns, what in _WEIGHTS_OF_OTHERS:
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            return what
    return None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
