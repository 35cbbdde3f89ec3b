"""Whether two tokenizers give the same ids, as far as a set of difficult texts can tell."""

# ruff: noqa: RUF001 (signs that look like ASCII are what the texts are about)
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hopskip.errors import CheckpointError, shown
from hopskip.text.tokenizer import Encode, Tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'VE said so; we'Ll see, 'tis. HTTPServer, iOS's",
    "  two spaces,   three, \t tabs\t\tand\n\n\nlines \n \n\r\n  indented:\n    def f(x):\n\treturn x  ",
    "1 12  123   1234 12345 3.14159 1,000,000 2024-11-30 0x1F a1b22c333 \u00bd \u0663\u0664 \u096a\u096b",
    "!!! ... ?!?! -> => != <= && || ++i; (x[0])->y {a: 'b'} \"q\" @user #tag $5.00 ~/path/to/file.txt\nhttps://a.b/c?d=e&f",
    "Grüße aus Köln, naïve café, Łódź, İstanbul, ÅNGSTRÖM's Привет, Ελληνικά, עברית, العربية, हिन्दी, ภาษาไทย",
    "你好，世界！こんにちは。カタカナ 한국어 안녕 繁體字 \u3000全角 ｆｕｌｌ \U00020000",
    "🙂🚀👩\u200d👩\u200d👧 \u00a0nbsp\u2003em “quotes” — dash… ™ © ∑∫ € £ \ufeff \u200b\u2028",
    "a",
    " ",
)
"""In composed form, as some tokenizers compose accents first and llama.cpp's do not."""


def check_ids(place: Path, wanted: Callable[..., list[int]], found: Encode) -> None:
    """Raises CheckpointError if a tokenizer that was written gives other ids than the model's own.

    Args:
        place: of the model, for the message.
        wanted: the model's own, `Tokenizer.encode`.
        found: the new one.
    """
    for text in TEXTS:
        for adds in (True, False):
            ids = found(text, adds)
            if ids != wanted(text, add_special_tokens=adds):
                raise CheckpointError(
                    f"{place}: its tokenizer has no exact form in the other format: {shown(text)} becomes other ids; "
                    "export in the format of the source"
                )


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and behind a text."""
    inside, whole = (tokenizer.encode("a", add_special_tokens=adds) for adds in (False, True))
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    return [], []
