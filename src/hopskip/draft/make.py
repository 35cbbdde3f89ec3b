"""From what the user says to a drafter: fill in what was left open, find out what must be measured, build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hopskip.backends.base import Backend
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.auto import AutoDrafter
from hopskip.draft.base import Drafter, FirstOf
from hopskip.draft.exit import Exit, ExitDrafter
from hopskip.draft.ngram import NgramDrafter
from hopskip.draft.skip_search import search
from hopskip.draft.timing import MAX_ROWS, MOST_ROWS, Timings
from hopskip.errors import ConfigError
from hopskip.machine import kept_path
from hopskip.speculative import DraftChoice, OwnLayers, SpeculativeConfig, early_exit, layer_skip

_USUAL_LENGTH = 6
_USUAL_LENGTH_OF_LAYER_SKIP = 3  # its steps cost more than those of an exit
_MOST_RUNNER_UPS_BY_CHOICE = 4

Identity = Mapping[str, object]
"""What distinguishes a model's weights and precision, JSON-ready: by it is remembered what was measured of them."""


def prepare(
    backend: Backend,
    speculative: SpeculativeConfig,
    identity: Identity | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[SpeculativeConfig, Drafter | None]:
    """A whole configuration, and its drafter; None for plain decoding. Where layers to skip must be searched for, or
    costs measured, and neither is remembered, this takes seconds.

    Args:
        identity: None remembers nothing.
        progress: told what takes the time, and the share that is done.

    Raises:
        ConfigError: the configuration does not fit the model.
    """
    resolved = resolve(speculative, backend.config, backend.trained_exit, row_exact=backend.traits.row_exact)
    if resolved.uses_layer_skip and resolved.skip_layers is None:
        resolved = _with_layers_to_skip(resolved, backend, identity, progress)
    return resolved, make_drafter(resolved, backend, identity, progress)


def resolve(
    speculative: SpeculativeConfig,
    model: ModelConfig,
    trained_exit: TrainedExit | None = None,
    *,
    row_exact: bool = True,
) -> SpeculativeConfig:
    """Fill in what was left open, and check the choice against the model. Layers to skip stay open.

    Args:
        trained_exit: the one that is attached to the model, if any.
        row_exact: of the backend, see `Traits`.

    Raises:
        ConfigError: the choice does not fit the model.
    """
    draft = speculative.draft or _default_draft(speculative, model, trained_exit, row_exact)
    if draft == "none":
        return replace(speculative, draft=draft, num_runner_ups=0)
    if draft == "exit-branch" and trained_exit is None:
        raise ConfigError(
            "draft is 'exit-branch', but no trained exit is given and none ships for this model; "
            "train one with `hopskip train exit`, or use draft 'early-exit' or 'ngram'"
        )
    trained = trained_exit if draft in ("auto", "exit-branch", "both") and speculative.may_use_trained_exit else None
    exit_layer = speculative.exit_layer
    if (
        draft == "early-exit"
        or (draft == "auto" and exit_layer is not None)
        or (draft == "both" and trained is None and not speculative.uses_layer_skip)
    ):
        exit_layer = _checked_exit_layer(exit_layer, model)
    depth = model.num_hidden_layers
    if speculative.skip_layers is not None and not set(speculative.skip_layers) < set(range(depth)):
        raise ConfigError(
            f"skip_layers is {list(speculative.skip_layers)}; this model has layers 0 to {depth - 1}, "
            "and some must be left"
        )
    length = trained.num_draft_tokens if trained else model.recommended_num_draft_tokens or _USUAL_LENGTH
    num_runner_ups = trained.num_runner_ups if trained else 0
    if speculative.uses_layer_skip and draft != "auto":
        length = _USUAL_LENGTH_OF_LAYER_SKIP
    if draft == "auto":
        length = MAX_ROWS - 1 if row_exact else length
        num_runner_ups = _MOST_RUNNER_UPS_BY_CHOICE if row_exact else 0
    return replace(
        speculative,
        draft=draft,
        exit_layer=exit_layer,
        num_draft_tokens=speculative.num_draft_tokens or length,
        num_runner_ups=num_runner_ups if speculative.num_runner_ups is None else speculative.num_runner_ups,
        verify=speculative.verify or "recompute",
    )


def _default_draft(
    speculative: SpeculativeConfig, model: ModelConfig, trained_exit: TrainedExit | None, row_exact: bool
) -> DraftChoice:
    if speculative.exit_layer is not None or speculative.verify == "reuse":
        return "early-exit"
    if speculative.uses_layer_skip:
        return "both"  # lookup where the text repeats itself, the layers elsewhere
    if trained_exit is not None:
        return "auto" if row_exact else "both"  # where all passes have the same rows, there is less to choose
    wants_exit = speculative.min_confidence > 0 or model.recommended_exit_layer is not None
    return "early-exit" if wants_exit else "ngram"


def _checked_exit_layer(exit_layer: int | None, model: ModelConfig) -> int:
    depth = model.num_hidden_layers
    if depth == 1:
        raise ConfigError("the model has one layer, so no early exit; use draft 'ngram' or 'none'")
    if exit_layer is None:
        exit_layer = _usual_exit_layer(model)
    if not 0 < exit_layer < depth:
        raise ConfigError(
            f"exit_layer is {exit_layer}; this model has {depth} layers, so it must be between 1 and {depth - 1}"
        )
    return exit_layer


def _usual_exit_layer(model: ModelConfig) -> int:
    return model.recommended_exit_layer or max(1, model.num_hidden_layers // 4)


def _with_layers_to_skip(
    speculative: SpeculativeConfig,
    backend: Backend,
    identity: Identity | None,
    progress: Callable[[str, float], None],
) -> SpeculativeConfig:
    precision = speculative.draft_precision
    path = kept_path({**identity, "draft_precision": precision}, "skip") if identity else None
    found = search(backend, precision, path, lambda share: progress("looking for layers to skip", share))
    if not found.skip_layers and precision is None:
        raise ConfigError(
            "no layer of this model can be skipped with a gain; give a draft_precision, or choose skip_layers"
        )
    return replace(speculative, skip_layers=found.skip_layers)


def make_drafter(
    speculative: SpeculativeConfig,
    backend: Backend,
    identity: Identity | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Drafter | None:
    """The drafter of a whole configuration; None for plain decoding. Draft `auto` measures costs, unless they are
    remembered by `identity`."""
    if speculative.draft == "none":
        return None
    assert speculative.num_draft_tokens is not None
    assert speculative.num_runner_ups is not None
    num_rows = speculative.num_draft_tokens + 1 + speculative.num_runner_ups

    def tell(share: float) -> None:
        progress("measuring costs", share)

    if speculative.draft == "auto":
        exits = exits_of(speculative, backend)
        timings = Timings(backend, exits, identity)
        return AutoDrafter(
            backend,
            exits,
            timings.get(tell),
            keep_costs=timings.put,
            max_draft_tokens=speculative.num_draft_tokens,
            max_runner_ups=speculative.num_runner_ups,
            rows_per_sequence=1 if backend.traits.row_exact else num_rows,
            min_confidence=speculative.min_confidence,
        )
    exit = None if speculative.draft == "ngram" else _fixed_exit(speculative, backend)
    drafter: Drafter = NgramDrafter()
    if exit is not None:
        drafter = ExitDrafter(backend, exit, speculative.min_confidence, speculative.num_runner_ups)
        drafter = FirstOf(NgramDrafter(), drafter) if speculative.draft == "both" else drafter
    timings = Timings(backend, [] if exit is None else [exit], identity, (1, min(num_rows, MOST_ROWS)))
    # Drafts do not hang on these costs, so they are not timed at every start; and a pass that goes on from a draft's
    # states is none of the table's.
    if timings.are_kept and speculative.verify != "reuse":
        drafter.costs = timings.get(tell)
    return drafter


def _fixed_exit(speculative: SpeculativeConfig, backend: Backend) -> Exit:
    """What a draft other than `auto` takes, beside lookup or alone."""
    if speculative.uses_layer_skip:
        return _layer_skip(speculative, backend)
    if speculative.exit_layer is not None:
        return early_exit(speculative.exit_layer, speculative.draft_precision)
    assert backend.trained_exit is not None
    return backend.trained_exit


def exits_of(speculative: SpeculativeConfig, backend: Backend) -> list[Exit]:
    """What `auto` may draft from besides lookup: the exit that is asked for, else the trained one, else the early exits
    that may be worth a try; and a layer-skip draft, if one is asked for."""
    found: list[Exit] = []
    if speculative.skip_layers is not None:
        found.append(_layer_skip(speculative, backend))
    if speculative.exit_layer is not None:
        return [*found, early_exit(speculative.exit_layer, speculative.draft_precision)]
    if backend.trained_exit is not None:
        return [*found, backend.trained_exit]
    first = _usual_exit_layer(backend.config)
    layers = (layer for layer in (first, 2 * first) if 0 < layer < backend.config.num_hidden_layers)
    return [*found, *(early_exit(layer, speculative.draft_precision) for layer in layers)]


def _layer_skip(speculative: SpeculativeConfig, backend: Backend) -> OwnLayers:
    assert speculative.skip_layers is not None, "the layers to skip have not been looked for"
    return layer_skip(speculative.skip_layers, backend.config.num_hidden_layers, speculative.draft_precision)


class DraftersByExit:
    """Drafters of requests that ask for an exit layer of their own, made when first asked for.

    Args:
        speculative: as it was resolved; its draft is `early-exit` or `both`.
    """

    def __init__(self, speculative: SpeculativeConfig, backend: Backend) -> None:
        self._speculative, self._backend = speculative, backend
        self._drafters: dict[int, Drafter] = {}

    def at(self, exit_layer: int) -> Drafter:
        """Raises ConfigError if the model has no such exit."""
        if exit_layer not in self._drafters:
            config = resolve(replace(self._speculative, exit_layer=exit_layer), self._backend.config)
            drafter = make_drafter(config, self._backend)
            assert drafter is not None
            self._drafters[exit_layer] = drafter
        return self._drafters[exit_layer]
