"""What `/set` shows and changes: every sampling parameter, and whether to draft."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Union, get_args, get_origin, get_type_hints

from hopskip.cli.talk.typed import nearest
from hopskip.errors import ConfigError, shown
from hopskip.sampling_params import SamplingParams

_HELP = {item.name: item.metadata["help"] for item in dataclasses.fields(SamplingParams) if "help" in item.metadata} | {
    "max_new_tokens": "Most tokens of an answer.",
    "logit_bias": 'Added to the logits of these token ids, such as {"15": -5}.',
    "stop_token_ids": "End at one of these tokens, such as [2, 7].",
    "draft": "Draft; the text is the same without.",
}
_HINTS = get_type_hints(SamplingParams) | {"draft": bool}
NAMES = [name for name in _HINTS if name in _HELP]
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "num_predict": "max_new_tokens", "n_predict": "max_new_tokens"} | {
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
}
_OF_DRAWN_TEXTS = ("top_k", "top_p", "min_p", "seed")
_WORDS = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False, "none": None}
_WANTED = {int: "a whole number", float: "a number, such as 0.7", bool: "on or off", str: "a text"}


class Settings:
    """The settings of a chat, each always valid on its own and beside the others.

    Args:
        params: what the chat starts with; `/set NAME default` goes back to it.
        can_draft: whether the model was loaded with drafts; without, `draft` stays off.
    """

    def __init__(self, params: SamplingParams, *, can_draft: bool) -> None:
        self._start: dict[str, Any] = {name: getattr(params, name) for name in NAMES if name != "draft"}
        self._start["draft"] = can_draft
        self._values = dict(self._start)
        self._can_draft = can_draft

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def find(self, name: str) -> str:
        """The full name of a setting, however it is spelt.

        Raises:
            ConfigError: there is none; the message has the nearest.
        """
        plain = name.lower().lstrip("-").replace("-", "_")
        plain = _OTHER_NAMES.get(plain, plain)
        if plain not in NAMES:
            raise ConfigError(f"no setting {shown(name)}; {nearest(plain, NAMES)}/set shows all")
        return plain

    def set(self, name: str, text: str) -> str:
        """Change a setting to what was typed; returns its full name.

        Raises:
            ConfigError: there is no such setting, or the value cannot work. Nothing is changed then.
        """
        name = self.find(name)
        self._change({name: self._start[name] if text.lower() == "default" else _from_text(name, text)})
        return name

    def load(self, values: Mapping[str, Any]) -> None:
        """Take the settings of `as_dict`. Those that it does not name stay as they are.

        Raises:
            ConfigError: as `set`. Nothing is changed then.
        """
        typed = {name: _as_hinted(name, value) for name, value in ((self.find(n), v) for n, v in values.items())}
        if not self._can_draft:
            typed.pop("draft", None)  # the file may come from a chat with a model that drafts: texts are the same
        self._change(typed)

    def _change(self, values: Mapping[str, Any]) -> None:
        changed = {**self._values, **values}
        if changed["draft"] and not self._can_draft:
            raise ConfigError("draft cannot be on: the model was loaded without; start the chat without --draft none")
        given = {name: value for name, value in changed.items() if name != "draft"}
        # at temperature 0 some of them have no effect, which is no reason to refuse them here: it may be set next
        SamplingParams(**{**given, "temperature": given["temperature"] or 1.0})
        self._values = changed

    @property
    def is_greedy(self) -> bool:
        return bool(self._values["temperature"] == 0)

    def has_effect(self, name: str) -> bool:
        """False for what only drawn texts depend on, at temperature 0."""
        return not (self.is_greedy and name in _OF_DRAWN_TEXTS)

    def params(self, **changes: Any) -> SamplingParams:
        """For the next answer, with some of them changed."""
        values = {name: value for name, value in self._values.items() if name != "draft" and self.has_effect(name)}
        return SamplingParams(**{**values, **changes})

    def text_of(self, name: str) -> str:
        """The value of a setting, as it can be typed."""
        value = self._values[name]
        if value is None or value == () or value == {}:
            return "none"
        if isinstance(value, bool):
            return "on" if value else "off"
        return json.dumps(value, ensure_ascii=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value and help of every setting."""
        without_effect = "(not used at temperature 0) "
        return [
            (name, self.text_of(name), ("" if self.has_effect(name) else without_effect) + _HELP[name])
            for name in NAMES
        ]

    def as_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return dict(self._values)


def values_of(name: str) -> list[str]:
    """Words that a setting may be set to, as far as they can be listed."""
    return ["default", *(["on", "off"] if _HINTS[name] is bool else [])]


def _from_text(name: str, text: str) -> Any:
    """The value that was typed: a word such as `on`, JSON, a number such as .5, or a text without quotes."""
    value: Any = text
    for read in (lambda: _WORDS[text.lower()], lambda: json.loads(text), lambda: float(text)):
        with suppress(KeyError, ValueError, RecursionError):
            value = read()
            break
    if get_args(_HINTS[name])[:1] == (str,) and not (value is None or isinstance(value, str | list)):
        value = text  # a text that happens to be a number, say
    return _as_hinted(name, value)


def _as_hinted(name: str, value: Any) -> Any:
    hint = _HINTS.get(name)
    try:
        return _typed(hint, value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{name} is {shown(value)}; it must be {_wanted(hint)}") from None


def _typed(hint: Any, value: Any) -> Any:
    """A value of JSON as the type that a parameter has.

    Raises:
        ValueError: it is none.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _typed(arguments[0], value)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(_typed(arguments[0], item) for item in items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {int(key): _typed(float, item) for key, item in dict(value or {}).items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if type(value) is not hint:
        raise ValueError(value)
    return value


def _wanted(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return f"{_wanted(arguments[0])}, or none"
    if origin is tuple:
        example = '["one", "two"]' if arguments[0] is str else "[1, 2]"
        return f"{_wanted(arguments[0])}, several such as {example}, or none"
    return _WANTED.get(hint, 'a bias for each token id, such as {"15": -5}, or none')
