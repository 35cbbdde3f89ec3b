"""A "decoder" that is a pair of tables: its exact distributions can be written down, which those of a real one cannot.
For proofs and tests.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import replace

import array_api_compat.torch
import torch
from torch import Tensor

from hopskip.backends.base import Head, Pass, Traits, torch_on_one_thread
from hopskip.backends.rows import Cache, Rows
from hopskip.backends.steps import StepwiseBackend
from hopskip.backends.tensor_cache import TensorCache
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.errors import ConfigError


class TableBackend(StepwiseBackend):
    """Two layers; logits depend on the last token only: `exit_VV` after the first layer, `target_VV` after the second.

    Args:
        config: of any model; its other sizes play no part.
    """

    xp = array_api_compat.torch

    def __init__(self, config: ModelConfig, exit_VV: Tensor, target_VV: Tensor) -> None:
        self.config = replace(config, vocab_size=len(target_VV), num_hidden_layers=2, recommended_exit_layer=None)
        self.tables = torch.stack((exit_VV, target_VV))

    @property
    def traits(self) -> Traits:
        return Traits(
            name="table",
            device="cpu",
            row_exact=True,
            threads=1,
            instruction_set=f"torch {torch.__version__}",
            dtype="float32",
            bytes_per_pass=self.tables.nbytes,
        )

    def attach_exit(self, trained_exit: TrainedExit) -> None:
        raise ConfigError("a table has no layers that a trained exit could stand beside")

    def new_cache(self, num_slots: int, length: int) -> Cache:
        tiny = replace(self.config, num_key_value_heads=1, num_attention_heads=1, head_dim=2)
        return TensorCache(tiny, num_slots, length, torch.float32)

    def embed(self, token_ids: Seq[int]) -> Tensor:
        """The token, and how many layers it has been through: [N, 2]."""
        return torch.tensor([[float(token), 0.0] for token in token_ids]).reshape(-1, 2)

    def run_layers(
        self, hidden_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache, taps: Seq[int] = ()
    ) -> Pass:
        assert len(rows) == len(hidden_ND)
        assert rows.max_position < cache.length
        outputs = [hidden_ND + torch.tensor([0.0, float(layer - start)]) for layer in (*taps, stop)]
        return Pass(outputs[-1], torch.stack(outputs[:-1], dim=1) if taps else None)

    def logits(self, hidden_ND: Tensor, head: Head = "full") -> Tensor:
        token_N, depth_N = hidden_ND[:, 0].long(), hidden_ND[:, 1].long()
        return self.tables[depth_N - 1, token_N]

    @property
    def mixing(self) -> None:
        return None

    def stepping(self) -> AbstractContextManager[None]:
        return torch_on_one_thread()
