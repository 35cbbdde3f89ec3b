"""What drafting is said to gain: the estimate of every answer, and warnings of drafts that are slower."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.backends.rows import Rows
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.cli.console import _gain
from hopskip.draft import timing
from hopskip.draft.advice import Advice, expected_speedup_of, usual_acceptance, usual_survival
from hopskip.draft.base import Round, RoundOfSequence
from hopskip.draft.costs import ContextCost, Costs, DraftCost
from hopskip.draft.gain import GainEstimate
from hopskip.draft.make import make_drafter, resolve
from hopskip.engine import make_engine
from hopskip.engine import round as round_module
from hopskip.errors import SlowDraftWarning
from hopskip.sequence import Request, Sequence, SpeculativeStats
from hopskip.serve.answers import _speedup
from hopskip.speculative import LOOKUP, TRAINED_EXIT, Source, early_exit
from tests.models import tiny_config, tiny_model
from tests.tiny import write_checkpoint

EXIT = Source("early-exit", 2)
COSTS = Costs(
    layers={1: 10.0, 5: 14.0},
    head={1: 1.0, 5: 2.0},
    drafts={EXIT: DraftCost(begin=1.0, step=2.0)},
    context=ContextCost(read=0.01, row=0.001),
)


def sequence_at(num_cached: int) -> Sequence:
    sequence = Sequence(Request([1]), frozenset())
    sequence.num_cached = num_cached
    return sequence


def part(num_draft_tokens: int, num_committed: int) -> RoundOfSequence:
    return RoundOfSequence(
        request=0,
        position=0,
        source=str(EXIT) if num_draft_tokens else None,
        num_draft_tokens=num_draft_tokens,
        num_accepted_tokens=num_committed - 1,
        num_committed=num_committed,
    )


def round_of(*parts: RoundOfSequence, slowdown: float = 1.0, layers: float = 14.0, head: float = 2.0) -> Round:
    return Round(
        draft_seconds=9.0 * slowdown,
        pass_seconds=layers * slowdown,
        choose_seconds=head * slowdown,
        commit_seconds=0.5 * slowdown,
        num_rows=sum(each.num_draft_tokens + 1 for each in parts),
        num_chosen_by_logits=0,
        sequences=parts,
    )


# -- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_it_is_what_the_table_says_of_the_passes_that_were_run(slowdown: float) -> None:
    """Three tokens for 25.5 s, where plain decoding takes 11.5 s a token; on a machine of any speed."""
    gain, sequence = GainEstimate(COSTS), sequence_at(103)
    assert gain.speedup == 1.0
    gain.count([sequence], round_of(part(4, 3), slowdown=slowdown))
    assert sequence.stats.speedup_over_plain == pytest.approx(3 * 11.5 / 25.5)
    assert gain.speedup == sequence.stats.speedup_over_plain
    assert gain.num_tokens == 3


def test_parts_of_a_pass_are_scaled_apart() -> None:
    """Drawing tokens takes longer than finding the best: of plain decoding, too."""
    gain, sequence = GainEstimate(COSTS), sequence_at(103)
    gain.count([sequence], round_of(part(4, 3), head=20.0, layers=28.0))
    assert sequence.stats.speedup_over_plain == pytest.approx(3 * (20 + 10 + 0.5) / (9 + 28 + 20 + 0.5))


def test_rounds_add_up() -> None:
    gain, sequence = GainEstimate(COSTS), sequence_at(100)
    for num_committed in (1, 5):
        gain.count([sequence], round_of(part(4, num_committed)))
    assert sequence.stats.speedup_over_plain == pytest.approx(6 * 11.5 / 51)


def test_contexts_cost_something() -> None:
    """1,000 positions beyond the table's: read once, and looked at by each row."""
    gain, sequence = GainEstimate(COSTS), sequence_at(1131)
    gain.count([sequence], round_of(part(4, 3), layers=14 + 1000 * 0.015))
    assert sequence.stats.speedup_over_plain == pytest.approx(3 * (10 + 1000 * 0.011 + 1.5) / (25.5 + 15))


def test_companions_share_plain_passes_too() -> None:
    """Two that draft one token each: a plain pass would have two rows, and yield a token for both."""
    gain, sequences = GainEstimate(COSTS), [sequence_at(50), sequence_at(50)]
    gain.count(sequences, round_of(part(1, 2), part(1, 1), layers=13.0, head=1.75))
    plain = 11 + 1.25 + 0.5
    seconds = 9 + 13 + 1.75 + 0.5
    assert [s.stats.speedup_over_plain for s in sequences] == pytest.approx([2 * plain / seconds, plain / seconds])
    assert gain.speedup == pytest.approx(1.5 * plain / seconds)


UNDRAFTED = replace(round_of(slowdown=2.0), num_rows=2, draft_seconds=0.5)
"""Of two sequences, seen by the drafter alone."""


def test_undrafted_rounds_are_counted_after_a_few() -> None:
    """Two tokens each round in 0.5 + 28 + 4 + 1 s, where plain decoding takes as long but for the half second."""
    gain, sequences = GainEstimate(COSTS), [sequence_at(50), sequence_at(50)]
    for _ in range(15):
        gain.count(sequences, UNDRAFTED)
    assert [s.stats.speedup_over_plain for s in sequences] == [None, None]
    gain.count(sequences, UNDRAFTED)
    assert [s.stats.speedup_over_plain for s in sequences] == pytest.approx([33 / 33.5] * 2)
    assert gain.num_tokens == 32
    gain.count(sequences, UNDRAFTED)
    assert gain.num_tokens == 34  # whoever asks gets it all
    assert gain.speedup == pytest.approx(33 / 33.5)


def test_undrafted_rounds_belong_to_those_who_were_there() -> None:
    """The same estimates as if each round had been counted at once."""
    alone = replace(UNDRAFTED, num_rows=1, draft_seconds=33.0)
    drafted = round_of(part(4, 3))

    def estimates(parts: tuple[RoundOfSequence, ...]) -> list[list[float | None]]:
        gain, first, second = GainEstimate(COSTS), sequence_at(50), sequence_at(50)
        together, by_itself = replace(UNDRAFTED, sequences=parts), replace(alone, sequences=parts[:1])
        found: list[list[float | None]] = []
        for sequences, outcome in (
            ([first, second], together),
            ([first], by_itself),
            ([first], drafted),
            ([first, second], together),
            ([first, second], together),
        ):
            if len(found) == 4:
                second.finish_reason = "stop"
            gain.count(sequences, outcome)
            found.append([each.stats.speedup_over_plain for each in (first, second)])
        return [*found, [gain.speedup, gain.num_tokens]]

    late, at_once = estimates(()), estimates((part(0, 1), part(0, 1)))
    assert late[0] == [None, None]
    assert late[1] == [at_once[0][0], at_once[1][1]]  # of the first alone, a round has yet to be counted
    for at in (2, 4, 5):
        assert late[at] == pytest.approx(at_once[at])


def test_stats_and_what_is_shown_of_them() -> None:
    stats = SpeculativeStats(num_tokens=11, num_target_passes=5, decode_seconds=2.0)
    assert stats.tokens_per_pass == 2.0
    assert SpeculativeStats(num_tokens=1).tokens_per_pass == 0.0
    assert stats.as_dict()["tokens_per_pass"] == 2.0
    assert stats.as_dict()["speedup_over_plain"] is None
    assert _gain(stats) == ""
    stats.num_drafts = 3
    assert _gain(stats) == "2.00 tokens a pass"
    stats.speedup_over_plain = 1.84
    assert _gain(stats) == "2.00 tokens a pass; about 1.8 x plain decoding (estimate)"
    other = SpeculativeStats(decode_seconds=6.0, speedup_over_plain=1.0)
    assert _speedup([stats, other, SpeculativeStats(decode_seconds=9.0)]) == pytest.approx((2 * 1.84 + 6) / 8)
    assert _speedup([SpeculativeStats(decode_seconds=1.0)]) is None


def test_costs_of_fixed_drafts_are_timed_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, asked = tiny_model(), []

    def fake(backend: object, exits: list[object], seconds: float, progress: object, rows: tuple[int, int]) -> Costs:
        asked.append((exits, rows))
        return replace(
            COSTS,
            layers=dict.fromkeys(rows, 1.0),
            head=dict.fromkeys(rows, 1.0),
            drafts={EXIT: DraftCost(begin=0.0, step=1.0)} if exits else {},
        )

    def costs_of(identity: dict[str, object] | None, **options: object) -> Costs | None:
        speculative = resolve(SpeculativeConfig(**options), model.config)  # type: ignore[arg-type]
        drafter = make_drafter(speculative, model, identity)
        assert drafter is not None
        return drafter.costs

    monkeypatch.setattr(timing, "measure", fake)
    identity: dict[str, object] = {"weights": "a"}
    monkeypatch.setenv("HOPSKIP_CACHE", "")
    assert costs_of(identity, draft="ngram") is None
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path))
    assert costs_of(None, draft="ngram") is None
    assert costs_of(identity, draft="early-exit", exit_layer=2, verify="reuse") is None, "its passes are none of these"
    assert not asked
    for _ in range(2):
        assert costs_of(identity, draft="ngram") is not None
        assert costs_of(identity, draft="both", exit_layer=2, num_draft_tokens=3, num_runner_ups=1) is not None
        assert costs_of(identity, draft="early-exit", exit_layer=2, num_draft_tokens=90) is not None
    assert asked == [([], (1, 7)), ([early_exit(2)], (1, 5)), ([early_exit(2)], (1, timing.MOST_ROWS))]


def test_only_asked_numbers_of_rows_are_timed() -> None:
    found = timing.measure(tiny_model(), [early_exit(2)], 0.0, rows=(1, 5))
    assert found.layers.keys() == found.head.keys() == {1, 5}
    assert found.drafts.keys() == {EXIT}


def test_timing_goes_on_until_figures_come_out_alike() -> None:
    least = timing._Least[int]()
    least.add(1, 10.0)
    assert least.are_sure, "there was time for one only"
    least.add(1, 5.0)
    assert not least.are_sure
    least.add(1, 5.4)
    assert least.are_sure
    least.add(2, 1.0)
    least.add(2, 1.2)
    assert not least.are_sure
    assert (least[1], least.table) == (5.0, {1: 5.0, 2: 1.0})


def test_a_pass_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it has only been launched when `forward` returns."""
    model = tiny_model()
    clock, pending = SimpleNamespace(now=0.0), []
    forward = model.forward

    def launching(token_ids: list[int], rows: Rows, *rest: object) -> object:
        pending.append(100.0)
        return forward(token_ids, rows, *rest)  # type: ignore[arg-type]

    def synchronize() -> None:
        clock.now += sum(pending)
        pending.clear()

    monkeypatch.setattr(model, "forward", launching)
    monkeypatch.setattr(model, "synchronize", synchronize)
    monkeypatch.setattr(round_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    engine = make_engine(model, SpeculativeConfig(draft="none"))
    rounds: list[Round] = []
    engine.on_round = rounds.append
    engine.add(Request([1, 2], SamplingParams(max_new_tokens=3)))
    while engine.has_work:
        engine.step()
    assert [found.pass_seconds for found in rounds][1:] == [100.0]
    assert all(found.choose_seconds == 0 for found in rounds)


def test_an_engine_estimates_by_the_costs_of_its_drafter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every answer has its estimate in stats; plain decoding has none."""
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", tokenizer=True)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowDraftWarning)
        llm = LLM(tmp_path / "model", speculative=SpeculativeConfig(draft="ngram"))
        result = llm.generate("abc abc abc", params)[0]
        *_, last = llm.stream("abc abc abc", params)
    assert llm.engine.gain is not None
    assert result.stats.speedup_over_plain is not None
    assert result.stats.speedup_over_plain > 0
    assert last.stats.speedup_over_plain is not None
    plain = LLM(tmp_path / "model", speculative=SpeculativeConfig(draft="none"))
    assert plain.engine.gain is None
    assert plain.generate("abc", params)[0].stats.speedup_over_plain is None
    assert len(list((tmp_path / "cache").glob("*.costs.json"))) == 1


# -- advice -----------------------------------------------------------------------------------------------------------

MODEL = tiny_config(num_hidden_layers=30)


def test_speedup_by_costs() -> None:
    """A draft of two costs 5 and a pass of three rows 13.5, for 1 + 0.5 + 0.25 tokens."""
    assert COSTS.speedup(EXIT, [0.5, 0.25]) == pytest.approx(1.75 * 11 / (5 + 12 + 1.5))
    assert COSTS.speedup(EXIT, [0.5, 0.25], num_runner_ups=2) == pytest.approx(1.75 * 11 / (5 + 14 + 2))
    assert COSTS.speedup(None, [0.5, 0.25]) == pytest.approx(1.75 * 11 / (12 + 1.5))
    assert COSTS.speedup(EXIT, []) == 1.0


def test_what_is_usual() -> None:
    trained_for_exits = replace(MODEL, recommended_exit_layer=4)
    assert usual_acceptance(Source("early-exit", 8), MODEL).high == pytest.approx(0.1)
    assert usual_acceptance(Source("early-exit", 27), MODEL).high == pytest.approx(0.9**4)
    assert usual_acceptance(Source("early-exit", 8), trained_for_exits).low > 0.5
    precisions = [usual_acceptance(Source("layer-skip", 30, precision), MODEL).low for precision in ("q8", "q4", None)]
    assert precisions == sorted(precisions, reverse=True)
    assert usual_acceptance(LOOKUP, MODEL) == (0.0, 0.95)
    assert all(
        usual_acceptance(source, MODEL).low < usual_acceptance(source, MODEL).high
        for source in (LOOKUP, TRAINED_EXIT, Source("early-exit", 8), Source("layer-skip", 30, "q8"))
    )


def test_a_trained_exit_is_taken_at_its_notes() -> None:
    noted = SimpleNamespace(notes={"held_out_acceptance": [0.8, 0.4]})
    trained: TrainedExit = noted  # type: ignore[assignment]
    assert usual_survival(TRAINED_EXIT, 1, MODEL, trained) == [0.8]
    assert usual_survival(TRAINED_EXIT, 4, MODEL, trained) == pytest.approx([0.8, 0.4, 0.4 * 0.4**0.5, 0.4 * 0.4])
    assert usual_survival(TRAINED_EXIT, 2, MODEL, None) == pytest.approx([0.75, 0.75**2])
    assert usual_survival(EXIT, 2, MODEL, trained) == pytest.approx([0.1, 0.01]), "they are not another source's"


def expected(draft: str, **changes: object) -> float | None:
    config = SpeculativeConfig(draft=draft, num_draft_tokens=2, **changes)  # type: ignore[arg-type]
    return expected_speedup_of(config, COSTS, MODEL, None)


def test_what_is_expected_of_a_draft() -> None:
    assert expected("early-exit", exit_layer=2) == pytest.approx(COSTS.speedup(EXIT, [0.1, 0.01]))
    assert expected("early-exit", exit_layer=2, num_runner_ups=4) == pytest.approx(COSTS.speedup(EXIT, [0.1, 0.01], 4))
    assert expected("auto") is None
    assert expected_speedup_of(SpeculativeConfig(draft="ngram"), replace(COSTS, drafts={}), MODEL, None) is None


def warned(advice: Advice, *gains: GainEstimate | None) -> list[str]:
    """What is said before any answer and after some."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advice.warn_before()
        for gain in gains:
            advice._gain = gain
            advice.warn_after()
    assert all(found.category is SlowDraftWarning for found in caught)
    return [str(found.message) for found in caught]


def gain_of(num_tokens: int, speedup: float) -> GainEstimate:
    gain: GainEstimate = SimpleNamespace(num_tokens=num_tokens, speedup=speedup)  # type: ignore[assignment]
    return gain


def test_a_slow_draft_is_told_so_once() -> None:
    early = SpeculativeConfig(draft="early-exit", exit_layer=2)
    (message,) = warned(Advice(early, 0.5), gain_of(99, 0.4))
    assert message == (
        "draft 'early-exit', as it is set, is expected to be slower than plain decoding (0.50 x); draft 'auto' without "
        "further options drafts only what pays"
    )
    (message,) = warned(Advice(early, 1.2, has_trained_exit=True), gain_of(99, 0.4), gain_of(99, 0.3))
    assert "'early-exit', as it is set, has been slower than plain decoding (an estimated 0.40 x)" in message
    assert "trained exit" in message
    (message,) = warned(Advice(SpeculativeConfig(draft="both"), 0.5))
    assert "where the text does not repeat itself" in message


def test_what_is_not_slow_or_not_known_is_left_alone() -> None:
    lookup = SpeculativeConfig(draft="ngram")
    assert warned(Advice(lookup), None, gain_of(47, 0.1), gain_of(48, 0.95)) == []
    assert len(warned(Advice(lookup), gain_of(48, 0.94))) == 1
    assert warned(Advice(lookup, 0.95)) == []
    for draft in ("auto", "none"):
        assert warned(Advice(SpeculativeConfig(draft=draft), 0.1), gain_of(99, 0.1)) == []


def test_warnings_point_to_who_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not to a place within hopskip; before an answer, and after one."""
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", tokenizer=True)
    slow = replace(COSTS, drafts={Source("early-exit", 1): DraftCost(begin=9.0, step=9.0)})
    monkeypatch.setattr(timing.Timings, "get", lambda self, progress: slow)
    with pytest.warns(SlowDraftWarning, match="is expected") as caught:
        LLM(tmp_path / "model", speculative=SpeculativeConfig(draft="early-exit", exit_layer=1))
    assert caught[0].filename == __file__
    cheap = replace(COSTS, drafts={})
    monkeypatch.setattr(timing.Timings, "get", lambda self, progress: cheap)
    monkeypatch.setattr(GainEstimate, "speedup", 0.5)
    params = SamplingParams(max_new_tokens=50, ignore_eos=True)
    for ask in (
        lambda llm: llm.generate("abc", params),
        lambda llm: list(itertools.islice(llm.stream("abc", params), 50)) and list(llm.stream("a", params)),
    ):
        llm = LLM(tmp_path / "model", speculative=SpeculativeConfig(draft="ngram"))
        with pytest.warns(SlowDraftWarning, match="has been slower") as caught:
            ask(llm)
        assert caught[0].filename == __file__


def test_kept_costs_are_told_apart_by_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path))
    model = tiny_model()
    timings = [timing.Timings(model, [], {"weights": "a"}, rows) for rows in (None, (1, 5), (1, 7))]
    assert len({found._path for found in timings}) == 3
    timings[1].put(replace(COSTS, drafts={}))
    assert timings[1]._read() == replace(COSTS, drafts={})
    assert json.loads(next(tmp_path.iterdir()).read_text())["key"]["rows"] == [1, 5]
    timings[2].put(replace(COSTS, drafts={}))
    assert timings[2]._read() is None, "seven rows were not timed"
