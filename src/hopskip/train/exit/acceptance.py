"""How many tokens of a draft would be accepted, from which of them are right where.

Shape letters: P positions that are predicted, J draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Acceptance:
    """Counts of drafts, and of those whose first 1, 2, .. tokens were all right: int64 [2, J] each."""

    everywhere: Tensor
    """A draft from every position that has so many left."""
    at_starts: Tensor
    """The drafts that an engine makes: each begins where the one before has ended, with the token after the first that
    was wrong."""

    @classmethod
    def none(cls, num_steps: int) -> Acceptance:
        return cls(*torch.zeros(2, 2, num_steps, dtype=torch.int64))

    def add(self, correct_JP: Tensor, first_P: Tensor) -> None:
        """Count some conversations.

        Args:
            correct_JP: whether the draft's j-th token, drawn at this position, is the model's own.
            first_P: index of each position within its answer.
        """
        alive_P = torch.ones_like(correct_JP[0])  # drafts by the position of their latest token
        lengths_P = torch.zeros_like(first_P)  # and by that of their first: how many tokens are right
        for step, correct_P in enumerate(correct_JP):
            if step:
                alive_P = F.pad(alive_P, (1, 0), value=False)[:-1] & (first_P >= step)
            alive_P = alive_P & correct_P
            lengths_P[: len(first_P) - step] += alive_P[step:]
            self.everywhere[:, step] += torch.stack((alive_P.sum(), (first_P >= step).sum())).cpu()
        self._walk(lengths_P.tolist(), first_P.tolist(), len(correct_JP))

    def _walk(self, lengths: list[int], firsts: list[int], num_steps: int) -> None:
        """From draft to draft through every answer. Its first token comes from the pass over the prompt."""
        ends = [*(place for place, first in enumerate(firsts) if place and not first), len(firsts)]
        place = 0
        for end in ends:
            place += 1
            while place < end:
                right = lengths[place]
                for step in range(min(num_steps, end - place)):
                    self.at_starts[0, step] += right > step
                    self.at_starts[1, step] += 1
                place += right + 1
            place = end

    @property
    def shares(self) -> list[float]:
        """Of drafts from everywhere."""
        return _shares(self.everywhere)

    @property
    def shares_at_starts(self) -> list[float]:
        """Of the drafts that an engine makes."""
        return _shares(self.at_starts)


def _shares(counts_2J: Tensor) -> list[float]:
    return [round(right / max(1, number), 4) for right, number in counts_2J.T.tolist()]
