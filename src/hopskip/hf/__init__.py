"""Self-speculation for models of transformers that are in memory already, behind `model.generate(custom_generate=...)`.

    model.generate(**inputs, custom_generate=hopskip.hf.self_speculative, exit_layer=8)

Importing this module imports neither PyTorch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopskip.hf.calls import generate, self_speculative
    from hopskip.hf.folder import write_custom_generate

_HOMES = {"generate": "calls", "self_speculative": "calls", "write_custom_generate": "folder"}
__all__ = ["generate", "self_speculative", "write_custom_generate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hopskip.machine import require

    if _HOMES[name] == "calls":
        require("transformers", f"hopskip.hf.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
