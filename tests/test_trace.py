"""Traces: files of rounds, their summary and plot, and replays held against the engine itself."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hopskip import ConfigError, SamplingParams, SpeculativeConfig
from hopskip.backends.base import Model
from hopskip.bench.expected import best_measured, expected_speedup, measured_speedup
from hopskip.bench.replay import record, replay
from hopskip.cli import app
from hopskip.draft.costs import Costs, DraftCost
from hopskip.engine.engine import Engine
from hopskip.trace import Proposals, Round, Trace, TraceWriter, read_trace
from tests.models import tiny_model
from tests.test_engine import PROMPTS
from tests.tiny import write_checkpoint

TABLE = Costs(
    layers={1: 0.010, 8: 0.012, 17: 0.020},
    head={1: 0.001, 17: 0.002},
    drafts={"early-exit:1": DraftCost(begin=0.0, step=0.001), "early-exit:2": DraftCost(begin=0.0, step=0.003)},
)
NUM_TOKENS = 30


def hopskip(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(scope="module")
def recorded(model: Model) -> Trace:
    found: list[Proposals] = []
    record(model, PROMPTS, max_new_tokens=NUM_TOKENS, on_proposals=found.append)
    return Trace(header={"costs": json.loads(json.dumps(asdict(TABLE)))}, proposals=found)


def test_files_keep_everything(model: Model, recorded: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rounds: list[Round] = []
    engine = Engine(model, SpeculativeConfig(draft="both", exit_layer=1, num_draft_tokens=3))
    with TraceWriter(path, {"model": "tiny"}) as write:
        engine.on_round = lambda outcome: (rounds.append(outcome), write(outcome))[0]
        for prompt in PROMPTS[:2]:
            engine.add(prompt, SamplingParams(max_new_tokens=8))
        while engine.has_work:
            engine.step()
        for proposals in recorded.proposals[:5]:
            write(proposals)
    found = read_trace(path)
    assert found.header == {"format": 1, "model": "tiny"}
    assert found.rounds == rounds
    assert found.proposals == recorded.proposals[:5]
    assert rounds
    assert all(len(each.sequences) == 2 for each in rounds[:2])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "is empty"),
        ("not json\n", "1 is no line"),
        ('{"format": 9}\n', "format 9"),
        ('{"format": 1}\n{"kind": "round"}\n', "2 is no line"),
        ('{"format": 1}\n{"kind": "proposals", "x": 1}\n', "2 is no line"),
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
def test_a_replay_takes_the_rounds_of_the_engine(model: Model, recorded: Trace, draft: str, setting: str) -> None:
    settings: dict[str, Any] = {"draft": draft}
    settings |= {} if draft == "none" else {"num_draft_tokens": 3}
    settings |= {"exit_layer": 1} if draft in ("early-exit", "both") else {}
    # at the shape of the recording: the model's bits depend on it
    engine = Engine(model, SpeculativeConfig(**settings), max_num_seqs=1, rows_per_sequence=7)
    sequences = [engine.add(prompt, SamplingParams(max_new_tokens=NUM_TOKENS)) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    outcome = next(each for each in replay(recorded).fixed if each.setting == setting)
    assert outcome.num_tokens == sum(len(s.tokens) - 1 for s in sequences)
    assert outcome.num_rounds == sum(s.stats.num_target_passes for s in sequences)
    if draft == "none":
        assert outcome.seconds == pytest.approx(outcome.num_rounds * 0.011)


def scripted(num_correct: int, length: int = 400) -> Trace:
    """A text where one exit is right so many times in a row, at every position."""
    signs = {"early-exit:1": list(range(16)), "early-exit:2": list(range(16)), "ngram": []}
    proposals = [
        Proposals(
            request=0,
            position=position,
            num_correct={"early-exit:1": min(num_correct, length - position), "early-exit:2": 0, "ngram": 0},
            signs=signs,
        )
        for position in range(1, length)
    ]
    return Trace(header={"costs": json.loads(json.dumps(asdict(TABLE)))}, proposals=proposals)


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


def test_measured_speedup() -> None:
    flat = Costs(layers={1: 0.9, 17: 0.9}, head={1: 0.1, 17: 0.1}, drafts={"x": DraftCost(begin=0, step=0.2)})
    for acceptance, k in ((0.3, 1), (0.8, 4), (0.9, 12)):
        assert measured_speedup(flat, "x", acceptance, k) == pytest.approx(expected_speedup(acceptance, k, 0.2))
    assert best_measured(flat, "x", 0.1) == (0, 1.0)
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
    assert len(measured["expected"]["ngram"]) == 6
    result = hopskip("info", *options, "--measure")
    assert "early-exit:2" in result.stdout
    assert "…" not in result.stdout
