"""Model files that no honest program would write, and whether each gives a clear error or a right answer.

    python -m benchmarks.hostile_files --count 4000 [--seed N]

Takes tiny models apart (GGUF, safetensors, 8-bit safetensors, the JSON files beside them), changes them in ways that
the formats can express, and opens and reads each. Fails if one is answered by anything but a `CheckpointError` or a
model whose tensors are those of its config; if one takes longer than ten seconds; or if memory grows by more than
256 MB, which the script forbids itself.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import deserialize

from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.checkpoint.gguf import GGUFFile
from hopskip.errors import CheckpointError
from hopskip.text.tokenizer_files import load_tokenizer

_SECONDS = 10
_MOST_GROWTH = 256 << 20
_LONGEST_MESSAGE = 8_000  # a few dozen names
_COUNTS = (0, 1, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
_ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "64", "F32", "\ud800", "\x00", [], [[]], {}, {"a": 1}, [-1], [0, 2**63], [2**62] * 3, [1] * 5000,
    "x" * 5000, [None], [True], [1.5],
]  # fmt: skip

Mutation = Callable[[random.Random, bytes], bytes]


def flipped(chance: random.Random, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """Up to four bytes of a range made others."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(start, stop or len(data))] = chance.choice(
            [0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)]
        )
    return bytes(changed)


def resized(chance: random.Random, data: bytes) -> bytes:
    """Cut, continued, with a hole, or with bytes put in."""
    place, length = chance.randrange(len(data)), chance.choice([1, 4, 8, 31, 4096])
    return chance.choice(
        [
            data[:place],
            data + chance.randbytes(length),
            data[:place] + data[place + length :],
            data[:place] + chance.randbytes(length) + data[place:],
        ]
    )


def miscounted(chance: random.Random, data: bytes, stop: int) -> bytes:
    """A number of 4 or 8 bytes somewhere in the header, be it one or not, made an extreme one."""
    layout = chance.choice(["<Q", "<I"])
    changed = bytearray(data)
    place = chance.choice([8, 16, chance.randrange(4, stop - 8)])
    struct.pack_into(layout, changed, place, chance.choice(_COUNTS) % (1 << 8 * struct.calcsize(layout)))
    return bytes(changed)


def hostile_gguf(chance: random.Random, whole: bytes, header_size: int) -> bytes:
    kind = chance.randrange(8)
    if kind <= 1:
        return flipped(chance, whole, 0, header_size)
    if kind == 2:
        return resized(chance, whole)
    if kind <= 4:
        return miscounted(chance, whole, header_size)
    if kind == 5:
        return flipped(chance, whole, header_size)
    if kind == 6:
        return _table_changed(chance, whole, header_size)
    return _made_up_gguf(chance) + whole[header_size:]


def _table_changed(chance: random.Random, whole: bytes, header_size: int) -> bytes:
    """Two pieces of the tensor table exchanged, or one put over the other: names, shapes and offsets of one length."""
    changed = bytearray(whole)
    start = whole.index(b"token_embd.weight") - 8 if b"token_embd.weight" in whole else 24
    length = chance.choice([4, 8, 16, 64])
    one, other = (chance.randrange(start, header_size - length) for _ in range(2))
    changed[one : one + length] = whole[other : other + length]
    if chance.random() < 0.5:
        changed[other : other + length] = whole[one : one + length]
    return bytes(changed)


def _made_up_gguf(chance: random.Random) -> bytes:
    """A header with one key: arrays in arrays, arrays and strings of any announced length, text that is none."""

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    kind = chance.randrange(4)
    key = string(b"general.architecture" if kind else b"\xff\xfe" * 10)
    depth = chance.choice([1, 10, 990, 5000, 100_000])
    value = {
        0: struct.pack("<IB", 0, 1),
        1: struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0),
        2: struct.pack("<IIQ", 9, chance.randrange(14), chance.choice(_COUNTS))
        + bytes(chance.choice([0, 100, 100_000])),
        3: struct.pack("<I", 8) + struct.pack("<Q", chance.choice(_COUNTS)) + b"\xc3\x28" * 20,
    }[kind]
    num_tensors, num_keys = chance.choice([0, 1, *_COUNTS]), chance.choice([1, 1, 1, *_COUNTS])
    return b"GGUF" + struct.pack("<IQQ", chance.choice([2, 3]), num_tensors, num_keys) + key + value + bytes(64)


def hostile_safetensors(chance: random.Random, whole: bytes) -> bytes:
    length = struct.unpack("<Q", whole[:8])[0]
    body = whole[8 + length :]
    kind = chance.randrange(9)
    if kind == 0:
        return flipped(chance, whole, 0, 8 + length)
    if kind == 1:
        return resized(chance, whole)
    if kind == 2:
        return flipped(chance, whole, 8 + length)
    if kind == 3:
        return struct.pack("<Q", chance.choice([*_COUNTS, length - 1, length + 1])) + whole[8:]
    if kind == 4:
        depth = chance.choice([10, 990, 100_000])
        text = b'{"a":' + chance.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth]) + b"}"
    elif kind == 5:
        text = whole[8 : 8 + length].replace(b"weight", chance.choice([b"\xff\xfe", b"\\ud800", b'"', b"bias"]), 2)
    else:
        text = _entries_changed(chance, json.loads(whole[8 : 8 + length]))
    return struct.pack("<Q", len(text)) + text + body


def _entries_changed(chance: random.Random, header: dict[str, Any]) -> bytes:
    """One entry of the table made odd, made another's, or written twice."""
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.sample(names, 2)
    kind = chance.randrange(5)
    if kind == 0:
        header[one][chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice(_ODD)
    elif kind == 1:
        header[one] = chance.choice(_ODD)
    elif kind == 2:
        field = chance.choice(["shape", "data_offsets"])
        numbers = header[one][field]
        numbers[chance.randrange(len(numbers))] = chance.choice([*_COUNTS, -1, 1.5, None, "1"])
    elif kind == 3:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    else:
        return json.dumps(header).replace(one, other).encode()
    return json.dumps(header).encode()


def hostile_json(chance: random.Random, whole: bytes) -> bytes:
    """A config with one or two odd values, at the top or within, or that is no JSON."""
    if chance.random() < 0.1:
        return chance.choice([flipped, resized])(chance, whole)
    value = json.loads(whole)
    for _ in range(chance.randint(1, 2)):
        place = value
        inner = [item for item in value.values() if isinstance(item, dict) and item]
        if inner and chance.random() < 0.4:
            place = chance.choice(inner)
        place[chance.choice([*place, "rope_scaling", "quantization_config", "sliding_window"])] = chance.choice(_ODD)
    return json.dumps(value).encode()


def read_whole(path: Path) -> bool:
    """Open a model and read all of it. True if it opened, False if it was refused with a `CheckpointError`.

    Raises:
        AssertionError: what was read is not what the config says.
        TimeoutError: it took too long.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"reading {path} takes longer than {_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        checkpoint = open_checkpoint(path)
        assert "\n" not in str(checkpoint.config), "a config of several lines"
        expected = expected_tensors(checkpoint.config)
        assert checkpoint.names() == expected.keys()
        theirs = _read_by_safetensors(path)
        for name, shape in expected.items():
            assert checkpoint.array(name).shape == shape, name
            if name in theirs:
                assert checkpoint.stored(name).blocks().tobytes() == theirs[name], name
        checkpoint.config.rope.tables(8)
        if path.is_file():
            load_tokenizer(path, checkpoint.config)
    except CheckpointError as error:
        if not 0 < len(str(error)) < _LONGEST_MESSAGE:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
        return False
    finally:
        signal.alarm(0)
    return True


def _read_by_safetensors(path: Path) -> dict[str, bytes]:
    """What the library of the format makes of a folder; nothing where it refuses what we read."""
    try:
        parse: Any = deserialize  # which has no types
        content = (path / "model.safetensors").read_bytes() if path.is_dir() else b""
        return {name: bytes(tensor["data"]) for name, tensor in parse(content)} if content else {}
    except Exception:  # of many kinds
        return {}


class Models:
    """The tiny models that are changed, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        from tests.test_fp8 import write_fp8
        from tests.tiny import byte_level_tokenizer, make_model, write_checkpoint, write_gguf

        self._gguf = folder / "m.gguf"
        write_gguf(self._gguf, make_model("llama3-gqa"), tokenizer=byte_level_tokenizer())
        self._folders = [folder / "plain", folder / "fp8"]
        write_checkpoint(self._folders[0], "llama-yarn")
        write_fp8(self._folders[1], "deepseek")
        for path in (self._gguf, *self._folders):
            assert read_whole(path), f"{path} cannot be read as it is"
        self._header_size = GGUFFile(self._gguf).header_size
        files = [self._gguf, *(file for place in self._folders for file in sorted(place.iterdir()))]
        self._originals = {file: file.read_bytes() for file in files}

    def attempts(self, chance: random.Random) -> Iterator[tuple[str, bool]]:
        """Endless: the kind of file that was changed, and whether it opened. After a failure it stays as it is."""
        while True:
            kind = chance.choice(["gguf", "gguf", "safetensors", "safetensors", "json"])
            place = self._gguf if kind == "gguf" else chance.choice(self._folders)
            suffix = {"gguf": "m.gguf", "safetensors": "model.safetensors"}.get(kind) or chance.choice(
                ["config.json", "generation_config.json"]
            )
            file = place if kind == "gguf" else place / suffix
            original = self._originals[file]
            if kind == "gguf":
                changed = hostile_gguf(chance, original, self._header_size)
            else:
                changed = (hostile_safetensors if kind == "safetensors" else hostile_json)(chance, original)
            # a new file each time: a map of the old one may still be open
            file.unlink()
            file.write_bytes(changed)
            opened = read_whole(place)
            file.unlink()
            file.write_bytes(original)
            yield kind, opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MOST_GROWTH, size + _MOST_GROWTH))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attempts = models.attempts(random.Random(arguments.seed))
        for index in range(arguments.count):
            try:
                kind, opened = next(attempts)
            except Exception as error:
                error.add_note(f"attempt {index} of seed {arguments.seed}")
                raise
            counts[f"{kind} {'opened' if opened else 'refused'}"] += 1
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"count": arguments.count, "growth_mb": round(growth, 1), **dict(sorted(counts.items()))}))


if __name__ == "__main__":
    main()
