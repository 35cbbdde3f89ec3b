r"""How byte-level vocabularies cut text into words before merging, by the names that GGUF files use.

`tokenizer.ggml.pre` names one of the splitters that are built into llama.cpp; the words here are those that llama.cpp
makes, which are what a file was tested with. Where it approximates a model's own pattern, so do these: it knows letters
(`\p{L}`) but not their case beyond ASCII, leaves out some whitespace, and cuts digits together with what stands before
them (`afmoe`). Characters that Unicode 16 added count as what they are; llama.cpp's tables end with Unicode 15.1.

Patterns are in Oniguruma's syntax. Several are applied one after the other, each to the words that those before have
left; what no pattern matches is a word too.
"""

# ruff: noqa: RUF001 (look-alikes of ASCII signs are what the patterns are about)
from __future__ import annotations

from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """One splitter, and what else llama.cpp ties to its name."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    """A word that is a token as a whole stays whole, whatever the merges say."""
    adds_bos: bool = False
    """Where the file does not say."""

    def build(self) -> tokenizers.pre_tokenizers.PreTokenizer:
        """The splitter, with each byte of a word then written as a character of GPT-2's alphabet."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# -- parts of patterns -------------------------------------------------------------------------------------------------

_SUFFIX = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_MAYBE_SUFFIX = f"(?:{_SUFFIX})?"
_LETTER = r"\p{L}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_SPACE = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACE}"
_MARKED_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_IDEOGRAPHS = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_GROUPED_DIGITS = r"(?<=\p{N})\p{N}{3}|[^\p{N}]*+\p{N}{1,3}?(?=(?:\p{N}{3})*+(?!\p{N}))|[^\p{N}]+"
"""Digits in threes, counted from the right; the first group comes with all that stands before it."""


def _cased_word(letters: str, suffix: str = "") -> str:
    """Capitals, then small letters; letters beyond ASCII count as both.

    Args:
        letters: what is in a class of letters, such as `\\p{L}`.
        suffix: a pattern that may end a word.
    """
    upper, lower = f"[{letters}&&[^a-z]]", f"[{letters}&&[^A-Z]]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"


def _like_llama3(digits: str, suffix: str = f"{_SUFFIX}|") -> str:
    return rf"{suffix}{_WORD}|{digits}|{_SIGNS}[\r\n]*|{_LINES}"


# -- patterns ----------------------------------------------------------------------------------------------------------

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|{_SPACE}"
_LLAMA3 = _like_llama3(r"\p{N}{1,3}")
_QWEN2 = _like_llama3(r"\p{N}")
_DEEPSEEK3 = (r"\p{N}{1,3}", _IDEOGRAPHS, rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_AFTER_CASED = rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}"
_HAN = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\U0002f800-\U0002fa1f"
)
_ASIAN_SCRIPTS = (
    "\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff"
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴ"
    "ᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_IDEOGRAPHS = r"[\u0800-\u9fa5\uac00-\ud7ff&&[^\s]]+"
_FALCON_SIGNS = r"\p{P}\$\+<=>\^~\|"

_ROWS: dict[tuple[str, ...], PreTokenizer] = {
    (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ): PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
    ("glm4", "glm5"): PreTokenizer((_LLAMA3,), ignores_merges=True),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): PreTokenizer((_LLAMA3,)),
    (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    ): PreTokenizer((_QWEN2,)),
    ("qwen35",): PreTokenizer((rf"{_SUFFIX}|{_MARKED_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",)),
    ("ufakzeka",): PreTokenizer((_like_llama3(r"\p{N}", suffix=""),)),
    ("laguna",): PreTokenizer((r"[^\n]+|\n+", _QWEN2)),
    ("minicpm5",): PreTokenizer((r"\p{N}{1,3}", _like_llama3(r"\p{N}+")), ignores_merges=True),
    ("bailingmoe", "bailingmoe2", "llada-moe"): PreTokenizer(
        (rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}[\r\n]*|\s*[\r\n]|{_SPACE}",)
    ),
    ("seed-coder",): PreTokenizer((rf"{_SUFFIX}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)),
    ("exaone-moe",): PreTokenizer(
        (
            rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SIGNS}[\r\n/]?"
            rf"|\s*[\r\n]|{_SPACE}",
        )
    ),
    ("jais-2",): PreTokenizer(
        (
            rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|\s*[\r\n]+|"
            + "|".join(rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
            + r"|\s",
        )
    ),
    (
        *("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum"),
        *("modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "trillion"),
        *("granite-docling", "exaone4"),
    ): PreTokenizer((_GPT2,)),
    (*("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),): PreTokenizer(
        (r"\p{N}", _GPT2)
    ),
    ("falcon",): PreTokenizer((rf"[{_FALCON_SIGNS}`]+", _GPT2, "[0-9]{3}")),
    ("default",): PreTokenizer((rf"[{_FALCON_SIGNS}]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    ("chameleon",): PreTokenizer(
        ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", "[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        adds_bos=True,
    ),
    ("deepseek-llm",): PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟、。]+",
            r"\s+\z",
            _DEEPSEEK_IDEOGRAPHS,
            r"\p{N}+",
        )
    ),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_IDEOGRAPHS, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): PreTokenizer(_DEEPSEEK3),
    ("spark2_5",): PreTokenizer((*_DEEPSEEK3[:2], rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACE}", r"\p{N}")),
    ("afmoe",): PreTokenizer(
        (
            _GROUPED_DIGITS,
            f"[{_ASIAN_SCRIPTS}]+",
            _DEEPSEEK3[2],
        )
    ),
    ("youtu",): PreTokenizer(
        (
            f"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|{_IDEOGRAPHS}",
            rf"{_MARKED_LETTERS}{_MAYBE_SUFFIX}|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}",
        ),
        ignores_merges=True,
    ),
    ("poro-chat", "bloom", "gpt3-finnish"): PreTokenizer((_BLOOM,)),
    ("viking",): PreTokenizer((_BLOOM, r"\p{N}")),
    ("tekken",): PreTokenizer(
        (rf"{_cased_word(_LETTER)}|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}",), ignores_merges=True, adds_bos=True
    ),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): PreTokenizer(
        (_cased_word(_LETTER, _MAYBE_SUFFIX) + _AFTER_CASED,)
    ),
    ("granite-embed-multi-97m",): PreTokenizer(
        (_cased_word(_LETTER + r"\p{M}", _MAYBE_SUFFIX) + _AFTER_CASED,),
        ignores_merges=True,
    ),
    ("tiny_aya", "cohere2moe"): PreTokenizer(
        (
            _GROUPED_DIGITS,
            _MARKED_LETTERS + _MAYBE_SUFFIX + _AFTER_CASED,
        )
    ),
    ("kimi-k2",): PreTokenizer(
        (
            rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_SUFFIX})?|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*"
            rf"|{_LINES}",
        )
    ),
    ("superbpe",): PreTokenizer((r"\p{N}+", r"(?=(?:[0-9]{3})++(?![0-9]))")),
}

PRE_TOKENIZERS = {name: row for names, row in _ROWS.items() for name in names}
"""By `tokenizer.ggml.pre`. A wrong pattern would give wrong ids without a sign of it, so an unknown one is refused."""

REFUSED = {
    "gemma4": "its merges are on plain text",
    "granite-embed-multi-311m": "its merges are on plain text",
    "sarvam-moe": "its merges are on plain text",
    "whitespace": "its merges are on plain text",
}
"""Names that llama.cpp knows, of vocabularies that are not byte-level; no model that hopskip runs has them."""
