"""`hopskip bench serve`: what it measures, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hopskip.bench.load_test import Sample, percentiles, summary
from hopskip.cli import app
from tests.serving import MODEL, Live, live_server, tiny_llm


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tiny_llm(tmp_path_factory.mktemp("model"))) as live:
        yield live


def test_a_server_is_loaded(live: Live, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n{"prompt": "Good night"}\n')
    plot = tmp_path / "plot.png"
    arguments = ["bench", "serve", "--url", f"{live.url}/v1", "--concurrency", "1,4", "--num-requests", "6", "--json"]
    result = CliRunner().invoke(
        app, [*arguments, "--prompts", str(prompts), "--max-tokens", "5", "--plot", str(plot)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == MODEL
    assert [level["concurrency"] for level in report["levels"]] == [1, 4]
    for level in report["levels"]:
        assert (level["num_requests"], level["num_failed"]) == (6, 0)
        assert 6 <= level["num_tokens"] <= 30
        assert 0 < level["first_token_seconds"]["p50"] <= level["request_seconds"]["p50"]
        assert level["tokens_per_second"] == pytest.approx(level["num_tokens"] / level["seconds"])
    assert plot.stat().st_size > 1000


def test_a_server_that_refuses_is_reported(live: Live) -> None:
    arguments = ["bench", "serve", "--url", live.url, "--concurrency", "2", "--num-requests", "2"]
    result = CliRunner().invoke(app, [*arguments, "--extra", '{"temperature": 9}'])
    assert result.exit_code == 1
    assert "status 400" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost:8000"], "begins with http"),
        (["--url", "http://127.0.0.1:9", "--num-requests", "1"], "no OpenAI server"),
        (["--url", "http://127.0.0.1:9", "--concurrency", "1,x"], "numbers from 1 to 4096"),
        (["--url", "http://127.0.0.1:9", "--extra", "[]"], "JSON object"),
        (["--url", "http://127.0.0.1:9", "--num-requests", "0"], "at least 1"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_figures_of_a_level() -> None:
    samples = [Sample(seconds=1 + i, first_token_seconds=0.5, num_tokens=2 + i) for i in range(3)]
    samples.append(Sample(seconds=9, first_token_seconds=9, num_tokens=0, error="status 500"))
    level = summary(samples, 2, 3.0)
    assert (level["num_failed"], level["errors"]) == (1, ["status 500"])
    assert level["tokens_per_second"] == 3.0
    assert level["seconds_per_token"] == percentiles([0.5, 0.75, 2.5 / 3])
    assert percentiles([]) is None
    assert percentiles([4.0, 1.0, 3.0, 2.0]) == {"mean": 2.5, "p50": 2.0, "p90": 4.0, "p99": 4.0}
