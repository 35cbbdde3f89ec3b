"""Memory of the loss beside the weights, in heads: counted tensor by tensor, at the shape of a real head.

    python -m benchmarks.loss_memory [--vocabulary 128256] [--hidden 2048] [--rows 64] [--exits 2]

Llama 3.2 1B's head by default. Every case runs forward and backward once. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import nn

from hopskip.train.loss import ExitTerm, exit_loss
from hopskip.train.memory import CountedMemory

NUM_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=64, help="`chunk_tokens`")
    parser.add_argument("--exits", type=int, default=2, help="the last layer counted")
    arguments = parser.parse_args()
    head = nn.Linear(arguments.hidden, arguments.vocabulary, bias=False)
    head_bytes = head.weight.nbytes
    report: dict[str, object] = {"torch": torch.__version__, **vars(arguments), "head_gb": head_bytes / 1e9}
    for autocast in (False, True):
        for kl_weight in (0.0, 1.0):
            head.weight.grad = None
            name = f"{'bf16 autocast' if autocast else 'float32'}{', KL' if kl_weight else ''}"
            report[name] = peak(head, arguments, autocast, kl_weight) / head_bytes
    print(json.dumps(report, indent=2))


def peak(head: nn.Linear, arguments: argparse.Namespace, autocast: bool, kl_weight: float) -> int:
    """Bytes of one forward and backward pass through the loss, the head's gradient included."""
    generator = torch.Generator().manual_seed(0)
    layers = range(arguments.exits - 1, -1, -1)
    shape = (1, NUM_TOKENS, arguments.hidden)
    hidden = {layer: torch.randn(shape, generator=generator).requires_grad_() for layer in layers}
    labels = torch.randint(0, arguments.vocabulary, shape[:2], generator=generator)
    terms = [ExitTerm(layer=layer, weight=1 / arguments.exits, kl_weight=kl_weight) for layer in layers]
    norm = nn.RMSNorm(arguments.hidden)
    with CountedMemory(head.parameters()) as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = exit_loss(hidden, labels, terms, norm, head, num_items=NUM_TOKENS, chunk_tokens=arguments.rows)
        torch.autograd.backward(loss)
    return memory.peak


if __name__ == "__main__":
    main()
