"""`hopskip chat`: a conversation in the terminal, each turn starting from the cached keys and values of the last."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from hopskip.cli.console import PieceWriter, load_llm, print_error, print_note, print_summary
from hopskip.cli.generate import Answer
from hopskip.cli.options import ContextOption, DraftGroup, Group, LoadGroup, ThinkOption, with_options
from hopskip.errors import PromptError
from hopskip.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hopskip.llm import LLM

_HELP = "/reset starts a new chat, /exit or Ctrl-D ends it, Ctrl-C stops an answer, /help shows this"


@with_options
def chat(
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message that the chat starts with.")
    ] = None,
    *,
    think: ThinkOption = None,
    max_model_len: ContextOption = None,
    load: LoadGroup,
    draft: DraftGroup,
    params: Annotated[SamplingParams, Group("Sampling", {"max_new_tokens": 1024})],
) -> None:
    """Chat with a model.

    Questions are read line by line, from the terminal or from a pipe.

    $ hopskip chat
    $ hopskip chat Qwen/Qwen3-0.6B --system "Answer in one sentence."
    """
    llm = load_llm(load, draft, max_model_len=max_model_len, prefix_caching=True)
    if not llm.tokenizer.has_chat_template:
        raise PromptError("this model has no chat template; use an instruct model, or hopskip generate")
    if think is not None:  # is there such a switch? Before the first question
        llm.encode([{"role": "user", "content": "Hello"}], enable_thinking=think)
    if sys.stdin.isatty():
        print_note(_HELP)
    conversation = Conversation(llm, params, system, think=think)
    while (line := _read_line()) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
            print_note("[a new chat]")
        elif text == "/help":
            print_note(_HELP)
        elif text.startswith("/"):
            print_error(f"no command {text.split()[0]!r}; {_HELP}")
        elif text:
            conversation.ask(text)


class Conversation:
    """The messages so far, and the model that answers the next one."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, think: bool | None = None) -> None:
        self._llm = llm
        self._params = params
        self._think = think
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def ask(self, text: str) -> None:
        """Print the answer to a message and keep both; a message that does not fit the context is not kept."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt_ids = self._llm.encode(messages, enable_thinking=self._think)
        context = self._llm.engine.max_model_len
        room = context - len(prompt_ids)
        if room < 1:
            print_error(
                f"the chat has {len(prompt_ids)} tokens with this message, and the context of {context} leaves no room "
                "for an answer; send a shorter message, or /reset"
            )
            return
        params = replace(self._params, max_new_tokens=min(self._params.max_new_tokens, room))
        answer = Answer()
        writer = PieceWriter()
        try:
            for piece in self._llm.stream(prompt_ids, params):
                answer.add(piece)
                writer.write(piece)
        except KeyboardInterrupt:
            pass  # the answer so far stays, on the screen and in the chat
        writer.end()
        if not answer.tokens:
            print_note("[stopped before the answer began; the message is not kept]")
            return
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        assert answer.stats is not None
        is_full = answer.finish_reason == "length" and len(answer.tokens) == room
        print_summary(answer.stats, f"the context of {context} tokens is full: /reset" if is_full else answer.ending)


def _read_line() -> str | None:
    """The next line of stdin, None at its end. In a terminal, with a prompt, and Ctrl-C discards the line."""
    if not sys.stdin.isatty():
        try:
            return sys.stdin.buffer.readline().decode("utf-8") or None
        except UnicodeDecodeError as error:
            raise PromptError(
                f"stdin is not valid UTF-8: byte {error.object[error.start]:#04x}; convert it, for example with "
                "iconv -t UTF-8"
            ) from None
    import readline  # noqa: F401 (gives `input` line editing and history)

    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        print_note(_HELP)
        return ""
