"""Text <-> token ids at the edge of the package; the engine speaks ids only.

Everything here is used while text is made; how a checkpoint's tokenizer is read is in `tokenizer_files`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol, TypeVar

import tokenizers

from hopskip.errors import PromptError
from hopskip.text.chat_template import ChatTemplates

T = TypeVar("T")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Encode = Callable[[str, bool], list[int]]
"""A text to token ids; the second argument is whether BOS and EOS are put around it where the model wants them."""

_END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>", "<|eom|>"),
    *("<EOT>", "<|EOT|>", "[EOT]", "<end_of_utterance>"),
)
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
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
        chat_template: str | Mapping[str, str] | None,
        eos_token_ids: Iterable[int],
        encode: Encode | None = None,
    ) -> None:
        """
        Args:
            chat_template: the source, or several by name (`default`, `tool_use`).
            eos_token_ids: of the config and the generation config; of a GGUF file: its eos, eot and eom ids.
            encode: encodes in place of `inner`, which then only decodes: for vocabularies whose rules of merging the
                library does not have.
        """
        self._inner = inner
        self._encode = encode or self._encode_with_library
        # alone, or one of a sequence
        self._is_byte_level = inner.decoder is not None and b'"ByteLevel"' in inner.decoder.__getstate__()
        added = inner.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        self._added_texts = {index: token.content for index, token in added.items()} if self._is_byte_level else {}
        """Added tokens are text, not characters for bytes; `_spoilt_ids` are those that the library decodes as such."""
        self._spoilt_ids = frozenset(
            index
            for index, text in self._added_texts.items()
            if index not in self._special_ids and not text.isascii() and _BYTE_OF_CHAR.keys() >= set(text)
        )
        self._special_tokens = dict(special_tokens)
        sources = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self.chat = ChatTemplates(sources) if sources else None
        """The chat templates; None if the model has none."""
        turns = [token for token in _END_OF_TURN if token in str(sources)]
        named = [inner.token_to_id(token) for token in (special_tokens.get("eos_token"), *turns) if token]
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *(index for index in named if index is not None)]))
        """Every token that ends a text. What anybody names counts, for checkpoints often name only a part: the ids
        given, the tokenizer's own EOS, and tokens known to end a turn that the chat template writes. Nothing is taken
        for the end of a text by its look alone: base models have end-of-turn tokens too, and pad with tokens that mean
        something else."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens in it count as such.

        Args:
            add_special_tokens: put BOS first where the model's tokenizer does. Text from `render_chat` has it already.

        Raises:
            PromptError: the text cannot be written as UTF-8 (a lone surrogate).
        """
        try:
            return self._encode(text, add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the prompt is not valid text ({error}); give a string of Unicode characters") from None

    def _encode_with_library(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, after: Sequence[int] = (), skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that form no character become U+FFFD.

        Args:
            after: token ids that come before, whose text is not part of the result: SentencePiece tokenizers take the
                space from the first word of a text, but not from the first of a continuation.
        """
        if not after:
            text = self.decode_raw(token_ids, skip_special_tokens=skip_special_tokens)
            if REPLACEMENT not in text:
                return text
        # a byte-fallback decoder can spoil the whole run of bytes around a bad one: agree with what a stream shows
        detokenizer = Detokenizer(self, after, skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])

    def decode_raw(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """As `decode`, with incomplete characters as the library shows them."""
        decode = partial(self._inner.decode, skip_special_tokens=skip_special_tokens)
        if not self._spoilt_ids:
            return str(decode(list(token_ids)))
        runs = groupby(token_ids, key=self._spoilt_ids.__contains__)
        return "".join(
            "".join(self._added_texts[i] for i in run) if is_spoilt else decode(list(run)) for is_spoilt, run in runs
        )

    def special_id(self, text: str) -> int | None:
        """The special token that a text spells."""
        token_id: int | None = self._inner.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def is_silent(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """True for a token without text: a special one, or an id that no token has (vocabularies may be padded)."""
        try:
            return (skip_special_tokens and token_id in self._special_ids) or self._inner.id_to_token(token_id) is None
        except OverflowError:  # no id at all: negative, or of more than 32 bits
            return True

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: those of a whole character, or a part of one."""
        token: str | None = self._inner.id_to_token(token_id)
        if token is None:
            return b""  # vocabularies may be padded with ids that no token has
        if token_id in self._added_texts:
            return self._added_texts[token_id].encode()
        if self._is_byte_level:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    @property
    def added_ids(self) -> dict[str, int]:
        """Ids of the tokens that are found in a text before it is cut into words, special ones among them."""
        return {token.content: index for index, token in self._inner.get_added_tokens_decoder().items()}

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template; None if the model has none."""
        return None if self.chat is None else self.chat.default.source

    @property
    def template_variables(self) -> frozenset[str]:
        """What the chat template takes from outside (`messages`, `tools`, `enable_thinking`, ...)."""
        return frozenset() if self.chat is None else self.chat.variables

    @property
    def inner(self) -> tokenizers.Tokenizer:
        """The tokenizer of the `tokenizers` library: the vocabulary and how it decodes. To encode, use `encode`."""
        return self._inner

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... as text, as far as the checkpoint names them."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self.chat is not None

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
        if self.chat is None:
            raise PromptError("this model has no chat template; give a plain prompt, or use an instruct model")
        return self.chat.render(
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
    prompt_ids: InitVar[Sequence[int]] = ()
    """Tokens that come before the stream's. Their text is not given out, except a character that they leave
    incomplete."""
    skip_special_tokens: bool = True
    shown_ids: Collection[int] = ()
    """Special tokens whose text is given out: marks that are to be read."""
    _window: list[int] = field(default_factory=list)
    _num_read: int = 0
    """Tokens at the start of the window whose text has been given out."""

    def __post_init__(self, prompt_ids: Sequence[int]) -> None:
        token_bytes = self.tokenizer.token_bytes
        for token_id in reversed(prompt_ids):
            if self.tokenizer.is_silent(token_id, skip_special_tokens=self.skip_special_tokens):
                continue
            self._window.insert(0, token_id)
            begins_inside = token_bytes(token_id)[:1] in _CONTINUATION_BYTES
            if len(self._window) >= _MAX_HELD_TOKENS and not begins_inside:
                break
        self._num_read = len(self._window)
        num_open = _num_incomplete(b"".join(map(token_bytes, self._window)))
        while num_open > 0:
            self._num_read -= 1
            num_open -= len(token_bytes(self._window[self._num_read]))

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly empty."""
        if self.tokenizer.is_silent(token_id, skip_special_tokens=self.skip_special_tokens):
            return self.flush() + self.tokenizer.token_bytes(token_id).decode() if token_id in self.shown_ids else ""
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
        decode = partial(self.tokenizer.decode_raw, skip_special_tokens=self.skip_special_tokens)
        before = decode(self._window[: self._num_read])
        return decode(self._window)[len(before) :]


_CONTINUATION_BYTES = frozenset(bytes([value]) for value in range(0x80, 0xC0))


def _num_incomplete(data: bytes) -> int:
    """Bytes at the end that begin a character of UTF-8 without finishing it.

    >>> _num_incomplete("aé🙂".encode()[:-1])
    3
    """
    for count, byte in enumerate(reversed(data[-3:]), start=1):
        if byte >= 0xC0:
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return count if count < length else 0
        if byte < 0x80:
            return 0
    return 0


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

    Args:
        min_tokens: among so many tokens no stop string ends.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held = ""
        self._rest = ""
        self._is_stopped = False
        self.stopped_by: str | None = None
        """The stop string that has ended the text."""
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
        looked_for = self._stop if len(self._pieces) >= self._min_tokens else ()
        first = min(((i, stop) for stop in looked_for if (i := text.find(stop)) >= 0), default=None)
        if first is not None:
            found, self.stopped_by = first
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
