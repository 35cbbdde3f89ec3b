"""Traces: files of rounds, their summary and plot, and replays held against the engine itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hopskip import ConfigError, SamplingParams, SpeculativeConfig
from hopskip.backends.base import Backend
from hopskip.bench.expected import best_measured, measured_speedup
from hopskip.bench.replay import record, replay
from hopskip.cli import app
from hopskip.draft import timing
from hopskip.draft.base import Round
from hopskip.draft.costs import Costs, DraftCost, expected_speedup
from hopskip.engine import make_engine
from hopskip.llm import LLM
from hopskip.loading import LoadConfig, open_model
from hopskip.sequence import Request
from hopskip.speculative import Source
from hopskip.trace import Proposals, Trace, TraceWriter, read_trace
from hopskip.version import stamp
from tests.models import tiny_model
from tests.tiny import write_checkpoint

TABLE = Costs(
    layers={1: 0.010, 8: 0.012, 17: 0.020},
    head={1: 0.001, 17: 0.002},
    drafts={
        Source("early-exit", 1): DraftCost(begin=0.0, step=0.001),
        Source("early-exit", 2): DraftCost(begin=0.0, step=0.003),
    },
)
PROMPTS = [
    torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() * 2 for n in (1, 3, 9, 20, 33)
]
HEADER = {"costs": json.loads(json.dumps(TABLE.as_json()))}
NUM_TOKENS = 30
FORMAT_1 = """\
{"format": 1, "model": "tiny", "costs": {"layers": {"1": 0.01, "17": 0.02}, "head": {"1": 0.001, "17": 0.002}, \
"drafts": {"exit-branch": {"begin": 0.0, "step": 0.001}}}, "priors": {"exit-branch": [0.7, 0.5]}}
{"kind": "proposals", "request": 0, "position": 1, "num_correct": {"ngram": 0, "exit-branch": 2}, \
"signs": {"ngram": [], "exit-branch": [0, 1, 2]}}
{"kind": "proposals", "request": 0, "position": 2, "num_correct": {"ngram": 1, "exit-branch": 1}, \
"signs": {"ngram": [3], "exit-branch": [0, 1, 2]}}
{"kind": "proposals", "request": 0, "position": 3, "num_correct": {"ngram": 0, "exit-branch": 0}, \
"signs": {"ngram": [], "exit-branch": [0, 1, 2]}}
{"kind": "round", "draft_seconds": 0.001, "pass_seconds": 0.01, "choose_seconds": 0.001, "commit_seconds": 0.0, \
"num_rows": 3, "num_chosen_by_logits": 0, "sequences": [{"request": 0, "position": 1, "source": "exit-branch", \
"num_draft_tokens": 2, "num_accepted_tokens": 2, "num_committed": 3, "num_runner_ups": 0, "runner_up": null}]}
"""
"""A file as it was written before buckets had their name."""


def hopskip(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model() -> Backend:
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(scope="module")
def recorded(model: Backend) -> Trace:
    found: list[Proposals] = []
    record(model, PROMPTS, max_new_tokens=NUM_TOKENS, on_proposals=found.append)
    return Trace(header=dict(HEADER), proposals=found)


def test_files_keep_everything(model: Backend, recorded: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rounds: list[Round] = []
    engine = make_engine(model, SpeculativeConfig(draft="both", exit_layer=1, num_draft_tokens=3))
    with TraceWriter(path, {"model": "tiny"}) as write:

        def keep(outcome: Round) -> None:
            rounds.append(outcome)
            write(outcome)

        engine.on_round = keep
        for prompt in PROMPTS[:2]:
            engine.add(Request(prompt, SamplingParams(max_new_tokens=8)))
        while engine.has_work:
            engine.step()
        for proposals in recorded.proposals[:5]:
            write(proposals)
    found = read_trace(path)
    assert found.header == {"format": 2, **stamp(), "model": "tiny"}
    assert found.rounds == rounds
    assert found.proposals == recorded.proposals[:5]
    assert rounds
    assert all(len(each.sequences) == 2 for each in rounds[:2])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "is empty"),
        ("not json\n", "1 is no line"),
        ('{"format": 9}\n{"kind": "of the future"}\n', "format 9; this version of hopskip reads formats 1 to 2"),
        ('{"format": 2}\n{"kind": "round"}\n', "2 is no line"),
        ('{"format": 2}\n{"kind": "proposals", "x": 1}\n', "2 is no line"),
        ('{"format": 1}\n{"kind": "proposals", "request": 0, "position": 1, "num_correct": {}}\n', "2 is no line"),
        ("[1]\n", "1 is no line"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_is_no_trace(content: str | bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=named):
        read_trace(path)
    assert hopskip("trace", "show", path).exit_code == 2


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "absent")
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceWriter(tmp_path / "absent" / "file")


@pytest.mark.parametrize(
    ("draft", "setting"),
    [("early-exit", "early-exit:1, 3"), ("ngram", "ngram, 3"), ("both", "both, 3"), ("none", "none")],
)
def test_a_replay_takes_the_rounds_of_the_engine(model: Backend, recorded: Trace, draft: str, setting: str) -> None:
    settings: dict[str, Any] = {"draft": draft}
    settings |= {} if draft == "none" else {"num_draft_tokens": 3}
    settings |= {"exit_layer": 1} if draft in ("early-exit", "both") else {}
    # at the shape of the recording: the model's bits depend on it
    engine = make_engine(model, SpeculativeConfig(**settings), max_num_seqs=1, rows_per_sequence=7)
    sequences = [engine.add(Request(prompt, SamplingParams(max_new_tokens=NUM_TOKENS))) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    outcome = next(each for each in replay(recorded).fixed if each.setting == setting)
    assert outcome.num_tokens == sum(len(s.tokens) - 1 for s in sequences)
    assert outcome.num_rounds == sum(s.stats.num_target_passes for s in sequences)
    if draft == "none":
        assert outcome.seconds == pytest.approx(outcome.num_rounds * 0.011)


def scripted(num_correct: int, length: int = 400) -> Trace:
    """A text where one exit is right so many times in a row, at every position."""
    buckets = {"early-exit:1": list(range(16)), "early-exit:2": list(range(16)), "ngram": []}
    proposals = [
        Proposals(
            request=0,
            position=position,
            num_correct={"early-exit:1": min(num_correct, length - position), "early-exit:2": 0, "ngram": 0},
            buckets=buckets,
        )
        for position in range(1, length)
    ]
    return Trace(header=dict(HEADER), proposals=proposals)


def test_regret() -> None:
    for num_correct in (0, 1, 4, 16):
        found = replay(scripted(num_correct), max_draft_tokens=8)
        best = found.fixed[0]
        assert best.setting == (f"early-exit:1, {min(num_correct, 8)}" if num_correct else "none")
        assert found.auto.num_tokens == best.num_tokens
        assert found.regret == pytest.approx(found.auto.seconds / best.seconds - 1)
        assert -0.01 < found.regret < 0.10, num_correct
    assert found.speedup > 3


def test_what_cannot_be_replayed(recorded: Trace) -> None:
    with pytest.raises(ConfigError, match="cannot be replayed"):
        replay(Trace(header={}))
    with pytest.raises(ConfigError, match="no cost table"):
        replay(Trace(header={}, proposals=recorded.proposals))
    unknown = Proposals(request=0, position=1, num_correct={"oracle": 1}, buckets={"oracle": [0]})
    with pytest.raises(ConfigError, match="'oracle' is no source"):
        replay(Trace(header=dict(HEADER), proposals=[unknown]))


def test_a_file_of_format_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text(FORMAT_1)
    found = read_trace(path)
    assert found.header["format"] == 1
    assert [proposals.buckets["ngram"] for proposals in found.proposals] == [[], [3], []]
    assert found.rounds[0].sequences[0].source == "exit-branch"
    outcomes = {outcome.setting: outcome for outcome in replay(found).fixed}
    # one round drafts two tokens, as there are two more after the one that its pass yields, and both are right
    assert (outcomes["exit-branch, 2"].num_tokens, outcomes["exit-branch, 2"].num_rounds) == (3, 1)
    assert (outcomes["ngram, 1"].num_tokens, outcomes["ngram, 1"].num_rounds) == (3, 2)


def test_recording_takes_the_costs_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "_SECONDS", 0.01)
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    auto = SpeculativeConfig(draft="auto")
    LLM(tmp_path / "model", speculative=auto, backend="torch", dtype="float32")
    (kept,) = (tmp_path / "cache").glob("*.costs.json")
    monkeypatch.setattr(timing, "measure", lambda *arguments, **options: pytest.fail("measured again"))
    opened = open_model(LoadConfig(model=tmp_path / "model", backend="torch", dtype="float32"), auto)
    known = record(opened.backend, [], max_new_tokens=4, identity=opened.identity, on_proposals=print)
    assert json.loads(json.dumps(known["costs"])) == json.loads(kept.read_text())["costs"]


def test_measured_speedup() -> None:
    source = Source("early-exit", 1)
    flat = Costs(layers={1: 0.9, 17: 0.9}, head={1: 0.1, 17: 0.1}, drafts={source: DraftCost(begin=0, step=0.2)})
    for acceptance, k in ((0.3, 1), (0.8, 4), (0.9, 12)):
        assert measured_speedup(flat, source, acceptance, k) == pytest.approx(expected_speedup(acceptance, k, 0.2))
    assert best_measured(flat, source, 0.1) == (0, 1.0)
    assert best_measured(flat, None, 0.5)[0] == 16


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))
    model, file, texts = tmp_path / "model", tmp_path / "rounds.jsonl", tmp_path / "texts.jsonl"
    write_checkpoint(model, "llama2-mha", tokenizer=True)
    options = ("-m", model, "--backend", "torch")
    result = hopskip(
        "generate", *options, "--draft", "ngram", "--trace", file, "-n", "20", "--ignore-eos", "a b a b a b"
    )
    assert result.exit_code == 0, result.output
    assert read_trace(file).header["settings"]["speculative"]["draft"] == "ngram"
    pytest.importorskip("matplotlib")
    result = hopskip("trace", "show", file, "--plot", tmp_path / "plot.png", "--json")
    summary = json.loads(result.stdout)
    assert summary["num_committed"] == 19
    assert summary["num_committed"] == sum(counts["num_committed"] for counts in summary["sources"].values())
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "tokens a round" in hopskip("trace", "show", file).stdout
    assert "cannot be replayed" in hopskip("trace", "replay", file).stderr
    result = hopskip("trace", "record", texts, *options, "--prompts", "copy", "--num-prompts", "1", "-n", "12")
    assert result.exit_code == 0, result.output
    found = json.loads(hopskip("trace", "replay", texts, "--json").stdout)
    assert found["auto"]["num_tokens"] <= 11
    assert {"none", "ngram, 1"} <= {outcome["setting"] for outcome in found["fixed"]}
    assert "Regret of auto" in hopskip("trace", "replay", texts).stdout
    assert "no rounds to show" in hopskip("trace", "show", texts).stderr
    monkeypatch.setattr(sys.modules["hopskip.cli.info"], "_MEASURE_SECONDS", 0.1)
    measured = json.loads(hopskip("info", *options, "--measure", "--json").stdout)["measured"]
    assert measured["drafts"].keys() == {"early-exit:1", "early-exit:2"}
    assert len(measured["expected"]["ngram"]) == 12, "six rates, at a short context and at a long one"
    result = hopskip("info", *options, "--measure")
    assert "early-exit:2" in result.stdout
    assert "…" not in result.stdout
