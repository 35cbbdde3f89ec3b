"""What becomes of parameters that this API does not have, and how a client is told what is wrong with a request.

The rule: what would change the answer and cannot be done is refused; what changes nothing is accepted.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

from hopskip.errors import ConfigError, PromptError
from hopskip.serve.schema import Parameters

_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "audio": ({},),
    "detokenize": (True,),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": ("auto",),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "return_token_ids": (False,),
    "top_a": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
"""Parameters of other servers, with the values at which they change nothing."""

_INSTEAD = {
    "function_call": "tool_choice",
    "functions": "tools",
    "grammar": "structured_outputs.grammar",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "json_schema": "structured_outputs.json",
    "max_completion_tokens": "max_output_tokens",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens": "max_output_tokens",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}
"""What parameters of other servers, or of other routes, are called here."""

_CLOSENESS = 0.7
"""Of a name to the one that was meant, 1 being the same."""


class ParameterError(ConfigError):
    """Something in a request cannot be served.

    Args:
        param: which parameter.
        code: a word for programs, as OpenAI has it.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@contextmanager
def blamed(param: str) -> Iterator[None]:
    """What goes wrong within is the fault of this parameter.

    Raises:
        ParameterError: it cannot be served.
    """
    try:
        yield
    except ParameterError:
        raise
    except (ConfigError, PromptError) as error:
        raise ParameterError(str(error), param=param) from None


def unknown_params(request: Parameters, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The parameters of a request that are not known and would change something, each with what to do instead."""
    for name, value in (request.model_extra or {}).items():
        if value not in _WITHOUT_EFFECT.get(name, ()):
            yield f"{prefix}{name[:64]}", _remedy(name, request)
    for name, field in type(request).model_fields.items():
        if isinstance(value := getattr(request, name), Parameters):
            yield from unknown_params(value, f"{prefix}{field.alias or name}.")


def refuse_unknown(request: Parameters) -> None:
    """Raises ParameterError: a parameter is not known."""
    for name, remedy in unknown_params(request):
        raise ParameterError(f"{name} is not a parameter of this API; {remedy}", param=name)


def _remedy(name: str, request: Parameters) -> str:
    known = [field.alias or name for name, field in type(request).model_fields.items()]
    meant = _INSTEAD.get(name)
    if meant is None or meant.partition(".")[0] not in known:
        meant = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_CLOSENESS)), None)
    return "leave it out" if meant is None else f"did you mean {meant}?"


def describe(errors: Seq[Any], body: Any) -> tuple[str, str | None]:
    """What is wrong with a request's body, and the parameter concerned.

    Where a value may be of several kinds, the kind that it comes nearest to says what is wrong. The client's own values
    stay out of the message: they may be huge, or no valid JSON.

    Args:
        errors: as pydantic lists them.
    """
    places, branches = zip(*(_place(error, body) for error in errors), strict=True)
    depth = max(map(len, places))
    num_errors = Counter(branches)
    deepest = [index for index, place in enumerate(places) if len(place) == depth]
    fewest = min(num_errors[branches[index]] for index in deepest)
    chosen = [index for index in deepest if num_errors[branches[index]] == fewest]
    place = places[chosen[0]]
    reasons = dict.fromkeys(_reason(errors[index]) for index in chosen if places[index] == place)
    where = ".".join(part[:64] for part in place)
    text = "; or ".join(reasons)
    if not where and not isinstance(body, dict):
        text = f"the body must be a JSON object, sent with the header 'Content-Type: application/json' ({text})"
    return (f"{where}: {text}" if where else text)[:500], where or None


def _place(error: Any, body: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where in the body an error is; and which branch it is of: its location as pydantic has it, up to the first part
    that is a name of pydantic's own, for a kind of value."""
    place: list[str] = []
    location = error["loc"][1:]
    length = len(location)
    for index, part in enumerate(location):
        is_key = isinstance(body, dict) and part in body
        is_index = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_key or is_index:
            body = body[part]
            place.append(str(part))
        elif error["type"] == "missing" and index == len(location) - 1:
            place.append(str(part))
        else:
            length = min(length, index + 1)
    return tuple(place), tuple(map(str, location[:length]))


def _reason(error: Any) -> str:
    if error["type"] == "union_tag_invalid":
        return f"{error['ctx']['discriminator']} must be one of {error['ctx']['expected_tags']}"
    return str(error["msg"]).removeprefix("Value error, ")
