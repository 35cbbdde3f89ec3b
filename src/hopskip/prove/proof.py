"""What a proof is: one claim, put to the test on this model, with its outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "not claimed"]
"""`not claimed`: the backend makes no such promise (and says why); that is no failure."""


@dataclass(frozen=True)
class Tie:
    """A place where two tokens are as good as each other: float32 rounding decides, so either is right."""

    prompt: int
    """Index of the prompt."""
    position: int
    """Index of the generated token."""
    expected: int
    got: int
    gap: float
    """Difference of the reference's two best logits."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome of one proof."""

    topic: Literal["greedy", "sampling", "context", "transformers"]
    setting: str
    """What was run: `early-exit E=8 k=3 recompute`."""
    claim: str
    status: Status
    detail: str
    """What was seen; for a failure also what that means."""
    counts: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_hold(proofs: Iterable[Proof]) -> bool:
    """True if at least one claim was proved, and none failed."""
    statuses = [proof.status for proof in proofs]
    return "passed" in statuses and "failed" not in statuses
