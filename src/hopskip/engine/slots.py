"""The slots of the cache: who has which, what idle ones still hold, and what a newcomer may start from."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from hopskip.backends.base import Backend
from hopskip.backends.rows import Cache
from hopskip.errors import ConfigError
from hopskip.sequence import Sequence

_CACHE_BLOCK = 256
"""The cache grows in steps of this many positions, so that it is not reallocated for every longer prompt."""
_WORTH_WAITING = 16
"""Tokens of a prompt that another is about to compute, for which it is worth waiting."""


@dataclass(kw_only=True)
class PrefixStats:
    """What sharing beginnings has done since the engine was made."""

    num_copies: int = 0
    """Beginnings copied from one slot to another."""
    num_copied_tokens: int = 0
    num_evictions: int = 0
    """Slots that lost more than a little of what an ended request had left in them."""


class _Held(NamedTuple):
    """What a free slot holds: tokens whose keys and values are there."""

    token_ids: list[int]
    salt: str | None


class _Found(NamedTuple):
    """A slot that begins as a prompt does, for so many tokens."""

    slot: int
    length: int


class _Leader(NamedTuple):
    """A sequence whose prompt another waits for, up to this length."""

    sequence: Sequence
    length: int


class Slots:
    """One slot for each running sequence. The cache is made when the first one comes, and grows with them.

    Args:
        num_spare: positions beyond a sequence's last that passes may write to.
        shares_prefixes: start a prompt from cached keys and values of another that shares its beginning, and has the
            same `Request.cache_salt`. Prompts that come together are computed once: the others wait for the first.
        needs_features: a drafter wants to see hidden states of every token, which the cache does not hold.
        on_copy: told of source, target and length when a beginning is copied.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        num_spare: int,
        shares_prefixes: bool,
        needs_features: bool,
        on_copy: Callable[[int, int, int], None] = lambda source, target, length: None,
    ) -> None:
        self._backend = backend
        self._num_spare = num_spare
        self._shares_prefixes = shares_prefixes
        self._needs_features = needs_features
        self._cache: Cache | None = None
        self._on_copy = on_copy
        self._held: dict[int, _Held] = {}
        """By free slot, the one used longest ago first."""
        self._leaders: dict[Sequence, _Leader] = {}
        """Of those that wait."""
        self.stats = PrefixStats()

    @property
    def cache(self) -> Cache:
        assert self._cache is not None, "the cache is made when the first request is admitted"
        return self._cache

    def usage(self, running: Seq[Sequence]) -> float:
        """Share of the cache's positions that these sequences hold."""
        if self._cache is None:
            return 0.0
        return sum(s.num_cached for s in running) / (self._cache.num_slots * self._cache.length)

    def reserve(self, kv_memory: int, num_slots: int, num_positions: int, *, shrink: bool) -> int:
        """Make the whole cache now, so that it never grows.

        Args:
            kv_memory: bytes that it may take.
            num_positions: of a sequence at its longest.
            shrink: settle for fewer, down to 2, instead of refusing.

        Returns:
            The longest sequence that there is room for.

        Raises:
            ConfigError: it does not fit; the message names the numbers.
        """
        per_position = self._backend.new_cache(1, 1).bytes_per_position
        available = kv_memory // (per_position * num_slots) // _CACHE_BLOCK * _CACHE_BLOCK - self._num_spare
        if shrink and 2 <= available < num_positions:
            num_positions = available
        length = self._length_for(num_positions)
        needed = per_position * num_slots * length
        if needed > kv_memory:
            raise ConfigError(
                f"the key/value cache needs {needed / 2**20:.0f} MiB: {num_slots} sequences x {length} positions x "
                f"{per_position} bytes; it may take {kv_memory / 2**20:.0f} MiB (kv-memory); lower max-model-len or "
                "max-num-seqs, or raise kv-memory"
            )
        self._cache = self._backend.new_cache(num_slots, length)
        self._held.clear()
        return num_positions

    def make_room(self, sequences: Seq[Sequence]) -> None:
        """Make the cache large enough for these sequences at their longest, keeping what it holds."""
        length = self._length_for(max(s.num_prompt_tokens + s.params.max_new_tokens for s in sequences))
        old = self._cache
        if old is not None and old.num_slots >= len(sequences) and old.length >= length:
            return
        num_slots = max(len(sequences), old.num_slots if old else 0)
        self._cache = self._backend.new_cache(num_slots, max(length, old.length if old else 0))
        if old is not None:
            self._cache.copy_from(old)

    def take(self, sequence: Sequence, running: Seq[Sequence]) -> None:
        """Give a sequence a free slot, and what of its prompt any slot has, running or idle.

        It goes on in place where an idle slot holds (nearly) nothing but its beginning. Otherwise the beginning is
        copied: into an empty slot, else into the one that was used longest ago, so that what strangers have in common
        (a system prompt) costs none of them a conversation.
        """
        taken = {s.slot for s in running}
        free = [slot for slot in range(self.cache.num_slots) if slot not in taken]
        empty = [slot for slot in free if slot not in self._held]
        found = self._longest(sequence, running)
        if found is not None and found.slot in self._held:
            self._held[found.slot] = self._held.pop(found.slot)  # it is of use, so others go first
        if found is not None and found.slot in self._held and self._is_nearly_all(found):
            sequence.slot = found.slot
        else:
            sequence.slot = empty[0] if empty else next(iter(self._held))
        if found is not None:
            self._share(found, sequence)
        held = self._held.pop(sequence.slot, None)
        if held is not None and len(held.token_ids) - sequence.num_cached > _few(held):
            self.stats.num_evictions += 1
        self._await_leader(sequence, running)

    def share_news(self, running: Seq[Sequence]) -> None:
        """Copy to those that wait for another's prompt what it has computed by now."""
        for sequence, leader in list(self._leaders.items()):
            if sequence not in running:
                del self._leaders[sequence]
            elif leader.sequence.num_cached >= leader.length or leader.sequence not in running:
                del self._leaders[sequence]
                found = self._longest(sequence, running)
                if found is not None and self._start(found) > sequence.num_cached:
                    self._share(found, sequence)
                self._await_leader(sequence, running)  # if the other has left early

    def next_stop(self, sequence: Sequence) -> int:
        """Where the prompt's next part ends: at its own end, or before it where others wait for so much of it."""
        stops = [leader.length for leader in self._leaders.values() if leader.sequence is sequence]
        return min([sequence.num_prompt_tokens, *(stop for stop in stops if stop > sequence.num_cached)])

    def waits(self, sequence: Sequence) -> bool:
        """True while another computes what this one's prompt begins with."""
        return sequence in self._leaders

    def give_back(self, sequence: Sequence) -> None:
        """The slot is free, and keeps what it holds until somebody takes it; but not after an error, which may come of
        just that."""
        self._leaders.pop(sequence, None)
        if sequence.error is None and sequence.num_cached:
            self._held[sequence.slot] = _Held(sequence.token_ids[: sequence.num_cached], sequence.request.cache_salt)

    def _longest(self, sequence: Sequence, running: Seq[Sequence]) -> _Found | None:
        """The slot that shares most with a sequence's prompt; of equals a running one, else the one last used."""
        if not self._may_share(sequence):
            return None
        # the last prompt token always runs: its hidden state yields the first new token
        prompt, salt = sequence.token_ids[: sequence.num_prompt_tokens - 1], sequence.request.cache_salt
        candidates = [
            (s.slot, s.token_ids[: s.num_cached]) for s in running if s is not sequence and s.request.cache_salt == salt
        ]
        idle = reversed(self._held.items())
        candidates += [(slot, held.token_ids) for slot, held in idle if held.salt == salt]
        found = [_Found(slot, common_prefix(held, prompt)) for slot, held in candidates]
        best = max(found, key=lambda found: found.length, default=None)
        return best if best is not None and self._start(best) > 0 else None

    def _may_share(self, sequence: Sequence) -> bool:
        """Positions that are not computed have no scores."""
        return self._shares_prefixes and sequence.params.prompt_logprobs is None

    def _share(self, found: _Found, sequence: Sequence) -> None:
        """Start a sequence from what a slot has, its own or another."""
        if found.slot != sequence.slot:
            self.cache.copy_prefix(found.slot, sequence.slot, found.length)
            self._on_copy(found.slot, sequence.slot, found.length)
            self.stats.num_copies += 1
            self.stats.num_copied_tokens += found.length
        sequence.num_cached = self._start(found)
        sequence.stats.num_cached_prompt_tokens = sequence.num_cached

    def _start(self, found: _Found) -> int:
        """Where a sequence goes on that shares so much. A drafter that needs features needs those of the last shared
        token, too, which are kept nowhere."""
        return found.length - 1 if self._needs_features else found.length

    def _is_nearly_all(self, found: _Found) -> bool:
        held = self._held[found.slot]
        return len(held.token_ids) - found.length <= _few(held)

    def _await_leader(self, sequence: Sequence, running: Seq[Sequence]) -> None:
        """If another's prompt, not read to its end, has more in common with this one than there is in the cache, wait
        for it. It came before, so that no two wait for each other."""
        if not self._may_share(sequence):
            return
        prompt = sequence.token_ids[: sequence.num_prompt_tokens - 1]
        leaders = [
            _Leader(s, common_prefix(s.token_ids[: s.num_prompt_tokens], prompt))
            for s in running
            if not s.is_prefilled and s.number < sequence.number and s.request.cache_salt == sequence.request.cache_salt
        ]
        best = max(leaders, key=lambda leader: leader.length, default=None)
        if best is not None and best.length >= sequence.num_cached + _WORTH_WAITING:
            self._leaders[sequence] = best

    def _length_for(self, num_positions: int) -> int:
        return -(-(num_positions + self._num_spare) // _CACHE_BLOCK) * _CACHE_BLOCK


def _few(held: _Held) -> int:
    """Tokens of a slot that are no loss: an eighth of what it holds."""
    return len(held.token_ids) // 8


def common_prefix(a: Seq[object], b: Seq[object]) -> int:
    """How many elements two sequences begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared far faster than elements
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
