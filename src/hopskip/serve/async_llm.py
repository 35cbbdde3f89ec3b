"""`LLM` for programs that run an event loop: the engine steps in a thread of its own, as under the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from hopskip.engine.turns import closed
from hopskip.errors import ConfigError
from hopskip.llm import LLM
from hopskip.loading import LoadOptions, Progress
from hopskip.sampling_params import SamplingOptions, SamplingParams
from hopskip.sequence import Request
from hopskip.serve.batch import Batch, Job
from hopskip.serve.engine_thread import EngineThread
from hopskip.speculative import SpeculativeConfig
from hopskip.text.inputs import Message, Prompt, chat_list
from hopskip.text.requests import text_stream
from hopskip.text.results import GenerationResult, StreamPiece, joined, result_of
from hopskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncLLM:
    """An LLM to be awaited. All its requests are stepped together; one whose task is cancelled is dropped.

    >>> async with AsyncLLM() as llm:                                            # doctest: +SKIP
    ...     [result] = await llm.generate("The capital of France is", max_tokens=20)
    ...     async for piece in llm.stream("Once upon a time"):
    ...         print(piece.text, end="")

    Loading takes its time when it is made, before anything is awaited. It may be used from one event loop at a time.

    Args: as `LLM`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        speculative: SpeculativeConfig | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        prefix_caching: bool | None = None,
        progress: Progress | None = None,
        generation_config: Literal["auto", "none"] = "auto",
        chat_template: str | Path | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        self._llm = LLM(
            model,
            speculative=speculative,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
            progress=progress,
            generation_config=generation_config,
            chat_template=chat_template,
            **options,
        )
        self._thread: EngineThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return repr(self._llm).replace("<LLM(", "<AsyncLLM(", 1)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with its chat template."""
        return self._llm.tokenizer

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult]:
        """Generate for one prompt or many: see `LLM.generate`, whose arguments and errors these are.

        Raises:
            GenerationError: a request has failed inside the engine.
            UnavailableError: the engine has died.
        """
        return await self._generate(partial(self._llm.requests, prompts, sampling_params, **options))

    async def chat(
        self,
        messages: Seq[Message] | Iterable[Seq[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult]:
        """Answer one chat or several: see `LLM.chat`."""
        ask = partial(
            self._llm.requests,
            chat_list(messages),
            sampling_params,
            enable_thinking=enable_thinking,
            chat_template_kwargs=chat_template_kwargs,
            **options,
        )
        return await self._generate(ask)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncIterator[StreamPiece]:
        """Generate for one prompt, token by token: see `LLM.stream`. Closing the iterator ends the request; so does
        leaving the loop over it."""
        request = await self._in_thread(
            partial(
                self._llm.request,
                prompt,
                sampling_params,
                enable_thinking=enable_thinking,
                chat_template_kwargs=chat_template_kwargs,
                **options,
            )
        )
        batch = await self._running().submit([Job(request=request)])
        try:
            [generation] = batch.generations
            sequence = generation.sequence
            async for _, pieces in batch:
                for piece in pieces or ():
                    is_last = sequence.is_finished and piece.token is sequence.tokens[-1]
                    result = result_of(sequence, generation.text) if is_last and not _is_cut(batch) else None
                    yield StreamPiece(
                        text=piece.text, token=piece.token, stats=sequence.stats, seed=sequence.seed, result=result
                    )
            if _is_cut(batch):
                raise closed()
        finally:
            batch.cancel()

    async def close(self) -> None:
        """Drop all requests and free the model's memory. Whoever awaits a text, or asks for one later, gets a
        ClosedError."""
        self._is_closed = True
        if self._thread is not None:
            await self._thread.stop()
            self._thread = None
        self._llm.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _generate(self, ask: Callable[[], list[list[Request]]]) -> list[GenerationResult]:
        asked = await self._in_thread(ask)
        jobs = [Job(request=request, is_streamed=False) for requests in asked for request in requests]
        batch = await self._running().submit(jobs)
        try:
            async for _ in batch:
                pass
            if _is_cut(batch):
                raise closed()
        finally:
            batch.cancel()
        results = iter([result_of(generation.sequence, generation.text) for generation in batch.generations])
        return [joined([next(results) for _ in requests]) for requests in asked]

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Encoding a long text, or compiling a grammar, must not hold up the event loop."""
        if self._is_closed:
            raise closed()
        return await asyncio.to_thread(work)

    def _running(self) -> EngineThread:
        """The engine's thread, which calls back in the event loop that runs now.

        Raises:
            ConfigError: it belongs to another one, which may still run.
        """
        if self._is_closed:
            raise closed()
        loop = asyncio.get_running_loop()
        if self._thread is not None and self._loop is not loop:
            assert self._loop is not None
            if not self._loop.is_closed():
                raise ConfigError("this AsyncLLM is used in another event loop that is still open; use it in one only")
            self._thread.end()
            self._thread = None
        if self._thread is None:
            make_text = partial(text_stream, self._llm.tokenizer)
            self._thread, self._loop = EngineThread(self._llm.engine, make_text, max_queue=sys.maxsize), loop
            self._thread.start()
        return self._thread


def _is_cut(batch: Batch) -> bool:
    """True if texts have been ended by `close`."""
    return any(generation.finish_reason == "abort" for generation in batch.generations)
