"""How the tokens of one request are chosen, as the user says it: a value and the rules that it keeps."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from hopskip.errors import ConfigError, check_count, check_names, check_number, shown
from hopskip.options import default_of, documented, option, short_repr

if TYPE_CHECKING:
    from typing_extensions import Unpack

StructureKind = Literal["json_schema", "regex", "grammar", "choice"]
STRUCTURES: tuple[StructureKind, ...] = ("json_schema", "regex", "grammar", "choice")
"""Fields that say what a text must look like; one of them at most."""


def text_or_file(text: str) -> str:
    """What the command line gives: the text itself, or that of a file, named as `@FILE` or `FILE`.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = Path(text.removeprefix("@"))
    try:
        if not text.startswith("@") and not path.is_file():
            return text
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"the file {shown(str(path))} is not UTF-8 text; convert it") from None
    except (OSError, ValueError) as error:
        if not text.startswith("@"):
            return text  # too long or too odd for a path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the file {shown(str(path))} cannot be read ({reason}); check the path") from None


def schema_option(text: str) -> Any:
    """The JSON schema that the command line gives: the schema itself, or a file of it, as `@FILE` or `FILE`."""
    content = text_or_file(text)
    if content is text and not text.lstrip().startswith("{"):
        raise ConfigError(f"json_schema is {shown(text)}; give a JSON object, or a file that has one")
    return content


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments. `max_tokens` is another name of `max_new_tokens`."""

    max_tokens: int
    max_new_tokens: int
    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Seq[str] | None
    stop_token_ids: Seq[int] | None
    ignore_eos: bool
    min_tokens: int
    bad_words: str | Seq[str] | None
    skip_special_tokens: bool
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    choice: Seq[str] | None
    strict_schema: bool


@documented
@dataclass(frozen=True, kw_only=True, init=False)
class SamplingParams:
    """How the tokens of one request are chosen. `temperature` 0 is greedy: the best token, always. What narrows a draw
    (`top_k`, `top_p`, `min_p`) and `seed` then change nothing, and are accepted: people leave them in place.

    `max_tokens` is accepted as another name of `max_new_tokens`. Further fields:

        n: texts for each prompt. Each is drawn with a seed of its own: `seed`, `seed + 1`, ..., or fresh ones.
        logit_bias: numbers to add to the logits, by token id.
        stop_token_ids: tokens that end the text, beside the model's own.
        logprobs: report each token's log-probability and those of the n best; 0 for the token's own only.
        prompt_logprobs: the same of the prompt's tokens but the first, which nothing comes before. The prompt is then
            read anew, whatever the cache has of it; and `max_new_tokens` may be 0, to read it only.
        choice: the text is one of these.

    Of `json_schema`, `regex`, `grammar` and `choice` one may be given; the text then has that form, unless
    `max_new_tokens` cuts it. They need `pip install 'hopskip[structured]'`.

    Raises:
        ConfigError: a value is of the wrong kind or out of range.
    """

    max_new_tokens: int = option(
        256, "Most tokens to generate (default: 256; in a chat 1024 an answer).", "N", short="-n"
    )
    n: int = 1
    temperature: float = option(0.0, "0 is greedy: always the best token.", "T")
    top_k: int = option(0, "Sample from the k most probable tokens; 0 is all.", "K")
    top_p: float = option(1.0, "Sample from the fewest tokens whose probabilities reach this sum.", "P")
    """Nucleus sampling, arXiv 1904.09751."""
    min_p: float = option(0.0, "Sample from tokens at least this fraction as probable as the best.", "P")
    """arXiv 2407.01082."""
    repetition_penalty: float = option(1.0, "Above 1: makes tokens seen before less likely.", "X")
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (arXiv 1909.05858)."""
    presence_penalty: float = option(0.0, "Taken off the logit of tokens generated before.", "X")
    frequency_penalty: float = option(0.0, "Taken off once for each time that a token was generated.", "X")
    """Off its logit."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = option(None, "Same seed, same text (with a temperature).", "N")
    """Of 64 bits, signed or not. None takes a fresh one, which the result reports."""
    stop: tuple[str, ...] = option((), "End before this text; may be given several times.", "TEXT")
    """The text returned ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = option(False, "Go on when the model ends its text.")
    min_tokens: int = option(0, "Let nothing end the text before so many tokens.", "N")
    """Neither the model's own end, nor `stop` and `stop_token_ids`. A grammar may still end it."""
    bad_words: tuple[str, ...] = option((), "Keep this text away; may be given several times.", "TEXT")
    """No token comes that would complete one of them in the output, inside a longer word neither. Case matters."""
    skip_special_tokens: bool = option(True, "Leave special tokens out of the text, or show them.")
    logprobs: int | None = None
    """Report each token's log-probability and those of the n best; 0 for the token's own only. None reports none.
    Log-probabilities are the model's own: before penalties, bias and temperature."""
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = option(
        None, "The text is JSON of this schema: a JSON object, or a file of it.", "JSON|FILE", parse=schema_option
    )
    """Also taken as JSON text, or as a class of pydantic."""
    regex: str | None = option(None, "The whole text matches this regular expression.", "REGEX")
    """As llguidance reads it (Rust's syntax)."""
    grammar: str | None = option(
        None, "The text has this grammar, in Lark's notation or GBNF; or a file of it.", "TEXT|FILE", parse=text_or_file
    )
    choice: tuple[str, ...] | None = None
    strict_schema: bool = option(False, "Refuse a JSON schema of which a part cannot be enforced, rather than warn.")

    def __init__(self, **given: Unpack[SamplingOptions]) -> None:
        values = dict(given)
        items = {item.name: item for item in fields(self)}
        check_names("SamplingParams", values, [*items, "max_tokens"])
        if "max_tokens" in values:
            alias = values.pop("max_tokens")
            if values.get("max_new_tokens", default := items["max_new_tokens"].default) not in (default, alias):
                raise ConfigError(
                    f"max_tokens={shown(alias)} and max_new_tokens={shown(values['max_new_tokens'])} are two names for "
                    "one thing; give max_new_tokens alone"
                )
            values["max_new_tokens"] = _with_name("max_tokens", _COUNTS["max_new_tokens"], alias)
        for name, item in items.items():
            value = values[name] if name in values else default_of(item)
            object.__setattr__(self, name, _checked(name, value))
        self._check_together("max_tokens" if "max_tokens" in given else "max_new_tokens")

    __repr__ = short_repr

    def _check_together(self, max_name: str) -> None:
        if not self.max_new_tokens and self.prompt_logprobs is None:
            raise ConfigError(f"{max_name} is 0; it must be at least 1, or ask for prompt_logprobs")
        if self.min_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}, above {max_name}, which is {self.max_new_tokens}; lower it"
            )
        structures = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(structures) > 1:
            raise ConfigError(f"{structures[0]} and {structures[1]} each say what the text looks like; leave one out")
        if self.strict_schema and self.json_schema is None:
            raise ConfigError("strict_schema has no effect without json_schema; leave it out")
        if structures and self.ignore_eos:
            raise ConfigError(f"ignore_eos contradicts {structures[0]}, which says where the text ends; leave it out")
        if self.is_greedy and self.n > 1:
            raise ConfigError(
                f"n={self.n} at temperature 0 (greedy) is the same text {self.n} times; set temperature above 0"
            )

    def updated(self, **given: Unpack[SamplingOptions]) -> SamplingParams:
        """These with other values of some fields.

        Raises:
            ConfigError: as when they are made.
        """
        if not given:
            return self
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if "max_tokens" in given:
            del values["max_new_tokens"]
        return SamplingParams(**{**values, **given})

    def of_one_text(self, index: int) -> SamplingParams:
        """Those of one of the `n` texts, counted from 0, as the engine takes them: what the text must look like comes
        to it as a constraint.

        >>> [SamplingParams(n=2, temperature=1, seed=7).of_one_text(index).seed for index in (0, 1)]
        [7, 8]
        """
        without: dict[str, Any] = {"n": 1, **dict.fromkeys(STRUCTURES), "strict_schema": False}
        seed = self.seed if self.seed is None else self.seed + index
        return replace(self, **without, seed=seed if seed is None or seed < 2**64 else seed - 2**64)

    @property
    def max_tokens(self) -> int:
        """Another name of `max_new_tokens`."""
        return self.max_new_tokens

    @property
    def structure(self) -> tuple[StructureKind, Any] | None:
        """What the text must look like: the name of the field that says it, and its value."""
        return next(((name, getattr(self, name)) for name in STRUCTURES if getattr(self, name) is not None), None)

    @property
    def is_greedy(self) -> bool:
        """True if the best token is always taken."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out before one is drawn."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def changes_logits(self) -> bool:
        """True if penalties or biases apply, so that the best token is not simply the model's."""
        return self.has_penalties or bool(self.logit_bias)

    @property
    def has_penalties(self) -> bool:
        """True if a token's logit depends on the text before it in another way than the model's own."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def with_defaults(given: Mapping[str, Any], recommended: Mapping[str, Any]) -> SamplingParams:
    """What was asked for, and for the rest what the model's makers recommend (`generation.recommended_sampling`). Who
    asks for temperature 0 gets the model's best tokens: nothing of the makers' settings then."""
    temperature = given.get("temperature")
    is_greedy = isinstance(temperature, int | float) and temperature == 0
    return SamplingParams(**(given if is_greedy else {**recommended, **given}))


def _signature() -> inspect.Signature:
    """For `help()` and completion: every field by name."""
    items = fields(SamplingParams)
    defaults = [item.default if item.default is not MISSING else default_of(item) for item in items]
    return inspect.Signature(
        [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=item.type)
            for item, default in zip(items, defaults, strict=True)
        ]
    )


SamplingParams.__signature__ = _signature()  # type: ignore[attr-defined]

# -- what each field may be --------------------------------------------------------------------------------------------

_COUNTS = {
    "max_new_tokens": (0, "a whole number of at least 1"),
    "min_tokens": (0, "0 (end anywhere) or a whole number above"),
    "n": (1, "a whole number of at least 1"),
    "top_k": (0, "0 (keep all) or a whole number above"),
    "seed": (-(2**63), "a whole number of 64 bits"),
    "logprobs": (0, "None, 0 or a whole number above"),
    "prompt_logprobs": (0, "None, 0 or a whole number above"),
}
_NUMBERS: dict[str, tuple[Any, str]] = {
    "temperature": (lambda x: x >= 0, "a number: 0 (greedy) or above"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number between 0 and 1"),
    "repetition_penalty": (lambda x: x > 0, "a number above 0"),
    "presence_penalty": (lambda x: True, "a finite number"),
    "frequency_penalty": (lambda x: True, "a finite number"),
}
_MAY_BE_NONE = ("seed", "logprobs", "prompt_logprobs", "json_schema", "regex", "grammar", "choice")


def _checked(name: str, value: Any) -> Any:
    """The value of a field in the form that it is kept in.

    Raises:
        ConfigError: it is of the wrong kind, or out of range.
    """
    if value is None and name in _MAY_BE_NONE:
        return None
    if name in _COUNTS:
        value = _with_name(name, _COUNTS[name], value)
        if name == "seed" and value >= 2**64:
            raise ConfigError(f"seed is {shown(value)}; it must be {_COUNTS[name][1]}")
        return value
    if name in _NUMBERS:
        is_right, wanted = _NUMBERS[name]
        value = check_number(name, value, wanted)
        _require(is_right(value), name, value, wanted)
        return value
    return _OTHERS[name](name, value)


def _with_name(name: str, rule: tuple[int, str], value: Any) -> int:
    return check_count(name, value, rule[1], least=rule[0])


def _switch(name: str, value: Any) -> bool:
    _require(isinstance(value, bool), name, value, "True or False")
    return bool(value)


def _text(name: str, value: Any) -> str:
    _require(isinstance(value, str) and bool(value), name, value, "a non-empty text")
    return str(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    texts = _several(name, value, "a text or a list of texts")
    _require(all(isinstance(text, str) and text for text in texts), name, value, "non-empty texts")
    return texts


def _choices(name: str, value: Any) -> tuple[str, ...]:
    texts = () if isinstance(value, str) else _several(name, value, "a list of texts")
    _require(bool(texts), name, value, "a list of texts, at least one")
    return _texts(name, texts)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    wanted = "a list of token ids, 0 or above"
    return tuple(check_count(name, token_id, wanted, least=0) for token_id in _several(name, value, wanted))


def _several(name: str, value: Any, wanted: str) -> tuple[Any, ...]:
    """The parts of a list; None is none of them."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    _require(value is None or is_list, name, value, wanted)
    return () if value is None else tuple(value)


def _biases(name: str, value: Any) -> Mapping[int, float]:
    _require(value is None or isinstance(value, Mapping), name, value, "numbers by token id, such as {42: -100}")
    return {
        check_count(f"a key of {name}", token_id, "a token id, 0 or above", least=0): _bias(name, token_id, bias)
        for token_id, bias in (value or {}).items()
    }


def _bias(name: str, token_id: Any, bias: Any) -> float:
    # infinite ones forbid a token, or allow no other
    return bias if bias in (math.inf, -math.inf) else check_number(f"{name} of token {token_id}", bias, "a number")


def _schema(name: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name} is {shown(value)}, which is not JSON ({error}); give a JSON schema") from None
    _require(isinstance(value, Mapping), name, value, "a JSON schema, such as {'type': 'object'}")
    schema: Mapping[str, Any] = value
    return schema


_OTHERS: dict[str, Any] = {
    "logit_bias": _biases,
    "stop": _texts,
    "stop_token_ids": _token_ids,
    "bad_words": _texts,
    "skip_special_tokens": _switch,
    "ignore_eos": _switch,
    "strict_schema": _switch,
    "json_schema": _schema,
    "regex": _text,
    "grammar": _text,
    "choice": _choices,
}


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {shown(value)}; it must be {wanted}")
