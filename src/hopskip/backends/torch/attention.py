"""Causal attention of ragged rows over the static cache.

Shape letters: N rows, H query heads, K key/value heads, E head dimension, S slots, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.backends.rows import Rows, Segment

_MAX_SINGLE_ROWS = 32
"""Segments of at most this many rows are verify passes or single tokens; longer ones are prompts."""


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's attention, which PyTorch prefers on some cards, plans anew for every length: tens of milliseconds for
    each new token. And on some its decoding is wrong for few key/value heads. Whatever else uses PyTorch keeps it."""
    cuda = torch.backends.cuda
    was_enabled = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(was_enabled)


def attend(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    k_SKTE: Tensor,
    v_SKTE: Tensor,
    rows: Rows,
    sliding_window: int | None = None,
) -> Tensor:
    """Write the rows' keys and values to one layer's cache, then let every row attend to its sequence up to itself.

    Mutates `k_SKTE` and `v_SKTE` at the rows' slots and positions. Returns [N, H, E].
    """
    outputs: list[Tensor] = []
    first = 0
    for segment in rows.segments:
        own = slice(first, first + segment.count)
        first = own.stop
        end = segment.start + segment.count
        k_SKTE[segment.slot, :, segment.start : end] = k_NKE[own].transpose(0, 1)
        v_SKTE[segment.slot, :, segment.start : end] = v_NKE[own].transpose(0, 1)
        if segment.parents is not None:
            outputs += _attend_tree(q_NHE[own], k_SKTE[segment.slot], v_SKTE[segment.slot], segment, sliding_window)
            continue
        # The order of the sum over keys depends on how many there are, masked ones included. A few rows (a draft to
        # verify) go one by one, so that a row's bits depend on its position only; a long prompt goes as one block.
        rows_at_once = 1 if segment.count <= _MAX_SINGLE_ROWS else segment.count
        for row in range(0, segment.count, rows_at_once):
            start = segment.start + row
            stop = start + rows_at_once
            # the oldest key that any of these rows sees is that of the first
            oldest = 0 if sliding_window is None else max(0, start - sliding_window + 1)
            q_part_NHE = q_NHE[own][row : row + rows_at_once]
            out_HNE = F.scaled_dot_product_attention(
                q_part_NHE.transpose(0, 1).unsqueeze(0),
                k_SKTE[segment.slot, :, oldest:stop].unsqueeze(0),
                v_SKTE[segment.slot, :, oldest:stop].unsqueeze(0),
                attn_mask=_causal_mask(start, stop, oldest, sliding_window, q_NHE.device),
                enable_gqa=True,
            ).squeeze(0)
            outputs.append(out_HNE.transpose(0, 1))
    return torch.cat(outputs)


def _attend_tree(
    q_NHE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segment: Segment, sliding_window: int | None
) -> Iterator[Tensor]:
    """Row by row, each with its own path's keys and values in a row: [1, H, E] each, the bits of a chain's row."""
    for row in range(segment.count):
        places = [*range(segment.start), *segment.places_to(row)]
        if sliding_window is not None:
            places = places[-sliding_window:]
        k_1KTE, v_1KTE = k_KTE[:, places].unsqueeze(0), v_KTE[:, places].unsqueeze(0)
        out_1HNE = F.scaled_dot_product_attention(q_NHE[None, row, :, None], k_1KTE, v_1KTE, enable_gqa=True)
        yield out_1HNE.squeeze(0).transpose(0, 1)


def _causal_mask(start: int, end: int, oldest: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """True where a row at position start..end-1 may see a key at position oldest..end-1; None if it may see all."""
    if end - start == 1:
        return None
    row = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(oldest, end, device=device)[None, :]
    mask = key <= row
    return mask if sliding_window is None else mask & (key > row - sliding_window)
