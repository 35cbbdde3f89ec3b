"""The chunked loss against plain autograd; layer dropout against every sample on its own; what it costs in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hopskip.train.data import collate
from hopskip.train.dropout import LayerTaps, draw_kept
from hopskip.train.loss import ExitLosses, ExitTerm, exit_loss
from hopskip.train.memory import CountedMemory
from hopskip.train.unembed import rows_at_once, sparse_embedding
from tests.tiny import make_model

TERMS = [
    ExitTerm(layer=2, weight=0.5),
    ExitTerm(layer=1, weight=0.3, ce_weight=0.7, kl_weight=2.0),
    ExitTerm(layer=0, weight=0.2),
]


def plain_loss(hidden: dict[int, Tensor], labels: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
    """The same by the textbook: all logits at once."""
    targets = labels[:, 1:].flatten()
    is_learned = targets != -100

    def logits(layer: int) -> Tensor:
        found: Tensor = head(norm(hidden[layer]))[:, :-1].flatten(0, 1)[is_learned]
        return found

    teacher = logits(TERMS[0].layer).detach().log_softmax(-1)
    total = torch.zeros(())
    for term in TERMS:
        ce = F.cross_entropy(logits(term.layer), targets[is_learned], reduction="sum")
        total = total + term.weight * term.ce_weight * ce
        if term.kl_weight:
            student = logits(term.layer).log_softmax(-1)
            total = total + term.weight * term.kl_weight * (teacher.exp() * (teacher - student)).sum()
    return total


@pytest.mark.parametrize("chunk_tokens", [1, 5, None])
@pytest.mark.parametrize("trained", ["everything", "hidden states only"])
def test_loss_and_gradients_equal_plain_autograd(chunk_tokens: int | None, trained: str) -> None:
    torch.manual_seed(0)
    norm, head = nn.RMSNorm(8), nn.Linear(8, 13, bias=False)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    for parameter in (*norm.parameters(), *head.parameters()):
        parameter.requires_grad_(trained == "everything")
    hidden = {layer: torch.randn(3, 6, 8, requires_grad=True) for layer in range(3)}
    labels = torch.randint(0, 13, (3, 6))
    labels[0, 3:] = labels[2, :2] = -100
    inputs = [*hidden.values(), *(p for p in (*norm.parameters(), *head.parameters()) if p.requires_grad)]

    expected = plain_loss(hidden, labels, norm, head) / 7
    expected_grads = torch.autograd.grad(3 * expected, inputs)
    losses = ExitLosses(3)
    loss = exit_loss(hidden, labels, TERMS, norm, head, num_items=7, chunk_tokens=chunk_tokens, losses=losses)
    grads = torch.autograd.grad(3 * loss, inputs)

    torch.testing.assert_close(loss, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    num_tokens = int(labels[:, 1:].ne(-100).sum())
    assert losses.sums[:, 2].tolist() == [num_tokens] * 3
    agreeing = (head(norm(hidden[1])).argmax(-1) == head(norm(hidden[2])).argmax(-1))[:, :-1][labels[:, 1:] != -100]
    assert losses.sums[1, 1] == agreeing.sum()
    assert losses.sums[2, 1] == num_tokens


def test_the_teacher_does_not_learn_from_its_pupils() -> None:
    hidden = {layer: torch.randn(1, 4, 8, requires_grad=True) for layer in (0, 1)}
    terms = [ExitTerm(layer=1, weight=0.0), ExitTerm(layer=0, weight=1.0, ce_weight=0.0, kl_weight=1.0)]
    labels = torch.zeros(1, 4, dtype=torch.long)
    loss = exit_loss(hidden, labels, terms, nn.RMSNorm(8), nn.Linear(8, 13, bias=False), num_items=1)
    torch.autograd.backward(loss)
    assert hidden[1].grad is not None
    assert not hidden[1].grad.any()
    assert hidden[0].grad is not None
    assert hidden[0].grad.any()


def test_nothing_to_learn() -> None:
    hidden = {0: torch.randn(2, 4, 8, requires_grad=True)}
    labels = torch.full((2, 4), -100)
    loss = exit_loss(hidden, labels, TERMS[2:], nn.RMSNorm(8), nn.Linear(8, 13), num_items=1)
    torch.autograd.backward(loss)
    assert loss == 0


def test_draws_depend_on_the_key_alone() -> None:
    rates = [0.0, 0.3, 0.6]
    kept = draw_kept(rates, 1000, 7, 3, 0, 0)
    assert kept == draw_kept(rates, 1000, 7, 3, 0, 0)
    assert len(kept[0]) == 1000
    assert [len(rows) / 1000 for rows in kept] == pytest.approx([1 - rate for rate in rates], abs=0.05)
    for key in ((8, 3, 0, 0), (7, 4, 0, 0), (7, 3, 1, 0), (7, 3, 0, 1)):
        assert draw_kept(rates, 1000, *key) != kept


KEPT = [[0, 1, 2, 3], [1, 3], []]
"""Samples that each of three layers keeps; the last layer keeps none."""


def batches(kind: str) -> tuple[dict[str, Tensor], list[list[dict[str, Tensor]]]]:
    """A batch of four rows, and the documents of each row on their own."""
    generator = torch.Generator().manual_seed(1)

    def document(length: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 320, (length,), generator=generator)
        return {"input_ids": ids, "labels": torch.cat((torch.tensor([-100]), ids[1:]))}

    rows = [[document(n) for n in lengths] for lengths in ((5, 4, 3), (12,), (2, 6), (7, 2))]
    if kind == "padded":
        rows = [[row[0]] for row in rows]
        return collate([row[0] for row in rows]), rows
    packed = []
    for row in rows:
        joined = {name: torch.cat([d[name] for d in row]) for name in ("input_ids", "labels")}
        packed.append({**joined, "position_ids": torch.cat([torch.arange(len(d["input_ids"])) for d in row])})
    return collate(packed), rows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("family", ["llama2-mha", "mistral-window", "qwen3"])
def test_batches_with_dropout_equal_single_samples(family: str, kind: str, attention: str) -> None:
    model: Any = make_model(family)
    model.config._attn_implementation = attention
    taps = LayerTaps(model.model.layers)
    terms = [ExitTerm(layer=layer, weight=1.0) for layer in (2, 1, 0)]

    def losses(batch: dict[str, Tensor], kept: list[list[int]]) -> Tensor:
        sums = ExitLosses(3)
        taps.drop(kept, len(batch["input_ids"]), torch.device("cpu"))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), taps.collect(range(3)):
            model.model(**inputs, use_cache=False)
            exit_loss(taps.outputs, batch["labels"], terms, model.model.norm, model.lm_head, num_items=1, losses=sums)
        return sums.sums

    together, rows = batches(kind)
    alone = [
        losses({name: value[None] for name, value in document.items()}, [[0] if index in k else [] for k in KEPT])
        for index, row in enumerate(rows)
        for document in row
    ]
    expected = torch.stack(alone).sum(dim=0)
    torch.testing.assert_close(losses(together, KEPT), expected, rtol=1e-5, atol=1e-4)
    # the test can tell: other samples, other losses
    assert not torch.allclose(losses(together, [[0, 1, 2, 3], [0, 2], []])[1:, 0], expected[1:, 0], rtol=1e-4)


def test_dropped_samples_cost_nothing_and_weights_get_a_gradient() -> None:
    model: Any = make_model("llama2-mha")
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    taps = LayerTaps(model.model.layers)
    taps.drop(KEPT, 4, torch.device("cpu"))
    with taps.attached():
        model.model(input_ids=torch.zeros(4, 5, dtype=torch.long)).last_hidden_state.sum().backward()
    assert seen == [4, 2]
    grads = [parameter.grad for parameter in model.model.layers[2].parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("recomputes", [False, True])
def test_all_exits_need_hardly_more_memory_than_one(recomputes: bool) -> None:
    """Activations, logits and gradients of a step; the logits of all exits would take ten times as much."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config).train()
    if recomputes:
        # the older name of two, which differ between versions of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    taps = LayerTaps(model.model.layers)
    ids = torch.randint(0, 2048, (2, 256))

    def peak(num_exits: int) -> int:
        exits = [11, *range(num_exits)]
        terms = [ExitTerm(layer=layer, weight=0.1) for layer in exits]
        model.zero_grad()
        with CountedMemory(model.parameters()) as memory, taps.collect(exits):
            model.model(input_ids=ids, use_cache=False)
            loss = exit_loss(taps.outputs, ids, terms, model.model.norm, model.lm_head, num_items=1, chunk_tokens=128)
            taps.outputs.clear()
            torch.autograd.backward(loss)
        return memory.peak

    one, all_of_them = peak(1), peak(11)
    assert one > 128 * 2048 * 4  # at least the logits of a chunk
    assert all_of_them < 1.2 * one, f"{one} bytes with one exit, {all_of_them} with eleven"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", ["own head", "tied", "frozen", "kl"])
def test_the_heads_gradient_is_added_up_in_place(case: str, autocast: bool) -> None:
    """Beside the weights a step takes the head's gradient, and little else; autograd's own ways take two to five."""
    size, width = 40_000, 48
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=case == "tied",
    )
    model: Any = LlamaForCausalLM(config).train()
    model.model.embed_tokens.requires_grad_(case == "tied")
    model.lm_head.requires_grad_(case != "frozen")
    taps = LayerTaps(model.model.layers)
    ids = torch.randint(0, size, (1, 33))
    terms = [ExitTerm(layer=1, weight=0.7), ExitTerm(layer=0, weight=0.3, kl_weight=float(case == "kl"))]
    with CountedMemory(model.parameters()) as memory, taps.collect([1, 0]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), sparse_embedding(model):
            model.model(input_ids=ids, use_cache=False)
            loss = exit_loss(taps.outputs, ids, terms, model.model.norm, model.lm_head, num_items=32, chunk_tokens=16)
        taps.outputs.clear()
        torch.autograd.backward(loss)
    gradient = 0 if case == "frozen" else size * width * 4
    few_logits = 6 * 16 * size * 4
    assert gradient <= memory.peak < gradient + few_logits, memory.peak / (size * width * 4)
    if case != "frozen":
        assert memory.now < gradient * 1.05
    assert not model.model.embed_tokens.sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_get_the_sum_of_both_gradients(dtype: torch.dtype) -> None:
    """Over two passes, as with gradient accumulation."""
    model: Any = make_model("smollm2").train()
    ids = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(16)).loss).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    taps = LayerTaps(model.model.layers)
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), taps.collect([2]), sparse_embedding(model):
            model.model(input_ids=ids, use_cache=False)
            terms = [ExitTerm(layer=2, weight=1.0)]
            loss = exit_loss(taps.outputs, ids, terms, model.model.norm, model.lm_head, num_items=16, chunk_tokens=5)
        torch.autograd.backward(loss)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.1, 0.02)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=rtol, atol=atol)


def test_a_loss_is_differentiated_once() -> None:
    hidden = {0: torch.randn(1, 4, 8, requires_grad=True)}
    loss = exit_loss(
        hidden, torch.ones(1, 4, dtype=torch.long), TERMS[2:], nn.RMSNorm(8), nn.Linear(8, 13), num_items=1
    )
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="used by an earlier backward pass"):
        torch.autograd.backward(loss)


def test_chunks_follow_vocabulary_and_memory() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert rows_at_once(128_256, gpu, free=30_000_000_000) == 2048
    assert rows_at_once(128_256, gpu, free=3_000_000_000) == 256
    assert rows_at_once(128_256, gpu, free=0) == 64  # as little as is worth it
    assert rows_at_once(256, gpu, free=30_000_000_000) == 8192
    assert rows_at_once(128_256, cpu, free=30_000_000_000) == 256
    assert rows_at_once(49_152, cpu, free=30_000_000_000) == 512
    assert rows_at_once(49_152, cpu, free=500_000_000) == 128
    assert rows_at_once(49_152, cpu) in (64, 128, 256, 512)
