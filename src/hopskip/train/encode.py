"""A row of data as token ids, with what of it is to be learned."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hopskip.errors import ConfigError, shown
from hopskip.train.chats import Message, chat_of, is_empty, tools_of
from hopskip.train.read import DataConfig, LossOn


@dataclass(frozen=True)
class Document:
    """Token ids, and whether each is to be learned."""

    ids: list[int]
    learned: list[bool]

    def __getitem__(self, part: slice) -> Document:
        return Document(self.ids[part], self.learned[part])


def encode(row: Mapping[str, Any], data: DataConfig, tokenizer: Any) -> list[Document]:
    """The tokens of one row: one document, or several for a chat whose template writes earlier turns otherwise. None
    for a row in which nobody asks or answers.

    Raises:
        ConfigError: it has none of the fields, they are of the wrong type, or the chat template cannot mark the
            assistant's words.
    """
    fields = {
        "messages_field": data.messages_field,
        "prompt_field": data.prompt_field,
        "response_field": data.response_field,
    }
    chat = chat_of(row, **fields)
    if chat is not None:
        if tokenizer.chat_template:
            return _encode_chat(chat, tools_of(row), data, tokenizer)
        if [message["role"] for message in chat] != ["user", "assistant"]:
            raise ConfigError("the model's tokenizer has no chat template; give prompts with responses, or text")
        question, answer = (str(message["content"]) for message in chat)
        return [_encode_spans(tokenizer, [(f"{question}\n", False), (answer, True)], data.loss_on)]
    text = row.get(data.text_field)
    if not isinstance(text, str):
        if is_empty(row, **fields):
            return []
        raise ConfigError(
            f"a row has none of {data.messages_field!r}, {data.prompt_field!r} with {data.response_field!r}, and "
            f"{data.text_field!r}, but {sorted(row)}; name its fields in the recipe"
        )
    if data.loss_on == "assistant":
        raise ConfigError("loss_on 'assistant' needs chats or prompts with responses, but a row is plain text")
    return [_encode_spans(tokenizer, [(text, True)], data.loss_on)]


def _encode_spans(
    tokenizer: Any, spans: Sequence[tuple[str, bool]], loss_on: LossOn, is_chat: bool = False
) -> Document:
    """Pieces of one text, each learned or not; a token belongs to the piece in which it starts. Plain text gets the
    tokenizer's own BOS and an EOS; a chat template writes its own."""
    text = "".join(piece for piece, _ in spans)
    encoded = tokenizer(text, add_special_tokens=not is_chat, return_offsets_mapping=loss_on != "all")
    ids = list(encoded["input_ids"])
    learned = [loss_on == "all"] * len(ids)
    if loss_on != "all":
        ends = list(itertools.accumulate(len(piece) for piece, _ in spans))
        span = 0
        for index, (start, stop) in enumerate(encoded["offset_mapping"]):
            while start >= ends[span] and span < len(ends) - 1:
                span += 1
            learned[index] = spans[span][1] and stop > start
    if not is_chat and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
        learned.append(True)
    return Document(ids, learned)


def _encode_chat(
    messages: Sequence[Message], tools: list[Any] | None, data: DataConfig, tokenizer: Any
) -> list[Document]:
    """A chat through its template. What the assistant says is found by `{% generation %}` marks where the template has
    them, else by comparing renderings."""

    def render(number: int, **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(list(messages[:number]), tools=tools, tokenize=False, **options)
        return text

    try:
        if data.loss_on == "all":
            return [_encode_spans(tokenizer, [(render(len(messages)), True)], data.loss_on, is_chat=True)]
        if _GENERATION.search(tokenizer.chat_template):
            marked = tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return [Document(list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]])]
        return [_encode_spans(tokenizer, spans, data.loss_on, is_chat=True) for spans in _chat_spans(messages, render)]
    except ConfigError:
        raise
    except Exception as error:  # whatever a template raises
        raise ConfigError(f"the chat template refuses a chat ({error}): {shown(list(messages))}") from None


_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


def _chat_spans(messages: Sequence[Message], render: Callable[..., str]) -> Iterator[list[tuple[str, bool]]]:
    """The texts of a chat in pieces, learned or not: the whole chat, and for assistant turns that it writes otherwise
    than the model once wrote them (templates that drop earlier thoughts, say) the chat up to such a turn again."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    starts = {turn: _rendered_start(render, turn) for turn in turns}
    stops = {turn: render(turn + 1) for turn in turns}
    texts = [render(len(messages)), *(stops[turn] for turn in reversed(turns))]
    for text in texts:
        spans, done = [], 0
        for turn in list(turns):
            start = _begin(starts[turn], stops[turn], render(turn) if turn else "")
            if text.startswith(stops[turn]) and done <= start:
                spans += [(text[done:start], False), (stops[turn][start:], True)]
                done = len(stops[turn])
                turns.remove(turn)
        if spans:
            yield [*spans, (text[done:], False)]
    if not stops:
        yield [(texts[0], False)]


def _rendered_start(render: Callable[..., str], turn: int) -> str:
    """The text that asks for a turn. For a first one, which nobody asked for, its own text up to what asks for others:
    transformers renders no empty chat."""
    if turn:
        return render(turn, add_generation_prompt=True)
    own = render(1)
    asks = render(1, add_generation_prompt=True).removeprefix(own)
    before, asked, _ = own.partition(asks) if asks else ("", "", "")
    return before + asks if asked else ""


def _begin(start: str, stop: str, before: str) -> int:
    """Where in `stop` the assistant's own words begin: after `start`, which asks for them; or where the two part, if
    what was asked and what is kept differ (an opening of thoughts that are not kept).

    Raises:
        ConfigError: not even what was said before is written alike.
    """
    if stop.startswith(start):
        return len(start)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, stop, strict=False)))
    if common < len(before):
        raise ConfigError(
            "the chat template writes what was said before otherwise once the assistant answers, so its words cannot "
            "be found; mark them in the template with {% generation %}, or use loss_on: all"
        )
    return common
