"""Draft `auto` in the engine: whatever the controller chooses, the text stays the same; costs are kept on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hopskip import ConfigError, SpeculativeConfig
from hopskip.backends.base import Backend, Pass
from hopskip.backends.rows import Rows
from hopskip.draft import timing
from hopskip.draft.auto import AutoDrafter
from hopskip.draft.base import Round
from hopskip.draft.controller import Controller
from hopskip.draft.costs import ContextCost, Costs, DraftCost, interpolated
from hopskip.draft.exit import source_of
from hopskip.draft.make import exits_of
from hopskip.draft.plans import Choice
from hopskip.draft.timing import Timings, measure
from hopskip.engine import make_engine
from hopskip.sequence import Request, Sequence
from hopskip.speculative import LOOKUP, early_exit, layer_skip
from tests.models import engine_with, tiny_model
from tests.test_engine import GREEDY, PLAIN, PROMPTS, new_ids, run

EXITS = [early_exit(1), early_exit(2)]
TABLE = Costs(
    layers={1: 0.01, 17: 0.011},
    head={1: 0.001, 17: 0.001},
    drafts={source_of(exit): DraftCost(begin=0.0001, step=0.0001) for exit in EXITS},
)


class Whims(Controller):
    """Chooses by what was committed, wildly."""

    def plan(
        self, sequences: Seq[Sequence], limits: Seq[int], lookups: Seq[Seq[int]], num_unseen: object = None
    ) -> list[Choice]:
        choices = []
        for sequence, limit, lookup in zip(sequences, limits, lookups, strict=True):
            whim = self.whim(sequence)
            source = (None, LOOKUP, *map(source_of, EXITS))[whim % 4]
            most = len(lookup) if source == LOOKUP else limit
            length = max(0, min(most, whim // 2))
            num_runner_ups = whim % 2 if source not in (None, LOOKUP) and length else 0
            choices.append(Choice(source if length else None, length if source else 0, num_runner_ups))
        return choices

    def whim(self, sequence: Sequence) -> int:
        return (sequence.token_ids[-1] * 7 + len(sequence.token_ids) * 3) % 12


class Restless(Whims):
    """Chooses otherwise each time, as the clock may make a controller do."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dice = random.Random(0)

    def whim(self, sequence: Sequence) -> int:
        return self.dice.randrange(12)


def whimsical(model: Backend, min_confidence: float = 0.0) -> AutoDrafter:
    drafter = AutoDrafter(
        model,
        EXITS,
        TABLE,
        max_draft_tokens=6,
        rows_per_sequence=7,
        min_confidence=min_confidence,
    )
    drafter.controller = Whims(TABLE, 6, 7)
    return drafter


@pytest.fixture(scope="module")
def model() -> Backend:
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("min_confidence", [0.0, 0.05])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_greedy_text_never_depends_on_the_choices(model: Backend, max_num_seqs: int, min_confidence: float) -> None:
    expected = new_ids(run(make_engine(model, PLAIN, rows_per_sequence=7), PROMPTS, GREEDY))
    config = SpeculativeConfig(draft="auto", num_draft_tokens=6)
    engine = engine_with(whimsical(model, min_confidence), model, config, max_num_seqs=max_num_seqs)
    rounds: list[Round] = []
    engine.on_round = rounds.append
    sequences = run(engine, PROMPTS, GREEDY)
    assert new_ids(sequences) == expected
    parts = [part for each in rounds for part in each.sequences]
    assert {part.source for part in parts} == {None, "ngram", "early-exit:1", "early-exit:2"}
    assert 0 < sum(p.num_accepted_tokens for p in parts) < sum(p.num_draft_tokens for p in parts)
    assert max(part.num_draft_tokens - part.num_runner_ups for part in parts) <= 5
    assert {part.num_runner_ups for part in parts} == {0, 1}
    assert {part.runner_up for part in parts} == {None, 0}
    assert sum(part.num_committed for part in parts) == sum(len(s.tokens) - 1 for s in sequences)
    for number, sequence in enumerate(sequences):
        own = [part for part in parts if part.request == number]
        assert [part.position for part in own[1:]] == [part.position + part.num_committed for part in own[:-1]]
        assert sum(part.num_draft_tokens for part in own) == sequence.stats.num_draft_tokens


def test_auto_as_it_comes_is_lossless(model: Backend) -> None:
    engine = make_engine(model, SpeculativeConfig(draft="auto"))
    assert engine.speculative.num_draft_tokens == 6, "at a fixed shape, room for 16 tokens would cost 17 rows a pass"
    expected = new_ids(run(make_engine(model, PLAIN, rows_per_sequence=7), PROMPTS, GREEDY))
    assert new_ids(run(engine, PROMPTS, GREEDY)) == expected
    mixed = [replace(GREEDY, temperature=0.8, seed=1), GREEDY, replace(GREEDY, repetition_penalty=1.3), GREEDY, GREEDY]
    sequences = run(engine, PROMPTS, mixed)
    assert [new_ids(sequences)[i] for i in (1, 3, 4)] == [expected[i] for i in (1, 3, 4)]


def test_a_seed_gives_the_same_text_whatever_the_clock_and_the_companions_do(model: Backend) -> None:
    drawn = replace(GREEDY, temperature=0.9)
    drafter = whimsical(model)
    drafter.controller = Restless(TABLE, 6, 7)
    engine = engine_with(drafter, model, SpeculativeConfig(draft="auto"), max_num_seqs=4)
    rounds: list[Round] = []
    engine.on_round = rounds.append
    seeded = replace(drawn, seed=5)
    alone = run(engine, PROMPTS[:1], seeded)[0]
    assert 0 < alone.stats.num_accepted_tokens < alone.stats.num_draft_tokens
    assert {part.source for each in rounds for part in each.sequences} >= {"early-exit:1", "early-exit:2", None}
    plain = run(make_engine(model, PLAIN, rows_per_sequence=7), PROMPTS[:1], seeded)
    assert new_ids([alone]) == new_ids(plain)
    for number in range(1, 4):
        companions = [replace(drawn, seed=10 * number + n) for n in range(len(PROMPTS))]
        sequences = run(engine, [PROMPTS[0], *PROMPTS], [seeded, *companions])
        assert new_ids(sequences)[0] == new_ids([alone])[0]


def test_requests_may_limit_drafts(model: Backend) -> None:
    engine = engine_with(whimsical(model), model, SpeculativeConfig(draft="auto"))
    sequences = [engine.add(Request(PROMPTS[3], GREEDY, max_draft_tokens=limit)) for limit in (0, 1)]
    while engine.has_work:
        engine.step()
    assert sequences[0].stats.num_draft_tokens == 0
    assert len(sequences[1].stats.num_accepted_tokens_per_pos) == 1


def test_what_auto_may_draft_from() -> None:
    shallow, deep = tiny_model(num_hidden_layers=2), tiny_model(num_hidden_layers=8)
    assert exits_of(SpeculativeConfig(draft="auto"), shallow) == [early_exit(1)]
    assert exits_of(SpeculativeConfig(draft="auto"), deep) == [early_exit(2), early_exit(4)]
    assert exits_of(SpeculativeConfig(draft="auto", exit_layer=3), deep) == [early_exit(3)]
    assert exits_of(SpeculativeConfig(draft="auto", exit_layer=3, skip_layers=(5,)), deep) == [
        layer_skip((5,), 8),
        early_exit(3),
    ]
    one = tiny_model(num_hidden_layers=1)
    assert exits_of(SpeculativeConfig(draft="auto"), one) == []
    make_engine(one, SpeculativeConfig(draft="auto"))
    with pytest.raises(ConfigError, match="between 1 and 7"):
        make_engine(deep, SpeculativeConfig(draft="auto", exit_layer=8))
    with pytest.raises(ConfigError, match="'reuse' goes on from one early exit"):
        SpeculativeConfig(draft="auto", verify="reuse")


@pytest.mark.parametrize(("window", "longest", "is_seen"), [(None, 8192, True), (600, 8192, True), (None, 130, False)])
def test_measured_costs_are_those_of_the_work_done(
    window: int | None, longest: int, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts: a layer takes a second for one row, a tenth more for each other, and of all positions
    that a row sees beyond 128 a thousandth of a second to read each, a ten-thousandth for each row; the head takes
    half a second and a twentieth more for each other row."""
    model = tiny_model(sliding_window=window, max_position_embeddings=longest)
    clock = SimpleNamespace(now=0.0)
    run_layers, greedy = model.run_layers, model.greedy

    def slow_layers(hidden_ND: Tensor, start: int, stop: int, rows: Rows, *rest: Any) -> Pass:
        beyond = max(0, min(rows.segments[0].start, window or longest) - 128)
        clock.now += (stop - start) * (0.9 + 0.1 * len(rows) + beyond * (1e-3 + 1e-4 * len(rows)))
        return run_layers(hidden_ND, start, stop, rows, *rest)

    def slow_greedy(hidden_ND: Tensor) -> list[int]:
        clock.now += 0.5 * (0.9 + 0.1 * len(hidden_ND))
        return greedy(hidden_ND)

    monkeypatch.setattr(model, "run_layers", slow_layers)
    monkeypatch.setattr(model, "greedy", slow_greedy)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = measure(model, [early_exit(1), early_exit(3)], seconds=100.0)
    assert next(iter(found.layers)) == 1
    assert max(found.layers) == timing.MOST_ROWS
    depth = model.config.num_hidden_layers
    for rows in found.layers:
        assert found.layers[rows] == pytest.approx(depth * (0.9 + 0.1 * rows))
        assert found.head[rows] == pytest.approx(0.5 * (0.9 + 0.1 * rows))
    for layers in (1, 3):
        cost = found.drafts[source_of(early_exit(layers))]
        assert cost.step >= layers, "at least the layers of one row"
        assert cost.begin < 1, "the rest is the same for every step"
        assert cost.attention_share == layers / depth
    wanted = (depth * 1e-3, depth * 1e-4) if is_seen else (0, 0)
    assert (found.context.read, found.context.row) == pytest.approx(wanted)
    assert found.context.window == (window if is_seen else None)


def test_costs_of_contexts() -> None:
    costs = replace(TABLE, context=ContextCost(read=0.001, row=0.0001))
    assert [costs.context.num_beyond(context) for context in (0, 128, 129, 4096)] == [0, 0, 1, 3968]
    assert costs.pass_seconds(3, 128) == costs.pass_seconds(3) == TABLE.pass_seconds(3)
    assert costs.pass_seconds(3, 228) == pytest.approx(TABLE.pass_seconds(3) + 100 * 0.0013)
    source = next(iter(TABLE.drafts))
    shared = replace(TABLE.drafts[source], attention_share=0.25)
    costs = replace(costs, drafts={source: shared})
    assert costs.draft_seconds(source, 4) == pytest.approx(shared.begin + 4 * shared.step)
    assert costs.draft_seconds(source, 4, 228) == pytest.approx(shared.begin + 4 * (shared.step + 0.25 * 100 * 0.0011))
    windowed = replace(costs, context=replace(costs.context, window=1000))
    assert windowed.pass_seconds(1, 9000) == windowed.pass_seconds(1, 1000) > windowed.pass_seconds(1, 999)
    assert Costs.from_json(json.loads(json.dumps(windowed.as_json()))) == windowed
    older = TABLE.as_json()
    del older["context"]
    for cost in older["drafts"].values():
        del cost["attention_share"]
    assert Costs.from_json(older) == TABLE, "tables of before are read"


def test_interpolation() -> None:
    table = {1: 10.0, 4: 16.0, 8: 15.0}
    assert [interpolated(table, rows) for rows in (1, 2, 4, 6)] == [10.0, 12.0, 16.0, 15.5]
    assert interpolated(table, 20) == 15.0, "more rows never cost less"
    assert interpolated({1: 10.0, 5: 14.0}, 9) == 18.0


def test_costs_are_measured_once(model: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[object] = []

    def fake(model: Backend, exits: Seq[object], *_: object) -> Costs:
        calls.append(exits)
        layers = {1: 0.01 * len(calls), 4: 0.02, 8: 0.03, 17: 0.1, 40: 0.2}
        return replace(TABLE, layers=layers, head=dict.fromkeys(layers, 0.1))

    monkeypatch.setattr(timing, "measure", fake)
    first = Timings(model, EXITS, {"weights": "a"}).get()
    assert Timings(model, EXITS, {"weights": "a"}).get() == first
    assert len(calls) == 1
    (path,) = (tmp_path / "cache").iterdir()
    for other in (Timings(model, EXITS, {"weights": "b"}), Timings(model, EXITS), Timings(model, EXITS)):
        other.get()
    assert len(calls) == 4, "other weights, and a model without identity"
    good = json.loads(path.read_text())
    for damaged in (
        "",
        "[]",
        '{"costs": {"layers": {"1": 0}}}',
        json.dumps({"costs": {**good["costs"], "drafts": {}}}),
    ):
        path.write_text(damaged)
        Timings(model, EXITS, {"weights": "a"}).get()
        assert json.loads(path.read_text())["costs"]["drafts"] == good["costs"]["drafts"]
    assert len(calls) == 8
    better = replace(first, head=dict.fromkeys(first.head, 7.0))
    Timings(model, EXITS, {"weights": "a"}).put(better)
    assert Timings(model, EXITS, {"weights": "a"}).get() == better
    monkeypatch.setenv("HOPSKIP_CACHE", "")
    Timings(model, EXITS, {"weights": "a"}).get()
    assert len(calls) == 9


def test_a_cache_that_cannot_be_written_only_costs_time(
    model: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(timing, "measure", lambda model, exits, *_: TABLE)
    assert Timings(model, EXITS, {"weights": "a"}).get() == TABLE
