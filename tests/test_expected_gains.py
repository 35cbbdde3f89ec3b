"""What `hopskip info` expects drafts to gain, by source."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hopskip.bench.expected import ModelCosts
from hopskip.bench.gains import Gain, gains, modelled_costs, with_measured
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.cli import app
from hopskip.cli.gains import ExpectedGains, _range
from hopskip.draft.costs import Costs, DraftCost
from hopskip.speculative import LOOKUP, TRAINED_EXIT, Source
from hopskip.train.exit import rule
from hopskip.train.exit.estimate import Work
from tests.models import tiny_config
from tests.tiny import write_checkpoint

MODEL = tiny_config()
MODELLED = modelled_costs(
    ModelCosts(
        layer_bytes=(150,) * 6, head_bytes=100, embedding_bytes=0, kv_bytes_per_token=1, bytes_by_format={"q8": 1000}
    ),
    exit_bytes=50,
    copy_bytes={"q8": 500, "q4": 300},
    exit_layer=2,
)
COPY, EARLY = Source("layer-skip", 6, "q8"), Source("early-exit", 2)


def test_costs_by_bytes() -> None:
    assert MODELLED.pass_seconds(1) == pytest.approx(1.0)
    assert MODELLED.pass_seconds(5) == pytest.approx(1.2)
    steps = {source: cost.step for source, cost in MODELLED.drafts.items()}
    assert steps == {TRAINED_EXIT: 0.05, COPY: 0.5, Source("layer-skip", 6, "q4"): 0.3, EARLY: 0.4}


def test_measured_costs_come_first_and_the_rest_is_scaled_to_them() -> None:
    measured = Costs(layers={1: 3.0, 5: 3.0}, head={1: 1.0, 5: 1.0}, drafts={EARLY: DraftCost(begin=1, step=2)})
    found = with_measured(MODELLED, measured)
    assert found.layers == measured.layers
    assert found.drafts[EARLY] == measured.drafts[EARLY]
    assert found.drafts[TRAINED_EXIT].step == pytest.approx(0.2)
    assert found.drafts.keys() == MODELLED.drafts.keys()


def test_gains_by_source() -> None:
    found = gains(MODELLED, MODEL, None)
    by_source = {gain.source: gain for gain in found}
    assert by_source.keys() == {*MODELLED.drafts, LOOKUP}
    assert found[-1].source == LOOKUP
    assert [gain.low + gain.high for gain in found[:-1]] == sorted((g.low + g.high for g in found[:-1]), reverse=True)
    exit = by_source[TRAINED_EXIT]
    best = max(MODELLED.speedup(TRAINED_EXIT, [0.75**i for i in range(1, k)]) for k in range(1, 17))
    assert exit.high == pytest.approx(best)
    assert 1.3 < exit.low < exit.high < 2.6
    assert exit.why == "50% to 75% of its tokens accepted, as is usual"
    assert by_source[EARLY][1:] == (1.0, 1.0, "0% to 10% of its tokens accepted, of exits nobody has trained")
    assert by_source[LOOKUP].low == 1.0
    assert by_source[LOOKUP].high > 4


def test_a_trained_exit_gains_what_its_notes_say() -> None:
    trained: TrainedExit = SimpleNamespace(notes={"held_out_acceptance": [0.6, 0.3]})  # type: ignore[assignment]
    (found,) = (gain for gain in gains(MODELLED, MODEL, trained) if gain.source == TRAINED_EXIT)
    assert found.low == found.high >= MODELLED.speedup(TRAINED_EXIT, [0.6, 0.3])
    assert "training" in found.why
    untold: TrainedExit = SimpleNamespace(notes={})  # type: ignore[assignment]
    (found,) = (gain for gain in gains(MODELLED, MODEL, untold) if gain.source == TRAINED_EXIT)
    assert found.low < found.high


def test_words() -> None:
    def shown(low: float, high: float) -> str:
        return _range(Gain(LOOKUP, low, high, ""))

    assert [shown(1, 1.04), shown(1, 1.06), shown(1.62, 1.61), shown(1.2, 2.3)] == [
        "none",
        "1.0 to 1.1 x",
        "1.6 x",
        "1.2 to 2.3 x",
    ]
    work = Work(collected_tokens=1, trained_tokens=2, collect_flops=3, train_flops=4, disk_bytes=5)
    for has_exit, name in (True, "the trained exit"), (False, "an exit of its own, once trained"):
        told = ExpectedGains(gains=[], by_measurement=False, has_trained_exit=has_exit, work=work, flops_per_second=1.0)
        names = [told._named(Gain(source, 1, 1, "")) for source in (TRAINED_EXIT, COPY, LOOKUP, EARLY)]
        assert names == [name, "a copy in q8", "n-gram lookup", "early exit after layer 2"]


def test_info_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "free_disk", lambda path: 2**50)  # room for the states of all tokens
    write_checkpoint(tmp_path, tokenizer=True)
    text = CliRunner().invoke(app, ["info", str(tmp_path)], env={"COLUMNS": "160"}).stdout
    assert "an exit of its own, once trained" in text
    assert "To train an exit (hopskip train exit --model MODEL)" in text
    assert "--measure times them" in text
    found = json.loads(CliRunner().invoke(app, ["info", str(tmp_path), "--json"]).stdout)["expected_gains"]
    assert found["costs"] == "by arithmetic"
    assert {draft["source"] for draft in found["drafts"]} >= {"exit-branch", "ngram", "early-exit:1"}
    assert all(draft["low"] <= draft["high"] for draft in found["drafts"])
    work = found["training_an_exit"]
    assert work["disk_bytes"] == work["collected_tokens"] * 2 * 64 * 2, "layers 2 and 3 of three"
    assert work["seconds"] > 0
    assert work["trained_tokens"] > work["collected_tokens"]
