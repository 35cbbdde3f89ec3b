"""The part of `hopskip info` that says what drafting may gain, and what an exit of the model's own would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopskip.bench.expected import ModelCosts
    from hopskip.bench.gains import Gain
    from hopskip.checkpoint.config import ModelConfig
    from hopskip.checkpoint.trained_exit import TrainedExit
    from hopskip.draft.costs import Costs
    from hopskip.train.exit.estimate import Work


@dataclass(frozen=True, kw_only=True)
class ExpectedGains:
    """What is to be shown of them."""

    gains: list[Gain]
    by_measurement: bool
    has_trained_exit: bool
    work: Work
    flops_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "costs": "measured" if self.by_measurement else "by arithmetic",
            "drafts": [{**gain._asdict(), "source": str(gain.source)} for gain in self.gains],
            "training_an_exit": {
                "seconds": self.work.seconds(self.flops_per_second),
                "collected_tokens": self.work.collected_tokens,
                "trained_tokens": self.work.trained_tokens,
                "disk_bytes": self.work.disk_bytes,
            },
        }

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        costs = "measured costs" if self.by_measurement else "arithmetic on bytes (--measure times them)"
        table = Table(
            title=f"Expected speed over plain decoding, one text at a time, by {costs}",
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 0),
            show_header=False,
        )
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for gain in self.gains:
            table.add_row(self._named(gain), _range(gain), gain.why)
        console = Console(highlight=False)
        console.print()
        console.print(table)
        if not self.has_trained_exit:
            console.print(
                f"To train an exit (hopskip train exit --model MODEL): {self.work.described(self.flops_per_second)}.",
                markup=False,
            )

    def _named(self, gain: Gain) -> str:
        source = gain.source
        if source.kind == "exit-branch":
            return "the trained exit" if self.has_trained_exit else "an exit of its own, once trained"
        if source.kind == "layer-skip":
            return f"a copy in {source.precision}"
        return "n-gram lookup" if source.kind == "ngram" else f"early exit after layer {source.num_layers}"


def _range(gain: Gain) -> str:
    """Plain decoding where nothing is gained: drafts that do not pay are left out."""
    if gain.high < _LEAST:
        return "none"
    low, high = f"{gain.low:.1f}", f"{gain.high:.1f}"
    return f"{low} x" if low == high else f"{low} to {high} x"


_LEAST = 1.05


def expected_gains(
    costs: ModelCosts,
    config: ModelConfig,
    trained_exit: TrainedExit | None,
    *,
    copy_bytes: dict[str, int],
    exit_layer: int | None,
    is_native: bool,
    measured: Costs | None,
) -> ExpectedGains:
    """For a model.

    Args:
        copy_bytes: of copies in lower precision, by precision.
        exit_layer: of early-exit drafts, if the model can have any.
        measured: costs, if they were.
    """
    from hopskip.bench.gains import gains, modelled_costs, with_measured
    from hopskip.train.exit.estimate import Work, exit_parameters, flops_per_second
    from hopskip.train.exit.rule import usual_recipe

    flops = flops_per_second()
    recipe = usual_recipe(config, flops)
    if trained_exit is None:
        num_weights = exit_parameters(recipe.exits(config.num_hidden_layers)[0], config, recipe.vocabulary)
    else:
        num_weights = exit_parameters(trained_exit.config, config, len(trained_exit.vocabulary))
    exit_bytes = num_weights * 34 // 32 if is_native else num_weights * 2
    modelled = modelled_costs(costs, exit_bytes, copy_bytes, exit_layer)
    return ExpectedGains(
        gains=gains(modelled if measured is None else with_measured(modelled, measured), config, trained_exit),
        by_measurement=measured is not None,
        has_trained_exit=trained_exit is not None,
        work=Work.of(recipe, config),
        flops_per_second=flops,
    )


def memory(num_bytes: float) -> str:
    """Bytes in decimal units, three digits.

    >>> memory(96_436_224)
    '96.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: float) -> str:
    """A number of parameters or tokens, in words."""
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"
