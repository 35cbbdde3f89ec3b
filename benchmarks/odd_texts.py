"""Texts on which tokenizers differ: every script, code, emoji, spaces of all kinds, runs of digits, signs, controls."""

# ruff: noqa: RUF001, SIM905 (look-alikes are what it is about; a list of words is a page long)
from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence as Seq

WORDS = """
the of and to in is that it for was with as his they be at one have this from or had by hot word but
what some we can out other were all there when up use your how said an each she which do their time
if will way about many don't can't I'll we've they're he's I'm she'd DON'T CAN'T I'LL WE'VE THEY'RE
HE'S I'M camelCase PascalCase snake_case SCREAMING_CASE kebab-case iPhone McDonald XMLHttpRequest
Größe straße Straẞe naïve façade Ångström çok ığdır İstanbul ŠKODA Dvořák Łódź Việt tiếng
người ﬁnance ſlow ǅ ǈ ª º µ привет мир ПРИВЕТ Мир ёж Ünïcödé καλημέρα
κόσμε ΣΊΣΥΦΟΣ ﻻ שלום עולם שָׁלוֹם مرحبا بالعالم مُحَمَّد ۱۲۳ ٣٤٥ नमस्ते दुनिया क्षेत्र
हिन्दी বাংলা ভাষা தமிழ் మాట ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ සිංහල ภาษาไทย สวัสดี ສະບາຍດີ ខ្មែរ မြန်မာ
བོད་སྐད ქართული მხედრული ᲛᲮᲔᲓ հայերեն አማርኛ ᎠᎡᎢ ᐃᓄᒃ ᠮᠣᠩᠭᠣᠯ 你好世界 漢字 简体字 繁體 中文测试，标点。
こんにちは カタカナ ﾊﾝｶｸ 日本語 漢字かな交じり 안녕하세요 한국어 ㄱㄴㄷ ㅎㅏㄴ ㄅㄆㄇ 𠀀𠮷 㐀㐁 〆
々 ٪ ₹ € £ ¥ © ® ™ ° ± × ÷ ½ ¼ ² ³ ① Ⅷ ⅷ 一二三 ๑๒๓ १२३ 〡〢〣 ０１２ 🙂 👍🏽
👩‍👩‍👧‍👦 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ ☎ ★ ☃ ⌘ → ← ⇒ ∀x∈ℝ ∑∫√ ≤≥≠ αβγ 𝒜𝓑𝕔 e\u0301 n\u0303
a\u0308\u0304 o\u0308 \u0301 ํ q\u0307\u0323
Z\u0351\u036b\u0313\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324\u031e\u0349\u035a\u032f\u0345 0
7 42 123 1234 12345 123456 1234567 3.14159 1,000,000 1e-9 0xDEADBEEF 0b1010 192.168.0.1 v2.0.1 12:30
2024-01-31 $5.99 50% #1 x2 2x a1b2 A1 H2O C3PO 12½ ٣x
""".split()
CODE = (
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\r\n}\r\n",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';\n",
    "<div class=\"a\" id='b'>&nbsp;</div>\n",
    '#include <stdio.h>\n\n\nint main(void) { printf("%d\\n", 3); }\n',
    'a = {\'k\': [1, 2.5, None], "é": "ü"}\n',
    "https://example.org/a/b?q=%20x&y=1#frag user@mail.com C:\\Windows\\x.txt ~/.bashrc\n",
    "import numpy as np\n\n\n\nclass A(B):\n        pass\n\n",
    "x|y||z&&w^v~u `code` ```py\nprint()\n``` **bold** _it_ - [ ] $x_1^2$ \\alpha{}\n",
    "(((a)))[[b]]{{c}}<<d>> !!! ??? ... --- === +++ ~~~ ///// \\\\\\ @@@ ### $$$ %%% ^^^ &&& *** ;;; :::\n",
    "<sentinel:12> IMGIMGABCZ IMGIMGAZ <0x41> <s> </s> ▁under▁score ▁▁ \u2581\n",
)
SPACES = (
    *(
        " ",
        "  ",
        "   ",
        "    ",
        "     ",
        " " * 9,
        " " * 17,
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\r",
        "\t",
        "\t\t",
        " \n",
        "\n ",
    ),
    *(
        "\n  ",
        "  \n  ",
        " \t",
        "\t ",
        "\u00a0",
        "\u3000",
        "\u2003",
        "\u2028",
        "\u0085",
        "\x0b",
        "\x0c",
        "\u200b",
        "\ufeff",
    ),
    *(" \u00a0", "\u3000\u3000", " \n \n ", "\r\n\r\n", "\n\t\n", "\u1680", "\u202f", "\u205f", "\x1c", "\x1f"),
)
SIGNS = (
    *(
        ".",
        ",",
        "!",
        "?",
        ";",
        ":",
        "'",
        '"',
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'t",
        "'D",
        "'re",
        "’s",
        "'ſ",
        "-",
        "--",
        "_",
        "/",
    ),
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "…",
        "。",
        "，",
        "、",
        "！",
        "？",
        "；",
        "：",
        "「",
        "」",
        "・",
        "«",
        "»",
        "„",
        "“",
        "”",
        "‘",
    ),
    *(
        "@",
        "#",
        "$",
        "%",
        "^",
        "&",
        "*",
        "+",
        "=",
        "<",
        ">",
        "|",
        "\\",
        "`",
        "~",
        "।",
        "۔",
        "،",
        "؟",
        "¿",
        "¡",
        "\x00",
        "\x07",
    ),
    *("\x7f", "\x80", "\u00ad", "\u200d", "\ufe0f", "\ufffd", "\ue000", "\U000f0000", "\u0378", "\U0001f3fd"),
)


def make_texts(count: int, seed: int, special: Seq[str]) -> list[str]:
    """Different texts: each kind of word, sign and space alone, pairs of them, runs of digits, then mixtures."""
    random_ = random.Random(seed)
    atoms = [*WORDS, *SIGNS, *special]
    texts = dict.fromkeys(["", *WORDS, *CODE, *SPACES, *SIGNS, *special])
    texts |= dict.fromkeys(space + word for word in random_.sample(WORDS, 80) for space in random_.sample(SPACES, 3))
    texts |= dict.fromkeys(random_.choice(WORDS) + sign + random_.choice(WORDS) for sign in (*SIGNS, *special))
    texts |= dict.fromkeys("7" * n + tail for n in range(1, 13) for tail in ("", "x", " 1", ".5", "½", "\n"))
    texts |= dict.fromkeys(f"{a}{b}" for a in SPACES[:16] for b in SPACES[:16])
    texts |= dict.fromkeys(
        a * n for a in ("a", "A", "=", "-", "ab", "é", "字", "🙂", "na", " a") for n in (2, 3, 7, 64, 300)
    )
    while len(texts) < count:
        parts = []
        for _ in range(random_.choice((2, 3, 4, 6, 10, 24))):
            kind = random_.random()
            if kind < 0.04:
                parts.append("".join(chr(_assigned(random_)) for _ in range(random_.randint(1, 6))))
            elif kind < 0.1:
                parts.append(random_.choice(CODE))
            elif kind < 0.16:
                parts.append(str(random_.getrandbits(random_.choice((4, 10, 20, 40, 64)))))
            else:
                parts.append(random_.choice(atoms))
            if random_.random() < 0.75:
                parts.append(" " if random_.random() < 0.6 else random_.choice(SPACES))
        texts["".join(parts)] = None
    return list(texts)[:count]


def _assigned(random_: random.Random) -> int:
    """A character of the first two planes that Unicode 14 has; the two sides' tables differ in what came with 16."""
    while True:
        code = random_.randint(0x20, random_.choice((0x2FF, 0x1FFF, 0xFFFF, 0x1FFFF)))
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co"):
            return code
