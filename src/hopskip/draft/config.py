"""How to speculate: the user's choice, and its resolution against a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from hopskip.branch import ExitBranch
from hopskip.config import ModelConfig
from hopskip.draft.auto import AutoDrafter
from hopskip.draft.base import Drafter, FirstOf
from hopskip.draft.costs import MAX_ROWS, Exit, Timings, kept_path
from hopskip.draft.exit import ExitDrafter
from hopskip.draft.ngram import NgramDrafter
from hopskip.draft.self_draft import DraftPrecision, SelfDraft, early_exit, search, without
from hopskip.errors import ConfigError
from hopskip.model import Model

_MAX_RUNNER_UPS = 32
_MOST_RUNNER_UPS_BY_CHOICE = 4
_USUAL_LENGTH_OF_LAYER_SKIP = 3  # its steps cost more than those of an exit
_OF_EXITS = ("min_confidence", "num_runner_ups")
_OF_SELF_DRAFTS = ("skip_layers", "draft_precision")

DraftSource = Literal["auto", "exit-branch", "early-exit", "layer-skip", "ngram", "both", "none"]
VerifyMode = Literal["recompute", "reuse"]


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How to draft and verify. What is left None is chosen for the model by `resolve`.

    Raises:
        ConfigError: a value is out of range, or would have no effect.
    """

    draft: DraftSource | None = None
    """`auto`: each round takes what pays by measured costs and acceptance: the branch, an early exit, n-gram or
    nothing. `exit-branch`: the trained exit that is attached to the model. `early-exit`: the model's first layers.
    `layer-skip`: all its layers but some, or all in lower precision. `ngram`: copy from prompt and output. `both`:
    n-gram where the text has a match, else layer-skip if an option of it is given, else the branch if there is one,
    else early exit. `none`: plain decoding. None: `both` with an option of layer-skip; `auto` with a branch (on the
    torch backend, whose passes all have the same rows, `both`); early exit if an option of it is given or the
    checkpoint's makers recommend it; else n-gram."""
    exit_branch: str | Path | None = None
    """Folder of the trained exit. None: the one that ships for the model, if any."""
    exit_layer: int | None = None
    """An early-exit draft runs layers 0..exit_layer-1. None: the checkpoint's recommendation, else a quarter of the
    layers."""
    num_draft_tokens: int | None = None
    """Most tokens drafted per round. None: the recommendation of branch or checkpoint, else 6; with draft `auto` 16
    where a pass computes no more rows than it needs, so that room for a long draft costs nothing."""
    num_runner_ups: int | None = None
    """Tokens that branch or early exit name beside each draft, to be verified in its places: rows of the verify pass,
    but no draft steps. None: the branch's recommendation, else 0. With draft `auto` the most that it may choose; None:
    4 where a pass computes no more rows than it needs, else 0."""
    skip_layers: tuple[int, ...] | None = None
    """Layers that a layer-skip draft leaves out, counted from 0; () is none of them. None: those that a short search
    finds (`self_draft.search`), once per model and precision. Draft `auto` then has layer-skip as a choice."""
    draft_precision: DraftPrecision | None = None
    """A copy of the model in this precision drafts for early exit and layer-skip (native backend). It takes memory and
    never changes the text. None: the model's own weights. With draft `auto` layer-skip is one of the choices then."""
    verify: VerifyMode | None = None
    """`recompute`: the verify pass runs all layers, at one fixed shape. `reuse`: it continues from the exit-layer
    states and keys/values that the draft left (the paper's). None: `recompute`."""
    min_confidence: float = 0.0
    """A draft of branch or early exit ends after the first token less probable than this; 0 always drafts
    `num_draft_tokens`."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("draft", DraftSource),
            ("verify", VerifyMode),
            ("draft_precision", DraftPrecision),
        ):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise ConfigError(
                f"num_draft_tokens is {self.num_draft_tokens}; it must be at least 1 (draft 'none' turns drafting off)"
            )
        if self.num_runner_ups is not None and not 0 <= self.num_runner_ups <= _MAX_RUNNER_UPS:
            raise ConfigError(f"num_runner_ups is {self.num_runner_ups}; it must be 0 to {_MAX_RUNNER_UPS}")
        if not 0 <= self.min_confidence < 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must be at least 0 and below 1")
        ineffective: dict[str, tuple[str, ...]] = {
            "none": (*_OF_EXITS, "exit_layer", "exit_branch", "num_draft_tokens", "verify", *_OF_SELF_DRAFTS),
            "ngram": (*_OF_EXITS, "exit_layer", "exit_branch", *_OF_SELF_DRAFTS),
            "early-exit": ("exit_branch", "skip_layers"),
            "layer-skip": ("exit_branch", "exit_layer"),
            "exit-branch": ("exit_layer", *_OF_SELF_DRAFTS),
        }
        for name in ineffective.get(self.draft or "", ()):
            if getattr(self, name) not in (None, 0.0):
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect with draft {self.draft!r}; leave one out"
                )
        if self.draft in (None, "both") and self.exit_layer is not None and self.skip_layers is not None:
            raise ConfigError(
                f"exit_layer={self.exit_layer} and skip_layers={list(self.skip_layers)} are two drafts; leave one out"
            )
        if self.skip_layers == () and self.draft_precision is None:
            raise ConfigError(
                "skip_layers names no layer, so the draft would take as long as what it drafts for; name some, or give "
                "a draft_precision"
            )

        if self.verify == "reuse" and self.draft == "auto":
            raise ConfigError(
                "verify 'reuse' goes on from one early exit; name it with draft 'early-exit', or leave it out"
            )
        if self.verify == "reuse" and (self.draft == "layer-skip" or self.skip_layers or self.draft_precision):
            raise ConfigError(
                "verify 'reuse' goes on from the first layers in the model's own precision; leave out layer-skip and "
                "draft_precision"
            )
        if self.verify == "reuse" and self.num_runner_ups:
            raise ConfigError("verify 'reuse' goes on from a chain of drafted tokens; leave num_runner_ups out")
        if self.verify == "reuse" and (self.draft == "exit-branch" or self.exit_branch is not None):
            raise ConfigError("verify 'reuse' goes on from an early exit, which a trained exit is not; leave it out")
        if self.exit_branch is not None and self.exit_layer is not None:
            raise ConfigError(
                f"exit_branch={self.exit_branch} and exit_layer={self.exit_layer} are two exits; leave one out"
            )

    @property
    def may_use_branch(self) -> bool:
        """Whether a trained exit could have an effect."""
        if self.exit_layer is not None or self.verify == "reuse":
            return False
        return self.draft in ("auto", "exit-branch") or (self.draft in (None, "both") and not self._is_layer_skip)

    @property
    def _is_layer_skip(self) -> bool:
        """Whether layer-skip drafts, beside lookup or as one of the choices of `auto`."""
        has_options = self.skip_layers is not None or self.draft_precision is not None
        return self.draft == "layer-skip" or (has_options and (self.exit_layer is None or self.draft == "auto"))

    def resolve(
        self, model: ModelConfig, branch: ExitBranch | None = None, *, row_exact: bool = True
    ) -> SpeculativeConfig:
        """Fill in what was left open, and check the choice against the model.

        Args:
            branch: the trained exit that is attached to the model, if any.
            row_exact: of the model, see `Model`.
        """
        draft = self.draft or self._default_draft(model, branch, row_exact)
        if draft == "none":
            return replace(self, draft=draft, num_runner_ups=0)
        if draft == "exit-branch" and branch is None:
            raise ConfigError(
                "draft is 'exit-branch', but no trained exit is given and none ships for this model; "
                "train one with `hopskip train exit`, or use draft 'early-exit' or 'ngram'"
            )
        has_branch = branch is not None and draft in ("auto", "exit-branch", "both") and self.may_use_branch
        exit_layer = self.exit_layer
        if (
            draft == "early-exit"
            or (draft == "auto" and exit_layer is not None)
            or (draft == "both" and not has_branch and not self._is_layer_skip)
        ):
            if model.num_hidden_layers == 1:
                raise ConfigError("the model has one layer, so no early exit; use draft 'ngram' or 'none'")
            if exit_layer is None:
                exit_layer = model.recommended_exit_layer or max(1, model.num_hidden_layers // 4)
            if not 0 < exit_layer < model.num_hidden_layers:
                raise ConfigError(
                    f"exit_layer is {exit_layer}; this model has {model.num_hidden_layers} layers, "
                    f"so it must be between 1 and {model.num_hidden_layers - 1}"
                )
        if self.skip_layers is not None and not set(self.skip_layers) < set(range(model.num_hidden_layers)):
            raise ConfigError(
                f"skip_layers is {list(self.skip_layers)}; this model has layers 0 to {model.num_hidden_layers - 1}, "
                "and some must be left"
            )
        recommended = branch.num_draft_tokens if branch and has_branch else model.recommended_num_draft_tokens
        if self._is_layer_skip and draft != "auto":
            recommended = _USUAL_LENGTH_OF_LAYER_SKIP
        longest = MAX_ROWS - 1 if draft == "auto" and row_exact else recommended or 6
        num_runner_ups = branch.num_runner_ups if branch and has_branch else 0
        if draft == "auto":
            num_runner_ups = _MOST_RUNNER_UPS_BY_CHOICE if row_exact else 0
        return replace(
            self,
            draft=draft,
            exit_layer=exit_layer,
            num_draft_tokens=self.num_draft_tokens or longest,
            num_runner_ups=num_runner_ups if self.num_runner_ups is None else self.num_runner_ups,
            verify=self.verify or "recompute",
        )

    def _default_draft(self, model: ModelConfig, branch: ExitBranch | None, row_exact: bool) -> DraftSource:
        if self.exit_layer is not None or self.verify == "reuse":
            return "early-exit"
        if self._is_layer_skip:
            return "both"  # lookup where the text repeats itself, the layers elsewhere
        if branch is not None:
            return "auto" if row_exact else "both"  # where all passes have the same rows, there is less to choose
        wants_exit = self.min_confidence > 0 or model.recommended_exit_layer is not None
        return "early-exit" if wants_exit else "ngram"

    def make_drafter(self, model: Model, identity: Mapping[str, object] | None = None) -> Drafter | None:
        """The drafter of a resolved configuration; None for plain decoding.

        Args:
            identity: of the model's weights and precision, by which `auto` remembers its costs; see `Timings`.
        """
        if self.draft == "none":
            return None
        if self.draft == "ngram":
            return NgramDrafter()
        if self.draft == "auto":
            assert self.num_draft_tokens is not None
            exits = self.exits(model)
            return AutoDrafter(
                model,
                exits,
                Timings(model, exits, identity),
                max_draft_tokens=self.num_draft_tokens,
                fixed_length=self._usual_length(model),
                max_runner_ups=self.num_runner_ups or 0,
                rows_per_sequence=1 if model.row_exact else self.num_draft_tokens + 1 + (self.num_runner_ups or 0),
                min_confidence=self.min_confidence,
            )
        exit: Exit | None = model.branch
        if self._is_layer_skip:
            exit = self._layer_skip(model)
        elif self.exit_layer is not None:
            exit = early_exit(self.exit_layer, self.draft_precision)
        assert exit is not None
        assert self.num_runner_ups is not None
        drafter = ExitDrafter(model, exit, self.min_confidence, self.num_runner_ups)
        return FirstOf(NgramDrafter(), drafter) if self.draft == "both" else drafter

    def _usual_length(self, model: Model) -> int:
        """Of a draft from the first of the exits that `auto` has."""
        if self.skip_layers is not None:
            return _USUAL_LENGTH_OF_LAYER_SKIP
        if self.exit_layer is None and model.branch is not None:
            return model.branch.num_draft_tokens
        return model.config.recommended_num_draft_tokens or 6

    def exits(self, model: Model) -> list[Exit]:
        """What `auto` may draft from besides lookup: the exit that is asked for, else the branch, else the early exits
        that may be worth a try; and a layer-skip draft, if one is asked for."""
        found: list[Exit] = []
        if self.skip_layers is not None:
            found.append(self._layer_skip(model))
        if self.exit_layer is not None:
            return [*found, early_exit(self.exit_layer, self.draft_precision)]
        if model.branch is not None:
            return [*found, model.branch]
        depth = model.config.num_hidden_layers
        first = model.config.recommended_exit_layer or max(1, depth // 4)
        layers = (layer for layer in sorted({first, 2 * first}) if 0 < layer < depth)
        return [*found, *(early_exit(layer, self.draft_precision) for layer in layers)]

    def _layer_skip(self, model: Model) -> SelfDraft:
        assert self.skip_layers is not None, "the layers to skip have not been looked for"
        return without(self.skip_layers, model.config.num_hidden_layers, self.draft_precision)

    def search(self, model: Model, identity: Mapping[str, object] | None = None) -> SpeculativeConfig:
        """Of a resolved configuration: with the layers to skip, where they are left open. See `self_draft.search`."""
        if not self._is_layer_skip or self.skip_layers is not None:
            return self
        path = kept_path({**identity, "draft_precision": self.draft_precision}, "skip") if identity else None
        found = search(model, self.draft_precision, path)
        if not found.skip_layers and self.draft_precision is None:
            raise ConfigError(
                "no layer of this model can be skipped with a gain; give a draft_precision, or choose skip_layers"
            )
        return replace(self, skip_layers=found.skip_layers)


def layer_list(text: str) -> tuple[int, ...]:
    """Layers as options name them.

    >>> layer_list("10+11"), layer_list("none")
    ((10, 11), ())
    """
    try:
        return () if text.strip() == "none" else tuple(sorted({int(part) for part in text.split("+")}))
    except ValueError:
        raise ConfigError(f"skip_layers is {text!r}; give layers with + between, such as 10+11, or none") from None
