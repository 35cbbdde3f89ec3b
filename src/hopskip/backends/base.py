"""The contract between the engine and whatever computes a decoder. Everything above it knows this file alone.

Who owns what:

- *Lengths and positions* belong to the caller. A cache only stores: a position is valid because its owner says so, and
  what a rejected draft has left is overwritten by the next pass.
- *Into a backend* go token ids and small numbers as plain Python values, and the positions of `Rows` as int32 arrays on
  the host, as are the masks and counts that choosing tokens needs. Nobody above places anything on a device.
- *Out of it* come token ids and sums as Python lists. Hidden states, features and logits are arrays of the
  backend's own namespace `xp` (the array-API standard: numpy for the C++ engine, PyTorch for the others) on its own
  device. Code above may take rows of them, concatenate them with `xp`, and hand them back; nothing else.

A call is a whole pass over rows of any mix of sequences, or the whole draft of several sequences, so that a GPU can
answer each with one captured graph. What is optional has a body here, or in `steps.py`, made of the calls that are not.

Shape letters: N rows, D hidden size, V vocabulary, n tokens of a head, A features, B sequences, k draft tokens.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from array_api_compat import to_device
from numpy.typing import NDArray

from hopskip.backends.rows import Array, Cache, Rows
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.errors import ConfigError
from hopskip.sampling import choose_tokens, is_number
from hopskip.sequence import Place, Rule
from hopskip.speculative import DraftPrecision

Head = Literal["full", "exit"] | DraftPrecision
"""Which head reads hidden states, after the model's final norm: the model's own over the whole vocabulary; its rows of
the trained exit's draft vocabulary; or the one of an attached copy, over the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a backend is and promises. For decisions by promise (`row_exact`), for display, and to tell measurements of
    one machine and setting from those of another; never to find out which class it is."""

    name: str
    """`native`, `torch`, ..., as options call it."""
    device: str
    """`cpu`, `cuda:0`; and what the device calls itself, where that matters for its speed."""
    row_exact: bool
    """The bits of a row never depend on how many rows, or which, are computed with it."""
    threads: int
    instruction_set: str
    """`avx2`, ...; of PyTorch its version."""
    dtype: str
    """Of hidden states: `float32`, `bfloat16`, `float16`."""
    bytes_per_pass: int
    """Weights that a full pass of one row reads: all layers and the head."""


class Pass(NamedTuple):
    """What a pass through layers gives."""

    hidden_ND: Array
    features_NAD: Array | None
    """Outputs of the tapped layers, [N, A, D]; None where none were asked for."""


@dataclass(kw_only=True)
class DraftTask:
    """Drafts to be made for B sequences, each of them a chain of tokens."""

    layers: tuple[int, ...] | None
    """The model's own layers that draft, rising. None: the attached trained exit does."""
    precision: DraftPrecision | None = None
    """Of the layers and the head: that of an attached copy; None is the model's own."""
    token_ids: list[int]
    """Of the rows: tokens that have not been at the exit, each sequence's last one at the end of its segment. Anything
    but a trained exit with layers of its own takes that one alone."""
    rows: Rows
    limits: list[int]
    """Most tokens for each sequence, at least 1. Keys and values are written at the rows' positions, and at up to
    limit - 1 positions after the last of each."""
    features_NAD: Array | None = None
    """Features of the token before each row, if the exit wants any."""
    token_states_ND: Array | None = None
    """Outputs of the model's layer start - 1 at the rows, if the exit starts after a layer and has layers. Those at the
    last row of each segment are not used: the model has not been there yet."""
    min_confidence: float = 0.0
    """A sequence drafts no more after its first token whose probability at the exit, sharpened, is below this."""
    num_runner_ups: int = 0
    """How many of each step's next best tokens to return, with the sums that all were chosen by; 0: neither."""
    rules: list[Rule] | None = None
    """How each sequence's tokens are chosen, truncation left out. None: all take the best."""
    sharpness: float = 1.0
    """With `rules`, what scaled logits are multiplied by before noise is added."""
    last_token_ids: list[frozenset[int]] | None = None
    """Those that end each sequence's text, so that its draft ends with the first of them too. None: none do."""


class Chains(NamedTuple):
    """What was drafted, by sequence and step. A chain ends before a step in which no token can be chosen, so it may be
    empty."""

    token_ids: list[list[int]]
    states: list[Array]
    """The hidden states that the tokens were read from, [k, D] for each sequence."""
    runner_ups: list[list[list[int]]] | None
    """The next best tokens of each step, best first."""
    sums: list[list[list[float]]] | None
    """Of scaled logits and noise: of the token of each step, and of its runner-ups."""


class Chosen(NamedTuple):
    """Tokens for rows of hidden states."""

    token_ids: list[int]
    """-1 where there is `NoTokenError`."""
    logits_NV: Array | None
    """Of the rows that were to be reported, as the head gives them: before penalties, biases, masks."""


class Backend(ABC):
    """A decoder whose layers can be run by number. Layers 0 .. L-1 are the model's; those of an attached exit and of
    attached copies follow.

    Attach everything before caches are made and before the first pass. Constructors take no longer than placing weights
    does.
    """

    config: ModelConfig
    xp: Any
    """The namespace of its arrays, by the array-API standard."""
    trained_exit: TrainedExit | None = None
    """The one that is attached."""
    copies: tuple[DraftPrecision, ...] = ()
    """Precisions of the attached copies."""
    num_prefill_rows: int = 512
    """Most prompt tokens in one pass: enough to keep arithmetic units busy, few enough to bound activations, and the
    time that aborts and other requests wait for."""

    # -- every backend has these ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def traits(self) -> Traits: ...

    @abstractmethod
    def attach_exit(self, trained_exit: TrainedExit) -> None:
        """Put a trained exit beside the model. Its layers are numbered from L on, and caches that are made from now on
        have room for them.

        Raises:
            ConfigError: the exit does not fit the model.
        """

    @abstractmethod
    def new_cache(self, num_slots: int, length: int) -> Cache:
        """A cache of the backend's own key/value precision."""

    @abstractmethod
    def embed(self, token_ids: Seq[int]) -> Array:
        """Hidden states [N, D] of tokens."""

    @abstractmethod
    def run_layers(
        self, hidden_ND: Array, start: int, stop: int, rows: Rows, cache: Cache, taps: Seq[int] = ()
    ) -> Pass:
        """Layers `start` to `stop - 1` on N rows. Writes the rows' keys and values to `cache`; the result is new.

        Args:
            taps: numbers of layers, rising, from start + 1 to stop: what has come out after so many.
        """

    @abstractmethod
    def logits(self, hidden_ND: Array, head: Head = "full") -> Array:
        """Final norm and a head: float32 [N, n]."""

    @abstractmethod
    def draft(self, task: DraftTask, cache: Cache) -> Chains:
        """Draft for several sequences, which share each step. `hopskip.backends.steps` has a body made of the other
        calls."""

    # -- these have a body that may be left as it is -------------------------------------------------------------------

    def forward(self, token_ids: Seq[int], rows: Rows, cache: Cache, taps: Seq[int] = ()) -> Pass:
        """Embedding and all of the model's layers."""
        return self.run_layers(self.embed(token_ids), 0, self.config.num_hidden_layers, rows, cache, taps)

    def greedy(self, hidden_ND: Array, head: Head = "full") -> list[int]:
        """The best token of each row after final norm and head; of equals, the first of the head. -1 where there is
        `NoTokenError`."""
        logits_Nn = self.logits(hidden_ND, head)
        best_N = self.xp.argmax(logits_Nn, axis=-1)
        is_one_N = is_number(self.xp.max(logits_Nn, axis=-1))
        return self.head_tokens(self.xp.where(is_one_N, best_N, -1).tolist(), head)

    def head_tokens(self, rows: list[int], head: Head) -> list[int]:
        """The tokens that rows of a head stand for; -1 stays."""
        if head != "exit":
            return rows
        assert self.trained_exit is not None
        vocabulary = self.trained_exit.vocabulary_list
        return [-1 if row < 0 else vocabulary[row] for row in rows]

    def choose(self, hidden_ND: Array, places: Seq[Place], reported: Seq[int] = ()) -> Chosen:
        """The token of each row, by its place's rule. The same as `greedy` where all rules say so.

        Args:
            reported: rows, rising, whose logits are wanted as well.
        """
        logits_NV = self.logits(hidden_ND)
        token_ids = choose_tokens(logits_NV, places, self.xp)
        return Chosen(token_ids, logits_NV[list(reported)] if reported else None)

    def attach_copy(
        self, checkpoint: Checkpoint, precision: DraftPrecision, progress: Callable[[float], None] | None = None
    ) -> None:
        """Put a copy of all layers and the head beside the model, to draft with. Its layers write their keys and values
        where those of the originals do. `progress` is told the share packed so far, up to 1.

        Raises:
            ConfigError: the backend has no copies, there is one in this precision, or it would gain nothing.
        """
        raise ConfigError(
            f"draft_precision={precision} needs the native CPU backend, but this runs on {self.traits.name}; "
            "leave it out"
        )

    def verify_weights(self) -> None:
        """Compare files that the backend keeps of its own with their checksums. There may be none.

        Raises:
            CheckpointError: one is damaged.
        """
        return

    def useful_copy(self, checkpoint: Checkpoint) -> DraftPrecision | None:
        """The lowest precision in which a copy would read less than the model itself, if there is one."""
        return None

    def layer_numbers(self, layers: Seq[int], precision: DraftPrecision | None) -> tuple[int, ...]:
        """The numbers of some of the model's layers in a copy's precision; None is the model's own."""
        assert precision is None, "no copy is attached"
        return tuple(layers)

    def on_host(self, array: Array) -> NDArray[np.float32]:
        """An array of the backend's as one of numpy's, float32: the values are kept."""
        return np.asarray(to_device(self.xp.astype(array, self.xp.float32, copy=False), "cpu"))

    def synchronize(self) -> None:
        """Wait until everything that was asked for is computed: for timing."""
        return

    def stepping(self) -> AbstractContextManager[None]:
        """What the process is to be like while the engine steps."""
        return nullcontext()


def run_by_number(
    backend: Backend,
    hidden_ND: Array,
    layers: Seq[int],
    rows: Rows,
    cache: Cache,
) -> Array:
    """These layers, in this order."""
    start = 0
    for stop in range(1, len(layers) + 1):
        if stop == len(layers) or layers[stop] != layers[stop - 1] + 1:
            hidden_ND = backend.run_layers(hidden_ND, layers[start], layers[stop - 1] + 1, rows, cache).hidden_ND
            start = stop
    return hidden_ND


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Without PyTorch's other threads, if it is loaded: waking them takes longer than a small operation, and they spin
    for a while."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
