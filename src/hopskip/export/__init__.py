"""Models and exits in the formats of other engines: `early_exit`, `eagle3`, `merged`, `gguf`."""

from hopskip.export.kinds import eagle3, early_exit, gguf, merged

__all__ = ["eagle3", "early_exit", "gguf", "merged"]
