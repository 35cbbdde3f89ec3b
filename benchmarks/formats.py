"""Which models and files hopskip reads, as the Markdown tables of the documents.

python -m benchmarks.formats
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from hopskip.backends.native.formats import EXACT
from hopskip.checkpoint.families import FAMILIES
from hopskip.checkpoint.gguf import ARCHITECTURES
from hopskip.checkpoint.quantization import FP8_METHODS
from hopskip.checkpoint.rope import SUPPORTED_ROPE_TYPES
from hopskip.checkpoint.safetensors import PLAIN_TYPES
from hopskip.checkpoint.stored import BLOCK_TYPES, FP8_TYPES

_ROOT = Path(__file__).parent.parent
PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]


def families() -> str:
    """One row for each family."""
    rows = []
    for family, models in FAMILIES.items():
        in_gguf = [name for name, model_type in ARCHITECTURES.items() if model_type == family]
        rows.append((models, f"`{family}`", _code(in_gguf)))
    return _table(("models", "`model_type`", "GGUF architecture"), rows)


def files() -> str:
    """One row for each kind of file."""
    own = [block.name for block in BLOCK_TYPES.values() if block.dtype is None and block.name in EXACT]
    others = [block.name for block in BLOCK_TYPES.values() if block.dtype is None and block.name not in EXACT]
    plain = [block.name for block in BLOCK_TYPES.values() if block.dtype is not None]
    rows = [
        ("safetensors, whole or in shards", _code(PLAIN_TYPES), ""),
        ("safetensors, 8-bit floats with scales", _code(FP8_TYPES), f"`quant_method`: {_code(FP8_METHODS)}"),
        ("GGUF, whole or split", _code(plain), "versions 2 and 3, little-endian"),
        ("GGUF, quantized", _code(own), "native formats of their own; types may be mixed within a file"),
        ("GGUF, other blocks", _code(others), "read, and run in 8 bits"),
    ]
    return _table(("file", "types of weights", "notes"), rows)


def scalings() -> str:
    """How positions may be scaled."""
    return f"RoPE scaling: {_code([name for name in SUPPORTED_ROPE_TYPES if name != 'default'])}.\n"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them in place of older ones in README.md and docs/")
    written = [families(), files(), scalings()]
    if not parser.parse_args().write:
        print(*written, sep="\n", end="")
        return
    for page in PAGES:
        text = before = page.read_text(encoding="utf-8")
        for new in written:
            head, _, rest = new.partition("\n")
            old = rf"^{re.escape(head)}\n(?:\|.*\n)*" if rest else rf"^{re.escape(head.partition('`')[0])}.*\n"
            text = re.sub(old, lambda _, new=new: new, text, flags=re.MULTILINE)  # type: ignore[misc]
        if text != before:
            page.write_text(text, encoding="utf-8")
            print(f"{page} is up to date again")


if __name__ == "__main__":
    main()
