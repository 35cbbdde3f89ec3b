"""A "decoder" that is a pair of tables: its exact distributions can be written down, which those of a real one cannot.
For proofs and tests.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Head, Pass, Traits
from hopskip.backends.rows import Cache, Rows
from hopskip.backends.steps import StepwiseBackend
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.errors import ConfigError

Array = NDArray[np.float32]


class TableBackend(StepwiseBackend):
    """Two layers; logits depend on the last token only: `exit_VV` after the first layer, `target_VV` after the second.

    Args:
        config: of any model; its other sizes play no part.
    """

    xp = np

    def __init__(self, config: ModelConfig, exit_VV: Array, target_VV: Array) -> None:
        self.config = replace(config, vocab_size=len(target_VV), num_hidden_layers=2, recommended_exit_layer=None)
        self.tables = np.stack((exit_VV, target_VV)).astype(np.float32)

    @property
    def traits(self) -> Traits:
        return Traits(
            name="table",
            device="cpu",
            row_exact=True,
            threads=1,
            instruction_set=f"numpy {np.__version__}",
            dtype="float32",
            bytes_per_pass=self.tables.nbytes,
        )

    def attach_exit(self, trained_exit: TrainedExit) -> None:
        raise ConfigError("a table has no layers that a trained exit could stand beside")

    def new_cache(self, num_slots: int, length: int) -> Cache:
        return _EmptyCache(num_slots, length)

    def embed(self, token_ids: Seq[int]) -> Array:
        """The token, and how many layers it has been through: [N, 2]."""
        return np.array([[token, 0] for token in token_ids], dtype=np.float32).reshape(-1, 2)

    def run_layers(
        self, hidden_ND: Array, start: int, stop: int, rows: Rows, cache: Cache, taps: Seq[int] = ()
    ) -> Pass:
        assert len(rows) == len(hidden_ND)
        assert rows.max_position < cache.length
        outputs = [hidden_ND + np.array([0, layer - start], dtype=np.float32) for layer in (*taps, stop)]
        return Pass(outputs[-1], np.stack(outputs[:-1], axis=1) if taps else None)

    def logits(self, hidden_ND: Array, head: Head = "full") -> Array:
        token_N, depth_N = hidden_ND.astype(np.int64).T
        logits_NV: Array = self.tables[depth_N - 1, token_N]
        return logits_NV

    @property
    def mixing(self) -> None:
        return None


class _EmptyCache(Cache):
    """No layer looks back."""

    nbytes = bytes_per_position = 0

    def __init__(self, num_slots: int, length: int) -> None:
        self.num_slots, self.length = num_slots, length

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        return

    def keep_path(self, slot: int, start: int, rows: Seq[int]) -> None:
        return

    def copy_from(self, other: Cache) -> None:
        return

    def clear(self) -> None:
        return
