"""From packed weights to the compiled engine: the model itself, and what is attached to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.native.formats import Format
from hopskip.backends.native.isa import choose_isa, extension
from hopskip.backends.native.packed import PackedWeights
from hopskip.backends.native.packing import Packed, Packer
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit, Weights
from hopskip.errors import ResourceError

T = TypeVar("T")


def make_engine(config: ModelConfig, weights: PackedWeights, threads: int) -> Any:
    """The engine of a model: embedding, layers, norm and head, without a copy of the weights.

    Raises:
        ConfigError: see `choose_isa`.
        ResourceError: the system does not give so many threads.
    """
    shape = extension.Shape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        sliding_window=config.sliding_window or 0,
    )
    try:
        engine = extension.Engine(choose_isa(), threads, shape)
    except RuntimeError as error:
        raise ResourceError(str(error)) from None
    for index in range(config.num_hidden_layers):
        engine.add_layer(_layer_of(config, weights, index))
    engine.set_embedding_and_head(
        _matrix(weights.matrices["model.embed_tokens.weight"]),
        _matrix(weights.head),
        weights.vectors["model.norm.weight"],
    )
    return engine


def add_exit(engine: Any, config: ModelConfig, weights: PackedWeights, trained_exit: TrainedExit) -> tuple[Any, Any]:
    """Put a trained exit's layers behind the engine's; the exit as `Engine.draft` takes it, and its head.

    Both are packed to 8 bits at most, whatever the model's precision: what they draft is verified, so that costs a
    little acceptance and never exactness.
    """
    packer = Packer()

    def in_q8(weight_OI: Weights) -> Packed:
        return packer.pack_array(_array(weight_OI), Format.Q8)

    for layer in trained_exit.layers:
        matrices = {name: in_q8(tensor) for name, tensor in layer.items() if len(tensor.shape) == 2}
        vectors = {name: _array(tensor) for name, tensor in layer.items() if len(tensor.shape) == 1}
        engine.add_layer(_layer(config, matrices, vectors))
    mixing: dict[str, object] = {}
    if trained_exit.mixing:
        mixing = {name: _matrix(in_q8(trained_exit.mixing[name])) for name in ("fuse", "mix")}
        mixing |= {name: _array(trained_exit.mixing[name]) for name in ("token_norm", "feature_norm")}
    vocabulary = np.ascontiguousarray(trained_exit.vocabulary, dtype=np.int32)
    rows = weights.head.select_rows(vocabulary)
    head = _matrix(rows if rows.format.is_quantized else packer.pack_array(rows.unpack(), Format.Q8))
    depth = config.num_hidden_layers
    packed = extension.Exit(
        model_layers=np.arange(trained_exit.config.start, dtype=np.int32),
        own_layers=np.arange(depth, depth + trained_exit.config.num_layers, dtype=np.int32),
        head=head,
        vocabulary=vocabulary,
        num_features=len(trained_exit.config.features),
        **mixing,
    )
    return packed, head


def add_copy(engine: Any, config: ModelConfig, weights: PackedWeights) -> Any:
    """Put all layers of a model in another precision behind the engine's, whose caches they share; the copy's head."""
    for index in range(config.num_hidden_layers):
        engine.add_layer(_layer_of(config, weights, index), cache_layer=index)
    return _matrix(weights.head)


def _layer_of(config: ModelConfig, weights: PackedWeights, index: int) -> Any:
    prefix = f"model.layers.{index}."
    return _layer(config, _within(weights.matrices, prefix), _within(weights.vectors, prefix))


def _layer(config: ModelConfig, matrices: Mapping[str, Packed], vectors: Mapping[str, NDArray[np.float32]]) -> Any:
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
    return extension.Layer(**arguments)


def _within(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _array(tensor: Weights) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor, dtype=np.float32)


def _matrix(packed: Packed) -> Any:
    return extension.Matrix(int(packed.format), packed.rows, packed.cols, packed.data)
