"""What users say in texts, as the engine takes it: in token ids. And the texts of what it gives."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request
from hopskip.text.banned import Bans
from hopskip.text.tokenizer import Detokenizer, TextStream, Tokenizer


class RequestMaker:
    """Makes requests for one model. Safe for use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._bans = Bans(tokenizer, vocab_size)

    def request(self, prompt_ids: Seq[int], params: SamplingParams, **more: Any) -> Request:
        """A request for one text. A `stop` that spells a special token ends the text there, and `bad_words` are kept
        away.

        Args:
            more: further fields of `Request`.
        """
        spelt = [token_id for text in params.stop if (token_id := self._tokenizer.special_id(text)) is not None]
        if spelt:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *spelt))
        banned = self._bans.constraint(params.bad_words) if params.bad_words else None
        return Request(prompt_ids, params, banned=banned, **more)


def text_stream(tokenizer: Tokenizer, request: Request) -> TextStream:
    """The text of a request as it grows."""
    params = request.params
    before = request.prompt_ids if params.max_new_tokens else ()  # whose last character may be incomplete
    decoder = Detokenizer(
        tokenizer, before, skip_special_tokens=params.skip_special_tokens, shown_ids=request.shown_ids
    )
    return TextStream(decoder, params.stop, min_tokens=params.min_tokens)
