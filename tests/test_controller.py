"""The controller against arithmetic and against searches, on a made-up cost table: no clock, no model."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from hopskip import SamplingParams
from hopskip.bench.expected import best_num_draft_tokens
from hopskip.draft.acceptance import Kind
from hopskip.draft.base import Round, RoundOfSequence
from hopskip.draft.controller import PROBE_SHARE, Controller
from hopskip.draft.costs import ContextCost, Costs, DraftCost
from hopskip.draft.exit import source_of
from hopskip.draft.live_costs import DraftTiming, LiveCosts
from hopskip.draft.plans import Choice, Forecast, Plan, best_by_exits, best_by_lookup, priced
from hopskip.sequence import Request, Sequence
from hopskip.speculative import LOOKUP, TRAINED_EXIT, Source, early_exit

EARLY_EXIT = source_of(early_exit(8))
FLAT = Costs(
    layers={1: 0.008, 17: 0.008}, head={1: 0.002, 17: 0.002}, drafts={TRAINED_EXIT: DraftCost(begin=0, step=0.001)}
)
"""Rows cost nothing: the model of `hopskip.bench.expected`, with c = 0.1."""
STEEP = Costs(
    layers={1: 0.010, 4: 0.011, 8: 0.015, 17: 0.030},
    head={1: 0.002, 17: 0.004},
    drafts={TRAINED_EXIT: DraftCost(begin=0.0005, step=0.0005), EARLY_EXIT: DraftCost(begin=0, step=0.004)},
)


def best_plan(forecasts: list[Forecast], costs: LiveCosts) -> Plan:
    by_lookup = best_by_lookup(forecasts, costs)
    by_exits = best_by_exits(forecasts, costs, by_lookup.rate)
    return by_exits if by_exits and by_exits.rate > by_lookup.rate else by_lookup


def geometric(acceptance: float, length: int = 16) -> list[float]:
    return [acceptance**i for i in range(1, length + 1)]


def test_a_long_context_is_paid_for() -> None:
    """By each sequence's own positions, its share of the rows, and a draft's share of the layers."""
    drafts = {TRAINED_EXIT: replace(STEEP.drafts[TRAINED_EXIT], attention_share=0.5)}
    long = replace(STEEP, drafts=drafts, context=ContextCost(read=1e-6, row=1e-7))
    live, short = LiveCosts(long), LiveCosts(STEEP)
    assert live.pass_seconds(5) == short.pass_seconds(5)
    live.look_at([1128])
    assert live.pass_seconds(5) == pytest.approx(short.pass_seconds(5) + 1000 * 1.5e-6)
    assert live.layers_seconds(5) == pytest.approx(short.layers_seconds(5) + 1000 * 1.5e-6)
    assert live.marginal_row(5) == pytest.approx(short.marginal_row(5) + 1000 * 1e-7)
    assert live.draft_seconds(TRAINED_EXIT, 4, 1) == pytest.approx(
        short.draft_seconds(TRAINED_EXIT, 4, 1) + 4 * 0.5 * 1000 * 1.1e-6
    )
    live.look_at([1128, 100, 2128])
    assert live.pass_seconds(6) == pytest.approx(short.pass_seconds(6) + 3000 * 1.2e-6)
    assert live.draft_seconds(TRAINED_EXIT, 4, 2) == pytest.approx(
        short.draft_seconds(TRAINED_EXIT, 4, 2) + 4 * 0.5 * 3000 * 1.1e-6 * 2 / 3
    )
    live.look_at([128])
    assert live.pass_seconds(5) == short.pass_seconds(5)


def test_what_a_round_takes_beside_its_pass_is_added() -> None:
    live = LiveCosts(STEEP)
    before = live.pass_seconds(3)
    as_expected = Round(
        draft_seconds=0.0, pass_seconds=live.layers_seconds(3), choose_seconds=0.0, commit_seconds=0.004, num_rows=3,
        num_chosen_by_logits=0, sequences=(),
    )  # fmt: skip
    live.learn(as_expected, [])
    assert live.pass_seconds(3) == pytest.approx(before + 0.004)


def test_rows_that_are_dear_at_a_long_context_are_fewer_there() -> None:
    controller = Controller(replace(FLAT, context=ContextCost(row=1e-6)), 16, priors={TRAINED_EXIT: geometric(0.8)})
    lengths = []
    for num_cached in (100, 4000):
        sequence = Sequence(Request([0]), frozenset())
        sequence.num_cached = num_cached
        lengths.append(controller.plan([sequence], [16], [[]])[0].num_tokens)
    assert 0 < lengths[1] < lengths[0]


@pytest.mark.parametrize("acceptance", [0.02, 0.09, 0.11, 0.3, 0.5, 0.7, 0.9])
def test_length_is_the_best_by_arithmetic(acceptance: float) -> None:
    plan = best_plan([Forecast(survival={TRAINED_EXIT: geometric(acceptance), LOOKUP: []})], LiveCosts(FLAT))
    expected = best_num_draft_tokens(acceptance, 0.1)
    assert plan.choices == [Choice(TRAINED_EXIT if expected else None, expected)]


def test_of_one_sequence_no_plan_is_better() -> None:
    dice = random.Random(0)
    costs = LiveCosts(STEEP)
    sources = set()
    for _ in range(200):
        survival = {
            source: list(itertools.accumulate((dice.random() ** 0.5 for _ in range(8)), lambda a, b: a * b))
            for source in (TRAINED_EXIT, EARLY_EXIT, LOOKUP)
        }
        survival[LOOKUP] = survival[LOOKUP][: dice.randrange(9)]
        forecast = Forecast(survival=survival)
        plan = best_plan([forecast], costs)
        options = [Choice(None, 0)]
        options += [Choice(s, k) for s, found in survival.items() for k in range(1, len(found) + 1)]
        rates = {option: priced([forecast], [option], costs).rate for option in options}
        sources.add(plan.choices[0].source)
        # which of lookup and exit is looked at is decided by an estimate
        assert plan.rate == pytest.approx(rates[plan.choices[0]])
        assert plan.rate > 0.97 * max(rates.values())
    assert len(sources) >= 3


def test_of_a_batch_hardly_any_plan_is_better() -> None:
    dice = random.Random(1)
    costs = LiveCosts(STEEP)
    for _ in range(20):
        forecasts = [
            Forecast(
                survival={
                    TRAINED_EXIT: geometric(dice.random(), 3),
                    LOOKUP: geometric(dice.random(), dice.randrange(4)),
                }
            )
            for _ in range(4)
        ]
        plan = best_plan(forecasts, costs)
        options = [
            [Choice(None, 0), *(Choice(s, k) for s, found in p.survival.items() for k in range(1, len(found) + 1))]
            for p in forecasts
        ]
        best = max(priced(forecasts, choices, costs).rate for choices in itertools.product(*options))
        assert best >= plan.rate - 1e-6
        assert plan.rate > 0.97 * best


def test_a_batch_drafts_less_than_one_sequence_alone() -> None:
    forecast = Forecast(survival={TRAINED_EXIT: geometric(0.7), LOOKUP: []})
    alone = best_plan([forecast], LiveCosts(STEEP)).choices[0].num_tokens
    together = best_plan([forecast] * 4, LiveCosts(STEEP)).choices
    assert 0 < max(choice.num_tokens for choice in together) < alone


def test_rows_go_to_those_who_use_them() -> None:
    sure = Forecast(survival={TRAINED_EXIT: geometric(0.95), LOOKUP: []})
    unsure = Forecast(survival={TRAINED_EXIT: geometric(0.05), LOOKUP: []})
    choices = best_plan([sure, unsure, sure, unsure], LiveCosts(STEEP)).choices
    assert [choice.num_tokens > 0 for choice in choices] == [True, False, True, False]


def test_rows_that_are_computed_anyway_are_free() -> None:
    forecast = Forecast(survival={LOOKUP: geometric(0.3)})
    at_a_price = best_plan([forecast], LiveCosts(STEEP)).choices[0].num_tokens
    assert at_a_price < best_plan([forecast], LiveCosts(STEEP, rows_per_sequence=7)).choices[0].num_tokens


class World:
    """Requests whose draft tokens are accepted by chance, and rounds that take what a table says."""

    def __init__(self, costs: Costs = STEEP, num_sequences: int = 1, seed: int = 0, max_runner_ups: int = 0) -> None:
        self.truth = LiveCosts(costs)
        self.controller = Controller(costs, max_draft_tokens=8, max_runner_ups=max_runner_ups)
        self.second_choice = 0.0
        """How often the first runner-up is right where the draft is wrong."""
        self.acceptance: dict[Source, float] = {}
        self.matched = 0
        """Length of the match that lookup has; 0: none."""
        self.slowdown = {"pass": 1.0, "draft": 1.0}
        self.planning = 0.0
        """Seconds of each plan."""
        self.plans: list[list[Choice]] = []
        self.dice = random.Random(seed)
        self.new_requests(num_sequences)
        self.seconds, self.tokens = 0.0, 0

    def new_requests(self, count: int, temperature: float = 0.0) -> None:
        params = SamplingParams(temperature=temperature)
        self.sequences = [Sequence(Request([1], params), frozenset()) for _ in range(count)]

    def run(self, num_rounds: int) -> list[Choice]:
        """The first sequence's choices."""
        chosen = []
        self.seconds, self.tokens = 0.0, 0
        for _ in range(num_rounds):
            lookups = [list(range(self.matched, self.matched + 8)) if self.matched else []] * len(self.sequences)
            choices = self.controller.plan(self.sequences, [8] * len(self.sequences), lookups)
            self.controller.costs.learn_planning(self.planning)
            chosen.append(choices[0])
            self.plans.append(choices)
            self._finish(choices, lookups)
        return chosen

    def _finish(self, choices: list[Choice], lookups: list[list[int]]) -> None:
        parts, buckets = [], []
        for choice, lookup in zip(choices, lookups, strict=True):
            accepted = 0
            while accepted < choice.num_tokens and self.dice.random() < self.acceptance.get(choice.source or LOOKUP, 0):
                accepted += 1
            is_wrong = choice.num_runner_ups > 0 and accepted < choice.num_tokens
            runner_up = 0 if is_wrong and self.dice.random() < self.second_choice else None
            buckets.append(lookup[: choice.num_tokens] if choice.source == LOOKUP else list(range(choice.num_tokens)))
            parts.append(
                RoundOfSequence(
                    request=0,
                    position=0,
                    source=choice.source and str(choice.source),
                    num_draft_tokens=choice.num_tokens + choice.num_runner_ups,
                    num_accepted_tokens=accepted + (runner_up is not None),
                    num_committed=accepted + (runner_up is not None) + 1,
                    num_runner_ups=choice.num_runner_ups,
                    runner_up=runner_up,
                )
            )
        rows = len(choices) + sum(choice.num_tokens + choice.num_runner_ups for choice in choices)
        exits = {choice.source for choice in choices} - {LOOKUP}
        drafting = []
        for exit in sorted(source for source in exits if source):
            own = [choice.num_tokens for choice in choices if choice.source == exit]
            seconds = self.truth.draft_seconds(exit, max(own), len(own)) * self.slowdown["draft"]
            drafting.append(DraftTiming(exit, max(own), len(own), len(own), seconds))
        outcome = Round(
            draft_seconds=sum(draft.seconds for draft in drafting),
            pass_seconds=self.truth.pass_seconds(rows) * self.slowdown["pass"] - 0.002,
            choose_seconds=0.002,
            commit_seconds=0.0,
            num_rows=rows,
            num_chosen_by_logits=0,
            sequences=tuple(parts),
        )
        self.seconds += outcome.seconds
        self.tokens += outcome.num_committed
        self.controller.learn(self.sequences, buckets, outcome, drafting)


def share(choices: list[Choice], source: Source | None) -> float:
    return sum(choice.source == source for choice in choices) / len(choices)


def test_reaches_no_draft_and_probes_for_little() -> None:
    world = World()
    world.run(100)
    late = world.run(1000)
    assert share(late, None) > 0.9
    assert any(choice.source for choice in late), "it must go on trying"
    plain = 1000 * world.truth.pass_seconds(1)
    assert world.tokens >= 1000
    # what probes may lose, and rows that a stale estimate still bets on
    assert world.seconds < plain * (1 + 2 * PROBE_SHARE)


def test_a_probe_of_lookup_costs_one_row() -> None:
    world = World(num_sequences=4)
    world.matched = 1
    world.run(400)
    world.plans.clear()
    world.run(400)
    by_lookup = [
        [choice.num_tokens for choice in plan if choice.source == LOOKUP]
        for plan in world.plans
        if any(choice.source == LOOKUP for choice in plan)
    ]
    assert by_lookup
    assert all(lengths == [1] for lengths in by_lookup)


def test_a_plan_must_pay_for_the_time_it_takes() -> None:
    for num_sequences, usual in ((1, 1.0), (2, 0.1)):  # of a single one, every round is planned anyway
        world = World(num_sequences=num_sequences)
        world.acceptance = {TRAINED_EXIT: 0.7}
        world.planning = 0.5 * world.truth.pass_seconds(num_sequences)
        world.run(200)
        assert share(world.run(300), TRAINED_EXIT) == pytest.approx(usual, abs=0.1)
        world.planning = 0.0
        world.run(100)
        assert share(world.run(100), TRAINED_EXIT) > 0.9


def test_acceptance_at_one_temperature_says_nothing_of_another() -> None:
    world = World()
    for _ in range(20):
        for temperature, acceptance in ((1.5, 0.0), (0.5, 0.9)):
            world.acceptance = {TRAINED_EXIT: acceptance}
            world.new_requests(1, temperature)
            found = world.run(20)
        assert found[-1].num_tokens >= 3
    world.new_requests(1, temperature=1.5)
    assert world.run(1)[0].num_tokens <= 1  # a probe, perhaps


def test_finds_the_best_source_and_length() -> None:
    for source, acceptance, others in ((TRAINED_EXIT, 0.8, 0.3), (EARLY_EXIT, 0.97, 0.05)):
        world = World()
        world.acceptance = {TRAINED_EXIT: others, EARLY_EXIT: others, source: acceptance}
        world.run(400)
        late = world.run(300)
        assert share(late, source) > 0.85
        expected = best_plan([Forecast(survival={source: geometric(acceptance, 8)})], world.truth).choices[0].num_tokens
        lengths = sorted(choice.num_tokens for choice in late if choice.source == source)
        assert abs(lengths[len(lengths) // 2] - expected) <= 1


def test_alone_the_plan_by_exits_holds_for_some_rounds_but_not_against_lookup_or_the_texts_end() -> None:
    world = World()
    world.acceptance = {TRAINED_EXIT: 0.9}
    length = world.run(200)[-1].num_tokens
    assert length > 2
    sequence, planned = world.sequences[0], []
    for limit, lookup in ((8, []), (8, []), (2, []), (0, []), (8, list(range(16, 24))), (8, [])):
        planned.append(world.controller.plan([sequence], [limit], [lookup])[0])
    assert [choice.source for choice in planned] == [*[TRAINED_EXIT] * 3, None, LOOKUP, TRAINED_EXIT]
    assert planned[0] == planned[1] == planned[-1]
    assert planned[2].num_tokens == 2


def test_what_was_measured_greedily_counts_for_less_in_sampling() -> None:
    estimates = []
    for temperature in (0.0, 0.7):
        controller = Controller(STEEP, 8, priors={TRAINED_EXIT: [0.02, 0.0]})  # none of few is not never
        acceptance = controller._of(Sequence(Request([1], SamplingParams()), frozenset()))
        for _ in range(3):
            acceptance.record([Kind(TRAINED_EXIT, place, temperature) for place in (0, 1)], [True, False])
        estimates.append(acceptance.survival(TRAINED_EXIT, range(8), temperature, 0.0))
    assert estimates[0][0] < 0.7 * estimates[1][0]


def test_the_end_of_a_text_does_not_put_off_exits_in_the_next() -> None:
    world = World()
    world.acceptance = {TRAINED_EXIT: 0.9}
    world.run(50)
    world.controller.plan(world.sequences, [0], [[]])
    world.new_requests(1)
    assert world.run(1)[0].source == TRAINED_EXIT


def test_comes_back_when_a_source_starts_to_pay() -> None:
    world = World()
    world.run(400)
    world.acceptance = {TRAINED_EXIT: 0.9}
    world.run(300)
    assert share(world.run(100), TRAINED_EXIT) > 0.9


def test_follows_repetition_in_the_text_at_once() -> None:
    world = World()
    world.run(400)
    world.acceptance = {LOOKUP: 0.97}
    world.matched = 12
    assert share(world.run(20), LOOKUP) > 0.9


def test_a_new_request_starts_from_the_earlier_ones() -> None:
    world = World()
    world.run(200)
    world.new_requests(1)
    assert share(world.run(20), None) >= 0.85  # a probe or two, perhaps
    world = World()
    world.acceptance = {TRAINED_EXIT: 0.9}
    world.run(200)
    world.new_requests(1)
    assert world.run(1)[0].num_tokens >= 5


def test_one_round_in_four_of_a_pause_is_learnt_from() -> None:
    world = World()
    world.new_requests(8)
    costs, learnt = world.controller.costs, []
    world.controller.costs.learn = lambda outcome, drafts: learnt.append(outcome)  # type: ignore[method-assign]
    outcome = Round(
        draft_seconds=0.0,
        pass_seconds=1.0,
        choose_seconds=0.1,
        commit_seconds=0.0,
        num_rows=8,
        num_chosen_by_logits=0,
        sequences=(),
    )
    for _ in range(8):
        world.controller.learn(world.sequences, [], outcome, [])
    assert len(learnt) == 2
    for _ in range(3):  # nobody was drafted for, but it was thought of
        world.controller.learn(world.sequences, [[]] * 8, outcome, [])
    assert len(learnt) == 5
    assert world.controller.costs is costs


def test_costs_follow_the_rounds() -> None:
    world = World()
    world.acceptance = {TRAINED_EXIT: 0.5}
    usual = world.run(300)
    assert share(usual, TRAINED_EXIT) > 0.9
    world.slowdown["draft"] = 30.0
    world.run(200)
    assert share(world.run(100), TRAINED_EXIT) < 0.1
    # when everything is slow, nothing changes
    world = World()
    world.acceptance = {TRAINED_EXIT: 0.5}
    world.slowdown = {"pass": 3.0, "draft": 3.0}
    assert abs(share(world.run(300), TRAINED_EXIT) - share(usual, TRAINED_EXIT)) < 0.1


def test_a_wrong_table_is_corrected() -> None:
    live = LiveCosts(STEEP)
    assert live.corrected() is None
    for _ in range(200):
        expected = live.draft_seconds(TRAINED_EXIT, 3, 1)
        outcome = Round(
            draft_seconds=0, pass_seconds=STEEP.layers[4], choose_seconds=0.002, commit_seconds=0, num_rows=4,
            num_chosen_by_logits=0, sequences=(),
        )  # fmt: skip
        live.learn(outcome, [DraftTiming(TRAINED_EXIT, 3, 1, 1, 0.006)])
    assert expected == pytest.approx(0.006, rel=0.05)
    corrected = live.corrected()
    assert corrected is not None
    cost = corrected.drafts[TRAINED_EXIT]
    assert cost.begin + 3 * cost.step == pytest.approx(0.006, rel=0.05)
    assert corrected.drafts[EARLY_EXIT] == STEEP.drafts[EARLY_EXIT]
    assert live.draft_seconds(TRAINED_EXIT, 3, 1) == pytest.approx(0.006, rel=0.05)


def test_a_text_that_ends_within_a_draft_rejects_nothing() -> None:
    found = {}
    for committed in (2, 3):
        controller = Controller(STEEP, max_draft_tokens=4)
        sequence = Sequence(Request([1], SamplingParams()), frozenset())
        part = RoundOfSequence(
            request=0,
            position=0,
            source=str(TRAINED_EXIT),
            num_draft_tokens=4,
            num_accepted_tokens=2,
            num_committed=committed,
        )
        outcome = Round(
            draft_seconds=0, pass_seconds=0.01, choose_seconds=0.002, commit_seconds=0, num_rows=5,
            num_chosen_by_logits=0, sequences=(part,),
        )  # fmt: skip
        controller.learn([sequence], [[0, 1, 2, 3]], outcome, [])
        forecast = controller._forecast(sequence, 3, [], {TRAINED_EXIT: 1}, floor=0.0)
        found[committed] = forecast.survival[TRAINED_EXIT][2]
    assert found[3] < 0.95 * found[2]


# -- batches, and older tokens -----------------------------------------------------------------------------------------


def test_older_tokens_are_read_if_enough_rounds_are_to_come() -> None:
    survival = {TRAINED_EXIT: geometric(0.7), LOOKUP: []}
    chosen = []
    for num_rounds in (1, 32):
        forecast = Forecast(survival=survival, num_unseen={TRAINED_EXIT: 400}, num_rounds=num_rounds)
        chosen.append(best_plan([forecast], LiveCosts(STEEP)).choices[0].source)
    assert chosen == [None, TRAINED_EXIT]
    live = LiveCosts(STEEP)
    assert live.draft_seconds(TRAINED_EXIT, 2, 1, 400) > live.draft_seconds(TRAINED_EXIT, 2, 1, 1)


def test_a_batch_without_anything_worth_drafting_is_not_thought_about_for_a_while() -> None:
    world = World(num_sequences=16)
    world.acceptance = {TRAINED_EXIT: 0.05, EARLY_EXIT: 0.05}
    world.run(300)
    assert world.controller.pauses
    alone = World()
    alone.run(300)
    assert not alone.controller.pauses, "one sequence may find something to look up at any time"


def test_corrections_are_shared_by_near_numbers_of_rows() -> None:
    live = LiveCosts(STEEP)
    before = {rows: live.pass_seconds(rows) for rows in (2, 16, 17)}
    for _ in range(100):
        outcome = Round(
            draft_seconds=0, pass_seconds=1.5 * STEEP.layers[17], choose_seconds=0, commit_seconds=0, num_rows=17,
            num_chosen_by_logits=0, sequences=(),
        )  # fmt: skip
        live.learn(outcome, [])
    after = {rows: live.pass_seconds(rows) / seconds for rows, seconds in before.items()}
    assert after[17] == pytest.approx(after[16], rel=0.02)
    assert after[17] > 1.1 * after[2] > 1.0, "what slows all is known for all"


# -- runner-ups --------------------------------------------------------------------------------------------------------


def test_runner_ups_are_taken_while_their_rows_pay() -> None:
    costs = LiveCosts(STEEP)
    forecast = Forecast(
        survival={TRAINED_EXIT: geometric(0.5), LOOKUP: []}, runner_ups={TRAINED_EXIT: [0.3, 0.05, 0.01]}
    )
    plan = best_plan([forecast], costs)
    length = plan.choices[0].num_tokens
    rates = []
    for number in range(4):
        seconds = costs.draft_seconds(TRAINED_EXIT, length, 1) + costs.pass_seconds(1 + length + number)
        rates.append((1 + sum(geometric(0.5, length)) + sum([0.3, 0.05, 0.01][:number])) / seconds)
    assert plan.choices == [Choice(TRAINED_EXIT, length, rates.index(max(rates)))]
    assert plan.rate == pytest.approx(max(rates))
    assert 0 < plan.choices[0].num_runner_ups < 3


def test_runner_ups_are_dropped_where_they_are_never_right() -> None:
    world = World(max_runner_ups=2)
    world.acceptance = {TRAINED_EXIT: 0.6}
    assert any(choice.num_runner_ups for choice in world.run(3))
    late = world.run(200)[100:]
    assert sum(choice.num_runner_ups > 0 for choice in late) < 35  # probes
    assert all(choice.source == TRAINED_EXIT for choice in late)
    world.new_requests(1)
    world.second_choice = 0.6
    world.run(300)
    assert sum(choice.num_runner_ups > 0 for choice in world.run(100)) > 50


def test_every_request_may_have_runner_ups() -> None:
    controller = Controller(FLAT, max_draft_tokens=4, max_runner_ups=2)
    params = (SamplingParams(), SamplingParams(frequency_penalty=1.0), SamplingParams(temperature=0.7, top_p=0.9))
    sequences = [Sequence(Request([1], own), frozenset()) for own in params]
    choices = controller.plan(sequences, [4] * 3, [[]] * 3)
    assert [choice.num_runner_ups for choice in choices] == [2, 2, 2]
