"""The slots of the cache: who has which, what idle ones still hold, and what a newcomer may start from."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from hopskip.backends.base import Backend
from hopskip.backends.rows import Cache
from hopskip.errors import ConfigError
from hopskip.sequence import Sequence

_CACHE_BLOCK = 256
"""The cache grows in steps of this many positions, so that it is not reallocated for every longer prompt."""


class Slots:
    """One slot for each running sequence. The cache is made when the first one comes, and grows with them.

    Args:
        num_spare: positions beyond a sequence's last that passes may write to.
        shares_prefixes: start a prompt from cached keys and values of another that shares its beginning.
        needs_features: a drafter wants to see hidden states of every token, which the cache does not hold.
    """

    def __init__(self, backend: Backend, *, num_spare: int, shares_prefixes: bool, needs_features: bool) -> None:
        self._backend = backend
        self._num_spare = num_spare
        self._shares_prefixes = shares_prefixes
        self._needs_features = needs_features
        self._cache: Cache | None = None
        self._held: dict[int, list[int]] = {}
        """Tokens whose keys and values each free slot still holds."""

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
        """Give a sequence the free slot whose content shares the longest beginning with it; else an empty, else any.

        Where a running sequence shares more with it (a system prompt, say), that much is copied.
        """
        taken = {s.slot for s in running}
        free = [slot for slot in range(self.cache.num_slots) if slot not in taken]
        shared = dict.fromkeys(free, 0)
        # the last prompt token always runs: its hidden state yields the first new token
        prompt = sequence.token_ids[:-1]
        if self._shares_prefixes:
            shared = {slot: common_prefix(self._held.get(slot, []), prompt) for slot in free}
            if self._needs_features:  # of the last shared token, too
                shared = {slot: max(0, length - 1) for slot, length in shared.items()}
        sequence.slot = max(free, key=lambda slot: (shared[slot], slot not in self._held, -slot))
        sequence.num_cached = shared[sequence.slot]
        # a copy brings no features
        if self._shares_prefixes and running and not self._needs_features:
            lengths = [common_prefix(s.token_ids[: s.num_cached], prompt) for s in running]
            longest = max(lengths)
            if longest > sequence.num_cached:
                self.cache.copy_prefix(running[lengths.index(longest)].slot, sequence.slot, longest)
                sequence.num_cached = longest
        sequence.stats.num_cached_prompt_tokens = sequence.num_cached
        self._held.pop(sequence.slot, None)

    def give_back(self, sequence: Sequence) -> None:
        """The slot is free, and keeps what it holds until somebody takes it; but not after an error, which may come of
        just that."""
        if sequence.error is None:
            self._held[sequence.slot] = sequence.token_ids[: sequence.num_cached]

    def _length_for(self, num_positions: int) -> int:
        return -(-(num_positions + self._num_spare) // _CACHE_BLOCK) * _CACHE_BLOCK


def common_prefix(a: Seq[object], b: Seq[object]) -> int:
    """How many elements two sequences begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
