"""Chats as token ids: every answer of the assistant with the history that it was given to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from hopskip.errors import PromptError
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.exit.conversations import Conversation

Dialogue = Callable[[Seq[Seq[int]]], list[int] | None]
"""From the answers so far, as token ids, to the next prompt; None where the dialogue ends."""
_GENERATED = ("system", "developer", "user", "assistant")
"""Who speaks in a chat that the model is to continue. What a tool once returned answers another call."""


@dataclass(frozen=True)
class Chat:
    """What is asked, and perhaps what was answered."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] = ()
    """Functions that the assistant may call."""
    unfinished: tuple[int, ...] = ()
    """Messages of the assistant, by number, that were cut off."""

    @property
    def questions(self) -> list[tuple[Mapping[str, Any], ...]]:
        """What comes before each answer, from the last answer on: the messages of a system and of a user, up to the
        first message of anybody else."""
        found: list[tuple[Mapping[str, Any], ...]] = []
        since: list[Mapping[str, Any]] = []
        for message in self.messages:
            if message["role"] not in _GENERATED:
                break
            if message["role"] == "assistant":
                continue
            since.append(message)
            if message["role"] == "user":
                found.append(tuple(since))
                since = []
        return found

    @property
    def asked(self) -> tuple[str, ...]:
        """The words of the user."""
        return tuple(str(message.get("content")).strip() for message in self.messages if message["role"] == "user")


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Makes token ids of chats, through the model's chat template. A model without one takes the first question as it
    is, and its answer.

    Args:
        max_prompt_tokens: a chat ends before the turn whose history is longer.
        max_new_tokens: answers are cut there.
    """

    tokenizer: Tokenizer
    max_prompt_tokens: int
    max_new_tokens: int

    def prompt(self, messages: Seq[Mapping[str, Any]], tools: Seq[Any] = ()) -> list[int] | None:
        """What the model reads before it answers; None if that is too long.

        Raises:
            PromptError: the chat template refuses these messages.
        """
        if self.tokenizer.has_chat_template:
            ids = self.tokenizer.apply_chat_template(messages, **_variables(tools))
        else:
            ids = self.tokenizer.encode(next(str(m["content"]) for m in messages if m["role"] == "user"))
        return ids if len(ids) <= self.max_prompt_tokens else None

    def dialogue(self, chat: Chat) -> Dialogue:
        """The chat with answers of the model's own in place of those that it has."""
        questions = chat.questions if self.tokenizer.has_chat_template else chat.questions[:1]

        def next_prompt(answers: Seq[Seq[int]]) -> list[int] | None:
            if len(answers) >= len(questions):
                return None
            history: list[Mapping[str, Any]] = []
            for question, answer in zip(questions, answers, strict=False):
                history += [*question, {"role": "assistant", "content": self.tokenizer.decode(answer)}]
            try:
                return self.prompt([*history, *questions[len(answers)]], chat.tools)
            except PromptError:
                if not answers:
                    raise
                return None  # the template takes no more of this chat

        return next_prompt

    def given(self, chat: Chat) -> list[Conversation]:
        """Every answer that the chat has, with its history, without states.

        Raises:
            PromptError: the chat template refuses the first of them.
        """
        found: list[Conversation] = []
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            history = chat.messages[:number]
            if not any(before["role"] == "user" for before in history):
                continue  # it begins the chat: nobody has asked
            is_whole = number not in chat.unfinished
            try:
                prompt = self.prompt(history, chat.tools)
                answer = prompt and self._answer(history, message, chat.tools, prompt, is_whole=is_whole)
            except PromptError:
                if not found:
                    raise
                break
            if prompt is None:
                break
            if answer:
                found.append(Conversation.of(prompt, answer))
            if not self.tokenizer.has_chat_template:
                break
        return found

    def _answer(
        self,
        history: Seq[Mapping[str, Any]],
        message: Mapping[str, Any],
        tools: Seq[Any],
        prompt: list[int],
        *,
        is_whole: bool,
    ) -> list[int]:
        """The tokens of an answer, and what ends it."""
        tokenizer = self.tokenizer
        if tokenizer.has_chat_template:
            options = _variables(tools)
            before = tokenizer.render_chat(history, **options)
            whole = tokenizer.render_chat([*history, message], add_generation_prompt=False, **options)
            # a template may open an answer otherwise than it writes one down
            tail = whole.removeprefix(before) if whole.startswith(before) else str(message.get("content") or "")
            ids = tokenizer.encode(before + tail, add_special_tokens=False)
        else:
            tail = str(message.get("content") or "")
            ids = tokenizer.encode(next(str(m["content"]) for m in history if m["role"] == "user") + tail)
        # where a token reaches over the place at which they meet, the answer is taken by itself
        is_apart = ids[: len(prompt)] == prompt
        ids = ids[len(prompt) :] if is_apart else tokenizer.encode(tail, add_special_tokens=False)
        ends = [place for place, token in enumerate(ids) if token in tokenizer.eos_token_ids]
        ids = ids[: ends[0]] if ends else ids
        if ids and is_whole:
            ids.append(_end(tokenizer))
        return ids[: self.max_new_tokens]


def _variables(tools: Seq[Any]) -> dict[str, Any]:
    return {"tools": list(tools)} if tools else {}


def _end(tokenizer: Tokenizer) -> int:
    """The token that ends an answer, of those that may."""
    named = tokenizer.special_tokens.get("eos_token")
    own = None if named is None else tokenizer.inner.token_to_id(named)
    return tokenizer.eos_token_ids[0] if own is None else int(own)
