"""The cache of packed weights: the same bits on every start, and never a damaged file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hopskip.backends.native import packed
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.packed import PackedWeights, read_header
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.cli import app
from hopskip.errors import CheckpointError
from hopskip.machine import cache_folder, leftovers, replacing_file

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


def test_packed_files_are_read_only(checkpoint: Checkpoint) -> None:
    PackedWeights.load(checkpoint, "q8")
    assert cache_file().stat().st_mode & 0o777 == 0o444


def change(path: Path, at: int) -> None:
    """One bit, as another program would."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_bit_that_no_sample_sees_is_found_by_the_time_of_change(checkpoint: Checkpoint) -> None:
    expected = PackedWeights.from_checkpoint(checkpoint, "float32")
    weights = PackedWeights.load(checkpoint, "float32")
    path = cache_file()
    header = read_header(path)
    at, tensor = max(
        ((path.stat().st_size - header["size"] + t["offset"], t) for t in header["tensors"].values()),
        key=lambda found: found[1]["size"],
    )
    unseen = at + 2 * 4096
    assert tensor["size"] > 3 * 4 * 4096
    weights.check_unchanged()
    weights.verify()
    change(path, unseen)
    with pytest.raises(CheckpointError, match=r"packed weights .* have been changed while in use"):
        weights.check_unchanged()
    with pytest.raises(CheckpointError, match=r"checksum of .* is wrong.*hopskip cache verify"):
        weights.verify()
    read_header(path)  # its samples are right
    with pytest.warns(UserWarning, match=r"checksum of .* is wrong.*being rebuilt"):
        assert_same(PackedWeights.load(checkpoint, "float32"), expected)


def test_samples_are_spread_over_a_tensor(checkpoint: Checkpoint) -> None:
    """A bit at the start, after one and two thirds, and at the end: each is found without reading the rest."""
    PackedWeights.load(checkpoint, "float32")
    path = cache_file()
    header = read_header(path)
    tensor = max(header["tensors"].values(), key=lambda found: int(found["size"]))
    first = path.stat().st_size - header["size"] + tensor["offset"]
    last = tensor["size"] - 4096
    for place in (0, last // 3, last * 2 // 3, last + 4095):
        change(path, first + place)
        with pytest.raises(ValueError, match="not what was written"):
            read_header(path)
        change(path, first + place)
    read_header(path)


def test_a_file_cut_short_while_in_use_is_an_error_and_not_the_end(checkpoint: Checkpoint) -> None:
    backend = NativeBackend.load(checkpoint, "q8")
    rows, cache = Rows([Segment(0, 0, 2)]), backend.new_cache(1, 8)
    backend.forward([1, 2], rows, cache)
    path = cache_file()
    path.chmod(0o644)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="changed while in use; start again"):
        backend.forward([1, 2], rows, cache)


def test_a_copied_file_is_checked_once(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = PackedWeights.load(checkpoint, "q8")
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / next((tmp_path / "cache").iterdir()).name
    copy.write_bytes(next((tmp_path / "cache").iterdir()).read_bytes())
    checks: list[object] = []
    check_all = packed._check_all

    def counted(header: Any, data: Any) -> None:
        checks.append(data)
        check_all(header, data)

    monkeypatch.setattr(packed, "_check_all", counted)
    for _ in range(2):
        assert_same(PackedWeights.load(checkpoint, "q8"), expected)
    assert len(checks) == 1


def test_vectors_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "smollm2")
    stored = open_checkpoint(tmp_path).stored("model.layers.1.input_layernorm.weight")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(stored.offset + 3 * 4)
        file.write(np.float32("inf").tobytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight of .* infinite or not a number"):
        PackedWeights.from_checkpoint(open_checkpoint(tmp_path), "float32")


def test_a_stopped_packer_leaves_nothing(checkpoint: Checkpoint) -> None:
    def stop(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PackedWeights.load(checkpoint, "q8", stop)
    folder = cache_folder()
    assert folder is not None
    assert not list(folder.iterdir())


def test_progress_rises_to_one(checkpoint: Checkpoint) -> None:
    for make in (PackedWeights.load, PackedWeights.from_checkpoint):
        shares: list[float] = []
        make(checkpoint, "q8", shares.append)
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.5
        assert shares[-1] == 1


def test_leftovers_of_killed_processes_go(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_folder()
    assert folder is not None
    command = (
        "import os, signal, sys; from pathlib import Path; from hopskip.machine import replacing_file\n"
        "with replacing_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", command, str(folder / "a.packed")], check=False)
    (left,) = folder.iterdir()
    assert leftovers(folder) == [left]
    with replacing_file(folder / "b.packed") as own:  # of a process that lives
        own.write_bytes(b"")
        elsewhere = folder / ".c.packed.another-machine-1-2.part"
        elsewhere.write_bytes(b"")
        assert leftovers(folder) == [left]
        os.utime(elsewhere, (0, 0))
        assert leftovers(folder) == [left, elsewhere]
        PackedWeights.load(checkpoint, "q8")
        assert not left.exists()
        assert not elsewhere.exists()
        assert own.exists()


def test_the_cache_command(checkpoint: Checkpoint) -> None:
    PackedWeights.load(checkpoint, "q8")
    PackedWeights.load(checkpoint, "q4")
    folder = cache_folder()
    assert folder is not None
    old = folder / f"{'0' * 32}-q8-1.packed"
    old.write_bytes(b"old")
    costs = folder / "x.costs.json"
    costs.write_text("{}")
    listed = json.loads(cache_command("list", "--json"))["files"]
    assert [(file["precision"], file["state"]) for file in listed] == [
        ("q8", "outdated"),
        ("q4", "current"),
        ("q8", "current"),
    ]
    assert listed[1]["model"] == str(checkpoint.path)
    assert {name for name in ("MB in", "outdated", "current", "q4") if name in cache_command("list")} == {
        "MB in", "outdated", "current", "q4",
    }  # fmt: skip
    assert cache_command("verify").count("good") == 2
    assert "removed" in cache_command("prune")
    assert not old.exists()
    assert costs.exists()
    damaged = sorted(folder.glob("*.packed"))[0]
    change(damaged, damaged.stat().st_size - 100)
    assert "damaged (" in cache_command("verify", exit_code=1)
    assert len(list(folder.glob("*.packed"))) == 1
    assert "0.0 MB freed" in cache_command("prune", "--unused-for", "1")
    assert "freed" in cache_command("prune", "--unused-for", "0")
    assert not list(folder.glob("*.packed"))
    PackedWeights.load(checkpoint, "q8")
    cache_command("prune", "--all")
    assert not list(folder.glob("*.packed"))
    assert "must be a number of days" in cache_command("prune", "--unused-for", "-1", exit_code=2)


def cache_command(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


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
