"""The answer of a stream, as commands keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopskip.llm import StreamPiece
    from hopskip.sequence import SpeculativeStats, Token


@dataclass
class Answer:
    """What a stream has given so far; `abort` until it ends by itself."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = "abort"
    stats: SpeculativeStats | None = None
    seed: int | None = None

    def add(self, piece: StreamPiece) -> None:
        self.text += piece.text
        self.tokens.append(piece.token)
        self.stats = piece.stats
        self.seed = piece.seed
        if piece.result is not None:
            self.finish_reason = piece.result.finish_reason

    @property
    def ending(self) -> str:
        """Why the text ends, in words."""
        return {
            "stop": "the text was complete",
            "length": f"cut at --max-new-tokens {len(self.tokens)}",
            "abort": "stopped by Ctrl-C",
        }[self.finish_reason]

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": [token.id for token in self.tokens],
            "origins": [token.origin for token in self.tokens],
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "stats": self.stats.as_dict() if self.stats is not None else None,
        }
