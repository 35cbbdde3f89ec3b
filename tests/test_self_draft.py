"""Drafts by the model's own layers: some of them skipped, or all in a copy of lower precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.backends.base import run_by_number
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.draft import skip_search
from hopskip.draft.exit import source_of
from hopskip.draft.make import resolve
from hopskip.draft.skip_search import search
from hopskip.engine import make_engine
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig, load_backend
from hopskip.prove.greedy import greedy_proofs
from hopskip.prove.proof import all_hold
from hopskip.sequence import Request
from hopskip.speculative import Source, early_exit, layer_list, layer_skip
from tests.models import tiny_model
from tests.tiny import write_checkpoint

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [20, 21]]
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("self-draft")
    write_checkpoint(folder, "qwen3", tokenizer=True)
    return open_checkpoint(folder)


def native_model(checkpoint: Checkpoint, precision: str, *copies: Any) -> NativeBackend:
    model = NativeBackend.load(checkpoint, precision, threads=2)
    for copy in copies:
        model.attach_copy(checkpoint, copy)
    return model


def generate(model: TorchBackend | NativeBackend, config: SpeculativeConfig, params: SamplingParams = PARAMS) -> Any:
    engine = make_engine(model, config)
    rounds: list[Any] = []
    engine.on_round = rounds.append
    sequences = [engine.add(Request(prompt, params)) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    return [s.token_ids for s in sequences], sequences, rounds


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_copy_and_no_skipped_layer_changes_a_token(checkpoint: Checkpoint, precision: str) -> None:
    model = native_model(checkpoint, precision, "q8", "q4")
    proofs = list(greedy_proofs(model, PROMPTS, 12))
    own = [proof for proof in proofs if "skip=" in proof.setting or "q8" in proof.setting or "q4" in proof.setting]
    assert {part for proof in own for part in proof.setting.split() if part in ("q8", "q4")} == {"q8", "q4"}
    assert all_hold(own)


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_new_tokens=24, temperature=0.8, seed=3)])
def test_a_copy_drafts_what_the_model_is_likely_to_say(checkpoint: Checkpoint, params: SamplingParams) -> None:
    config = SpeculativeConfig(draft="layer-skip", skip_layers=(), draft_precision="q8", num_draft_tokens=4)
    _, sequences, rounds = generate(native_model(checkpoint, "float32", "q8"), config, params)
    assert all(sequence.stats.acceptance_rate > 0.6 for sequence in sequences)
    assert {part.source for round in rounds for part in round.sequences} <= {"layer-skip:3-q8", None}
    assert {token.origin for sequence in sequences for token in sequence.tokens} <= {"layer-skip", "target", "bonus"}


def test_a_copy_uses_the_cache_of_its_original(checkpoint: Checkpoint) -> None:
    """What a copy computes for a row is what a model loaded in its precision computes on the same keys and values."""
    model, low = native_model(checkpoint, "float32", "q8"), NativeBackend.load(checkpoint, "q8", kv_dtype="float32")
    ids = [3, 1, 4, 1, 5, 9]
    cache, other = model.new_cache(1, 8), low.new_cache(1, 8)
    rows = Rows([Segment(0, 0, 5)])
    model.run_layers(model.embed(ids[:5]), 0, 3, rows, cache)
    last = Rows([Segment(0, 5, 1)])
    other.handle.bytes[...] = cache.handle.bytes
    cache.handle.bytes[1] = 7
    h_ND = model.embed(ids[5:])  # the embedding is the model's own
    found_ND = run_by_number(model, h_ND, model.layer_numbers((0, 2), "q8"), last, cache)
    expected_ND = run_by_number(low, h_ND, (0, 2), last, other)
    assert np.array_equal(found_ND, expected_ND)
    assert np.array_equal(cache.handle.bytes[[0, 2]], other.handle.bytes[[0, 2]])
    assert (cache.handle.bytes[1] == 7).all(), "the skipped layer was not run"
    assert np.array_equal(model.logits(found_ND, "q8"), low.logits(expected_ND))


def idle_layers(model: TorchBackend, *indices: int) -> TorchBackend:
    """Layers that add nothing."""
    for index in indices:
        model.weights.layers[index].o_proj.zero_()
        model.weights.layers[index].down_proj.zero_()
    return model


def test_the_search_finds_layers_that_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = idle_layers(tiny_model(num_hidden_layers=6), 1, 4)
    # time as a model would take it that is large enough not to notice Python
    monkeypatch.setattr(skip_search._Search, "_time", lambda self, draft: 0.1 + len(draft.layers))
    monkeypatch.setattr(skip_search, "_SECONDS", math.inf)  # however slow the machine, the search comes to its end
    path = tmp_path / "some" / "found.json"
    found = search(model, None, path)
    assert {1, 4} <= set(found.skip_layers)
    assert found.agreement > 0.5
    assert search(model, None, path) == found
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"skip_layers": [3]}))
    assert search(model, None, path).skip_layers == (3,), "what is kept is not looked for again"
    for damaged in ("[]", json.dumps(kept | {"skip_layers": [6]})):
        path.write_text(damaged)
        assert search(model, None, path) == found, "a damaged file is made anew"
    engine = make_engine(model, SpeculativeConfig(draft="layer-skip"))
    assert engine.speculative.skip_layers == found.skip_layers


def test_idle_layers_may_be_skipped_without_a_rejection() -> None:
    model = idle_layers(tiny_model(num_hidden_layers=6), 1, 4)
    plain, *_ = generate(model, SpeculativeConfig(draft="none"))
    config = SpeculativeConfig(draft="layer-skip", skip_layers=(1, 4))
    tokens, sequences, _ = generate(model, config)
    assert tokens == plain
    assert all(sequence.stats.acceptance_rate == 1 for sequence in sequences)


def test_a_search_that_finds_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_search._Search, "_agreement", lambda self, skipped: 0.1 if skipped else 1.0)
    with pytest.raises(ConfigError, match="no layer of this model can be skipped"):
        make_engine(tiny_model(), SpeculativeConfig(draft="layer-skip"))


def test_the_texts_of_the_search_do_not_depend_on_what_was_drawn_before() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    first = skip_search._Search(model, None, None)._token_ids
    torch.manual_seed(1)
    assert first == skip_search._Search(model, None, None)._token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "layer-skip", "skip_layers": ()}, "skip_layers names no layer"),
        ({"draft": "layer-skip", "exit_layer": 2}, "exit_layer=2 has no effect"),
        ({"draft": "early-exit", "skip_layers": (1,)}, "skip_layers=.* has no effect"),
        ({"draft": "ngram", "draft_precision": "q8"}, "draft_precision=q8 has no effect"),
        ({"draft": "exit-branch", "draft_precision": "q8"}, "draft_precision=q8 has no effect"),
        ({"draft": "none", "skip_layers": (1,)}, "skip_layers=.* has no effect"),
        ({"exit_layer": 2, "skip_layers": (1,)}, r"exit_layer=2 and skip_layers=\[1\] are two drafts"),
        ({"draft_precision": "q2"}, "draft_precision is 'q2'; choose one of q8, q4"),
        ({"draft": "layer-skip", "verify": "reuse"}, "'reuse' goes on from the first layers"),
        ({"draft": "early-exit", "draft_precision": "q8", "verify": "reuse"}, "'reuse' goes on from the first layers"),
    ],
)
def test_what_has_no_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig(**options)


def test_what_does_not_fit_the_model_is_refused(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    for layers in ((3,), (-1,), (0, 1, 2)):
        with pytest.raises(ConfigError, match="this model has layers 0 to 2, and some must be left"):
            resolve(SpeculativeConfig(draft="layer-skip", skip_layers=layers), config)
    with pytest.raises(ConfigError, match="needs the native CPU backend"):
        load_backend(checkpoint, LoadConfig(backend="torch", device="cpu")).attach_copy(checkpoint, "q8")
    with pytest.raises(ConfigError, match="draft_precision=q8 gains nothing"):
        native_model(checkpoint, "q4", "q8")
    with pytest.raises(ConfigError, match="attached to this model already"):
        native_model(checkpoint, "float32", "q8", "q8")


def test_defaults_follow_the_options() -> None:
    config = tiny_model().config
    assert resolve(SpeculativeConfig(draft_precision="q8"), config).draft == "both"
    assert resolve(SpeculativeConfig(skip_layers=(2,)), config).draft == "both"
    assert resolve(SpeculativeConfig(draft="both", skip_layers=(2,)), config).exit_layer is None
    assert resolve(SpeculativeConfig(skip_layers=(2,)), config).num_draft_tokens == 3
    assert resolve(SpeculativeConfig(exit_layer=2, draft_precision="q8"), config).draft == "early-exit"
    assert not SpeculativeConfig(draft_precision="q8").may_use_trained_exit
    assert SpeculativeConfig(draft="auto", draft_precision="q8").may_use_trained_exit


def test_from_the_outside(checkpoint: Checkpoint) -> None:
    prompt = [5, 6, 7, 8]
    plain = LLM(checkpoint.path, speculative=SpeculativeConfig(draft="none")).generate(prompt, PARAMS)[0]
    for options in (
        {"draft": "auto", "draft_precision": "q8", "skip_layers": ()},
        {"draft": "both", "exit_layer": 2, "draft_precision": "q4"},
        {"draft_precision": "q8", "skip_layers": (1,)},
    ):
        llm = LLM(checkpoint.path, speculative=SpeculativeConfig(**options))
        assert llm.generate(prompt, PARAMS)[0].token_ids == plain.token_ids


def test_names_and_lists() -> None:
    assert str(source_of(early_exit(8))) == "early-exit:8"
    assert str(source_of(layer_skip((1, 3), 8, "q4"))) == "layer-skip:6-q4"
    for name in ("ngram", "exit-branch", "early-exit:8", "early-exit:2-q8", "layer-skip:6-q4"):
        assert str(Source.parse(name)) == name
    for name in ("", "ngrams", "early-exit:", "early-exit:x", "ngram:-"):
        with pytest.raises(ValueError, match=r"is no source|invalid literal"):
            Source.parse(name)
    assert layer_list("11+10") == (10, 11)
    assert layer_list("none") == ()
    with pytest.raises(ConfigError, match="skip_layers is '1,2'; give layers with"):
        layer_list("1,2")
