"""What a generation cost and what drafting gave, under the field's standard names (those of vLLM)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SpeculativeStats:
    """Counts and times of one request. Seconds are wall-clock; in a batch they include the companions' work."""

    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    """Prompt tokens whose keys and values an earlier request had left in the cache."""
    num_tokens: int = 0
    """Tokens generated."""
    prefill_seconds: float = 0.0
    """From the start of the prompt's first pass to the first token."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    num_target_passes: int = 0
    """Full-depth passes after the prompt's, with or without a draft to verify."""
    num_drafts: int = 0
    """Rounds that had a draft."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    """How often a draft's token was accepted in the first, second, .. place."""

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, per second of decoding; 0 if there were none."""
        return (self.num_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        num_computed = self.num_prompt_tokens - self.num_cached_prompt_tokens
        return num_computed / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of draft tokens that were accepted; 0 without drafts."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a round with a draft yields, the bonus or recovered token counted; 1 without drafts."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def record_draft(self, num_draft_tokens: int, num_accepted_tokens: int, depth: int) -> None:
        """Count a round. `depth`: most tokens of the draft that could be accepted; all, unless it is a tree."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        per_pos = self.num_accepted_tokens_per_pos
        per_pos.extend([0] * (depth - len(per_pos)))
        for index in range(num_accepted_tokens):
            per_pos[index] += 1

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, ready for JSON."""
        derived = (
            "decode_tokens_per_second",
            "prefill_tokens_per_second",
            "acceptance_rate",
            "mean_acceptance_length",
        )
        return {**vars(self), **{name: getattr(self, name) for name in derived}}
