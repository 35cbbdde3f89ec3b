"""What a model in memory must have for self-speculation, and views of it with other layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

EXIT_LAYER: int | None = None
NUM_DRAFT_TOKENS = 4
"""Where neither the call nor the checkpoint says anything else."""

OTHER_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
NOT_RETURNED = ("output_attentions", "output_hidden_states")
OWN_INPUTS = ("past_key_values", "attention_mask", "position_ids", "inputs_embeds", "use_cache")
IGNORED_INPUTS = ("logits_to_keep", "cache_position", "output_attentions", "output_hidden_states", "return_dict")


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that has the layers.

    Raises:
        ValueError: it is built in another way than Llama and its relatives.
    """
    decoder = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if getattr(model.config, "is_encoder_decoder", False) or not isinstance(
        getattr(decoder, "layers", None), nn.ModuleList
    ):
        raise ValueError(f"{type(model).__name__} has no decoder layers in a row; self-speculation cannot use it")
    return decoder


def view_of(model: Any, layers: Sequence[nn.Module]) -> Any:
    """The same model with other layers. It shares all weights, and the model itself is not touched."""
    view, decoder = _shallow(model), _shallow(decoder_of(model))
    decoder._modules["layers"] = nn.ModuleList(layers)
    config = copy.copy(decoder.config)
    config.num_hidden_layers = len(layers)
    decoder.config = config
    view._modules[model.base_model_prefix or "model"] = decoder
    return view


def _shallow(module: Any) -> Any:
    """A module of its own with the same parts. What others have put around the original's calls stays there."""
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules)
    for name in ("forward", "_compiled_call_impl"):
        shallow.__dict__.pop(name, None)
    return shallow


def check_inputs(model: Any, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    """Raises ValueError for a parameter of `generate` that does not go together with self-speculation."""
    decoder_of(model)
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample", "assisted_generation"):
        raise ValueError(f"self-speculation decodes greedily or samples, but the parameters ask for {mode}; drop them")
    for name in OTHER_DRAFTS:
        if getattr(config, name, None):
            raise ValueError(f"{name} has no effect here: the model drafts for itself; leave it out")
    for name in NOT_RETURNED:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"{name} is not kept by self-speculation; leave it out")
    for name, value in inputs.items():
        if value is not None and name not in OWN_INPUTS and name not in IGNORED_INPUTS:
            raise ValueError(f"{name} cannot be used with self-speculation; leave it out")


def check_exit_layer(model: Any, exit_layer: Any) -> int:
    """The exit layer that is asked for, or recommended.

    Raises:
        ValueError: there is none, or none of that number.
    """
    depth = len(decoder_of(model).layers)
    if exit_layer is None:
        exit_layer = _recommended(model, "exit_layer", EXIT_LAYER)
        if exit_layer is None:
            raise ValueError(f"exit_layer is needed: the number of layers that draft, 1 to {depth - 1}")
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or not 0 < exit_layer < depth:
        raise ValueError(f"exit_layer is {exit_layer!r}; the model has {depth} layers, so give 1 to {depth - 1}")
    return exit_layer


def check_num_draft_tokens(model: Any, number: Any) -> int:
    """The draft length that is asked for, or recommended.

    Raises:
        ValueError: it is no number of at least 1.
    """
    if number is None:
        number = _recommended(model, "num_draft_tokens", NUM_DRAFT_TOKENS)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"num_draft_tokens is {number!r}; it must be a whole number of at least 1")
    return number


def _recommended(model: Any, name: str, otherwise: int | None) -> Any:
    found = (getattr(model.config, "hopskip", None) or {}).get(name)
    return otherwise if found is None else found


def rewindable(cache: Any, use_cache: Any) -> DynamicCache:
    """The cache given, which can be cut back, or a new one. One that is still empty keeps whole texts from now on,
    where it had windows.

    Raises:
        ValueError: it may not be used, or cannot be cut back.
    """
    if use_cache is False:
        raise ValueError("use_cache is False, but self-speculation needs a cache; leave it out")
    if cache is None:  # older versions of transformers leave it to the model
        return DynamicCache()
    is_dynamic = isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    if not is_dynamic or getattr(cache, "offloading", False):
        raise ValueError(
            f"a {type(cache).__name__} on this cache_implementation cannot be cut back to what was accepted; leave "
            "cache_implementation out, or give a DynamicCache"
        )
    if any(layer.is_sliding for layer in cache.layers):
        if cache.get_seq_length() == 0:
            cache.layers[:] = [DynamicLayer() for _ in cache.layers]
        elif hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        else:
            raise ValueError("a cache of sliding windows cannot be cut back; give DynamicCache() without a config")
    return cache
