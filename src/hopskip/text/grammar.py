"""Grammars: JSON schemas, regular expressions, grammars and choices, compiled and followed by llguidance.

Shape letters: M draft tokens, N = M + 1 rows, W words of a mask.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, Literal

import numpy as np

from hopskip.errors import ConfigError
from hopskip.sequence import Mask
from hopskip.text.tokenizer import Tokenizer

Kind = Literal["json_schema", "regex", "lark", "grammar", "choice"]
"""`lark` is in Lark's notation, `grammar` in that or in llama.cpp's GBNF; `choice` is one of several texts."""
Source = str | Mapping[str, Any] | Seq[str]
"""A grammar as it is given: a schema may be a mapping, a choice is its texts."""

_NUM_KEPT = 64
"""Compiled grammars that are kept, for requests that come with the same one."""
_SHORT_WHITESPACE = r"(\x20|\n[\x20]{0,12})?"
"""Between JSON tokens: a space, or a line end and an indent. Without a limit, a model that likes spaces never comes to
the point."""


class GrammarCompiler:
    """Turns grammars into constraints for one tokenizer. Safe for use from several threads.

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
        self._backend: Any = None
        self._compiled: OrderedDict[tuple[Kind, str], Any] = OrderedDict()

    def compile(self, kind: Kind, source: Source) -> GrammarConstraint:
        """A fresh constraint. The first call of all takes up to a second more, to read the vocabulary.

        Raises:
            ConfigError: the grammar is not valid, too large, or too complex; this tokenizer cannot be constrained; or
                llguidance is not installed.
        """
        text = self._as_text(source)
        if self._max_chars is not None and len(text) > self._max_chars:
            raise ConfigError(f"the grammar has {len(text)} characters; at most {self._max_chars} are allowed")
        with self._lock:
            matcher = self._compiled.get((kind, text))
            if matcher is None:
                matcher = self._compile(kind, text)
            self._compiled[kind, text] = matcher
            self._compiled.move_to_end((kind, text))
            while len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
            return GrammarConstraint(matcher.deep_copy(), self._vocab_size)

    def _as_text(self, source: Source) -> str:
        if isinstance(source, str):
            return source
        if isinstance(source, Mapping):
            return _dump_schema(source, self._max_depth)
        return "start: " + " | ".join(json.dumps(choice) for choice in source)

    def _compile(self, kind: Kind, text: str) -> Any:
        try:
            from llguidance import LLMatcher, LLParserLimits
            from llguidance.gbnf_to_lark import any_to_lark
        except ImportError:
            raise ConfigError(
                "structured output needs llguidance, which is not installed: pip install 'hopskip[structured]'"
            ) from None
        if self._backend is None:
            self._backend = self._read_vocabulary()
        # the work is bounded by the library's own fuel, so that a hostile grammar cannot keep this thread
        limits = LLParserLimits(verbose_errors=False)
        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(
                    text, overrides={"whitespace_flexible": True, "whitespace_pattern": _SHORT_WHITESPACE}
                )
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = LLMatcher.grammar_from_lark(any_to_lark(text) if kind == "grammar" else text)
            matcher = LLMatcher(self._backend, grammar, log_level=0, limits=limits)
            trial = matcher.deep_copy()
            if not trial.is_error():
                trial.compute_bitmask()  # a grammar that no text satisfies fails only here
            error = trial.get_error() if trial.is_error() else ""
        except BaseException as panic:
            error = _reason(panic)
        if error:
            raise ConfigError(f"the grammar cannot be used: {' '.join(error.split())[:300]}")
        return matcher

    def _read_vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        if not self._tokenizer.eos_token_ids:
            raise ConfigError("this model has no end-of-text token, so no grammar can end its text")
        try:
            return LLTokenizer(
                self._tokenizer.inner.to_str(),
                n_vocab=self._vocab_size,
                eos_token=list(self._tokenizer.eos_token_ids),
            )
        except BaseException as panic:
            raise ConfigError(f"grammars do not work with this model's tokenizer: {_reason(panic)[:300]}") from None


class GrammarConstraint:
    """Where one sequence stands in its grammar; a `sampling.Constraint`.

    Looking ahead along a draft moves the matcher forward and rolls it back, so that what is rejected leaves no trace.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

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
        masks_NW[row] = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")[: masks_NW.shape[1]]
        self._check()
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


def _dump_schema(schema: Mapping[str, Any], max_depth: int) -> str:
    """The schema as JSON text.

    Raises:
        ConfigError: it is nested too deeply, or refers to a schema elsewhere.
    """
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > max_depth:
            raise ConfigError(f"the JSON schema is nested deeper than {max_depth} levels; flatten it")
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str) and not reference.startswith("#"):
                raise ConfigError("the JSON schema refers to another document ($ref); only '#/...' is followed")
            stack += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            stack += [(child, depth + 1) for child in value]
    return json.dumps(schema)


def _reason(error: BaseException) -> str:
    """What went wrong in the library. It is written in Rust, and a panic there is no ordinary exception here."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return str(error) or type(error).__name__
    raise error
