"""Text <-> token ids at the edge of the package; the engine speaks ids only.

Everything here is used while text is made; how a checkpoint's tokenizer is read is in `tokenizer_files`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn, Protocol, TypeVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders

from hopskip.errors import CheckpointError, PromptError

T = TypeVar("T")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; what is incomplete after 8 tokens never becomes one


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable ones stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """The tokenizer of a checkpoint, with its chat template if it has one."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        eos_token_ids: Iterable[int],
    ) -> None:
        self._inner = inner
        self._is_byte_level = isinstance(inner.decoder, decoders.ByteLevel)
        self._special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        """Source of the chat template; None if the model has none."""
        self._template = ChatTemplate(chat_template) if chat_template is not None else None
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        """Tokens that end a text: those of the config, else the tokenizer's own and its chat template's."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens in it count as such.

        Args:
            add_special_tokens: put BOS first where the model's tokenizer does. Text from `render_chat` has it already.

        Raises:
            PromptError: the text cannot be written as UTF-8 (a lone surrogate).
        """
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the prompt is not valid text ({error}); give a string of Unicode characters") from None
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out. Bytes that form no character become U+FFFD."""
        text: str = self._inner.decode(list(token_ids), skip_special_tokens=True)
        if REPLACEMENT not in text:
            return text
        # a byte-fallback decoder can spoil the whole run of bytes around a bad one: agree with what a stream shows
        detokenizer = Detokenizer(self)
        return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: those of a whole character, or a part of one."""
        token: str | None = self._inner.id_to_token(token_id)
        if token is None:
            return b""  # vocabularies may be padded with ids that no token has
        if self._is_byte_level:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    @property
    def has_tools_template(self) -> bool:
        """True if the chat template knows what to do with `tools`."""
        return self._template is not None and "tools" in self._template.variables

    @property
    def inner(self) -> tokenizers.Tokenizer:
        """The tokenizer of the `tokenizers` library."""
        return self._inner

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... as text, as far as the checkpoint names them."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat (messages with `role` and `content`), ready for the assistant's answer.

        `variables` are passed to the template (`tools`, `enable_thinking`, ...); which ones it knows is its own affair.

        Raises:
            PromptError: the model has no chat template, or the template refuses these messages.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that the chat template makes of these messages, its special tokens written out.

        Raises:
            PromptError: as `apply_chat_template`.
        """
        if self._template is None:
            raise PromptError("this model has no chat template; give a plain prompt, or use an instruct model")
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **{**self._special_tokens, **variables}
        )


@dataclass
class Detokenizer:
    """Turns a stream of token ids into pieces of valid UTF-8 text; joined, they are `tokenizer.decode` of all the ids.

    A token may end in the middle of a character, and may decode differently at the start of a text. So each piece is
    what the last window of tokens decodes to with the new ones, less what it decoded to without, and is held back as
    long as it ends in an incomplete character (the prefix-offset method of TGI and vLLM).

    >>> detokenizer = Detokenizer(tokenizer)  # doctest: +SKIP
    >>> [detokenizer.push(i) for i in tokenizer.encode("Hi 🙂")] + [detokenizer.flush()]  # doctest: +SKIP
    ['Hi', '', ' 🙂', '']
    """

    tokenizer: Tokenizer
    _window: list[int] = field(default_factory=list)
    _num_read: int = 0
    """Tokens at the start of the window whose text has been given out."""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly empty."""
        self._window.append(token_id)
        piece = self._pending()
        num_held = len(self._window) - self._num_read
        if not piece or (piece.endswith(REPLACEMENT) and num_held < _MAX_HELD_TOKENS):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return piece

    def flush(self) -> str:
        """The text held back, an incomplete character as U+FFFD. The stream ends here."""
        piece = self._pending()
        self._num_read = len(self._window)
        return piece

    def _pending(self) -> str:
        decode = self.tokenizer._inner.decode
        before: str = decode(self._window[: self._num_read], skip_special_tokens=True)
        after: str = decode(self._window, skip_special_tokens=True)
        return after[len(before) :]


# -- chat templates ----------------------------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for inference its body is all there is to it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. It is a program that comes with a checkpoint, so it runs in a sandbox, as in
    transformers.

    Raises:
        CheckpointError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise CheckpointError(f"the model's chat template is a {type(source).__name__}; give a plain prompt")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
            """Names that the template takes from outside: `messages`, perhaps `tools`, ..."""
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template is not valid ({error}); give a plain prompt") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The text of a chat.

        Raises:
            PromptError: the messages are not a list of mappings with a role, or the template refuses them.
        """
        if isinstance(messages, str) or not messages:
            raise PromptError(f"a chat is a non-empty list of messages with role and content, not {messages!r}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise PromptError(f"chat message {message!r} has no role; give {{'role': 'user', 'content': '...'}}")
        # templates test for a key, not for None
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# -- streams of text ---------------------------------------------------------------------------------------------------


class IncrementalDecoder(Protocol):
    """Token ids in, pieces of valid Unicode out, as `Detokenizer`."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of one request as it grows: one piece per token, and the first stop string.

    Text that could be the beginning of a stop string is held back until it is certain, so nothing shown is ever taken
    back; the pieces joined are the text before the stop string. A stop string is found wherever it lies: inside a
    token, across tokens, inside an accepted draft.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self._rest = ""
        self._is_stopped = False
        self._pieces: list[str] = []
        """Text that became certain with each token pushed; often empty."""
        self._num_taken = 0

    @property
    def text(self) -> str:
        return "".join(self._pieces) + self._rest

    def push(self, token_id: int) -> bool:
        """Take one token; True if its text completes a stop string."""
        assert not self._is_stopped
        self._pieces.append(self._show(self._decoder.push(token_id)))
        return self._is_stopped

    def finish(self) -> str:
        """The text ends here: returns what was held back, the first time that it is called."""
        if self._is_stopped:
            return ""
        self._rest = self._show(self._decoder.flush()) + self._held
        self._is_stopped = True
        return self._rest

    def take(self, tokens: Sequence[T], *, is_finished: bool) -> list[tuple[T, str]]:
        """The tokens that have come since the last call, each with the text that became certain with it.

        Args:
            tokens: all of the request so far.
            is_finished: the text ends with the last of them, whose text has what was held back.
        """
        new = tokens[self._num_taken :]
        pieces = self._pieces[self._num_taken : len(tokens)]
        # a token in stop_token_ids ends the text without being part of it
        pieces += [""] * (len(new) - len(pieces))
        self._num_taken = len(tokens)
        if is_finished and pieces:
            pieces[-1] += self.finish()
        return list(zip(new, pieces, strict=True))

    def _show(self, piece: str) -> str:
        """Add decoded text; return what of it, and of the text held back, is certain."""
        text = self._held + piece
        found = min((i for i in (text.find(stop) for stop in self._stop) if i >= 0), default=None)
        if found is not None:
            self._is_stopped = True
            self._held = ""
            return text[:found]
        num_held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
