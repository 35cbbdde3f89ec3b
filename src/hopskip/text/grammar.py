"""Grammars: JSON schemas, regular expressions, grammars and choices, compiled and followed by llguidance.

Shape letters: M draft tokens, N = M + 1 rows, W words of a mask.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from hopskip.errors import ConfigError
from hopskip.sequence import Mask
from hopskip.text.grammar_build import SLOWEST_MASK, Kind, build, match, read_vocabulary, require_llguidance
from hopskip.text.tokenizer import Tokenizer

Source = str | Mapping[str, Any] | Seq[str]
"""A grammar as it is given: a schema may be a mapping, a choice is its texts."""

_NUM_KEPT = 64
"""Compiled grammars that are kept, for requests that come with the same one."""


class GrammarCompiler:
    """Turns grammars into constraints for one tokenizer. Safe for use from several threads.

    A grammar that a stranger wrote may crash the process or never end: `serve.grammars` tries those elsewhere first.

    Args:
        max_chars: the longest grammar that is taken; None takes any.
        max_depth: the deepest nesting of a JSON schema.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, max_chars: int | None = None, max_depth: int = 64
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_chars = max_chars
        self._max_depth = max_depth
        self._lock = threading.Lock()
        """Of the vocabulary and of what is kept; nothing is compiled under it."""
        self._backend: Any = None
        self._compiled: OrderedDict[tuple[str, str, str, bool], tuple[Any, list[str]]] = OrderedDict()

    def compile(self, kind: Kind, source: Source, *, strict: bool = False, before: str = "") -> GrammarConstraint:
        """A fresh constraint. The first call of all takes up to a second more, to read the vocabulary.

        Args:
            strict: refuse a JSON schema of which a part cannot be enforced; otherwise such parts are dropped, and
                `GrammarConstraint.dropped` tells which.
            before: see `grammar_build.build`.

        Raises:
            ConfigError: the grammar is not valid, too large, or too complex; this tokenizer cannot be constrained; or
                llguidance is not installed.
        """
        text = self.text_of(source)
        key = (kind, text, before, strict)
        kept = self._kept(key)
        if kept is None:
            built = build(self._vocabulary(), kind, text, strict=strict, before=before)
            kept = self._keep(key, (built.matcher, built.dropped))
        return self._fresh(kept)

    def adopt(self, grammar: str, dropped: list[str], *, keep: bool) -> GrammarConstraint:
        """A fresh constraint of a grammar that has been tried elsewhere: the same vocabulary and text give the same.

        Its text ends with an error should a mask take longer than `SLOWEST_MASK`: the trial has not seen every text.

        Args:
            grammar: `Built.text`.
            keep: it is small enough to be kept for the next request with the same one.
        """
        kept = self._kept(("", grammar, "", False))
        if kept is None:
            matcher, error = match(self._vocabulary(), grammar)
            if error:
                raise ConfigError(f"the grammar cannot be used: {' '.join(error.split())[:300]}")
            kept = (matcher, dropped)
            if keep:
                self._keep(("", grammar, "", False), kept)
        return self._fresh((kept[0], dropped), SLOWEST_MASK)

    def text_of(self, source: Source) -> str:
        """A grammar as text.

        Raises:
            ConfigError: it is too long, or nested too deeply.
        """
        if isinstance(source, str):
            text = source
        elif isinstance(source, Mapping):
            check_depth(source, self._max_depth)
            text = json.dumps(source)
        else:
            text = "start: " + " | ".join(json.dumps(choice) for choice in source)
        if self._max_chars is not None and len(text) > self._max_chars:
            raise ConfigError(f"the grammar has {len(text)} characters; at most {self._max_chars} are allowed")
        return text

    def vocabulary_source(self) -> dict[str, Any]:
        """What `read_vocabulary` takes, by name.

        Raises:
            ConfigError: nothing ends this model's texts.
        """
        if not self._tokenizer.eos_token_ids:
            raise ConfigError("this model has no end-of-text token, so no grammar can end its text")
        return {
            "tokenizer_json": self._tokenizer.inner.to_str(),
            "vocab_size": self._vocab_size,
            "eos_token_ids": list(self._tokenizer.eos_token_ids),
        }

    def _vocabulary(self) -> Any:
        require_llguidance()
        with self._lock:
            if self._backend is None:
                self._backend = read_vocabulary(**self.vocabulary_source())
            return self._backend

    def _kept(self, key: tuple[str, str, str, bool]) -> tuple[Any, list[str]] | None:
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _keep(self, key: tuple[str, str, str, bool], found: tuple[Any, list[str]]) -> tuple[Any, list[str]]:
        with self._lock:
            self._compiled[key] = found
            while len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
        return found

    def _fresh(self, kept: tuple[Any, list[str]], slowest_mask: float = math.inf) -> GrammarConstraint:
        matcher, dropped = kept
        return GrammarConstraint(matcher.deep_copy(), self._vocab_size, dropped, slowest_mask)


class GrammarConstraint:
    """Where one sequence stands in its grammar; a `sampling.Constraint`.

    Looking ahead along a draft moves the matcher forward and rolls it back, so that what is rejected leaves no trace.

    Args:
        slowest_mask: seconds of processor time; a mask that takes longer is an error.
    """

    def __init__(self, matcher: Any, vocab_size: int, dropped: Seq[str] = (), slowest_mask: float = math.inf) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._slowest_mask = slowest_mask
        self.dropped = tuple(dropped)
        """Parts of the JSON schema that are not enforced, such as `uniqueItems at #/properties/tags`."""

    def copy(self) -> GrammarConstraint:
        """Another one, for another sequence, which stands where this one does."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self.dropped, self._slowest_mask)

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        num_allowed = int(self._matcher.validate_tokens(list(draft_ids)))
        self._check()
        return num_allowed

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        after: list[list[int]] = [[] for _ in range(len(draft_ids) + 1)]
        for index, parent in enumerate(range(-1, len(draft_ids) - 1) if parents is None else parents):
            after[parent + 1].append(index + 1)
        masks_NW = np.full((len(draft_ids) + 1, -(-self._vocab_size // 32)), 2**32 - 1, dtype=np.uint32)
        self._look_ahead(0, draft_ids, after, masks_NW)
        self._check()
        return masks_NW

    def _look_ahead(self, row: int, draft_ids: Seq[int], after: list[list[int]], masks_NW: Mask) -> None:
        """Fill in the masks of a row and of those that follow it."""
        started = time.thread_time()
        masks_NW[row] = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")[: masks_NW.shape[1]]
        self._check()
        if time.thread_time() - started > self._slowest_mask:  # the next one is likely to be no better
            raise ConfigError(
                f"the grammar has become too complex: finding the tokens that may come next takes over "
                f"{self._slowest_mask:g} s"
            )
        for following in after[row]:
            token = draft_ids[following - 1]
            if self._matcher.validate_tokens([token]) != 1:
                continue
            self._matcher.consume_token(token)
            if not self._matcher.is_stopped():  # else nothing follows: whatever the target says there is cut off
                self._look_ahead(following, draft_ids, after, masks_NW)
            self._matcher.rollback(1)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the grammar has become too complex: {self._matcher.get_error().splitlines()[0][:300]}")


def check_depth(schema: Mapping[str, Any], max_depth: int) -> None:
    """Raises ConfigError: a JSON schema is nested too deeply."""
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > max_depth:
            raise ConfigError(f"the JSON schema is nested deeper than {max_depth} levels; flatten it")
        if isinstance(value, Mapping):
            stack += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            stack += [(child, depth + 1) for child in value]
