"""The public face: a model with its tokenizer, text in and text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from hopskip.checkpoint.generation import recommended_sampling
from hopskip.draft.advice import Advice
from hopskip.engine.engine import make_engine
from hopskip.errors import ConfigError, PromptError, check_choice
from hopskip.loading import LoadConfig, LoadOptions, Progress, open_model
from hopskip.sampling_params import SamplingParams, with_defaults
from hopskip.sequence import FinishReason, Request, Sequence, SpeculativeStats, Token
from hopskip.speculative import SpeculativeConfig
from hopskip.text.tokenizer import Detokenizer, TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

Message = Mapping[str, str]
"""One turn of a chat: `{"role": "user", "content": "..."}`."""

Prompt = str | Seq[int] | Seq[Message]
"""A text, token ids, or a chat, which the checkpoint's own template turns into text."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What one prompt gave."""

    text: str
    """The generated text, without special tokens and without the stop string that ended it."""
    tokens: list[Token]
    """Id, origin and log-probabilities of every generated token, an ending EOS included."""
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    stats: SpeculativeStats
    seed: int | None = None
    """Of a drawn text, given or fresh: with it, `generate` gives this text again. None of a greedy one."""

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float] | None:
        """Log-probability of every token, if they were asked for."""
        values = [token.logprob for token in self.tokens if token.logprob is not None]
        return values if len(values) == len(self.tokens) else None


@dataclass(frozen=True, kw_only=True)
class StreamPiece:
    """One generated token of a stream, with the text that became certain with it (possibly none)."""

    text: str
    token: Token
    stats: SpeculativeStats
    """Of the request so far; they go on changing until the last piece."""
    seed: int | None = None
    """See `GenerationResult`."""
    result: GenerationResult | None = None
    """The whole result; on the last piece only."""


class LLM:
    """A decoder that is its own draft model.

    >>> llm = LLM()                                             # doctest: +SKIP
    >>> llm.generate("The capital of France is")[0].text        # doctest: +SKIP

    Not safe for use from several threads at once.

    Args:
        model: a folder with a Hugging Face checkpoint, a GGUF file, or a Hub id; None is the default model.
        speculative: how to draft and verify; None leaves everything to the model's recommendation.
        max_model_len, max_num_seqs, prefix_caching: see `Engine`.
        generation_config: `auto`: where nothing else is asked for, tokens are chosen as the model's makers recommend
            (`generation_config.json`, or a GGUF file's `general.sampling` settings), else greedily. `none`: greedily.
        progress: told the share of the weights loaded so far, up to 1.
        on_preparing: told what must be measured or searched for first, and the share of it that is done.
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
        progress: Progress | None = None,
        on_preparing: Callable[[str, float], None] = lambda what, share: None,
        **options: Unpack[LoadOptions],
    ) -> None:
        check_choice("generation_config", generation_config, Literal["auto", "none"])
        opened = open_model(LoadConfig(model=model, **options), speculative, progress)
        self.recommended_sampling = (
            recommended_sampling(opened.checkpoint.generation, opened.checkpoint.path)
            if generation_config == "auto"
            else {}
        )
        """Of `SamplingParams`, what the model's makers recommend: the defaults of `generate` and `stream`."""
        self.tokenizer = opened.tokenizer
        self.backend = opened.backend
        self.engine = make_engine(
            opened.backend,
            speculative,
            identity=opened.identity,
            progress=on_preparing,
            eos_token_ids=opened.tokenizer.eos_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
        )
        self._advice = Advice.of(
            self.engine.speculative, self.engine.gain, opened.backend, opened.checkpoint.fingerprint
        )
        self._advice.warn_before()

    @property
    def default_params(self) -> SamplingParams:
        """How tokens are chosen if nothing is asked for."""
        return with_defaults({}, self.recommended_sampling)

    def generate(
        self, prompts: Prompt | Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[GenerationResult]:
        """Generate for one prompt or many; many are stepped together. Results come in the order of the prompts.

        Args:
            params: for all prompts, or one for each; taken as they are. None: as the model's makers recommend, else
                greedy (see `generation_config` of `LLM`).

        Raises:
            ConfigError: there are not as many `params` as prompts.
            PromptError: a prompt is empty or does not fit the context. Nothing has been generated then.
        """
        encoded = [self.encode(prompt) for prompt in _as_list(prompts)]
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.default_params] * len(encoded)
        if len(params) != len(encoded):
            raise ConfigError(f"{len(params)} params for {len(encoded)} prompts; give one for each, or one for all")
        requests: list[tuple[Sequence, TextStream]] = []
        try:
            requests.extend(self._add(*request) for request in zip(encoded, params, strict=True))
            while not all(sequence.is_finished for sequence, _ in requests):
                self.engine.step()
        finally:
            # on an error or an interrupt no request may stay behind in the engine
            for sequence, _ in requests:
                self.engine.abort(sequence)
        self._advice.warn_after(self.engine.gain)
        return [_result(sequence, text) for sequence, text in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamPiece]:
        """Generate for one prompt, token by token as rounds commit them. Closing the iterator ends the request."""
        sequence, text = self._add(self.encode(prompt), params or self.default_params)
        try:
            while not sequence.is_finished:
                self.engine.step()
                for token, piece in text.take(sequence.tokens, is_finished=sequence.is_finished):
                    is_last = sequence.is_finished and token is sequence.tokens[-1]
                    result = _result(sequence, text) if is_last else None
                    yield StreamPiece(text=piece, token=token, stats=sequence.stats, seed=sequence.seed, result=result)
        finally:
            self.engine.abort(sequence)
        self._advice.warn_after(self.engine.gain)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as `generate` would feed them to the model."""
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty; give some text")
            return self.tokenizer.encode(prompt)
        if not prompt:
            raise PromptError("the prompt is empty; give token ids or chat messages")
        if isinstance(prompt[0], int):
            return [int(cast(int, token_id)) for token_id in prompt]
        return self.tokenizer.apply_chat_template(cast("Seq[Message]", prompt))

    def _add(self, prompt_ids: list[int], params: SamplingParams) -> tuple[Sequence, TextStream]:
        text = TextStream(Detokenizer(self.tokenizer, prompt_ids), params.stop)
        return self.engine.add(Request(prompt_ids, params, text.push)), text


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or many: a text, a list of ids and a list of messages are one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int | Mapping):
        return [cast(Prompt, prompts)]
    return list(cast("Seq[Prompt]", prompts))


def _result(sequence: Sequence, text: TextStream) -> GenerationResult:
    if sequence.error is not None:
        raise sequence.error
    text.finish()
    assert sequence.finish_reason is not None
    return GenerationResult(
        text=text.text,
        tokens=sequence.tokens,
        finish_reason=sequence.finish_reason,
        prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
        stats=sequence.stats,
        seed=sequence.seed,
    )
