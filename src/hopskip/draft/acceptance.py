"""How likely draft tokens are to be accepted: counted by kind, over all requests and in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from hopskip.speculative import LOOKUP, Source

MAX_BUCKET = 16
"""Longer matches are counted with those of this length."""
_PRIOR_WEIGHT, _GUESS_WEIGHT = 16.0, 4.0
"""Draft tokens that what was known before is worth, and that a guess is. Replays go about as well from 8 to 32."""


class Kind(NamedTuple):
    """Draft tokens that are counted together."""

    source: Source
    bucket: int
    """See `Draft.buckets`; of runner-ups their rank, from 0."""
    temperature: float
    """Of the request, rounded to tenths."""
    is_runner_up: bool = False


_MEMORY = 500
"""Draft tokens of a kind that are remembered."""


class Acceptance:
    """How often draft tokens were accepted, over all requests.

    Tokens are told apart by kind; accepted means: given that those before it were.
    """

    def __init__(self, priors: Mapping[Source, Seq[float]]) -> None:
        self._counts: dict[Kind, list[float]] = {}
        """Accepted, and all."""
        self._priors = {
            source: [now / before for now, before in zip(shares, (1.0, *shares), strict=False) if before]
            for source, shares in priors.items()
        }

    def rate(self, kind: Kind) -> float:
        """Of an exit, a place that has seldom been reached is taken to be like the one before."""
        return _estimate(self._counts.get(kind), *self._prior(kind))

    def record(self, kind: Kind, is_accepted: bool) -> None:
        _count(self._counts, kind, is_accepted)

    def _prior(self, kind: Kind) -> tuple[float, float]:
        """What is expected before anything was counted, and the draft tokens that this is worth."""
        source, bucket, temperature, is_runner_up = kind
        measured_weight = _PRIOR_WEIGHT if temperature == 0 else _GUESS_WEIGHT  # what was measured was greedy
        if source == LOOKUP:
            return 1 - 1 / (1 + 0.7 * bucket), measured_weight  # the longer the match, the surer
        if is_runner_up:
            return 0.15 / (1 + 0.7 * bucket), _GUESS_WEIGHT  # second choices first, then third ones
        known = self._priors.get(source, ())
        if bucket < len(known):
            return known[bucket], measured_weight
        if bucket:
            return self.rate(kind._replace(bucket=bucket - 1)), _PRIOR_WEIGHT
        return 0.85 if source.kind == "layer-skip" else 0.5, _GUESS_WEIGHT  # nearly the whole model; or who knows


class RequestAcceptance:
    """The same of one request, which starts from what the others have shown."""

    def __init__(self, others: Acceptance) -> None:
        self._others = others
        self._counts: dict[Kind, list[float]] = {}

    def survival(self, source: Source, buckets: Iterable[int], temperature: float, floor: float) -> list[float]:
        """The probabilities that the first 1, 2, .. tokens of a draft are all accepted, down to `floor`. The first is
        always there: it may be probed.

        Where an exit does better for this request than for others, it is taken to do so at the next place, too.
        """
        found: list[float] = []
        product, lift = 1.0, 1.0
        for bucket in buckets:
            kind = Kind(source, min(bucket, MAX_BUCKET), temperature)
            usual = self._others.rate(kind)
            rate = self._rate(kind, min(usual * lift, 0.98))
            if source != LOOKUP:
                lift = rate / usual if usual else 1.0
            product *= rate
            if product < floor and found:
                break
            found.append(product)
        return found

    def runner_ups(self, exit: Source, number: int, temperature: float, floor: float) -> list[float]:
        """The probabilities that the first, second, .. token beside a draft is accepted, falling, down to `floor`. The
        first is always there: it may be probed."""
        found: list[float] = []
        for rank in range(number):
            kind = Kind(exit, rank, temperature, is_runner_up=True)
            rate = min([self._rate(kind, self._others.rate(kind)), *found[-1:]])
            if rate < floor and found:
                break
            found.append(rate)
        return found

    def _rate(self, kind: Kind, prior: float) -> float:
        return _estimate(self._counts.get(kind), prior, _PRIOR_WEIGHT)

    def record(self, kinds: Iterable[Kind], accepted: Iterable[bool]) -> None:
        """Count the draft tokens that were looked at: those accepted, and the first that was not."""
        for kind, is_accepted in zip(kinds, accepted, strict=False):
            self._others.record(kind, is_accepted)
            _count(self._counts, kind, is_accepted)


def _estimate(counts: Seq[float] | None, prior: float, weight: float) -> float:
    accepted, tried = counts or (0.0, 0.0)
    return (accepted + weight * prior) / (tried + weight)


def _count(all_counts: dict[Kind, list[float]], kind: Kind, is_accepted: bool) -> None:
    counts = all_counts.setdefault(kind, [0.0, 0.0])
    keep = 1 - 1 / _MEMORY
    counts[:] = counts[0] * keep + is_accepted, counts[1] * keep + 1
