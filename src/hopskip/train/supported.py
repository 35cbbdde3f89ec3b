"""What LayerSkip training works with. Everything else is refused before weights are loaded, in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import ParallelMode

from hopskip.checkpoint.families import SUPPORTED_MODEL_TYPES
from hopskip.errors import ConfigError

TIED = "head and embedding are one matrix in this model; leave it out of the adapter's target_modules"
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""Implementations whose masks are tensors with a row for each sample."""


def check_attention(name: str) -> None:
    """Raises ConfigError for an implementation of attention that cannot train with dropped samples."""
    if name not in ATTENTION:
        raise ConfigError(
            f"attn_implementation {name!r} has masks that cannot be selected by sample; use one of "
            f"{', '.join(ATTENTION)}"
        )


def check_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that would train something else, or that fail once the model is loaded.

    Raises:
        ConfigError: one of them; the message names it and what to do.
    """
    for is_set, message in _refusals(args):
        if is_set:
            raise ConfigError(message)
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ConfigError(f"report_to: {' '.join(str(error).split())}") from None
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        if not re.search(r"\bmodel\b", str(error)):  # some need it to tell
            raise ConfigError(f"optim {args.optim.value!r}: {' '.join(str(error).split())}") from None


def _refusals(args: TrainingArguments) -> list[tuple[bool, str]]:
    checkpointing: dict[str, Any] = {}
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # an older and a newer name
        checkpointing |= getattr(args, name, None) or {}
    fsdp: Any = args.fsdp_config or {}
    return [
        (
            args.n_gpu > 1,
            f"{args.n_gpu} GPUs are visible to one process, which nn.DataParallel would share: start one process for "
            "each with torchrun, or make one visible (CUDA_VISIBLE_DEVICES=0)",
        ),
        (
            args.label_smoothing_factor != 0,
            f"label_smoothing_factor is {args.label_smoothing_factor}: the exits learn without it; leave it out",
        ),
        (
            args.deepspeed is not None or getattr(args, "deepspeed_plugin", None) is not None,
            "deepspeed does not work here: it shards weights that the exits' loss needs; use FSDP2 (fsdp: true)",
        ),
        (
            getattr(args, "parallelism_config", None) is not None,
            "parallelism_config does not work here: ranks that share a batch would drop different samples; use FSDP2 "
            "(fsdp: true)",
        ),
        (
            bool(args.fsdp) and int(fsdp.get("version", fsdp.get("fsdp_version", 2))) != 2,
            "fsdp_config.version 1 flattens the weights that the exits' loss needs; use version 2",
        ),
        (
            bool(args.fsdp) and args.parallel_mode != ParallelMode.DISTRIBUTED,
            "fsdp needs several processes: start them with torchrun, or leave it out",
        ),
        (
            args.torch_compile,
            "torch_compile does not work here: which samples a layer drops changes with every step; leave it out",
        ),
        (
            args.use_liger_kernel,
            "use_liger_kernel replaces the forward pass in which the exits' loss is computed; leave it out",
        ),
        (
            bool(checkpointing.get("use_reentrant")),
            "use_reentrant=True loses the gradient of the exits; leave it out",
        ),
        (
            args.fp16 and args.device.type == "cpu",
            "fp16 needs a GPU; use bf16: true",
        ),
    ]


def check_model(trainer: Any) -> None:
    """Refuse what a Trainer was given and cannot be trained by the recipe.

    Raises:
        ConfigError: the model, its adapter or its placement is not supported.
    """
    model = causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model_type {model_type!r} cannot be trained; hopskip trains and runs: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    assert config is not None
    if config.num_hidden_layers < 2:
        raise ConfigError(f"the model has {config.num_hidden_layers} layer, so no early exit; use one with more")
    check_attention(config._attn_implementation)
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ConfigError(f"fsdp divides nothing among devices of type {trainer.args.device.type}; leave it out")
    if trainer.args.n_gpu > 1 or trainer.is_model_parallel:
        raise ConfigError("the model is spread over several GPUs by one process; start torchrun, with FSDP2")
    if (
        trainer.is_deepspeed_enabled
        or getattr(trainer.accelerator, "parallelism_config", None) is not None
        or getattr(trainer, "is_distributed_loading_by_transformers", False)
        or (getattr(model, "_tp_size", None) or 1) > 1
    ):
        raise ConfigError("DeepSpeed, tensor and context parallelism do not work here; use FSDP2 (fsdp: true)")
    check_tied_adapters(model)
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    if trained & {torch.bfloat16, torch.float16}:
        warnings.warn(
            "trainable weights are in half precision: most updates are smaller than half a step of it and will be "
            "lost; load the model in float32 (with bf16=True only arithmetic is bfloat16), or train adapters",
            stacklevel=4,
        )
    if config._attn_implementation.startswith("flash") and torch.float32 in trained and not trainer.args.bf16:
        warnings.warn("flash attention needs bf16 or fp16; set bf16: true", stacklevel=4)


def check_tied_adapters(model: Any) -> None:
    """Raises ConfigError for an adapter on the head or the embedding of a model that ties them: merged into the one
    matrix that both are, it would change the other too."""
    if not model.config.tie_word_embeddings:
        return
    for name, module in (("embed_tokens", model.get_input_embeddings()), ("lm_head", model.get_output_embeddings())):
        if hasattr(module, "base_layer"):
            raise ConfigError(f"an adapter of {name!r} cannot be merged: {TIED}")


def check_batch(inputs: Mapping[str, Any], config: Any) -> None:
    """Raises ConfigError for a batch without labels, or one whose packed documents would see each other."""
    if inputs.get("labels") is None:
        raise ConfigError(f"a batch has no labels, but {sorted(inputs)}: the exits have nothing to learn from")
    positions = inputs.get("position_ids")
    is_flash = config._attn_implementation.startswith("flash")
    if is_flash and positions is not None and len(positions) > 1 and bool((positions.diff(dim=-1) != 1).any()):
        raise ConfigError(
            f"{config._attn_implementation} keeps packed documents apart in batches of one row only, and this one has "
            f"{len(positions)}; use attn_implementation sdpa, or batches of one row"
        )


def causal_lm(model: Any) -> Any:
    """The transformers model itself, out of its PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
