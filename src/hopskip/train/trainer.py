"""`LayerSkipMixin`: layer dropout and early-exit losses for any of transformers' Trainers; `LayerSkipTrainer` with the
plain one.

Everything else is the Trainer's own: gradient accumulation, mixed precision, gradient checkpointing, DDP and FSDP2
through accelerate, PEFT, loggers, resuming. The exits' loss is computed inside the model's forward pass, behind its
decoder, because there, and only there, DDP and FSDP have the weights of norm and head in place. Nothing stays on the
model: outside of a training step, and of the loss of an evaluation, it is the model that it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hopskip.errors import ConfigError, TrainingError
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.data import StreamedRows
from hopskip.train.dropout import LayerTaps, draw_kept
from hopskip.train.loss import ExitLosses, ExitTerm, exit_loss
from hopskip.train.saving import WholeCheckpoints
from hopskip.train.speed import Throughput, peak_flops, training_flops
from hopskip.train.supported import causal_lm, check_arguments, check_batch, check_model
from hopskip.train.unembed import sparse_embedding


@dataclass
class LayerSkipConfig(LayerSkipRecipe, TrainingArguments):  # type: ignore[misc]
    """transformers' `TrainingArguments` with the recipe's settings beside them: for `HfArgumentParser`, TRL's
    `TrlParser`, and sweeps. For another trainer's arguments:

        @dataclass
        class MyConfig(SFTConfig, LayerSkipConfig):
            pass
    """

    def __post_init__(self) -> None:
        LayerSkipRecipe.__post_init__(self)
        super(LayerSkipRecipe, self).__post_init__()


class LayerSkipMixin(WholeCheckpoints):
    """Makes a Trainer train a causal language model of the Llama family so that its early layers can draft.

    `class MySFT(LayerSkipMixin, SFTTrainer)`: the mixin comes first. The loss of the other Trainer is taken as that of
    the last layer, whatever it is, and the exits' losses on `labels` are added to it.

    Args:
        *arguments, **options: the other Trainer's. Its arguments are not changed.
        layerskip: the recipe, unless the training arguments are a `LayerSkipConfig`, which then is the recipe.

    Logs carry, for every exit E that was on, `exit<E>_loss` (cross-entropy) and `exit<E>_agreement` (share of positions
    where its best token is the last layer's: an estimate of the acceptance rate when drafting from there). Evaluation
    measures every exit, without dropout.

    Raises:
        ConfigError: the model cannot be trained so, or an argument contradicts the recipe.
        TrainingError: from `train`: the loss is not a number, or a checkpoint cannot be written.
    """

    def __init__(self, *arguments: Any, layerskip: LayerSkipRecipe | None = None, **options: Any) -> None:
        args = options["args"] if "args" in options else (*arguments, None, None)[1]
        if isinstance(args, LayerSkipRecipe) and layerskip is not None:
            raise ConfigError("the recipe is given twice, as layerskip and within args; leave one of them out")
        if args is not None:
            check_arguments(args)
        super().__init__(*arguments, **options)
        self.layerskip = self.args if isinstance(self.args, LayerSkipRecipe) else layerskip or LayerSkipRecipe()
        check_model(self)
        self.num_layers: int = self._causal_lm().config.num_hidden_layers
        self.layerskip.exits_on(0, 1, self.num_layers)  # refuses exits that this model lacks
        # with nothing between this class and the plain Trainer, the last layer's loss is ours to compute as well
        self._is_plain = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        if self._is_plain and self.compute_loss_func is not None:
            raise ConfigError("compute_loss_func would leave the exits without a loss; override compute_loss instead")
        self._taps: LayerTaps | None = None  # of the training step under way
        self._losses = ExitLosses(self.num_layers)
        self._eval_losses: ExitLosses | None = None
        self._wants_logits = False
        self._micro_step = (-1, 0)  # the step, and passes made in it
        self._throughput = Throughput()
        self._peak_flops: float | None = None

    def _causal_lm(self) -> Any:
        return causal_lm(self.accelerator.unwrap_model(self.model))

    # The loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._taps = LayerTaps(self._causal_lm().model.layers)
        try:
            with self._taps.attached():  # for the backward pass too
                loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            self._taps = None
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} in step {self.state.global_step}: lower the learning rate, or look at the "
                f"data there; {self._way_back()}"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one (micro-)batch: choose samples and exits, then let the other Trainer call the model."""
        check_batch(inputs, self._causal_lm().config)
        last = self.num_layers - 1
        if model.training:
            weights = self.layerskip.loss_weights(self.state.global_step, self.state.max_steps, self.num_layers)
            losses: ExitLosses | None = self._losses
            layers = [layer for layer in reversed(range(last)) if weights[layer] > 0]
        else:
            weights, losses = [0.0] * last + [1.0], self._eval_losses
            layers = [] if losses is None else list(reversed(range(last)))
        ce, kl = self.layerskip.ce_weight, self.layerskip.kl_weight
        terms = [
            ExitTerm(layer=last, weight=weights[last] if self._is_plain else 0.0),
            *(ExitTerm(layer=layer, weight=weights[layer], ce_weight=ce, kl_weight=kl) for layer in layers),
        ]
        if model.training:
            num_samples, length = inputs["input_ids"].shape
            flops = training_flops(self._causal_lm(), num_samples * length, length, len(terms))
            self._throughput.begin(num_samples * length, flops)
        taps = self._taps or LayerTaps(self._causal_lm().model.layers)
        taps.drop(self._draw(model, inputs), len(inputs["input_ids"]), inputs["input_ids"].device)
        inputs = dict(inputs)
        if self._is_plain and not self._wants_logits:
            # no logits from the model itself: it is asked for those of no position
            inputs["logits_to_keep"] = inputs["input_ids"].new_empty(0)
        labels_BT = inputs["labels"] if model.training else self._not_seen_before(inputs["labels"])
        with self._measuring(taps, terms, labels_BT, num_items_in_batch, losses) as measured:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own = result[0] if return_outputs else result
        if measured.loss is None or (self._is_plain and not measured.is_asked_for):
            raise ConfigError(
                "the model's forward pass was replaced by one that does not run its decoder or ask for its loss; train "
                "it without what replaces it"
            )
        if self._is_plain:
            return result
        loss = own * weights[last]
        if model.training:
            scales = self.args.average_tokens_across_devices and num_items_in_batch is not None
            loss = loss + measured.loss * (self.accelerator.num_processes if scales else 1)
        return (loss, result[1]) if return_outputs else loss

    def _draw(self, model: nn.Module, inputs: dict[str, Any]) -> list[list[int]] | None:
        """The samples that each layer keeps; None where nothing is dropped."""
        if not model.training:
            return None
        step = self.state.global_step
        micro_step = self._micro_step[1] + 1 if self._micro_step[0] == step else 0
        self._micro_step = (step, micro_step)
        rates = self.layerskip.dropout_rates(step, self.state.max_steps, self.num_layers)
        if not any(rates):
            return None
        rank = 0 if self.layerskip.same_dropout_on_every_rank else self.args.process_index
        return draw_kept(rates, len(inputs["input_ids"]), self.args.seed, step, micro_step, rank)

    def _not_seen_before(self, labels_BT: Tensor) -> Tensor:
        """The labels of an evaluation without those of rows that accelerate repeats, so that the last batches of all
        ranks are alike."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels_BT
        number = max(0, state.remainder - self.args.process_index * self.args.eval_batch_size)
        labels_BT = labels_BT.clone()
        labels_BT[number:] = -100
        return labels_BT

    @contextmanager
    def _measuring(
        self,
        taps: LayerTaps,
        terms: list[ExitTerm],
        labels_BT: Tensor,
        num_items: Tensor | int | None,
        losses: ExitLosses | None,
    ) -> Iterator[_Measured]:
        """Within the block, the model's first pass computes the exits' loss behind its decoder; a plain Trainer gets
        it from the model in place of its own cross-entropy."""
        lm = self._causal_lm()
        measured = _Measured()
        if num_items is None:
            num_items = labels_BT[:, 1:].ne(-100).sum().clamp(min=1)

        def after_decoder(*_: Any) -> None:
            if measured.loss is None:
                measured.loss = exit_loss(
                    taps.outputs,
                    labels_BT,
                    terms,
                    lm.model.norm,
                    lm.lm_head,
                    num_items=num_items,
                    chunk_tokens=self.layerskip.chunk_tokens,
                    losses=losses,
                )

        before = vars(lm).get("_loss_function")
        hook = lm.model.register_forward_hook(after_decoder)
        if self._is_plain:
            lm.loss_function = measured.loss_function
        try:
            with taps.collect([term.layer for term in terms]), sparse_embedding(lm):
                yield measured
        finally:
            hook.remove()
            if self._is_plain:
                del lm._loss_function
                if before is not None:
                    lm.loss_function = before

    # Evaluation and logs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        self._wants_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._wants_logits = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._eval_losses = ExitLosses(self.num_layers)
        self._throughput.pause()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            measured = self._exit_logs(self._eval_losses)
        finally:
            self._eval_losses = None
        if self._is_plain and measured:
            # the Trainer's mean of batch means counts a short batch as much as a long one
            output.metrics[f"{metric_key_prefix}_loss"] = measured.pop(f"exit{self.num_layers}_loss")
            del measured[f"exit{self.num_layers}_agreement"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._exit_logs(self._losses))
            self._losses = ExitLosses(self.num_layers)
            logs.update(self._speed_logs())
        super().log(logs, *args, **kwargs)

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

    def _speed_logs(self) -> dict[str, float]:
        """Tokens a second of all ranks, padding included, and how much of their arithmetic that is."""
        taken = torch.tensor(self._throughput.take(), dtype=torch.float32, device=self.args.device)
        tokens, flops, seconds = (self.accelerator.reduce(taken, "sum") / self.args.world_size).tolist()
        if not seconds:
            return {}
        if self._peak_flops is None:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            self._peak_flops = peak_flops(self.args.device, dtype)
        mfu = flops / seconds / self._peak_flops
        return {"tokens_per_second": tokens / seconds * self.args.world_size, "mfu": mfu}

    # Data

    def get_train_dataloader(self) -> Any:
        """A stream is shared out here: accelerate would have every rank read all of it."""
        rows = self.train_dataset
        if not isinstance(rows, StreamedRows):
            return super().get_train_dataloader()
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return DataLoader(
            rows.endless(rank=args.process_index, num_ranks=args.world_size, seed=seed),
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            **{
                name: getattr(args, f"dataloader_{name}")
                for name in (
                    "num_workers",
                    "persistent_workers",
                    "prefetch_factor",
                    "multiprocessing_context",
                    "in_order",
                )
                if hasattr(args, f"dataloader_{name}")  # the last two came late
            },
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # a finished run, resumed: the Trainer would make one step
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._throughput.pause()
        super()._save_checkpoint(model, trial)


class _Measured:
    """What one forward pass left."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.is_asked_for = False

    def loss_function(self, **_: Any) -> Tensor | None:
        self.is_asked_for = True
        return self.loss


class LayerSkipTrainer(LayerSkipMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the recipe, see `LayerSkipMixin`. Here `eval_loss` is the last layer's cross-entropy,
    as a mean over tokens, and no logits are made that nobody asked for.

    Args:
        model: a transformers model (Llama, Mistral, Qwen2, Qwen3), or a PEFT model around one.
        args: `TrainingArguments`, or a `LayerSkipConfig`.
        layerskip: the recipe, where `args` are not a `LayerSkipConfig`.
        **kwargs: passed on to `Trainer` (data sets, collator, callbacks, metrics, ...).
    """
