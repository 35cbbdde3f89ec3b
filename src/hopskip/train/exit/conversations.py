"""Training text of an exit: conversations, with the hidden states behind them where they are stored, in shards on disk.

Shape letters: T tokens, A taps (layers whose output is kept), D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hopskip.errors import ConfigError
from hopskip.train.checkpoint import replacing_file


@dataclass(frozen=True)
class Conversation:
    """A prompt and its answer, or several in turn."""

    ids_T: Tensor
    """int64. The last token has no states: it was not fed back, and is only a target."""
    is_answer_T: Tensor
    """bool: the tokens of the answers, which the exit learns to draft. The first token is none."""
    states_TAD: Tensor | None = None
    """bfloat16, outputs of the tapped layers at all tokens but the last; None where they are not stored."""

    @classmethod
    def of(cls, prompt: Seq[int], answer: Seq[int], states_TAD: Tensor | None = None) -> Conversation:
        """One prompt and its answer, as token ids."""
        ids_T = torch.tensor([*prompt, *answer])
        return cls(ids_T, torch.arange(len(ids_T)) >= len(prompt), states_TAD)

    @property
    def num_answer_tokens(self) -> int:
        return int(self.is_answer_T.sum())

    @property
    def predicted_P(self) -> Tensor:
        """Positions at which the next token is one of an answer, rising: int64 [P]."""
        return self.is_answer_T[1:].nonzero()[:, 0]

    @property
    def prompt(self) -> list[int]:
        """What comes before the last answer."""
        is_prompt = (~self.is_answer_T).nonzero()[:, 0]
        ids: list[int] = self.ids_T[: int(is_prompt[-1]) + 1].tolist()
        return ids

    def goes_on_in(self, later: Conversation) -> bool:
        """Whether another one begins with all of this one's tokens."""
        size = len(self.ids_T)
        return len(later.ids_T) > size and torch.equal(later.ids_T[:size], self.ids_T)


def joined(turns: Seq[Conversation]) -> list[Conversation]:
    """Turns of one chat, each with its history, as few conversations as possible: a turn whose tokens the next begins
    with becomes a part of it. (A template may write earlier turns otherwise once later ones follow.)"""
    found: list[Conversation] = []
    for turn in turns:
        if found and found[-1].goes_on_in(turn):
            before = found.pop()
            is_answer_T = turn.is_answer_T.clone()
            is_answer_T[: len(before.ids_T)] |= before.is_answer_T
            turn = Conversation(turn.ids_T, is_answer_T, turn.states_TAD)
        found.append(turn)
    return found


def write_shard(path: Path, conversations: Seq[Conversation], metadata: dict[str, str]) -> None:
    """One shard, whole or not at all. Each conversation's states are padded by one row to the length of its ids.

    Raises:
        TrainingError: it cannot be written (a full disk, say).
    """
    tensors = {
        "ids": torch.cat([torch.empty(0, dtype=torch.int64), *(c.ids_T for c in conversations)]).int(),
        "counts": torch.tensor([len(c.ids_T) for c in conversations], dtype=torch.int64),
        "is_answer": torch.cat([torch.empty(0, dtype=torch.bool), *(c.is_answer_T for c in conversations)]),
    }
    states = [c.states_TAD for c in conversations if c.states_TAD is not None]
    if states:
        tensors["states"] = torch.cat([part for own in states for part in (own, torch.zeros_like(own[:1]))])
    with replacing_file(path) as partial:
        save_file(tensors, partial, metadata)


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
            ids, counts, is_answer = (file.get_tensor(name) for name in ("ids", "counts", "is_answer"))
            states = file.get_tensor("states") if "states" in file.keys() else None  # noqa: SIM118 (no mapping)
        start = 0
        for count in counts.tolist():
            own = slice(start, start + count)
            own_states = None if states is None else states[own][: count - 1]
            conversations.append(Conversation(ids[own].long(), is_answer[own], own_states))
            start += count
    if not conversations:
        raise ConfigError(f"{folder} holds no collected text; collect some first")
    return metadata, conversations


def shard_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata
