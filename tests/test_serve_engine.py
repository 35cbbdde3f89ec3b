"""What serving asks of the engine: schedules, grammars, requests that fail alone, a cache reserved ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hopskip import LLM, ConfigError, SamplingParams, SpeculativeConfig
from hopskip.engine import Engine, make_engine
from hopskip.engine.slots import PrefixStats
from hopskip.sequence import Mask, Request, Sequence
from hopskip.serve.batch import Generation, Job, Piece
from hopskip.serve.engine_thread import EngineThread
from hopskip.text.grammar import GrammarCompiler
from hopskip.text.requests import text_stream
from hopskip.text.tokenizer import Detokenizer, TextStream
from tests.models import table_model, tiny_model
from tests.serving import tiny_llm

PLAIN = SpeculativeConfig(draft="none")


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def new_ids(sequence: Sequence) -> list[int]:
    return [token.id for token in sequence.tokens]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compiler(llm: LLM) -> GrammarCompiler:
    return GrammarCompiler(llm.tokenizer, llm.backend.config.vocab_size, max_chars=2**16)


# -- random schedules --------------------------------------------------------------------------------------------------

KINDS = {
    "greedy": SamplingParams(max_new_tokens=12),
    "penalties": SamplingParams(max_new_tokens=12, frequency_penalty=1.5, logit_bias={70: 2.0}),
    "sampled": SamplingParams(max_new_tokens=12, temperature=1.0, top_k=30, seed=5),
    "stop": SamplingParams(max_new_tokens=20, stop=("T", "er")),
    "grammar": SamplingParams(max_new_tokens=20),
    "sampled-grammar": SamplingParams(max_new_tokens=20, temperature=1.0, seed=6),
}
PROMPTS = [[5], [40, 41, 42, 43] * 5, list(range(60, 160)), [7, 8, 9] * 60, [40, 41, 42, 43] * 5 + [9, 9]]
GRAMMAR = r"([a-z]{2,5}-){2}[0-9]{3}(abab)+!"


@dataclass(frozen=True)
class Arrival:
    """One request of a schedule."""

    kind: str
    prompt: int
    arrives_at: int
    aborted_after: int | None
    max_draft_tokens: int | None

    def add_to(self, engine: Engine, llm: LLM, compiler: GrammarCompiler, *, drafting: bool) -> Sequence:
        params = KINDS[self.kind]
        text = TextStream(Detokenizer(llm.tokenizer, PROMPTS[self.prompt]), params.stop)
        return engine.add(
            Request(
                PROMPTS[self.prompt],
                params,
                text.push,
                constraint=compiler.compile("regex", GRAMMAR) if "grammar" in self.kind else None,
                max_draft_tokens=self.max_draft_tokens if drafting else None,
            )
        )


requests = st.builds(
    Arrival,
    kind=st.sampled_from(list(KINDS)),
    prompt=st.integers(0, len(PROMPTS) - 1),
    arrives_at=st.integers(0, 12),
    aborted_after=st.one_of(st.none(), st.integers(0, 15)),
    max_draft_tokens=st.sampled_from([None, None, 0, 2]),
)
_references: dict[object, list[int]] = {}


@settings(max_examples=25)
@given(
    st.lists(requests, min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from(["early-exit", "ngram", "both"]),
    st.sampled_from(["recompute", "reuse"]),
    st.booleans(),
)
def test_every_row_of_any_schedule_equals_its_own_run_alone(
    llm: LLM,
    compiler: GrammarCompiler,
    schedule: list[Arrival],
    max_num_seqs: int,
    draft: str,
    verify: str,
    prefix_caching: bool,
) -> None:
    """Joins, leaves and aborts at any step, prompts longer than a chunk; greedy ones equal plain decoding."""
    exit_layer = None if draft == "ngram" else 2
    config = SpeculativeConfig(draft=draft, exit_layer=exit_layer, num_draft_tokens=3, verify=verify)  # type: ignore[arg-type]
    engine = make_engine(
        llm.backend, config, eos_token_ids=[1], max_num_seqs=max_num_seqs, prefix_caching=prefix_caching
    )
    sequences: dict[int, Sequence] = {}
    for step in range(20):
        for index, request in enumerate(schedule):
            if request.arrives_at == step:
                sequences[index] = request.add_to(engine, llm, compiler, drafting=True)
            if request.aborted_after is not None and request.arrives_at + request.aborted_after == step:
                engine.abort(sequences[index])
        engine.step()
    finish(engine)
    for index, request in enumerate(schedule):
        key: tuple[object, ...] = (request.kind, request.prompt)
        is_sampled = request.kind.startswith("sampled")
        if is_sampled:  # the same seed gives the same text with the same drafts only
            key = (*key, draft, verify, request.max_draft_tokens)
        if key not in _references:
            alone = make_engine(llm.backend, config if is_sampled else PLAIN, eos_token_ids=[1], max_num_seqs=1)
            reference = request.add_to(alone, llm, compiler, drafting=is_sampled)
            finish(alone)
            _references[key] = new_ids(reference)
        ids = new_ids(sequences[index])
        if sequences[index].finish_reason == "abort":
            assert ids == _references[key][: len(ids)]
        else:
            assert ids == _references[key], request
            assert sequences[index].finish_reason in ("stop", "length")


def test_running_sequences_progress_in_every_step_while_a_long_prompt_is_read() -> None:
    model = tiny_model(num_hidden_layers=2)
    engine = make_engine(model, PLAIN)
    early = engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=100)))
    engine.step()
    late = engine.add(Request([5, 6] * 300, SamplingParams(max_new_tokens=4)))
    short = engine.add(Request([9, 8, 7], SamplingParams(max_new_tokens=4)))
    num_steps = 0
    while not late.is_prefilled:
        before = len(early.tokens)
        engine.step()
        num_steps += 1
        assert len(early.tokens) == before + 1
        assert short.is_prefilled, "nor does a short prompt wait for a long one"
    assert num_steps > 3


def test_a_prefix_is_copied_from_a_sequence_that_still_runs() -> None:
    model = tiny_model(num_hidden_layers=2)
    engine = make_engine(model, PLAIN, prefix_caching=True)
    system = [3, 1, 4, 1, 5, 9, 2, 6] * 5
    first = engine.add(Request([*system, 7], SamplingParams(max_new_tokens=30)))
    engine.step()
    second = engine.add(Request([*system, 8, 9], SamplingParams(max_new_tokens=30)))
    finish(engine)
    assert second.stats.num_cached_prompt_tokens == len(system)
    for sequence, prompt in ((first, [*system, 7]), (second, [*system, 8, 9])):
        alone = make_engine(model, PLAIN, prefix_caching=False)
        reference = alone.add(Request(prompt, SamplingParams(max_new_tokens=30)))
        finish(alone)
        assert new_ids(sequence) == new_ids(reference)


# -- drafting, per request ---------------------------------------------------------------------------------------------


def test_a_request_may_draft_less_or_from_another_exit() -> None:
    model = tiny_model()
    engine = make_engine(model, SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=4))
    params = SamplingParams(max_new_tokens=30)
    full, none, two, shallow = (
        engine.add(Request([1, 2, 3], params, max_draft_tokens=most, exit_layer=exit_layer))
        for most, exit_layer in ((None, None), (0, None), (2, None), (None, 1))
    )
    finish(engine)
    assert new_ids(full) == new_ids(none) == new_ids(two) == new_ids(shallow)
    assert none.stats.num_drafts == 0
    assert len(two.stats.num_accepted_tokens_per_pos) == 2
    assert len(full.stats.num_accepted_tokens_per_pos) == 4
    assert shallow.stats.acceptance_rate < full.stats.acceptance_rate


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        (SpeculativeConfig(draft="ngram", num_draft_tokens=4), {"max_draft_tokens": 5}, "drafts at most 4"),
        (PLAIN, {"max_draft_tokens": 1}, "drafts at most 0"),
        (SpeculativeConfig(draft="ngram"), {"exit_layer": 1}, "exit_layer=1 has no effect"),
        (SpeculativeConfig(draft="early-exit", verify="reuse", exit_layer=3), {"exit_layer": 1}, "verify 'reuse'"),
        (SpeculativeConfig(draft="both", exit_layer=3), {"exit_layer": 6}, "between 1 and 5"),
    ],
)
def test_drafting_that_this_engine_cannot_do_is_refused(
    config: SpeculativeConfig, request_: dict[str, int], message: str
) -> None:
    engine = make_engine(tiny_model(), config)
    with pytest.raises(ConfigError, match=message):
        engine.add(Request([1], SamplingParams(), **request_))  # type: ignore[arg-type]
    assert not engine.has_work


# -- constraints -------------------------------------------------------------------------------------------------------


class Alternating:
    """Even and odd tokens in turn, of a vocabulary of `size`; a constraint simple enough to reason about."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: list[int] = []
        self.is_complete = False

    def accept(self, token: int) -> None:
        assert self.num_allowed([token]) == 1, "a forbidden token was taken"
        self._taken.append(token)

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        start = len(self._taken)
        return next((i for i, t in enumerate(draft_ids) if t % 2 != (start + i) % 2), len(draft_ids))

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        depths = [0]
        for parent in range(-1, len(draft_ids) - 1) if parents is None else parents:
            depths.append(depths[parent + 1] + 1)
        parity_V = np.arange(-(-self._size // 32) * 32) % 2
        rows = np.stack([parity_V == (len(self._taken) + depth) % 2 for depth in depths])
        return np.packbits(rows, axis=1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("num_runner_ups", [0, 3])
def test_no_draft_changes_a_constrained_sampled_text(num_runner_ups: int) -> None:
    """Drafts run into forbidden tokens all the time here."""
    generator = torch.Generator().manual_seed(0)
    target_VV = torch.randn(6, 6, generator=generator) * 1.2
    exit_VV = target_VV + torch.randn(6, 6, generator=generator)
    drafting = SpeculativeConfig(draft="early-exit", num_draft_tokens=3, num_runner_ups=num_runner_ups)
    texts = []
    for config in (PLAIN, drafting):
        engine = make_engine(table_model(exit_VV, target_VV), config, max_num_seqs=64)
        params = [SamplingParams(max_new_tokens=9, temperature=1.0, presence_penalty=0.4, seed=i) for i in range(300)]
        sequences = [engine.add(Request([1], p, constraint=Alternating(6))) for p in params]
        finish(engine)
        texts.append([new_ids(sequence) for sequence in sequences])
    assert texts[0] == texts[1]
    assert all(token % 2 == place % 2 for text in texts[0] for place, token in enumerate(text))
    accepted, drafted = (
        sum(getattr(s.stats, f"num_{what}_tokens") for s in sequences) for what in ("accepted", "draft")
    )
    assert 100 < accepted < drafted


def test_constrained_sampling_has_the_constrained_distribution() -> None:
    target_VV = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 1.2
    engine = make_engine(table_model(-target_VV, target_VV), PLAIN, max_num_seqs=64)
    sequences = [
        engine.add(Request([1], SamplingParams(max_new_tokens=3, temperature=1.0, seed=i), constraint=Alternating(6)))
        for i in range(1500)
    ]
    finish(engine)
    # exact: first even, then odd, then even
    masked_VV = [target_VV.masked_fill(torch.arange(6) % 2 != parity, -torch.inf).softmax(-1) for parity in (0, 1)]
    expected: dict[tuple[int, ...], float] = {}
    for a in range(0, 6, 2):
        for b in range(1, 6, 2):
            for c in range(0, 6, 2):
                expected[a, b, c] = float(masked_VV[0][1, a] * masked_VV[1][a, b] * masked_VV[0][b, c])
    counts = dict.fromkeys(expected, 0)
    for sequence in sequences:
        counts[tuple(new_ids(sequence))] += 1
    statistic = sum((counts[k] - 1500 * p) ** 2 / (1500 * p) for k, p in expected.items())
    assert statistic < 55, "chi-square with 26 degrees of freedom exceeds this once in 1,000 runs"


class Impossible(Alternating):
    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        return super().masks(draft_ids, parents) * np.uint32(not self._taken)


def test_where_no_token_may_come_only_that_request_ends() -> None:
    model = tiny_model()
    engine = make_engine(model, PLAIN)
    stuck = engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=9), constraint=Impossible(97)))
    other = engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=9)))
    finish(engine)
    assert (stuck.finish_reason, len(stuck.tokens)) == ("error", 1)
    assert "no token can be chosen" in str(stuck.error)
    assert other.finish_reason == "length"


def test_a_greedy_draft_ends_before_its_first_forbidden_token() -> None:
    model = tiny_model()
    config = SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=4)
    engine = make_engine(model, config)
    sequence = engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=40), constraint=Alternating(97)))
    finish(engine)
    plain = make_engine(model, PLAIN)
    expected = plain.add(Request([1, 2, 3], SamplingParams(max_new_tokens=40), constraint=Alternating(97)))
    finish(plain)
    assert new_ids(sequence) == new_ids(expected)
    stats = sequence.stats
    assert stats.num_accepted_tokens > 0
    assert stats.num_draft_tokens < 4 * stats.num_target_passes, "drafts were cut"


# -- failures ----------------------------------------------------------------------------------------------------------


class Broken(Alternating):
    """Fails after a few tokens."""

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        if len(self._taken) >= 4:
            raise RuntimeError("out of fuel")
        return super().masks(draft_ids, parents)


def test_a_request_that_fails_leaves_the_others_alone() -> None:
    model = tiny_model()
    engine = make_engine(model, SpeculativeConfig(draft="early-exit", exit_layer=5, num_draft_tokens=3), max_num_seqs=3)

    def stop(token: int) -> bool:
        raise ValueError("a detokenizer's bug")

    good = engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=20)))
    bad = engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=20), stop))
    broken = engine.add(Request([4], SamplingParams(max_new_tokens=20), constraint=Broken(97)))
    after = engine.add(Request([7], SamplingParams(max_new_tokens=5)))
    finish(engine)
    assert (bad.finish_reason, str(bad.error)) == ("error", "a detokenizer's bug")
    assert (broken.finish_reason, str(broken.error)) == ("error", "out of fuel")
    assert good.finish_reason == after.finish_reason == "length"
    alone = make_engine(model, PLAIN)
    expected = alone.add(Request([1, 2, 3], SamplingParams(max_new_tokens=20)))
    finish(alone)
    assert new_ids(good) == new_ids(expected)


# -- the cache, reserved -----------------------------------------------------------------------------------------------


def test_a_reserved_cache_is_checked_against_its_budget_and_never_grows() -> None:
    model = tiny_model()  # 6 layers x 2 heads x 16 x 2 x 4 bytes = 1,536 bytes a position
    engine = make_engine(model, PLAIN, max_num_seqs=4)
    with pytest.raises(
        ConfigError, match=r"needs 14 MiB: 4 sequences x 2304 positions x 1536 bytes; it may take 1 MiB"
    ):
        engine.reserve(2**20)
    engine.reserve(2**24)
    cache = engine._slots.cache
    assert cache.nbytes == 4 * 2304 * 1536
    engine.add(Request([1] * 1000, SamplingParams(max_new_tokens=2)))
    finish(engine)
    assert engine._slots.cache is cache

    shrunk = make_engine(model, PLAIN, max_num_seqs=4)
    shrunk.reserve(4 * 512 * 1536, shrink=True)
    assert shrunk.max_model_len == 511
    with pytest.raises(ConfigError, match="may take 0 MiB"):
        make_engine(model, PLAIN).reserve(10_000, shrink=True)


# -- grammars ----------------------------------------------------------------------------------------------------------


def test_looking_ahead_leaves_no_trace(llm: LLM, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile("regex", "ab[cd]e")
    a, b, c, d, e, x = (llm.tokenizer.encode(char)[0] for char in "abcdex")
    assert constraint.num_allowed([a, b, x, c]) == 2
    masks_NV = unpacked(constraint.masks([a, b, x, c]))
    assert bool(masks_NV[0, a])
    assert not bool(masks_NV[0, x])
    assert {c, d} <= set(masks_NV[2].nonzero().flatten().tolist())
    assert not bool(masks_NV[2, x])
    assert bool(masks_NV[3:].all()), "rows behind a forbidden token say nothing"
    assert torch.equal(unpacked(constraint.masks([a, b, x, c])), masks_NV)
    for token in (a, b, d):
        constraint.accept(token)
        assert not constraint.is_complete
    assert unpacked(constraint.masks([e, x]))[0].nonzero().flatten().tolist() == [e]
    constraint.accept(e)
    assert constraint.is_complete


def test_each_path_of_a_tree_has_its_own_masks(llm: LLM, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile("regex", "a(bc|dx)e")
    a, b, c, d, e, x = (llm.tokenizer.encode(char)[0] for char in "abcdex")
    # a, then b and c; beside them d, then x; and beside a something that may not come
    masks_NV = unpacked(constraint.masks([a, b, c, d, x, x], [-1, 0, 1, 0, 3, -1]))
    single = {row: masks_NV[row].nonzero().flatten().tolist() for row in (2, 3, 4, 5)}
    assert single == {2: [c], 3: [e], 4: [x], 5: [e]}
    assert {b, d} <= set(masks_NV[1].nonzero().flatten().tolist())
    assert bool(masks_NV[6].all())
    chains = [[a, b, c], [a, d, x]]
    for chain, rows in zip(chains, ([0, 1, 2, 3], [0, 1, 4, 5]), strict=True):
        assert torch.equal(unpacked(constraint.masks(chain)), masks_NV[rows])


def unpacked(masks_NW: Mask) -> Tensor:
    return torch.from_numpy(np.unpackbits(masks_NW.view(np.uint8), axis=1, bitorder="little").astype(bool))


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(", "cannot be used"),
        ("lark", "start: nothing", "cannot be used"),
        ("lark", "start: start start | start", "cannot be used"),
        ("json_schema", {"type": "no such type"}, "cannot be used"),
        ("json_schema", {"$ref": "http://example.com/schema.json"}, "another document"),
        ("regex", "a" * 70_000, "70000 characters"),
    ],
)
def test_grammars_that_cannot_be_used(
    compiler: GrammarCompiler, kind: str, source: str | dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compiler.compile(kind, source)  # type: ignore[arg-type]


def test_a_deep_schema_is_refused(compiler: GrammarCompiler) -> None:
    schema: dict[str, object] = {}
    for _ in range(100):
        schema = {"properties": {"a": schema}}
    with pytest.raises(ConfigError, match="deeper than 64"):
        compiler.compile("json_schema", schema)


def test_models_whose_text_never_ends_have_no_grammars(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path)
    llm.tokenizer.eos_token_ids = ()
    with pytest.raises(ConfigError, match="no end-of-text token"):
        GrammarCompiler(llm.tokenizer, 320).compile("regex", "a")


# -- its thread --------------------------------------------------------------------------------------------------------


class Counting:
    """An observer that counts tokens by the number of each request."""

    def __init__(self) -> None:
        self.num_tokens: dict[int, int] = {}

    def on_step(self, num_running: int, num_waiting: int, cache_usage: float, prefixes: PrefixStats) -> None:
        pass

    def on_tokens(self, generation: Generation, num_tokens: int, now: float) -> None:
        number = generation.sequence.number
        self.num_tokens[number] = self.num_tokens.get(number, 0) + num_tokens

    def on_finish(self, generation: Generation, now: float) -> None:
        pass


def test_what_nobody_streams_comes_in_one_piece(llm: LLM) -> None:
    """The same text; the event loop is woken once for it, and the metrics see every token all the same."""
    observer = Counting()

    async def generate() -> list[list[list[Piece]]]:
        engine = make_engine(llm.backend, PLAIN)
        thread = EngineThread(engine, partial(text_stream, llm.tokenizer), max_queue=4, observer=observer)
        thread.start()
        params = SamplingParams(max_new_tokens=9, ignore_eos=True)
        jobs = [Job(request=Request(PROMPTS[1], params), is_streamed=streamed) for streamed in (True, False)]
        found: list[list[list[Piece]]] = [[], []]
        has_ended = [False, False]
        async for index, step in await thread.submit(jobs):
            assert not has_ended[index]
            if step is None:
                has_ended[index] = True
            else:
                found[index].append(step)
        assert all(has_ended)
        await thread.stop()
        return found

    streamed, whole = asyncio.run(generate())
    assert len(streamed) == 9
    assert len(whole) == 1
    assert whole[0] == [piece for step in streamed for piece in step]
    assert observer.num_tokens == {0: 9, 1: 9}
