"""A folder that transformers takes for `custom_generate`, and that needs no hopskip."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hopskip.errors import check_count

_PARTS = ("model.py", "texts.py", "loop.py")


def write_custom_generate(folder: str | Path, exit_layer: int, num_draft_tokens: int = 4) -> Path:
    """Write `custom_generate/generate.py` to a folder, which may hold a checkpoint. Then
    `model.generate(..., custom_generate=folder, trust_remote_code=True)` drafts with the model's first layers; and a
    model that was loaded from the folder with `trust_remote_code=True` does so by itself. Returns the file.

    Args:
        exit_layer, num_draft_tokens: where the call says nothing else.

    Raises:
        ConfigError: a number is below 1.
        OSError: the folder cannot be written.
    """
    check_count("exit_layer", exit_layer, "a whole number of at least 1")
    check_count("num_draft_tokens", num_draft_tokens, "a whole number of at least 1")
    source = _joined([(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _PARTS])
    for name, value in ("EXIT_LAYER", exit_layer), ("NUM_DRAFT_TOKENS", num_draft_tokens):
        source, count = re.subn(rf"^({name}\b.*) = \S+$", rf"\g<1> = {value}", source, flags=re.MULTILINE)
        assert count == 1, name
    path = Path(folder) / "custom_generate" / "generate.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


def _joined(sources: list[str]) -> str:
    """Modules as one: the docstring of the last, all imports but those of each other, then the code in order."""
    names: dict[str, set[str]] = {"__future__": set(), "": set()}
    bodies, heading = [], None
    for source in sources:
        docstring, *statements = ast.parse(source).body
        heading = ast.get_source_segment(source, docstring)
        imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            if not module.startswith("hopskip"):
                names.setdefault(module, set()).update(alias.name for alias in node.names)
        bodies.append("\n".join(source.splitlines()[imports[-1].end_lineno :]).strip())
    lines = [
        f"from {module} import {', '.join(sorted(found))}" if module else f"import {', '.join(sorted(found))}"
        for module, found in names.items()
    ]
    return "\n\n\n".join([f"{heading}\n\n" + "\n".join(lines), *bodies]) + "\n"
