"""A recipe from start to end: load, train (or go on where an earlier run stopped), measure, export."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import ConfigError, TrainingError
from hopskip.train.base import add_lora, check_base, load_base
from hopskip.train.checkpoint import clean, last_checkpoint, replacing
from hopskip.train.data import collate, load_rows
from hopskip.train.plot import plot_exits
from hopskip.train.read import check_sources
from hopskip.train.recipe import ModelRecipe, Recipe, parse_yaml
from hopskip.train.report import RunLog, measured_exits, model_card, read_log, recommend
from hopskip.train.supported import causal_lm, check_arguments
from hopskip.train.trainer import LayerSkipTrainer

_MAY_CHANGE = (
    "draft",
    "save_dtype",
    "output",
    *(f"training.{kind}_" for kind in ("save", "logging", "eval", "report")),
)
"""Settings that may differ when a run is resumed: they do not change what is computed."""


def run(recipe: Recipe) -> Path:
    """Train as the recipe says; returns the folder of the finished model, `output`/model.

    If the output folder holds an unfinished run of the same recipe, it goes on at its last checkpoint. Under `torchrun`
    or `accelerate launch` every process calls this.

    Raises:
        ConfigError: the recipe cannot work, or the output folder holds a run of another recipe.
        CheckpointError: the model to start from cannot be read.
        TrainingError: the loss is not a number, or a checkpoint cannot be written.
    """
    output = Path(recipe.output)
    arguments = training_arguments(recipe)
    check_sources(recipe.data)
    check_base(recipe)
    _quieten()
    if arguments.process_index == 0:
        _prepare(output, recipe)
    with arguments.main_process_first(desc="looking for an earlier run"):
        resume = last_checkpoint(output)
    set_seed(arguments.seed)  # before anything random: fresh weights, LoRA's
    # with FSDP the first process reads the weights and sends each its shard
    fills_in = bool((arguments.fsdp_config or {}).get("cpu_ram_efficient_loading"))
    is_filled_in = bool(arguments.fsdp) and fills_in and arguments.process_index > 0
    model, tokenizer = load_base(recipe.model, only_shapes=is_filled_in)
    context = ModelConfig.from_hf(model.config.to_dict()).context_length
    train_rows = load_rows(recipe.data, tokenizer, context)
    eval_rows = load_rows(recipe.data, tokenizer, context, held_out=True) if recipe.data.has_eval else None
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
    log = RunLog(output / "log.jsonl")
    trainer = LayerSkipTrainer(
        model,
        arguments,
        layerskip=recipe.layerskip,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[log],
    )
    _drop_printer(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if eval_rows is not None:
            trainer.evaluate()
    finally:
        log.close()
    finish(trainer, tokenizer, recipe, output)
    return output / "model"


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `training` with our defaults.

    Raises:
        ConfigError: transformers refuses a value, or LayerSkip training does not work with it.
    """
    arguments = unchecked_arguments(recipe)
    check_arguments(arguments)
    return arguments


def unchecked_arguments(recipe: Recipe) -> TrainingArguments:
    """As `training_arguments`, for a machine that need not be this one."""
    settings: dict[str, Any] = {
        **{"report_to": "none", "logging_steps": 10, "save_steps": 500, "save_total_limit": 2},
        "ddp_find_unused_parameters": False,  # a layer without samples still takes part, see LayerTaps
        # YAML reads a bare `no` as false
        **{
            name: "no" if name.endswith("_strategy") and value is False else value
            for name, value in recipe.training.items()
        },
    }
    if settings["report_to"] is False:
        settings["report_to"] = "none"
    if settings.get("fsdp") and not isinstance(settings.get("fsdp_config"), str):
        # only the first process reads weights; each saves its shard
        own = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
        settings["fsdp_config"] = {**own, **(settings.get("fsdp_config") or {})}
    try:
        return TrainingArguments(output_dir=recipe.output, disable_tqdm=True, **settings)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None


def finish(trainer: LayerSkipTrainer, tokenizer: Any, recipe: Recipe, output: Path) -> None:
    """Write the finished model, its card and the plot. Every process calls this; the first one writes."""
    state = None
    if trainer.is_fsdp_enabled:
        shards = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in shards.items()
        }
        if trainer.model.config.tie_word_embeddings:  # gathered twice, but one matrix
            state = {name: v for name, v in state.items() if not name.endswith("lm_head.weight")}
    if trainer.is_world_process_zero():
        log = read_log(output / "log.jsonl")
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if recipe.lora is not None:
            with replacing(output / "adapter") as partial:
                trained.save_pretrained(partial, state_dict=state)
            trained, state = merge_adapter(recipe.model, output / "adapter"), None
        model = causal_lm(trained)
        exits = measured_exits(log, model.config.num_hidden_layers)
        draft = _recommendation(recipe, model.config.to_dict(), exits)
        if draft:
            model.config.hopskip = draft
        model.config.use_cache = True  # the Trainer turns it off
        if recipe.save_dtype is not None:
            dtype = getattr(torch, recipe.save_dtype)
            model.to(dtype)
            state = {name: value.to(dtype) for name, value in state.items()} if state else None
        card = model_card(
            name=output.name,
            base=recipe.model.base or "from scratch",
            settings=_yaml(recipe),
            exits=exits,
            draft=draft,
        )
        with replacing(output / "model") as partial:
            model.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
        plot_exits(log, output / "plot.png")
    trainer.accelerator.wait_for_everyone()


def merge_adapter(base: ModelRecipe, adapter: Path) -> Any:
    """The base model with a trained adapter worked into its weights, as a transformers model on the CPU."""
    from peft import PeftModel

    model, _ = load_base(base)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _prepare(output: Path, recipe: Recipe) -> None:
    """Make the output folder ready for a new run or the rest of an old one."""
    stored = output / "recipe.yaml"
    try:
        output.mkdir(parents=True, exist_ok=True)
        clean(output)
        if stored.exists():
            old = parse_yaml(stored.read_text(encoding="utf-8"), str(stored))
            changed = sorted(key for key in _differences(old, recipe.as_dict()) if not key.startswith(_MAY_CHANGE))
            if changed:
                raise ConfigError(
                    f"{output} holds a run with other settings ({', '.join(changed)}); give another output, or "
                    "delete it"
                )
        stored.write_text(_yaml(recipe), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"output {str(output)!r} cannot be written ({error}); give another folder") from None


def _differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {*old, *new}:
            yield from _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    elif old != new:
        yield place


def _yaml(recipe: Recipe) -> str:
    import yaml

    text: str = yaml.safe_dump(recipe.as_dict(), sort_keys=False)
    return text


def _recommendation(
    recipe: Recipe, config: Mapping[str, Any], exits: Mapping[int, tuple[float, float]]
) -> dict[str, int]:
    """`exit_layer` and `num_draft_tokens` for config.json, empty where nothing was said or measured."""
    shape = ModelConfig.from_hf(config)
    chosen = recipe.draft
    agreement = {e: share for e, (_, share) in exits.items() if chosen.exit_layer in (None, e)}
    best = recommend(agreement, shape.num_hidden_layers, shape.num_head_parameters / shape.num_layer_parameters)
    exit_layer = chosen.exit_layer or (best and best[0])
    length = chosen.num_draft_tokens or (best and best[1])
    return {"exit_layer": exit_layer, "num_draft_tokens": length} if exit_layer and length else {}


def _drop_printer(trainer: LayerSkipTrainer) -> None:
    """The Trainer prints every log line itself where it shows no bar."""
    from transformers import PrinterCallback

    with contextlib.suppress(ValueError):
        trainer.remove_callback(PrinterCallback)


def _quieten() -> None:
    """What these libraries say to each other would stand between our lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|accelerate|peft)")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
