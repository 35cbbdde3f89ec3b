"""The model's hidden states behind text that is given: passes over whole conversations, many tokens at once.

Shape letters: N rows, A taps (layers whose output is kept), D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Cache, Rows, Segment
from hopskip.train.exit.conversations import Conversation

_MOST_SLOTS = 32
"""Conversations that share passes."""


class TeacherForced:
    """Makes the states of conversations, as decoding them would.

    Args:
        taps: layers whose outputs are wanted, rising.
    """

    def __init__(self, backend: Backend, taps: Seq[int]) -> None:
        self._backend, self._taps = backend, tuple(taps)
        self._cache: Cache | None = None

    def __call__(self, conversations: Seq[Conversation]) -> list[Conversation]:
        """The same conversations with states, in bfloat16 on the CPU."""
        found: list[Conversation] = []
        for group in self._groups(conversations):
            found += self._of_group(group)
        return found

    def _groups(self, conversations: Seq[Conversation]) -> Iterator[list[Conversation]]:
        """As many as fill a few passes: what is left over in the last one of a group is lost."""
        group: list[Conversation] = []
        size = 0
        for conversation in conversations:
            group.append(conversation)
            size += len(conversation.ids_T) - 1
            if len(group) == _MOST_SLOTS or size >= 16 * self._backend.num_prefill_rows:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _of_group(self, group: Seq[Conversation]) -> list[Conversation]:
        cache = self._cache_of(max(len(c.ids_T) for c in group))
        ids = [token for c in group for token in c.ids_T[:-1].tolist()]
        parts: list[Tensor] = []
        start = 0
        with self._backend.stepping():
            for segments in self._passes(group):
                rows = Rows(segments)
                features_NAD = self._backend.forward(ids[start : start + len(rows)], rows, cache, self._taps)[1]
                parts.append(_on_cpu(features_NAD))
                start += len(rows)
        states = torch.split(torch.cat(parts), [len(c.ids_T) - 1 for c in group])
        return [replace(c, states_TAD=own) for c, own in zip(group, states, strict=True)]

    def _passes(self, group: Seq[Conversation]) -> Iterator[list[Segment]]:
        """All tokens but the last of each, one conversation after the other, cut where a pass is full."""
        segments: list[Segment] = []
        room = self._backend.num_prefill_rows
        for slot, conversation in enumerate(group):
            start, stop = 0, len(conversation.ids_T) - 1
            while start < stop:
                count = min(room, stop - start)
                segments.append(Segment(slot, start, count))
                start, room = start + count, room - count
                if not room:
                    yield segments
                    segments, room = [], self._backend.num_prefill_rows
        if segments:
            yield segments

    def _cache_of(self, length: int) -> Cache:
        if self._cache is None or self._cache.length < length:
            self._cache = self._backend.new_cache(_MOST_SLOTS, length)
        return self._cache


def _on_cpu(features_NAD: Array | None) -> Tensor:
    assert features_NAD is not None
    return torch.as_tensor(features_NAD).to("cpu", torch.bfloat16)
