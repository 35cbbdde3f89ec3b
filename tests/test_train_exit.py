"""Training exits: what is collected, what the unrolled attention sees, resumption, and whole runs."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hopskip.backends.rows import Rows, Segment
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.errors import ConfigError, TrainingError
from hopskip.loading import BackendName, LoadConfig, load_backend
from hopskip.train.exit.acceptance import Acceptance
from hopskip.train.exit.answers import OwnAnswers
from hopskip.train.exit.batch import Batch, make_batch
from hopskip.train.exit.collect import Converse, collect
from hopskip.train.exit.conversations import Conversation, joined, read_conversations
from hopskip.train.exit.distill import ExitTrainer, attend_unrolled, distillation_loss, num_positions
from hopskip.train.exit.feed import Feed
from hopskip.train.exit.fit import Evaluation, Stage, numbered_batches
from hopskip.train.exit.recipe import FitConfig
from hopskip.train.exit.turns import Dialogue
from tests.tiny import write_checkpoint

PROMPTS = [[2 + i, 5, 7 * i + 3, 9] for i in range(12)]
VOCABULARY = torch.arange(320)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def conversations(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("data")
    gather(checkpoint, folder)
    return read_conversations(folder)[1]


def gather(
    checkpoint: Checkpoint,
    folder: Path,
    taps: tuple[int, ...] = (1, 2),
    backend: BackendName = "torch",
    prompts: list[list[int]] = PROMPTS,
) -> None:
    load = LoadConfig(backend=backend, dtype="float32", device="cpu", threads=1)

    def converse(taps: Sequence[int]) -> Converse[Dialogue]:
        model = load_backend(checkpoint, load)
        return OwnAnswers(model, taps, max_new_tokens=20, max_length=80, eos_token_ids=[1], max_num_seqs=5)

    dialogues = [partial(only, prompt) for prompt in prompts]
    collect(dialogues, folder, converse, fingerprint=checkpoint.fingerprint, taps=[*taps, 3], depth=3)


def only(prompt: list[int], answers: Sequence[Sequence[int]]) -> list[int] | None:
    """A dialogue of one turn."""
    return None if answers else prompt


# -- collection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("num_shared", [0, 40])
def test_collected_states_are_the_models_own(
    checkpoint: Checkpoint, tmp_path: Path, backend: BackendName, num_shared: int
) -> None:
    """Also where prompts begin alike, as those of a chat do: the native backend takes cached prefixes over."""
    beginnings = [list(range(first, first + num_shared)) for first in (100, 160, 220)]
    prompts = [[*beginnings[i % 3], *PROMPTS[i % 12], i] for i in range(24)]
    gather(checkpoint, tmp_path, backend=backend, prompts=prompts)
    conversations = read_conversations(tmp_path)[1]
    assert [c.prompt for c in conversations] == prompts, "in the order of the prompts, whichever ended first"
    model = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    for conversation in conversations:
        ids = conversation.ids_T[:-1].tolist()
        rows, cache = Rows([Segment(0, 0, len(ids))]), model.new_cache(1, len(ids))
        hidden_ND, features_NAD = model.forward(ids, rows, cache, taps=(1, 2, 3))
        assert features_NAD is not None
        assert conversation.states_TAD is not None
        torch.testing.assert_close(conversation.states_TAD.float(), features_NAD, rtol=0.02, atol=0.02)
        answers = conversation.ids_T[conversation.is_answer_T]
        assert model.greedy(hidden_ND)[-len(answers) :] == answers.tolist()


def test_a_shard_that_is_there_is_not_made_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    gather(checkpoint, tmp_path, taps=(2,))
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    gather(checkpoint, tmp_path, taps=(2,))
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="use another folder"):
        gather(checkpoint, tmp_path, taps=(1, 2))


def test_a_collection_goes_on_with_the_layers_that_it_began_with(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hopskip.train.exit.collect.SHARD_CHATS", 6)
    gather(checkpoint, tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    gather(checkpoint, tmp_path, taps=(2,))
    metadata, conversations = read_conversations(tmp_path)
    assert json.loads(metadata["taps"]) == [1, 2, 3]
    assert {c.states_TAD.shape[1] for c in conversations if c.states_TAD is not None} == {3}


@pytest.mark.parametrize("taps", [(2, 1), (0,), (3,), (4,)])
def test_wrong_taps_are_refused(checkpoint: Checkpoint, tmp_path: Path, taps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rising layers from 1 to 3"):
        gather(checkpoint, tmp_path, taps=taps)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no collected text"):
        read_conversations(tmp_path)


# -- unrolling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 7])
def test_unrolled_attention_sees_verified_tokens_then_its_own_chain(window: int | None) -> None:
    """Against one softmax per query over the keys that a draft of j tokens would have in its cache."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(2, heads, 7, 8, generator=generator)

    past = [(random(2), random(2)) for _ in range(3)]
    for step in (1, 2, 3):
        q = random(4)
        out = attend_unrolled(q, past[:step], window)
        for position in range(step - 1, 7):
            start = position - step + 1  # the last verified position that the draft began with
            chain = [slice(start + 1)] + [slice(start + m, start + m + 1) for m in range(1, step)]
            keys, values = ([past[m][i][:, :, own] for m, own in enumerate(chain)] for i in (0, 1))
            k, v = (torch.cat(parts, dim=2).repeat_interleave(2, dim=1) for parts in (keys, values))
            seen = slice(None) if window is None else slice(-window, None)
            expected = F.scaled_dot_product_attention(q[:, :, position : position + 1], k[:, :, seen], v[:, :, seen])
            torch.testing.assert_close(out[:, :, position : position + 1], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_is_a_mean_over_kept_positions_of_both_cross_entropies() -> None:
    logits, targets = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)).unbind()
    logits.requires_grad_()
    own, keep = torch.tensor([3, -1, 0, 8, 2, -1]), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    counts = torch.tensor([4, 3])
    loss = distillation_loss(logits, targets.softmax(-1), own, keep, 0.3, counts)
    soft = F.cross_entropy(logits[keep], targets[keep].softmax(-1))
    hard = F.cross_entropy(logits[[0, 3, 4]], own[[0, 3, 4]])
    torch.testing.assert_close(loss, 0.7 * soft + 0.3 * hard)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~keep] == 0).all()
    unknown = distillation_loss(logits, targets.softmax(-1), torch.full((6,), -1), keep, 0.3, torch.tensor([4, 0]))
    torch.testing.assert_close(unknown, soft)
    half = distillation_loss(logits, targets.softmax(-1), own, keep, 0.3, 2 * counts)
    torch.testing.assert_close(half, loss / 2)
    nothing = distillation_loss(logits, targets.softmax(-1), own, keep & False, 0.3, torch.tensor([0, 0]))
    assert float(nothing.detach()) == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert (gradient == 0).all()


def test_positions_of_unroll_steps() -> None:
    """Two answers of 3 and 1 tokens: each step has one position less of each."""
    batch = Batch(*torch.empty(4, 0), torch.arange(4), torch.tensor([0, 1, 2, 0]))  # type: ignore[call-arg]
    batch = replace(batch, next_P=torch.tensor([5, -1, 2, 0]))
    assert num_positions(batch, 4).tolist() == [[4, 2, 1, 0], [3, 1, 1, 0]]


def test_acceptance_counts_drafts_that_are_right_from_their_first_token() -> None:
    # two answers of 4 and 2 tokens; a draft that starts at p has its second token read at p + 1
    correct = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]]).bool()
    first = torch.tensor([0, 1, 2, 3, 0, 1])
    found = Acceptance.none(2)
    found.add(correct, first)
    # second tokens: from 0 right, from 1 right, from 2 wrong first; in the other conversation wrong first
    assert found.everywhere.tolist() == [[4, 2], [6, 4]]
    assert found.shares == [0.6667, 0.5]
    # an engine drafts at 1, and has two tokens right, so that nothing is left; in the other answer at 1, the last one
    assert found.at_starts.tolist() == [[2, 1], [2, 1]]
    found.add(correct[:, :4], first[:4])
    assert found.at_starts.tolist() == [[3, 2], [3, 2]]
    assert found.everywhere.tolist() == [[7, 4], [10, 7]]
    assert Acceptance.none(3).shares_at_starts == [0, 0, 0]


def test_drafts_begin_after_the_first_token_that_was_wrong() -> None:
    """Eight tokens; at 1 the draft is wrong at once, at 2 its second token is, at 4 all two are right."""
    correct = torch.tensor([[1, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    found = Acceptance.none(2)
    found.add(correct, torch.arange(8))
    assert found.at_starts.tolist() == [[2, 1], [4, 3]]
    assert found.shares_at_starts == [0.5, 0.3333]


@pytest.mark.parametrize("family", ["llama3-gqa", "qwen2", "qwen3", "mistral-window"])
@pytest.mark.parametrize(
    "config", [ExitConfig(start=0, num_layers=2), ExitConfig(start=1, num_layers=1, features=(2, 3))], ids=str
)
def test_a_trainers_layers_are_those_that_draft(tmp_path: Path, family: str, config: ExitConfig) -> None:
    """The first step of training sees what the reference backend's first draft step sees."""
    write_checkpoint(tmp_path, family)
    checkpoint = open_checkpoint(tmp_path)
    trainer = ExitTrainer(checkpoint, config, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    ids = torch.randint(3, 320, (60,), generator=generator)  # more than the window
    model = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    model.attach_exit(trainer.trained_exit("", 1))
    rows, cache, depth = Rows([Segment(0, 0, 59)]), model.new_cache(1, 64), checkpoint.config.num_hidden_layers
    states = model.forward(ids[:-1].tolist(), rows, cache, taps=(1, 2, 3)).features_NAD
    assert states is not None
    embedding = load_tensor(checkpoint, "model.embed_tokens.weight", torch.float32)
    batch = make_batch(
        [Conversation.of([int(ids[0])], ids[1:].tolist(), states)], [1, 2, 3], config, VOCABULARY, embedding
    )
    hidden_ND = batch.x_BTD[0]
    if model.mixing is not None:
        hidden_ND = model.mixing.mix(hidden_ND, model.mixing.fuse(batch.features_BTAD[0]))
    expected = model.run_layers(hidden_ND.detach(), depth, depth + config.num_layers, rows, cache).hidden_ND
    with torch.no_grad():
        logits = next(trainer.unroll(batch, 1))
    torch.testing.assert_close(logits, model.logits(expected, "exit"), rtol=1e-4, atol=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------

SETTINGS = FitConfig(num_tokens=600, batch_tokens=60, learning_rate=2e-3, unroll_steps=2, eval_every=200)
EXIT = ExitConfig(start=0, num_layers=1, features=(2, 3))


def train(
    checkpoint: Checkpoint,
    conversations: list[Conversation],
    folder: Path,
    config: FitConfig,
    dtype: torch.dtype = torch.float32,
    report: Callable[[Evaluation], None] = lambda _: None,
    num_workers: int = 0,
) -> ExitTrainer:
    torch.manual_seed(0)
    trainer = ExitTrainer(checkpoint, EXIT, VOCABULARY, dtype)
    trainer.scale_to(torch.cat([c.states_TAD for c in conversations[:3] if c.states_TAD is not None]))
    Stage(trainer, feed_of(checkpoint, num_workers), config, folder, report=report).run(
        conversations[3:], conversations[:3]
    )
    return trainer


def feed_of(checkpoint: Checkpoint, num_workers: int = 0) -> Feed:
    embedding = load_tensor(checkpoint, "model.embed_tokens.weight")
    return Feed(exit_config=EXIT, taps=[1, 2, 3], index_V=VOCABULARY, embedding=embedding, num_workers=num_workers)


def interrupt(evaluation: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_training_goes_on_as_if_it_had_not_been(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    whole = train(checkpoint, conversations, tmp_path / "whole", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, conversations, tmp_path / "two", SETTINGS, report=interrupt)
    resumed = train(checkpoint, conversations, tmp_path / "two", SETTINGS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "two")
    ]
    assert [x["num_tokens"] for x in logs[0]] == [x["num_tokens"] for x in logs[1]]
    assert logs[0][-1]["acceptance"] == logs[1][-1]["acceptance"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_leaves_the_model_alone(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path, dtype: torch.dtype
) -> None:
    before = load_tensor(checkpoint, "model.layers.2.mlp.up_proj.weight").clone()
    config = FitConfig(num_tokens=4000, batch_tokens=60, learning_rate=2e-3, unroll_steps=2, eval_every=500)
    trainer = train(checkpoint, conversations, tmp_path, config, dtype)
    assert {p.dtype for p in trainer.parameters()} == {torch.float32}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(before, load_tensor(checkpoint, "model.layers.2.mlp.up_proj.weight"))


def test_a_step_keeps_to_the_trainers_device(checkpoint: Checkpoint, conversations: list[Conversation]) -> None:
    """On a stand-in for an accelerator: tensors without data, which cannot be mixed with those of the CPU."""
    trainer = ExitTrainer(checkpoint, EXIT, VOCABULARY, torch.bfloat16)
    embedding = load_tensor(checkpoint, "model.embed_tokens.weight", torch.float32)
    batch = make_batch(conversations[:4], [1, 2, 3], EXIT, VOCABULARY, embedding)
    with FakeTensorMode() as mode:
        for name, tensor in [*trainer.named_parameters(), *trainer.named_buffers()]:
            moved = mode.from_tensor(tensor).detach().to("meta")
            setattr(trainer, name, nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved)
        parts = {part.name: mode.from_tensor(getattr(batch, part.name)) for part in fields(batch)}
        moved_batch = Batch(**parts).to(trainer.device)
        loss = trainer(moved_batch, SETTINGS, num_positions(moved_batch, SETTINGS.unroll_steps))
        assert loss.device == trainer.device
        torch.autograd.backward(loss)
        with pytest.raises(RuntimeError, match="same device"):
            trainer.targets(Batch(**parts))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, conversations, tmp_path, SETTINGS, report=interrupt)
    saved = (tmp_path / "state.pt").read_bytes()
    broken = [replace(c, states_TAD=c.states_TAD * float("nan")) for c in conversations if c.states_TAD is not None]
    with pytest.raises(ConfigError, match=r"states of a conversation are not numbers \(after .*collect in another"):
        train(checkpoint, broken, tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match=r"trained with num_tokens = 600, not 9000; .*use another output"):
        train(checkpoint, conversations, tmp_path, replace(SETTINGS, num_tokens=9000))
    assert (tmp_path / "state.pt").read_bytes() == saved
    wild = replace(SETTINGS, learning_rate=1e30, warmup=1e-9)
    with pytest.raises(ConfigError, match=r"the loss is (nan|inf) after .*; lower learning_rate"):
        train(checkpoint, conversations, tmp_path / "wild", wild)


def test_answers_shorter_than_a_draft_add_nothing_to_its_last_steps(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    """A batch whose answers have two tokens has no place for the third of a draft."""
    short = [
        Conversation.of(c.prompt, c.ids_T[c.is_answer_T][:2].tolist(), c.states_TAD[: len(c.prompt) + 1])
        for c in conversations
        if c.states_TAD is not None
    ]
    config = FitConfig(num_tokens=40, batch_tokens=8, unroll_steps=3, eval_every=20)
    trainer = train(checkpoint, short, tmp_path, config)
    assert all(parameter.isfinite().all() for parameter in trainer.parameters())


def test_a_full_disk_keeps_the_last_state(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    """Files may not grow beyond a limit, as they cannot on a full disk."""
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, conversations, tmp_path / "fit", SETTINGS, report=interrupt)
    saved = (tmp_path / "fit" / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"state\.pt cannot be written .*: make room"):
            train(checkpoint, conversations, tmp_path / "fit", SETTINGS)
        with pytest.raises(TrainingError, match=r"shard-00000\.safetensors cannot be written .*: make room"):
            gather(checkpoint, tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "fit" / "state.pt").read_bytes() == saved
    assert list((tmp_path / "data").iterdir()) == []
    gather(checkpoint, tmp_path / "data")
    assert len(read_conversations(tmp_path / "data")[1]) == len(PROMPTS)


def test_every_epoch_has_every_conversation_once(conversations: list[Conversation]) -> None:
    batches = numbered_batches(conversations, SETTINGS, 0)
    for _ in range(3):
        seen: list[int] = []
        while len(seen) < len(conversations):
            seen.extend(next(batches)[1])
        assert sorted(seen) == list(range(len(conversations)))
    again = numbered_batches(conversations, SETTINGS, 2)
    fresh = numbered_batches(conversations, SETTINGS, 0)
    assert [next(fresh)[0], next(fresh)[0]] == [0, 1]
    assert [next(again) for _ in range(9)] == [next(fresh) for _ in range(9)]


@pytest.mark.parametrize("change", [{"num_tokens": 0}, {"unroll_steps": 0}, {"hard_weight": 1.5}, {"decay": 0.0}])
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        FitConfig(**{"num_tokens": 100, **change})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_change_nothing(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    config = replace(SETTINGS, num_tokens=200, eval_every=1000)
    here = train(checkpoint, conversations, tmp_path / "here", config)
    there = train(checkpoint, conversations, tmp_path / "there", config, num_workers=2)
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[name]), name


def test_accumulated_batches_are_one_step(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    """Batches of one conversation, all twelve of a step: the same as one batch of all, but for rounding."""
    many = replace(SETTINGS, num_tokens=400, batch_tokens=1, gradient_accumulation_steps=9, eval_every=1000)
    one = replace(many, batch_tokens=10_000, gradient_accumulation_steps=1)
    found = [train(checkpoint, conversations, tmp_path / str(i), each) for i, each in enumerate((many, one))]
    for name, tensor in found[0].state_dict().items():
        torch.testing.assert_close(tensor, found[1].state_dict()[name], rtol=1e-3, atol=1e-5)
    logs = [json.loads((tmp_path / str(i) / "log.jsonl").read_text()) for i in range(2)]
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)


def test_the_best_weights_are_kept_and_a_stage_may_end_early(
    checkpoint: Checkpoint, conversations: list[Conversation], tmp_path: Path
) -> None:
    """A rate that is too high makes it worse after the first evaluation."""
    wild = FitConfig(
        num_tokens=20_000, batch_tokens=60, learning_rate=0.5, warmup=1e-4, eval_every=100, early_stopping=2
    )
    seen: list[Evaluation] = []
    trainer = train(checkpoint, conversations, tmp_path, wild, report=seen.append)
    assert len(seen) < 100
    best = max(range(len(seen)), key=lambda i: (seen[i].tokens_per_pass, i))
    assert len(seen) - 1 - best == 2
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, tensor in trainer.state_dict().items():
        assert torch.equal(tensor, state["best"][name])
    assert any(not torch.equal(tensor, state["trainer"][name]) for name, tensor in trainer.state_dict().items())
    # it is over, and a run that finds it so leaves the same
    again = train(checkpoint, conversations, tmp_path, replace(wild, eval_every=50), report=seen.append)
    for name, tensor in trainer.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


# -- conversations ----------------------------------------------------------------------------------------------------


def test_turns_that_begin_with_the_one_before_are_one_conversation() -> None:
    first, second = Conversation.of([1, 2], [3, 4]), Conversation.of([1, 2, 3, 4, 5], [6])
    (both,) = joined([first, second])
    assert both.ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert both.is_answer_T.tolist() == [False, False, True, True, False, True]
    assert both.predicted_P.tolist() == [1, 2, 4]
    assert both.prompt == [1, 2, 3, 4, 5]
    assert both.num_answer_tokens == 3
    rewritten = Conversation.of([1, 2, 9, 5], [6])
    assert [c.ids_T.tolist() for c in joined([first, rewritten])] == [[1, 2, 3, 4], [1, 2, 9, 5, 6]]
    assert len(joined([second, first])) == 2
    assert second.is_answer_T.tolist() == [False] * 5 + [True], "what was joined is untouched"
