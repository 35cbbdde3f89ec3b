"""A checkpoint and its tokenizer, loaded by transformers: for comparisons with it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from hopskip.errors import CheckpointError


def load_in_transformers(path: Path, dtype: torch.dtype) -> Any:
    """The checkpoint as a transformers model on the CPU; a GGUF file is dequantized by transformers itself.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    _quieten()
    try:
        with redirect_stderr(io.StringIO()):  # where progress bars go that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(*_place(path)[0], dtype=dtype, **_place(path)[1])
    except Exception as error:  # of many kinds, by file format and architecture
        raise CheckpointError(f"transformers cannot load {path} ({_first_line(error)})") from error
    return model.eval()


def load_tokenizer_in_transformers(path: Path) -> Any:
    """The checkpoint's tokenizer as transformers has it.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    _quieten()
    try:
        return AutoTokenizer.from_pretrained(*_place(path)[0], **_place(path)[1])
    except Exception as error:
        raise CheckpointError(f"transformers cannot load the tokenizer of {path} ({_first_line(error)})") from error


def encode_in_transformers(tokenizer: Any, content: str | Seq[Mapping[str, str]]) -> list[int]:
    """Token ids of a text or a chat as a user of transformers would make them: through the chat template where there is
    one."""
    if isinstance(content, str) and not tokenizer.chat_template:
        return list(tokenizer(content)["input_ids"])
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _place(path: Path) -> tuple[tuple[str], dict[str, Any]]:
    """How `from_pretrained` is told where a checkpoint is: a folder, or a GGUF file in one."""
    if path.is_dir():
        return (str(path),), {"local_files_only": True}
    return (str(path.parent),), {"gguf_file": path.name, "local_files_only": True}


def _quieten() -> None:
    """Its warnings would stand between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
