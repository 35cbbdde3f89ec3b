"""From the parameters of requests to those of the engine, and the limits that they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hopskip.sampling_params import SamplingParams, with_defaults
from hopskip.serve import schema
from hopskip.serve.policy import ParameterError
from hopskip.serve.settings import Limits
from hopskip.text.grammar import Source
from hopskip.text.grammar_build import Kind
from hopskip.text.json_schema import STRICT

_CHOSEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of a request that a model's makers may have an opinion of."""
_NUM_LOGPROBS_OF_TOKENS = 5
"""Alternatives of each token under `return_tokens`."""


def at_most(what: str, value: int | None, limit: int, param: str | None = None) -> None:
    """Raises ParameterError: a value is over a limit of this server."""
    if value is not None and value > limit:
        raise ParameterError(f"{what} is {value}; at most {limit} is allowed here", param=param or what)


def room_for(request: schema.Generation, num_prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens an answer may have.

    Raises:
        ParameterError: the prompt leaves no room for one.
    """
    asked = num_tokens_asked(request)
    room = max_model_len - num_prompt_tokens
    if asked == 0 and room >= 0:
        return 0
    if room > 0:
        return room if asked is None or asked < 0 else min(asked, room)
    is_chat = isinstance(request, schema.ChatRequest)
    prompt = "messages" if is_chat else "prompt"
    raise ParameterError(
        f"This model's maximum context length is {max_model_len} tokens. However, your {prompt} resulted in "
        f"{num_prompt_tokens} tokens. Please reduce the length of the {prompt}.",
        param=prompt,
        code="context_length_exceeded",
    )


def num_tokens_asked(request: schema.Generation) -> int | None:
    """The most tokens that a request asks for; None and -1 are as many as there is room for.

    Raises:
        ParameterError: it names two different numbers, or 0.
    """
    asked, name = request.max_tokens, "max_tokens"
    if isinstance(request, schema.ChatRequest):
        other = request.max_completion_tokens
        if asked is not None and other is not None and asked != other:
            raise ParameterError(
                "max_tokens and max_completion_tokens are the same thing; leave max_tokens out", param="max_tokens"
            )
        if other is not None:
            asked, name = other, "max_completion_tokens"
    elif asked is None:
        asked = 16  # as OpenAI has it for completions
    if asked == 0 and num_prompt_logprobs(request) is None:
        raise ParameterError(f"{name} is 0; it must be at least 1, or ask for echo or prompt_logprobs", param=name)
    return asked


def num_prompt_logprobs(request: schema.Generation) -> int | None:
    """How many best tokens are told of at each token of the prompt; None: the prompt has no log-probabilities."""
    asked = [request.prompt_logprobs]
    if isinstance(request, schema.CompletionRequest) and request.echo:
        # an echo without an answer is all of it
        asked.append(0 if request.logprobs is None and request.max_tokens == 0 else request.logprobs)
    return max((number for number in asked if number is not None), default=None)


def check_scores(request: schema.Generation, num_tokens: int, limits: Limits) -> None:
    """Raises ParameterError: a request asks for more log-probabilities of its prompts, of so many tokens, than there is
    memory for."""
    number = num_prompt_logprobs(request)
    if number is not None:
        param = "echo" if request.prompt_logprobs is None else "prompt_logprobs"
        total = num_tokens * (1 + number)
        at_most("the number of log-probabilities of prompts", total, limits.num_prompt_logprobs, param)


def add_generation_prompt(request: schema.ChatPrompt) -> bool:
    """Whether a chat's prompt ends where the assistant begins to speak: unless the last message is to go on.

    Raises:
        ParameterError: both are asked for.
    """
    if not request.continue_final_message:
        return request.add_generation_prompt
    if request.add_generation_prompt and "add_generation_prompt" in request.model_fields_set:
        raise ParameterError(
            "continue_final_message and add_generation_prompt contradict each other; set one of them to false",
            param="continue_final_message",
        )
    return False


def num_choices(request: schema.Generation) -> int:
    return 2 if is_race(request) else request.n or 1


def is_race(request: schema.Generation) -> bool:
    return request.speculative is not None and request.speculative.race


def sampling_params(
    request: schema.Generation,
    limits: Limits,
    recommended: Mapping[str, Any],
    *,
    max_tokens: int,
    num_logprobs: int | None,
) -> SamplingParams:
    """How the tokens of a request are chosen.

    Args:
        recommended: by the model's makers.

    Raises:
        ConfigError: a value is over a limit, or cannot work.
    """
    stop = [text for text in ([request.stop] if isinstance(request.stop, str) else request.stop or []) if text]
    at_most("the number of stop texts", len(stop), limits.num_stops, "stop")
    at_most("the length of a stop text", max(map(len, stop), default=0), limits.stop_chars, "stop")
    at_most(
        "the number of stop_token_ids", len(request.stop_token_ids or ()), limits.num_biases, param="stop_token_ids"
    )
    at_most("the number of logit_bias entries", len(request.logit_bias or ()), limits.num_biases, param="logit_bias")
    at_most("the number of bad_words", len(request.bad_words or ()), limits.num_stops, param="bad_words")
    at_most(
        "the length of a bad word", max(map(len, request.bad_words or ()), default=0), limits.stop_chars, "bad_words"
    )
    at_most("prompt_logprobs", request.prompt_logprobs, limits.num_logprobs)
    if request.prompt_logprobs is not None and request.stream:
        raise ParameterError("prompt_logprobs come with whole answers only; leave stream out", param="prompt_logprobs")
    if (request.min_tokens or 0) > max_tokens:
        raise ParameterError(
            f"min_tokens is {request.min_tokens}, but the answer may have at most {max_tokens} tokens; lower it",
            param="min_tokens",
        )
    if request.return_tokens is True and num_logprobs is None:
        num_logprobs = _NUM_LOGPROBS_OF_TOKENS
    # what the client leaves out is as the model's makers recommend it, else as OpenAI has it
    chosen = {name: getattr(request, name) for name in _CHOSEN if name in request.model_fields_set}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if "top_k" in chosen:
        chosen["top_k"] = max(chosen["top_k"], 0)
    recommended = {"temperature": 1.0, **recommended}
    if chosen.get("temperature", recommended["temperature"]) > 0:
        chosen["seed"] = None if request.seed is None else request.seed % 2**63
    else:
        chosen = {name: value for name, value in chosen.items() if name not in ("top_p", "top_k", "min_p")}
    return with_defaults(
        {
            **chosen,
            "max_new_tokens": max_tokens,
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "logit_bias": {_token_id(key): bias for key, bias in (request.logit_bias or {}).items()},
            "stop": tuple(stop),
            "stop_token_ids": tuple(request.stop_token_ids or ()),
            "ignore_eos": request.ignore_eos,
            "min_tokens": request.min_tokens or 0,
            "bad_words": tuple(request.bad_words or ()),
            "skip_special_tokens": request.skip_special_tokens,
            "prompt_logprobs": num_prompt_logprobs(request),
            "logprobs": num_logprobs,
        },
        recommended,
    )


def with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """Those of one of several choices, counted from 0."""
    return params if params.seed is None else replace(params, seed=(params.seed + choice) % 2**63)


def structure(request: schema.Generation) -> tuple[Kind, Source] | None:
    """The grammar that a request asks for.

    Raises:
        ParameterError: it asks for two.
    """
    formatted, outputs = _of_response_format(request.response_format), request.structured_outputs
    if outputs is None:
        return formatted
    if formatted is not None:
        raise ParameterError(
            "response_format and structured_outputs each say what the text looks like; leave one out",
            param="structured_outputs",
        )
    if outputs.regex is not None:
        return "regex", outputs.regex
    if outputs.choice is not None:
        return "choice", outputs.choice
    if outputs.grammar is not None:
        return "grammar", outputs.grammar
    return "json_schema", {"type": "object"} if outputs.json_ is None else outputs.json_


def structure_param(request: schema.Generation) -> str:
    """The parameter that the grammar comes from."""
    if request.structured_outputs is not None:
        return "structured_outputs"
    return "tools" if _of_response_format(request.response_format) is None else "response_format"


def _of_response_format(given: Any) -> tuple[Kind, Source] | None:
    if isinstance(given, schema.JSONObjectFormat):
        return "json_schema", given.schema_ or {"type": "object"}
    if isinstance(given, schema.JSONSchemaFormat):
        asked = given.json_schema
        return "json_schema", {**asked.schema_, STRICT: True} if asked.strict else asked.schema_
    if isinstance(given, schema.RegexFormat):
        return "regex", given.pattern
    if isinstance(given, schema.GrammarFormat):
        return "lark", given.grammar
    return None


def drafting(speculative: schema.Speculative | None) -> tuple[int | None, int | None]:
    """`max_draft_tokens` and `exit_layer` of a job.

    Raises:
        ParameterError: an option would have no effect.
    """
    if speculative is None:
        return None, None
    if speculative.enabled:
        return speculative.num_draft_tokens, speculative.exit_layer
    if speculative.num_draft_tokens or speculative.exit_layer is not None or speculative.race:
        raise ParameterError(
            "speculative.enabled=false leaves nothing to num_draft_tokens, exit_layer and race; leave them out",
            param="speculative",
        )
    return 0, None


def _token_id(key: str) -> int:
    # str.isdigit also knows the digits of other scripts
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise ParameterError(f"logit_bias has the key {key[:40]!r}; keys are token ids", param="logit_bias")
    return int(key)
