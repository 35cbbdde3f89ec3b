"""The text of one request as it grows: stop strings, and what may be shown before it is certain."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol, TypeVar

T = TypeVar("T")


class IncrementalDecoder(Protocol):
    """Token ids in, pieces of valid Unicode out (see `tokenizer.Detokenizer`)."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Splits a request's text into one piece per token, and finds the first stop string.

    Text that could be the beginning of a stop string is held back until it is certain, so nothing shown is ever taken
    back; the pieces joined are the text before the stop string. A stop string is found wherever it lies: inside a
    token, across tokens, inside an accepted draft.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Seq[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self._rest = ""
        self._is_stopped = False
        self._pieces: list[str] = []
        """Text that became certain with each token pushed; often empty."""
        self._num_taken = 0

    @property
    def text(self) -> str:
        return "".join(self._pieces) + self._rest

    def push(self, token_id: int) -> bool:
        """Take one token; True if its text completes a stop string."""
        assert not self._is_stopped
        self._pieces.append(self._show(self._decoder.push(token_id)))
        return self._is_stopped

    def finish(self) -> str:
        """The text ends here: returns what was held back, the first time that it is called."""
        if self._is_stopped:
            return ""
        self._rest = self._show(self._decoder.flush()) + self._held
        self._is_stopped = True
        return self._rest

    def take(self, tokens: Seq[T], *, is_finished: bool) -> list[tuple[T, str]]:
        """The tokens that have come since the last call, each with the text that became certain with it.

        Args:
            tokens: all of the request so far.
            is_finished: the text ends with the last of them, whose text has what was held back.
        """
        new = tokens[self._num_taken :]
        pieces = self._pieces[self._num_taken : len(tokens)]
        # a token in stop_token_ids ends the text without being part of it
        pieces += [""] * (len(new) - len(pieces))
        self._num_taken = len(tokens)
        if is_finished and pieces:
            pieces[-1] += self.finish()
        return list(zip(new, pieces, strict=True))

    def _show(self, piece: str) -> str:
        """Add decoded text; return what of it, and of the text held back, is certain."""
        text = self._held + piece
        found = min((i for i in (text.find(stop) for stop in self._stop) if i >= 0), default=None)
        if found is not None:
            self._is_stopped = True
            self._held = ""
            return text[:found]
        num_held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
