"""Trained exits: what a branch drafts, where its keys and values come from, and that text never depends on it."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from hopskip import SamplingParams, SpeculativeConfig
from hopskip.backends.base import Backend
from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.isa import obstacle
from hopskip.backends.rows import Cache
from hopskip.backends.steps import StepwiseBackend
from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.trained_exit import ExitConfig, Mixing, TrainedExit
from hopskip.draft import exit as exit_module
from hopskip.draft.base import Draft
from hopskip.draft.exit import ExitDrafter
from hopskip.draft.make import resolve
from hopskip.engine import Engine, make_engine
from hopskip.errors import CheckpointError, ConfigError
from hopskip.prove import recorder
from hopskip.sequence import Request, Sequence
from hopskip.train.exit.batch import make_batch
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.distill import ExitTrainer
from tests.models import tiny_model
from tests.test_engine import PLAIN, new_ids, run
from tests.tiny import write_checkpoint

PROMPTS = [[5, 6, 7, 8] * 3, [9, 8, 7] * 20, [3]]
PARAMS = SamplingParams(max_new_tokens=30)
VOCABULARY = torch.arange(0, 320, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return open_checkpoint(folder)


def load(checkpoint: Checkpoint, backend: str) -> Backend:
    if backend == "native":
        if reason := obstacle():
            pytest.skip(reason)
        return NativeBackend.load(checkpoint, "float32", threads=1)
    from hopskip.backends.torch.backend import TorchBackend

    return TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))


def random_branch(checkpoint: Checkpoint, config: ExitConfig, seed: int = 0) -> tuple[ExitTrainer, TrainedExit]:
    torch.manual_seed(seed)
    trainer = ExitTrainer(checkpoint, config, VOCABULARY)
    for tensor in trainer.mixing.values():
        torch.nn.init.normal_(tensor, std=0.2 if tensor.ndim == 2 else 1.0)
    # as a file would hold it
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.copy_(parameter.bfloat16())
    return trainer, trainer.trained_exit(checkpoint.fingerprint, 3)


def own_branch(checkpoint: Checkpoint) -> TrainedExit:
    """The model's own last layer as a branch over the whole vocabulary: it drafts what the model will say, always."""
    depth, vocabulary = checkpoint.config.num_hidden_layers, torch.arange(checkpoint.config.vocab_size)
    trainer = ExitTrainer(checkpoint, ExitConfig(start=depth - 1, num_layers=1), vocabulary)
    return trainer.trained_exit(checkpoint.fingerprint, 4)


CONFIGS = [
    ExitConfig(start=0, num_layers=1, features=(1, 3)),
    ExitConfig(start=0, num_layers=2, features=(3,)),
    ExitConfig(start=1, num_layers=1, features=(2, 3)),
    ExitConfig(start=2, num_layers=1),
    ExitConfig(start=2, num_layers=0),
    ExitConfig(start=0, num_layers=1),
]
IDS = ["features", "two-layers", "start-and-features", "adapter", "plain-exit", "embedding"]


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("draft", ["exit-branch", "both"])
def test_the_models_own_layers_as_a_branch_are_always_right(checkpoint: Checkpoint, backend: str, draft: str) -> None:
    model, branch = load(checkpoint, backend), own_branch(checkpoint)
    expected = run(make_engine(model, PLAIN), PROMPTS, PARAMS)
    model.attach_exit(branch)
    engine = make_engine(model, SpeculativeConfig(draft=draft))  # type: ignore[arg-type]
    got = run(engine, PROMPTS, PARAMS)
    assert new_ids(got) == new_ids(expected)
    if draft == "exit-branch" and backend == "torch":  # the native engine packs a branch to 8 bits
        assert all(s.stats.num_accepted_tokens == s.stats.num_draft_tokens > 0 for s in got)
    assert sum(s.stats.num_accepted_tokens for s in got) > 0.6 * sum(s.stats.num_draft_tokens for s in got)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_proofs_see_the_hidden_states_of_every_pass(checkpoint: Checkpoint, config: ExitConfig) -> None:
    """Whatever layers a branch wants to see on the way: `hopskip check` compares the states bit for bit."""
    model = load(checkpoint, "native")
    expected = recorder.run(model, PROMPTS, PLAIN, PARAMS, max_num_seqs=2)
    model.attach_exit(random_branch(checkpoint, config)[1])
    got = recorder.run(model, PROMPTS, SpeculativeConfig(draft="exit-branch"), PARAMS, max_num_seqs=2)
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert all(recorder.same_bits(a.states, b.states) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("num_runner_ups", [0, 4])
def test_text_does_not_depend_on_the_branch(
    checkpoint: Checkpoint, backend: str, config: ExitConfig, num_runner_ups: int
) -> None:
    model = load(checkpoint, backend)
    _, branch = random_branch(checkpoint, config)
    rows = 1 if backend == "native" else 4
    expected = run(make_engine(model, PLAIN, rows_per_sequence=rows), PROMPTS, PARAMS)
    model.attach_exit(branch)
    engine = make_engine(model, SpeculativeConfig(draft="exit-branch", num_runner_ups=num_runner_ups))
    got = run(engine, PROMPTS, PARAMS)
    assert new_ids(got) == new_ids(expected)
    assert sum(s.stats.num_draft_tokens for s in got) > sum(s.stats.num_accepted_tokens for s in got)


def drafts_of(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, prompts: list[list[int]]
) -> list[tuple[list[int], Draft]]:
    """Every draft of a run with the tokens that were committed when it was made."""
    seen: list[tuple[list[int], Draft]] = []
    original = ExitDrafter.propose

    def propose(self: ExitDrafter, sequences: list[Sequence], limits: list[int], cache: Cache) -> list[Draft]:
        drafts = original(self, sequences, limits, cache)
        seen.extend((list(s.token_ids), d) for s, d in zip(sequences, drafts, strict=True) if d.token_ids)
        return drafts

    with monkeypatch.context() as patch:
        patch.setattr(ExitDrafter, "propose", propose)
        run(engine, prompts, PARAMS)
    return seen


def outputs(model: Backend, ids: list[int]) -> Tensor:
    """Outputs of every layer at every token, [T, L, D]."""
    from hopskip.backends.rows import Rows, Segment

    cache, depth = model.new_cache(1, len(ids)), model.config.num_hidden_layers
    rows = Rows([Segment(0, 0, len(ids))])
    return torch.as_tensor(model.forward(ids, rows, cache, taps=range(1, depth + 1)).features_NAD)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_drafts_are_those_that_training_unrolls(
    checkpoint: Checkpoint, backend: str, config: ExitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and drafting must mean the same by "the j-th draft token", after prompts, rejections, acceptances."""
    model = load(checkpoint, backend)
    trainer, branch = random_branch(checkpoint, config)
    model.attach_exit(branch)
    engine = make_engine(model, SpeculativeConfig(draft="both", num_draft_tokens=3), max_num_seqs=2)
    seen = [(ids, draft) for ids, draft in drafts_of(monkeypatch, engine, [*PROMPTS, [*PROMPTS[0][:9], 4]])]
    assert len(seen) > 20
    taps, index_V = list(range(1, 4)), torch.full((320,), -1)
    index_V[VOCABULARY] = torch.arange(len(VOCABULARY))
    embedding = load_tensor(checkpoint, "model.embed_tokens.weight", torch.float32)
    num_equal = num_tokens = 0
    for ids, draft in seen[::4]:
        whole = [*ids, *draft.token_ids]
        states = outputs(model, whole[:-1])
        conversation = Conversation.of(ids, draft.token_ids, states)
        batch = make_batch([conversation], taps, config, index_V, embedding)
        with torch.no_grad():
            steps = list(trainer.unroll(batch, len(draft.token_ids)))
        for j, token in enumerate(draft.token_ids):
            best = steps[min(j, len(steps) - 1)][j].argmax()
            num_equal += int(VOCABULARY[best]) == token
            num_tokens += 1
    # 8-bit weights of the native engine choose another token now and then
    assert num_equal == num_tokens if backend == "torch" else num_equal > 0.85 * num_tokens


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_one_call_drafts_what_steps_draft(
    checkpoint: Checkpoint, config: ExitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts = []
    for hides in (False, True):
        model = load(checkpoint, "native")
        _, branch = random_branch(checkpoint, config)
        model.attach_exit(branch)
        if hides:
            mixing = {name: np.asarray(weights) for name, weights in branch.mixing.items()}
            own = Mixing(mixing, model.config.rms_norm_eps) if mixing else None
            monkeypatch.setattr(model, "mixing", own, raising=False)
            monkeypatch.setattr(model, "draft", functools.partial(StepwiseBackend.draft, cast(Any, model)))
        engine = make_engine(model, SpeculativeConfig(draft="exit-branch", min_confidence=0.02))
        drafts.append(drafts_of(monkeypatch, engine, PROMPTS))
    (one_call, steps) = ([draft.token_ids for _, draft in found] for found in drafts)
    # the steps mix in bfloat16 weights, the call in 8 bits
    shared = sum(a == b for a, b in zip(one_call, steps, strict=False))
    assert shared > 0.7 * max(len(one_call), len(steps))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_slot_that_is_used_again_drafts_as_a_fresh_one(
    checkpoint: Checkpoint, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix reuse, and a cache that grows under the branch."""
    _, branch = random_branch(checkpoint, CONFIGS[0])
    turns = [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11] * 2, [5, 6, 7, 8, 9, 10, 11] * 60, [5, 6, 7, 9], [1, 2]]
    found = []
    for prefix_caching in (True, False):
        model = load(checkpoint, backend)
        model.attach_exit(branch)
        setting = SpeculativeConfig(draft="exit-branch", num_draft_tokens=3)
        engine = make_engine(model, setting, max_num_seqs=1, prefix_caching=prefix_caching)
        found.append([drafts_of(monkeypatch, engine, [turn]) for turn in turns])
    with_reuse, without = ([[d.token_ids for _, d in turn] for turn in turns] for turns in found)
    assert with_reuse == without


@pytest.mark.parametrize("has_drafted", [True, False])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_copied_beginning_drafts_as_a_computed_one(
    checkpoint: Checkpoint, backend: str, has_drafted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit's keys, values and features come along, whether it had entered the tokens yet or not."""
    _, branch = random_branch(checkpoint, CONFIGS[0])
    first = [5, 6, 7, 8, 9, 10, 11] * 5
    found = []
    for prefix_caching in (True, False):
        model = load(checkpoint, backend)
        model.attach_exit(branch)
        setting = SpeculativeConfig(draft="exit-branch", num_draft_tokens=3)
        engine = make_engine(model, setting, max_num_seqs=4, max_model_len=200, prefix_caching=prefix_caching)
        engine.reserve(2**30)
        engine.add(Request(first, PARAMS, max_draft_tokens=None if has_drafted else 0))
        while engine.has_work:
            engine.step()
        turns = [[*first[:20], 40, 41], [*first[:10], 42], first, [*first[:20], 40, 43]]
        found.append([drafts_of(monkeypatch, engine, [turn]) for turn in turns])
        assert engine.prefix_stats.num_copies == (4 if prefix_caching else 0)
    with_copies, without = ([[d.token_ids for _, d in turn] for turn in turns] for turns in found)
    assert with_copies == without


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_drafts_after_rounds_without_one_are_those_of_a_branch_told_of_each(
    checkpoint: Checkpoint, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, branch = random_branch(checkpoint, CONFIGS[0])
    original, found = ExitDrafter.propose, []
    for most_passes in (1, 5):  # told of each pass, or of several at once
        model = load(checkpoint, backend)
        model.attach_exit(branch)
        drafts: list[list[int]] = []
        num_rounds = itertools.count(1)

        def propose(
            self: ExitDrafter,
            sequences: list[Sequence],
            limits: list[int],
            cache: Cache,
            drafts: list[list[int]] = drafts,
            num_rounds: Iterator[int] = num_rounds,
        ) -> list[Draft]:
            if next(num_rounds) % 8:
                return [Draft() for _ in sequences]
            proposed = original(self, sequences, limits, cache)
            drafts += [draft.token_ids for draft in proposed]
            return proposed

        monkeypatch.setattr(ExitDrafter, "propose", propose)
        monkeypatch.setattr(exit_module, "_MOST_PASSES", most_passes)
        engine = make_engine(model, SpeculativeConfig(draft="exit-branch", num_draft_tokens=3), max_num_seqs=2)
        run(engine, PROMPTS, PARAMS)
        found.append(drafts)
    assert found[0] == found[1]
    assert sum(map(bool, found[0])) >= 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_and_bans_hold_in_drafts(
    checkpoint: Checkpoint, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_module, "_SHARPNESS", 1.0)
    model = load(checkpoint, "torch")
    branch = own_branch(checkpoint)
    model.attach_exit(branch)
    params = replace(PARAMS, temperature=temperature, frequency_penalty=1.5, seed=None if temperature == 0 else 1)
    expected = run(make_engine(model, PLAIN, rows_per_sequence=5), PROMPTS, params)
    got = run(make_engine(model, SpeculativeConfig(draft="exit-branch")), PROMPTS, params)
    assert new_ids(got) == new_ids(expected)
    # the branch is the model itself: with the penalties in its drafts, nothing is ever rejected but by rounding
    assert sum(s.stats.num_accepted_tokens for s in got) >= 0.99 * sum(s.stats.num_draft_tokens for s in got) > 0


@pytest.mark.parametrize("num_runner_ups", [0, 3])
def test_sampling_from_a_trimmed_vocabulary_keeps_the_targets_distribution(num_runner_ups: int) -> None:
    """The branch cannot draft half of the tokens; they must come as often as without it."""
    torch.manual_seed(0)
    model = tiny_model(vocab_size=6, num_hidden_layers=2)
    vocabulary = np.array([0, 2, 3], dtype=np.int32)
    branch = TrainedExit(ExitConfig(start=1, num_layers=0), vocabulary, [], {}, "", 2)
    params = SamplingParams(max_new_tokens=3, temperature=1.3)
    counts = []
    for speculative in (
        PLAIN,
        SpeculativeConfig(draft="exit-branch", num_draft_tokens=2, num_runner_ups=num_runner_ups),
    ):
        if speculative is not PLAIN:
            model.attach_exit(branch)
        engine = make_engine(model, speculative, max_num_seqs=256)
        seeds = range(2500) if speculative is PLAIN else range(2500, 5000)
        sequences = [engine.add(Request([1, 2], replace(params, seed=seed))) for seed in seeds]
        while engine.has_work:
            engine.step()
        outcomes = torch.tensor([[t.id for t in s.tokens[1:]] for s in sequences])
        counts.append((outcomes[:, 0] * 6 + outcomes[:, 1]).bincount(minlength=36).double())
    plain, drafted = counts
    assert drafted.reshape(6, 6)[[1, 4, 5]].sum() > 100, "no token outside the draft vocabulary was ever needed"
    expected = (plain + drafted) / 2
    common = expected >= 5
    statistic = float((((plain - drafted) ** 2) / (plain + drafted))[common].sum())
    degrees = int(common.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5, (statistic, degrees)


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, branch = random_branch(checkpoint, CONFIGS[0])
    branch = replace(branch, num_runner_ups=2)
    branch.save(tmp_path / "exit")
    loaded = TrainedExit.load(tmp_path / "exit")
    assert loaded.config == branch.config
    assert loaded.num_draft_tokens == branch.num_draft_tokens
    assert loaded.num_runner_ups == branch.num_runner_ups == 2
    assert np.array_equal(loaded.vocabulary, branch.vocabulary)
    assert loaded.tensors().keys() == branch.tensors().keys()
    for name, weights in branch.tensors().items():
        assert np.array_equal(loaded.tensors()[name], weights), name
    loaded.check(checkpoint.config)
    loaded.check_base(checkpoint.fingerprint)


def test_a_wrong_base_is_refused(checkpoint: Checkpoint) -> None:
    _, branch = random_branch(checkpoint, CONFIGS[0])
    with pytest.raises(ConfigError, match=r"trained for .* with weights .*hopskip train exit"):
        branch.check_base("0123456789abcdef")
    with pytest.raises(ConfigError, match="has shape"):
        branch.check(replace(checkpoint.config, intermediate_size=64))
    with pytest.raises(ConfigError, match="the model has 2"):
        branch.check(replace(checkpoint.config, num_hidden_layers=2))
    with pytest.raises(ConfigError, match="vocabulary has 100"):
        branch.check(replace(checkpoint.config, vocab_size=100))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "format 2"),
        ({"features": "all"}, "features = 'all'"),
        ({"num_layers": 0}, "is none"),
    ],
)
def test_damaged_files_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: dict[str, object], match: str
) -> None:
    _, branch = random_branch(checkpoint, CONFIGS[0])
    branch.save(tmp_path)
    path = tmp_path / "exit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((CheckpointError, ConfigError), match=match):
        TrainedExit.load(tmp_path)
    with pytest.raises(CheckpointError, match="is not an exit"):
        TrainedExit.load(tmp_path / "nowhere")
    branch.save(tmp_path)
    (tmp_path / "exit.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        TrainedExit.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"start": 0, "num_layers": 0}, "is none"),
        ({"start": 1, "num_layers": 0, "features": (2,)}, "without layers"),
        ({"start": 0, "num_layers": 1, "features": (3, 2)}, "rising"),
    ],
)
def test_impossible_branches_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ExitConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"draft": "exit-branch", "verify": "reuse"}, "leave it out"),
        ({"draft": "exit-branch", "exit_layer": 2}, "no effect"),
        ({"draft": "ngram", "num_runner_ups": 2}, "no effect"),
        ({"draft": "early-exit", "verify": "reuse", "num_runner_ups": 2}, "leave num_runner_ups out"),
        ({"num_runner_ups": 33}, "0 to 32"),
        ({"draft": "ngram", "exit_branch": "x"}, "no effect"),
        ({"exit_layer": 2, "exit_branch": "x"}, "two exits"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SpeculativeConfig(**settings)  # type: ignore[arg-type]


def test_the_default_beside_a_branch_takes_what_pays(checkpoint: Checkpoint) -> None:
    config, branch = checkpoint.config, own_branch(checkpoint)
    assert resolve(SpeculativeConfig(), config, branch).draft == "auto"
    # where every pass has the same rows there is less to choose
    assert resolve(SpeculativeConfig(), config, branch, row_exact=False).draft == "both"
    assert resolve(SpeculativeConfig(), config).draft == "ngram"


def test_a_branch_that_is_missing_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="no trained exit is given"):
        resolve(SpeculativeConfig(draft="exit-branch"), checkpoint.config)
