"""The text that an exit is trained on: prompts, answers to them, and the model's hidden states behind both."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from hopskip.backends.base import Backend
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.engine.engine import Engine, make_engine
from hopskip.errors import ConfigError, PromptError
from hopskip.loading import Progress, load_backend
from hopskip.speculative import SpeculativeConfig
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.exit.answers import OwnAnswers
from hopskip.train.exit.collect import Converse, collect
from hopskip.train.exit.conversations import Conversation, joined, read_conversations
from hopskip.train.exit.feed import WithStates
from hopskip.train.exit.prompts import read_chats, read_prompts, write_prompts
from hopskip.train.exit.recipe import ExitRecipe, ServerRecipe
from hopskip.train.exit.server import ask_server
from hopskip.train.exit.states import TeacherForced
from hopskip.train.exit.turns import Chat, Turns

_CHATS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Text:
    """What there is to train on."""

    training: list[Conversation]
    held_out: list[Conversation]
    taps: list[int]
    """Layers whose outputs the states are."""
    with_states: WithStates | None
    """Makes the states, where they are not stored."""


class TextMaker:
    """Makes the text of a recipe, in one process or several that share a folder. Every part goes on where it was
    interrupted.

    Args:
        accelerator: of `accelerate`: which process this is.
        report: told what has been reached.
    """

    def __init__(
        self,
        recipe: ExitRecipe,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        accelerator: Any,
        report: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._recipe, self._checkpoint, self._tokenizer = recipe, checkpoint, tokenizer
        self._accelerator, self._report, self._progress = accelerator, report, progress
        self._depth = checkpoint.config.num_hidden_layers
        room = checkpoint.config.context_length - recipe.collect.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"collect.max_new_tokens is {recipe.collect.max_new_tokens}, but the model's context has "
                f"{checkpoint.config.context_length} tokens; give fewer"
            )
        self._turns = Turns(
            tokenizer=tokenizer,
            max_prompt_tokens=min(room, recipe.prompts.max_prompt_tokens),
            max_new_tokens=recipe.collect.max_new_tokens,
        )

    @cached_property
    def _backend(self) -> Backend:
        """Loaded once, and not before it is known that the files of prompts can be read."""
        return load_backend(self._checkpoint, self._recipe.load, self._progress)

    @property
    def _taps(self) -> list[int]:
        """Layers that a candidate sees, and the last one, whose outputs hold the targets."""
        return sorted({*self._recipe.taps(self._depth), self._depth})

    def make(self) -> Text:
        """All of it.

        Raises:
            ConfigError: a file or an answer cannot be used, or what is there was made otherwise.
            TrainingError: something cannot be written, or a server answers no more; what is complete stays.
        """
        folder, stored = self._recipe.folder, self._recipe.collect.states == "stored"
        if self._accelerator.is_main_process:
            self._write_prompts()
        self._accelerator.wait_for_everyone()
        chats = read_prompts(folder / "prompts.jsonl")
        if self._recipe.collect.server is not None:
            chats = self._answered(chats, self._recipe.collect.server)
        collect(
            chats,
            folder / "data",
            self._converse,
            fingerprint=self._checkpoint.fingerprint,
            taps=self._taps if stored else [],
            depth=self._depth,
            process=(self._accelerator.process_index, self._accelerator.num_processes),
            progress=lambda done, tokens: self._report(
                f"collected {tokens:,} tokens from {done} of {len(chats)} chats"
            ),
            doing=partial(self._progress, "collecting text"),
        )
        self._accelerator.wait_for_everyone()
        metadata, conversations = read_conversations(folder / "data")
        enough = [c for c in conversations if c.num_answer_tokens > 1]
        every = self._recipe.held_out_every
        return Text(
            training=[c for i, c in enumerate(enough) if i % every],
            held_out=enough[::every],
            taps=json.loads(metadata["taps"]) or self._taps,
            with_states=None if stored else TeacherForced(self._backend, self._taps),
        )

    def _write_prompts(self) -> None:
        recipe, path = self._recipe, self._recipe.folder / "prompts.jsonl"
        if path.exists():
            return
        doing = partial(self._progress, "writing prompts")
        chats = read_chats(recipe.prompts)
        refusals: list[str] = []
        is_usable = partial(self._is_usable, refusals)
        try:
            write_prompts(
                recipe.prompts, chats, self._tokenizer, self._plain_engine, path, is_usable, self._report, doing
            )
        except ConfigError as error:
            raise ConfigError(f"{error}; {refusals[0]}" if refusals else str(error)) from None

    def _is_usable(self, refusals: list[str], chat: Chat) -> bool:
        """Whether it begins with a prompt that is short enough, and has an answer where answers are given. What the
        chat template says of one that it refuses is added to `refusals`."""
        try:
            if self._recipe.collect.answers == "given":
                return bool(self._turns.given(chat))
            return self._turns.dialogue(chat)([]) is not None
        except PromptError as error:
            refusals.append(str(error))
            return False

    def _plain_engine(self) -> Engine:
        return make_engine(
            self._backend,
            SpeculativeConfig(draft="none"),
            eos_token_ids=sorted(self._tokenizer.eos_token_ids),
            max_num_seqs=self._recipe.collect.max_num_seqs,
        )

    def _answered(self, chats: Seq[Chat], server: ServerRecipe) -> list[Chat]:
        """By a server, which the first process asks."""
        ask = partial(
            ask_server,
            server,
            chats,
            self._recipe.folder / "answers.jsonl",
            max_new_tokens=self._recipe.collect.max_new_tokens,
            report=self._report,
            doing=partial(self._progress, "asking the server"),
        )
        if self._accelerator.is_main_process:
            ask()
        self._accelerator.wait_for_everyone()
        return ask()

    def _converse(self, taps: Seq[int]) -> Converse[Chat]:
        """How chats become conversations, with states if there are taps."""
        settings = self._recipe.collect
        if settings.answers == "model":
            own = OwnAnswers(
                self._backend,
                taps,
                max_new_tokens=settings.max_new_tokens,
                max_length=self._turns.max_prompt_tokens + settings.max_new_tokens,
                eos_token_ids=sorted(self._tokenizer.eos_token_ids),
                max_num_seqs=settings.max_num_seqs,
            )
            return lambda chats, doing: own([self._turns.dialogue(chat) for chat in chats], doing)
        with_states = TeacherForced(self._backend, taps) if taps else None
        return partial(_given, self._turns, with_states)


def _given(
    turns: Turns, with_states: WithStates | None, chats: Seq[Chat], doing: Callable[[int], None]
) -> list[list[Conversation]]:
    """The answers that chats have: several turns in one pass, and several chats."""
    found: list[list[Conversation]] = []
    for first in range(0, len(chats), _CHATS_AT_ONCE):
        some = [joined(turns.given(chat)) for chat in chats[first : first + _CHATS_AT_ONCE]]
        if with_states is not None:
            made = iter(with_states([conversation for own in some for conversation in own]))
            some = [[next(made) for _ in own] for own in some]
        found += some
        doing(len(found))
    return found
