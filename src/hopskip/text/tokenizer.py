"""Text <-> token ids at the edge of the package; the engine speaks ids only.

Everything here is used while text is made; how a checkpoint's tokenizer is read is in `tokenizer_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import decoders

from hopskip.errors import PromptError
from hopskip.text.chat_template import ChatTemplate

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
