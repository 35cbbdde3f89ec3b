"""What happened in each round of decoding: records, and files of them (JSON lines).

A file's first line is a header that says what was run; each further line is one record. `hopskip trace` shows, plots
and replays such files; docs/speculation.md lists the fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hopskip.draft.base import Round, RoundOfSequence
from hopskip.errors import ConfigError
from hopskip.version import stamp

FORMAT = 2
_READABLE = (1, FORMAT)
"""In format 1 the buckets of proposals are called `signs`."""


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What every source would have drafted at one position of a greedy text, for replays.

    `num_correct` and `buckets` are by the name of the source: how many of its tokens are those that the text went on
    with; and what was known of each token when it was drafted (see `draft.base.Draft.buckets`).
    """

    request: int
    position: int
    num_correct: Mapping[str, int]
    buckets: Mapping[str, list[int]]


Record = Round | Proposals


class TraceWriter:
    """Writes records to a file as they come; give it to `Engine.on_round`. Use it as a context manager.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any] | None = None) -> None:
        try:
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise ConfigError(f"the trace cannot be written to {str(path)!r} ({error.strerror})") from None
        self._write({"format": FORMAT, **stamp(), **(header or {})})

    def __call__(self, record: Record) -> None:
        kind = "round" if isinstance(record, Round) else "proposals"
        self._write({"kind": kind, **asdict(record)})

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, value: Mapping[str, Any]) -> None:
        json.dump(value, self._file, ensure_ascii=False)
        self._file.write("\n")


@dataclass(kw_only=True)
class Trace:
    """A file's content."""

    header: dict[str, Any]
    rounds: list[Round] = field(default_factory=list)
    proposals: list[Proposals] = field(default_factory=list)


def read_trace(path: str | Path) -> Trace:
    """Read what `TraceWriter` wrote.

    Raises:
        ConfigError: the file cannot be read, or is not a trace; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the trace {str(path)!r} cannot be read ({reason}); give a file that was recorded") from None
    if not lines:
        raise ConfigError(f"{path} is empty; record it anew with generate --trace or trace record")
    number = 1
    try:
        trace = Trace(header=json.loads(lines[0]))
        version = trace.header["format"]
        for number, line in enumerate(lines[1:] if version in _READABLE else (), start=2):  # noqa: B007
            entry: dict[str, Any] = json.loads(line)
            if entry.pop("kind") == "round":
                parts = tuple(RoundOfSequence(**part) for part in entry.pop("sequences"))
                trace.rounds.append(Round(**entry, sequences=parts))
            else:
                if version == 1:
                    entry["buckets"] = entry.pop("signs")
                trace.proposals.append(Proposals(**entry))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}:{number} is no line of a trace ({error}); record it anew") from None
    if version not in _READABLE:
        raise ConfigError(
            f"{path} is a trace of format {version}; this version of hopskip reads formats {_READABLE[0]} to {FORMAT}"
        )
    return trace
