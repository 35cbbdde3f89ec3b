"""The formulas of arXiv 2404.16710 against values worked by hand, and both curricula over whole runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hopskip.errors import ConfigError
from hopskip.train.curriculum import (
    LayerSkipRecipe,
    depth_scale,
    gradual,
    normalized_weights,
    raw_weights,
    rotational,
    time_scale,
)


def test_depth_scale() -> None:
    # L = 5: e^(l ln2 / 4) - 1 = 2^(l/4) - 1
    expected = [0.0, 0.18921, 0.41421, 0.68179, 1.0]
    assert [depth_scale(layer, 5) for layer in range(5)] == pytest.approx(expected, abs=5e-6)


def test_time_scale() -> None:
    # T = 11: 2^(t/10) - 1
    assert [time_scale(t, 11) for t in (0, 5, 10)] == pytest.approx([0.0, 0.41421, 1.0], abs=5e-6)
    assert time_scale(0, 1) == 0.0


def test_dropout_rates() -> None:
    constant = LayerSkipRecipe(p_max=0.2)
    assert constant.dropout_rates(0, 11, 3) == pytest.approx([0.0, 0.082843, 0.2], abs=1e-6)
    assert constant.dropout_rates(10, 11, 3) == constant.dropout_rates(0, 11, 3)
    growing = LayerSkipRecipe(p_max=0.2, dropout_schedule="exponential")
    assert growing.dropout_rates(0, 11, 3) == [0.0, 0.0, 0.0]
    # S(5) = 0.41421; times 0.082843 and 0.2
    assert growing.dropout_rates(5, 11, 3) == pytest.approx([0.0, 0.034315, 0.082843], abs=1e-6)
    assert growing.dropout_rates(10, 11, 3) == pytest.approx([0.0, 0.082843, 0.2], abs=1e-6)


def test_raw_weights() -> None:
    # L = 5, e_scale = 0.2: 0.2 (0, 1, 3, 6) for the exits; 4 + 0.2 (0+1+2+3) = 5.2 for the last
    assert raw_weights(5, 0.2) == pytest.approx([0.0, 0.2, 0.6, 1.2, 5.2])
    # L = 32, e_scale = 0.1 (Llama 3): layer 8 is 0.1 * 36, the last 31 + 0.1 * 465
    assert raw_weights(32, 0.1)[8] == pytest.approx(3.6)
    assert raw_weights(32, 0.1)[31] == pytest.approx(77.5)


def test_normalized_weights() -> None:
    # only layers 1, 3 and the last on: 0.2, 1.2, 5.2 over 6.6
    weights = normalized_weights([False, True, False, True, True], raw_weights(5, 0.2))
    assert weights == pytest.approx([0.0, 0.030303, 0.0, 0.181818, 0.787879], abs=1e-6)


def test_without_exits_all_weight_is_on_the_last_layer() -> None:
    weights = LayerSkipRecipe(e_scale=0.0).loss_weights(3, 10, 6)
    assert weights == [0.0] * 5 + [1.0]


@pytest.mark.parametrize(("num_layers", "rotation"), [(8, 3), (32, 8), (6, 1), (5, 9)])
def test_rotational_over_a_run(num_layers: int, rotation: int) -> None:
    counts = [0] * num_layers
    for step in range(3 * rotation):
        on = rotational(step, num_layers, rotation)
        assert on[-1]
        assert sum(on) <= math.ceil(num_layers / rotation) + 1  # no more unembeddings than that
        shifted = rotational(step + 1, num_layers, rotation)
        assert shifted[1:-1] == on[: num_layers - 2]  # by one layer each step
        counts = [count + is_on for count, is_on in zip(counts, on, strict=True)]
    assert counts[:-1] == [3] * (num_layers - 1)  # each exit once per rotation
    assert counts[-1] == 3 * rotation


def test_gradual_over_a_run() -> None:
    # L = 4, T = 80: one more layer every 80 / 8 = 10 steps
    numbers = [sum(gradual(step, 80, 4)) for step in range(80)]
    assert numbers == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 50
    for step in range(80):
        on = gradual(step, 80, 4)
        assert on == sorted(on)  # always the deepest ones
        assert on[-1]


def test_gradual_does_not_depend_on_steps_seen() -> None:
    """A resumed run asks for step 25 first."""
    assert gradual(25, 80, 4) == [False, True, True, True]


def test_chosen_exits() -> None:
    """Exit E is the output of layer E - 1; the curriculum goes on as if it knew of no choice."""
    everywhere = LayerSkipRecipe(curriculum="all", e_scale=0.2, exits=[2, 4])
    assert everywhere.exits_on(0, 10, 5) == [False, True, False, True, True]
    assert everywhere.loss_weights(0, 10, 5) == pytest.approx([0.0, 0.030303, 0.0, 0.181818, 0.787879], abs=1e-6)
    rotating = LayerSkipRecipe(rotation=3, exits=[2, 4])
    assert [rotating.exits_on(step, 10, 5)[:-1] for step in range(3)] == [
        [False, False, False, True],
        [False, True, False, False],
        [False, False, False, False],
    ]
    assert LayerSkipRecipe(curriculum="gradual", exits=[2]).exits_on(9, 10, 5) == [False, True, False, False, True]


def test_torchtunes_weightings() -> None:
    """f(l) e_scale for the exits and f(L-1) for the last layer; f = 1, l + 1 and its root."""
    assert raw_weights(4, 0.5, "uniform") == [0.5, 0.5, 0.5, 1.0]
    assert raw_weights(4, 0.5, "linear") == [0.5, 1.0, 1.5, 4.0]
    assert raw_weights(4, 0.5, "sqrt") == pytest.approx([0.5, 0.707107, 0.866025, 2.0], abs=1e-6)
    linear = LayerSkipRecipe(curriculum="all", e_scale=0.5, exit_weighting="linear", exits=[1, 3])
    assert linear.loss_weights(0, 10, 4) == pytest.approx([0.5 / 6, 0, 1.5 / 6, 4 / 6])


def test_weights_of_ones_own() -> None:
    """Each beside the last layer's 1, whatever the order in which exits are named, and only where an exit is on."""
    own = LayerSkipRecipe(curriculum="all", exits=[4, 1], exit_weights=[0.5, 1.5])
    assert own.loss_weights(0, 10, 5) == pytest.approx([0.5, 0.0, 0.0, 0.5 / 3, 1 / 3])
    rotating = LayerSkipRecipe(rotation=4, exits=[4, 1], exit_weights=[0.5, 1.5])
    assert rotating.loss_weights(3, 10, 5) == pytest.approx([0.0, 0.0, 0.0, 1 / 3, 2 / 3])


def test_an_exit_that_the_model_lacks() -> None:
    with pytest.raises(ConfigError, match="exits name 5; in a model of 5 layers they end at 4"):
        LayerSkipRecipe(exits=[2, 5]).exits_on(0, 10, 5)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
def test_weights_add_up_to_one(curriculum: Any) -> None:
    config = LayerSkipRecipe(curriculum=curriculum, e_scale=1.0)
    for step in range(40):
        weights = config.loss_weights(step, 40, 6)
        assert sum(weights) == pytest.approx(1)
        assert weights[-1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_max": 1.0}, "p_max is 1.0"),
        ({"e_scale": -1.0}, "e_scale is -1.0"),
        ({"curriculum": "rotation"}, "curriculum is 'rotation'; choose one of rotational"),
        ({"curriculum": "gradual", "rotation": 8}, "rotation=8 has no effect"),
        ({"rotation": 0}, "rotation is 0"),
        ({"exits": []}, r"exits are \[\]; name at least one"),
        ({"exits": [4, 4]}, r"exits are \[4, 4\]; name at least one, each once"),
        ({"exits": [0, 4]}, r"exits are \[0, 4\]; name at least one, each once and 1 or more"),
        ({"exits": [1, 4]}, r"exits are \[1, 4\], but the paper's e\(l\) gives exit 1 no weight"),
        ({"ce_weight": 0.0}, "ce_weight and kl_weight are both 0"),
        ({"exit_weighting": "log"}, "exit_weighting is 'log'; choose one of paper, uniform, linear, sqrt"),
        ({"exit_weights": [1.0]}, r"exit_weights are \[1.0\], but exits are None; give a weight for each"),
        ({"exits": [2], "exit_weights": [1.0, 2.0]}, r"but exits are \[2\]"),
        ({"exits": [2, 4], "exit_weights": [1.0, 0.0]}, "each must be above 0"),
        ({"exits": [2], "exit_weights": [math.inf]}, "each must be above 0"),
        ({"exits": [2], "exit_weights": [1.0], "e_scale": 1.0}, "e_scale=1.0 has no effect beside exit_weights"),
        ({"exits": [2], "exit_weights": [1.0], "exit_weighting": "sqrt"}, "exit_weighting=sqrt has no effect beside"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerSkipRecipe(**settings)
