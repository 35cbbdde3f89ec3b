"""`LayerSkipTrainer`: transformers' Trainer with layer dropout and early-exit losses.

Everything else is the Trainer's own: gradient accumulation, mixed precision, gradient checkpointing, DDP and FSDP2
through accelerate, PEFT, loggers, resuming. The loss is computed inside the model's forward pass, through its
`loss_function`, because there, and only there, DDP and FSDP have the weights of norm and head in place.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from hopskip.checkpoint.families import SUPPORTED_MODEL_TYPES
from hopskip.errors import ConfigError, TrainingError
from hopskip.train.checkpoint import PARTIAL, last_checkpoint, replacing
from hopskip.train.curriculum import LayerSkipConfig
from hopskip.train.dropout import LayerTaps, draw_kept
from hopskip.train.loss import ExitLosses, ExitTerm, exit_loss
from hopskip.train.unembed import sparse_embedding

_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""Implementations whose masks are tensors with a row for each sample."""


class LayerSkipTrainer(Trainer):  # type: ignore[misc]
    """Trains a causal language model of the Llama family so that its early layers can draft.

    Args:
        model: a transformers model (Llama, Mistral, Qwen2, Qwen3), or a PEFT model around one.
        args: the Trainer's own. `remove_unused_columns` and `prediction_loss_only` are set as this class needs them.
        layerskip: the recipe.
        **kwargs: passed on to `Trainer` (data sets, collator, callbacks, ...).

    Logs carry, for every exit E that was on, `exit<E>_loss` (cross-entropy) and `exit<E>_agreement` (share of positions
    where its best token is the last layer's: an estimate of the acceptance rate when drafting from there). Evaluation
    measures every exit, without dropout; `eval_loss` is the last layer's cross-entropy.

    Raises:
        ConfigError: the model cannot be trained so, or an argument contradicts the recipe.
        TrainingError: from `train`: the loss is not a number, or a checkpoint cannot be written.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, layerskip: LayerSkipConfig | None = None, **kwargs: Any
    ) -> None:
        self.layerskip = layerskip or LayerSkipConfig()
        self.causal_lm = causal_lm(model)
        _check(self.causal_lm, args)
        args.remove_unused_columns = False
        args.prediction_loss_only = True
        args.logging_nan_inf_filter = False  # a loss that is not a number ends the run; it is not averaged away
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # a layer without samples still takes part, see LayerTaps
        super().__init__(model=model, args=args, **kwargs)
        self.num_layers: int = self.causal_lm.config.num_hidden_layers
        self.layerskip.exits_on(0, 1, self.num_layers)  # refuses exits that this model lacks
        self._taps = LayerTaps(self.causal_lm.model.layers)
        self.causal_lm.loss_function = self._loss_function
        self._terms: list[ExitTerm] = []
        self._losses = ExitLosses(self.num_layers)
        self._eval_losses: ExitLosses | None = None
        self._micro_step = (-1, 0)  # the step, and passes made in it
        self._is_saving = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one (micro-)batch: choose samples and exits, then let the Trainer call the model."""
        step, num_samples = self.state.global_step, len(inputs["input_ids"])
        kept = None
        if model.training:
            self._terms = self._training_terms(step)
            rates = self.layerskip.dropout_rates(step, self.state.max_steps, self.num_layers)
            micro_step = self._micro_step[1] + 1 if self._micro_step[0] == step else 0
            self._micro_step = (step, micro_step)
            if any(rates):
                rank = 0 if self.layerskip.same_dropout_on_every_rank else self.args.process_index
                kept = draw_kept(rates, num_samples, self.args.seed, step, micro_step, rank)
        else:
            last = self.num_layers - 1
            self._terms = [ExitTerm(layer=layer, weight=float(layer == last)) for layer in range(last, -1, -1)]
        self._taps.drop(kept, num_samples, inputs["input_ids"].device)
        # no logits from the model itself: it is asked for those of no position
        inputs = {**inputs, "logits_to_keep": inputs["input_ids"].new_empty(0)}
        with self._taps.collect([term.layer for term in self._terms]), sparse_embedding(self.causal_lm):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _training_terms(self, step: int) -> list[ExitTerm]:
        """The last layer first, then every exit that is on and counts."""
        weights = self.layerskip.exit_weights(step, self.state.max_steps, self.num_layers)
        last = self.num_layers - 1
        ce, kl = self.layerskip.ce_weight, self.layerskip.kl_weight
        exits = [
            ExitTerm(layer=layer, weight=weights[layer], ce_weight=ce, kl_weight=kl)
            for layer in reversed(range(last))
            if weights[layer] > 0
        ]
        return [ExitTerm(layer=last, weight=weights[last]), *exits]

    def _loss_function(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Called by the model at the end of its forward pass, in place of its own cross-entropy."""
        if num_items_in_batch is None:
            num_items_in_batch = labels[:, 1:].ne(-100).sum().clamp(min=1)
        losses = self._losses if self.causal_lm.training else self._eval_losses
        return exit_loss(
            self._taps.outputs,
            labels,
            self._terms,
            self.causal_lm.model.norm,
            self.causal_lm.lm_head,
            num_items=num_items_in_batch,
            chunk_tokens=self.layerskip.chunk_tokens,
            losses=losses,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} in step {self.state.global_step}: lower the learning rate, or look at the "
                f"data there; {self._way_back()}"
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._eval_losses = ExitLosses(self.num_layers)
        try:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            self._eval_losses = None
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._exit_logs(self._losses)
            self._losses = ExitLosses(self.num_layers)
        elif "eval_loss" in logs and self._eval_losses is not None:
            measured = self._exit_logs(self._eval_losses)
            logs |= {f"eval_{name}": value for name, value in measured.items()}
            # the Trainer's mean of batch means counts a short batch as much as a long one
            logs["eval_loss"] = logs.pop(f"eval_exit{self.num_layers}_loss")
            del logs[f"eval_exit{self.num_layers}_agreement"]
        super().log(logs, start_time)

    def _exit_logs(self, losses: ExitLosses) -> dict[str, float]:
        """Means over all ranks, by exit: E = layer + 1 layers are run."""
        sums = losses.sums.float() if self.args.device.type == "mps" else losses.sums
        reduced = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        logs = {}
        for layer, (ce, agreeing, tokens) in enumerate(reduced):
            if tokens:
                logs[f"exit{layer + 1}_loss"] = ce / tokens
                logs[f"exit{layer + 1}_agreement"] = agreeing / tokens
        return logs

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run, resumed: the Trainer would make one step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # Checkpoints: the Trainer's own, but written beside their place and renamed when complete.

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        weights = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if not all(_is_finite(parameter) for parameter in weights):
            raise TrainingError(
                f"weights are not numbers after step {self.state.global_step}, so no checkpoint is written: lower the "
                f"learning rate, or set max_grad_norm; {self._way_back()}"
            )
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._is_saving = True
        try:
            if self.args.should_save:
                with replacing(folder):
                    self.accelerator.wait_for_everyone()
                    super()._save_checkpoint(model, trial)
                    self.accelerator.wait_for_everyone()
            else:
                self.accelerator.wait_for_everyone()  # not before the folder is empty
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            self._is_saving = False
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir, save_total_limit=self.args.save_total_limit, use_mtime=False
            )
        self.accelerator.wait_for_everyone()

    def _way_back(self) -> str:
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, out of its PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _is_finite(parameter: Tensor) -> bool:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a shard, under FSDP
    return bool(local.isfinite().all())


def _check(model: Any, args: TrainingArguments) -> None:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model_type {model_type!r} cannot be trained; hopskip trains and runs: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    assert config is not None
    if config.num_hidden_layers < 2:
        raise ConfigError(f"the model has {config.num_hidden_layers} layer, so no early exit; use one with more")
    if config._attn_implementation not in _ATTENTION:
        raise ConfigError(
            f"attn_implementation {config._attn_implementation!r} has masks that cannot be selected by sample; use one "
            f"of {', '.join(_ATTENTION)}"
        )
    if args.load_best_model_at_end or args.push_to_hub:
        raise ConfigError("load_best_model_at_end and push_to_hub do not work here; leave them out")
    if (getattr(args, "gradient_checkpointing_kwargs", None) or {}).get("use_reentrant"):
        raise ConfigError("use_reentrant=True loses the gradient of the exits; leave it out")
    if config._attn_implementation.startswith("flash") and config.torch_dtype == torch.float32 and not args.bf16:
        warnings.warn("flash attention needs bf16 or fp16; set bf16: true", stacklevel=3)
