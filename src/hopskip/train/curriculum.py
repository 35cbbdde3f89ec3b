"""When the LayerSkip recipe drops a layer, and how much each exit counts: arXiv 2404.16710 as pure functions.

Layers are numbered 0..L-1. The loss of layer l is taken at its *output*, so layer l is what drafting calls exit l + 1.
Steps are numbered 0..T-1. Nothing here has state: a resumed run continues at its step, not at the curriculum's start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from hopskip.errors import ConfigError

Curriculum = Literal["rotational", "gradual", "all"]
DropoutSchedule = Literal["constant", "exponential"]
ExitWeighting = Literal["paper", "uniform", "linear", "sqrt"]
DEFAULT_E_SCALE = 0.1


@dataclass(kw_only=True)
class LayerSkipRecipe:
    """The recipe. The defaults are the paper's for continual training of Llama 3.

    Raises:
        ConfigError: a value is out of range, or would have no effect.
    """

    p_max: float = 0.1
    """Dropout rate of the last layer, per sample; 0 turns layer dropout off."""
    dropout_schedule: DropoutSchedule = "constant"
    """`constant` for continual training and fine-tuning; `exponential` from scratch: it grows from 0 to `p_max`."""
    e_scale: float = DEFAULT_E_SCALE
    """Weight of the early exits' losses; 0 turns them off, and the loss is the ordinary one."""
    exit_weighting: ExitWeighting = "paper"
    """How much each exit counts before `e_scale`, see `raw_weights`. `paper` makes light of early exits; `uniform`,
    `linear` and `sqrt` are torchtune's."""
    exit_weights: list[float] | None = None
    """The weight of each of `exits`, in their order, where the last layer's is 1; in place of `exit_weighting` and
    `e_scale`."""
    curriculum: Curriculum = "rotational"
    """Which exits are on: `rotational` (every `rotation`-th layer, shifted by one each step), `gradual` (from the last
    layer down, all of them by half the run), `all`. The last layer is always on."""
    rotation: int | None = None
    """R of the rotational curriculum; None is 8, or all layers where there are fewer."""
    exits: list[int] | None = None
    """Exits (numbers of layers run) that may be on, where the draft will leave; None is every layer."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy of the early exits. The last layer's is always 1."""
    kl_weight: float = 0.0
    """Weight of KL(last layer || exit), which distils the model into its own exits."""
    same_dropout_on_every_rank: bool = False
    """Whether data-parallel ranks drop the same layers of their first, second, .. sample, or draw for themselves."""
    chunk_tokens: int | None = None
    """Rows of logits at once (tokens times exits); None is as many as fit, by the vocabulary and the free memory."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("curriculum", Curriculum),
            ("dropout_schedule", DropoutSchedule),
            ("exit_weighting", ExitWeighting),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(choices))}")
        if not 0 <= self.p_max < 1:
            raise ConfigError(f"p_max is {self.p_max}; it must be at least 0 and below 1")
        for name in ("e_scale", "ce_weight", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("rotation", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.rotation is not None and self.curriculum != "rotational":
            raise ConfigError(
                f"rotation={self.rotation} has no effect with curriculum {self.curriculum!r}; leave it out"
            )
        self._check_exits()
        if self.has_exits and self.ce_weight == self.kl_weight == 0:
            raise ConfigError("ce_weight and kl_weight are both 0, so the exits would learn nothing; use e_scale=0")

    def _check_exits(self) -> None:
        if self.exit_weights is not None:
            if self.exits is None or len(self.exits) != len(self.exit_weights):
                raise ConfigError(
                    f"exit_weights are {self.exit_weights}, but exits are {self.exits}; give a weight for each of them"
                )
            if not all(0 < weight < math.inf for weight in self.exit_weights):
                raise ConfigError(f"exit_weights are {self.exit_weights}; each must be above 0")
            for name, default in (("e_scale", DEFAULT_E_SCALE), ("exit_weighting", "paper")):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} has no effect beside exit_weights; leave one of them out"
                    )
        if self.exits is None:
            return
        if not self.exits or min(self.exits) < 1 or len(set(self.exits)) < len(self.exits):
            raise ConfigError(f"exits are {self.exits}; name at least one, each once and 1 or more, or leave it out")
        if 1 in self.exits and self.exit_weights is None and self.exit_weighting == "paper":
            raise ConfigError(
                f"exits are {self.exits}, but the paper's e(l) gives exit 1 no weight; leave 1 out, or set "
                "exit_weighting or exit_weights"
            )

    @property
    def has_exits(self) -> bool:
        """Whether any exit is trained."""
        return self.e_scale > 0

    def dropout_rates(self, step: int, num_steps: int, num_layers: int) -> list[float]:
        """p(l, t) = S(t) D(l) p_max of each layer."""
        time = time_scale(step, num_steps) if self.dropout_schedule == "exponential" else 1.0
        return [time * depth_scale(layer, num_layers) * self.p_max for layer in range(num_layers)]

    def loss_weights(self, step: int, num_steps: int, num_layers: int) -> list[float]:
        """ẽ(l, t) of each layer: 0 where the exit is off; they add up to 1."""
        if self.exit_weights is None or self.exits is None:
            weights = raw_weights(num_layers, self.e_scale, self.exit_weighting)
        else:
            given = dict(zip(self.exits, self.exit_weights, strict=True))
            weights = [*(given.get(layer + 1, 0.0) for layer in range(num_layers - 1)), 1.0]
        return normalized_weights(self.exits_on(step, num_steps, num_layers), weights)

    def exits_on(self, step: int, num_steps: int, num_layers: int) -> list[bool]:
        """C(t, l) of each layer.

        Raises:
            ConfigError: `exits` names one that the model does not have.
        """
        if self.exits is not None and max(self.exits) >= num_layers:
            raise ConfigError(
                f"exits name {max(self.exits)}; in a model of {num_layers} layers they end at {num_layers - 1}"
            )
        if self.curriculum == "rotational":
            is_on = rotational(step, num_layers, self.rotation or min(8, num_layers))
        elif self.curriculum == "gradual":
            is_on = gradual(step, num_steps, num_layers)
        else:
            is_on = [True] * num_layers
        exits = range(1, num_layers) if self.exits is None else self.exits
        return [on and layer + 1 in exits for layer, on in enumerate(is_on[:-1])] + [True]


def depth_scale(layer: int, num_layers: int) -> float:
    """D(l) = e^(l ln2 / (L-1)) - 1: 0 at the first layer, 1 at the last."""
    return math.expm1(layer * math.log(2) / (num_layers - 1))


def time_scale(step: int, num_steps: int) -> float:
    """S(t) = e^(t ln2 / (T-1)) - 1: 0 at the first step, 1 at the last."""
    return math.expm1(step * math.log(2) / max(num_steps - 1, 1))


def rotational(step: int, num_layers: int, rotation: int) -> list[bool]:
    """Every `rotation`-th layer, and the last one; the pattern shifts by one layer each step.

    >>> [layer for layer, is_on in enumerate(rotational(1, 8, 3)) if is_on]
    [1, 4, 7]
    """
    return [(layer - step) % rotation == 0 or layer == num_layers - 1 for layer in range(num_layers)]


def gradual(step: int, num_steps: int, num_layers: int) -> list[bool]:
    """From the last layer down, one more every T / 2L steps: all are on from about half the run.

    >>> gradual(2, 8, 4)  # one more layer each step
    [False, True, True, True]
    """
    num_on = 1 + 2 * num_layers * step // num_steps
    return [num_layers - layer <= num_on for layer in range(num_layers)]


def raw_weights(num_layers: int, e_scale: float, weighting: ExitWeighting = "paper") -> list[float]:
    """e(l) of each layer.

    `paper`: e_scale (0 + 1 + .. + l) for the exits, L-1 + e_scale (0 + 1 + .. + L-2) for the last layer. The others
    are e_scale f(l) for the exits and f(L-1) for the last: f(l) = 1 (`uniform`), l + 1 (`linear`) or its root (`sqrt`).

    >>> raw_weights(4, 0.5, "linear")
    [0.5, 1.0, 1.5, 4.0]
    """
    last = num_layers - 1
    if weighting == "paper":
        return [*(e_scale * layer * (layer + 1) / 2 for layer in range(last)), last + e_scale * (last - 1) * last / 2]
    power = {"uniform": 0.0, "linear": 1.0, "sqrt": 0.5}[weighting]
    return [*(e_scale * (layer + 1) ** power for layer in range(last)), num_layers**power]


def normalized_weights(exits_on: list[bool], weights: list[float]) -> list[float]:
    """ẽ(l) = C(l) e(l) / sum of C(i) e(i).

    >>> normalized_weights([True, False, True], [1.0, 2.0, 3.0])
    [0.25, 0.0, 0.75]
    """
    on = [weight if is_on else 0.0 for weight, is_on in zip(weights, exits_on, strict=True)]
    return [weight / sum(on) for weight in on]
