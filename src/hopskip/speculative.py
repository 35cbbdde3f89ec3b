"""How to speculate, as the user says it: a value and the rules that it keeps. What is left open is filled in for a
model by `hopskip.draft.make`. And what drafts can come from: a source, an exit made of layers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hopskip.errors import ConfigError, check_choice, check_count, check_number
from hopskip.options import documented, option, short_repr

DraftChoice = Literal["auto", "exit-branch", "early-exit", "layer-skip", "ngram", "both", "none"]
VerifyMode = Literal["recompute", "reuse"]
DraftPrecision = Literal["q8", "q4"]
DraftKind = Literal["early-exit", "exit-branch", "layer-skip", "ngram"]
"""Kinds of sources that a draft can come from, whatever chose among them."""

MAX_RUNNER_UPS = 32


def layer_list(text: str) -> tuple[int, ...]:
    """Layers as options name them.

    >>> layer_list("10+11"), layer_list("none")
    ((10, 11), ())
    """
    try:
        return () if text.strip() == "none" else tuple(sorted({int(part) for part in text.split("+")}))
    except ValueError:
        raise ConfigError(f"skip_layers is {text!r}; give layers with + between, such as 10+11, or none") from None


@documented
@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How to draft and verify. What is left None is chosen for the model (`hopskip.draft.make.resolve`).

    Raises:
        ConfigError: a value is out of range, or would have no effect.
    """

    draft: DraftChoice | None = option(
        None,
        "auto (what pays, round by round; the default beside a trained exit), exit-branch (a trained exit), "
        "early-exit (the model's first layers), layer-skip (all its layers but some), ngram (text seen before), "
        "both, or none; by default what suits the model.",
        "SOURCE",
    )
    """`auto`: each round takes what pays by measured costs and acceptance: the trained exit, an early exit, n-gram or
    nothing. `exit-branch`: the trained exit that is attached to the model. `early-exit`: the model's first layers.
    `layer-skip`: all its layers but some, or all in lower precision. `ngram`: copy from prompt and output. `both`:
    n-gram where the text has a match, else layer-skip if an option of it is given, else the trained exit if there is
    one, else early exit. `none`: plain decoding. None: `both` with an option of layer-skip; `auto` with a trained exit
    (on the torch backend, whose passes all have the same rows, `both`); early exit if an option of it is given or the
    checkpoint's makers recommend it; else n-gram."""
    exit_branch: str | Path | None = option(
        None, "A trained exit for the model (default: the one that comes with hopskip, if any).", "FOLDER"
    )
    """Folder of the trained exit. None: the one that ships for the model, if any."""
    exit_layer: int | None = option(None, "An early-exit draft runs this many layers.", "E")
    """An early-exit draft runs layers 0..exit_layer-1. None: the checkpoint's recommendation, else a quarter of the
    layers."""
    num_draft_tokens: int | None = option(None, "Most tokens drafted in a round.", "K")
    """Most tokens drafted per round. None: the recommendation of trained exit or checkpoint, else 6; with draft `auto`
    16 where a pass computes no more rows than it needs, so that room for a long draft costs nothing."""
    num_runner_ups: int | None = option(
        None, "Verify this many tokens beside each draft of an exit, as second choices for its places.", "N"
    )
    """Tokens that an exit names beside each draft, to be verified in its places: rows of the verify pass, but no draft
    steps. None: the trained exit's recommendation, else 0. With draft `auto` the most that it may choose; None: 4 where
    a pass computes no more rows than it needs, else 0."""
    skip_layers: tuple[int, ...] | None = option(
        None,
        "Layers that a layer-skip draft leaves out, such as 10+11+14, or none; by default those that a short search "
        "finds.",
        "LAYERS",
        parse=layer_list,
    )
    """Layers that a layer-skip draft leaves out, counted from 0; () is none of them. None: those that a short search
    finds (`hopskip.draft.skip_search`), once per model and precision. Draft `auto` then has layer-skip as a choice."""
    draft_precision: DraftPrecision | None = option(
        None, "Draft with a copy of the model's layers in q8 or q4; it takes memory and never changes the text.", "TYPE"
    )
    """A copy of the model in this precision drafts for early exit and layer-skip (native backend). It takes memory and
    never changes the text. None: the model's own weights. With draft `auto` layer-skip is one of the choices then."""
    verify: VerifyMode | None = option(
        None,
        "recompute (the verify pass runs all layers) or reuse (it goes on from where an early-exit draft stopped).",
        "MODE",
    )
    """`recompute`: the verify pass runs all layers, at one fixed shape. `reuse`: it continues from the exit-layer
    states and keys/values that the draft left (the paper's). None: `recompute`."""
    min_confidence: float = option(0.0, "End a draft at a token less probable than this.", "P")
    """A draft of an exit ends after the first token less probable than this; 0 always drafts `num_draft_tokens`."""
    num_speculative_tokens: InitVar[int | None] = None
    """Another name for `num_draft_tokens`, as vLLM has it."""

    __repr__ = short_repr

    def __post_init__(self, num_speculative_tokens: int | None) -> None:
        if num_speculative_tokens is not None:
            if self.num_draft_tokens not in (None, num_speculative_tokens):
                raise ConfigError(
                    f"num_draft_tokens={self.num_draft_tokens} and num_speculative_tokens={num_speculative_tokens} are "
                    "two names of one thing; leave one out"
                )
            object.__setattr__(self, "num_draft_tokens", num_speculative_tokens)
        check_choice("draft", self.draft, DraftChoice)
        check_choice("verify", self.verify, VerifyMode)
        check_choice("draft_precision", self.draft_precision, DraftPrecision)
        for name, least, wanted in _COUNTS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), wanted, least=least)
        if (self.num_runner_ups or 0) > MAX_RUNNER_UPS:
            raise ConfigError(f"num_runner_ups is {self.num_runner_ups}; it must be {_COUNTS[1][2]}")
        check_number("min_confidence", self.min_confidence, "at least 0 and below 1")
        if not 0 <= self.min_confidence < 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must be at least 0 and below 1")
        for name in _WITHOUT_EFFECT.get(self.draft or "", ()):
            if getattr(self, name) not in (None, 0.0):
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect with draft {self.draft!r}; leave one out"
                )
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        for holds, message in _CONTRADICTIONS:
            if holds(self):
                raise ConfigError(message.format(**values))

    @property
    def may_use_trained_exit(self) -> bool:
        """Whether a trained exit could have an effect."""
        if self.exit_layer is not None or self.verify == "reuse":
            return False
        return self.draft in ("auto", "exit-branch") or (self.draft in (None, "both") and not self.uses_layer_skip)

    @property
    def uses_layer_skip(self) -> bool:
        """Whether layer-skip drafts, beside lookup or as one of the choices of `auto`."""
        has_options = self.skip_layers is not None or self.draft_precision is not None
        return self.draft == "layer-skip" or (has_options and (self.exit_layer is None or self.draft == "auto"))


_COUNTS = (
    ("num_draft_tokens", 1, "at least 1 (draft 'none' turns drafting off)"),
    ("num_runner_ups", 0, f"0 to {MAX_RUNNER_UPS}"),
    ("exit_layer", -(2**31), "the number of a layer"),  # how many there are, the model knows
)
_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "none": (
        *("min_confidence", "num_runner_ups", "exit_layer", "exit_branch", "num_draft_tokens", "verify"),
        *("skip_layers", "draft_precision"),
    ),
    "ngram": ("min_confidence", "num_runner_ups", "exit_layer", "exit_branch", "skip_layers", "draft_precision"),
    "early-exit": ("exit_branch", "skip_layers"),
    "layer-skip": ("exit_branch", "exit_layer"),
    "exit-branch": ("exit_layer", "skip_layers", "draft_precision"),
}
"""By draft, the options that could not change it."""

_REUSE = "verify 'reuse' goes on from "
_CONTRADICTIONS: tuple[tuple[Callable[[SpeculativeConfig], object], str], ...] = (
    (
        lambda c: c.draft in (None, "both") and c.exit_layer is not None and c.skip_layers is not None,
        "exit_layer={exit_layer} and skip_layers={skip_layers} are two drafts; leave one out",
    ),
    (
        lambda c: c.skip_layers == () and c.draft_precision is None,
        "skip_layers names no layer, so the draft would take as long as what it drafts for; name some, or give a "
        "draft_precision",
    ),
    (
        lambda c: c.exit_branch is not None and c.exit_layer is not None,
        "exit_branch={exit_branch} and exit_layer={exit_layer} are two exits; leave one out",
    ),
    (
        lambda c: c.verify == "reuse" and c.draft == "auto",
        _REUSE + "one early exit; name it with draft 'early-exit', or leave it out",
    ),
    (
        lambda c: c.verify == "reuse" and (c.draft == "layer-skip" or c.skip_layers or c.draft_precision),
        _REUSE + "the first layers in the model's own precision; leave out layer-skip and draft_precision",
    ),
    (
        lambda c: c.verify == "reuse" and c.num_runner_ups,
        _REUSE + "a chain of drafted tokens; leave num_runner_ups out",
    ),
    (
        lambda c: c.verify == "reuse" and (c.draft == "exit-branch" or c.exit_branch is not None),
        _REUSE + "an early exit, which a trained exit is not; leave it out",
    ),
)
"""Options that cannot stand together, and what is said of them."""


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
