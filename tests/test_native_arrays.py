"""What the extension asks of its arrays: NumPy's and PyTorch's alike, checked before anything computes.

A model of two layers with an exit that has one more of its own, random float32 weights. Shape letters: N rows, D hidden
size, B sequences, k draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hopskip.backends.native import isa
from hopskip.backends.native.quantize import pack
from hopskip.backends.rows import Rows, Segment

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
    packed = pack(weight, cols)
    return isa.extension.Matrix(int(packed.format), rows, cols, convert(packed.data))


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


def make_cache(dtype: torch.dtype, convert: Convert = as_is) -> tuple[dict[str, Any], Any]:
    """The arrays, and the cache of them."""
    shape = (3, NUM_SLOTS, KV_HEADS, LENGTH, HEAD_DIM)
    arrays = {name: convert(torch.zeros(shape, dtype=dtype)) for name in ("k", "v")}
    if dtype == torch.int8:
        arrays |= {f"{name}_scales": convert(torch.zeros(shape[:-1])) for name in ("k", "v")}
    return arrays, isa.extension.Cache(**arrays)


def make_rows(slots: Tensor, positions: Tensor) -> Any:
    return isa.extension.Rows(slots=slots, positions=positions)


def task_arguments(**changes: object) -> dict[str, Any]:
    """A good `DraftTask` for `make_exit()`, two sequences with three rows, but for these changes."""
    random = torch.Generator().manual_seed(50)
    good = {
        "ids": ints(1, 2, 3),
        "limits": ints(4, 2),
        "min_confidence": 0.01,
        "features": torch.randn((3, 2, D), generator=random),
        "token_states": torch.randn((3, D), generator=random),
        "temperatures": torch.tensor([0.5, 0]),
        "uniforms": torch.rand((2, 4), dtype=torch.float64, generator=random),
        "tokens": torch.zeros((2, 4), dtype=torch.int32),
        "counts": torch.zeros(2, dtype=torch.int32),
        "states": torch.zeros(2, 4, D),
        "probabilities": torch.zeros(2, 4, 3),
        "runner_ups": torch.zeros((2, 4, 2), dtype=torch.int32),
        "distributions": torch.zeros(2, 4, 40),
    }
    return good | changes


def every_call(dtype: torch.dtype, given: Convert, result: Convert) -> dict[str, Any]:
    """What each call of the extension writes, by name: inputs go through `given`, results through `result`."""
    m, engine = isa.extension, make_engine(given)
    arrays, cache = make_cache(dtype, result)
    found: dict[str, Any] = dict(arrays)
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
    inputs = ("ids", "limits", "features", "token_states", "temperatures", "uniforms")
    task = {
        name: value if isinstance(value, float) else (given if name in inputs else result)(value)
        for name, value in task_arguments().items()
    }
    engine.draft(make_exit(given), rows, cache, m.DraftTask(**task))
    return found | {name: value for name, value in task.items() if name not in (*inputs, "min_confidence")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_numpy_arrays_serve_as_well(dtype: torch.dtype) -> None:
    """Inputs may be read-only. NumPy has no bfloat16, so such a cache is left out."""
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


def test_rows_and_tasks_keep_the_integers_that_were_checked() -> None:
    engine, (_, cache) = make_engine(), make_cache(torch.float32)
    slots, positions = ints(0, 0, 1), ints(3, 4, 2)
    task, same_task = task_arguments(), task_arguments()
    rows, made = make_rows(slots, positions), isa.extension.DraftTask(**task)
    exit_layers, vocabulary = ints(0), torch.arange(5, 45, dtype=torch.int32)
    exit = make_exit(model_layers=exit_layers, vocabulary=vocabulary)
    for changed in (slots, positions, task["ids"], task["limits"], exit_layers, vocabulary):
        changed.fill_(2**31 - 1)
    engine.draft(exit, rows, cache, made)
    engine.draft(make_exit(), make_rows(ints(0, 0, 1), ints(3, 4, 2)), cache, isa.extension.DraftTask(**same_task))
    assert torch.equal(task["tokens"], same_task["tokens"])
    assert torch.equal(task["states"], same_task["states"])


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
        ({"temperatures": torch.tensor([0.5])}, "temperatures has shape"),
        ({"temperatures": torch.tensor([0.5, -1])}, "a temperature is -1"),
        ({"temperatures": torch.tensor([0.5, float("nan")])}, "a temperature is"),
        ({"uniforms": torch.zeros(2, 4)}, "uniforms has elements of"),
        ({"uniforms": torch.zeros((2, 3), dtype=torch.float64)}, "uniforms has shape"),
        ({"uniforms": None}, "temperatures need uniforms"),
        ({"temperatures": None}, "uniforms need temperatures"),
        ({"distributions": None}, "temperatures and distributions go together"),
        ({"temperatures": None, "uniforms": None}, "temperatures and distributions go together"),
        ({"distributions": torch.zeros(1, 4, 40)}, "distributions has shape"),
        ({"tokens": torch.zeros(2, 4)}, "tokens has elements of"),
        ({"tokens": torch.zeros((2, 0), dtype=torch.int32)}, "the width of tokens is 0"),
        ({"tokens": torch.zeros((2, 8), dtype=torch.int32)[:, ::2]}, "tokens is not contiguous"),
        ({"counts": ints(0, 0, 0)}, "counts has shape"),
        ({"states": torch.zeros(2, 3, D)}, "states has shape"),
        ({"probabilities": torch.zeros(2, 4, 2)}, "probabilities has shape"),
        ({"probabilities": None}, "probabilities and runner_ups go together"),
        ({"runner_ups": None}, "probabilities and runner_ups go together"),
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
    arrays, cache = make_cache(torch.float32)
    try:
        make_engine().draft(exit, make_rows(ints(*slots), ints(*positions)), cache, isa.extension.DraftTask(**task))
    except ValueError:
        assert not arrays["k"].any()
        assert not task["counts"].any()
        raise
    assert bool(arrays["k"].any())
    return task


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
        (
            lambda: draft(plain_exit(), (3, 2), (0, 1), **BARE, distributions=torch.zeros(2, 4, 40)),
            "distributions are over 40 tokens; the exit's head has 50",
        ),
        (
            lambda: draft(
                make_exit(),
                runner_ups=torch.zeros((2, 4, 40), dtype=torch.int32),
                probabilities=torch.zeros(2, 4, 41),
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
    bare = {**BARE, "min_confidence": 0.0, "distributions": torch.zeros(2, 4, VOCABULARY)}
    assert draft(plain_exit(), (3, 2), (0, 1), **bare)["counts"].tolist() == [4, 2]


def test_the_rows_of_a_draft_are_no_tree() -> None:
    rows = isa.extension.Rows(slots=ints(0, 0, 1), positions=ints(3, 4, 2), parent_offsets=ints(0, 1, 0))
    _, cache = make_cache(torch.float32)
    with pytest.raises(ValueError, match="no tree"):
        make_engine().draft(make_exit(), rows, cache, isa.extension.DraftTask(**task_arguments()))


def test_more_sequences_than_limits_are_refused() -> None:
    arrays: dict[str, Any] = {
        "limits": ints(4),
        "temperatures": torch.zeros(1),
        "uniforms": torch.zeros((1, 4), dtype=torch.float64),
    }
    results = ("tokens", "counts", "states", "probabilities", "runner_ups", "distributions")
    arrays |= {name: task_arguments()[name][:1] for name in results}
    with pytest.raises(ValueError, match="fewer limits than sequences"):
        draft(make_exit(), **arrays)


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
    _, cache = make_cache(torch.float32)
    try:
        tree = isa.extension.Rows(
            slots=torch.zeros(count, dtype=torch.int32), positions=positions, parent_offsets=offsets
        )
        make_engine().run_layers(torch.ones(count, D), torch.empty(count, D), 0, 3, tree, cache)
    except ValueError:
        assert not is_tree(offsets.tolist(), positions.tolist())
    else:
        assert is_tree(offsets.tolist(), positions.tolist())
