"""On PYTHONPATH, this makes importing PyTorch and transformers fail, as where they are not installed."""

from __future__ import annotations

import sys


class _Absent:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Absent())
