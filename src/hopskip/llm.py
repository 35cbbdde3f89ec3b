"""The public face: a model with its tokenizer, text in and text out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from hopskip.checkpoint.generation import recommended_sampling
from hopskip.draft.advice import Advice
from hopskip.engine.engine import Engine, make_engine
from hopskip.engine.turns import Turns, closed
from hopskip.errors import ConfigError, check_choice, check_count, check_names, shown
from hopskip.loading import LoadConfig, LoadOptions, OpenModel, Progress, open_model
from hopskip.sampling_params import SamplingOptions, SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.speculative import SpeculativeConfig
from hopskip.text.bar import bar_of_texts
from hopskip.text.chat import encode_chat
from hopskip.text.grammar import GrammarCompiler, GrammarConstraint
from hopskip.text.inputs import Message, Prompt, chat_list, checked_prompt, params_for, prompt_list, template_variables
from hopskip.text.requests import RequestMaker, text_stream
from hopskip.text.results import GenerationResult, StreamPiece, joined, news_of, result_of
from hopskip.text.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from hopskip.backends.base import Backend

__all__ = ["LLM", "GenerationResult", "Message", "Prompt", "StreamPiece"]


class LLM:
    """A decoder that is its own draft model.

    >>> llm = LLM()                                                              # doctest: +SKIP
    >>> llm.generate("The capital of France is", max_tokens=20)[0].text          # doctest: +SKIP
    >>> llm.chat([{"role": "user", "content": "Name three colours."}])[0].text   # doctest: +SKIP

    Any number of threads may use one LLM; their requests are stepped together. `close()` frees its memory, and so does
    the end of a `with` block.

    Args:
        model: a folder with a Hugging Face checkpoint, a GGUF file, or a Hub id; None is the default model.
        speculative: how to draft and verify; None leaves everything to the model's recommendation.
        max_model_len, max_num_seqs, prefix_caching: see `Engine`.
        generation_config: `auto` chooses tokens as the model's makers recommend, where nothing else is asked for
            (`generation_config.json`, or a GGUF file's `general.sampling`), else greedily; `none` greedily.
        chat_template: in place of the model's own: a file, or the text of a template.
        progress: told what takes its time until the model is ready (loading, packing, measuring), and the share of it
            that is done. Without it nothing is shown, in a terminal neither.
        options: `dtype`, `quantize`, `device`, `backend`, `threads`, `kv_dtype`, see `LoadConfig`.

    Raises:
        CheckpointError: the model cannot be found or read.
        ConfigError: an option cannot work with this model.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        speculative: SpeculativeConfig | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        prefix_caching: bool | None = None,
        generation_config: Literal["auto", "none"] = "auto",
        chat_template: str | Path | None = None,
        progress: Progress | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        check_names("LLM", options, _NAMES_OF_OPTIONS)
        if speculative is not None and not isinstance(speculative, SpeculativeConfig):
            raise ConfigError(f"speculative is {shown(speculative)}; give a SpeculativeConfig")
        check_count("max_num_seqs", max_num_seqs, "a whole number of at least 1")
        if max_model_len is not None:
            check_count("max_model_len", max_model_len, "a whole number of at least 2", least=2)
        check_choice("generation_config", generation_config, Literal["auto", "none"])
        load = LoadConfig(model=model, **options)  # type: ignore[arg-type]  # it takes other names of a dtype
        opened = open_model(load, speculative, progress, chat_template)
        checkpoint, is_auto = opened.checkpoint, generation_config == "auto"
        self.recommended_sampling = recommended_sampling(checkpoint.generation, checkpoint.path) if is_auto else {}
        """Of `SamplingParams`, what the model's makers recommend: the defaults of `generate`, `chat` and `stream`."""
        engine = make_engine(
            opened.backend,
            speculative,
            identity=opened.identity,
            progress=progress or (lambda what, share: None),
            eos_token_ids=opened.tokenizer.eos_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
        )
        self._advice = Advice.of(engine.speculative, engine.gain, opened.backend, checkpoint.fingerprint)
        self._advice.warn_before()
        self._load = load
        self._opened: tuple[OpenModel, Engine] | None = opened, engine
        self._turns = Turns(engine)
        self._grammars = GrammarCompiler(opened.tokenizer, opened.backend.config.vocab_size)
        self.request_maker = RequestMaker(opened.tokenizer, opened.backend.config.vocab_size)
        """Turns what parameters say in texts into token ids."""

    def __repr__(self) -> str:
        name = shown(str(self._load.model)) if self._load.model is not None else ""
        if self._opened is None:
            return f"<LLM({name}), closed>"
        opened, engine = self._opened
        kind = f"{opened.backend.config.model_type}, {self._load.precision} on {opened.backend.traits.name}"
        return f"<LLM({name}): {kind}, draft {engine.speculative.draft!r}, context {engine.max_model_len}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with its chat template."""
        return self._open[0].tokenizer

    @property
    def backend(self) -> Backend:
        """The model's weights, in what runs them."""
        return self._open[0].backend

    @property
    def engine(self) -> Engine:
        """What steps the requests. While other threads generate, it is theirs."""
        return self._open[1]

    @property
    def _open(self) -> tuple[OpenModel, Engine]:
        if self._opened is None:
            raise closed()
        return self._opened

    def close(self) -> None:
        """Free the model's memory. Later calls raise ClosedError, and so do those that other threads are waiting in."""
        self._turns.close()
        self._opened = None
        gc.collect()  # an engine and its parts refer to each other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult]:
        """Generate for one prompt or many; many are stepped together. Results come in the order of the prompts.

        Args:
            prompts: texts, lists of token ids, or chats; one, or any iterable of them.
            sampling_params: for all prompts, or one for each; None: see `generation_config` of `LLM`.
            use_tqdm: show in a terminal, on stderr, how many of several texts are done, if it takes longer than a
                second. (The name is vLLM's; the bar is rich's.)
            options: fields of `SamplingParams`; they go before those of `sampling_params`.

        Raises:
            ConfigError: an option cannot work, or there are not as many `sampling_params` as prompts.
            PromptError: a prompt is empty, no prompt at all, or does not fit the context. Nothing has been generated
                then.
            ClosedError: the LLM has been closed.
        """
        return self._generate(self.requests(prompts, sampling_params, **options), use_tqdm)

    def chat(
        self,
        messages: Seq[Message] | Iterable[Seq[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult]:
        """Answer one chat or several. As `generate`, but for what only chats have.

        Args:
            messages: of one chat, each with `role` and `content`; or several such lists.
            enable_thinking: let the model think first or not, where its template has a switch for that (Qwen3); None
                leaves it to the template.
            chat_template_kwargs: what else the template is told, by the names that it has for it (`tools`, ...).

        Raises:
            ConfigError: also if the model's template has no use for `enable_thinking` or one of
                `chat_template_kwargs`.
            PromptError: also if the model has no chat template, or the template refuses the messages.
        """
        asked = self.requests(
            chat_list(messages),
            sampling_params,
            enable_thinking=enable_thinking,
            chat_template_kwargs=chat_template_kwargs,
            **options,
        )
        return self._generate(asked, use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_draft_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[StreamPiece]:
        """Generate for one prompt, token by token as rounds commit them. Closing the iterator ends the request.

        Args:
            prompt: a text, token ids or a chat.
            sampling_params, options: as `generate`; `n` must be 1.
            enable_thinking, chat_template_kwargs: of a chat, see `chat`.
            max_draft_tokens: see `Request`; 0 decodes this one plainly.
        """
        request = self.request(
            prompt,
            sampling_params,
            enable_thinking=enable_thinking,
            chat_template_kwargs=chat_template_kwargs,
            **options,
        )
        [(sequence, text)] = self._add([replace(request, max_draft_tokens=max_draft_tokens)])
        try:
            is_finished = False
            while not is_finished:
                pieces, is_finished = self._turns.wait(lambda: news_of(sequence, text))
                for token, piece in pieces:
                    is_last = is_finished and token is sequence.tokens[-1]
                    result = result_of(sequence, text) if is_last else None
                    yield StreamPiece(text=piece, token=token, stats=sequence.stats, seed=sequence.seed, result=result)
            if sequence.error is not None:
                raise sequence.error
            self._advice.warn_after()
        finally:
            self._turns.drop([sequence])

    def encode(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt, as `generate` would feed them to the model.

        Args:
            enable_thinking, chat_template_kwargs: of a chat, see `chat`.

        Raises:
            PromptError: the prompt is empty, or no prompt at all.
            ConfigError: something is said of a chat template that this prompt does not go through.
        """
        variables = template_variables(self.tokenizer, enable_thinking, chat_template_kwargs)
        prompt = checked_prompt(prompt)
        if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
            return encode_chat(self.tokenizer, prompt, **variables)  # type: ignore[arg-type]
        if variables:
            raise ConfigError(f"{next(iter(variables))} has no effect on a prompt that is no chat; leave it out")
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)  # type: ignore[arg-type]

    def request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Request:
        """What the engine is asked for by `stream`."""
        ids = self.encode(prompt, enable_thinking=enable_thinking, chat_template_kwargs=chat_template_kwargs)
        [requests] = self.requests([ids], sampling_params, **options)
        if len(requests) > 1:
            raise ConfigError(f"n is {len(requests)}, but a stream has one text; use generate")
        return requests[0]

    def requests(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[list[Request]]:
        """What the engine is asked for by `generate`: for each prompt as many requests as `n` says, whose seeds follow
        each other.

        Raises:
            ConfigError, PromptError: as `generate`.
        """
        thinking: Any = {"enable_thinking": enable_thinking, "chat_template_kwargs": chat_template_kwargs}
        encoded = [self.encode(prompt, **thinking) for prompt in prompt_list(prompts)]
        found = []
        for prompt_ids, params in zip(
            encoded, params_for(len(encoded), sampling_params, options, self.recommended_sampling), strict=True
        ):
            is_plain = params.n == 1 and params.structure is None
            found.append(
                [
                    self.request_maker.request(
                        prompt_ids,
                        params if is_plain else params.of_one_text(index),
                        constraint=self._constraint(params),
                    )
                    for index in range(params.n)
                ]
            )
        return found

    def _constraint(self, params: SamplingParams) -> GrammarConstraint | None:
        if params.structure is None:
            return None
        constraint = self._grammars.compile(*params.structure, strict=params.strict_schema)
        if constraint.dropped:
            dropped = "; ".join(constraint.dropped)
            warnings.warn(f"of the JSON schema this is not enforced: {dropped}", UserWarning, stacklevel=4)
        return constraint

    def _generate(self, asked: list[list[Request]], use_tqdm: bool) -> list[GenerationResult]:
        calls = self._add([request for requests in asked for request in requests])
        try:
            with bar_of_texts(len(calls), use_tqdm) as show:

                def look() -> bool | None:
                    num_done = sum(sequence.is_finished for sequence, _ in calls)
                    show(num_done)
                    return True if num_done == len(calls) else None

                self._turns.wait(look)
        finally:
            # on an error or an interrupt no request may stay behind in the engine
            self._turns.drop([sequence for sequence, _ in calls])
        self._advice.warn_after()
        results = iter([result_of(sequence, text) for sequence, text in calls])
        return [joined([next(results) for _ in requests]) for requests in asked]

    def _add(self, requests: Seq[Request]) -> list[tuple[Sequence, TextStream]]:
        """Queue requests, all or none."""
        engine, tokenizer = self.engine, self.tokenizer
        texts = [text_stream(tokenizer, request) for request in requests]

        def add() -> list[tuple[Sequence, TextStream]]:
            added: list[Sequence] = []
            try:
                for request, text in zip(requests, texts, strict=True):
                    added.append(engine.add(replace(request, is_stop=text.push)))
            except BaseException:
                for sequence in added:
                    engine.abort(sequence)
                raise
            return list(zip(added, texts, strict=True))

        return self._turns.do(add)


_NAMES_OF_OPTIONS = (
    *(
        "speculative",
        "max_model_len",
        "max_num_seqs",
        "prefix_caching",
        "generation_config",
        "chat_template",
        "progress",
    ),
    *(item.name for item in fields(LoadConfig) if item.name != "model"),
)
