"""Where drafts come from: what each source is called, and what an exit runs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hopskip.speculative import DraftKind, DraftPrecision


class Source(NamedTuple):
    """Who drafts. Costs and acceptance are kept by source.

    >>> str(Source("early-exit", 8)), str(Source("layer-skip", 24, "q4")), Source.parse("ngram") == LOOKUP
    ('early-exit:8', 'layer-skip:24-q4', True)
    """

    kind: DraftKind
    num_layers: int | None = None
    """Of the model's own layers that draft."""
    precision: DraftPrecision | None = None
    """Of these layers; None is the model's own."""

    def __str__(self) -> str:
        """As traces and cost tables have it."""
        layers = "" if self.num_layers is None else f":{self.num_layers}"
        return self.kind + layers + (f"-{self.precision}" if self.precision else "")

    @classmethod
    def parse(cls, name: str) -> Source:
        """The source of this name.

        Raises:
            ValueError: there is none.
        """
        kind, _, rest = name.partition(":")
        num_layers, _, precision = rest.partition("-")
        found = cls(kind, int(num_layers) if num_layers else None, precision or None)  # type: ignore[arg-type]
        if str(found) != name or kind not in DraftKind.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"{name!r} is no source of drafts")
        return found


LOOKUP = Source("ngram")
"""Costs nothing but rows. All others are exits, whose drafts of several sequences share their steps."""
TRAINED_EXIT = Source("exit-branch")


@dataclass(frozen=True, kw_only=True)
class OwnLayers:
    """An exit that is made of the model's own layers. The first ones are an early exit (arXiv 2404.16710). All but some
    are layer skipping (Draft & Verify, 2309.08168; SWIFT, 2410.06916). All of them in fewer bits are a quantized
    self-draft (QuantSpec, 2502.10424). In any case they read keys and values that the model has left."""

    kind: Literal["early-exit", "layer-skip"]
    layers: tuple[int, ...]
    """Rising."""
    precision: DraftPrecision | None = None

    @property
    def source(self) -> Source:
        return Source(self.kind, len(self.layers), self.precision)


def early_exit(exit_layer: int, precision: DraftPrecision | None = None) -> OwnLayers:
    """The layers before an exit layer."""
    return OwnLayers(kind="early-exit", layers=tuple(range(exit_layer)), precision=precision)


def layer_skip(skipped: Seq[int], num_layers: int, precision: DraftPrecision | None = None) -> OwnLayers:
    """All of `num_layers` layers but these."""
    layers = tuple(layer for layer in range(num_layers) if layer not in skipped)
    return OwnLayers(kind="layer-skip", layers=layers, precision=precision)
