"""Drafted against plain decoding of one prompt, on a machine that is quiet or busy: the two decode in turn."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from hopskip.sequence import Sequence

_LEAD_SECONDS = 0.05
"""Whoever has had so much more time rests. In turns of single rounds each would find the processor's caches as the
other has left them; in long ones a busy machine may slow one alone."""


class Race:
    """Two sequences of one prompt, with drafts and without. From where both have their first token to where one of them
    ends, every step of the engine leaves one of them as it is, and they take turns. Whatever else the machine does then
    slows both alike, and the tokens per second of their own steps compare. Other requests take part in every step.

    Args:
        sequences: the drafted one, and the plain one.
    """

    def __init__(self, sequences: Seq[Sequence]) -> None:
        self._drafted, self._plain = map(_Lane, sequences)
        self._moving, self._resting = self._drafted, self._plain
        self._num_before = 0
        self._counts = False
        """Whether the step is one of a turn."""

    @property
    def is_over(self) -> bool:
        return self._drafted.sequence.is_finished or self._plain.sequence.is_finished

    def take_turn(self) -> Sequence | None:
        """Called before a step: who does not take part in it; None if both do."""
        if self.is_over:
            return None
        ready = [lane.sequence for lane in (self._drafted, self._plain) if lane.sequence.is_prefilled]
        self._counts = len(ready) == 2
        if not self._counts:  # who has read the prompt waits for the other
            return ready[0] if ready else None
        self._num_before = len(self._moving.sequence.tokens)
        return self._resting.sequence

    def count(self, seconds: float) -> None:
        """Called after such a step: it has taken so long."""
        if not self._counts:
            return
        self._moving.seconds += seconds
        self._moving.num_tokens += len(self._moving.sequence.tokens) - self._num_before
        # a short answer may be over before the first whole turn is
        if self._moving.seconds - self._resting.seconds > _LEAD_SECONDS or not self._resting.num_tokens:
            self._moving, self._resting = self._resting, self._moving

    def figures(self, sequence: Sequence) -> dict[str, float | None]:
        """Of one of the two, ready for JSON: its tokens, the seconds of its own steps, and `speedup`, the drafted one's
        tokens per second over the plain one's; None as long as one of them has none."""
        lane = self._drafted if sequence is self._drafted.sequence else self._plain
        drafted, plain = self._drafted.tokens_per_second, self._plain.tokens_per_second
        speedup = drafted / plain if drafted and plain else None
        return {"num_tokens": lane.num_tokens, "seconds": lane.seconds, "speedup": speedup}


class _Lane:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.seconds = 0.0
        self.num_tokens = 0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0
