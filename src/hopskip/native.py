"""The decoder on the C++ engine: packed weights, any number of rows near the price of one, bit-identical rows.

Shape letters: N rows, D hidden size, V vocabulary, B sequences, k draft tokens.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hopskip.branch import ExitBranch
from hopskip.cache import Cache, Rows
from hopskip.config import ModelConfig
from hopskip.errors import ConfigError
from hopskip.model import Chains, DraftPart
from hopskip.packed import PackedWeights
from hopskip.quantize import Packed, pack, quantize_q8, rows_in_q8, select_rows
from hopskip.weights import Checkpoint

T = TypeVar("T")

_native: Any
try:
    _native = importlib.import_module("hopskip._native")
    _import_error = ""
except ImportError as error:  # installed without a compiler
    _native, _import_error = None, str(error)

PRECISIONS = ("auto", "float32", "bfloat16", "q8", "q4")
KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
KV_NAMES = "float32, bfloat16 or int8"
ISAS = ("avx512", "avx2", "portable")
"""Instruction sets, best first. The environment variable HOPSKIP_ISA forces one."""


def available() -> str | None:
    """None if the native engine can be used here, else the reason in one line."""
    if _native is None:
        return f"the extension hopskip._native is not built ({_import_error}); reinstall hopskip with a C++ compiler"
    return None


def choose_isa() -> str:
    """The best instruction set of this processor, or the one that HOPSKIP_ISA names.

    Raises:
        ConfigError: HOPSKIP_ISA names one that does not exist, or that the processor lacks.
    """
    forced = os.environ.get("HOPSKIP_ISA")
    if not forced:
        return next(isa for isa in ISAS if _native.runs_here(isa))
    if forced not in ISAS:
        raise ConfigError(f"HOPSKIP_ISA is {forced!r}; choose one of {', '.join(ISAS)}, or unset it")
    if not _native.runs_here(forced):
        raise ConfigError(f"HOPSKIP_ISA is {forced!r}, which this processor cannot run; unset it")
    return forced


def default_threads() -> int:
    """As many as the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class HeadSubset:
    """The LM head over some of the vocabulary, packed: `NativeModel.head_subset` makes one."""

    def __init__(self, ids: Tensor, matrix: object) -> None:
        self.ids = ids
        """int64 [n], the tokens that the subset's rows stand for."""
        self.matrix = matrix


class _Copy(NamedTuple):
    """The model in a lower precision."""

    first_layer: int
    """Its number; the others follow."""
    head: HeadSubset


class NativeModel:
    """A Llama-family decoder on packed weights. Answers to the protocol `hopskip.model.Model`.

    Hidden states are float32 [N, D] on the CPU in every precision. Arrays of the wrong shape, type or layout, and
    slots, positions or token ids out of range raise ValueError before anything is computed.
    """

    row_exact = True
    has_own_threads = True
    dtype = torch.float32

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        threads: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if obstacle := available():
            raise ConfigError(f"the native backend cannot be used: {obstacle}")
        if kv_dtype not in (None, *KV_DTYPES):
            raise ConfigError(f"kv_dtype is {kv_dtype}; the native engine keeps keys and values in {KV_NAMES}")
        self.config = config
        self.device = torch.device("cpu")
        self.kv_dtype = kv_dtype or weights.kv_dtype
        self._weights = weights
        self._engine = _native.Engine(
            choose_isa(),
            default_threads() if threads is None else threads,
            _native.Shape(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                vocab_size=config.vocab_size,
                rms_norm_eps=config.rms_norm_eps,
                sliding_window=config.sliding_window or 0,
            ),
        )
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            self._engine.add_layer(_layer(config, _within(weights.matrices, prefix), _within(weights.vectors, prefix)))
        self._num_layers = config.num_hidden_layers
        self._copies: dict[str, _Copy] = {}
        self.branch: ExitBranch | None = None
        self._draft_head: HeadSubset | None = None
        self._packed_branch: object | None = None
        self._engine.set_embedding_and_head(
            _matrix(weights.matrices["model.embed_tokens.weight"]),
            _matrix(weights.head),
            weights.vectors["model.norm.weight"],
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        precision: str = "auto",
        threads: int | None = None,
        kv_dtype: torch.dtype | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> NativeModel:
        """Pack the weights of a checkpoint, or map them from the cache of packed weights (see `packed.py`).

        Args:
            precision: `auto` keeps the checkpoint's own, tensor by tensor: float32 and bfloat16 as they are, float16
                as bfloat16, GGUF's Q8_0 as q8, Q4_0 and Q4_1 as q4 without a change to their values, its other block
                types as q8. `float32`, `bfloat16`, `q8`, `q4` ask for one; blocks that are so already stay as they are.
            threads: None uses as many as the process may run on.
            kv_dtype: of the cache, float32, bfloat16 or int8; None takes float32 beside float32 weights, else bfloat16.
            progress: told the share packed so far, up to 1.

        Raises:
            ConfigError: an unknown precision or kv_dtype, or HOPSKIP_ISA names an instruction set that cannot run.
            CheckpointError: a weight is not finite.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
        return cls(checkpoint.config, PackedWeights.load(checkpoint, precision, progress), threads, kv_dtype)

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return str(self._engine.isa)

    @property
    def threads(self) -> int:
        return int(self._engine.threads)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a full pass of one row reads: all layers and the head."""
        return self._weights.bytes_per_pass

    def attach(self, branch: ExitBranch) -> None:
        """As `BranchedModel.attach`. The branch and its rows of the head are packed to 8 bits at most, whatever the
        model's precision: what they draft is verified, so that costs a little acceptance and never exactness."""
        if self.branch is not None or self._copies:
            raise ConfigError("an exit or a copy is attached to this model already; load the model anew for another")
        branch.check(self.config)
        self.branch = branch
        for layer in branch.layers:
            matrices = {name: _pack_q8(t) for name, t in layer.items() if t.ndim == 2}
            vectors = {name: t.float().contiguous() for name, t in layer.items() if t.ndim == 1}
            self._engine.add_layer(_layer(self.config, matrices, vectors))
        self._num_layers += len(branch.layers)
        self._draft_head = HeadSubset(branch.vocabulary, _matrix(rows_in_q8(self._weights.head, branch.vocabulary)))
        mixing: dict[str, object] = {}
        if branch.mixing:
            mixing = {name: _matrix(_pack_q8(branch.mixing[name])) for name in ("fuse", "mix")}
            mixing |= {name: branch.mixing[name].float().contiguous() for name in ("token_norm", "feature_norm")}
        self._packed_branch = _native.Exit(
            model_layers=_int32(torch.arange(branch.config.start)),
            own_layers=_int32(torch.arange(branch.config.num_layers) + self.config.num_hidden_layers),
            head=self._draft_head.matrix,
            vocabulary=_int32(branch.vocabulary),
            num_features=len(branch.config.features),
            **mixing,
        )

    def unembed_draft(self, h_ND: Tensor) -> Tensor:
        assert self._draft_head is not None, "no branch is attached"
        return self.unembed_subset(h_ND, self._draft_head)

    def attach_copy(self, weights: PackedWeights, precision: str) -> None:
        """Put a copy of all layers and the head beside the model, to draft with: `weights` are the model's own in this
        lower precision. Keys and values go where those of the originals do.

        Raises:
            ConfigError: there is one already, or `weights` takes no less memory than the model itself.
        """
        if precision in self._copies:
            raise ConfigError(f"a copy in {precision} is attached to this model already")
        if weights.bytes_per_pass >= self.weight_bytes:
            raise ConfigError(
                f"draft_precision={precision} gains nothing: a pass of the model itself reads "
                f"{self.weight_bytes / 1e6:.1f} MB, one in {precision} {weights.bytes_per_pass / 1e6:.1f} MB; "
                "leave it out"
            )
        for index in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            layer = _layer(self.config, _within(weights.matrices, prefix), _within(weights.vectors, prefix))
            self._engine.add_layer(layer, cache_layer=index)
        head = HeadSubset(torch.arange(self.config.vocab_size), _matrix(weights.head))
        first_layer = self._num_layers + len(self._copies) * self.config.num_hidden_layers
        self._copies[precision] = _Copy(first_layer, head)

    @property
    def copies(self) -> tuple[str, ...]:
        """Precisions of the attached copies."""
        return tuple(self._copies)

    def draft_part(self, layers: Seq[int], precision: str) -> DraftPart:
        """What a draft by some layers of an attached copy runs."""
        first, head = self._copies[precision]
        return DraftPart(tuple(first + layer for layer in layers), head, partial(self.unembed_subset, subset=head))

    def new_cache(self, num_slots: int, length: int) -> Cache:
        return Cache(replace(self.config, num_hidden_layers=self._num_layers), num_slots, length, self.kv_dtype)

    def embed(self, ids_N: Tensor) -> Tensor:
        out_ND = torch.empty((len(ids_N), self.config.hidden_size))
        self._engine.embed(_int32(ids_N), out_ND)
        return out_ND

    def run_layers(self, h_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
        out_ND = torch.empty(h_ND.shape)
        self._extend_rope(cache.length)
        self._engine.run_layers(h_ND, out_ND, start, stop, _rows(rows), _cache(cache))
        return out_ND

    def run_tapped(self, h_ND: Tensor, taps: Seq[int], rows: Rows, cache: Cache) -> tuple[Tensor, Tensor]:
        """All layers of the model in one call. Also the outputs of layers `taps[i] - 1`, rising: [N, A, D]."""
        out_ND = torch.empty(h_ND.shape)
        tapped_NAD = torch.empty((len(h_ND), len(taps), h_ND.shape[1]))
        self._extend_rope(cache.length)
        self._engine.run_layers(
            h_ND, out_ND, 0, self.config.num_hidden_layers, _rows(rows), _cache(cache),
            taps=_int32_of(tuple(taps)), tapped=tapped_NAD,
        )  # fmt: skip
        return out_ND, tapped_NAD

    def unembed(self, h_ND: Tensor) -> Tensor:
        out_NV = torch.empty((len(h_ND), self.config.vocab_size))
        self._engine.logits(h_ND, out_NV)
        return out_NV

    def greedy(self, h_ND: Tensor) -> Tensor:
        out_N = torch.empty(len(h_ND), dtype=torch.int32)
        self._engine.greedy(h_ND, out_N)
        return out_N

    def topk(self, h_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best logits of each row and their tokens, best first: float32 [N, k] and int64 [N, k]."""
        values, tokens = self.unembed(h_ND).topk(k, dim=-1)
        return values, tokens

    def head_subset(self, ids: Tensor) -> HeadSubset:
        """Pack the head's rows of some tokens, int [n]; draft heads over a trimmed vocabulary are made so.

        Raises:
            ConfigError: `ids` is empty, or has a token that the vocabulary lacks.
        """
        ids = ids.long().contiguous()
        if ids.ndim != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise ConfigError(f"a head subset needs token ids from 0 to {self.config.vocab_size - 1}, and at least one")
        return HeadSubset(ids, _matrix(select_rows(self._weights.head, ids)))

    def unembed_subset(self, h_ND: Tensor, subset: HeadSubset) -> Tensor:
        """Logits of the subset's tokens, float32 [N, n]: bit for bit those of `unembed`."""
        out_Nn = torch.empty((len(h_ND), len(subset.ids)))
        self._engine.logits(h_ND, out_Nn, subset.matrix)
        return out_Nn

    def greedy_subset(self, h_ND: Tensor, subset: HeadSubset) -> Tensor:
        """The best token of the subset for each row, int64 [N]; of equals, the one that the subset lists first."""
        out_N = torch.empty(len(h_ND), dtype=torch.int32)
        self._engine.greedy(h_ND, out_N, subset.matrix)
        return subset.ids[out_N.long()]

    def draft_chains(
        self,
        ids_N: Tensor,
        rows: Rows,
        limits: Seq[int],
        cache: Cache,
        *,
        layers: Seq[int] | None = None,
        head: HeadSubset | None = None,
        features_NAD: Tensor | None = None,
        token_states_ND: Tensor | None = None,
        min_confidence: float = 0.0,
        num_runner_ups: int | None = None,
        temperatures: Seq[float] | None = None,
        uniforms_Bk: Tensor | None = None,
    ) -> Chains:
        """Draft steps in one call: through some layers, by number, or through the attached branch.

        Args:
            ids_N: committed tokens that have not been at the exit, each sequence's last one at the end of its segment.
                Anything but a branch with layers of its own takes that one alone.
            limits: most tokens to draft for each segment, at least 1.
            cache: keys and values are written to it, at the rows' positions and up to limit - 1 positions after.
            layers: in the order in which they run; None takes the attached branch.
            head: with `layers`, draft by this head, from its tokens alone; probabilities are then among them.
            features_NAD: features of the token before each row, if the branch wants any.
            token_states_ND: outputs of the model's layer start - 1 at the rows, if the branch begins after a layer and
                has layers. Those at the last row of a segment are not used: the model has not been there yet.
            min_confidence: a sequence drafts no more after its first token whose probability is below it.
            num_runner_ups: how many of each step's next best tokens to return, with all probabilities; None: neither.
            temperatures: of each sequence. 0 takes the best token of each step, above it one is drawn by softmax of the
                logits over the temperature. None: all take the best.
            uniforms_Bk: with `temperatures`, a float64 from 0 to below 1 for each token to be drawn.
        """
        branch = self._packed_branch
        if layers is not None:
            branch = _native.Exit(
                model_layers=torch.tensor(layers, dtype=torch.int32),
                head=None if head is None else head.matrix,
                vocabulary=None if head is None else _int32(head.ids),
            )
        assert branch is not None, "no branch is attached"
        size, k = len(limits), max(limits)
        tokens = torch.zeros((size, k), dtype=torch.int32)
        counts = torch.zeros(size, dtype=torch.int32)
        states = torch.zeros((size, k, self.config.hidden_size))
        runner_ups = probs = None
        if num_runner_ups is not None:
            runner_ups = torch.zeros((size, k, num_runner_ups), dtype=torch.int32)
            probs = torch.zeros((size, k, 1 + num_runner_ups))
        distributions = None
        if temperatures is not None:
            vocabulary = self._draft_head if layers is None else head
            num_tokens = self.config.vocab_size if vocabulary is None else len(vocabulary.ids)
            distributions = torch.empty((size, k, num_tokens))
        self._extend_rope(cache.length)
        task = _native.DraftTask(
            ids=_int32(ids_N),
            limits=torch.tensor(limits, dtype=torch.int32),
            min_confidence=min_confidence,
            features=features_NAD,
            token_states=token_states_ND,
            temperatures=None if temperatures is None else torch.tensor(temperatures, dtype=torch.float32),
            uniforms=uniforms_Bk,
            tokens=tokens,
            counts=counts,
            states=states,
            probabilities=probs,
            runner_ups=runner_ups,
            distributions=distributions,
        )
        self._engine.draft(branch, _rows(rows), _cache(cache), task)
        return Chains(tokens, counts, states, runner_ups, probs, distributions)

    def _extend_rope(self, length: int) -> None:
        if self._engine.rope_length < length:
            cos, sin = self.config.rope.tables(length)
            self._engine.set_rope(cos.contiguous(), sin.contiguous())


def _layer(config: ModelConfig, matrices: Mapping[str, Packed], vectors: Mapping[str, Tensor]) -> object:
    """A layer, from its tensors by their names in it."""
    arguments: dict[str, object] = {
        part: _matrix(matrices[f"{'mlp' if len(part) > 1 else 'self_attn'}.{part}_proj.weight"])
        for part in ("q", "k", "v", "o", "gate", "up", "down")
    }
    arguments["input_norm"] = vectors["input_layernorm.weight"]
    arguments["post_norm"] = vectors["post_attention_layernorm.weight"]
    if config.qkv_bias:
        arguments |= {f"{x}_bias": vectors[f"self_attn.{x}_proj.bias"] for x in "qkv"}
    if config.qk_norm:
        arguments |= {f"{x}_norm": vectors[f"self_attn.{x}_norm.weight"] for x in "qk"}
    return _native.Layer(**arguments)


def _within(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _pack_q8(weight_OI: Tensor) -> Packed:
    return pack(quantize_q8(weight_OI.float()), weight_OI.shape[1])


def _cache(cache: Cache) -> object:
    return _native.Cache(k=cache.k_LSHTD, v=cache.v_LSHTD, k_scales=cache.k_scales_LSHT, v_scales=cache.v_scales_LSHT)


def _rows(rows: Rows) -> object:
    return _native.Rows(slots=rows.slots, positions=rows.positions, parent_offsets=rows.back)


def _matrix(packed: Packed) -> object:
    return _native.Matrix(int(packed.format), packed.rows, packed.cols, packed.data)


@lru_cache
def _int32_of(numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _int32(x: Tensor) -> Tensor:
    return x.to("cpu", torch.int32).contiguous()
