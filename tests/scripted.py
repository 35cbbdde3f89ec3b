"""Contenders made up for tests of the benchmark. They run in processes of their own like the real ones, which import
this module: so it imports little."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hopskip.bench.contenders import AbsentError, Contender, Footprint, Measurement, Runner


@dataclass(frozen=True, kw_only=True)
class Scripted(Contender):
    """Writes to a file when it runs, and does what it is told."""

    log: Path
    fails_at: int | None = None
    dies_at: int | None = None
    is_absent: bool = False
    first_token: int = 7

    def start(self, threads: int, max_model_len: int) -> Runner:
        if self.is_absent:
            raise AbsentError("it is on holiday")
        print("chatter on stdout")
        return _ScriptedRunner(self)


class _ScriptedRunner(Runner):
    def __init__(self, script: Scripted) -> None:
        self._script = script
        self._num_runs = 0
        self.footprint = Footprint(weight_bytes=1000, kv_bytes_per_position=10)

    def generate(self, prompt_ids: list[int], num_tokens: int) -> Measurement:
        if self._num_runs == self._script.fails_at:
            raise ValueError("no more\nof this")
        if self._num_runs == self._script.dies_at:
            os._exit(3)
        self._num_runs += 1
        with self._script.log.open("a") as file:
            file.write(f"{self._script.name}{prompt_ids[0]} ")
        return Measurement(
            token_ids=[self._script.first_token] * num_tokens,
            prefill_seconds=0.5,
            decode_seconds=0.1 * self._num_runs,
            num_decoded=num_tokens - 1,
        )
