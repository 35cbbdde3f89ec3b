"""The model to start from, as transformers and peft have it: weights from any checkpoint that hopskip reads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hopskip.backends.torch.weights import copy_into
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import CheckpointError, ConfigError
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.recipe import LoraRecipe, ModelRecipe, Recipe
from hopskip.train.supported import TIED

_LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.2: their GGUF files hold the frequencies' divisors in place of these settings."""


_OURS = (
    *("rope", "qkv_bias", "qk_norm", "eos_token_ids"),
    *("recommended_exit_layer", "recommended_num_draft_tokens"),
)
"""Fields of `ModelConfig` that a Hugging Face config spells otherwise, or that follow from the family."""


def load_base(recipe: ModelRecipe, *, only_shapes: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a recipe, on the CPU.

    Args:
        only_shapes: leave the weights as they are in fresh memory, which takes none: FSDP fills in a rank's shard.

    Raises:
        CheckpointError: the base cannot be found, read, or expressed in transformers.
        ConfigError: a tokenizer or a config file is missing.
    """
    dtype = getattr(torch, recipe.dtype)
    if recipe.base is not None:
        model = to_transformers(open_checkpoint(_find(recipe.base)), dtype, only_shapes=only_shapes)
    else:
        assert recipe.config is not None
        model = _empty_model(_read_config(Path(recipe.config)), dtype, only_shapes)
    tokenizer = base_tokenizer(recipe)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; give the model's own "
            "(model.tokenizer)"
        )
    model.set_attn_implementation(recipe.attn_implementation)
    return model, tokenizer


def base_tokenizer(recipe: ModelRecipe) -> Any:
    """The tokenizer of a recipe.

    Raises:
        CheckpointError: there is none.
    """
    if recipe.tokenizer is not None:
        return load_transformers_tokenizer(_find(recipe.tokenizer))
    if recipe.base is not None:
        return load_transformers_tokenizer(_find(recipe.base))
    assert recipe.config is not None
    place = Path(recipe.config)
    return load_transformers_tokenizer(place if place.is_dir() else place.parent)


def base_config(recipe: ModelRecipe) -> Any:
    """transformers' description of a recipe's model. No weights are read, and none downloaded.

    Raises:
        CheckpointError: the base cannot be found, or hopskip cannot run it.
        ConfigError: `config` is no model's config.
    """
    from transformers import AutoConfig

    if recipe.config is not None:
        return _read_config(Path(recipe.config))
    assert recipe.base is not None
    is_name = recipe.base != "default" and not Path(recipe.base).exists() and recipe.base.count("/") == 1
    if is_name and not recipe.base.startswith((".", "/")):
        try:
            return AutoConfig.from_pretrained(recipe.base)
        except Exception as error:  # of many kinds: no network, unknown, gated
            raise CheckpointError(f"the config of {recipe.base} cannot be had ({_reason(error)})") from None
    place = Path(recipe.base)
    if place.is_dir() and (place / "config.json").exists():
        return _read_config(place)
    path = _find(recipe.base)
    return _read_config(path) if path.is_dir() else AutoConfig.for_model(**hf_config(open_checkpoint(path).config))


def _empty_model(config: Any, dtype: torch.dtype, only_shapes: bool) -> Any:
    """A model whose weights are random (the seed is the global one), or not there. Its buffers are."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False) if only_shapes else nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if only_shapes:
        model.tie_weights()  # each weight was replaced, a shared one twice
        materialize(model)
    return model


def materialize(model: torch.nn.Module) -> None:
    """Give what a model has on the meta device memory that nobody has written to, and so takes none. Shared weights
    stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                own[name] = made[id(tensor)]


def to_transformers(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, only_shapes: bool = False) -> Any:
    """An opened checkpoint, Hugging Face folder or GGUF file, as a transformers model with equal weights, or with none.

    Raises:
        CheckpointError: the settings of its positions cannot be expressed in a Hugging Face config.
    """
    from transformers import AutoConfig, GenerationConfig

    if checkpoint.path.is_dir():
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        config.tie_word_embeddings = checkpoint.config.tie_word_embeddings
        if hasattr(config, "quantization_config"):  # the weights are dequantized here
            del config.quantization_config
    else:
        config = AutoConfig.for_model(**hf_config(checkpoint.config))
    model = _empty_model(config, dtype, only_shapes)
    own = {name: parameter for name, parameter in model.named_parameters() if name in checkpoint.names()}
    assert own.keys() == checkpoint.names()
    if not only_shapes:
        with torch.no_grad():
            for name, parameter in own.items():
                copy_into(parameter, checkpoint, name)
    if checkpoint.path.is_dir() and (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    else:
        model.generation_config.eos_token_id = list(_eos_ids(checkpoint)) or None
    return model


def _read_config(place: Path) -> Any:
    """Of a `config.json`, or of a folder with one.

    Raises:
        ConfigError: there is no such file, or it is not a model's config.
        CheckpointError: hopskip cannot run that shape.
    """
    from transformers import AutoConfig

    if not place.exists():
        raise ConfigError(f"model.config {str(place)!r} does not exist; give a config.json")
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of many kinds
        raise ConfigError(f"model.config {str(place)!r} cannot be read ({_reason(error)})") from None
    ModelConfig.from_hf(config.to_dict())  # what we could not run is not worth training
    if hasattr(config, "quantization_config"):  # weights are dequantized when they are read
        del config.quantization_config
    return config


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Our description of a model as the fields of a Hugging Face config.

    Raises:
        CheckpointError: RoPE divisors that no known settings give.
    """
    fields = {name: value for name, value in vars(config).items() if name not in _OURS}
    if config.model_type != "mistral":
        del fields["sliding_window"]
    eos = list(config.eos_token_ids)
    return {**fields, "eos_token_id": eos[0] if len(eos) == 1 else eos or None, "rope_parameters": _rope(config.rope)}


def _rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.frequency_divisors:
        for factor in _LLAMA3_FACTORS:
            named = replace(
                rope, rope_type="llama3", factor=factor, original_max_position_embeddings=8192, frequency_divisors=()
            )
            if np.allclose(named.inverse_frequencies(), rope.inverse_frequencies(), rtol=1e-4):
                return _rope(named)
        raise CheckpointError("this GGUF file scales positions in a way that has no name; use the Hugging Face folder")
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": (
            *("factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
            *("beta_fast", "beta_slow", "truncate"),
        ),
    }[rope.rope_type]
    values = asdict(rope)
    chosen = {name: values[name] for name in names if values[name] is not None}
    return {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta, **chosen}


def load_transformers_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder or GGUF file as a transformers one, chat template and special tokens included.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path.is_file():
        own = load_tokenizer(path, open_checkpoint(path).config)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own.inner, **own.special_tokens)
        tokenizer.chat_template = own.chat_template
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # of many kinds
            raise CheckpointError(f"{path} has no tokenizer that transformers can read ({_reason(error)})") from None
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path} has no fast tokenizer; put a tokenizer.json there")
    return tokenizer


def check_base(recipe: Recipe) -> None:
    """Refuse, before weights are read, what a recipe asks of a model that it cannot do.

    Raises:
        CheckpointError: the base cannot be found, or hopskip cannot run it.
        ConfigError: the model lacks an exit, or ties the matrices of an adapter.
    """
    config = base_config(recipe.model)
    num_layers, draft = config.num_hidden_layers, recipe.draft.exit_layer
    recipe.layerskip.exits_on(0, 1, num_layers)
    if draft is not None and not 0 < draft < num_layers:
        raise ConfigError(f"draft.exit_layer is {draft}; the model has {num_layers} layers")
    targets = () if recipe.lora is None else recipe.lora.target_modules
    tied = sorted(name for name in targets if name.split(".")[-1] in ("lm_head", "embed_tokens"))
    if tied and config.tie_word_embeddings:
        raise ConfigError(f"lora.target_modules name {', '.join(tied)}: {TIED}")


def add_lora(model: Any, lora: LoraRecipe) -> Any:
    """The model in a PEFT wrapper that trains low-rank adapters only.

    Raises:
        ConfigError: peft is missing, or refuses the settings.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("LoRA needs the package peft: pip install 'hopskip[train]'") from None
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(lora).items() if v is not None}
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from None


def _find(name: str) -> Path:
    return find_model(None if name == "default" else name)


def _eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Of a GGUF file also those of its chat template, as the tokenizer finds them."""
    return load_tokenizer(checkpoint.path, checkpoint.config).eos_token_ids
