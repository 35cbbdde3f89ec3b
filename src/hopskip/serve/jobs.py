"""From requests to jobs for the engine: prompts encoded, limits checked, grammars compiled."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, cast

from hopskip.llm import LLM
from hopskip.sampling_params import SamplingParams
from hopskip.serve import params, schema
from hopskip.serve.batch import Job
from hopskip.serve.chats import ChatFormat, allowed_tools, choice_of, thoughts_of
from hopskip.serve.grammars import Grammars
from hopskip.serve.params import at_most
from hopskip.serve.policy import ParameterError, blamed
from hopskip.serve.settings import ServeSettings
from hopskip.text.answer_reader import AnswerFormat
from hopskip.text.chat import encode_chat
from hopskip.text.grammar import GrammarCompiler, GrammarConstraint, Source, check_depth
from hopskip.text.grammar_build import Kind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one request asks the engine for: choices x prompts jobs, those of one prompt side by side."""

    jobs: list[Job]
    num_choices: int
    echoes: list[str] | None = None
    """Text of each prompt, to be put before its answers."""
    is_race: bool = False
    """The two choices are a race of drafted against plain decoding."""
    answer: AnswerFormat | None = None
    """How the answer is to be read; None if it is plain text."""
    unenforced: list[str] = field(default_factory=list)
    """Parts of tools' schemas that the grammar of calls leaves out."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Parts of the request's JSON schemas that are not enforced."""
        constraints = (job.request.constraint for job in self.jobs)
        return (*self.unenforced, *next((c.dropped for c in constraints if isinstance(c, GrammarConstraint)), ()))


class Planner:
    """Plans requests for one model.

    Every method raises ConfigError or PromptError where a request cannot be served; the message is for the client.
    """

    def __init__(self, llm: LLM, settings: ServeSettings) -> None:
        limits = settings.limits
        self._llm = llm
        self._limits = limits
        self._tokenizer = llm.tokenizer
        self._format = ChatFormat(llm.tokenizer, settings.tool_format, settings.reasoning_format)
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
        if request.suffix:
            message = "suffix is not supported: this model only continues texts; leave it out"
            raise ParameterError(message, param="suffix")
        if request.best_of not in (None, request.n or 1):
            message = f"best_of={request.best_of} is not supported; leave it out, or make it equal to n"
            raise ParameterError(message, param="best_of")
        at_most("logprobs", request.logprobs, self._limits.num_logprobs)
        prompts = _prompts(request.prompt)
        at_most("the number of prompts", len(prompts), self._limits.num_prompts, "prompt")
        with_bos = request.add_special_tokens is not False
        largest = max((max(prompt, default=0) for prompt in prompts if isinstance(prompt, list)), default=0)
        at_most("a token id of the prompt", largest, self._llm.backend.config.vocab_size - 1, "prompt")
        encoded = [p if isinstance(p, list) else await self.encode(p, with_bos) for p in prompts]
        jobs = await self._jobs(request, encoded, request.logprobs, params.structure(request))
        echoes = [self._tokenizer.decode(p) if isinstance(p, list) else p for p in prompts] if request.echo else None
        return self._plan(request, jobs, echoes=echoes)

    async def chat(self, request: schema.ChatRequest) -> Plan:
        if request.top_logprobs and not request.logprobs:
            raise ParameterError("top_logprobs has no effect without logprobs=true; leave it out", param="top_logprobs")
        at_most("top_logprobs", request.top_logprobs, self._limits.num_logprobs)
        tools = self._tools(request)
        prompt_ids = await self.chat_prompt(request)
        answer = self._format.answer_format(request, tools, prompt_ids)
        grammar = params.structure(request)
        unenforced: list[str] = []
        if answer is not None and answer.must_call:
            if grammar is not None:
                raise ParameterError(
                    "a form of the text contradicts a tool_choice that asks for a call; leave one out",
                    param="tool_choice",
                )
            grammar, unenforced = self._format.calls_grammar(request, answer)
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        jobs = await self._jobs(request, [prompt_ids], num_logprobs, grammar, answer)
        return self._plan(request, jobs, answer=answer, unenforced=unenforced)

    async def chat_prompt(self, request: schema.ChatRequest) -> list[int]:
        """Token ids of a chat's prompt."""
        return await self.encode_chat(
            request.messages,
            self._tools(request),
            add_generation_prompt=params.add_generation_prompt(request),
            continue_final_message=request.continue_final_message,
            add_special_tokens=bool(request.add_special_tokens),
            **self._format.variables(request),
        )

    async def tokenize(self, request: schema.TokenizeRequest) -> list[int]:
        """Token ids of a text, or of a chat, as a request for an answer would have them."""
        if request.messages is None:
            return await self.encode(request.prompt or "", request.add_special_tokens is not False)
        return await self.encode_chat(
            request.messages,
            request.tools,
            add_generation_prompt=params.add_generation_prompt(request),
            continue_final_message=request.continue_final_message,
            add_special_tokens=bool(request.add_special_tokens),
            **self._format.variables(request),
        )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. In a thread: a long one would keep everybody else waiting."""
        if not text:
            raise ParameterError("the prompt is empty; give some text", param="prompt")
        with blamed("prompt"):
            return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(
        self,
        messages: list[schema.Message],
        tools: list[schema.Tool] | None = None,
        **arguments: Any,
    ) -> list[int]:
        """Token ids of a chat, through the model's template. `arguments`: as `text.chat.encode_chat` takes them."""
        at_most("the number of messages", len(messages), self._limits.num_messages, "messages")
        with blamed("messages"):
            return await asyncio.to_thread(
                encode_chat,
                self._tokenizer,
                [_plain_message(m) for m in messages],
                tools=[t.model_dump(exclude_none=True) for t in tools or ()],
                tool_format=self._format.tool_format,
                **arguments,
            )

    def _tools(self, request: schema.ChatRequest) -> list[schema.Tool]:
        """The tools that the model is told of."""
        tools = request.tools or []
        if not tools:
            if choice_of(request) not in ("none", "auto"):
                raise ParameterError("tool_choice asks for a call, but there are no tools", param="tool_choice")
            return []
        at_most("the number of tools", len(tools), self._limits.num_tools, "tools")
        for tool in tools:
            check_depth(tool.function.parameters, self._limits.grammar_depth)
        return [] if request.tool_choice == "none" else allowed_tools(tools, request.tool_choice)

    async def _jobs(
        self,
        request: schema.Generation,
        prompts: list[list[int]],
        num_logprobs: int | None,
        grammar: tuple[Kind, Source] | None,
        answer: AnswerFormat | None = None,
    ) -> list[Job]:
        num_choices = params.num_choices(request)
        self._check_race(request, len(prompts))
        at_most("n", num_choices, self._limits.num_choices)
        at_most("prompts x n", len(prompts) * num_choices, self._limits.num_sequences, "n")
        params.check_scores(request, sum(map(len, prompts)) * num_choices, self._limits)
        asked = [self._params(request, prompt_ids, num_logprobs) for prompt_ids in prompts]
        max_draft_tokens, exit_layer = params.drafting(request.speculative)
        before = self._format.before_answer(answer)
        constraint = None
        if grammar is not None:
            with blamed(params.structure_param(request)):
                constraint = await self._grammars.compile(*grammar, before=before)

        def make_jobs() -> list[Job]:
            return [
                Job(
                    request=self._llm.request_maker.request(
                        prompt_ids,
                        params.with_seed(own, choice),
                        constraint=constraint.copy() if constraint else None,
                        max_draft_tokens=0 if choice and params.is_race(request) else max_draft_tokens,
                        exit_layer=exit_layer,
                        shown_ids=frozenset() if answer is None else answer.shown_ids,
                    ),
                    num_choices=num_choices,
                    counts_prompt=choice == 0,
                    is_streamed=bool(request.stream),
                )
                for prompt_ids, own in zip(prompts, asked, strict=True)
                for choice in range(num_choices)
            ]

        # to look texts up in a vocabulary takes its time
        return await asyncio.to_thread(make_jobs) if request.bad_words else make_jobs()

    def _plan(self, request: schema.Generation, jobs: list[Job], **more: Any) -> Plan:
        return Plan(jobs=jobs, num_choices=params.num_choices(request), is_race=params.is_race(request), **more)

    def _params(self, request: schema.Generation, prompt_ids: list[int], num_logprobs: int | None) -> SamplingParams:
        """Of the answers to one prompt, which may be longer the shorter it is."""
        room = params.room_for(request, len(prompt_ids), self._llm.engine.max_model_len)
        recommended = self._llm.recommended_sampling
        return params.sampling_params(request, self._limits, recommended, max_tokens=room, num_logprobs=num_logprobs)

    def _check_race(self, request: schema.Generation, num_prompts: int) -> None:
        """Raises ConfigError: there is nothing to race."""
        if not params.is_race(request):
            return
        engine, speculative = self._llm.engine, request.speculative
        if num_prompts > 1 or (request.n or 1) > 1:
            raise ParameterError(
                "speculative.race answers one prompt twice; leave out n and further prompts", param="speculative"
            )
        if engine.speculative.draft == "none" or (speculative is not None and speculative.num_draft_tokens == 0):
            raise ParameterError("speculative.race has no effect without drafts; leave it out", param="speculative")
        if engine.max_num_seqs < 2:
            raise ParameterError(
                "speculative.race decodes two sequences in turn, and this server has room for one", param="speculative"
            )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ParameterError("prompt is an empty list; give a text, token ids, or several of either", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(cast("list[str | list[int]]", prompt))


def _plain_message(message: schema.Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain | thoughts_of(message)


def _plain_call(call: schema.ToolCall) -> dict[str, Any]:
    given = call.function.arguments
    try:
        arguments = (json.loads(given) if given.strip() else {}) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        message = f"the arguments of tool call {call.id[:64]!r} are not JSON"
        raise ParameterError(message, param="messages") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
