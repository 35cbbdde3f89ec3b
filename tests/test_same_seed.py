"""A sampled text depends on prompt, parameters and seed alone: however it is drafted, whatever runs beside or before
it, through whichever door. 100 requests of random parameters; `--hypothesis-profile=random` takes 2,000.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.draft.make import prepare
from hopskip.engine import Engine
from hopskip.sequence import Constraint, Request
from hopskip.text.grammar import GrammarCompiler
from hopskip.text.grammar_build import Kind
from hopskip.train.exit.distill import ExitTrainer
from tests.properties import examples
from tests.serving import live_server, tiny_llm
from tests.test_exit_branch import CONFIGS

PLAIN = SpeculativeConfig(draft="none")
WAYS: dict[str, SpeculativeConfig] = {
    "none": PLAIN,
    "lookup": SpeculativeConfig(draft="ngram", num_draft_tokens=4),
    "early exit": SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=3),
    "early exit, tree": SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=3, num_runner_ups=4),
    "early exit, reuse": SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=3, verify="reuse"),
    "lower precision": SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=3, draft_precision="q4"),
    "layer skip": SpeculativeConfig(draft="layer-skip", skip_layers=(1,), num_draft_tokens=3, num_runner_ups=1),
    "trained exit": SpeculativeConfig(draft="exit-branch", num_draft_tokens=4),
    "trained exit, tree": SpeculativeConfig(draft="exit-branch", num_draft_tokens=3, num_runner_ups=3),
    "both": SpeculativeConfig(draft="both", num_draft_tokens=4),
    "auto": SpeculativeConfig(draft="auto"),
}
GRAMMARS: list[tuple[Kind, Any] | None] = [
    *[None] * 5,
    ("regex", "[a-m ]{4,20}"),
    ("json_schema", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    tiny_llm(folder)
    checkpoint = open_checkpoint(folder)
    vocabulary = torch.arange(0, checkpoint.config.vocab_size, 2)
    trainer = ExitTrainer(checkpoint, CONFIGS[0], vocabulary)
    llm = LLM(folder, speculative=PLAIN, dtype="float32", backend="native")
    llm.backend.attach_exit(trainer.trained_exit(checkpoint.fingerprint, 4))
    llm.backend.attach_copy(checkpoint, "q4")
    return llm


class Case:
    """A request of random parameters, which can be made again and again."""

    def __init__(self, llm: LLM, number: int) -> None:
        dice = random.Random(number)

        def maybe(share: float, **choices: list[Any]) -> dict[str, Any]:
            return {name: dice.choice(values) for name, values in choices.items()} if dice.random() < share else {}

        text = dice.choice(["the cat sat on the mat. ", "abc abd abc abd ", "once upon a time "]) * dice.randint(1, 3)
        self.prompt = llm.tokenizer.encode(text + str(dice.randint(0, 20)))
        self.grammar = dice.choice(GRAMMARS)
        self.params = SamplingParams(
            max_new_tokens=dice.choice([1, 7, 16]),
            temperature=dice.choice([0.1, 0.4, 0.7, 1.0, 1.5, 2.0]),
            seed=dice.randrange(2**63),
            stop=("e",) if dice.random() < 0.1 else (),
            **maybe(0.3, top_k=[1, 3, 40, 5000]),
            **maybe(0.4, top_p=[0.05, 0.5, 0.9, 0.99]),
            **maybe(0.3, min_p=[0.01, 0.2]),
            **maybe(0.3, repetition_penalty=[0.9, 1.2, 2.0]),
            **maybe(0.3, presence_penalty=[-0.5, 0.7], frequency_penalty=[0.4]),
            **maybe(0.2, logit_bias=[{5: 3.0, 6: -100.0}]),
            **maybe(0.2, logprobs=[0, 3]),
        )

    def request(self, compiler: GrammarCompiler) -> Request:
        constraint: Constraint | None = compiler.compile(*self.grammar) if self.grammar else None
        return Request(self.prompt, self.params, constraint=constraint)


@pytest.fixture(scope="module")
def compiler(llm: LLM) -> GrammarCompiler:
    return GrammarCompiler(llm.tokenizer, llm.backend.config.vocab_size)


@pytest.fixture(scope="module")
def cases(llm: LLM) -> list[Case]:
    return [Case(llm, number) for number in range(examples())]


Text = list[tuple[int, float | None, dict[int, float] | None]]
"""Ids, and what is reported of them."""


def texts(
    llm: LLM, compiler: GrammarCompiler, cases: list[Case], way: SpeculativeConfig, **options: Any
) -> tuple[list[Text], int]:
    """The text of each case, and how many draft tokens were accepted."""
    engine = Engine(llm.backend, *prepare(llm.backend, way), **options)
    sequences = [engine.add(case.request(compiler)) for case in cases]
    while engine.has_work:
        engine.step()
    assert not any(sequence.error for sequence in sequences)
    found = [[(token.id, token.logprob, token.top_logprobs) for token in s.tokens] for s in sequences]
    return found, sum(sequence.stats.num_accepted_tokens for sequence in sequences)


@pytest.fixture(scope="module")
def expected(llm: LLM, compiler: GrammarCompiler, cases: list[Case]) -> list[Text]:
    """Plainly, alone, nothing kept from the others."""
    return texts(llm, compiler, cases, PLAIN, max_num_seqs=1, prefix_caching=False)[0]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 16])
@pytest.mark.parametrize("way", WAYS)
def test_drafts_companions_and_history_change_nothing(
    llm: LLM, compiler: GrammarCompiler, cases: list[Case], expected: list[Text], way: str, max_num_seqs: int
) -> None:
    """In a new order each time, with prefixes kept from whoever came before."""
    order = random.Random(max_num_seqs).sample(range(len(cases)), len(cases))
    found, num_accepted = texts(llm, compiler, [cases[i] for i in order], WAYS[way], max_num_seqs=max_num_seqs)
    assert found == [expected[i] for i in order]
    if way != "auto":  # which drafts what pays here
        assert (num_accepted > 0) == (way != "none")


def test_cases_are_of_every_kind(cases: list[Case], expected: list[Text]) -> None:
    """Or the tests around would prove little."""
    params = [case.params for case in cases]
    for name in ("top_k", "min_p", "presence_penalty", "logit_bias", "stop"):
        assert {bool(getattr(p, name)) for p in params} == {True, False}, name
    assert {case.grammar is None for case in cases} == {True, False}
    assert len({tuple(token for token, *_ in text) for text in expected}) > len(cases) / 2
    for case, text in zip(cases, expected, strict=True):
        assert all((logprob is None) == (case.params.logprobs is None) for _, logprob, _ in text)
        assert all(top is None or len(top) == case.params.logprobs for *_, top in text)


def without_grammar(cases: list[Case]) -> Iterator[Case]:
    return (case for case in cases[:40] if case.grammar is None)


def test_generate_stream_and_another_process_say_the_same(llm: LLM, cases: list[Case]) -> None:
    chosen = list(without_grammar(cases))
    together = llm.generate([case.prompt for case in chosen], [case.params for case in chosen])
    for case, result in zip(chosen, together, strict=True):
        assert result.seed == case.params.seed
        last = list(llm.stream(case.prompt, case.params))[-1].result
        assert last is not None
        assert (last.token_ids, last.text, last.seed) == (result.token_ids, result.text, result.seed)


def test_a_reported_seed_gives_the_text_again(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9)
    results = llm.generate(["the cat"] * 4, params)
    assert len({result.seed for result in results}) == 4
    for result in results:
        again = llm.generate("the cat", replace(params, seed=result.seed))[0]
        assert again.token_ids == result.token_ids
    assert llm.generate("the cat", SamplingParams(max_new_tokens=2))[0].seed is None


def test_the_server_says_the_same(llm: LLM, cases: list[Case]) -> None:
    chosen = [case for case in without_grammar(cases) if not case.params.logit_bias][:12]
    expected = llm.generate([case.prompt for case in chosen], [case.params for case in chosen])
    with live_server(llm) as live, live.client() as client:
        for case, result in zip(chosen, expected, strict=True):
            p = case.params
            body = {
                "prompt": case.prompt, "max_tokens": p.max_new_tokens, "temperature": p.temperature, "top_p": p.top_p,
                "top_k": p.top_k, "min_p": p.min_p, "seed": p.seed, "repetition_penalty": p.repetition_penalty,
                "presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty, "stop": list(p.stop),
            }  # fmt: skip
            choice = client.post("/v1/completions", json=body).json()["choices"][0]
            assert (choice["text"], choice["seed"]) == (result.text, p.seed)


def test_over_http_each_choice_has_a_seed(llm: LLM) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 1.5}
    with live_server(llm) as live, live.client() as client:

        def choices(**more: Any) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = client.post("/v1/chat/completions", json={**body, **more}).json()["choices"]
            return found

        fresh = choices(n=3)
        assert len({choice["seed"] for choice in fresh}) == 3
        for choice in fresh:
            assert choices(seed=choice["seed"])[0]["message"] == choice["message"]
        given = choices(n=3, seed=100)
        assert [choice["seed"] for choice in given] == [100, 101, 102]
        assert choices(seed=102)[0]["message"] == given[2]["message"]
        assert "seed" not in choices(temperature=0)[0]
        streamed = client.post("/v1/chat/completions", json={**body, "stream": True, "seed": 7}).text
        assert '"seed":7' in streamed.replace(" ", "")
