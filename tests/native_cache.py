"""The native engine's cache as plain arrays: the layout of native/kernels.h, read independently of it.

Shape letters: L layers, S slots, H key/value heads, T positions, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hopskip.backends.native.backend import NativeCache
from hopskip.backends.rows import Cache

TILE = 16
_ELEMENTS = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


class Views(NamedTuple):
    """Into the cache's memory; positions and elements padded to whole blocks. Keys of int8 are value + 128."""

    keys: NDArray[Any]
    """[L, S, H, blocks, TILE, units, elements of a unit]."""
    values: NDArray[Any]
    """[L, S, H, blocks, units, positions of a unit, strips, TILE]."""
    key_scales: NDArray[np.float32] | None
    """[L, S, H, blocks, TILE]; int8 only."""
    value_scales: NDArray[np.float32] | None


def native(cache: Cache) -> NativeCache:
    assert isinstance(cache, NativeCache)
    return cache


def views(cache: Cache, head_dim: int) -> Views:
    cache = native(cache)
    data = cache.handle.bytes
    element = np.dtype(_ELEMENTS[cache.dtype])
    per_unit, header = 4 // element.itemsize, 64 if cache.dtype == "int8" else 0
    units, strips, blocks = -(-head_dim // per_unit), -(-head_dim // TILE), -(-cache.length // TILE)
    key_bytes, value_bytes = header + units * 64, header + TILE // per_unit * strips * 64
    assert data.shape[-1] == blocks * (key_bytes + value_bytes)
    outer = data.shape[:3]
    keys = data[..., : blocks * key_bytes].reshape(*outer, blocks, key_bytes)
    values = data[..., blocks * key_bytes :].reshape(*outer, blocks, value_bytes)
    scales = [part[..., :64].view(np.float32) if header else None for part in (keys, values)]
    k = keys[..., header:].reshape(*outer, blocks, units, TILE, 4).view(np.uint8 if header else element)
    v = values[..., header:].reshape(*outer, blocks, TILE // per_unit, strips, TILE, 4).view(element)
    return Views(k.swapaxes(-3, -2), np.moveaxis(v, -1, -3), *scales)


def _widened(raw: NDArray[Any]) -> NDArray[np.float32]:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def vectors(cache: Cache, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, S, H, T, D] in float32."""
    found, length = views(cache, head_dim), native(cache).length
    outer = found.keys.shape[:3]
    k, v = _widened(found.keys), _widened(found.values)
    if found.key_scales is not None and found.value_scales is not None:
        k = (k - 128) * found.key_scales[..., None, None]
    k = k.reshape(*outer, -1, k.shape[-1] * k.shape[-2])[..., :length, :head_dim]
    v = v.reshape(*outer, -1, v.shape[-1] * v.shape[-2])[..., :length, :head_dim]
    if found.value_scales is not None:
        v = v * found.value_scales.reshape(*outer, -1)[..., :length, None]
    return torch.from_numpy(np.ascontiguousarray(k)), torch.from_numpy(np.ascontiguousarray(v))


def set_vectors(cache: Cache, k_LSHTD: Tensor, v_LSHTD: Tensor) -> None:
    """Fill every position."""
    length, head_dim = k_LSHTD.shape[-2:]
    found, dtype = views(cache, head_dim), native(cache).dtype
    padding = -length % TILE

    def raw(x: Tensor, scales: NDArray[np.float32] | None) -> NDArray[Any]:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        if scales is not None:
            scale = x.abs().amax(-1) / 127
            scales[...] = scale.reshape(scales.shape).numpy()
            return (x / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8).numpy()
        if dtype == "bfloat16":
            return x.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return x.numpy()

    k, v = raw(k_LSHTD, found.key_scales), raw(v_LSHTD, found.value_scales)
    if found.key_scales is not None:
        k = (k.astype(np.int16) + 128).astype(np.uint8)
    pad = found.keys.shape[-1] * found.keys.shape[-2] - head_dim
    found.keys[...] = np.pad(k, [(0, 0)] * 4 + [(0, pad)]).reshape(found.keys.shape)
    pad = found.values.shape[-1] * found.values.shape[-2] - head_dim
    found.values[...] = np.pad(v, [(0, 0)] * 4 + [(0, pad)]).reshape(found.values.shape)


def fill_with_garbage(cache: Cache) -> None:
    """What must never be read: NaN, also as scales."""
    native(cache).handle.bytes[...] = 0xFF
