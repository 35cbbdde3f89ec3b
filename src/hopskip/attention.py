"""Causal attention of ragged rows over the static cache.

Shape letters: N rows, H query heads, K key/value heads, E head dimension, S slots, T positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.cache import Rows


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
    outputs, first = [], 0
    for segment in rows.segments:
        own = slice(first, first + segment.count)
        end = segment.start + segment.count
        k_SKTE[segment.slot, :, segment.start : end] = k_NKE[own].transpose(0, 1)
        v_SKTE[segment.slot, :, segment.start : end] = v_NKE[own].transpose(0, 1)
        # the first row of the segment sees the oldest key that any of them sees
        oldest = 0 if sliding_window is None else max(0, segment.start - sliding_window + 1)
        mask = _causal_mask(segment.start, end, oldest, sliding_window, q_NHE.device)
        out_HTE = F.scaled_dot_product_attention(
            q_NHE[own].transpose(0, 1).unsqueeze(0),
            k_SKTE[segment.slot, :, oldest:end].unsqueeze(0),
            v_SKTE[segment.slot, :, oldest:end].unsqueeze(0),
            attn_mask=mask,
            enable_gqa=True,
        ).squeeze(0)
        outputs.append(out_HTE.transpose(0, 1))
        first += segment.count
    return torch.cat(outputs)


def _causal_mask(start: int, end: int, oldest: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """True where a row at position start..end-1 may see a key at position oldest..end-1; None if it may see all."""
    if end - start == 1:
        return None
    row = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(oldest, end, device=device)[None, :]
    mask = key <= row
    return mask if sliding_window is None else mask & (key > row - sliding_window)
