"""How to speculate: the user's choice, and its resolution against a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from hopskip.config import ModelConfig
from hopskip.draft.base import Drafter, FirstOf
from hopskip.draft.early_exit import EarlyExitDrafter
from hopskip.draft.ngram import NgramDrafter
from hopskip.errors import ConfigError
from hopskip.model import Model

DraftSource = Literal["early-exit", "ngram", "both", "none"]
VerifyMode = Literal["recompute", "reuse"]


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How to draft and verify. What is left None is chosen for the model by `resolve`.

    Raises:
        ConfigError: a value is out of range, or would have no effect.
    """

    draft: DraftSource | None = None
    """`early-exit`: the model's first layers. `ngram`: copy from prompt and output. `both`: n-gram where the text has a
    match, else early exit. `none`: plain decoding. None: early exit if the checkpoint's makers recommend one, else
    n-gram."""
    exit_layer: int | None = None
    """The draft runs layers 0..exit_layer-1. None: the checkpoint's recommendation, else a quarter of the layers."""
    num_draft_tokens: int | None = None
    """Most tokens drafted per round. None: the checkpoint's recommendation, else 6."""
    verify: VerifyMode | None = None
    """`recompute`: the verify pass runs all layers, at one fixed shape. `reuse`: it continues from the exit-layer
    states and keys/values that the draft left (the paper's). None: `recompute`."""
    min_confidence: float = 0.0
    """An early-exit draft ends after the first token less probable than this; 0 always drafts `num_draft_tokens`."""

    def __post_init__(self) -> None:
        for name, choices in (("draft", DraftSource), ("verify", VerifyMode)):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise ConfigError(
                f"num_draft_tokens is {self.num_draft_tokens}; it must be at least 1 (draft 'none' turns drafting off)"
            )
        if not 0 <= self.min_confidence < 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must be at least 0 and below 1")
        ineffective: dict[str, tuple[str, ...]] = {
            "none": ("exit_layer", "num_draft_tokens", "verify", "min_confidence"),
            "ngram": ("exit_layer", "min_confidence"),
        }
        for name in ineffective.get(self.draft or "", ()):
            if getattr(self, name) not in (None, 0.0):
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect with draft {self.draft!r}; leave one out"
                )

    def resolve(self, model: ModelConfig) -> SpeculativeConfig:
        """Fill in what was left open, and check the exit layer against the model's depth."""
        draft = self.draft
        if draft is None:
            wants_exit = self.exit_layer is not None or self.min_confidence > 0
            draft = "early-exit" if wants_exit or model.recommended_exit_layer is not None else "ngram"
        if draft == "none":
            return replace(self, draft=draft)
        exit_layer = self.exit_layer
        if draft in ("early-exit", "both"):
            if model.num_hidden_layers == 1:
                raise ConfigError("the model has one layer, so no early exit; use draft 'ngram' or 'none'")
            if exit_layer is None:
                exit_layer = model.recommended_exit_layer or max(1, model.num_hidden_layers // 4)
            if not 0 < exit_layer < model.num_hidden_layers:
                raise ConfigError(
                    f"exit_layer is {exit_layer}; this model has {model.num_hidden_layers} layers, "
                    f"so it must be between 1 and {model.num_hidden_layers - 1}"
                )
        num_draft_tokens = self.num_draft_tokens or model.recommended_num_draft_tokens or 6
        verify = self.verify or "recompute"
        return replace(self, draft=draft, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens, verify=verify)

    def make_drafter(self, model: Model) -> Drafter | None:
        """The drafter of a resolved configuration; None for plain decoding."""
        if self.draft == "none":
            return None
        if self.draft == "ngram":
            return NgramDrafter()
        assert self.exit_layer is not None
        early_exit = EarlyExitDrafter(model, self.exit_layer, self.min_confidence)
        return early_exit if self.draft == "early-exit" else FirstOf(NgramDrafter(), early_exit)
