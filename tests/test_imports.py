"""Imports go downwards only: the core never reaches for the edges, and the edges not for each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "hopskip"
LAYERS = [
    ("errors", "stats"),
    ("trace",),
    ("rope",),
    ("config",),
    ("cache", "sampling", "text"),
    ("sequence", "verify", "attention", "branch"),
    ("model", "quantize", "stored", "chat_template"),
    ("gguf", "hf_folder"),
    ("weights", "hub", "tokenizer"),
    ("packed",),
    ("native",),
    ("draft",),
    ("load", "engine", "static"),
    ("llm",),
    ("train", "evaluate", "serve", "export"),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Top-level names within hopskip that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hopskip":
            found |= {alias.name for alias in node.names if (PACKAGE / alias.name).with_suffix(".py").exists()}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hopskip."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hopskip.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in LAYERS"
    for name in imported(path) - {own}:
        assert RANK[name] < RANK[own], f"{own} imports {name}, which lies beside or above it"
