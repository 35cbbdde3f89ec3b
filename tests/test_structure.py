"""The floor plan: imports go downwards only and not far, rooms stay small, and nobody asks what kind a backend is."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "hopskip"
LAYERS = [
    ("errors", "options", "version"),
    ("machine", "speculative", "sampling_params"),
    ("checkpoint", "sequence"),
    ("sampling", "text"),
    ("backends",),
    ("prompts", "draft"),
    ("engine",),
    ("loading",),
    ("llm",),
    ("hf",),
    ("train", "serve", "prove", "bench", "export", "doors"),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))
OTHER_CODE = sorted((ROOT / "benchmarks").glob("*.py"))
BROWSER_CODE = [
    path for path in sorted((PACKAGE / "serve" / "page").iterdir()) if path.suffix in (".js", ".css", ".html")
]
NATIVE_CODE = [path for path in sorted((ROOT / "native").iterdir()) if path.suffix in (".cpp", ".h", ".inl")]

MOST_MODULES, MOST_LINES, MOST_LINES_OF_A_FUNCTION, LONGEST_CHAIN = 12, 400, 80, 15


def name_of(path: Path) -> str:
    """`draft.exit`; of a package's own file the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


@cache
def imported(name: str) -> frozenset[str]:
    """Modules of hopskip that a module imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hopskip":
            origin = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{origin}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else origin)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("hopskip.")}
    return frozenset(found - {name, ""})


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_down(name: str) -> None:
    own = name.split(".")[0]
    assert own in RANK, f"{own} has no place in LAYERS"
    for other in {module.split(".")[0] for module in imported(name)} - {own}:
        assert RANK[other] < RANK[own], f"{own} imports {other}, which lies beside or above it"


@cache
def longest_chain(name: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """From a module down. Packages' own files and the command's entry count for nothing: they pass things on."""
    assert name not in above, f"a circle: {' > '.join((*above, name))}"
    below = max((longest_chain(other, (*above, name)) for other in imported(name)), key=len, default=())
    is_entry = MODULES[name].name in ("__init__.py", "__main__.py")
    return below if is_entry else (name, *below)


def test_the_way_down_is_short() -> None:
    chains = [longest_chain(name) for name in MODULES if name]
    longest = max(chains, key=len)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_the_top_level_is_a_table_of_contents() -> None:
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, modules


@pytest.mark.parametrize("path", [*SOURCES, *OTHER_CODE, *BROWSER_CODE, *NATIVE_CODE], ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", [*SOURCES, *OTHER_CODE], ids=lambda path: path.name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


@pytest.mark.parametrize("name", [name for name in MODULES if name and not name.startswith("backends")])
def test_nobody_asks_what_kind_a_backend_is(name: str) -> None:
    """No isinstance, getattr, hasattr or cast on a backend, and no class of one but where it is made."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "getattr", "hasattr", "cast"):
            assert not re.search(r"backend\b", ast.unparse(node).lower()), ast.unparse(node)
        if name != "loading" and isinstance(node, ast.ImportFrom) and node.module:
            assert not node.module.endswith(("native.backend", "torch.backend")), ast.unparse(node)
