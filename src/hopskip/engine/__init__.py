"""The engine: admits requests and steps them together."""

from hopskip.engine.engine import Engine, make_engine

__all__ = ["Engine", "make_engine"]
