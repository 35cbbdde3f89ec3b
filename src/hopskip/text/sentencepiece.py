"""SentencePiece vocabularies, as Llama 1 and 2, CodeLlama, TinyLlama and Mistral 0.1 have them.

Text becomes pieces by merging neighbours, the pair with the highest score first and of equals the leftmost, on the
whole text, with `▁` in place of spaces. That is what sentencepiece and llama.cpp do. It cannot be had from the
`tokenizers` library: it ranks pairs, not pieces, so that it takes another one of two equal pieces that overlap (and
vocabularies that were extended have many pieces of one score). So the library has the vocabulary here, for decoding,
and encoding is done by `PieceMerger`, or by the `sentencepiece` package where a folder has only its `tokenizer.model`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models

from hopskip.errors import CheckpointError

SPACE = "▁"

_STRIPPED = " \t\n\v\f\r"
_NUM_KEPT_WORDS, _LONGEST_KEPT_WORD = 1 << 15, 32
_WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")


class PieceMerger:
    """Text without special tokens -> ids, by the scores of the pieces.

    Args:
        scores: of every piece, by its id.
        unk_id: stands for characters that are no piece, where the vocabulary has no pieces for their bytes.
    """

    def __init__(self, pieces: Sequence[str], scores: Sequence[float], unk_id: int) -> None:
        self._ids = {piece: index for index, piece in enumerate(pieces)}
        self._scores = scores
        self._unk_id = unk_id
        self._byte_ids = [self._ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        # no piece reaches from one word into the next, unless one has a space behind a letter
        self._has_words = not any(SPACE in piece.lstrip(SPACE) for piece in pieces if len(piece) > 1)
        self._merge = lru_cache(_NUM_KEPT_WORDS)(self._merge_word)
        """For words that come again; long ones seldom do, and would fill the memory."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which spaces are written as `▁`."""
        if not self._has_words:
            return list(self._merge_word(text))
        ids: list[int] = []
        for word in _WORDS.findall(text):
            ids += self._merge(word) if len(word) <= _LONGEST_KEPT_WORD else self._merge_word(word)
        return ids

    def _merge_word(self, word: str) -> tuple[int, ...]:
        symbols: list[str] = list(word)
        before = list(range(-1, len(symbols) - 1))
        behind = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def propose(left: int, right: int) -> None:
            piece = symbols[left] + symbols[right]
            index = self._ids.get(piece)
            if index is not None:
                heapq.heappush(queue, (-self._scores[index], left, right, piece))

        for left in range(len(symbols) - 1):
            propose(left, left + 1)
        while queue:
            _, left, right, piece = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != piece:
                continue  # one of the two has been merged with another since
            symbols[left], symbols[right] = piece, ""
            behind[left] = behind[right]
            if behind[left] >= 0:
                before[behind[left]] = left
                propose(left, behind[left])
            if before[left] >= 0:
                propose(before[left], left)
        ids: list[int] = []
        for symbol in symbols:
            ids += self._ids_of(symbol, is_after_unk=ids[-1:] == [self._unk_id])
        return tuple(ids)

    def _ids_of(self, symbol: str, *, is_after_unk: bool) -> list[int]:
        if not symbol:
            return []
        index = self._ids.get(symbol)
        if index is not None:
            return [index]
        ids = [index for index in map(self._byte_ids.__getitem__, symbol.encode()) if index is not None]
        if len(ids) == len(symbol.encode()):
            return ids
        return [] if is_after_unk else [self._unk_id]


class PieceEncoder:
    """Text with special tokens in it -> ids; a `tokenizer.Encode`.

    Args:
        encode_text: of text between special tokens; its second argument is whether a space is put before the text.
        added: tokens that are looked for in a text before anything else, the longest first.
        prefix: which stretches of text get a space put before them: each one, or only what a text begins with.
        bos, eos: ids around a text, where those are wanted.
    """

    def __init__(
        self,
        encode_text: Callable[[str, bool], list[int]],
        added: Mapping[int, AddedToken],
        prefix: Literal["each", "first", "never"],
        *,
        bos: tuple[int, ...] = (),
        eos: tuple[int, ...] = (),
    ) -> None:
        self._encode_text = encode_text
        self._added = sorted(added.items(), key=lambda item: -len(item[1].content.encode()))
        self._prefix = prefix
        self._bos = bos
        self._eos = eos

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for position, fragment in enumerate(self._split(text)):
            if isinstance(fragment, int):
                ids.append(fragment)
                continue
            has_prefix = self._prefix == "each" or (self._prefix == "first" and position == 0)
            ids += self._encode_text(fragment, has_prefix)
        return [*self._bos, *ids, *self._eos] if add_special_tokens else ids

    def _split(self, text: str) -> list[str | int]:
        """The text and the ids of the tokens in it. A text's fragments are never two in a row."""
        text.encode()  # a lone surrogate is no text
        fragments: list[str | int] = [text]
        for index, token in self._added:
            if token.content not in text:
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                cut += [fragment] if isinstance(fragment, int) else _cut_out(fragment, token, index)
            fragments = cut
        return [fragment for fragment in fragments if fragment != ""]


def _cut_out(text: str, token: AddedToken, index: int) -> list[str | int]:
    parts = text.split(token.content)
    fragments: list[str | int] = []
    for number, part in enumerate(parts):
        if token.rstrip and number > 0:
            part = part.lstrip(_STRIPPED)
        if token.lstrip and number < len(parts) - 1:
            part = part.rstrip(_STRIPPED)
        fragments += [part, index]
    return fragments[:-1]


def merging_encoder(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    unk_id: int,
    added: Mapping[int, AddedToken],
    has_prefix: bool,
    bos: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
) -> PieceEncoder:
    """llama.cpp's tokenizer for the tables of a GGUF file: a space comes before each stretch of text, also behind a
    special token, if the file has `add_space_prefix`. `remove_extra_whitespaces` has no effect there."""
    merger = PieceMerger(pieces, scores, unk_id)

    def encode_text(text: str, is_prefixed: bool) -> list[int]:
        return merger.encode((SPACE if is_prefixed else "") + text.replace(" ", SPACE))

    return PieceEncoder(encode_text, added, "each" if has_prefix else "never", bos=bos, eos=eos)


def vocabulary_only(
    pieces: Mapping[str, int], added: Mapping[int, AddedToken], unk: str | None, *, has_prefix: bool
) -> tokenizers.Tokenizer:
    """A tokenizer of the library that knows every token and decodes, but has no merges."""
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(pieces), merges=[], unk_token=unk, byte_fallback=True))
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens([token for token in added.values() if token.special])
    inner.add_tokens([token for token in added.values() if not token.special])
    return inner


# -- tokenizer.model ---------------------------------------------------------------------------------------------------


def read_model(file: Path, settings: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, PieceEncoder]:
    """The tokenizer of a folder that has only sentencepiece's own file.

    Its ids are those of the `sentencepiece` package for every stretch of text between special tokens. Behind a special
    token it puts no space where tokenizer_config.json says `"legacy": false`.

    Args:
        settings: tokenizer_config.json.

    Raises:
        CheckpointError: the package is missing, or the file is not sentencepiece's.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(
            f"{file} needs the sentencepiece package: pip install 'hopskip[sentencepiece]', or put the model's "
            "tokenizer.json beside it"
        ) from None
    processor: Any = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except Exception as error:  # the package raises RuntimeError, and others for what is no such file at all
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} is not a sentencepiece model ({reason}); put the model's tokenizer.json beside it"
        ) from None
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    added = {
        index: AddedToken(piece, normalized=False, special=True)
        for index, piece in enumerate(pieces)
        if processor.is_control(index) or processor.is_unknown(index)
    } | _added_tokens(file, settings)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {token.content: index for index, token in added.items()}
    has_prefix = processor.normalize("a").startswith(SPACE)
    is_legacy = settings.get("legacy") is not False
    encoder = PieceEncoder(
        _text_encoder(processor, pieces),
        added,
        ("each" if is_legacy else "first") if has_prefix else "never",
        bos=_only(processor.bos_id(), settings.get("add_bos_token", True)),
        eos=_only(processor.eos_id(), settings.get("add_eos_token", False)),
    )
    return vocabulary_only(vocabulary, added, processor.id_to_piece(processor.unk_id()), has_prefix=has_prefix), encoder


def _text_encoder(processor: Any, pieces: Sequence[str]) -> Callable[[str, bool], list[int]]:
    """The package puts a space before whatever it is given; a character of no piece before the text takes it away."""
    characters = set().union(*pieces)
    guard = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in characters)
    guard_ids = processor.encode(guard)
    has_prefix = processor.normalize("a").startswith(SPACE)

    def encode_text(text: str, is_prefixed: bool) -> list[int]:
        if is_prefixed or not has_prefix:
            return list(processor.encode(text))
        return list(processor.encode(guard + text)[len(guard_ids) :])

    return encode_text


def _only(index: int, is_wanted: object) -> tuple[int, ...]:
    return (index,) if is_wanted and index >= 0 else ()


def _added_tokens(file: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json."""
    try:
        return {
            int(index): AddedToken(
                token["content"],
                lstrip=bool(token.get("lstrip")),
                rstrip=bool(token.get("rstrip")),
                normalized=False,
                special=bool(token.get("special")),
            )
            for index, token in settings.get("added_tokens_decoder", {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"added_tokens_decoder in {file.parent / 'tokenizer_config.json'} is not a table of tokens by id; "
            "download it again"
        ) from None
