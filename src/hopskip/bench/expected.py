"""What drafting costs and may gain: by arithmetic on a checkpoint's header, or by measured costs.

Decoding one sequence is bound by memory bandwidth, so a pass costs the bytes of the weights that it reads, however few
rows it has. The model of arXiv 2404.16710 and of its successors: a round of k drafted tokens costs 1 + k c full passes
and yields tau tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from hopskip.backends.native.formats import EXACT, PLAIN, choose_format, matrix_bytes
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.draft.costs import CONTEXT, Costs, expected_speedup, expected_tokens
from hopskip.speculative import Source

MAX_DRAFT_TOKENS = 16
"""Longest draft that is considered: above it, rows stop being nearly free."""

_PLAIN_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PLAIN_NAMES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Bytes of a model in the formats that it runs in. Norms and biases are left out: far below one per mille."""

    layer_bytes: tuple[int, ...]
    """Matrices of each layer."""
    head_bytes: int
    embedding_bytes: int
    """0 where embedding and head are one matrix."""
    kv_bytes_per_token: int
    bytes_by_format: dict[str, int]
    """Bytes of weights by format (`float32`, `bfloat16`, `float16`, `q8`, `q4_k`, ...), the largest first."""
    widened: tuple[str, ...] = ()
    """Stored types that have no format of their own, and run in 8 bits."""

    @property
    def total_bytes(self) -> int:
        """Memory of all weights."""
        return self.bytes_per_pass + self.embedding_bytes

    @property
    def bytes_per_pass(self) -> int:
        """What one full pass reads: all layers and the head. Of the embedding it reads single rows."""
        return sum(self.layer_bytes) + self.head_bytes

    @property
    def head_in_layers(self) -> float:
        """The size of the head in units of a layer, h."""
        return self.head_bytes * len(self.layer_bytes) / sum(self.layer_bytes)

    def draft_step_cost(self, exit_layer: int) -> float:
        """One draft step over one full pass: c = (E + h) / (L + h)."""
        return (sum(self.layer_bytes[:exit_layer]) + self.head_bytes) / self.bytes_per_pass


def model_costs(
    checkpoint: Checkpoint, backend: Literal["native", "torch"], precision: str, kv_dtype: str = "auto"
) -> ModelCosts:
    """The costs of a checkpoint as `load_backend` would load it.

    Args:
        precision: `auto`, `float32`, `bfloat16`, `float16`, `q8` or `q4`, of which each backend has its own.
        kv_dtype: `auto`, `float32`, `bfloat16` or `int8`.
    """
    config = checkpoint.config
    if backend == "torch" and precision == "auto":
        precision = checkpoint.dtype
    layer_bytes = [0] * config.num_hidden_layers
    edges: Counter[str] = Counter()
    by_format: Counter[str] = Counter()
    widened: set[str] = set()
    for name in checkpoint.names():
        if name.endswith(("norm.weight", ".bias")):
            continue
        stored = checkpoint.stored(name)
        rows, columns = stored.shape
        if backend == "torch":
            format_name, num_bytes = precision, rows * columns * _PLAIN_BYTES[precision]
        else:
            format = choose_format(stored.type.name, name, precision)
            format_name = _PLAIN_NAMES.get(format.name, format.name.lower())
            num_bytes = matrix_bytes(format, rows, columns)
            if precision == "auto" and stored.type.name not in (*EXACT, *PLAIN):
                widened.add(stored.type.name)
        by_format[format_name] += num_bytes
        if name.startswith("model.layers."):
            layer_bytes[int(name.split(".")[2])] += num_bytes
        else:
            edges[name] += num_bytes
    if kv_dtype == "auto":  # the native backend keeps keys and values in float32 beside float32 weights only
        kv_dtype = "float32" if set(by_format) == {"float32"} else "bfloat16"
    # an int8 vector has a float32 scale
    vector_bytes = config.head_dim + 4 if kv_dtype == "int8" else config.head_dim * _PLAIN_BYTES[kv_dtype]
    embedding_bytes = edges["model.embed_tokens.weight"]
    return ModelCosts(
        layer_bytes=tuple(layer_bytes),
        head_bytes=embedding_bytes if config.tie_word_embeddings else edges["lm_head.weight"],
        embedding_bytes=0 if config.tie_word_embeddings else embedding_bytes,
        kv_bytes_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * vector_bytes,
        bytes_by_format=dict(by_format.most_common()),
        widened=tuple(sorted(widened)),
    )


def best_num_draft_tokens(acceptance: float, step_cost: float) -> int:
    """The k of the largest expected speed-up, 0 to `MAX_DRAFT_TOKENS`; of equals the smallest.

    >>> best_num_draft_tokens(0.2, 0.4), best_num_draft_tokens(0.8, 0.2)
    (0, 4)
    """
    return max(range(MAX_DRAFT_TOKENS + 1), key=lambda k: expected_speedup(acceptance, k, step_cost))


def measured_speedup(
    costs: Costs, source: Source | None, acceptance: float, num_draft_tokens: int, context: int = CONTEXT
) -> float:
    """Expected decoding speed over plain decoding, by measured costs, if each draft token is accepted with this
    probability.

    Args:
        source: an exit of the cost table; None drafts at no cost, as lookup does.
        context: positions before the rows.
    """
    seconds = costs.pass_seconds(num_draft_tokens + 1, context)
    if source is not None and num_draft_tokens:
        seconds += costs.draft_seconds(source, num_draft_tokens, context)
    return expected_tokens(acceptance, num_draft_tokens) * costs.pass_seconds(1, context) / seconds


def best_measured(costs: Costs, source: Source | None, acceptance: float, context: int = CONTEXT) -> tuple[int, float]:
    """The k of the largest speed-up by measured costs, 0 to `MAX_DRAFT_TOKENS`, and that speed-up."""
    speedups = [measured_speedup(costs, source, acceptance, k, context) for k in range(MAX_DRAFT_TOKENS + 1)]
    best = max(range(len(speedups)), key=speedups.__getitem__)
    return best, speedups[best]
