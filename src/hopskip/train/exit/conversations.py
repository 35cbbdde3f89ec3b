"""Collected training text of an exit: conversations with the hidden states behind them, in shards on disk.

Shape letters: T tokens, A taps (layers whose output is kept), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from hopskip.errors import ConfigError


@dataclass(frozen=True)
class Conversation:
    """One prompt and the model's greedy answer."""

    ids_T: Tensor
    """int64, the prompt first. The last token has no states: it was not fed back, and is only a target."""
    num_prompt_tokens: int
    states_TAD: Tensor
    """bfloat16, outputs of the tapped layers at all tokens but the last."""


def read_conversations(folder: Path) -> tuple[dict[str, str], list[Conversation]]:
    """All that has been collected so far, memory-mapped, and how: `fingerprint` and `taps` (JSON).

    Raises:
        ConfigError: there is none.
    """
    conversations: list[Conversation] = []
    metadata: dict[str, str] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            ids, counts, prompts, states = (file.get_tensor(name) for name in ("ids", "counts", "prompts", "states"))
        start = 0
        for count, num_prompt_tokens in zip(counts.tolist(), prompts.tolist(), strict=True):
            own = slice(start, start + count)
            conversations.append(Conversation(ids[own].long(), num_prompt_tokens, states[own][: count - 1]))
            start += count
    if not conversations:
        raise ConfigError(f"{folder} holds no collected text; collect some first")
    return metadata, conversations


def shard_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata
