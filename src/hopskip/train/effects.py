"""Recipes whose parts do not go together: settings without effect, and what would fail once the weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hopskip.errors import ConfigError
from hopskip.machine import require

OWN_ARGUMENTS = {
    "output_dir": "set `output`",
    "resume_from_checkpoint": "running the same command again resumes",
    "remove_unused_columns": "rows have no other columns",
    "label_names": "rows have labels",
    "prediction_loss_only": "hopskip sets it",
    "disable_tqdm": "hopskip has a progress bar of its own",
    "push_to_hub": "upload the finished folder: hf upload",
    "save_only_model": "a run cannot go on from such a checkpoint",
    "logging_nan_inf_filter": "a loss that is not a number ends the run",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it has no effect: leave it out"),
    **dict.fromkeys(
        (
            *("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_accumulation_steps"),
            "eval_use_gather_object",
        ),
        "only `compute_metrics` of the Python API uses it",
    ),
}
"""Fields of `TrainingArguments` that a recipe cannot set, and why."""

_EVALUATION = (
    *("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


def check_recipe(recipe: Any) -> None:
    """Refuse a `Recipe` before anything is loaded.

    Raises:
        ConfigError: a setting has no effect beside the others, or a package is missing.
    """
    if recipe.data.streaming and recipe.training.get("max_steps", -1) < 1:
        raise ConfigError("data.streaming has no length, so a recipe must say training.max_steps")
    for name, why in _without_effect(recipe):
        if name in recipe.training:
            raise ConfigError(f"training.{name} has no effect {why}")
    if not _is_off(recipe.training, "eval_strategy") and not recipe.data.has_eval:
        raise ConfigError("training.eval_strategy needs something to evaluate on: data.eval or data.holdout_every")
    _check_attention(recipe)
    require("matplotlib", "training", "train")
    if recipe.lora is not None:
        require("peft", "LoRA", "train")


def _without_effect(recipe: Any) -> Iterator[tuple[str, str]]:
    """Keys of `training`, and beside what each has no effect."""
    given: Mapping[str, Any] = recipe.training
    if recipe.data.streaming:
        for name in ("train_sampling_strategy", "group_by_length", "length_column_name", "dataloader_drop_last"):
            yield name, "on streamed data, which comes in the order of the source; use data.shuffle_buffer"
        if recipe.data.shuffle_buffer is None:
            yield "data_seed", "on streamed data without data.shuffle_buffer"
    if given.get("max_steps", -1) > 0:
        yield "num_train_epochs", "beside training.max_steps; leave one of them out"
    if not recipe.data.has_eval:
        for name in _EVALUATION:
            yield name, "without anything to evaluate on: data.eval or data.holdout_every"
    if given.get("eval_strategy", "no") != "steps":
        yield "eval_steps", "without training.eval_strategy: steps"
    if _is_off(given, "eval_strategy"):
        yield "eval_delay", "without training.eval_strategy"
    for kind in ("save", "logging"):
        if given.get(f"{kind}_strategy", "steps") != "steps":
            yield f"{kind}_steps", f"with training.{kind}_strategy: {given[f'{kind}_strategy']}"
    for checkpointing in ("gradient_checkpointing", "activation_checkpointing"):
        if _is_off(given, checkpointing):
            yield f"{checkpointing}_kwargs", f"without training.{checkpointing}: true"
    if _is_off(given, "fsdp"):
        yield "fsdp_config", "without training.fsdp: true"
    if _is_off(given, "dataloader_num_workers"):
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            yield name, "without training.dataloader_num_workers"
    if _is_off(given, "report_to"):
        for name in ("run_name", "project", "trackio_space_id"):
            yield name, "without training.report_to"
    if _is_off(given, "push_to_hub"):
        for name in (name for name in given if name.startswith("hub_")):
            yield name, "without training.push_to_hub"


def _is_off(given: Mapping[str, Any], name: str) -> bool:
    """Whether a setting is missing or says no, which YAML reads as false."""
    return given.get(name) in (None, False, "", "no", "none", [], 0)


def _check_attention(recipe: Any) -> None:
    from transformers.utils import is_flash_attn_2_available, is_kernels_available

    from hopskip.train.supported import check_attention

    name = recipe.model.attn_implementation
    check_attention(name)
    if not name.startswith("flash"):
        return
    sizes = {"per_device_train_batch_size": recipe.training.get("per_device_train_batch_size", 8)}
    if recipe.data.has_eval:
        sizes["per_device_eval_batch_size"] = recipe.training.get("per_device_eval_batch_size", 8)
    for key, size in sizes.items():
        if recipe.data.packing == "documents" and size > 1:
            raise ConfigError(
                f"{name} keeps packed documents apart in batches of one row only, but training.{key} is {size}; set it "
                "to 1, or use model.attn_implementation: sdpa"
            )
    if not (is_flash_attn_2_available() or is_kernels_available()):
        raise ConfigError(f"{name} needs a GPU and the package flash-attn or kernels; use sdpa")
