"""The losses of all exits through one norm and one head, without ever holding more logits than one chunk's.

The head's gradient is computed together with the loss, chunk by chunk, while the logits are there (as fused linear
cross-entropy kernels do). What is kept for the backward pass is one gradient [B, T, D] per exit, in the hidden states'
precision, and one of the shared weights, in float32, to which every chunk adds in place; logits never outlive their
chunk.

E = exits, N = tokens of a chunk, R = E N rows, V = vocabulary, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hopskip.train.unembed import AddedInPlace, rows_at_once


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
        chunk_tokens: rows of logits at once, those of all exits together; None is what fits, see `rows_at_once`.
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

    def chunks(self) -> Iterator[Tensor]:
        """Places of tokens that are learned, as many as are unembedded at once."""
        where_N = self.targets_N.ne(-100).nonzero().squeeze(1)
        if self.chunk_tokens is None:
            vocab_size = next(iter(self.head.parameters())).shape[0]
            rows = rows_at_once(vocab_size, where_N.device)
        else:
            rows = self.chunk_tokens
        yield from torch.split(where_N, max(1, rows // len(self.terms)))

    def logits(self, h_RD: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Through norm and head with detached weights, whose gradients are ours to add up."""
        for part, module in (("norm.", self.norm), ("head.", self.head)):
            own = {f"module.{n.removeprefix(part)}": p for n, p in parameters.items() if n.startswith(part)}
            h_RD = functional_call(_WithoutHooks(module), own, (h_RD,))
        return h_RD.float()


class _WithoutHooks(nn.Module):
    """Runs a module without its hooks: FSDP's would take every chunk for a forward pass of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, h_RD: Tensor) -> Tensor:
        output: Tensor = self.module.forward(h_RD)
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
        for where_N in plan.chunks():
            total += _chunk(plan, hidden, parameters, where_N, grads)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        # handed over, so that autograd makes them the parameters' gradients without a copy
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of this loss were used by an earlier backward pass")
        return None, *(
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(_taken(grads), ctx.dtypes, strict=True)
        )


def _taken(grads: list[Tensor | None]) -> Iterator[Tensor | None]:
    """One after the other, none of which is held here any longer."""
    for index in range(len(grads)):
        grad, grads[index] = grads[index], None
        yield grad
        del grad


def _chunk(
    plan: _Plan,
    hidden: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    where_N: Tensor,
    grads: list[Tensor | None],
) -> Tensor:
    """The loss of one chunk of tokens, all exits unembedded together; adds to `grads`."""
    num_exits, num_tokens, targets_N = len(plan.terms), len(where_N), plan.targets_N[where_N]
    is_learned = any(grad is not None for grad in grads)
    h_RD = torch.cat([h_BTD.flatten(0, 1)[where_N] for h_BTD in hidden]).detach().requires_grad_(is_learned)
    buffers = {id(p): grad for p, grad in zip(parameters.values(), grads[num_exits:], strict=True)}
    with torch.set_grad_enabled(is_learned), AddedInPlace(buffers):
        logits_RV = plan.logits(h_RD, parameters)
    log_ENV = logits_RV.detach().log_softmax(-1).view(num_exits, num_tokens, logits_RV.shape[1])
    ce_E = -log_ENV.gather(2, targets_N.expand(num_exits, -1)[..., None]).sum((1, 2))
    if plan.losses is not None:
        choice_EN = log_ENV.argmax(-1)
        agreeing_E = choice_EN.eq(choice_EN[0]).sum(1)
        for term, ce, agreeing in zip(plan.terms, ce_E, agreeing_E, strict=True):
            plan.losses.add(term.layer, ce, agreeing, num_tokens)
    teaches = any(term.kl_weight > 0 and term.weight > 0 for term in plan.terms[1:])
    teacher_NV = log_ENV[0].exp() if teaches else None
    total: Tensor = ce_E.new_zeros(())
    for index, term in enumerate(plan.terms):
        if term.weight > 0:
            total += term.weight * term.ce_weight * ce_E[index]
            if index and term.kl_weight > 0:
                assert teacher_NV is not None
                kl = (log_ENV[0] - log_ENV[index]).mul_(teacher_NV).sum()
                total += term.weight * term.kl_weight * kl
    if is_learned:
        grad_RV = _grad_of_logits(plan.terms, log_ENV, targets_N, teacher_NV).flatten(0, 1)
        others = [name for name, p in parameters.items() if p.requires_grad]
        grad_RD, *grad_weights = torch.autograd.grad(
            logits_RV, [h_RD, *(parameters[name] for name in others)], grad_RV, allow_unused=True
        )
        for own, part_ND in zip(grads, torch.split(grad_RD, num_tokens), strict=False):
            if own is not None:
                own.view(-1, own.shape[-1]).index_copy_(0, where_N, part_ND.to(own.dtype))
        for name, grad in zip(others, grad_weights, strict=True):
            if grad is not None:  # those of linear layers have been added already
                buffers[id(parameters[name])].add_(grad)  # type: ignore[union-attr]
    return total


def _grad_of_logits(terms: Sequence[ExitTerm], log_ENV: Tensor, targets_N: Tensor, teacher_NV: Tensor | None) -> Tensor:
    """From log-probabilities, in their place: weight (ce (p - 1 at the target) + kl (p - teacher's))."""
    grad_ENV = log_ENV.exp_()
    for index, (grad_NV, term) in enumerate(zip(grad_ENV, terms, strict=True)):
        ce, kl = term.weight * term.ce_weight, term.weight * term.kl_weight if index else 0.0
        grad_NV.mul_(ce + kl)
        if kl:
            assert teacher_NV is not None
            grad_NV.sub_(teacher_NV, alpha=kl)
        grad_NV.scatter_add_(1, targets_N[:, None], grad_NV.new_full((len(targets_N), 1), -ce))
    return grad_ENV
