"""From the text of a grammar to a matcher of llguidance. Imports little: the process that tries strangers' grammars
(`grammar_worker.py`) has nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from hopskip.errors import ConfigError
from hopskip.text.json_schema import Fitted, fit

Kind = Literal["json_schema", "regex", "lark", "grammar", "choice"]
"""`lark` is in Lark's notation, `grammar` in that or in llama.cpp's GBNF; `choice` is one of several texts."""

SLOWEST_MASK = 0.1
"""Seconds of processor time that a mask of a stranger's grammar may take. The engine computes masks between two steps,
and everybody waits for it."""
_SHORT_WHITESPACE = r"(\x20|\n[\x20]{0,12})?"
"""Between JSON tokens: a space, or a line end and an indent. Without a limit, a model that likes spaces never comes to
the point."""
_JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": _SHORT_WHITESPACE}
_MAX_LEXER_STATES = 50_000
"""Up to 2 kB each, of each sequence."""
_RELAXATIONS = (
    ("oneOf", ("oneOf",)),
    ("min/maxProperties", ("minProperties", "maxProperties")),
    ("patternProperty", ("patternProperties",)),
    ("for integer range", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("for float range", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("multipleOf", ("multipleOf",)),
    ("multiple of", ("multipleOf",)),
    ("if regex is empty", ("pattern",)),
    ("checking relevance", ("pattern", "multipleOf")),
)
"""By what llguidance complains of: keywords to do without."""
_LOOKS_SPECIAL = re.compile("<.*>", flags=re.DOTALL)
"""Tokens that llguidance takes for special ones, whatever the tokenizer says."""
_LARK_TOKENS = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//[^\n]*|(?P<json>%json\s*)(?=\{)', flags=re.DOTALL)


@dataclass(frozen=True)
class Built:
    """A grammar that can be used."""

    matcher: Any
    text: str
    """As llguidance's constructor takes it: from it and the same vocabulary the same matcher comes again."""
    dropped: list[str]
    """Parts of JSON schemas that are not enforced."""


@dataclass(frozen=True)
class Vocabulary:
    """What matchers are made for."""

    tokens: Any
    """An `LLTokenizer`."""
    marks: tuple[str, ...]
    """Texts of tokens that stand for no text in a grammar."""


def require_llguidance() -> None:
    """Raises ConfigError: llguidance is not installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise ConfigError(
            "structured output needs llguidance, which is not installed: pip install 'hopskip[structured]'"
        ) from None


def read_vocabulary(tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> Vocabulary:
    """The vocabulary of a tokenizer. Takes up to a second.

    Raises:
        ConfigError: this tokenizer cannot be constrained.
    """
    from llguidance import LLTokenizer

    try:
        tokens = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids)
    except BaseException as panic:
        raise ConfigError(f"grammars do not work with this model's tokenizer: {reason(panic)[:300]}") from None
    added = [(token["content"], token["special"]) for token in json.loads(tokenizer_json).get("added_tokens") or ()]
    return Vocabulary(tokens, tuple(text for text, special in added if special or _LOOKS_SPECIAL.fullmatch(text)))


def build(vocabulary: Vocabulary, kind: Kind, text: str, *, strict: bool = False, before: str = "") -> Built:
    """Build a grammar.

    Args:
        before: another one, in Lark's notation, which refers to this one as `@answer`: what may come before.
        strict: refuse JSON schemas of which a part cannot be enforced.

    Raises:
        ConfigError: it cannot be used.
    """
    relaxed: frozenset[str] = frozenset()
    while True:
        grammar, dropped = _grammar(kind, text, strict, relaxed)
        grammar = _whole(grammar, before, spells_marks=any(mark in text for mark in vocabulary.marks))
        matcher, error = match(vocabulary, grammar)
        if not error:
            return Built(matcher, grammar, dropped)
        helps = next((set(words) for mark, words in _RELAXATIONS if mark in error and not relaxed >= set(words)), None)
        if not helps or (kind != "json_schema" and "%json" not in text):
            raise ConfigError(f"the grammar cannot be used: {' '.join(error.split())[:300]}")
        relaxed |= helps


def _whole(grammar: str, before: str, *, spells_marks: bool) -> str:
    """In llguidance's notation of several grammars, if need be.

    Args:
        spells_marks: it has text that a token stands for. Where nothing else may come, llguidance takes this token, and
            then finds that it is not the text; so it must not look ahead.
    """
    if not before and not spells_marks:
        return grammar
    parts = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    parts[0]["name"] = "answer"
    options = '%llguidance {"no_forcing": true}\n' if spells_marks else ""
    return json.dumps({"grammars": [{"lark_grammar": options + (before or "start: @answer\n")}, *parts]})


def match(vocabulary: Vocabulary, grammar: str) -> tuple[Any, str]:
    """A matcher, and why it cannot be used (empty if it can)."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False, max_lexer_states=_MAX_LEXER_STATES)
    try:
        matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            # a grammar that no text satisfies fails only here; and the first mask is the slowest, copies have it then
            matcher.compute_bitmask()
        return matcher, matcher.get_error() if matcher.is_error() else ""
    except BaseException as panic:
        return None, reason(panic) or "unknown reason"


def _grammar(kind: Kind, text: str, strict: bool, relaxed: frozenset[str]) -> tuple[str, list[str]]:
    """In llguidance's notation, with what is dropped of its JSON schemas."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        if kind == "json_schema":
            fitted = _fitted(json.loads(text), strict, relaxed)
            return LLMatcher.grammar_from_json_schema(
                json.dumps(fitted.schema), overrides=_JSON_OPTIONS
            ), fitted.dropped
        if kind == "regex":
            return LLMatcher.grammar_from_regex(text), []
        lark, dropped = _fit_lark(any_to_lark(text) if kind == "grammar" else text, strict, relaxed)
        return LLMatcher.grammar_from_lark(lark), dropped
    except ConfigError:
        raise
    except BaseException as panic:
        raise ConfigError(f"the grammar cannot be used: {' '.join(reason(panic).split())[:300]}") from None


def _fit_lark(lark: str, strict: bool, relaxed: frozenset[str]) -> tuple[str, list[str]]:
    """A grammar whose `%json` schemas are fitted."""
    parts: list[str] = []
    dropped: list[str] = []
    index = 0
    while found := _LARK_TOKENS.search(lark, index):
        parts.append(lark[index : found.end()])
        index = found.end()
        if found["json"]:
            schema, index = json.JSONDecoder().raw_decode(lark, index)
            fitted = _fitted(schema, strict, relaxed)
            # each schema says itself how it is written
            parts.append(json.dumps({"x-guidance": _JSON_OPTIONS, **fitted.schema}))
            dropped += fitted.dropped
    return "".join([*parts, lark[index:]]), dropped


def _fitted(schema: Any, strict: bool, relaxed: frozenset[str]) -> Fitted:
    return fit(schema, strict=strict, can_match=_can_match, relaxed=relaxed)


@lru_cache(maxsize=1024)
def _can_match(pattern: str) -> str:
    """Why llguidance cannot use a pattern; empty if it can."""
    from llguidance import LLMatcher

    schema = json.dumps({"type": "string", "pattern": pattern})
    try:
        error = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    except BaseException as panic:
        error = reason(panic) or "unknown reason"
    return " ".join(error.split())[:200]


def reason(error: BaseException) -> str:
    """What went wrong in the library. It is written in Rust, and a panic there is no ordinary exception here."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return str(error) or type(error).__name__
    raise error
