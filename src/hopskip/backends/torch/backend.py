"""The decoder in plain PyTorch: the readable reference, and the path for GPUs and for CPUs without the native engine.

Shape letters: N rows (tokens, of any mix of sequences), D hidden size, V vocabulary, H query heads, K key/value heads,
E head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property, partial

import array_api_compat.torch
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.backends.base import Head, Pass, Traits
from hopskip.backends.rows import Cache, Rows
from hopskip.backends.steps import StepwiseBackend
from hopskip.backends.tensor_cache import TensorCache
from hopskip.backends.torch.attention import attend
from hopskip.backends.torch.layer import LayerWeights, decoder_layer, rms_norm
from hopskip.backends.torch.weights import Weights
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import Mixing, TrainedExit
from hopskip.checkpoint.trained_exit import Weights as ExitWeights


class TorchBackend(StepwiseBackend):
    """A Llama-family decoder on any device that PyTorch has."""

    xp = array_api_compat.torch

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.norm.device
        self.dtype = weights.norm.dtype
        self._layers = list(weights.layers)
        self._exit_head: Tensor | None = None
        self._rope_tables: tuple[Tensor, Tensor] | None = None

    @property
    def traits(self) -> Traits:
        weights = self.weights
        tensors = [weights.norm, weights.lm_head]
        tensors += [tensor for layer in weights.layers for tensor in vars(layer).values() if tensor is not None]
        is_cuda = self.device.type == "cuda"
        return Traits(
            name="torch",
            device=f"{self.device} ({torch.cuda.get_device_name(self.device)})" if is_cuda else str(self.device),
            row_exact=False,  # a matrix product may sum in another order when the number of rows changes
            threads=torch.get_num_threads(),
            instruction_set=f"torch {torch.__version__}",
            dtype=str(self.dtype).removeprefix("torch."),
            bytes_per_pass=sum(tensor.nbytes for tensor in tensors),
        )

    def attach_exit(self, trained_exit: TrainedExit) -> None:
        trained_exit.check(self.config)
        self.trained_exit = trained_exit

        def part(layer: Mapping[str, ExitWeights], *names: str) -> Tensor:
            return torch.cat([self._placed(layer[name]) for name in names])

        added = [LayerWeights.fused(self.config, partial(part, layer)) for layer in trained_exit.layers]
        self._layers = [*self.weights.layers, *added]
        self._exit_head = self.weights.lm_head[torch.tensor(trained_exit.vocabulary_list, device=self.device)]
        self.__dict__.pop("mixing", None)

    @cached_property
    def mixing(self) -> Mixing | None:
        if self.trained_exit is None or not self.trained_exit.mixing:
            return None
        weights = {name: self._placed(values) for name, values in self.trained_exit.mixing.items()}
        return Mixing(weights, self.config.rms_norm_eps)

    def _placed(self, values: ExitWeights) -> Tensor:
        return torch.tensor(np.asarray(values), device=self.device, dtype=self.dtype)

    def new_cache(self, num_slots: int, length: int) -> TensorCache:
        config = replace(self.config, num_hidden_layers=len(self._layers))
        return TensorCache(config, num_slots, length, self.dtype, self.device)

    def embed(self, token_ids: Seq[int]) -> Tensor:
        return F.embedding(torch.as_tensor(token_ids, device=self.device), self.weights.embed_tokens)

    @torch.inference_mode()
    def run_layers(
        self, hidden_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache, taps: Seq[int] = ()
    ) -> Pass:
        assert isinstance(cache, TensorCache)
        assert 0 <= start <= stop <= len(self._layers)
        assert len(rows) == len(hidden_ND)
        assert rows.max_position < cache.length
        rotation = self._rotation(rows, cache.length)
        tapped: list[Tensor] = []
        for index in range(start, stop):
            see = partial(
                attend,
                k_SKTE=cache.k_LSHTD[index],
                v_SKTE=cache.v_LSHTD[index],
                rows=rows,
                sliding_window=self.config.sliding_window,
            )
            hidden_ND = decoder_layer(hidden_ND, self._layers[index], self.config, rotation, see)
            if index + 1 in taps:
                tapped.append(hidden_ND)
        return Pass(hidden_ND, torch.stack(tapped, dim=1) if taps else None)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor, head: Head = "full") -> Tensor:
        weights = self.weights.lm_head
        if head == "exit":
            assert self._exit_head is not None, "no exit is attached"
            weights = self._exit_head
        return F.linear(rms_norm(hidden_ND, self.weights.norm, self.config.rms_norm_eps), weights).float()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _rotation(self, rows: Rows, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of each row's position, [N, 1, E / 2] in the model's precision."""
        tables = self._rope_tables  # another thread may put shorter ones in their place
        if tables is None or tables[0].shape[0] < length:
            own_cos, own_sin = self.config.rope.tables(length)
            tables = self._rope_tables = (self._placed(own_cos), self._placed(own_sin))
        positions = torch.from_numpy(rows.positions).to(self.device)
        cos, sin = tables
        return cos[positions, None, :], sin[positions, None, :]
