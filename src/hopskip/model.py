"""The decoder, in plain PyTorch: the readable reference, and the path for GPUs and for CPUs without the native engine.

Shape letters: N rows (tokens, of any mix of sequences), D hidden size, V vocabulary, H query heads, K key/value heads,
E head dimension, T positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.attention import attend
from hopskip.branch import ExitBranch
from hopskip.cache import Cache, Rows
from hopskip.config import ModelConfig


class Model(Protocol):
    """What the engine asks of a decoder. `Transformer` (PyTorch) and `NativeModel` (C++) both answer to it."""

    config: ModelConfig
    device: torch.device
    row_exact: bool
    """True if the bits of a row never depend on how many rows, or which, are computed with it."""
    has_own_threads: bool
    """True if it computes on threads of its own, not on PyTorch's."""
    branch: ExitBranch | None
    """The trained exit beside the model, see `BranchedModel.attach`."""

    def new_cache(self, num_slots: int, length: int) -> Cache:
        """A cache of the model's own key/value precision."""
        ...

    def embed(self, ids_N: Tensor) -> Tensor:
        """Token ids -> hidden states [N, D]."""
        ...

    def run_layers(self, h_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
        """Layers `start` to `stop - 1` on N rows. Writes the rows' keys and values to `cache`; returns new [N, D]."""
        ...

    def unembed(self, h_ND: Tensor) -> Tensor:
        """Final norm and LM head: float32 logits [N, V]."""
        ...

    def greedy(self, h_ND: Tensor) -> Tensor:
        """The best token of each row after final norm and head, integers [N]; of equals, the lowest id."""
        ...


class DraftPart(NamedTuple):
    """What of a model a draft runs."""

    layers: tuple[int, ...]
    """Their numbers, in the order in which they run."""
    head: Any
    """For `DraftChains`; None is the model's own."""
    unembed: Callable[[Tensor], Tensor]
    """Hidden states [N, D] -> logits [N, V]."""


class BranchedModel(Model, Protocol):
    """A decoder that can have a trained exit beside it. `Transformer` and `NativeModel` both can."""

    dtype: torch.dtype
    """Precision of hidden states."""

    def attach(self, branch: ExitBranch) -> None:
        """Put a trained exit beside the model. Its layers follow the model's own: `run_layers` runs them by the
        numbers from `num_hidden_layers` on, and caches that are made from now on have room for them.

        Raises:
            ConfigError: the branch does not fit the model.
        """
        ...

    def unembed_draft(self, h_ND: Tensor) -> Tensor:
        """Final norm and the head's rows of the branch's draft vocabulary: float32 logits [N, n]."""
        ...


def run_by_number(model: Model, h_ND: Tensor, layers: Seq[int], rows: Rows, cache: Cache) -> Tensor:
    """These layers, in this order, as `run_layers`."""
    start = 0
    for stop in range(1, len(layers) + 1):
        if stop == len(layers) or layers[stop] != layers[stop - 1] + 1:
            h_ND = model.run_layers(h_ND, layers[start], layers[stop - 1] + 1, rows, cache)
            start = stop
    return h_ND


def run_tapped(model: Model, h_ND: Tensor, taps: Seq[int], rows: Rows, cache: Cache) -> tuple[Tensor, Tensor]:
    """All layers, as `run_layers`; and what the first `taps[i]` layers give, rising: [N, A, D]."""
    depth = model.config.num_hidden_layers
    in_one_call = getattr(model, "run_tapped", None)  # a model may do without: the calls below give the same
    if in_one_call is not None and taps:
        return cast("tuple[Tensor, Tensor]", in_one_call(h_ND, taps, rows, cache))
    seen: list[Tensor] = []
    for start, stop in itertools.pairwise((0, *taps)):
        h_ND = model.run_layers(h_ND, start, stop, rows, cache)
        seen.append(h_ND)
    if not taps or taps[-1] < depth:
        h_ND = model.run_layers(h_ND, taps[-1] if taps else 0, depth, rows, cache)
    return h_ND, torch.stack(seen, dim=1) if seen else h_ND.new_empty((len(h_ND), 0, h_ND.shape[1]))


@contextmanager
def torch_beside(model: Model) -> Iterator[None]:
    """PyTorch on one thread, while a model with threads of its own decodes.

    Even indexing a small tensor wakes PyTorch's threads, and they go on spinning for a while: on a core that the
    model's threads need. A round of speculation on two cores then takes a third longer.
    """
    before = torch.get_num_threads()
    if model.has_own_threads:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if model.has_own_threads:
            torch.set_num_threads(before)


class Chains(NamedTuple):
    """What an exit has drafted, token after token, for B sequences and up to k steps."""

    tokens_Bk: Tensor
    counts_B: Tensor
    """How many steps each sequence took; what lies behind is undefined."""
    states_BkD: Tensor
    """The hidden states, float32, that the tokens were read from."""
    runner_ups_Bkt: Tensor | None
    """The next best tokens of each step, best first."""
    probs_Bkt: Tensor | None
    """Probabilities at the exit of the token of each step and of its runner-ups, [B, k, 1 + t]."""
    distributions_Bkn: Tensor | None
    """What each drawn token was drawn from, over the head's n tokens; undefined for sequences that drew none."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer. Projections are fused as they are used: q, k, v rows in one matrix, gate and up in another."""

    input_layernorm: Tensor
    qkv_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @classmethod
    def fused(cls, config: ModelConfig, part: Callable[..., Tensor]) -> LayerWeights:
        """Put a layer together; `part(*names)` gives the named tensors of it, one below the other."""
        return cls(
            input_layernorm=part("input_layernorm.weight"),
            qkv_proj=part(*(f"self_attn.{x}_proj.weight" for x in "qkv")),
            qkv_bias=part(*(f"self_attn.{x}_proj.bias" for x in "qkv")) if config.qkv_bias else None,
            q_norm=part("self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=part("self_attn.k_norm.weight") if config.qk_norm else None,
            o_proj=part("self_attn.o_proj.weight"),
            post_attention_layernorm=part("post_attention_layernorm.weight"),
            gate_up_proj=part("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            down_proj=part("mlp.down_proj.weight"),
        )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All weights of a decoder. `lm_head` is `embed_tokens` itself where the two are tied."""

    embed_tokens: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor


class Transformer:
    """A Llama-family decoder whose layers can be run by ranges."""

    row_exact = False  # a matrix product may sum in another order when the number of rows changes
    has_own_threads = False

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.norm.device
        self.dtype = weights.norm.dtype
        self.branch: ExitBranch | None = None
        self._layers = list(weights.layers)
        self._draft_head: Tensor | None = None
        self._rope_tables: tuple[Tensor, Tensor] | None = None

    def attach(self, branch: ExitBranch) -> None:
        branch.check(self.config)
        self.branch = branch

        def part(layer: dict[str, Tensor], *names: str) -> Tensor:
            return torch.cat([layer[name] for name in names]).to(self.device, self.dtype)

        added = [LayerWeights.fused(self.config, partial(part, layer)) for layer in branch.layers]
        self._layers = [*self.weights.layers, *added]
        self._draft_head = self.weights.lm_head[branch.vocabulary.to(self.device)]

    @property
    def layers(self) -> tuple[LayerWeights, ...]:
        """All layers by number: the model's own, then those of its branch."""
        return tuple(self._layers)

    def new_cache(self, num_slots: int, length: int) -> Cache:
        config = replace(self.config, num_hidden_layers=len(self._layers))
        return Cache(config, num_slots, length, self.dtype, self.device)

    def embed(self, ids_N: Tensor) -> Tensor:
        return F.embedding(ids_N.to(self.device), self.weights.embed_tokens)

    @torch.inference_mode()
    def run_layers(self, h_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
        assert 0 <= start <= stop <= len(self._layers)
        assert len(rows) == h_ND.shape[0]
        assert rows.max_position < cache.length
        rotation = self._rotation(rows, cache)
        for index in range(start, stop):
            layer = self._layers[index]
            h_ND = h_ND + self._attention(h_ND, layer, rotation, rows, cache, index)
            x_ND = rms_norm(h_ND, layer.post_attention_layernorm, self.config.rms_norm_eps)
            gate, up = F.linear(x_ND, layer.gate_up_proj).chunk(2, dim=-1)
            h_ND = h_ND + F.linear(F.silu(gate) * up, layer.down_proj)
        return h_ND

    @torch.inference_mode()
    def unembed(self, h_ND: Tensor) -> Tensor:
        x_ND = rms_norm(h_ND, self.weights.norm, self.config.rms_norm_eps)
        return F.linear(x_ND, self.weights.lm_head).float()

    def greedy(self, h_ND: Tensor) -> Tensor:
        return self.unembed(h_ND).argmax(dim=-1)

    @torch.inference_mode()
    def unembed_draft(self, h_ND: Tensor) -> Tensor:
        assert self._draft_head is not None, "no branch is attached"
        return F.linear(rms_norm(h_ND, self.weights.norm, self.config.rms_norm_eps), self._draft_head).float()

    def _attention(
        self, h_ND: Tensor, layer: LayerWeights, rotation: tuple[Tensor, Tensor], rows: Rows, cache: Cache, index: int
    ) -> Tensor:
        config = self.config
        x_ND = rms_norm(h_ND, layer.input_layernorm, config.rms_norm_eps)
        qkv = F.linear(x_ND, layer.qkv_proj, layer.qkv_bias).view(len(rows), -1, config.head_dim)
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q_NHE, k_NKE, v_NKE = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_NHE = rms_norm(q_NHE, layer.q_norm, config.rms_norm_eps)
            k_NKE = rms_norm(k_NKE, layer.k_norm, config.rms_norm_eps)
        q_NHE, k_NKE = rotate(q_NHE, *rotation), rotate(k_NKE, *rotation)
        k_SKTE, v_SKTE = cache.k_LSHTD[index], cache.v_LSHTD[index]
        out_NHE = attend(q_NHE, k_NKE, v_NKE, k_SKTE, v_SKTE, rows, config.sliding_window)
        return F.linear(out_NHE.flatten(1), layer.o_proj)

    def _rotation(self, rows: Rows, cache: Cache) -> tuple[Tensor, Tensor]:
        """cos and sin of each row's position, [N, 1, E / 2] in the model's precision."""
        if self._rope_tables is None or self._rope_tables[0].shape[0] < cache.length:
            cos, sin = self.config.rope.tables(cache.length)
            self._rope_tables = (cos.to(self.device, self.dtype), sin.to(self.device, self.dtype))
        positions = rows.positions.to(self.device)
        cos, sin = self._rope_tables
        return cos[positions, None, :], sin[positions, None, :]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32 whatever the precision of `x`."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def rotate(x_NHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE; dimension i is paired with i + E / 2, as Hugging Face checkpoints are laid out."""
    first, second = x_NHE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
