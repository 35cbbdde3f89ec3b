"""A process that tries strangers' grammars, so that one which crashes, hangs or eats memory harms nobody.

It reads frames of JSON from its input, first the vocabulary and its limits, then grammars, and answers each by one
frame. It has no weights, and imports nothing that has to do with them. The system ends it when a grammar takes more
memory or processor time than it may.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

from hopskip.errors import ConfigError
from hopskip.text.grammar_build import SLOWEST_MASK, build, read_vocabulary, require_llguidance

_NUM_WALKS, _NUM_STEPS = 4, 128
_WALK_SECONDS = 0.3
_MUCH = 64 * 2**20
"""A process that holds so much more than at its start is replaced."""


def write_frame(message: dict[str, Any]) -> bytes:
    """A message as it goes through a pipe: its length in four bytes, then JSON."""
    data = json.dumps(message).encode()
    return struct.pack("<I", len(data)) + data


def main() -> None:
    """Serve until the input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    settings = _read(requests)
    if settings is None:
        return
    try:
        require_llguidance()
        vocabulary = read_vocabulary(settings["tokenizer_json"], settings["vocab_size"], settings["eos_token_ids"])
    except ConfigError as error:
        _write(answers, {"error": str(error)})
        return
    at_start = _memory()[1]
    _limit(settings["memory_bytes"])
    _write(answers, {"ready": True})
    while (job := _read(requests)) is not None:
        _set_timer(settings["seconds"])
        try:
            answer = _try(vocabulary, job)
        except ConfigError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "the grammar needs too much memory; make it simpler"}
        _set_timer(0)
        answer["is_spent"] = _memory()[1] - at_start > _MUCH
        _write(answers, answer)


def _try(vocabulary: Any, job: dict[str, Any]) -> dict[str, Any]:
    before = _memory()[1]
    built = build(vocabulary, job["kind"], job["text"], strict=job["strict"], before=job["before"])
    slowest = _walk(built.matcher)
    if slowest > SLOWEST_MASK:
        raise ConfigError(
            f"the grammar is too complex: finding the tokens that may come next takes {slowest * 1e3:.0f} ms; at most "
            f"{SLOWEST_MASK * 1e3:.0f} ms are allowed here"
        )
    return {"grammar": built.text, "dropped": built.dropped, "bytes": max(0, _memory()[1] - before)}


def _walk(matcher: Any) -> float:
    """Follow the grammar along a few random texts; processor time of the slowest mask."""
    chance = random.Random(0)
    slowest, end = 0.0, time.process_time() + _WALK_SECONDS
    for _ in range(_NUM_WALKS):
        walker = matcher.deep_copy()
        for _ in range(_NUM_STEPS):
            start = time.process_time()
            mask = int.from_bytes(walker.compute_bitmask(), "little")
            slowest = max(slowest, time.process_time() - start)
            if not mask or walker.is_stopped() or slowest > SLOWEST_MASK or time.process_time() > end:
                break
            from_here = mask >> chance.randrange(mask.bit_length())
            first = (from_here & -from_here).bit_length() - 1
            walker.consume_token(mask.bit_length() - from_here.bit_length() + first)
            if walker.is_error():
                break
    return slowest


def _read(pipe: BinaryIO) -> Any:
    head = pipe.read(4)
    return json.loads(pipe.read(struct.unpack("<I", head)[0])) if len(head) == 4 else None


def _write(pipe: BinaryIO, message: dict[str, Any]) -> None:
    pipe.write(write_frame(message))
    pipe.flush()


def _memory() -> tuple[int, int]:
    """Bytes of address space and of resident memory; zeros where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            size, resident = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in file.read().split()[:2])
    except OSError:
        return 0, 0
    return size, resident


def _limit(memory_bytes: int) -> None:
    """Give way to others, leave no core files, and take no more memory than this beyond what is there already."""
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = _memory()[0]
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, size + memory_bytes))


def _set_timer(seconds: float) -> None:
    """The system ends this process after so many seconds of processor time; 0 takes that back."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
