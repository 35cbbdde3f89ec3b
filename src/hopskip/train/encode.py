"""A row of data as token ids, with what of it is to be learned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hopskip.errors import ConfigError
from hopskip.prompts import content_of
from hopskip.train.read import DataConfig, LossOn


@dataclass(frozen=True)
class Document:
    """Token ids, and whether each is to be learned."""

    ids: list[int]
    learned: list[bool]

    def __getitem__(self, part: slice) -> Document:
        return Document(self.ids[part], self.learned[part])


def encode(row: Mapping[str, Any], data: DataConfig, tokenizer: Any) -> Document:
    """The tokens of one row.

    Raises:
        ConfigError: it has none of the fields, they are of the wrong type, or the chat template cannot mark the
            assistant's words.
    """
    content = content_of(row, prompt_field=data.prompt_field, messages_field=data.messages_field)
    response = row.get(data.response_field)
    if isinstance(content, tuple):
        is_whole = bool(row.get(data.messages_field)) or not isinstance(response, str)
        answer = [] if is_whole else [{"role": "assistant", "content": response}]
        return _encode_chat([*content, *answer], data, tokenizer)
    if isinstance(row.get(data.messages_field), list):
        raise ConfigError(f"a chat is a list of objects with role and content, not {row[data.messages_field]!r}")
    if isinstance(response, str):
        prompt = content or str(row.get(data.prompt_field) or "")
        if not tokenizer.chat_template:
            return _encode_spans(tokenizer, [(f"{prompt}\n", False), (response, True)], data.loss_on)
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return _encode_chat(chat, data, tokenizer)
    text = row.get(data.text_field)
    if not isinstance(text, str):
        raise ConfigError(
            f"a row has none of {data.messages_field!r}, {data.prompt_field!r} with {data.response_field!r}, and "
            f"{data.text_field!r}, but {sorted(row)}; name its fields in the recipe"
        )
    if data.loss_on == "assistant":
        raise ConfigError("loss_on 'assistant' needs chats or prompts with responses, but a row is plain text")
    return _encode_spans(tokenizer, [(text, True)], data.loss_on)


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


def _encode_chat(messages: Sequence[Mapping[str, Any]], data: DataConfig, tokenizer: Any) -> Document:
    """A chat through its template; what the assistant says is found by `{% generation %}` marks where the template has
    them, else as what each of its messages adds to the text so far."""
    template = tokenizer.chat_template
    if not template:
        raise ConfigError("the model's tokenizer has no chat template; give prompts with responses, or text")
    try:
        if data.loss_on == "assistant" and "{% generation" in template.replace("{%-", "{%"):
            marked = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return Document(list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]])
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        spans, done = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or data.loss_on == "all":
                continue
            start = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            stop = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            if not (whole.startswith(start) and whole.startswith(stop) and done <= len(start) <= len(stop)):
                raise ConfigError(
                    "the chat template writes earlier messages otherwise once later ones follow, so the assistant's "
                    "words cannot be found; mark them in the template with {% generation %}, or use loss_on: all"
                )
            spans += [(whole[done : len(start)], False), (whole[len(start) : len(stop)], True)]
            done = len(stop)
    except ConfigError:
        raise
    except Exception as error:  # whatever a template raises
        raise ConfigError(f"the chat template refuses a chat ({error}): {messages!r}") from None
    return _encode_spans(tokenizer, [*spans, (whole[done:], False)], data.loss_on, is_chat=True)
