"""`hopskip chat`: a conversation in the terminal, each turn starting from the cached keys and values of the last."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hopskip.cli.console import load_llm
from hopskip.cli.options import (
    ChatTemplateOption,
    ContextOption,
    DefaultsGroup,
    DraftGroup,
    Group,
    LoadGroup,
    ThinkOption,
    checked_sampling,
    with_options,
)
from hopskip.errors import PromptError
from hopskip.sampling_params import SamplingParams, with_defaults

if TYPE_CHECKING:
    from hopskip.cli.talk.typed import Reader


@with_options
def chat(
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message that the chat starts with.")
    ] = None,
    *,
    think: ThinkOption = None,
    chat_template: ChatTemplateOption = None,
    max_model_len: ContextOption = None,
    load: LoadGroup,
    draft: DraftGroup,
    sampling: Annotated[dict[str, Any], Group("Sampling", {"max_new_tokens": 1024}, of=SamplingParams)],
    defaults: DefaultsGroup,
) -> None:
    """Chat with a model.

    In a terminal, pasted text and a block of three quotes are one message, and `/help` shows commands and keys. From a
    pipe every line is a message or a command, but for blocks and lines that end with a backslash.

    $ hopskip chat
    $ hopskip chat Qwen/Qwen3-0.6B --system "Answer in one sentence."
    """
    from hopskip.cli.talk.conversation import Conversation
    from hopskip.cli.talk.session import Session
    from hopskip.cli.talk.settings import Settings
    from hopskip.serve.settings import model_name

    given = checked_sampling(sampling, defaults)
    reader = _open_reader()
    with reader.holding_keys():
        llm = load_llm(
            load,
            draft,
            max_model_len=max_model_len,
            prefix_caching=True,
            generation_config=defaults.generation_config,
            chat_template=chat_template,
        )
        if not llm.tokenizer.has_chat_template:
            raise PromptError("this model has no chat template; use an instruct model, or hopskip generate")
        if think is not None:  # is there such a switch? Before the first question
            llm.encode([{"role": "user", "content": "Hello"}], enable_thinking=think)
        encode = partial(llm.encode, enable_thinking=think)
        conversation = Conversation(encode, llm.engine.max_model_len, system)
        params = with_defaults(given, llm.recommended_sampling)
        settings = Settings(params, can_draft=llm.engine.speculative.draft != "none")
        name = model_name(None if load.model is None else str(load.model))
        Session(llm, conversation, settings, reader, name).run()


def _open_reader() -> Reader:
    """The reader that suits stdin: only a terminal that can move its cursor is worth a prompt that can be edited."""
    from hopskip.cli.talk.reading import LineReader

    if not sys.stdin.isatty():
        return LineReader(sys.stdin.buffer, is_interactive=False)
    output = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if output is None or os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        return LineReader(sys.stdin.buffer, is_interactive=True)
    from hopskip.cli.talk.prompt import PromptReader
    from hopskip.cli.talk.session import completions

    return PromptReader(output, completions)
