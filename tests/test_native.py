"""The native engine against the PyTorch decoder, and against itself: a row's bits depend on its own tokens only."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hopskip.backends.base import Backend, DraftTask, Head
from hopskip.backends.native import backend as native_backend
from hopskip.backends.native import isa as isa_module
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.formats import Format, choose_format
from hopskip.backends.native.packed import PackedWeights
from hopskip.backends.rows import Cache, Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.stored import StoredTensor
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.errors import CheckpointError, ConfigError
from hopskip.sampling import best_sums, choose_tokens
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Mask, Place, Rule, TokenCounts
from tests.properties import examples

from .models import tiny_config
from .native_cache import fill_with_garbage, native, set_vectors, vectors
from .packing import ArrayCheckpoint, read_packed
from .tiny import FAMILIES, write_checkpoint, write_gguf

pytestmark = pytest.mark.skipif(isa_module.obstacle() is not None, reason=isa_module.obstacle() or "")

PRECISIONS = ("float32", "bfloat16", "q8", "q4")
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02, "q8": 0.07, "q4": 0.07}
"""Error of the logits (root mean square, in standard deviations of the logits) against PyTorch in float32 on the same
(dequantized) weights. What is left is the rounding of activations (q8, q4, and bf16 on AVX-512), and of keys and values
to bfloat16 (all but float32)."""


def runnable_isas() -> list[str]:
    return [] if isa_module.obstacle() else [name for name in isa_module.ISAS if isa_module.extension.runs_here(name)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Made when first asked for: family -> checkpoint."""

    class Made(dict[str, Checkpoint]):
        def __missing__(self, family: str) -> Checkpoint:
            folder = tmp_path_factory.mktemp(family)
            write_checkpoint(folder, family)
            self[family] = open_checkpoint(folder)
            return self[family]

    return Made()


class Dequantized:
    """A checkpoint whose matrices have been through a format of the native engine and back."""

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        self.config = checkpoint.config
        self._checkpoint, self._precision = checkpoint, precision

    def stored(self, name: str) -> StoredTensor:
        return self._checkpoint.stored(name)

    def rows(self, name: str, first: int, count: int) -> NDArray[np.float32]:
        value = load_tensor(self._checkpoint, name, torch.float32)
        if value.ndim == 2:
            format = choose_format("F32", name, self._precision)
            if format.is_quantized:  # as the packer does it, which has tests of its own
                weights = PackedWeights.from_checkpoint(self._checkpoint, self._precision)
                value = torch.from_numpy(read_packed(weights.matrices[name]))
            elif format is Format.BF16:
                value = value.bfloat16().float()
        return value.reshape(-1, value.shape[-1])[first : first + count].numpy()


def reference(checkpoint: Checkpoint, precision: str) -> TorchBackend:
    weights = load_weights(Dequantized(checkpoint, precision), torch.float32)  # type: ignore[arg-type]
    return TorchBackend(checkpoint.config, weights)


def random_packed_weights(config: ModelConfig, precision: str, given: dict[str, Tensor]) -> PackedWeights:
    """Ones where `given` has nothing."""

    return PackedWeights.from_checkpoint(ArrayCheckpoint(config, given), precision)  # type: ignore[arg-type]


def tokens(model: Backend, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def embed(model: Backend, ids: Tensor) -> Tensor:
    return torch.as_tensor(model.embed(ids.tolist()))


def layers(model: Backend, h: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
    return torch.as_tensor(model.run_layers(h, start, stop, rows, cache).hidden_ND)


def logits(model: Backend, h: Tensor, head: Head = "full") -> Tensor:
    return torch.as_tensor(model.logits(h, head))


def greedy(model: Backend, h: Tensor) -> Tensor:
    return torch.tensor(model.greedy(h), dtype=torch.int64)


def run(model: Backend, ids: Tensor, segments: Sequence[Segment], cache: Cache) -> Tensor:
    return torch.as_tensor(model.forward(ids.tolist(), Rows(segments), cache).hidden_ND)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


def garbage_cache(model: Backend, slots: int, length: int) -> Cache:
    cache = model.new_cache(slots, length)
    fill_with_garbage(cache)
    return cache


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_pytorch(
    checkpoints: dict[str, Checkpoint], family: str, precision: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    model = NativeBackend.load(checkpoints[family], precision, threads=2)
    assert model.traits.instruction_set == isa
    torch_model = reference(checkpoints[family], precision)
    ids = tokens(model, 70)
    expected = logits(torch_model, run(torch_model, ids, [Segment(0, 0, 70)], torch_model.new_cache(1, 128)))
    cache, segments = garbage_cache(model, 3, 128), [Segment(1, 0, 45), Segment(1, 45, 1), Segment(1, 46, 24)]
    found, first = [], 0
    for segment in segments:
        found.append(logits(model, run(model, ids[first : first + segment.count], [segment], cache)))
        first += segment.count
    assert error(torch.cat(found), expected) < TOLERANCES[precision]


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cols", [32, 40, 96])
def test_products_are_exact_given_the_rounded_activations(
    precision: str, cols: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head alone, on extreme values too, against float64 on the same rounded weights and activations."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    config = tiny_config(hidden_size=cols, vocab_size=50, num_hidden_layers=1, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((50, cols), generator=generator)
    weight[:16] = weight[:16].sign()  # all levels at the ends of their range
    h = torch.randn((9, cols), generator=generator)
    h[:4] = h[:4].sign()
    weight[0], h[0] = 1, 1
    weights = random_packed_weights(config, precision, {"model.embed_tokens.weight": weight})
    model = NativeBackend(config, weights, threads=1)
    x = h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + config.rms_norm_eps)
    if precision in ("q8", "q4"):
        x_blocks = F.pad(x, (0, -cols % 32)).reshape(9, -1, 32)
        sizes = x_blocks.abs()
        if isa == "avx2":  # where neighbours share the range, see native/isa_avx2.cpp
            sizes = sizes + sizes.reshape(*sizes.shape[:-1], -1, 2).flip(-1).flatten(-2)
        scale = sizes.amax(-1, keepdim=True) / 127
        x = ((x_blocks / scale).round() * scale).reshape(9, -1)[:, :cols]
    elif precision == "bfloat16" and isa == "avx512":
        x = x.bfloat16().double()
    rounded = embed(model, torch.arange(50)).double()  # the head is tied: its rows as they are stored
    assert error(rounded, weight.double()) < {"float32": 1e-9, "bfloat16": 0.01, "q8": 0.01, "q4": 0.15}[precision]
    torch.testing.assert_close(logits(model, h).double(), x @ rounded.T, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_number_of_rows(
    checkpoints: dict[str, Checkpoint], precision: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 to 17 rows, and 140 (two passes inside), give the bits of one row at a time."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    model = NativeBackend.load(checkpoints["smollm2"], precision, threads=2)
    ids, cache = tokens(model, 140), garbage_cache(model, 2, 160)
    one_by_one = torch.cat([run(model, ids[i : i + 1], [Segment(0, i, 1)], cache) for i in range(140)])
    expected = logits(model, one_by_one)
    for count in (*range(1, 18), 140):
        together = run(model, ids[:count], [Segment(1, 0, count)], cache)
        assert torch.equal(together, one_by_one[:count])
        assert torch.equal(logits(model, together), expected[:count])
        assert torch.equal(greedy(model, together), expected[:count].argmax(-1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_long_contexts_split_over_threads(checkpoints: dict[str, Checkpoint], precision: str) -> None:
    """Chunks of 256 positions go to several threads, and merge as if one had done them all."""
    models = [NativeBackend.load(checkpoints["llama3-gqa"], precision, threads) for threads in (1, 2, 3)]
    torch_model = reference(checkpoints["llama3-gqa"], precision)
    ids = tokens(torch_model, 900)
    expected = run(torch_model, ids, [Segment(0, 0, 900)], torch_model.new_cache(1, 900))[880:]
    found = []
    for model in models:
        cache = garbage_cache(model, 1, 900)
        run(model, ids[:880], [Segment(0, 0, 880)], cache)
        found.append(torch.cat([run(model, ids[i : i + 1], [Segment(0, i, 1)], cache) for i in range(880, 900)]))
        assert torch.equal(run(model, ids[880:], [Segment(0, 880, 20)], cache), found[-1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert error(found[0], expected) < TOLERANCES[precision]


@st.composite
def batches(draw: st.DrawFn) -> list[Segment]:
    """Chunks of up to five sequences at positions within 300 tokens, in any order of slots."""
    slots = draw(st.permutations(range(5)))[: draw(st.integers(1, 5))]
    segments = []
    for slot in slots:
        start = draw(st.integers(0, 299))
        segments.append(Segment(slot, start, draw(st.integers(1, min(17, 300 - start)))))
    return segments


@pytest.fixture(scope="module")
def prefilled(checkpoints: dict[str, Checkpoint]) -> list[tuple[list[NativeBackend], Cache, Tensor]]:
    """Per precision: models of 1, 2 and 3 threads, a cache with five sequences of 300 tokens, their hidden states."""
    made: list[tuple[list[NativeBackend], Cache, Tensor]] = []
    for precision in PRECISIONS:
        models = [NativeBackend.load(checkpoints["mistral-window"], precision, threads) for threads in (1, 2, 3)]
        cache = garbage_cache(models[0], 5, 300)
        states = [run(models[0], tokens(models[0], 300, slot), [Segment(slot, 0, 300)], cache) for slot in range(5)]
        made.append((models, cache, torch.stack(states)))
    return made


@given(segments=batches(), threads=st.sampled_from([0, 1, 2]), precision=st.integers(0, 3))
def test_rows_are_bit_identical_in_any_company(
    prefilled: list[tuple[list[NativeBackend], Cache, Tensor]], segments: list[Segment], threads: int, precision: int
) -> None:
    models, cache, states = prefilled[precision]
    ids = torch.cat([tokens(models[0], 300, s.slot)[s.start : s.start + s.count] for s in segments])
    expected = torch.cat([states[s.slot, s.start : s.start + s.count] for s in segments])
    assert torch.equal(run(models[threads], ids, segments, cache), expected)


def test_ranges_of_layers_compose(checkpoints: dict[str, Checkpoint]) -> None:
    model = NativeBackend.load(checkpoints["qwen3"], "q8")
    ids, cache = tokens(model, 9), garbage_cache(model, 1, 32)
    whole = run(model, ids, [Segment(0, 0, 9)], cache)
    h, rows = embed(model, ids), Rows([Segment(0, 0, 9)])
    for layer in range(model.config.num_hidden_layers):
        h = layers(model, h, layer, layer + 1, rows, cache)
    assert torch.equal(h, whole)
    assert torch.equal(layers(model, h, 1, 1, rows, cache), h)


@pytest.mark.parametrize("count", [3, 150])  # one pass, and more rows than go in one
def test_states_on_the_way(checkpoints: dict[str, Checkpoint], count: int) -> None:
    model = NativeBackend.load(checkpoints["qwen3"], "q8")
    depth = model.config.num_hidden_layers
    ids, rows = tokens(model, count), Rows([Segment(0, 0, count)])
    cache = model.new_cache(1, count)
    found, states_NAD = map(
        torch.as_tensor, model.run_layers(embed(model, ids).numpy(), 0, depth, rows, cache, [1, depth])
    )
    first = layers(model, embed(model, ids), 0, 1, rows, cache)
    assert torch.equal(states_NAD[:, 0], first)
    assert torch.equal(found, layers(model, first, 1, depth, rows, cache))
    assert torch.equal(states_NAD[:, 1], found)
    for taps in ([0], [1, 1], [depth, 1], [depth + 1], [-1]):
        with pytest.raises(ValueError, match="a tap is"):
            model.run_layers(embed(model, ids).numpy(), 0, depth, rows, cache, taps)


def test_greedy_takes_the_lowest_of_equals(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama2-mha")
    with torch.no_grad():
        model.lm_head.weight[40:] = model.lm_head.weight[39]  # ties of the last 281 tokens
        model.lm_head.weight[:39] = -model.lm_head.weight[39]
    model.save_pretrained(tmp_path)
    found = NativeBackend.load(open_checkpoint(tmp_path), threads=3)
    h = torch.randn((40, found.config.hidden_size), generator=torch.Generator().manual_seed(0))
    assert torch.equal(greedy(found, h), logits(found, h).argmax(-1))
    assert set(greedy(found, h).tolist()) == {0, 39}


def chooser(vocab_size: int, threads: int = 1) -> NativeBackend:
    """A model with a head of many equal rows."""
    config = tiny_config(vocab_size=vocab_size, num_hidden_layers=1, tie_word_embeddings=True)
    weight = torch.randn((vocab_size, config.hidden_size), generator=torch.Generator().manual_seed(vocab_size)) * 0.25
    weight[vocab_size // 2 :: 3] = weight[vocab_size // 2]
    weights = random_packed_weights(config, "float32", {"model.embed_tokens.weight": weight})
    return NativeBackend(config, weights, threads)


def random_rule(any_of: random.Random, vocab_size: int, near: Sequence[int]) -> Rule:
    """`near`: tokens of large logits, where a change is felt."""
    settings: dict[str, Any] = {"temperature": any_of.choice((0.0, 0.1, 1.0, 1.0, 2.0, 2.0))}
    if settings["temperature"]:
        settings |= {
            # fewer and more than there are blocks of 64; about all
            "top_k": any_of.choice((0, 0, 0, 1, 4, 20, 64, vocab_size - 1, vocab_size, vocab_size + 1, 2**40)),
            "top_p": any_of.choice((1.0, 1.0, 0.999, 0.9, 0.5, 1e-6, 1e-50)),
            "min_p": any_of.choice((0.0, 0.0, 0.02, 0.3, 1.0)),
        }
    if any_of.random() < 0.5:
        settings |= {
            "repetition_penalty": any_of.choice((1.0, 1.3, 0.7)),
            "presence_penalty": any_of.choice((0.0, 0.5, -1.0)),
            "frequency_penalty": any_of.choice((0.0, 0.25, -0.75)),
        }
    if any_of.random() < 0.3:
        biased = any_of.sample(near, any_of.randint(1, 5))
        settings["logit_bias"] = {token: any_of.choice((-math.inf, -3.5, 0.125, 2.0, math.inf)) for token in biased}
    counts = counts_of(any_of.sample(near, 3), any_of.choices(near, k=5))
    return Rule(SamplingParams(**settings), seed=any_of.getrandbits(64), counts=counts)


def random_mask(any_of: random.Random, vocab_size: int, near: Sequence[int]) -> Mask | None:
    kind = any_of.choice(("no mask", "no mask", "none", "one", "half", "all but the best"))
    if kind == "no mask":
        return None
    forbidden = set(near[:5])
    allowed = {
        "none": [],
        "one": [any_of.randrange(vocab_size)],
        "half": [token for token in range(vocab_size) if any_of.random() < 0.5],
        "all but the best": [token for token in range(vocab_size) if token not in forbidden],
    }[kind]
    mask_W = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    for token in (*allowed, *range(vocab_size, 32 * len(mask_W))):  # there are no tokens behind the last one
        mask_W[token // 32] |= np.uint32(1 << token % 32)
    return mask_W


def random_places(model: NativeBackend, h_ND: np.ndarray[Any, Any], seed: int, num_rules: int) -> list[Place]:
    """One for each row; rows may share a rule."""
    any_of, vocab_size = random.Random(seed), model.config.vocab_size
    order_NV = np.argsort(-model.logits(h_ND), axis=-1).tolist()
    rules = [random_rule(any_of, vocab_size, order_NV[row][:10]) for row in range(num_rules)]
    places = []
    for row, order in enumerate(order_NV):
        path = tuple(any_of.choices(order[:4], k=any_of.randint(0, 4)))
        position = any_of.choice((0, any_of.randrange(10_000), 2**31 - 1))
        places.append(Place(rules[row % num_rules], position, path, random_mask(any_of, vocab_size, order[:10])))
    return places


def random_states(model: NativeBackend, count: int, seed: int) -> np.ndarray[Any, Any]:
    shape = (count, model.config.hidden_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def read(model: NativeBackend, h_ND: np.ndarray[Any, Any], places: Sequence[Place]) -> list[int]:
    """What the readable version chooses."""
    with np.errstate(invalid="ignore", over="ignore"):  # where nothing can be chosen, and a bias is infinite
        return choose_tokens(model.logits(h_ND), places, array_api_compat.numpy)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("vocab_size", [50, 321, 1000, 1024])
def test_choosing_is_its_readable_version(isa: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    model = chooser(vocab_size)
    assert model.traits.instruction_set == isa
    h_ND = random_states(model, 400, vocab_size)
    h_ND[[7, 70, 170, 270], 3] = math.nan
    places = random_places(model, h_ND, vocab_size, num_rules=400)
    expected = read(model, h_ND, places)
    assert model.choose(h_ND, places).token_ids == expected
    assert [row for row in (7, 70, 170, 270) if expected[row] < 0] == [7, 70, 170, 270]
    others: dict[str, list[Place]] = {
        "position": [place._replace(position=77) for place in places],
        "path": [place._replace(path=()) for place in places],
        "allowed": [place._replace(allowed=None) for place in places],
        "seed": [place._replace(rule=replace(place.rule, seed=7)) for place in places],
    }
    without = {"temperature": 4.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    for name, value in {**without, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}.items():
        params = [replace(place.rule.params, **{name: value}) for place in places]  # type: ignore[arg-type]
        others[name] = [
            place._replace(rule=replace(place.rule, params=own)) for place, own in zip(places, params, strict=True)
        ]
    for name, changed in others.items():
        assert read(model, h_ND, changed) != expected, f"{name} changes nothing, so that this proves nothing"
    for place in places:
        assert place.rule.counts is not None
        for token in range(0, vocab_size, 2):
            place.rule.counts.add(token)
    grown = read(model, h_ND, places)
    assert grown != expected
    assert model.choose(h_ND, places).token_ids == grown


@pytest.mark.parametrize("isa", runnable_isas())
def test_rows_choose_the_same_in_any_company(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and in any batch, of one pass inside or of several, on any number of threads, reported or not."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    models = [chooser(321, threads) for threads in (1, 2, 3)]
    h_ND = random_states(models[0], 300, 1)
    places = random_places(models[0], h_ND, 1, num_rules=30)
    expected, logits_NV = models[0].choose(h_ND, places)
    assert logits_NV is None
    assert expected == read(models[0], h_ND, places)
    reported = [0, 1, 127, 128, 130, 255, 256, 299]
    batches = [random.sample(range(300), count) for count in (*range(2, 18), 127, 128, 129, 300)]
    for model in models:
        own_logits_NV = model.logits(h_ND)
        for rows in ([], [17], reported, list(range(300))):
            found = model.choose(h_ND, places, rows)
            assert found.token_ids == expected
            assert (found.logits_NV is None) == (not rows)
            if found.logits_NV is not None:
                assert np.array_equal(found.logits_NV, own_logits_NV[rows])
        assert [model.choose(h_ND[[row]], [places[row]]).token_ids[0] for row in range(300)] == expected
        for rows in batches:
            found = model.choose(h_ND[rows], [places[row] for row in rows], [1])
            assert found.token_ids == [expected[row] for row in rows]
            assert found.logits_NV is not None
            assert np.array_equal(found.logits_NV, own_logits_NV[rows[1:2]])


def test_choosing_the_best_is_greedy() -> None:
    model = chooser(321, threads=3)
    h_ND = random_states(model, 300, 2)
    places = [Place(Rule(SamplingParams(), seed=row), position=row) for row in range(300)]
    assert model.choose(h_ND, places).token_ids == model.greedy(h_ND)
    assert model.choose(h_ND[:0], []).token_ids == []


def plain_exit(vocabulary: Tensor, start: int = 2) -> TrainedExit:
    """The model's own layer `start` - 1, read over some of the tokens."""
    return TrainedExit(ExitConfig(start=start, num_layers=0), vocabulary.int().numpy(), [], {}, "", 1)


def test_the_head_of_an_exit_has_rows_of_the_models(checkpoints: dict[str, Checkpoint]) -> None:
    vocabulary = torch.tensor([0, 5, 17, 18, 99, 250, 300])
    for precision in PRECISIONS:
        model = NativeBackend.load(checkpoints["smollm2"], precision)
        h = torch.randn((7, model.config.hidden_size), generator=torch.Generator().manual_seed(1))
        model.attach_exit(plain_exit(vocabulary))
        found, expected = logits(model, h, "exit"), logits(model, h)[:, vocabulary]
        if precision in ("q8", "q4"):  # whose heads have 8 bits
            assert torch.equal(found, expected)
        else:  # packed to 8 bits
            assert error(found, expected) < TOLERANCES["q8"]
        assert model.greedy(h.numpy(), "exit") == vocabulary[found.argmax(-1)].tolist()


def exit_of(model: NativeBackend, is_subset: bool) -> tuple[tuple[int, ...] | None, Head, Tensor]:
    """The first two layers, over all tokens or as an exit over half of them: layers of a task, head, tokens."""
    ids = torch.arange(is_subset, model.config.vocab_size, 1 + is_subset)
    if not is_subset:
        return (0, 1), "full", ids
    model.attach_exit(plain_exit(ids))
    return None, "exit", ids


def counts_of(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> TokenCounts:
    counts = TokenCounts(prompt_ids)
    for token in output_ids:
        counts.add(token)
    return counts


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("is_subset", [False, True])
def test_drafts_take_the_best_sums(
    checkpoints: dict[str, Checkpoint], is_subset: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise of the positions that the tokens have in the text, and the penalties of the draft so far."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    model = NativeBackend.load(checkpoints["llama3-gqa"], "float32", threads=2)
    exit_layers, head, ids = exit_of(model, is_subset)
    cache = garbage_cache(model, 5, 16)
    starts = {2: 5, 0: 9, 3: 0, 1: 3, 4: 7}
    for slot, start in starts.items():
        run(model, tokens(model, start, slot), [Segment(slot, 0, start)], cache)
    last, limits = [5, 6, 7, 8, 9], [4, 4, 3, 6, 6]
    changes: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -2.5}
    biases = {11: 6.0, 12: 6.0, 13: -math.inf, 14: -math.inf}  # of each kind one in either half
    counts = [counts_of(range(40), [*range(35, 60), 41, 42, 41]) for _ in range(2)]
    rules = [
        Rule(SamplingParams(temperature=0.7), seed=1),
        Rule(SamplingParams(), seed=2),
        Rule(SamplingParams(temperature=3.0), seed=2**64 - 1),
        Rule(SamplingParams(temperature=0.7, **changes, logit_bias=biases), seed=4, counts=counts[0]),
        Rule(SamplingParams(**changes), seed=5, counts=counts[1]),
    ]
    task = DraftTask(
        layers=exit_layers, token_ids=last, rows=Rows(Segment(slot, start, 1) for slot, start in starts.items()),
        limits=limits, num_runner_ups=3, rules=rules, sharpness=1.25,
    )  # fmt: skip
    vocabulary = ids.tolist() if is_subset else None

    def best(logits_n: Any, place: Place, sharpness: float = 1.25) -> list[tuple[float, int]]:
        return best_sums(logits_n, vocabulary, place, 4, array_api_compat.numpy, sharpness)[0]

    found = model.draft(task, cache)
    assert found.runner_ups is not None
    assert found.sums is not None
    assert [len(own) for own in found.token_ids] == limits
    num_changed = [0, 0, 0]  # steps at which another position, path or sharpness would show
    for i, (slot, start) in enumerate(starts.items()):
        for step, token in enumerate(found.token_ids[i]):
            path = tuple(found.token_ids[i][:step])
            previous = torch.tensor([path[-1] if path else last[i]])
            h = layers(model, embed(model, previous), 0, 2, Rows([Segment(slot, start + step, 1)]), cache)
            assert torch.equal(torch.as_tensor(found.states[i][step]), h[0])
            own_logits = model.logits(found.states[i][step][None], head)[0]
            place = Place(rules[i], start + 1 + step, path)
            expected = best(own_logits, place)
            assert [token, *found.runner_ups[i][step]] == [int(ids[row]) for _, row in expected]
            np.testing.assert_allclose(found.sums[i][step], [value for value, _ in expected], rtol=1e-6, atol=1e-6)
            num_changed[0] += best(own_logits, place._replace(position=start + step)) != expected
            num_changed[1] += best(own_logits, place._replace(path=())) != expected
            num_changed[2] += best(own_logits, place, sharpness=1.0) != expected
    assert num_changed[0] == num_changed[2] == 4 + 3 + 6  # all that are drawn
    assert num_changed[1] >= 5  # of those with penalties
    task.num_runner_ups = 0
    assert model.draft(task, cache).token_ids == found.token_ids
    task.rules = rules[:4]
    with pytest.raises(ValueError, match="there are 4 rules for 5 sequences"):
        model.draft(task, cache)


@pytest.mark.parametrize("is_subset", [False, True])
@pytest.mark.parametrize("min_confidence", [0.0, 0.1])
def test_draft_loop_is_its_steps(checkpoints: dict[str, Checkpoint], min_confidence: float, is_subset: bool) -> None:
    model = NativeBackend.load(checkpoints["llama2-mha"], "q4", threads=2)
    exit_layers, head, ids = exit_of(model, is_subset)
    cache = garbage_cache(model, 4, 40)
    starts = {2: 5, 0: 9, 3: 1}
    for slot, start in starts.items():
        run(model, tokens(model, start, slot), [Segment(slot, 0, start)], cache)
    last = [7, 8, 9]
    drafted, states, runner_ups, sums = model.draft(
        DraftTask(
            layers=exit_layers,
            token_ids=last,
            rows=Rows(Segment(slot, start, 1) for slot, start in starts.items()),
            limits=[6, 6, 6],
            min_confidence=min_confidence,
            num_runner_ups=3 if min_confidence else 0,
        ),
        cache,
    )
    assert (runner_ups is None) == (sums is None) == (min_confidence == 0)
    lengths = set()
    for i, (slot, start) in enumerate(starts.items()):
        token, expected = last[i], []
        for step in range(6):
            rows = Rows([Segment(slot, start + step, 1)])
            h = layers(model, embed(model, torch.tensor([token])), 0, 2, rows, cache)
            assert torch.equal(torch.as_tensor(states[i][step]), h[0])
            own_logits = logits(model, h, head)[0]
            if runner_ups is not None and sums is not None:
                top = own_logits.topk(4)
                assert sums[i][step] == (top.values - top.values[0]).tolist()
                assert runner_ups[i][step] == ids[top.indices[1:]].tolist()
            probabilities = own_logits.softmax(-1)
            token = int(ids[probabilities.argmax()])
            expected.append(token)
            if float(probabilities.max()) < min_confidence:
                break
        assert drafted[i] == expected
        lengths.add(len(expected))
    if min_confidence:
        assert min(lengths) < 6


def test_precision_auto_keeps_what_the_file_has(tmp_path: Path) -> None:
    import gguf

    model = write_checkpoint(tmp_path / "bf16", "llama2-mha", dtype=torch.bfloat16)
    loaded = NativeBackend.load(open_checkpoint(tmp_path / "bf16"))
    assert {m.format.name for m in loaded._weights.matrices.values()} == {"BF16"}
    kinds = gguf.GGMLQuantizationType
    types = {"token_embd.weight": kinds.Q8_0, "blk.0.attn_q.weight": kinds.Q4_0}
    types |= {f"blk.{i}.ffn_up.weight": kinds.Q4_1 for i in range(3)} | {"blk.1.ffn_down.weight": kinds.F16}
    write_gguf(tmp_path / "mixed.gguf", model.float(), types=types)
    checkpoint = open_checkpoint(tmp_path / "mixed.gguf")
    mixed = NativeBackend.load(checkpoint)
    formats = {name.removeprefix("model."): m.format.name for name, m in mixed._weights.matrices.items()}
    assert formats["embed_tokens.weight"] == "Q8"
    assert formats["layers.0.self_attn.q_proj.weight"] == "Q4_0"
    assert formats["layers.2.mlp.up_proj.weight"] == "Q4"
    assert formats["layers.1.mlp.down_proj.weight"] == "BF16"
    assert formats["layers.1.mlp.gate_proj.weight"] == "F32"
    # the embedding's rows are the file's values, bit for bit
    ids = torch.arange(mixed.config.vocab_size)
    assert torch.equal(embed(mixed, ids), load_tensor(checkpoint, "model.embed_tokens.weight", torch.float32))
    name = "model.layers.0.self_attn.q_proj.weight"  # whose rows are stored in another order
    stored = load_tensor(checkpoint, name, torch.float32)
    assert torch.equal(torch.from_numpy(read_packed(mixed._weights.matrices[name])), stored)
    # mixed formats share one input: q in q4, k and v in float32
    torch_model = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    ids, segments = tokens(mixed, 20), [Segment(0, 0, 20)]
    expected = logits(torch_model, run(torch_model, ids, segments, torch_model.new_cache(1, 32)))
    found = logits(mixed, run(mixed, ids, segments, garbage_cache(mixed, 1, 32)))
    assert error(found, expected) < TOLERANCES["q4"]


KV_TOLERANCES = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.025}
"""As `TOLERANCES`, of hidden states, with float32 weights: what is left is the rounding of keys and values."""


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("family", ["smollm2", "llama3-gqa", "mistral-window", "qwen3"])
@pytest.mark.parametrize("kv_dtype", list(KV_TOLERANCES))
def test_kv_dtype(
    checkpoints: dict[str, Checkpoint],
    kv_dtype: str,
    family: str,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows one by one, together and split over threads: the same bits, and close to PyTorch in float32."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    model = NativeBackend.load(checkpoints[family], "float32", threads=1, kv_dtype=kv_dtype)
    assert native(model.new_cache(1, 8)).dtype == kv_dtype
    torch_model = reference(checkpoints[family], "float32")
    ids = tokens(model, 300)
    expected = run(torch_model, ids, [Segment(0, 0, 300)], torch_model.new_cache(1, 300))
    cache = garbage_cache(model, 2, 300)
    found = run(model, ids, [Segment(1, 0, 300)], cache)
    loss = error(found, expected)
    assert loss < KV_TOLERANCES[kv_dtype]
    assert (loss < 1e-5) == (kv_dtype == "float32")
    threaded = NativeBackend.load(checkpoints[family], "float32", threads=3, kv_dtype=kv_dtype)
    for each in (model, threaded):
        one_by_one = [run(each, ids[i : i + 1], [Segment(1, i, 1)], cache) for i in range(290, 300)]
        assert torch.equal(torch.cat(one_by_one), found[290:])
    grown = model.new_cache(3, 310)
    grown.copy_from(cache)
    assert torch.equal(run(model, ids[299:], [Segment(1, 299, 1)], grown), found[299:])


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("precision", ["q8", "q4"])
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-37, 1e-31])
def test_tiny_activations_are_zeros(
    checkpoints: dict[str, Checkpoint], precision: str, isa: str, tiny: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127 over them would be infinite."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    model = NativeBackend.load(checkpoints["smollm2"], precision)
    h_ND = torch.linspace(-1, 1, 2 * model.config.hidden_size).view(2, -1).contiguous()
    h_ND[0, :32] = tiny
    h_ND[1] = h_ND[0]
    h_ND[1, :32] = 0
    rows, depth = Rows([Segment(0, 0, 1), Segment(1, 0, 1)]), model.config.num_hidden_layers
    for out in (layers(model, h_ND, 0, depth, rows, model.new_cache(2, 4)), logits(model, h_ND)):
        assert bool(out.isfinite().all())
        assert torch.equal(out[0], out[1])


def test_other_kv_dtypes_are_refused(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(ConfigError, match=r"kv_dtype is float16; .* float32, bfloat16 or int8"):
        NativeBackend.load(checkpoints["smollm2"], kv_dtype="float16")


def test_an_int8_cache_at_8k_positions(checkpoints: dict[str, Checkpoint]) -> None:
    """After 8,128 random positions, whose int8 form is made here, 64 rows."""
    models = [NativeBackend.load(checkpoints["llama3-gqa"], "q8", threads=2, kv_dtype=kv) for kv in ("float32", "int8")]
    caches = [model.new_cache(1, 8192) for model in models]
    config, generator = models[0].config, torch.Generator().manual_seed(0)
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, 8192, config.head_dim)
    k_LSHTD, v_LSHTD = (torch.randn(shape, generator=generator) for _ in range(2))
    for cache in caches:
        set_vectors(cache, k_LSHTD, v_LSHTD)
    ids = tokens(models[0], 64)
    wanted, found = (run(m, ids, [Segment(0, 8128, 64)], cache) for m, cache in zip(models, caches, strict=True))
    assert 0 < error(found, wanted) < TOLERANCES["q8"]


def test_bad_options(checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="precision is 'q5'"):
        NativeBackend.load(checkpoints["smollm2"], "q5")
    monkeypatch.setenv("HOPSKIP_ISA", "sse9")
    with pytest.raises(ConfigError, match="HOPSKIP_ISA is 'sse9'"):
        NativeBackend.load(checkpoints["smollm2"])
    for isa in set(isa_module.ISAS) - set(runnable_isas()):
        monkeypatch.setenv("HOPSKIP_ISA", isa)
        with pytest.raises(ConfigError, match="cannot run"):
            NativeBackend.load(checkpoints["smollm2"])


def test_without_the_extension(checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa_module, "extension", None)
    assert "not built" in (isa_module.obstacle() or "")
    with pytest.raises(ConfigError, match="not built"):
        NativeBackend.load(checkpoints["smollm2"])


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "smollm2")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        NativeBackend.load(open_checkpoint(tmp_path), "q8")


PARENTS = (-1, 0, 1, 2, 0, 1, 4, 6, 3)


@pytest.mark.parametrize("kv_dtype", native_backend.KV_DTYPES)
@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("start", [60, 254, 255, 256])
def test_rows_of_a_tree_have_the_bits_of_its_paths(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, start: int, isa: str, kv_dtype: str
) -> None:
    """Also where a path crosses from one chunk of positions to the next; and a path that is kept looks like a
    chain that was never anything else."""
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    checkpoint = checkpoints["mistral-window" if start == 60 else "llama3-gqa"]
    model = NativeBackend.load(checkpoint, "bfloat16", threads=2, kv_dtype=kv_dtype)
    depth = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(start)
    ids = torch.randint(0, model.config.vocab_size, (start + len(PARENTS),), generator=generator)
    x_ND = embed(model, ids)
    segment = Segment(1, start, len(PARENTS), PARENTS)
    cache = garbage_cache(model, 2, start + len(PARENTS))
    layers(model, x_ND[:start], 0, depth, Rows([Segment(1, 0, start)]), cache)
    rows = Rows([Segment(0, 0, 2), segment])
    out_ND = layers(model, torch.cat((x_ND[:2], x_ND[start:])), 0, depth, rows, cache)[2:]
    for row in range(len(PARENTS)):
        path = [place - start for place in segment.places_to(row)]
        chain = model.new_cache(1, start + len(path))
        layers(model, x_ND[:start], 0, depth, Rows([Segment(0, 0, start)]), chain)
        own_ND = layers(model, x_ND[start:][path], 0, depth, Rows([Segment(0, start, len(path))]), chain)
        assert torch.equal(own_ND[-1], out_ND[row])
    cache.keep_path(1, start, path)
    for kept, expected in zip(*(vectors(each, model.config.head_dim) for each in (cache, chain)), strict=True):
        assert torch.equal(kept[:, 1, :, : start + len(path)], expected[:, 0])


def run_layers(engine: Any, h: Tensor, out: Tensor, start: int, stop: int, cache: Any, **of_rows: Tensor) -> None:
    engine.run_layers(h, out, start, stop, isa_module.extension.Rows(**of_rows), cache)


def bad_calls() -> Iterator[Any]:
    """Arguments of `run_layers` that must be refused: name -> what replaces the good one."""
    good = {"slots": torch.tensor([0, 0, 1]), "positions": torch.tensor([3, 4, 2])}
    ints = {name: value.int() for name, value in good.items()}
    yield pytest.param({"h": torch.zeros(3, 63)}, id="hidden size")
    yield pytest.param({"h": torch.zeros(3, 64, dtype=torch.float64)}, id="type")
    yield pytest.param({"h": torch.zeros(3, 128)[:, ::2]}, id="strides")
    yield pytest.param({"h": torch.zeros(3 * 64 * 4 + 1, dtype=torch.uint8)[1:].view(3, 256)}, id="bytes")
    yield pytest.param({"h": torch.zeros(2, 64)}, id="fewer rows")
    yield pytest.param({"out": torch.zeros(4, 64)}, id="more rows out")
    yield pytest.param({"start": -1}, id="negative start")
    yield pytest.param({"start": 2, "stop": 1}, id="stop before start")
    yield pytest.param({"stop": 4}, id="stop beyond the last layer")
    yield pytest.param({"stop": 2**40}, id="stop overflows")
    yield pytest.param({"slots": good["slots"]}, id="int64 slots")
    yield pytest.param({"slots": ints["slots"] - 1}, id="negative slot")
    yield pytest.param({"slots": torch.tensor([0, 0, 2], dtype=torch.int32)}, id="slot beyond the cache")
    yield pytest.param({"slots": torch.tensor([0, 1, 0], dtype=torch.int32)}, id="slot in two segments")
    yield pytest.param({"positions": ints["positions"][:2]}, id="fewer positions")
    yield pytest.param({"positions": torch.tensor([-1, 0, 2], dtype=torch.int32)}, id="negative position")
    yield pytest.param({"positions": torch.tensor([3, 4, 16], dtype=torch.int32)}, id="position beyond the cache")
    yield pytest.param({"positions": torch.tensor([3, 5, 2], dtype=torch.int32)}, id="gap in a segment")
    yield pytest.param({"parent_offsets": torch.tensor([0, 2, 0], dtype=torch.int32)}, id="parent in no row")
    yield pytest.param({"parent_offsets": torch.tensor([0, 0, 0], dtype=torch.int32)}, id="two roots")
    yield pytest.param({"parent_offsets": torch.tensor([0, 1, 1], dtype=torch.int32)}, id="parent in another sequence")
    yield pytest.param({"parent_offsets": torch.tensor([0, 1], dtype=torch.int32)}, id="fewer parents")
    yield pytest.param({"parent_offsets": good["slots"]}, id="int64 parents")
    same = {"slots": torch.zeros(3, dtype=torch.int32), "parent_offsets": torch.tensor([0, 1, 2], dtype=torch.int32)}
    yield pytest.param({**same, "positions": torch.tensor([3, 4, 5], dtype=torch.int32)}, id="position unlike parent's")
    yield pytest.param(
        {**same, "positions": torch.tensor([14, 15, 15], dtype=torch.int32)}, id="place beyond the cache"
    )
    yield pytest.param({"cache": {"head_dim": 8}}, id="head size of the cache")
    yield pytest.param({"cache": {"layers": 2}}, id="layers of the cache")
    yield pytest.param({"cache": {"kv_heads": 1}}, id="heads of the cache")
    long = torch.arange(65, dtype=torch.int32)
    tree = {"slots": long * 0, "positions": long.clamp(max=1), "parent_offsets": long}
    yield pytest.param({**tree, "h": torch.zeros(65, 64), "out": torch.zeros(65, 64)}, id="large tree")
    largest = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    yield pytest.param({"slots": largest[:1].repeat(3)}, id="largest slot")
    yield pytest.param({"positions": largest[[0, 1, 0]]}, id="positions that overflow")
    yield pytest.param({**same, "positions": largest[:1].repeat(3)}, id="places that overflow")


@pytest.mark.parametrize("change", list(bad_calls()))
def test_bad_arrays_are_refused_before_anything_runs(
    checkpoints: dict[str, Checkpoint], change: dict[str, object]
) -> None:
    model = NativeBackend.load(checkpoints["llama3-gqa"], "float32")
    assert model.config.head_dim == 16
    cache = garbage_cache(model, 2, 16)
    model._extend_rope(16)
    arguments: dict[str, object] = {
        "h": torch.zeros(3, 64),
        "out": torch.full((3, 64), 5.0),
        "start": 0,
        "stop": 3,
        "slots": torch.tensor([0, 0, 1], dtype=torch.int32),
        "positions": torch.tensor([3, 4, 2], dtype=torch.int32),
        "cache": native(cache).handle,
    }
    if isinstance(sizes := change.get("cache"), dict):
        good = {"dtype": "float32", "layers": 3, "slots": 2, "kv_heads": 2, "length": 16, "head_dim": 16}
        change = {"cache": isa_module.extension.Cache(**{**good, **sizes})}
    with pytest.raises(ValueError, match=r"."):
        run_layers(model._engine, **{**arguments, **change})  # type: ignore[arg-type]
    out = arguments["out"]
    assert isinstance(out, Tensor)
    assert torch.equal(out, torch.full((3, 64), 5.0))
    assert (native(cache).handle.bytes == 0xFF).all()


@settings(max_examples=examples(2))
@given(
    slots=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 2), max_size=5),
    positions=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 17), max_size=5),
    rows=st.integers(0, 5),
    start=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4),
    stop=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4),
)
def test_fuzzed_rows_run_or_are_refused(
    checkpoints: dict[str, Checkpoint], slots: list[int], positions: list[int], rows: int, start: int, stop: int
) -> None:
    model = NativeBackend.load(checkpoints["llama3-gqa"], "float32", threads=1)
    cache = model.new_cache(2, 16)
    model._extend_rope(16)
    out = torch.empty(rows, 64)
    as_int = [torch.tensor(values, dtype=torch.int32) for values in (slots, positions)]
    consecutive = all(
        positions[i] == positions[i - 1] + 1
        for i in range(1, min(len(slots), len(positions)))
        if slots[i] == slots[i - 1]
    )
    runs = [s for i, s in enumerate(slots) if i == 0 or slots[i - 1] != s]
    is_good = (
        rows == len(slots) == len(positions)
        and all(0 <= s < 2 for s in slots)
        and all(0 <= p < 16 for p in positions)
        and consecutive
        and len(set(runs)) == len(runs)
        and 0 <= start <= stop <= 3
    )
    try:
        run_layers(
            model._engine, torch.ones(rows, 64), out, start, stop, cache.handle,
            slots=as_int[0], positions=as_int[1],
        )  # fmt: skip
    except ValueError:
        assert not is_good
    else:
        assert is_good


def test_bad_ids_and_matrices_are_refused(checkpoints: dict[str, Checkpoint]) -> None:
    model = NativeBackend.load(checkpoints["llama3-gqa"], "float32")
    for bad in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match="token id"):
            embed(model, torch.tensor([bad]))
    cache = model.new_cache(1, 8)

    def draft(segment: Segment, exit_layers: tuple[int, ...]) -> None:
        limits = [2] * segment.count
        ids = [1] * segment.count
        model.draft(DraftTask(layers=exit_layers, token_ids=ids, rows=Rows([segment]), limits=limits), cache)

    with pytest.raises(ValueError, match="exit needs a layer"):
        draft(Segment(0, 0, 1), ())
    with pytest.raises(ValueError, match="a layer of the exit is 99"):
        draft(Segment(0, 0, 1), (0, 99))
    with pytest.raises(ValueError, match="position is 7"):  # the second step would be beyond the cache
        draft(Segment(0, 7, 1), (0,))
    with pytest.raises(ValueError, match="occurs twice"):
        draft(Segment(0, 0, 2), (0,))
    data = torch.zeros((2, 2048 // 4), dtype=torch.int32)
    isa_module.extension.Matrix(0, 32, 32, torch.zeros((2, 512), dtype=torch.int32))
    for bad_arguments in [
        (0, 32, 33, data),
        (0, 33, 32, data),
        (4, 32, 32, data),
        (0, 0, 32, data),
        (0, 2**40, 32, data),
    ]:
        with pytest.raises(ValueError, match=r"."):
            isa_module.extension.Matrix(*bad_arguments)
    misaligned = torch.zeros(2 * 512 + 1, dtype=torch.int32)[1:].view(2, 512)
    with pytest.raises(ValueError, match="misaligned"):
        isa_module.extension.Matrix(0, 32, 32, misaligned)


def test_no_rows(checkpoints: dict[str, Checkpoint]) -> None:
    model = NativeBackend.load(checkpoints["smollm2"], "q8")
    nothing = run(model, tokens(model, 0), [], model.new_cache(1, 8))
    assert nothing.shape == (0, 64)
    assert logits(model, nothing).shape == (0, model.config.vocab_size)
    assert model.greedy(nothing.numpy()) == []


def test_a_forked_child_computes_the_same(checkpoints: dict[str, Checkpoint]) -> None:
    model = NativeBackend.load(checkpoints["smollm2"], "q8", threads=3)
    ids, cache = tokens(model, 5), model.new_cache(1, 8)
    expected = run(model, ids, [Segment(0, 0, 5)], cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside threads at all
        child = os.fork()
    if child == 0:
        same = torch.equal(run(model, ids, [Segment(0, 0, 5)], cache), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(run(model, ids, [Segment(0, 0, 5)], cache), expected)


def test_two_models_and_many_callers(checkpoints: dict[str, Checkpoint]) -> None:
    models = [NativeBackend.load(checkpoints["smollm2"], precision, threads=2) for precision in ("q8", "bfloat16")]
    caches = [garbage_cache(model, 4, 32) for model in models]
    ids = tokens(models[0], 12)
    expected = [run(model, ids, [Segment(0, 0, 12)], garbage_cache(model, 1, 32)) for model in models]

    def work(number: int) -> bool:
        which, slot = number % 2, number % 4
        return torch.equal(run(models[which], ids, [Segment(slot, 0, 12)], caches[which]), expected[which])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))
