"""`hopskip perplexity`: against transformers' losses; windows; the error of a difference; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.requantize import requantize
from typer.testing import CliRunner, Result

from hopskip.backends.native.isa import obstacle
from hopskip.bench.perplexity import (
    cut_windows,
    difference,
    negative_log_likelihoods,
    perplexity,
    places_to_read,
    read_text,
)
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.cli import app
from hopskip.errors import ConfigError, PromptError
from hopskip.loading import BackendName, LoadConfig, load_backend
from hopskip.prompts import whole_prompts
from hopskip.text.tokenizer_files import load_tokenizer
from tests.tiny import byte_level_tokenizer, make_model, write_checkpoint, write_gguf

WINDOWS = [[(7 * i * i + n) % 320 for i in range(n)] for n in (2, 40, 300)]  # the last has more rows than one head pass
BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(obstacle() is not None, reason="not built"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_those_of_transformers_at_every_layer(tmp_path: Path, backend: BackendName) -> None:
    theirs = write_checkpoint(tmp_path, "llama2-mha")
    ours = load_backend(open_checkpoint(tmp_path), LoadConfig(backend=backend, dtype="float32"))
    found = negative_log_likelihoods(ours, WINDOWS, places_to_read(3, [2, 1]))
    assert list(found) == [1, 2, 3]
    expected: dict[int, list[torch.Tensor]] = {1: [], 2: [], 3: []}
    for window in WINDOWS:
        with torch.no_grad():
            out = theirs(torch.tensor([window]), output_hidden_states=True)
            exits = {e: theirs.lm_head(theirs.model.norm(out.hidden_states[e][0])) for e in (1, 2)}
        for stop, logits in {**exits, 3: out.logits[0]}.items():
            expected[stop].append(F.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="none"))
    for stop, nll in found.items():
        torch.testing.assert_close(torch.from_numpy(nll), torch.cat(expected[stop]), rtol=1e-4, atol=1e-3)
    assert perplexity(found[3]) == pytest.approx(math.exp(torch.cat(expected[3]).mean()), rel=1e-3)
    with pytest.raises(ConfigError, match="exit_layers has 3; this model has 3 layers, so give numbers from 1 to 2"):
        places_to_read(3, [3])


def test_windows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=True)
    tokenizer = load_tokenizer(tmp_path, open_checkpoint(tmp_path).config)
    texts = ["The quick brown fox", "", "hello, world"]
    first, last = (tokenizer.encode(texts[i]) for i in (0, 2))
    assert min(len(first), len(last)) > 4
    assert cut_windows(tokenizer, texts) == [first, last]
    # what is cut off last may be a single token, which predicts nothing
    assert cut_windows(tokenizer, texts[:1], context=len(first) - 1) == [first[:-1]]
    assert cut_windows(tokenizer, texts[:1], context=3)[:2] == [first[:3], first[3:6]]
    assert cut_windows(tokenizer, texts, max_tokens=len(first) + 2) == [first, last[:2]]
    assert cut_windows(tokenizer, texts, max_tokens=len(first) + 1) == [first]
    for wrong in ({"context": 1}, {"max_tokens": 1}):
        with pytest.raises(ConfigError, match="must be at least 2"):
            cut_windows(tokenizer, texts, **wrong)
    with pytest.raises(PromptError, match="fewer than two tokens"):
        cut_windows(tokenizer, ["", "a"])


def test_the_error_of_a_difference_comes_from_the_tokens() -> None:
    nll = np.random.default_rng(0).random(1000, dtype=np.float32) * 8
    assert difference(nll, nll).delta == difference(nll, nll).error == 0
    # the same shift of every token is certain, however much the tokens themselves differ
    shifted = difference(nll + np.float32(0.1), nll)
    assert shifted.delta == pytest.approx(perplexity(nll) * (math.exp(0.1) - 1), rel=1e-4)
    assert shifted.error < 1e-4
    noise = np.random.default_rng(1).standard_normal(1000, dtype=np.float32) * np.float32(0.2)
    assert difference(nll + noise, nll).error == pytest.approx(perplexity(nll) * 0.2 / math.sqrt(1000), rel=0.1)
    assert perplexity(np.array([1e4], dtype=np.float32)) == math.inf


def test_the_text_that_comes_with_the_package() -> None:
    texts = whole_prompts()
    assert len(texts) == 320
    assert "Start every sentence with the letter A." in texts[3], "the second turn of the first mt_bench prompt"


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(PromptError, match="not UTF-8"):
        read_text(tmp_path / "latin")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tiny") / "f32.gguf"
    write_gguf(file, make_model("llama3-gqa"), tokenizer=byte_level_tokenizer())
    return file


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["perplexity", *map(str, arguments)], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.skipif(obstacle() is not None, reason="not built")
def test_the_report(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    requantize(model, tmp_path / "q4_0.gguf", "q4_0")
    arguments = (model, "--text", text, "--against", tmp_path / "q4_0.gguf", "--exit-layers", "1,2", "--context", "32")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = ["float32", "bfloat16", "q8", "q4", "q4_0.gguf"]
    assert [(row["name"], row["exit_layer"]) for row in report["rows"]] == [(n, e) for n in names for e in (1, 2, None)]
    rows = {row["name"]: row for row in report["rows"] if row["exit_layer"] is None}
    assert rows["float32"]["delta"] == rows["float32"]["delta_error"] == 0
    # random weights predict nothing, so rounding may help as well as harm: only its size says something
    gaps = {name: abs(row["delta"]) for name, row in rows.items()}
    assert 0 < gaps["bfloat16"] < gaps["q4"]
    assert 0 < gaps["q8"] < gaps["q4"]
    for row in report["rows"]:
        assert row["delta"] == pytest.approx(
            row["perplexity"] - next(r for r in report["rows"] if r["exit_layer"] == row["exit_layer"])["perplexity"]
        )
    assert rows["float32"]["weight_bytes"] > rows["bfloat16"]["weight_bytes"] > rows["q8"]["weight_bytes"]
    assert rows["q4_0.gguf"]["weight_bytes"] < rows["q4"]["weight_bytes"]  # Q4_0 has no minima
    num_tokens = len(load_tokenizer(model, open_checkpoint(model).config).encode(text.read_text()))
    assert report["text"] == {
        "files": [str(text)],
        "num_windows": -(-num_tokens // 32),
        "num_tokens": num_tokens - -(-num_tokens // 32),
    }
    printed = run(*arguments)
    assert printed.exit_code == 0
    assert f"{rows['q8']['perplexity']:.3f}" in printed.stdout
    assert f"{rows['q4_0.gguf']['delta']:+.3f} ± {rows['q4_0.gguf']['delta_error']:.3f}" in printed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit-layers", "3"], "--exit-layers has 3; this model has 3 layers"),
        (["--exit-layers", "one"], "'one'; give numbers with commas between"),
        (["--precision", "q5"], "precision is 'q5'"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--context", "4096"], "--context is 4096; the model's own is 1024"),
        (["--context", "0"], "0; it must be at least 2"),
        (["--max-tokens", "1"], "--max-tokens is 1; it must be at least 2"),
        (["--against", "nowhere.gguf"], "nowhere.gguf does not exist"),
        (["--against", "OTHER"], "vocab_size of 96, the model one of 320"),
    ],
)
def test_wrong_options(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    other = tmp_path / "other.gguf"
    theirs = make_model("llama3-gqa")
    theirs.resize_token_embeddings(96)
    write_gguf(other, theirs)
    result = run(model, "--backend", "torch", *(str(other) if a == "OTHER" else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
