"""The losses of all exits through one norm and one head, without ever holding more logits than one chunk's.

The head's gradient is computed together with the loss, chunk by chunk, while the logits are there (as fused linear
cross-entropy kernels do). What is kept for the backward pass is one gradient [B, T, D] per exit, in the hidden states'
precision, and one of the shared weights; logits [N, V] never outlive their chunk.

N = tokens of a chunk, V = vocabulary, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

MAX_CHUNK_LOGITS = 1 << 25


@dataclass(frozen=True, kw_only=True)
class ExitTerm:
    """What one layer contributes to the loss."""

    layer: int
    weight: float
    """ẽ(l, t). 0: only measured, no gradient."""
    ce_weight: float = 1.0
    kl_weight: float = 0.0


class ExitLosses:
    """Sums over tokens, per layer: what is shown while training."""

    NAMES = ("ce", "agreeing", "tokens")

    def __init__(self, num_layers: int) -> None:
        self.sums = torch.zeros(num_layers, len(self.NAMES), dtype=torch.float64)

    def add(self, layer: int, ce: Tensor, agreeing: Tensor, tokens: int) -> None:
        """Summed cross-entropy, tokens whose best token is the last layer's, and tokens."""
        if self.sums.device != ce.device:
            self.sums = self.sums.to(ce.device)
        self.sums[layer, 0] += ce
        self.sums[layer, 1] += agreeing
        self.sums[layer, 2] += tokens


def exit_metrics(logs: Mapping[str, float], kind: str, prefix: str = "") -> dict[int, float]:
    """The values of `exit<E>_<kind>` in a line of logs, by exit.

    >>> exit_metrics({"exit4_loss": 2.0, "exit8_loss": 1.5, "loss": 1.6}, "loss")
    {4: 2.0, 8: 1.5}
    """
    start, end = f"{prefix}exit", f"_{kind}"
    return {
        int(name[len(start) : -len(end)]): value
        for name, value in logs.items()
        if name.startswith(start) and name.endswith(end)
    }


def exit_loss(
    hidden: Mapping[int, Tensor],
    labels_BT: Tensor,
    terms: Sequence[ExitTerm],
    norm: nn.Module,
    head: nn.Module,
    *,
    num_items: Tensor | float,
    chunk_tokens: int | None = None,
    losses: ExitLosses | None = None,
) -> Tensor:
    """Σ_l weight_l (ce_weight_l CE_l + kl_weight_l KL(last || l)), summed over tokens and divided by `num_items`.

    Args:
        hidden: the outputs [B, T, D] of the layers that `terms` name, before the final norm.
        labels_BT: token ids, -100 where there is nothing to learn; not shifted: position t is trained on label t + 1.
        terms: the last layer first, whose distribution is the others' teacher (its gradient does not pass through).
        losses: gets every layer's sums.
    """
    parameters = {f"{part}.{n}": p for part, m in (("norm", norm), ("head", head)) for n, p in m.named_parameters()}
    # position t predicts label t + 1; the last position of a row predicts nothing
    targets_N = F.pad(labels_BT[:, 1:], (0, 1), value=-100).flatten()
    plan = _Plan(terms, norm, head, tuple(parameters), targets_N, chunk_tokens, losses)
    total: Tensor = _ExitLoss.apply(plan, *(hidden[term.layer] for term in terms), *parameters.values())  # type: ignore[no-untyped-call]
    return total / num_items


@dataclass(frozen=True)
class _Plan:
    """What does not take part in autograd."""

    terms: Sequence[ExitTerm]
    norm: nn.Module
    head: nn.Module
    names: tuple[str, ...]
    targets_N: Tensor
    chunk_tokens: int | None
    losses: ExitLosses | None

    def logits(self, h_ND: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Through norm and head with detached weights, whose gradients are ours to add up."""
        for part, module in (("norm.", self.norm), ("head.", self.head)):
            own = {f"module.{n.removeprefix(part)}": p for n, p in parameters.items() if n.startswith(part)}
            h_ND = functional_call(_WithoutHooks(module), own, (h_ND,))
        return h_ND.float()


class _WithoutHooks(nn.Module):
    """Runs a module without its hooks: FSDP's would take every chunk for a forward pass of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, h_ND: Tensor) -> Tensor:
        output: Tensor = self.module.forward(h_ND)
        return output


class _ExitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        num_exits = len(plan.terms)
        hidden, weights = tensors[:num_exits], tensors[num_exits:]
        parameters = {name: weight.detach() for name, weight in zip(plan.names, weights, strict=True)}
        wants = ctx.needs_input_grad[1:]
        grads: list[Tensor | None] = [
            torch.zeros_like(tensor, dtype=None if index < num_exits else torch.float32) if wanted else None
            for index, (tensor, wanted) in enumerate(zip(tensors, wants, strict=True))
        ]
        for parameter, wanted in zip(parameters.values(), wants[num_exits:], strict=True):
            parameter.requires_grad_(wanted)
        total = hidden[0].new_zeros((), dtype=torch.float32)
        where_N = plan.targets_N.ne(-100).nonzero().squeeze(1)
        vocab_size = next(iter(plan.head.parameters())).shape[0]
        chunk = plan.chunk_tokens or max(1, MAX_CHUNK_LOGITS // vocab_size)
        for where in torch.split(where_N, chunk):
            total += _chunk(plan, hidden, parameters, where, plan.targets_N[where], grads)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        grads = [
            # in place: nothing else holds them, and a second backward pass through this loss is refused by autograd
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *grads


def _chunk(
    plan: _Plan,
    hidden: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    where_N: Tensor,
    targets_N: Tensor,
    grads: list[Tensor | None],
) -> Tensor:
    """The loss of one chunk of tokens over all exits, which are unembedded one after the other; adds to `grads`."""
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    num_exits = len(plan.terms)
    best_N: Tensor | None = None
    teacher_NV: Tensor | None = None
    total = hidden[0].new_zeros((), dtype=torch.float32)
    teaches = any(term.kl_weight > 0 and term.weight > 0 for term in plan.terms[1:])
    for index, term in enumerate(plan.terms):
        h_ND = hidden[index].flatten(0, 1)[where_N].detach()
        is_learned = term.weight > 0 and any(grad is not None for grad in grads)
        with torch.set_grad_enabled(is_learned):
            h_ND.requires_grad_(is_learned)
            logits_NV = plan.logits(h_ND, parameters)
            ce = F.cross_entropy(logits_NV, targets_N, reduction="sum")
            loss = term.weight * term.ce_weight * ce
            if index and term.kl_weight > 0 and teacher_NV is not None and term.weight > 0:
                student_NV = logits_NV.log_softmax(-1)
                kl = F.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
                loss = loss + term.weight * term.kl_weight * kl
        choice_N = logits_NV.detach().argmax(-1)
        if best_N is None:
            best_N = choice_N
            teacher_NV = logits_NV.detach().log_softmax(-1) if teaches else None
        if plan.losses is not None:
            plan.losses.add(term.layer, ce.detach(), choice_N.eq(best_N).sum(), len(targets_N))
        if term.weight > 0:
            total += loss.detach()
        if is_learned:
            del logits_NV
            grad_ND, *grad_weights = torch.autograd.grad(loss, [h_ND, *(parameters[name] for name in trained)])
            own = grads[index]
            if own is not None:
                own.view(-1, own.shape[-1]).index_copy_(0, where_N, grad_ND.to(own.dtype))
            for name, grad in zip(trained, grad_weights, strict=True):
                shared = grads[num_exits + plan.names.index(name)]
                assert shared is not None
                shared.add_(grad)
    return total
