"""Which tokens an exit can draft.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from hopskip.text.tokenizer import Tokenizer
from hopskip.train.exit.conversations import Conversation


def draft_vocabulary(conversations: Seq[Conversation], size: int, by_rank: Seq[int] = ()) -> Tensor:
    """The tokens that answers use most, rising: int64 [at most size].

    Args:
        by_rank: further tokens, the likeliest first, to fill up with where the answers have fewer kinds.
    """
    counts = answers_of(conversations).bincount()
    used = counts.argsort(descending=True, stable=True)[: min(size, int((counts > 0).sum()))].tolist()
    return torch.tensor(sorted([*used, *_new(by_rank, used, size - len(used))]))


def _new(tokens: Seq[int], known: Seq[int], number: int) -> list[int]:
    """The first of some tokens that are not known."""
    seen = set(known)
    return [token for token in tokens if token not in seen][:number]


def by_merge_rank(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """All tokens with a text, and those that end one, the most frequent first, as far as the tokenizer tells: whoever
    made it merged the most frequent pairs first. Vocabularies without merges are taken to be in that order."""
    vocabulary: dict[str, int] = tokenizer.inner.get_vocab(with_added_tokens=False)
    merges = json.loads(tokenizer.inner.to_str())["model"].get("merges") or []
    ranks: dict[int, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        token = vocabulary.get(left + right)
        if token is not None:
            ranks.setdefault(token, rank)
    ends = [token for token in tokenizer.eos_token_ids if token < vocab_size]
    texts = [t for t in vocabulary.values() if t < vocab_size and t not in ends and not tokenizer.is_silent(t)]
    # what nothing is merged to is a character, or a byte of one
    return [*ends, *sorted(texts, key=lambda token: (ranks.get(token, -1), token))]


def answers_of(conversations: Seq[Conversation]) -> Tensor:
    """The tokens of all answers: int64 [T]."""
    return torch.cat([c.ids_T[c.is_answer_T] for c in conversations])
