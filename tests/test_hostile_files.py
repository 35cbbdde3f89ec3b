"""A sample of what `benchmarks/hostile_files.py` tries: model files that no honest program would write."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from benchmarks import hostile_files
from benchmarks.hostile_files import Models, hostile_gguf, hostile_json, hostile_safetensors, read_whole

from hopskip.checkpoint.gguf import GGUFFile
from tests.tiny import make_model, write_checkpoint, write_gguf

_COUNT, _MOST_MB = 240, 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("hostile"))


def test_each_is_refused_in_a_line_or_read_right(models: Models) -> None:
    """Soon, whatever is announced. Both answers must come, or the sample proves little."""
    answers: Counter[tuple[str, bool]] = Counter()
    attempts = models.attempts(random.Random(7))
    for _ in range(_COUNT):
        answers[next(attempts)] += 1
    assert all(answers[kind, opened] >= 3 for kind in ("gguf", "safetensors", "json") for opened in (True, False)), (
        answers
    )


def test_announced_sizes_take_no_memory(models: Models) -> None:
    attempts = models.attempts(random.Random(8))
    tracemalloc.start()
    try:
        for _ in range(_COUNT // 6):
            next(attempts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < _MOST_MB << 20


def test_changes_are_changes(tmp_path: Path) -> None:
    """Nearly every attempt differs from the file that it was made of."""
    write_checkpoint(tmp_path)
    write_gguf(tmp_path / "m.gguf", make_model("llama3-gqa"))
    gguf = (tmp_path / "m.gguf").read_bytes()
    header_size = GGUFFile(tmp_path / "m.gguf").header_size
    chance = random.Random(1)
    weights, config = ((tmp_path / name).read_bytes() for name in ("model.safetensors", "config.json"))
    assert sum(hostile_gguf(chance, gguf, header_size) != gguf for _ in range(50)) > 45
    assert sum(hostile_safetensors(chance, weights) != weights for _ in range(50)) > 45
    assert sum(hostile_json(chance, config) != config for _ in range(50)) > 45


@pytest.mark.parametrize("error", [TypeError("x"), MemoryError(), RecursionError()])
def test_another_error_fails(error: Exception, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(hostile_files, "open_checkpoint", fail)
    with pytest.raises(type(error)):
        next(models.attempts(random.Random(1)))


def test_what_takes_too_long_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(hostile_files, "open_checkpoint", hang)
    monkeypatch.setattr(hostile_files, "_SECONDS", 1)
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        read_whole(tmp_path)
