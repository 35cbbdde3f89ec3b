"""From requests to jobs for the engine: prompts encoded, limits checked, grammars compiled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from hopskip.errors import ConfigError, PromptError
from hopskip.llm import LLM
from hopskip.sampling_params import SamplingParams, with_defaults
from hopskip.sequence import Request
from hopskip.serve import schema
from hopskip.serve.batch import Job
from hopskip.serve.grammars import Grammars
from hopskip.serve.settings import Limits
from hopskip.serve.tools import Notation
from hopskip.text.grammar import GrammarCompiler, GrammarConstraint
from hopskip.text.grammar_build import Kind
from hopskip.text.json_schema import STRICT


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one request asks the engine for: choices x prompts jobs, those of one prompt side by side."""

    jobs: list[Job]
    num_choices: int
    echoes: list[str] | None = None
    """Text of each prompt, to be put before its answers."""
    tools: list[schema.Tool] = field(default_factory=list)
    is_race: bool = False
    """The two choices are a race of drafted against plain decoding."""
    notation: Notation | None = None
    """How tool calls are written; None if the answer cannot have any."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Parts of the request's JSON schemas that are not enforced."""
        constraints = (job.request.constraint for job in self.jobs)
        return next((c.dropped for c in constraints if isinstance(c, GrammarConstraint)), ())


_CHOSEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of a request that a model's makers may have an opinion of."""


class Planner:
    """Plans requests for one model.

    Every method raises ConfigError or PromptError where a request cannot be served; the message is for the client.
    """

    def __init__(self, llm: LLM, limits: Limits) -> None:
        self._llm = llm
        self._limits = limits
        self._tokenizer = llm.tokenizer
        compiler = GrammarCompiler(
            llm.tokenizer,
            llm.backend.config.vocab_size,
            max_chars=limits.grammar_chars,
            max_depth=limits.grammar_depth,
        )
        self._grammars = Grammars(compiler, limits)

    async def close(self) -> None:
        """End the processes that compile grammars."""
        await self._grammars.close()

    async def completion(self, request: schema.CompletionRequest) -> Plan:
        if request.suffix is not None:
            raise ConfigError("suffix is not supported: this model only continues texts; leave it out")
        if request.best_of not in (None, request.n or 1):
            raise ConfigError(f"best_of={request.best_of} is not supported; leave it out, or make it equal to n")
        if request.echo and request.logprobs is not None:
            raise ConfigError("echo with logprobs is not supported: prompts have no log-probabilities here")
        _at_most("logprobs", request.logprobs, self._limits.num_logprobs)
        prompts = _prompts(request.prompt)
        _at_most("the number of prompts", len(prompts), self._limits.num_prompts)
        encoded = [p if isinstance(p, list) else await self.encode(p) for p in prompts]
        constraint = _format(request.response_format)
        jobs = await self._jobs(request, encoded, request.max_tokens or 16, request.logprobs, constraint)
        echoes = [self._tokenizer.decode(p) if isinstance(p, list) else p for p in prompts] if request.echo else None
        return Plan(jobs=jobs, num_choices=_num_choices(request), echoes=echoes, is_race=_is_race(request))

    async def chat(self, request: schema.ChatRequest) -> Plan:
        if request.top_logprobs is not None and not request.logprobs:
            raise ConfigError("top_logprobs has no effect without logprobs=true; leave it out")
        _at_most("top_logprobs", request.top_logprobs, self._limits.num_logprobs)
        if None not in (request.max_tokens, request.max_completion_tokens):
            raise ConfigError("max_tokens and max_completion_tokens are the same thing; leave one out")
        tools, notation = self._tools(request)
        prompt_ids = await self.encode_chat(request.messages, tools)
        constraint = _format(request.response_format)
        if notation is not None and request.tool_choice not in (None, "auto"):
            if constraint is not None:
                raise ConfigError("response_format contradicts a tool_choice that asks for a call; leave one out")
            parallel = request.parallel_tool_calls is not False and request.tool_choice == "required"
            constraint = ("lark", notation.grammar(_chosen(tools, request.tool_choice), parallel=parallel))
        room = self._llm.engine.max_model_len - len(prompt_ids)
        max_tokens = request.max_tokens or request.max_completion_tokens or max(1, room)
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        jobs = await self._jobs(request, [prompt_ids], max_tokens, num_logprobs, constraint)
        return Plan(
            jobs=jobs, num_choices=_num_choices(request), tools=tools, notation=notation, is_race=_is_race(request)
        )

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text. In a thread: a long one would keep everybody else waiting."""
        if not text:
            raise PromptError("the prompt is empty; give some text")
        return await asyncio.to_thread(self._tokenizer.encode, text)

    async def encode_chat(
        self,
        messages: list[schema.Message],
        tools: list[schema.Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat, through the model's template."""
        _at_most("the number of messages", len(messages), self._limits.num_messages)
        variables = {"tools": [t.model_dump(exclude_none=True) for t in tools]} if tools else {}
        return await asyncio.to_thread(
            self._tokenizer.apply_chat_template,
            [_plain_message(m) for m in messages],
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def _tools(self, request: schema.ChatRequest) -> tuple[list[schema.Tool], Notation | None]:
        """The tools that the model is told of, and how it writes calls."""
        tools = request.tools or []
        if not tools:
            if request.tool_choice not in (None, "none", "auto") or request.parallel_tool_calls is not None:
                raise ConfigError("tool_choice and parallel_tool_calls have no effect without tools; leave them out")
            return [], None
        _at_most("the number of tools", len(tools), self._limits.num_tools)
        source = self._tokenizer.chat_template or ""
        if not self._tokenizer.has_tools_template:
            raise ConfigError("this model's chat template has no place for tools; leave tools out")
        if request.tool_choice == "none":
            return [], None
        return tools, Notation.of_template(source)

    async def _jobs(
        self,
        request: schema.Generation,
        prompts: list[list[int]],
        max_tokens: int,
        num_logprobs: int | None,
        grammar: tuple[Kind, str | Mapping[str, Any]] | None,
    ) -> list[Job]:
        num_choices = _num_choices(request)
        self._check_race(request, len(prompts))
        _at_most("n", num_choices, self._limits.num_choices)
        _at_most("prompts x n", len(prompts) * num_choices, self._limits.num_sequences)
        params = self._params(request, max_tokens, num_logprobs)
        max_draft_tokens, exit_layer = _drafting(request.speculative)
        constraint = await self._grammars.compile(*grammar) if grammar else None
        jobs = []
        for prompt_ids in prompts:
            for choice in range(num_choices):
                seed = None if params.seed is None else (params.seed + choice) % 2**63
                jobs.append(
                    Job(
                        request=Request(
                            prompt_ids,
                            _with_seed(params, seed),
                            constraint=constraint.copy() if constraint else None,
                            max_draft_tokens=0 if choice and _is_race(request) else max_draft_tokens,
                            exit_layer=exit_layer,
                        ),
                        is_streamed=bool(request.stream),
                    )
                )
        return jobs

    def _check_race(self, request: schema.Generation, num_prompts: int) -> None:
        """Raises ConfigError: there is nothing to race."""
        if not _is_race(request):
            return
        engine, speculative = self._llm.engine, request.speculative
        if num_prompts > 1 or (request.n or 1) > 1:
            raise ConfigError("speculative.race answers one prompt twice; leave out n and further prompts")
        if engine.speculative.draft == "none" or (speculative is not None and speculative.num_draft_tokens == 0):
            raise ConfigError("speculative.race has no effect without drafts; leave it out")
        if engine.max_num_seqs < 2:
            raise ConfigError("speculative.race decodes two sequences in turn, and this server has room for one")

    def _params(self, request: schema.Generation, max_tokens: int, num_logprobs: int | None) -> SamplingParams:
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        _at_most("the number of stop texts", len(stop), self._limits.num_stops)
        _at_most("the length of a stop text", max(map(len, stop), default=0), self._limits.stop_chars)
        _at_most("the number of stop_token_ids", len(request.stop_token_ids or ()), self._limits.num_biases)
        _at_most("the number of logit_bias entries", len(request.logit_bias or ()), self._limits.num_biases)
        if request.return_tokens is True and num_logprobs is None:
            num_logprobs = 5  # probability and alternatives of each token
        # what the client leaves out is as the model's makers recommend it, else as OpenAI has it
        asked = {name: getattr(request, name) for name in _CHOSEN if name in request.model_fields_set}
        chosen = {name: value for name, value in asked.items() if value is not None}
        recommended = {"temperature": 1.0, **self._llm.recommended_sampling}
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
                "logprobs": num_logprobs,
            },
            recommended,
        )


def _at_most(what: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise ConfigError(f"{what} is {value}; at most {limit} is allowed here")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise PromptError("prompt is an empty list; give a text, token ids, or several of either")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(cast("list[str | list[int]]", prompt))


def _format(response_format: Any) -> tuple[Kind, str | Mapping[str, Any]] | None:
    """The grammar that a response format stands for."""
    if isinstance(response_format, schema.JSONObjectFormat):
        return "json_schema", response_format.schema_ or {"type": "object"}
    if isinstance(response_format, schema.JSONSchemaFormat):
        given = response_format.json_schema
        return "json_schema", {**given.schema_, STRICT: True} if given.strict else given.schema_
    if isinstance(response_format, schema.RegexFormat):
        return "regex", response_format.pattern
    if isinstance(response_format, schema.GrammarFormat):
        return "lark", response_format.grammar
    return None


def _chosen(tools: list[schema.Tool], choice: Any) -> list[schema.Tool]:
    if not isinstance(choice, schema.NamedTool):
        return tools
    chosen = [tool for tool in tools if tool.function.name == choice.function.name]
    if not chosen:
        raise ConfigError(f"tool_choice names {choice.function.name!r}, which is not among the tools")
    return chosen[:1]


def _drafting(speculative: schema.Speculative | None) -> tuple[int | None, int | None]:
    """`max_draft_tokens` and `exit_layer` of a job."""
    if speculative is None:
        return None, None
    if speculative.enabled:
        return speculative.num_draft_tokens, speculative.exit_layer
    if speculative.num_draft_tokens or speculative.exit_layer is not None or speculative.race:
        raise ConfigError(
            "speculative.enabled=false leaves nothing to num_draft_tokens, exit_layer and race; leave them out"
        )
    return 0, None


def _is_race(request: schema.Generation) -> bool:
    return request.speculative is not None and request.speculative.race


def _num_choices(request: schema.Generation) -> int:
    return 2 if _is_race(request) else request.n or 1


def _with_seed(params: SamplingParams, seed: int | None) -> SamplingParams:
    return params if seed is None else replace(params, seed=seed)


def _token_id(key: str) -> int:
    # str.isdigit also knows the digits of other scripts
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise ConfigError(f"logit_bias has the key {key[:40]!r}; keys are token ids")
    return int(key)


def _plain_message(message: schema.Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text or "",
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain


def _plain_call(call: schema.ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise PromptError(f"the arguments of tool call {call.id[:64]!r} are not JSON") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
