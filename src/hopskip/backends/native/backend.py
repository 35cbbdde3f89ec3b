"""The decoder on the C++ engine: packed weights, any number of rows near the price of one, bit-identical rows.

Shape letters: N rows, D hidden size, V vocabulary, A features, B sequences, k draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend, Chains, Chosen, DraftTask, Head, Pass, Traits, torch_on_one_thread
from hopskip.backends.native.isa import extension, obstacle
from hopskip.backends.native.load import add_copy, add_exit, make_engine
from hopskip.backends.native.packed import PackedWeights
from hopskip.backends.rows import Cache, Rows
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.errors import ConfigError
from hopskip.machine import num_usable_cores
from hopskip.sequence import Place, Rule
from hopskip.speculative import DraftPrecision

PRECISIONS = ("auto", "float32", "bfloat16", "q8", "q4")
KV_DTYPES = ("float32", "bfloat16", "int8")

Array = NDArray[np.float32]


class NativeBackend(Backend):
    """A Llama-family decoder on packed weights.

    Hidden states are float32 [N, D] on the CPU in every precision. Arrays of the wrong shape, type or layout, and
    slots, positions or token ids out of range raise ValueError before anything is computed.
    """

    xp = np
    num_prefill_rows = 128  # what one pass inside takes (native/model.cpp): more would run in several of them

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        threads: int | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        if kv_dtype not in (None, *KV_DTYPES):
            raise ConfigError(
                f"kv_dtype is {kv_dtype}; the native engine keeps keys and values in float32, bfloat16 or int8"
            )
        self.config = config
        self.kv_dtype = kv_dtype or weights.kv_dtype
        self._weights = weights
        self._mapped = [weights]
        self._compiled = make_engine(config, weights, num_usable_cores() if threads is None else threads)
        self._num_layers = config.num_hidden_layers
        self._first_layer_of_copy: dict[DraftPrecision, int] = {}
        self._packed_exit: Any = None
        self._heads: dict[Head, Any] = {"full": None}

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        precision: str = "auto",
        threads: int | None = None,
        kv_dtype: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> NativeBackend:
        """Pack the weights of a checkpoint, or map them from the cache of packed weights (see `packed.py`).

        Args:
            precision: `auto` keeps the checkpoint's own, tensor by tensor: float32 and bfloat16 as they are, float16
                as bfloat16, GGUF's blocks in formats of their own (see `formats.EXACT`), other block types as q8.
                `float32`, `bfloat16`, `q8`, `q4` ask for one; q4 leaves blocks of 4 bits or fewer as they are.
            threads: None uses as many as the process may run on.
            kv_dtype: of the cache, float32, bfloat16 or int8; None takes float32 beside float32 weights, else bfloat16.
            progress: told the share packed so far, up to 1.

        Raises:
            ConfigError: an unknown precision or kv_dtype, or HOPSKIP_ISA names an instruction set that cannot run.
            CheckpointError: a weight is not finite.
        """
        if reason := obstacle():
            raise ConfigError(f"the native backend cannot be used: {reason}")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
        return cls(checkpoint.config, PackedWeights.load(checkpoint, precision, progress), threads, kv_dtype)

    @property
    def traits(self) -> Traits:
        return Traits(
            name="native",
            device="cpu",
            row_exact=True,
            threads=int(self._engine.threads),
            instruction_set=str(self._engine.isa),
            dtype="float32",
            bytes_per_pass=self._weights.bytes_per_pass,
        )

    # -- what is attached ----------------------------------------------------------------------------------------------

    def attach_exit(self, trained_exit: TrainedExit) -> None:
        if self.trained_exit is not None or self.copies:
            raise ConfigError("an exit or a copy is attached to this model already; load the model anew for another")
        trained_exit.check(self.config)
        self._packed_exit, self._heads["exit"] = add_exit(self._engine, self.config, self._weights, trained_exit)
        self._num_layers += len(trained_exit.layers)
        self.trained_exit = trained_exit

    def attach_copy(
        self, checkpoint: Checkpoint, precision: DraftPrecision, progress: Callable[[float], None] | None = None
    ) -> None:
        if precision in self.copies:
            raise ConfigError(f"a copy in {precision} is attached to this model already")
        weights, own = PackedWeights.load(checkpoint, precision, progress), self._weights.bytes_per_pass
        if weights.bytes_per_pass >= own:
            raise ConfigError(
                f"draft_precision={precision} gains nothing: a pass of the model itself reads {own / 1e6:.1f} MB, one "
                f"in {precision} {weights.bytes_per_pass / 1e6:.1f} MB; leave it out"
            )
        self._mapped.append(weights)
        self._first_layer_of_copy[precision] = self._num_layers + len(self.copies) * self.config.num_hidden_layers
        self._heads[precision] = add_copy(self._engine, self.config, weights)
        self.copies = (*self.copies, precision)

    def verify_weights(self) -> None:
        for weights in self._mapped:
            weights.verify()

    def useful_copy(self, checkpoint: Checkpoint) -> DraftPrecision | None:
        gains = PackedWeights.load(checkpoint, "q4").bytes_per_pass < self._weights.bytes_per_pass
        return "q4" if gains else None

    def layer_numbers(self, layers: Seq[int], precision: DraftPrecision | None) -> tuple[int, ...]:
        first = 0 if precision is None else self._first_layer_of_copy[precision]
        return tuple(first + layer for layer in layers)

    # -- passes --------------------------------------------------------------------------------------------------------

    def new_cache(self, num_slots: int, length: int) -> NativeCache:
        return NativeCache(replace(self.config, num_hidden_layers=self._num_layers), num_slots, length, self.kv_dtype)

    def embed(self, token_ids: Seq[int]) -> Array:
        out_ND = np.empty((len(token_ids), self.config.hidden_size), dtype=np.float32)
        self._engine.embed(np.array(token_ids, dtype=np.int32), out_ND)
        return out_ND

    def run_layers(
        self, hidden_ND: Array, start: int, stop: int, rows: Rows, cache: Cache, taps: Seq[int] = ()
    ) -> Pass:
        out_ND = np.empty(hidden_ND.shape, dtype=np.float32)
        tapped_NAD = np.empty((len(hidden_ND), len(taps), hidden_ND.shape[1]), dtype=np.float32) if taps else None
        self._extend_rope(cache.length)
        self._engine.run_layers(
            hidden_ND, out_ND, start, stop, _rows(rows), _handle(cache),
            taps=_int32(tuple(taps)) if taps else None, tapped=tapped_NAD,
        )  # fmt: skip
        return Pass(out_ND, tapped_NAD)

    def logits(self, hidden_ND: Array, head: Head = "full") -> Array:
        out_Nn = np.empty((len(hidden_ND), self._num_tokens(head)), dtype=np.float32)
        self._engine.logits(hidden_ND, out_Nn, self._heads[head])
        return out_Nn

    def greedy(self, hidden_ND: Array, head: Head = "full") -> list[int]:
        out_N = np.empty(len(hidden_ND), dtype=np.int32)
        self._engine.greedy(hidden_ND, out_N, self._heads[head])
        return self.head_tokens(out_N.tolist(), head)

    def choose(self, hidden_ND: Array, places: Seq[Place], reported: Seq[int] = ()) -> Chosen:
        out_N = np.empty(len(hidden_ND), dtype=np.int32)
        logits_NV = np.empty((len(reported), self.config.vocab_size), dtype=np.float32) if reported else None
        rules = {id(place.rule): _native_rule(place.rule) for place in places}
        self._engine.choose(
            hidden_ND,
            out_N,
            rules=[rules[id(place.rule)] for place in places],
            positions=[place.position for place in places],
            paths=[place.path for place in places],
            allowed=[place.allowed for place in places],
            reported=list(reported),
            logits=logits_NV,
        )
        return Chosen(out_N.tolist(), logits_NV)

    def draft(self, task: DraftTask, cache: Cache) -> Chains:
        packed_exit = self._packed_exit if task.layers is None else self._own_layers(task.layers, task.precision)
        size, k, t = len(task.limits), max(task.limits), task.num_runner_ups
        tokens_Bk = np.zeros((size, k), dtype=np.int32)
        counts_B = np.zeros(size, dtype=np.int32)
        states_BkD = np.zeros((size, k, self.config.hidden_size), dtype=np.float32)
        runner_ups_Bkt = np.zeros((size, k, t), dtype=np.int32) if t else None
        sums_Bkt = np.zeros((size, k, 1 + t), dtype=np.float32) if t else None
        self._extend_rope(cache.length)
        native_task = extension.DraftTask(
            ids=np.array(task.token_ids, dtype=np.int32),
            limits=np.array(task.limits, dtype=np.int32),
            min_confidence=task.min_confidence,
            features=_contiguous(task.features_NAD),
            token_states=_contiguous(task.token_states_ND),
            rules=[_native_rule(rule) for rule in task.rules or ()],
            sharpness=task.sharpness,
            last_tokens=[[i for i in ids if 0 <= i < self.config.vocab_size] for ids in task.last_token_ids or ()],
            tokens=tokens_Bk,
            counts=counts_B,
            states=states_BkD,
            runner_ups=runner_ups_Bkt,
            sums=sums_Bkt,
        )
        self._engine.draft(packed_exit, _rows(task.rows), _handle(cache), native_task)
        counts: list[int] = counts_B.tolist()
        return Chains(
            _cut(tokens_Bk, counts),
            [states_kD[:count] for states_kD, count in zip(states_BkD, counts, strict=True)],
            None if runner_ups_Bkt is None else _cut(runner_ups_Bkt, counts),
            None if sums_Bkt is None else _cut(sums_Bkt, counts),
        )

    def stepping(self) -> AbstractContextManager[None]:
        """Without PyTorch's threads, which would spin on cores that the engine's need: a round of speculation on two
        cores then takes a third longer."""
        return torch_on_one_thread()

    def _num_tokens(self, head: Head) -> int:
        if head != "exit":
            return self.config.vocab_size
        assert self.trained_exit is not None
        return len(self.trained_exit.vocabulary_list)

    def _own_layers(self, layers: tuple[int, ...], precision: DraftPrecision | None) -> Any:
        """An exit that is nothing but some of the model's layers and a head over the whole vocabulary."""
        return extension.Exit(
            model_layers=_int32(self.layer_numbers(layers, precision)), head=self._heads[precision or "full"]
        )

    @property
    def _engine(self) -> Any:
        """The compiled engine, whenever it is called. It reads its weights from files: of one that has been cut short,
        the operating system would end the process."""
        for weights in self._mapped:
            weights.check_unchanged()
        return self._compiled

    def _extend_rope(self, length: int) -> None:
        # another thread may do the same: the engine keeps the longest table
        if self._engine.rope_length < length:
            self._engine.set_rope(*self.config.rope.tables(length))


def _cut(values: NDArray[Any], counts: list[int]) -> list[Any]:
    """The steps that were taken, as plain numbers."""
    return [own[:count] for own, count in zip(values.tolist(), counts, strict=True)]


def _contiguous(array: Array | None) -> Array | None:
    return None if array is None else np.ascontiguousarray(array)


class NativeCache(Cache):
    """Keys and values in the layout that the engine multiplies with (native/kernels.h), in blocks of 16 positions.

    Memory is only reserved here: the operating system commits a page when it is first written.
    """

    def __init__(self, config: ModelConfig, num_slots: int, length: int, dtype: str) -> None:
        self.num_slots, self.length = num_slots, length
        self.dtype = dtype
        self.handle: Any = extension.Cache(
            dtype=dtype,
            layers=config.num_hidden_layers,
            slots=num_slots,
            kv_heads=config.num_key_value_heads,
            length=length,
            head_dim=config.head_dim,
        )
        self.nbytes: int = self.handle.nbytes
        self.bytes_per_position = self.nbytes // (num_slots * (-(-length // 16) * 16))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.handle.copy_prefix(source, target, length)

    def keep_path(self, slot: int, start: int, rows: Seq[int]) -> None:
        self.handle.keep_path(slot, start, list(rows))

    def copy_from(self, other: Cache) -> None:
        self.handle.copy_from(_handle(other))

    def clear(self) -> None:
        self.handle.clear()


def _handle(cache: Cache) -> Any:
    assert isinstance(cache, NativeCache)
    return cache.handle


def _rows(rows: Rows) -> Any:
    return extension.Rows(slots=rows.slots, positions=rows.positions, parent_offsets=rows.parent_offsets)


@lru_cache
def _int32(numbers: tuple[int, ...]) -> NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""For what float32 would round to 0 or infinity, which have other meanings."""

_native: WeakKeyDictionary[Rule, Any] = WeakKeyDictionary()


def _native_rule(rule: Rule) -> Any:
    """`extension.Rule`, with the counts of now."""
    found = _native.get(rule)
    if found is None:
        found = _native[rule] = _make_rule(rule)
    if rule.counts is not None:
        found.set_counts(rule.counts.ids, rule.counts.counts)
    return found


def _make_rule(rule: Rule) -> Any:
    params = rule.params
    return extension.Rule(
        temperature=max(params.temperature, _SMALLEST) if params.temperature else 0.0,
        seed=rule.seed,
        top_k=min(params.top_k, 2**31 - 1),
        top_p=max(params.top_p, _SMALLEST),
        min_p=max(params.min_p, _SMALLEST) if params.min_p else 0.0,
        repetition=min(max(params.repetition_penalty, _SMALLEST), _LARGEST),
        presence=min(max(params.presence_penalty, -_LARGEST), _LARGEST),
        frequency=min(max(params.frequency_penalty, -_LARGEST), _LARGEST),
        biased=[*params.logit_bias],
        biases=[*params.logit_bias.values()],
    )
