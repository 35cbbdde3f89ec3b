"""Log-probabilities in the shapes of OpenAI and vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from hopskip.sequence import Score, Token
from hopskip.text.tokenizer import Tokenizer


def finite(logprob: float | None) -> float | None:
    """JSON has no minus infinity; OpenAI writes -9999 for it."""
    return None if logprob is None else max(logprob, -9999.0) if not math.isnan(logprob) else -9999.0


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


class TokenTexts:
    """The texts of one choice's tokens, one after the other. Joined, they are the choice's text, but for special
    tokens, and for characters of several tokens: `bytes:\\xNN` stands for a part of one.

    Args:
        prompt_ids: what comes before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Seq[int]) -> None:
        self.tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._begins_text = True
        """No token with a text has been told of."""

    def next(self, token_id: int, others: Iterable[int]) -> dict[int, str]:
        """Of the next token, and of what might have stood in its place."""
        texts: dict[int, str] = {}
        for each in (token_id, *others):
            data = self.tokenizer.token_bytes(each)
            try:
                texts[each] = data.decode()
            except UnicodeDecodeError:
                texts[each] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            if self._begins_text and data.startswith(b" "):  # which some tokenizers take from the first word
                texts[each] = self.tokenizer.decode([each], after=self._prompt_ids)
        self._begins_text = self._begins_text and self.tokenizer.is_silent(token_id)
        return texts


def of_chat(texts: TokenTexts, tokens: Iterable[Token]) -> dict[str, Any]:
    """Of the next tokens of a chat's answer. Where best tokens were asked for, the token itself is among them."""

    def scored(token_id: int, text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": finite(logprob), "bytes": list(texts.tokenizer.token_bytes(token_id))}

    content = []
    for token in tokens:
        best = _with_own(token.top_logprobs, token.id, token.logprob) if token.top_logprobs else {}
        text = texts.next(token.id, best)
        top = [scored(token_id, text[token_id], logprob) for token_id, logprob in best.items()]
        content.append({**scored(token.id, text[token.id], token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def of_completion(texts: TokenTexts, tokens: Iterable[Token]) -> dict[str, Any]:
    """Of the next tokens of a completion. The token itself is always among the best."""
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    for token in tokens:
        best = _with_own(token.top_logprobs, token.id, token.logprob)
        text = texts.next(token.id, best)
        told["tokens"].append(text[token.id])
        told["token_logprobs"].append(finite(token.logprob))
        told["top_logprobs"].append({text[token_id]: finite(logprob) for token_id, logprob in best.items()})
    return told


def of_echo(texts: TokenTexts, token_ids: Seq[int], scores: Seq[Score], number: int) -> dict[str, Any]:
    """Of a completion's prompt, whose first token has none; with those of so many best ones."""
    tokens = [
        Token(token_id, "target", score.logprob, dict([*score.top_logprobs.items()][:number]))
        for token_id, score in zip(token_ids[1:], scores, strict=True)
    ]
    first = texts.next(token_ids[0], ())[token_ids[0]]
    told = of_completion(texts, tokens)
    return {name: [first if name == "tokens" else None, *values] for name, values in told.items()}


def of_prompt(tokenizer: Tokenizer, token_ids: Seq[int], scores: Seq[Score], number: int) -> list[Any]:
    """Of a prompt, as vLLM has them: for each token those of itself and of the best ones, by id; None for the first."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": token_text(tokenizer, token_id)}

    found: list[Any] = [None]
    for token_id, score in zip(token_ids[1:], scores, strict=True):
        best = [*score.top_logprobs.items()][:number]
        own = {str(token_id): entry(token_id, score.logprob, score.rank)}
        found.append(own | {str(i): entry(i, value, rank) for rank, (i, value) in enumerate(best, 1) if i != token_id})
    return found


def _with_own(best: Mapping[int, float] | None, token_id: int, logprob: float | None) -> dict[int, float | None]:
    """The best tokens, and the one that was taken, if it is not among them."""
    told: dict[int, float | None] = dict(best or {})
    told.setdefault(token_id, logprob)
    return told
