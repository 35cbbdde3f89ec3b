"""The cache of packed weights: the same bits on every start, and never a damaged file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hopskip.backends.native.packed import PackedWeights
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.machine import cache_folder

from .tiny import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", "qwen2.5-tied")
    return open_checkpoint(tmp_path / "model")


def cache_file() -> Path:
    folder = cache_folder()
    assert folder is not None
    (path,) = folder.iterdir()
    return path


def assert_same(found: PackedWeights, expected: PackedWeights) -> None:
    assert found.matrices.keys() == expected.matrices.keys()
    assert found.vectors.keys() == expected.vectors.keys()
    for name, vector in expected.vectors.items():
        assert np.array_equal(found.vectors[name], vector)
    for name, matrix in expected.matrices.items():
        assert (found.matrices[name].format, found.matrices[name].rows) == (matrix.format, matrix.rows)
        assert np.array_equal(found.matrices[name].data, matrix.data)
        assert found.matrices[name].data.ctypes.data % 64 == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "q8", "q4"])
def test_the_second_start_maps_what_the_first_packed(
    checkpoint: Checkpoint, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = PackedWeights.from_checkpoint(checkpoint, precision)
    assert_same(PackedWeights.load(checkpoint, precision), expected)
    monkeypatch.setattr(PackedWeights, "from_checkpoint", None)  # must not be called again
    assert_same(PackedWeights.load(checkpoint, precision), expected)


def test_precisions_and_weights_have_files_of_their_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", "qwen2.5-tied", seed=1)
    for one, precision in ((checkpoint, "q8"), (checkpoint, "q4"), (open_checkpoint(tmp_path / "other"), "q8")):
        assert_same(PackedWeights.load(one, precision), PackedWeights.from_checkpoint(one, precision))


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "empty", "other file", "header", "header length"])
def test_a_damaged_file_is_rebuilt(checkpoint: Checkpoint, damage: str) -> None:
    expected = PackedWeights.from_checkpoint(checkpoint, "q8")
    PackedWeights.load(checkpoint, "q8")
    path = cache_file()
    data = bytearray(path.read_bytes())
    if damage == "flipped byte":
        data[-1000] ^= 1
    elif damage == "cut short":
        del data[-64:]
    elif damage == "empty":
        data.clear()
    elif damage == "other file":
        data[:8] = b"something"[:8]
    elif damage == "header":
        data[40] ^= 255
    else:
        data[8:16] = b"\xff" * 8
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"damaged .* being rebuilt"):
        assert_same(PackedWeights.load(checkpoint, "q8"), expected)
    assert_same(PackedWeights.load(checkpoint, "q8"), expected)


def test_without_space_or_permission_it_says_so_and_goes_on(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = PackedWeights.from_checkpoint(checkpoint, "q8")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"HOPSKIP_CACHE"):
        assert_same(PackedWeights.load(checkpoint, "q8"), expected)
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.warns(UserWarning, match=r"GB are free"):
        assert_same(PackedWeights.load(checkpoint, "q8"), expected)
    assert not list((tmp_path / "cache").iterdir())


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("HOPSKIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/hopskip")
