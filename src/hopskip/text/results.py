"""What comes of a prompt: the whole of it, or its pieces as they come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hopskip.errors import shown
from hopskip.sequence import FinishReason, Score, Sequence, SpeculativeStats, Token
from hopskip.text.tokenizer import TextStream


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What one prompt gave.

    Attributes:
        text: the generated text, without special tokens and without the stop string that ended it.
        tokens: id, origin and log-probabilities of every generated token, an ending EOS included.
        finish_reason: `stop` (the text was complete) or `length` (it was cut at `max_new_tokens`).
        prompt_token_ids: what the model was given.
        stats: what it cost and what drafting gave.
        prompt_logprobs: of the prompt's tokens, if they were asked for; None of the first, which nothing comes before.
        seed: of a drawn text, given or fresh: with it, `generate` gives this text again. None of a greedy one.
        others: the further texts of the same prompt, with `n` above 1; `outputs` has all of them.
    """

    text: str
    tokens: list[Token]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    stats: SpeculativeStats
    prompt_logprobs: list[Score | None] | None = None
    seed: int | None = None
    others: list[GenerationResult] = field(default_factory=list)

    def __repr__(self) -> str:
        shares = "" if len(self.outputs) == 1 else f", outputs={len(self.outputs)}"
        return (
            f"GenerationResult(text={shown(self.text)}, num_tokens={len(self.tokens)}, "
            f"finish_reason={self.finish_reason!r}{shares})"
        )

    @property
    def outputs(self) -> list[GenerationResult]:
        """All texts of this prompt: as many as `n` asks for, this one first."""
        return [self, *self.others]

    @property
    def token_ids(self) -> list[int]:
        """Id of every generated token."""
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float] | None:
        """Log-probability of every token, if they were asked for."""
        values = [token.logprob for token in self.tokens if token.logprob is not None]
        return values if len(values) == len(self.tokens) else None


@dataclass(frozen=True, kw_only=True)
class StreamPiece:
    """One generated token of a stream, with the text that became certain with it (possibly none).

    Attributes:
        text: the new text; the pieces joined are the whole of it.
        token: the token, with its origin.
        stats: of the request so far; they go on changing until the last piece.
        seed: see `GenerationResult`.
        result: the whole result; on the last piece only.
    """

    text: str
    token: Token
    stats: SpeculativeStats
    seed: int | None = None
    result: GenerationResult | None = None

    def __repr__(self) -> str:
        ending = "" if self.result is None else f", result={self.result!r}"
        return f"StreamPiece(text={self.text!r}, token={self.token!r}{ending})"


def news_of(sequence: Sequence, text: TextStream) -> tuple[list[tuple[Token, str]], bool] | None:
    """The tokens that have come, with their text, and whether it is the last of it; None if nothing has happened."""
    pieces = text.take(sequence.tokens, is_finished=sequence.is_finished)
    return (pieces, sequence.is_finished) if pieces or sequence.is_finished else None


def result_of(sequence: Sequence, text: TextStream) -> GenerationResult:
    """Of a sequence that is finished. Raises the error that has ended it."""
    if sequence.error is not None:
        raise sequence.error
    text.finish()
    assert sequence.finish_reason is not None
    return GenerationResult(
        text=text.text,
        tokens=sequence.tokens,
        finish_reason=sequence.finish_reason,
        prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
        stats=sequence.stats,
        prompt_logprobs=None if sequence.params.prompt_logprobs is None else [None, *sequence.prompt_scores],
        seed=sequence.seed,
    )


def joined(results: list[GenerationResult]) -> GenerationResult:
    """All texts of one prompt as one result."""
    return replace(results[0], others=results[1:]) if len(results) > 1 else results[0]
