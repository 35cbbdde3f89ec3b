"""What goes back to clients, in OpenAI's shapes: whole answers and the chunks of streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from hopskip.llm import LLM
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Sequence, SpeculativeStats, Token
from hopskip.serve import logprobs, schema
from hopskip.serve.batch import Batch, Generation, Piece
from hopskip.serve.engine_thread import UnavailableError
from hopskip.serve.events import line_of
from hopskip.serve.jobs import Plan
from hopskip.text.answer_reader import AnswerFormat, AnswerReader
from hopskip.text.tokenizer import Detokenizer
from hopskip.text.tools.base import CallDelta, Delta, joined


class Answer:
    """One request's answer as it grows.

    Args:
        request: a chat or a completion.
        batch: of `plan.jobs`.
        id: the request's id, unique.
    """

    def __init__(
        self, request: schema.Generation, plan: Plan, batch: Batch, llm: LLM, model_name: str, id: str
    ) -> None:
        self.is_chat = isinstance(request, schema.ChatRequest)
        self._request = request
        self._plan = plan
        self._batch = batch
        self.race = batch.race
        self._choices = [_Choice(i, self, generation, plan, llm) for i, generation in enumerate(batch.generations)]
        self._model_name = model_name
        self._id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{id}"
        self._created = int(time.time())
        self._is_cancelled = False

    @property
    def dropped(self) -> tuple[str, ...]:
        """Parts of the request's JSON schemas that are not enforced."""
        return self._plan.dropped

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(job.request.prompt_ids) for job in self._plan.jobs[:: self._plan.num_choices])

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen."""
        return self._plan.jobs[0].request.params

    @property
    def stop_text(self) -> str | None:
        """Which of the request's stop texts has ended the first choice."""
        return self._batch.generations[0].text.stopped_by

    def cancel(self) -> None:
        """End it, if it has not ended; its rows are free for the next step."""
        self._is_cancelled = True
        self._batch.cancel()

    @property
    def wants_logprobs(self) -> bool:
        request = self._request
        return bool(request.logprobs) if isinstance(request, schema.ChatRequest) else self.num_logprobs is not None

    @property
    def num_logprobs(self) -> int | None:
        """Of a completion."""
        return self._request.logprobs if isinstance(self._request, schema.CompletionRequest) else None

    @property
    def echoes_logprobs(self) -> bool:
        """Of a completion that begins with its prompt."""
        return self._plan.echoes is not None and self.num_logprobs is not None

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self._request.prompt_logprobs

    @property
    def wants_tokens(self) -> bool:
        return bool(self._request.return_tokens)

    async def whole(self) -> dict[str, Any]:
        """The answer, once all of it is there."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for index, new in self._batch:
            if new is None:
                self._refuse_cut(self._choices[index])
            pieces[index] += new or []
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = [choice.whole(all_of_it) for choice, all_of_it in zip(self._choices, pieces, strict=True)]
        answer = {**self._head(kind), "choices": choices, "usage": self.usage, **self._dropped()}
        if self.is_chat and self._request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._choices[0].prompt_logprobs()
        return answer

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream: one per choice and step, in the order in which the engine makes them."""
        options = self._request.stream_options
        with_usage = bool(options and options.include_usage)
        is_continuous = bool(options and with_usage and options.continuous_usage_stats)
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        if with_usage:
            head["usage"] = None
        for choice in self._choices:
            opening = choice.opening()
            if opening is not None:
                yield {**head, "choices": [opening], **(self._usage_so_far() if is_continuous else {})}
        async for index, pieces in self._batch:
            choice = self._choices[index]
            if pieces is None:
                self._refuse_cut(choice)
            parts = [choice.echo_part(), choice.last_part() if pieces is None else choice.part(pieces)]
            for part in filter(None, parts):
                more = self._usage_so_far() if is_continuous else {}
                yield {**head, "choices": [part], **more, **(self._dropped() if pieces is None else {})}
        if with_usage:
            yield {**head, "choices": [], "usage": self.usage}

    def _dropped(self) -> dict[str, Any]:
        """Tells which parts of a JSON schema were not enforced."""
        return {"hopskip": {"dropped": list(self.dropped)}} if self.dropped else {}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model_name}

    def _usage_so_far(self) -> dict[str, Any]:
        """Of what has been told. The engine is ahead of it."""
        sequences = [generation.sequence for generation in self._batch.generations]
        num_prompt = sum(sequence.num_prompt_tokens for sequence in sequences[:: self._plan.num_choices])
        num_new = sum(choice.num_told for choice in self._choices)
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
        return {"usage": usage}

    def _refuse_cut(self, choice: _Choice) -> None:
        """Raises UnavailableError: the server has ended an answer before its time. Nobody must take it for whole."""
        if choice.is_cut and not self._is_cancelled:
            raise UnavailableError("the server is shutting down and has cut this answer; try again elsewhere")

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts and of the answer so far."""
        stats = [g.sequence.stats for g in self._batch.generations]
        firsts = stats[:: self._plan.num_choices]  # a prompt counts once, however many answers it gets
        num_prompt, num_new = sum(s.num_prompt_tokens for s in firsts), sum(s.num_tokens for s in stats)
        num_drafted, num_accepted = sum(s.num_draft_tokens for s in stats), sum(s.num_accepted_tokens for s in stats)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": sum(s.num_cached_prompt_tokens for s in firsts)},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.num_reasoning_tokens for choice in self._choices),
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": num_drafted - num_accepted,
            },
            "speedup_over_plain": _speedup(stats),
        }


class _Choice:
    """One of an answer's choices: either `whole`, or a stream of `opening`, any number of `part` and `last_part`.

    It keeps no text, so a step costs what is new in it, however long the answer is already.
    """

    def __init__(self, index: int, answer: Answer, generation: Generation, plan: Plan, llm: LLM) -> None:
        self._index = index
        self._answer = answer
        self._generation = generation
        self._llm = llm
        self._race = answer.race
        self._echo = plan.echoes[index // plan.num_choices] if plan.echoes else None
        self._reader = AnswerReader(plan.answer or AnswerFormat())
        prompt_ids = generation.sequence.request.prompt_ids
        self._texts = logprobs.TokenTexts(llm.tokenizer, () if answer.echoes_logprobs else prompt_ids)
        self._offset = 0 if answer.echoes_logprobs else len(self._echo or "")
        """Where the text of the next piece begins, for completions with log-probabilities."""
        self._has_echoed = self._echo is None
        self.num_told = 0
        """Tokens that have been told of."""

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reader.num_reasoning_pieces

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The choice, from all of its pieces."""
        delta = joined([*map(self._read, pieces), self._end()])
        text, calls = delta.content, delta.calls
        choice: dict[str, Any] = {"index": self._index}
        if self._answer.is_chat:
            choice["message"] = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
            choice["message"] |= _reasoning(delta.reasoning)
            if calls:
                choice["message"]["tool_calls"] = [
                    {key: value for key, value in _call(call).items() if key != "index"} for call in calls
                ]
        else:
            choice["text"] = (self._echo or "") + text
        choice["logprobs"] = _joined(self._echoed_logprobs(), self._logprobs(pieces))
        choice["finish_reason"] = self._finish_reason()
        choice |= self._seed()
        if not self._answer.is_chat and (scores := self.prompt_logprobs()) is not None:
            choice["prompt_logprobs"] = scores
        if self._answer.wants_tokens:
            choice["hopskip"] = self._details(pieces)
        return choice

    @property
    def is_cut(self) -> bool:
        return self._generation.finish_reason == "abort"

    def prompt_logprobs(self) -> list[Any] | None:
        """Of the prompt, if the request asks for them by this name."""
        number = self._answer.num_prompt_logprobs
        if number is None:
            return None
        sequence = self._generation.sequence
        return logprobs.of_prompt(self._llm.tokenizer, _prompt_ids(sequence), sequence.prompt_scores, number)

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with, before any token."""
        if self._answer.is_chat:
            return self._delta({"role": "assistant", "content": ""})
        return None if self._answer.echoes_logprobs else self.echo_part()

    def echo_part(self) -> dict[str, Any] | None:
        """The prompt, the first time that it is called; with log-probabilities, which are there once it is read."""
        if self._has_echoed:
            return None
        self._has_echoed = True
        part = self._delta(self._echo)
        part["logprobs"] = self._echoed_logprobs()
        return part

    def part(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """A chunk's choice, from a step's pieces; None if it would say nothing."""
        self.num_told += len(pieces)
        delta = joined(map(self._read, pieces))
        if not delta and not self._answer.wants_logprobs and not self._answer.wants_tokens:
            return None
        part = self._part(delta, with_content=True)
        part["logprobs"] = self._logprobs(pieces)
        if self._answer.wants_tokens:
            part["hopskip"] = self._details(pieces)
        return part

    def last_part(self) -> dict[str, Any]:
        """The choice of the chunk that ends the stream: what has been held back, calls, and why it ends."""
        part = self._part(self._end(), with_content=False)
        part["finish_reason"] = self._finish_reason()
        part |= self._seed()
        if self._answer.wants_tokens:
            part["hopskip"] = self._details([])
        return part

    def _seed(self) -> dict[str, int]:
        """Of a drawn text: a request with this seed gets it again."""
        seed = self._generation.sequence.seed
        return {} if seed is None else {"seed": seed}

    def _read(self, piece: Piece) -> Delta:
        return self._reader.push(piece.text)

    def _end(self) -> Delta:
        """What has been held back."""
        return self._reader.finish(is_cut=self._generation.finish_reason != "stop")

    def _finish_reason(self) -> str:
        if self._generation.finish_reason != "stop":
            return "length"
        return "tool_calls" if self._reader.has_calls else "stop"

    def _part(self, delta: Delta, *, with_content: bool) -> dict[str, Any]:
        """A chunk's choice.

        Args:
            with_content: though it be empty, if there is nothing else.
        """
        if not self._answer.is_chat:
            return self._delta(delta.content)
        told: dict[str, Any] = _reasoning(delta.reasoning)
        if delta.calls:
            told["tool_calls"] = [_call(call) for call in delta.calls]
        if delta.content or (with_content and not told):
            told["content"] = delta.content
        return self._delta(told)

    def _delta(self, content: Any) -> dict[str, Any]:
        key = "delta" if self._answer.is_chat else "text"
        return {"index": self._index, key: content, "logprobs": None, "finish_reason": None}

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """Of the next pieces, in the API's shape."""
        if not self._answer.wants_logprobs:
            return None
        tokens = [piece.token for piece in pieces]
        if self._answer.is_chat:
            return logprobs.of_chat(self._texts, tokens)
        return self._told(logprobs.of_completion(self._texts, tokens), [piece.text for piece in pieces])

    def _echoed_logprobs(self) -> dict[str, Any] | None:
        """Of the prompt, if it is echoed with them."""
        number = self._answer.num_logprobs
        if not self._answer.echoes_logprobs or number is None:
            return None
        sequence = self._generation.sequence
        detokenizer = Detokenizer(self._llm.tokenizer)
        texts = [detokenizer.push(token_id) for token_id in _prompt_ids(sequence)]
        return self._told(logprobs.of_echo(self._texts, _prompt_ids(sequence), sequence.prompt_scores, number), texts)

    def _told(self, told: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        """With where these texts begin."""
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {**told, "text_offset": offsets}

    def _details(self, pieces: list[Piece]) -> dict[str, Any]:
        """Everything about these tokens, and the figures of the request so far, for those who ask (the page does)."""
        tokens = [
            {
                "id": piece.token.id,
                "text": piece.text,
                "token": logprobs.token_text(self._llm.tokenizer, piece.token.id),
                "origin": piece.token.origin,
                "layer": self._layer(piece.token),
                "logprob": logprobs.finite(piece.token.logprob),
                "top": [
                    {"token": logprobs.token_text(self._llm.tokenizer, i), "logprob": logprobs.finite(value)}
                    for i, value in (piece.token.top_logprobs or {}).items()
                ],
            }
            for piece in pieces
        ]
        sequence = self._generation.sequence
        details = {"tokens": tokens, "stats": sequence.stats.as_dict()}
        return details if self._race is None else {**details, "race": self._race.figures(sequence)}

    def _layer(self, token: Token) -> int | None:
        """Layers that a token's author ran: the exit's for early-exit drafts, none for copies, else all."""
        if token.origin == "ngram":
            return None
        if token.origin in ("target", "bonus"):
            return self._llm.backend.config.num_hidden_layers
        trained_exit = self._llm.backend.trained_exit
        if token.origin == "exit-branch":
            return trained_exit.config.start if trained_exit is not None else None
        speculative = self._llm.engine.speculative
        if token.origin == "layer-skip":
            return self._llm.backend.config.num_hidden_layers - len(speculative.skip_layers or ())
        return self._generation.sequence.request.exit_layer or speculative.exit_layer


def event(chunk: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    data = chunk if isinstance(chunk, str) else line_of(chunk)
    return f"data: {data}\n\n".encode()


def _speedup(stats: list[SpeculativeStats]) -> float | None:
    """Of all texts of an answer, over plain decoding: see `SpeculativeStats.speedup_over_plain`."""
    known = [(s.decode_seconds, s.speedup_over_plain) for s in stats if s.speedup_over_plain is not None]
    seconds = sum(each for each, _ in known)
    return round(sum(each * speedup for each, speedup in known) / seconds, 3) if seconds else None


def _reasoning(thoughts: str) -> dict[str, str]:
    """Under both names that clients know."""
    return {"reasoning_content": thoughts, "reasoning": thoughts} if thoughts else {}


def _call(call: CallDelta) -> dict[str, Any]:
    """A delta of a call: its first one has id and name."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two parts of a completion's log-probabilities, one after the other."""
    return second if first is None or second is None else {key: first[key] + second[key] for key in first}


def _prompt_ids(sequence: Sequence) -> list[int]:
    return sequence.token_ids[: sequence.num_prompt_tokens]
