"""Perplexity: how well a model predicts a text, at its last layer or at an early exit.

Each text is cut into windows of at most `context` tokens. Every token of a window but its first is predicted from those
before it; perplexity is exp of the mean negative log-likelihood, the field's definition.

Shape letters: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend
from hopskip.backends.rows import Rows, Segment
from hopskip.errors import ConfigError, PromptError
from hopskip.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]

MAX_CONTEXT = 2048
"""Longest window by default."""
_ROWS_AT_ONCE = 256  # of logits: bounds their memory


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A perplexity beside another one of the same tokens."""

    delta: float
    """This perplexity less the other."""
    error: float
    """One standard error of `delta`, from the differences token by token: what all of the text shares cancels out."""


def cut_windows(
    tokenizer: Tokenizer, texts: Seq[str], context: int = MAX_CONTEXT, max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of the texts, in windows of 2 to `context`; the first `max_tokens` tokens of them all.

    Raises:
        PromptError: nothing is left to predict.
        ConfigError: a number is out of range.
    """
    if context < 2:
        raise ConfigError(f"context is {context}; it must be at least 2")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 2")
    windows: list[list[int]] = []
    num_left = math.inf if max_tokens is None else max_tokens
    for text in texts:
        ids = tokenizer.encode(text)
        for first in range(0, len(ids), context):
            window = ids[first : first + int(min(context, num_left))]
            if len(window) > 1:
                windows.append(window)
                num_left -= len(window)
    if not windows:
        raise PromptError("the text has fewer than two tokens, so there is nothing to predict; give a longer one")
    return windows


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read.
        PromptError: it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a text file") from None


def places_to_read(num_layers: int, exit_layers: Seq[int]) -> list[int]:
    """Numbers of layers after which to read a model of `num_layers`: the exits in order, and all layers.

    Raises:
        ConfigError: the model has no such exit.
    """
    for exit_layer in exit_layers:
        if not 0 < exit_layer < num_layers:
            raise ConfigError(
                f"exit_layers has {exit_layer}; this model has {num_layers} layers, so give numbers from 1 to "
                f"{num_layers - 1}"
            )
    return [*sorted(set(exit_layers)), num_layers]


def negative_log_likelihoods(
    backend: Backend, windows: Seq[Seq[int]], stops: Seq[int], on_window: Callable[[], None] = lambda: None
) -> dict[int, Floats]:
    """Of every token but the first of each window, float32 [tokens], in nats; by the number of layers it is read after.

    Args:
        windows: token ids, at least two each.
        stops: numbers of layers, rising (see `places_to_read`). All are read in one pass, through final norm and head.
        on_window: called after each window.
    """
    cache = backend.new_cache(1, max(map(len, windows)) - 1)
    parts: dict[int, list[Floats]] = {stop: [] for stop in stops}
    for window in windows:
        hidden_ND, start = backend.embed(window[:-1]), 0
        all_rows, next_ids_N = Rows([Segment(0, 0, len(hidden_ND))]), np.array(window[1:])
        for stop in stops:
            hidden_ND, start = backend.run_layers(hidden_ND, start, stop, all_rows, cache).hidden_ND, stop
            for first in range(0, len(hidden_ND), _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                logits_NV = backend.on_host(backend.logits(hidden_ND[rows]))
                parts[stop].append(_cross_entropy(logits_NV, next_ids_N[rows]))
        on_window()
    return {stop: np.concatenate(found) for stop, found in parts.items()}


def _cross_entropy(logits_NV: Floats, ids_N: NDArray[np.int64]) -> Floats:
    """-log softmax of some tokens, [N]."""
    shifted_NV = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    sums_N = np.exp(shifted_NV).sum(axis=-1, dtype=np.float64)
    nll_N: Floats = (np.log(sums_N) - shifted_NV[np.arange(len(ids_N)), ids_N]).astype(np.float32)
    return nll_N


def perplexity(nll_N: Floats) -> float:
    """Of tokens with these negative log-likelihoods; infinite where it passes what a float holds."""
    mean = float(nll_N.mean(dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf


def difference(nll_N: Floats, other_N: Floats) -> Difference:
    """How much larger the perplexity of the first is, both of the same tokens."""
    gap_N = nll_N.astype(np.float64) - other_N
    own = perplexity(nll_N)
    # d exp(m) = exp(m) dm
    error = own * float(gap_N.std(ddof=1)) / math.sqrt(len(gap_N)) if len(gap_N) > 1 else math.inf
    return Difference(delta=own - perplexity(other_N), error=error)
