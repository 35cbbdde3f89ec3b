"""What the extension asks of its arrays: NumPy's and PyTorch's alike, checked before anything computes.

A model of two layers with an exit that has one more of its own, random float32 weights. Shape letters: N rows, D hidden
size, B sequences, k draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hopskip.backends.native import isa
from hopskip.backends.native.formats import Format
from hopskip.backends.native.packing import Packer
from hopskip.backends.rows import Rows, Segment
from hopskip.sampling import best_sums
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Place, Rule

pytestmark = pytest.mark.skipif(isa.obstacle() is not None, reason=isa.obstacle() or "")

D, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 64, 50, 4, 2, 16, 96
NUM_SLOTS, LENGTH = 2, 16

Convert = Callable[[Tensor], Any]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def as_is(x: Tensor) -> Tensor:
    return x


def as_read_only_numpy(x: Tensor) -> Any:
    array = x.numpy()
    array.setflags(write=False)
    return array


def matrix(rows: int, cols: int, seed: int, convert: Convert = as_is) -> Any:
    weight = torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed)) * cols**-0.5
    packed = Packer().pack_array(weight.numpy(), Format.F32)
    return isa.extension.Matrix(int(packed.format), rows, cols, convert(torch.from_numpy(packed.data)))


def layer(seed: int, convert: Convert = as_is, **changes: object) -> Any:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (queries, D), "k": (keys, D), "v": (keys, D), "o": (D, queries)}
    shapes |= {"gate": (INTERMEDIATE, D), "up": (INTERMEDIATE, D), "down": (D, INTERMEDIATE)}
    parts = {name: matrix(*shape, seed + i, convert) for i, (name, shape) in enumerate(shapes.items())}
    vectors = {"input_norm": D, "post_norm": D, "q_bias": queries, "k_bias": keys, "v_bias": keys}
    vectors |= {"q_norm": HEAD_DIM, "k_norm": HEAD_DIM}
    parts |= {name: convert(torch.linspace(0.5, 1.5, size)) for name, size in vectors.items()}
    return isa.extension.Layer(**{**parts, **changes})


def make_engine(convert: Convert = as_is, rope_length: int = LENGTH) -> Any:
    shape = isa.extension.Shape(
        hidden_size=D, intermediate_size=INTERMEDIATE, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        vocab_size=VOCABULARY, rms_norm_eps=1e-5,
    )  # fmt: skip
    engine = isa.extension.Engine("portable", 2, shape)
    for seed in (0, 10, 20):
        engine.add_layer(layer(seed, convert))
    norm = convert(torch.linspace(0.5, 1.5, D))
    engine.set_embedding_and_head(matrix(VOCABULARY, D, 30, convert), matrix(VOCABULARY, D, 31, convert), norm)
    angles = torch.outer(torch.arange(rope_length).float(), 0.1 ** torch.arange(HEAD_DIM // 2))
    engine.set_rope(convert(angles.cos()), convert(angles.sin()))
    return engine


def make_exit(convert: Convert = as_is, **changes: object) -> Any:
    arguments: dict[str, object] = {
        "model_layers": convert(ints(0)),
        "own_layers": convert(ints(2)),
        "head": matrix(40, D, 40, convert),
        "vocabulary": convert(torch.arange(5, 45, dtype=torch.int32)),
        "fuse": matrix(D, 2 * D, 41, convert),
        "mix": matrix(D, 2 * D, 42, convert),
        "num_features": 2,
        "token_norm": convert(torch.linspace(0.5, 1.5, D)),
        "feature_norm": convert(torch.linspace(0.5, 1.5, D)),
    }
    return isa.extension.Exit(**{**arguments, **changes})


def plain_exit(**changes: object) -> Any:
    """Of the model's layers and head alone."""
    return isa.extension.Exit(**{"model_layers": ints(0, 1), **changes})


def make_cache(dtype: torch.dtype = torch.float32, **changes: object) -> Any:
    sizes = {"layers": 3, "slots": NUM_SLOTS, "kv_heads": KV_HEADS, "length": LENGTH, "head_dim": HEAD_DIM}
    return isa.extension.Cache(**{"dtype": str(dtype).removeprefix("torch."), **sizes, **changes})


def make_rows(slots: Tensor, positions: Tensor) -> Any:
    return isa.extension.Rows(slots=slots, positions=positions)


def words(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint32)


def rule(convert: Convert = as_is, seen: Tensor | None = None, counts: Tensor | None = None, **settings: Any) -> Any:
    """Of a text with some tokens that penalties change."""
    made = isa.extension.Rule(**{"repetition": 1.25, "presence": 0.5, "frequency": 0.125, **settings})
    seen = ints(6, 7, 8, 45) if seen is None else seen
    made.set_counts(convert(seen), convert(ints(0, 2, 1, 1) if counts is None else counts))
    return made


def task_arguments(**changes: object) -> dict[str, Any]:
    """A good `DraftTask` for `make_exit()`, two sequences with three rows, but for these changes."""
    random = torch.Generator().manual_seed(50)
    good = {
        "ids": ints(1, 2, 3),
        "limits": ints(4, 2),
        "min_confidence": 0.01,
        "features": torch.randn((3, 2, D), generator=random),
        "token_states": torch.randn((3, D), generator=random),
        "rules": [rule(temperature=0.5, seed=7), rule(biased=[9, 4], biases=[0.5, 1e9])],
        "sharpness": 1.5,
        "tokens": torch.zeros((2, 4), dtype=torch.int32),
        "counts": torch.zeros(2, dtype=torch.int32),
        "states": torch.zeros(2, 4, D),
        "runner_ups": torch.zeros((2, 4, 2), dtype=torch.int32),
        "sums": torch.zeros(2, 4, 3),
    }
    return good | changes


RESULTS = ("tokens", "counts", "states", "runner_ups", "sums")
"""Of a `DraftTask`."""


def every_call(dtype: torch.dtype, given: Convert, result: Convert) -> dict[str, Any]:
    """What each call of the extension writes, by name: inputs go through `given`, results through `result`."""
    m, engine = isa.extension, make_engine(given)
    cache = make_cache(dtype)
    found: dict[str, Any] = {"cache": result(torch.from_numpy(cache.bytes))}
    slots, positions = given(ints(0, 0, 1)), given(ints(3, 4, 2))
    rows = m.Rows(slots=slots, positions=positions)
    tree = m.Rows(slots=slots, positions=positions, parent_offsets=given(ints(0, 1, 0)))
    head = matrix(40, D, 40, given)
    h, out, tree_out = found["h"], found["out"], found["tree_out"] = [result(torch.zeros(3, D)) for _ in range(3)]
    tapped = found["tapped"] = result(torch.zeros(3, 2, D))
    engine.embed(given(ints(7, 8, 9)), h)
    engine.run_layers(h, out, 0, 3, rows, cache, taps=given(ints(1, 3)), tapped=tapped)
    engine.run_layers(h, tree_out, 0, 3, tree, cache)
    for name, subset, size in (("logits", None, VOCABULARY), ("subset_logits", head, 40)):
        found[name] = result(torch.zeros(3, size))
        engine.logits(out, found[name], subset)
    for name, subset in (("greedy", None), ("subset_greedy", head)):
        found[name] = result(torch.zeros(3, dtype=torch.int32))
        engine.greedy(out, found[name], subset)
    found["chosen"], found["reported"] = result(torch.zeros(3, dtype=torch.int32)), result(torch.zeros(2, VOCABULARY))
    engine.choose(
        out, found["chosen"], rules=[rule(given), rule(given, temperature=1.5, seed=2**64 - 1, top_k=30), rule(given)],
        positions=[3, 2**31 - 1, 0], paths=[[], [8, 8], [49]], allowed=[None, None, given(words(0, 2**18 - 4))],
        reported=[0, 2], logits=found["reported"],
    )  # fmt: skip
    task = {
        name: (result if name in RESULTS else given)(value) if isinstance(value, Tensor) else value
        for name, value in task_arguments().items()
    }
    task["rules"] = [rule(given, temperature=0.5, seed=7), rule(given)]
    engine.draft(make_exit(given), rows, cache, m.DraftTask(**task))
    return found | {name: task[name] for name in RESULTS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_numpy_arrays_serve_as_well(dtype: torch.dtype) -> None:
    """Inputs may be read-only."""
    expected = every_call(dtype, as_is, as_is)
    found = every_call(dtype, as_read_only_numpy, Tensor.numpy)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert isinstance(found[name], np.ndarray)
        assert torch.equal(torch.from_numpy(found[name]), value), name
        assert bool(value.any()), f"{name} is all zeros, so that this proves nothing"


def test_results_must_be_writable() -> None:
    out = as_read_only_numpy(torch.zeros(1, D))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        make_engine().embed(np.zeros(1, dtype=np.int32), out)
    assert not out.any()


def test_rows_rules_and_tasks_keep_the_integers_that_were_checked() -> None:
    engine, cache = make_engine(), make_cache()
    slots, positions = ints(0, 0, 1), ints(3, 4, 2)
    seen, counts = ints(6, 7, 8, 45), ints(0, 2, 1, 1)
    task, same_task = task_arguments(), task_arguments()
    task["rules"] = [rule(as_is, seen, counts, temperature=0.5, seed=7), task["rules"][1]]
    rows, made = make_rows(slots, positions), isa.extension.DraftTask(**task)
    exit_layers, vocabulary = ints(0), torch.arange(5, 45, dtype=torch.int32)
    exit = make_exit(model_layers=exit_layers, vocabulary=vocabulary)
    for changed in (slots, positions, seen, counts, task["ids"], task["limits"], exit_layers, vocabulary):
        changed.fill_(2**31 - 1)
    del task["rules"]  # which the task keeps
    engine.draft(exit, rows, cache, made)
    engine.draft(make_exit(), make_rows(ints(0, 0, 1), ints(3, 4, 2)), cache, isa.extension.DraftTask(**same_task))
    for name in RESULTS:
        assert torch.equal(task[name], same_task[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3)}, "ids has elements of"),
        ({"ids": ints(1, 2, 3)[:, None]}, "ids has shape"),
        ({"limits": ints(4, 5)}, "limit is 5"),
        ({"limits": ints(0, 4)}, "limit is 0"),
        ({"limits": ints(1)}, "tokens has shape"),
        ({"min_confidence": 1.5}, r"min_confidence is 1\.5"),
        ({"min_confidence": float("nan")}, "min_confidence is"),
        ({"features": torch.zeros(2, 2, D)}, "features has shape"),
        ({"features": torch.zeros(3, 2, D - 1)}, "features has shape"),
        ({"token_states": torch.zeros(3, 2 * D)[:, ::2]}, "token_states is not contiguous"),
        ({"token_states": torch.zeros(2, D)}, "token_states has shape"),
        ({"tokens": torch.zeros(2, 4)}, "tokens has elements of"),
        ({"tokens": torch.zeros((2, 0), dtype=torch.int32)}, "the width of tokens is 0"),
        ({"tokens": torch.zeros((2, 8), dtype=torch.int32)[:, ::2]}, "tokens is not contiguous"),
        ({"counts": ints(0, 0, 0)}, "counts has shape"),
        ({"states": torch.zeros(2, 3, D)}, "states has shape"),
        ({"sums": torch.zeros(2, 4, 2)}, "sums has shape"),
        ({"sums": torch.zeros(2, 4, 4)}, "sums has shape"),
        ({"sums": torch.zeros(2, 3, 3)}, "sums has shape"),
        ({"sums": torch.zeros((2, 4, 3), dtype=torch.float64)}, "sums has elements of"),
        ({"sums": torch.zeros(2, 4, 6)[:, :, ::2]}, "sums is not contiguous"),
        ({"sums": None}, "sums and runner_ups go together"),
        ({"runner_ups": None}, "sums and runner_ups go together"),
        ({"runner_ups": torch.zeros((2, 4, 3), dtype=torch.int32)}, "sums has shape"),
        ({"runner_ups": torch.zeros((1, 4, 2), dtype=torch.int32)}, "runner_ups has shape"),
        ({"runner_ups": torch.zeros(2, 4, 2)}, "runner_ups has elements of"),
    ],
)
def test_bad_arrays_of_a_draft_are_refused(changes: dict[str, object], message: str) -> None:
    isa.extension.DraftTask(**task_arguments())
    with pytest.raises(ValueError, match=message):
        isa.extension.DraftTask(**task_arguments(**changes))


def draft(
    exit: Any, positions: Sequence[int] = (3, 4, 2), slots: Sequence[int] = (0, 0, 1), **changes: object
) -> dict[str, Any]:
    """One draft on an empty cache, which must be left so if it is refused. Returns the task's arrays."""
    task = task_arguments(**changes)
    cache = make_cache()
    try:
        make_engine().draft(exit, make_rows(ints(*slots), ints(*positions)), cache, isa.extension.DraftTask(**task))
    except ValueError:
        assert not cache.bytes.any()
        assert not task["counts"].any()
        raise
    assert cache.bytes.any()
    return task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype is float16; it must be float32, bfloat16 or int8"),
        ({"layers": 0}, "layers is 0"),
        ({"slots": -1}, "slots is -1"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"length": 2**40}, "length is"),
        ({"head_dim": 513}, "head_dim is 513"),
    ],
)
def test_bad_sizes_of_a_cache_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [{"length": 2**28}, {"length": 2**30, "layers": 2**30, "kv_heads": 2**30}])
def test_a_cache_beyond_all_memory_is_an_error(sizes: dict[str, int]) -> None:
    with pytest.raises(MemoryError):
        make_cache(torch.float32, slots=2**20, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache.copy_prefix(0, 2, 4), "target is 2"),
        (lambda cache: cache.copy_prefix(-1, 0, 4), "source is -1"),
        (lambda cache: cache.copy_prefix(1, 1, 4), "source and target are both 1"),
        (lambda cache: cache.copy_prefix(0, 1, LENGTH + 1), f"length is {LENGTH + 1}"),
        (lambda cache: cache.keep_path(2, 0, [0]), "slot is 2"),
        (lambda cache: cache.keep_path(0, LENGTH, [0]), f"start is {LENGTH}"),
        (lambda cache: cache.keep_path(0, LENGTH - 1, [0, 1]), "a row is 1"),
        (lambda cache: cache.keep_path(0, 0, [0, 2, 2]), "a row is 2"),
        (lambda cache: cache.keep_path(0, 0, [-1]), "a row is -1"),
        (lambda cache: cache.copy_from(make_cache(torch.int8)), "of another kind"),
        (lambda cache: cache.copy_from(make_cache(head_dim=HEAD_DIM + 2)), "of another kind"),
        (lambda cache: cache.copy_from(make_cache(layers=2)), "of another kind"),
        (lambda cache: cache.copy_from(make_cache(kv_heads=KV_HEADS + 1)), "of another kind"),
        (lambda cache: cache.copy_from(make_cache(slots=3)), "number of slots is 3"),
        (lambda cache: cache.copy_from(make_cache(length=LENGTH + 1)), f"length is {LENGTH + 1}"),
    ],
)
def test_bad_copies_are_refused(change: Callable[[Any], None], message: str) -> None:
    cache = make_cache()
    cache.bytes[...] = np.arange(cache.nbytes, dtype=np.uint64).astype(np.uint8).reshape(cache.bytes.shape)
    before = cache.bytes.copy()
    with pytest.raises(ValueError, match=message):
        change(cache)
    assert np.array_equal(cache.bytes, before)


BARE: dict[str, Any] = {"features": None, "token_states": None, "ids": ints(1, 2)}
"""What a plain exit takes; beside rows in two slots."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draft(make_exit(model_layers=ints(-1))), "a layer of the exit is -1"),
        (lambda: draft(make_exit(model_layers=ints(3))), "a layer of the exit is 3"),
        (lambda: draft(make_exit(own_layers=ints(3))), "a layer of the exit is 3"),
        (lambda: make_exit(model_layers=ints(), own_layers=None, num_features=0), "an exit needs a layer"),
        (lambda: make_exit(own_layers=None), "an exit without layers of its own cannot use features"),
        (lambda: make_exit(num_features=0), "an exit with features needs fuse"),
        (lambda: make_exit(mix=None), "an exit with features needs fuse"),
        (lambda: make_exit(vocabulary=ints(-1)), "token id is -1"),
        (lambda: make_exit(vocabulary=ints()), "vocabulary has no tokens"),
        (lambda: make_exit(vocabulary=torch.arange(40)), "vocabulary has elements of"),
        (lambda: draft(make_exit(vocabulary=torch.arange(11, 51, dtype=torch.int32))), "token id is 50"),
        (lambda: draft(make_exit(vocabulary=torch.arange(39, dtype=torch.int32))), "a token id per row of its head"),
        (lambda: draft(make_exit(vocabulary=None)), "a head that lacks tokens"),
        (lambda: draft(make_exit(head=matrix(40, D + 1, 0))), "the head has 65 columns"),
        (lambda: draft(make_exit(fuse=matrix(D, D, 0))), "mixing does not fit"),
        (lambda: draft(make_exit(mix=matrix(2 * D, 2 * D, 0))), "mixing does not fit"),
        (lambda: draft(make_exit(token_norm=torch.ones(D - 1))), "mixing does not fit"),
        (lambda: draft(make_exit(), features=None), "the exit needs 2 features; there are 0"),
        (lambda: draft(make_exit(), features=torch.zeros(3, 1, D)), "the exit needs 2 features; there are 1"),
        (lambda: draft(make_exit(), token_states=None), "the exit needs token_states"),
        (lambda: draft(make_exit(model_layers=ints())), "the exit takes no token_states"),
        (lambda: draft(make_exit(), ids=ints(1, 50, 2)), "token id is 50"),
        (lambda: draft(make_exit(), (3, 4), (0, 0)), "ids and slots differ in length"),
        (lambda: draft(make_exit(), (12, 13, 2)), "position is 13; it must be 0 to 12"),
        (lambda: draft(make_exit(), (3, 4, 15)), "position is 15; it must be 0 to 14"),
        (lambda: draft(make_exit(), slots=(0, 0, 2)), "slot is 2"),
        (lambda: draft(make_exit(), (3, 4, 5), (0, 0, 0)), "there are more limits than sequences"),
        (lambda: draft(plain_exit(), **{**BARE, "ids": ints(1, 2, 3)}), "occurs twice"),
        (
            lambda: draft(plain_exit(), (3,), (0,), **{**BARE, "ids": ints(1)}),
            "there are more limits than sequences",
        ),
        (lambda: draft(make_exit(), rules=[rule()]), "there are 1 rules for 2 sequences"),
        (lambda: draft(make_exit(), rules=[rule()] * 3), "there are 3 rules for 2 sequences"),
        (lambda: draft(make_exit(), rules=[rule(), rule(biased=[50], biases=[1])]), "token id is 50"),
        (lambda: draft(make_exit(), rules=[rule(as_is, ints(50), ints(0)), rule()]), "token id is 50"),
        (
            lambda: draft(
                make_exit(),
                runner_ups=torch.zeros((2, 4, 40), dtype=torch.int32),
                sums=torch.zeros(2, 4, 41),
            ),
            "the number of runner-ups is 40",
        ),
        (
            lambda: draft(
                make_exit(),
                states=torch.zeros(2, 4, 32),
                features=torch.zeros(3, 2, 32),
                token_states=torch.zeros(3, 32),
            ),
            "states have 32 columns",
        ),
    ],
)
def test_drafts_that_fit_nothing_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_draft_ends_where_its_limit_says() -> None:
    bare = {**BARE, "min_confidence": 0.0}
    assert draft(plain_exit(), (3, 2), (0, 1), **bare)["counts"].tolist() == [4, 2]


def test_the_noise_of_a_draft_is_that_of_its_positions() -> None:
    """Of tokens behind the last row of each sequence, where an exit with layers of its own takes several."""
    rules = [
        Rule(SamplingParams(temperature=0.5, logit_bias={44: 1.0, 3: 1e9}), seed=7),  # no row of the head is token 3
        Rule(SamplingParams(temperature=2.0), seed=8),
    ]
    task = draft(
        make_exit(),
        min_confidence=0.0,
        rules=[
            isa.extension.Rule(temperature=0.5, seed=7, biased=[44, 3], biases=[1.0, 1e9]),
            isa.extension.Rule(temperature=2.0, seed=8),
        ],
    )
    assert task["counts"].tolist() == [4, 2]
    for sequence, last_position in enumerate((4, 2)):
        for step in range(int(task["counts"][sequence])):
            logits = torch.zeros(1, 40)
            make_engine().logits(task["states"][sequence, step][None], logits, matrix(40, D, 40))
            place = Place(rules[sequence], last_position + 1 + step)
            expected, _ = best_sums(logits[0].numpy(), range(5, 45), place, 3, array_api_compat.numpy, 1.5)
            drafted = [task["tokens"][sequence, step], *task["runner_ups"][sequence, step]]
            assert drafted == [5 + row for _, row in expected]
            assert task["sums"][sequence, step].tolist() == pytest.approx([value for value, _ in expected], abs=1e-5)


def test_the_rows_of_a_draft_are_no_tree() -> None:
    rows = isa.extension.Rows(slots=ints(0, 0, 1), positions=ints(3, 4, 2), parent_offsets=ints(0, 1, 0))
    cache = make_cache()
    with pytest.raises(ValueError, match="no tree"):
        make_engine().draft(make_exit(), rows, cache, isa.extension.DraftTask(**task_arguments()))


def test_more_sequences_than_limits_are_refused() -> None:
    arrays: dict[str, Any] = {"limits": ints(4), "rules": [rule()]}
    arrays |= {name: task_arguments()[name][:1] for name in RESULTS}
    with pytest.raises(ValueError, match="fewer limits than sequences"):
        draft(make_exit(), **arrays)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, r"temperature is -0\.5"),
        ({"temperature": float("nan")}, "temperature is"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"top_p": float("nan")}, "top_p is"),
        ({"min_p": -1.0}, "min_p is -1"),
        ({"min_p": 1.5}, r"min_p is 1\.5"),
        ({"min_p": float("nan")}, "min_p is"),
        ({"repetition": 0.0}, "repetition is 0"),
        ({"repetition": -1.0}, "repetition is -1"),
        ({"repetition": float("nan")}, "repetition is"),
        ({"biased": [1, 2], "biases": [0.5]}, "there are 1 biases for 2 tokens"),
        ({"biased": [1]}, "there are 0 biases for 1 tokens"),
        ({"biases": [0.5]}, "there are 1 biases for 0 tokens"),
        ({"biased": [1, -1], "biases": [0.5, 0.5]}, "token id is -1"),
    ],
)
def test_rules_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        isa.extension.Rule(**settings)


@pytest.mark.parametrize("settings", [{"seed": -1}, {"seed": 2**64}, {"biased": [2**31], "biases": [0.5]}])
def test_numbers_of_too_many_bits_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        isa.extension.Rule(**settings)


@pytest.mark.parametrize(
    ("seen", "counts", "message"),
    [
        (ints(1, 2), ints(1), "counts has shape"),
        (ints(1, 2), ints(1, 2, 3), "counts has shape"),
        (ints(1, -1), ints(1, 2), "token id is -1"),
        (ints(1, 2)[None], ints(1, 2), "seen has shape"),
        (torch.tensor([1, 2]), ints(1, 2), "seen has elements of"),
        (ints(1, 2), torch.tensor([1, 2]), "counts has elements of"),
        (ints(1, 2, 3, 4)[::2], ints(1, 2), "seen is not contiguous"),
    ],
)
def test_bad_counts_of_a_rule_are_refused(seen: Tensor, counts: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(as_is, seen, counts)


def choose(**changes: Any) -> dict[str, Any]:
    """Choose tokens for three rows, of which two are reported. What is refused must leave the results as they are.
    Returns the arguments."""
    states = torch.randn((3, D), generator=torch.Generator().manual_seed(60))
    arguments: dict[str, Any] = {
        "h": states,
        "out": ints(-5, -5, -5),
        "rules": [rule(), rule(temperature=1.0), rule()],
        "positions": [0, 2**31 - 1, 3],
        "paths": [[], [0, 49], [7]],
        "allowed": [None, words(2**32 - 1, 2**18 - 1), None],
        "reported": [0, 2],
        "logits": torch.full((2, VOCABULARY), -5.0),
        **changes,
    }
    results = [arguments[name] for name in ("out", "logits") if arguments[name] is not None]
    before = [result.clone() for result in results]
    try:
        make_engine().choose(**arguments)
    except ValueError:
        assert all(map(torch.equal, results, before))
        raise
    assert not any(map(torch.equal, results, before))
    return arguments


@pytest.mark.parametrize(
    ("make_changes", "message"),
    [
        (lambda: {"h": torch.zeros(3, D - 1)}, "h has shape"),
        (lambda: {"h": torch.zeros(3, 2 * D)[:, ::2]}, "h is not contiguous"),
        (lambda: {"h": torch.zeros(3, D).double()}, "h has elements of"),
        (lambda: {"h": torch.zeros(2, D)}, "out has shape"),
        (lambda: {"out": ints(0, 0)}, "out has shape"),
        (lambda: {"out": ints(0, 0, 0)[:, None]}, "out has shape"),
        (lambda: {"out": torch.zeros(3)}, "out has elements of"),
        (lambda: {"out": torch.zeros(3, dtype=torch.int64)}, "out has elements of"),
        (lambda: {"rules": [rule()] * 2}, "must have 3 entries"),
        (lambda: {"rules": [rule()] * 4}, "must have 3 entries"),
        (lambda: {"positions": [0, 1]}, "must have 3 entries"),
        (lambda: {"positions": [0, 1, 2, 3]}, "must have 3 entries"),
        (lambda: {"paths": []}, "must have 3 entries"),
        (lambda: {"paths": [[]] * 4}, "must have 3 entries"),
        (lambda: {"allowed": [None] * 2}, "must have 3 entries"),
        (lambda: {"allowed": [None] * 4}, "must have 3 entries"),
        (lambda: {"positions": [0, -1, 2]}, "position is -1"),
        (lambda: {"paths": [[], [0, 50], []]}, "token id is 50"),
        (lambda: {"paths": [[], [], [-1, 0]]}, "token id is -1"),
        (lambda: {"rules": [rule(), rule(), rule(biased=[50], biases=[1.0])]}, "token id is 50"),
        (lambda: {"rules": [rule(as_is, ints(50), ints(1)), rule(), rule()]}, "token id is 50"),
        (lambda: {"allowed": [None, words(1), None]}, "allowed has shape"),
        (lambda: {"allowed": [None, None, words(1, 1, 1)]}, "allowed has shape"),
        (lambda: {"allowed": [None, words(1, 1)[None], None]}, "allowed has shape"),
        (lambda: {"allowed": [ints(1, 1), None, None]}, "allowed has elements of"),
        (lambda: {"allowed": [torch.ones(VOCABULARY, dtype=torch.bool), None, None]}, "allowed has elements of"),
        (lambda: {"allowed": [None, words(1, 1, 1, 1)[::2], None]}, "allowed is not contiguous"),
        (lambda: {"logits": None}, "reported and logits go together"),
        (lambda: {"reported": []}, "reported and logits go together"),
        (lambda: {"reported": [1, 0]}, "a reported row is 0; it must be 2 to 2"),
        (lambda: {"reported": [1, 1]}, "a reported row is 1; it must be 2 to 2"),
        (lambda: {"reported": [0, 3]}, "a reported row is 3"),
        (lambda: {"reported": [-1, 0]}, "a reported row is -1"),
        (lambda: {"reported": [0, 1, 2]}, "logits has shape"),
        (lambda: {"logits": torch.zeros(2, VOCABULARY - 1)}, "logits has shape"),
        (lambda: {"logits": torch.zeros(2, VOCABULARY).double()}, "logits has elements of"),
        (lambda: {"logits": torch.zeros(2, 2 * VOCABULARY)[:, ::2]}, "logits is not contiguous"),
    ],
)
def test_choices_that_fit_nothing_are_refused(make_changes: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**make_changes())


def test_choices_are_written_where_they_should_be() -> None:
    arguments = choose()
    logits = torch.zeros(3, VOCABULARY)
    make_engine().logits(arguments["h"], logits)
    assert torch.equal(arguments["logits"], logits[[0, 2]])
    same = choose(reported=[], logits=None)
    assert torch.equal(same["out"], arguments["out"])
    one_token, no_token = words(0, 2**17), words(0, 2**18)  # the last one, and one behind it
    found = choose(allowed=[one_token, no_token, no_token])["out"]
    assert found.tolist() == [VOCABULARY - 1, -1, -1]


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: layer(0, q=matrix(HEADS * HEAD_DIM, D + 1, 0)), "q_proj is"),
        (lambda: layer(0, down=matrix(D, INTERMEDIATE + 1, 0)), "down_proj is"),
        (lambda: layer(0, input_norm=torch.ones(D - 1)), "input_layernorm has 63 elements"),
        (lambda: layer(0, k_bias=torch.ones(D)), r"k_proj\.bias has 64 elements"),
        (lambda: layer(0, q_norm=torch.ones(HEAD_DIM + 1)), "q_norm has 17 elements"),
        (lambda: layer(0, q_norm=torch.ones(0)), "q_norm has no elements"),
        (lambda: layer(0, v_bias=torch.ones(32, dtype=torch.float64)), r"v_proj\.bias has elements of"),
        (lambda: layer(0, post_norm=torch.ones(2 * D)[::2]), "post_attention_layernorm is not contiguous"),
    ],
)
def test_layers_of_another_shape_are_refused(make_layer: Callable[[], Any], message: str) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_layer(make_layer())
    with pytest.raises(ValueError, match="cache_layer is 4; it must be 0 to 3"):
        engine.add_layer(layer(0), cache_layer=4)


def test_an_engine_without_a_head_refuses_what_needs_one() -> None:
    shape = isa.extension.Shape(
        hidden_size=D, intermediate_size=INTERMEDIATE, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        vocab_size=VOCABULARY, rms_norm_eps=1e-5,
    )  # fmt: skip
    engine = isa.extension.Engine("portable", 1, shape)
    with pytest.raises(ValueError, match="no embedding"):
        engine.embed(ints(1), torch.zeros(1, D))
    with pytest.raises(ValueError, match="no head"):
        engine.greedy(torch.zeros(1, D), ints(0))
    with pytest.raises(ValueError, match="no head"):
        engine.choose(torch.zeros(1, D), ints(0), rules=[rule()], positions=[0], paths=[[]], allowed=[None])
    with pytest.raises(ValueError, match="heads do not divide"):
        isa.extension.Shape(
            hidden_size=D, intermediate_size=INTERMEDIATE, num_heads=4, num_kv_heads=3, head_dim=HEAD_DIM,
            vocab_size=VOCABULARY, rms_norm_eps=1e-5,
        )  # fmt: skip


def is_tree(offsets: Sequence[int], positions: Sequence[int]) -> bool:
    """Whether rows of one sequence are a tree whose keys and values fit into the cache."""
    follow = all(
        0 < offset <= row and positions[row] == positions[row - offset] + 1 for row, offset in enumerate(offsets) if row
    )
    return offsets[0] == 0 and positions[0] >= 0 and follow and positions[0] + len(offsets) <= LENGTH


@settings(max_examples=200, deadline=None)
@given(data=st.data(), count=st.integers(1, 8), start=st.integers(0, LENGTH))
def test_fuzzed_trees_run_or_are_refused(data: st.DataObject, count: int, start: int) -> None:
    """A tree, of which one parent or position may be changed."""
    parents = (-1, *(data.draw(st.integers(0, row - 1)) for row in range(1, count)))
    rows = Rows([Segment(0, start, count, parents)])
    offsets, positions = rows.parent_offsets, rows.positions
    assert offsets is not None
    if data.draw(st.booleans()):
        changed = data.draw(st.sampled_from((offsets, positions)))
        changed[data.draw(st.integers(0, count - 1))] = data.draw(
            st.integers(-(2**31), 2**31 - 1) | st.integers(-1, LENGTH)
        )
    cache = make_cache()
    try:
        tree = isa.extension.Rows(
            slots=torch.zeros(count, dtype=torch.int32), positions=positions, parent_offsets=offsets
        )
        make_engine().run_layers(torch.ones(count, D), torch.empty(count, D), 0, 3, tree, cache)
    except ValueError:
        assert not is_tree(offsets.tolist(), positions.tolist())
    else:
        assert is_tree(offsets.tolist(), positions.tolist())
