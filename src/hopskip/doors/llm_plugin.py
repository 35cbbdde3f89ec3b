"""The plugin for `llm` (https://llm.datasette.io): `llm -m hopskip "..."`. That program finds it by an entry point of
the package, and brings pydantic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import llm
from pydantic import Field

from hopskip.errors import ConfigError

if TYPE_CHECKING:
    from hopskip.llm import LLM

_MAX_TOKENS = 1024
_LOADING = ("model", "dtype", "quantize", "device", "max_model_len")
_DRAFTING = ("draft", "exit_layer", "num_draft_tokens")


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Called by `llm`."""
    register(Hopskip())


class HopskipOptions(llm.Options):  # type: ignore[misc]
    """What `-o NAME VALUE` takes. What is left out is as the model's makers recommend."""

    model: str | None = Field(None, description="A folder, a GGUF file or a Hub id; default: SmolLM2-135M-Instruct")
    max_tokens: int | None = Field(None, description=f"Most tokens of an answer; default: {_MAX_TOKENS}, or the room")
    temperature: float | None = Field(None, description="0 is greedy: always the best token")
    top_k: int | None = Field(None, description="Sample from the k most probable tokens; 0 is all")
    top_p: float | None = Field(None, description="Sample from the fewest tokens that reach this probability")
    min_p: float | None = Field(None, description="Sample from tokens at least this fraction as probable as the best")
    repetition_penalty: float | None = Field(None, description="Above 1: makes tokens seen before less likely")
    presence_penalty: float | None = Field(None, description="Taken off the logit of tokens generated before")
    frequency_penalty: float | None = Field(None, description="The same, for each time")
    seed: int | None = Field(None, description="Same seed, same text (with a temperature)")
    stop: str | None = Field(None, description="The answer ends before this text")
    think: bool | None = Field(None, description="Let the model think first, or not, where its template has a switch")
    draft: Literal["auto", "early-exit", "layer-skip", "exit-branch", "ngram", "both", "none"] | None = Field(
        None, description="Where drafts come from; none decodes plainly. The text is the same"
    )
    exit_layer: int | None = Field(None, description="The first layers that draft")
    num_draft_tokens: int | None = Field(None, description="Most tokens of a draft")
    dtype: str | None = Field(None, description="float32, bfloat16, ...; default: the checkpoint's own")
    quantize: Literal["q8", "q4"] | None = Field(None, description="Pack the weights to 8 or 4 bits")
    device: str | None = Field(None, description="cpu, cuda, ...; default: whichever is faster")
    max_model_len: int | None = Field(None, description="Longest chat; default: the model's context")


class Hopskip(llm.Model):  # type: ignore[misc]
    """All models that hopskip runs, under one name. The one that was used last stays loaded."""

    model_id = "hopskip"
    can_stream = True
    supports_schema = True
    Options = HopskipOptions

    def __init__(self) -> None:
        self._loaded: tuple[dict[str, Any], LLM] | None = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer piece by piece, or whole.

        Raises:
            HopskipError: an option cannot be, or the model cannot be run; `llm` prints the message.
        """
        given = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        model = self._model({name: given.pop(name) for name in (*_LOADING, *_DRAFTING) if name in given})
        think = given.pop("think", None)
        if prompt.schema:
            given["json_schema"] = prompt.schema
        messages: Any = messages_of(prompt, conversation)
        if not model.tokenizer.has_chat_template and len(messages) == 1:
            messages = messages[0]["content"]  # a model that only goes on with a text
        if "max_tokens" not in given:
            room = model.engine.max_model_len - len(model.encode(messages, enable_thinking=think))
            given["max_tokens"] = max(1, min(_MAX_TOKENS, room))
        whole = []
        for piece in model.stream(messages, enable_thinking=think, **given):
            whole.append(piece.text)
            if stream and piece.text:
                yield piece.text
        if not stream:
            yield "".join(whole)
        stats = piece.stats
        response.set_usage(input=stats.num_prompt_tokens, output=stats.num_tokens)
        response.response_json = {"seed": piece.seed, **json.loads(json.dumps(stats.as_dict()))}

    def _model(self, given: dict[str, Any]) -> LLM:
        if self._loaded is None or self._loaded[0] != given:
            from hopskip.llm import LLM
            from hopskip.speculative import SpeculativeConfig

            if self._loaded is not None:
                self._loaded[1].close()
                self._loaded = None
            drafting = {name: given[name] for name in _DRAFTING if name in given}
            loading = {name: value for name, value in given.items() if name not in _DRAFTING}
            speculative = SpeculativeConfig(**drafting) if drafting else None
            self._loaded = dict(given), LLM(**loading, speculative=speculative)
        return self._loaded[1]


def messages_of(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """The whole chat, with the system prompt that holds now.

    Raises:
        ConfigError: it has something that is not text.
    """
    if prompt.attachments or getattr(prompt, "tools", None):
        raise ConfigError("the hopskip model of llm reads text alone; leave attachments and tools out")
    earlier = conversation.responses if conversation is not None else []
    system = prompt.system or next((old.prompt.system for old in reversed(earlier) if old.prompt.system), None)
    messages = [{"role": "system", "content": system}] if system else []
    for old in earlier:
        messages.append({"role": "user", "content": old.prompt.prompt or ""})
        messages.append({"role": "assistant", "content": old.text()})
    return [*messages, {"role": "user", "content": prompt.prompt or ""}]
