"""How much memory a training step takes, counted rather than guessed: the very model, loss and optimizer run on fake
tensors, which have shapes and no values.

B = samples, T = positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hopskip.errors import ConfigError
from hopskip.train.base import add_lora, materialize
from hopskip.train.dropout import LayerTaps
from hopskip.train.loss import ExitTerm, exit_loss
from hopskip.train.memory import CountedMemory
from hopskip.train.recipe import Recipe
from hopskip.train.supported import causal_lm
from hopskip.train.unembed import rows_at_once, sparse_embedding

CUDA_CONTEXT = 600 << 20
"""Bytes that a process takes on a GPU for itself."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one card."""

    weights: int
    gradients: int
    optimizer: int
    work: int
    """Activations, logits, and what is gathered or cast for a while: what the peak has beside the others."""
    context: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.work + self.context


def count_memory(
    recipe: Recipe, arguments: TrainingArguments, config: Any, *, num_cards: int, card: int, is_gpu: bool
) -> Memory:
    """The most memory that a training step takes on each card.

    Args:
        config: transformers' description of the model.
        num_cards: of all nodes together. With FSDP they divide the weights, else each has all of them.
        card: bytes of one, by which the loss chooses its chunks.

    Raises:
        ConfigError: the optimizer cannot be traced.
    """

    def count(rows: int) -> Memory:
        return _Trace(recipe, arguments, config, num_cards, rows).count(CUDA_CONTEXT if is_gpu else 0)

    if recipe.layerskip.chunk_tokens is not None:
        return count(recipe.layerskip.chunk_tokens)
    device = torch.device("cuda" if is_gpu else "cpu")
    least = rows_at_once(config.vocab_size, device, free=0)
    return count(rows_at_once(config.vocab_size, device, free=max(0, card - count(least).total)))


class _Trace:
    """A step on fake tensors: its last micro-step, beside gradients of earlier ones and the optimizer's state."""

    def __init__(self, recipe: Recipe, arguments: TrainingArguments, config: Any, num_cards: int, rows: int) -> None:
        self.recipe, self.arguments, self.config, self.rows = recipe, arguments, config, rows
        self.is_sharded = bool(arguments.fsdp) and num_cards > 1
        self.is_replicated = num_cards > 1 and not self.is_sharded
        kept = getattr(torch, recipe.model.dtype)
        # FSDP computes in 16 bits, and keeps weights, gradients and state as they were, divided among the cards
        self.dtype = torch.bfloat16 if self.is_sharded and arguments.bf16 else kept
        self.share = kept.itemsize / self.dtype.itemsize / num_cards if self.is_sharded else 1.0
        self.terms = _most_terms(recipe, arguments, config.num_hidden_layers)
        self.memory = CountedMemory()

    def count(self, context: int) -> Memory:
        model = self._model()
        with FakeTensorMode():
            materialize(model)
            memory = self.memory = CountedMemory([*model.parameters(), *model.buffers()])
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(self._shard_gradient)
            taps = LayerTaps(causal_lm(model).model.layers)
            with memory, _EverythingIsLearned(self.rows):
                optimizer = self._optimizer(model, trained)
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                    self._shard_gradient(parameter)
                gradients = memory.now
                optimizer.step()  # makes its state
                for state in _states(optimizer):
                    memory.weigh(state, self.share)
                states = memory.now - gradients
                if self.arguments.gradient_accumulation_steps == 1:
                    optimizer.zero_grad()
                memory.peak = memory.now
                self._micro_step(model, taps)
                if not self.is_sharded:  # with FSDP the optimizer's work is divided too
                    optimizer.step()
            work = memory.peak - states - gradients + (gradients if self.is_replicated else 0)  # DDP's buckets
            weights = sum(int(parameter.nbytes * self.share) for parameter in model.parameters())
            return Memory(
                weights=weights,
                gradients=gradients,
                optimizer=states,
                work=work + self._gathered(causal_lm(model)),
                context=context,
            )

    def _model(self) -> Any:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        # in memory, flash attention is what sdpa chooses by itself
        model.set_attn_implementation("eager" if self.recipe.model.attn_implementation == "eager" else "sdpa")
        recomputes = (self.arguments.fsdp_config or {}).get("activation_checkpointing", False)
        if self.arguments.gradient_checkpointing or recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.recipe.lora is not None:
            model = add_lora(model, self.recipe.lora)
        return model.train()

    def _optimizer(self, model: Any, trained: Sequence[Tensor]) -> torch.optim.Optimizer:
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.arguments, model)
            optimizer: torch.optim.Optimizer = kind(trained, **options)
        except Exception as error:  # of many kinds: a missing package, an optimizer for GPUs only
            raise ConfigError(
                f"the memory of training.optim {str(self.arguments.optim)!r} cannot be counted here "
                f"({str(error).splitlines()[0]}); try adamw_torch_fused"
            ) from None
        return optimizer

    def _micro_step(self, model: Any, taps: LayerTaps) -> None:
        causal, arguments, data = causal_lm(model), self.arguments, self.recipe.data
        shape = (arguments.per_device_train_batch_size, data.max_length)
        ids_BT = torch.zeros(shape, dtype=torch.long)
        inputs: dict[str, Tensor] = {"input_ids": ids_BT}
        if data.packing == "documents" and "flash" not in self.recipe.model.attn_implementation:
            inputs["attention_mask"] = torch.ones((shape[0], 1, shape[1], shape[1]), dtype=torch.bool)
        dtype = torch.float16 if arguments.fp16 else torch.bfloat16
        with (
            torch.autocast("cpu", dtype, enabled=arguments.bf16 or arguments.fp16),
            taps.collect([term.layer for term in self.terms]),
            sparse_embedding(causal),
        ):
            causal.model(**inputs, use_cache=False)
            loss = exit_loss(
                taps.outputs,
                ids_BT,
                self.terms,
                causal.model.norm,
                causal.lm_head,
                num_items=1.0,
                chunk_tokens=self.rows,
            )
        torch.autograd.backward(loss)

    def _shard_gradient(self, parameter: Tensor) -> None:
        if self.is_sharded:
            assert parameter.grad is not None
            self.memory.weigh(parameter.grad, self.share)

    def _gathered(self, model: Any) -> int:
        """Weights that FSDP has whole for a while: those outside of the layers, a layer, and the next one."""
        if not self.is_sharded:
            return 0
        layers: list[int] = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
        whole: int = sum(p.nbytes for p in model.parameters())
        return whole - sum(layers) + 2 * max(layers)


class _EverythingIsLearned(TorchFunctionMode):
    """Fake tensors have no values, so which tokens are learned cannot be looked up: all of them are. Of the loss's
    chunks two tell how much memory all of them take."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.nonzero:
            return torch.arange(min(args[0].numel(), 2 * self._rows))[:, None]
        return func(*args, **(kwargs or {}))


def _most_terms(recipe: Recipe, arguments: TrainingArguments, num_layers: int) -> list[ExitTerm]:
    """Of the step in which the most exits are on."""
    layerskip, last = recipe.layerskip, num_layers - 1
    num_steps = max(arguments.max_steps, 2 * num_layers)
    steps = (*range(num_layers), num_steps - 1)
    most = max((layerskip.loss_weights(step, num_steps, num_layers) for step in steps), key=lambda w: sum(map(bool, w)))
    kl = layerskip.kl_weight
    return [ExitTerm(layer=layer, weight=most[layer], kl_weight=kl) for layer in range(last, -1, -1) if most[layer]]


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
