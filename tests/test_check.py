"""`hopskip check`: it passes where hopskip keeps its promises, and fails for every fault put in here."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import hopskip.engine.choose
import hopskip.prove.sampled
import hopskip.sampling
from hopskip.backends.base import Head, Pass, Traits
from hopskip.backends.rows import Cache, Rows, Segment
from hopskip.backends.table import TableBackend
from hopskip.backends.tensor_cache import TensorCache
from hopskip.backends.torch.backend import TorchBackend
from hopskip.backends.torch.layer import LayerWeights
from hopskip.cli import app
from hopskip.cli.precisions import parse_precisions
from hopskip.draft.exit import ExitDrafter
from hopskip.engine import Engine
from hopskip.engine.choose import Verdict, verify
from hopskip.errors import ConfigError
from hopskip.prove.context import context_proofs
from hopskip.prove.greedy import PLAIN, compare_with_ties, exits_to_try, greedy_proofs, settings_to_try
from hopskip.prove.hf_reference import tokenizer_proof, transformers_proof
from hopskip.prove.proof import Proof, Tie, all_hold
from hopskip.prove.recorder import run, same_bits
from hopskip.prove.sampled import _exact_joint, chi_squared_p_value, sampling_proofs
from hopskip.sampling_params import SamplingParams
from hopskip.speculative import OwnLayers
from tests.models import tiny_model
from tests.oracle import exact_joint
from tests.tiny import write_checkpoint

VOCAB = 12  # so few that any two tokens in a row have stood in the prompt before, and n-gram lookup has drafts
PROMPTS = torch.randint(VOCAB, (3, 48), generator=torch.Generator().manual_seed(1)).tolist()
NUM_TOKENS = 12


class RowByRow(TorchBackend):
    """The torch decoder, one row after the other: slow, and row-exact as the native engine is."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, row_exact=True)

    def run_layers(
        self, hidden_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache, taps: Sequence[int] = ()
    ) -> Pass:
        places = [(segment, row) for segment in rows.segments for row in range(segment.count)]
        assert isinstance(cache, TensorCache)
        found = [self._row(h_D[None], start, stop, *at, cache, taps) for h_D, at in zip(hidden_ND, places, strict=True)]
        features = [each.features_NAD for each in found]
        return Pass(
            torch.cat([each.hidden_ND for each in found]),
            torch.cat([f for f in features if f is not None]) if taps else None,
        )

    def _row(
        self, h_1D: Tensor, start: int, stop: int, segment: Segment, row: int, cache: TensorCache, taps: Sequence[int]
    ) -> Pass:
        position = segment.start + segment.depths[row]
        own = cache
        if segment.parents is not None:  # as the last of a chain, in a cache where its path is one
            own = copy.copy(cache)
            own.k_LSHTD, own.v_LSHTD = cache.k_LSHTD.clone(), cache.v_LSHTD.clone()
            own.keep_path(segment.slot, segment.start, [place - segment.start for place in segment.places_to(row)])
        found = super().run_layers(h_1D, start, stop, Rows([Segment(segment.slot, position, 1)]), own, taps)
        for tensor, changed in zip(cache.tensors, own.tensors, strict=True):
            tensor[start:stop, segment.slot, :, segment.start + row] = changed[start:stop, segment.slot, :, position]
        return found

    def logits(self, hidden_ND: Tensor, head: Head = "full") -> Tensor:
        return torch.cat([super(RowByRow, self).logits(h_D[None], head) for h_D in hidden_ND])


class TouchedByCompanions(RowByRow):
    """A fault too small to change a token: with others in the pass, a row's last bits change."""

    def run_layers(
        self, hidden_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache, taps: Sequence[int] = ()
    ) -> Pass:
        found = super().run_layers(hidden_ND, start, stop, rows, cache, taps)
        is_touched = 1 < len(rows) <= 7 and stop == self.config.num_hidden_layers
        return Pass(*(part * (1 + 1e-6) if is_touched and part is not None else part for part in found))


def small_model(dtype: torch.dtype = torch.float32) -> TorchBackend:
    return tiny_model(dtype, vocab_size=VOCAB)


def row_exact_model(kind: type[RowByRow] = RowByRow) -> RowByRow:
    model = small_model()
    return kind(model.config, model.weights)


def greedy(model: TorchBackend) -> list[Proof]:
    return list(greedy_proofs(model, PROMPTS, NUM_TOKENS))


# -- greedy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_model, row_exact_model, partial(small_model, torch.bfloat16)])
def test_every_greedy_setting_is_proved(make: object) -> None:
    model = make()  # type: ignore[operator]
    proofs = greedy(model)
    assert all_hold(proofs)
    proved = [p for p in proofs if p.status == "passed"]
    assert all(p.counts["num_rejected_tokens"] > 0 for p in proved)
    num_settings = len(settings_to_try(model))
    num_trees, num_skips, num_chains = 1, 3, (3 + 1 + 1) * 3 * 2
    assert num_settings == num_trees + num_skips + num_chains
    is_bfloat16 = model.dtype == torch.bfloat16
    # on torch in bfloat16 only recompute has the bits of plain decoding, and only at its own shape
    assert len(proved) == num_trees + num_skips + (num_chains // 2 if is_bfloat16 else num_chains)
    claims = {p.claim for p in proved}
    assert any("at the verify shape" in claim for claim in claims) == is_bfloat16
    assert all("bit for bit" in claim for claim in claims) == (is_bfloat16 or model.traits.row_exact)


def test_a_wrong_verdict_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_one_too_many(draft_ids: Sequence[int], target_ids: Sequence[int], parents: object) -> Verdict:
        if parents is not None:
            return Verdict((), target_ids[-1])
        verdict = verify(draft_ids, target_ids)
        num_accepted = min(verdict.num_accepted + 1, len(draft_ids))
        return Verdict(tuple(range(num_accepted)), target_ids[num_accepted])

    monkeypatch.setattr(hopskip.engine.choose, "verify", accept_one_too_many)
    proofs = greedy(small_model())
    assert not all_hold(proofs)
    assert any("differs" in p.detail for p in proofs if p.status == "failed")


def test_hidden_states_are_held_against_each_other_not_only_tokens() -> None:
    proofs = greedy(row_exact_model(TouchedByCompanions))
    failed = [p for p in proofs if p.status == "failed"]
    assert any("hidden states differ from position" in p.detail for p in failed)
    assert not all_hold(proofs)


def test_a_verify_pass_that_misreads_positions_is_found_out() -> None:
    class Shifted(TorchBackend):
        def run_layers(
            self, hidden_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache, taps: Sequence[int] = ()
        ) -> Pass:
            found = super().run_layers(hidden_ND, start, stop, rows, cache, taps)
            is_verify = stop == self.config.num_hidden_layers and len(rows) == 2 * len(rows.segments)
            return Pass(*(part.roll(1, dims=0) if is_verify and part is not None else part for part in found))

    model = small_model()
    assert not all_hold(greedy(Shifted(model.config, model.weights)))


def test_a_draft_that_always_agrees_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExitDrafter.__init__

    def peek(self: ExitDrafter, backend: TorchBackend, exit: OwnLayers, *rest: Any) -> None:
        original(self, backend, exit, *rest)
        self._own_layers = replace(exit, layers=tuple(range(backend.config.num_hidden_layers)))

    monkeypatch.setattr(ExitDrafter, "__init__", peek)
    proofs = [p for p in greedy(small_model()) if p.setting.startswith("early-exit") and "recompute" in p.setting]
    assert len(proofs) == 9
    for proof in proofs:
        assert proof.status == "failed"
        assert "no draft was rejected, so nothing is proved" in proof.detail


def test_an_exit_that_truly_agrees_everywhere_is_no_failure() -> None:
    model = small_model()

    def silent(layer: LayerWeights) -> LayerWeights:
        return replace(layer, o_proj=torch.zeros_like(layer.o_proj), down_proj=torch.zeros_like(layer.down_proj))

    layers = [model.weights.layers[0], *map(silent, model.weights.layers[1:])]
    proofs = greedy(TorchBackend(model.config, replace(model.weights, layers=layers)))
    early = [p for p in proofs if p.setting.startswith("early-exit")]
    chains = [p for p in early if "runner-ups" not in p.setting]  # of second choices all must be wrong
    assert len(chains) == len(early) - 1
    for proof in chains:
        assert proof.status == "passed"
        assert proof.counts["num_rejected_tokens"] == 0
        assert "agrees with the last layer everywhere" in proof.detail


def test_nothing_drafted_proves_nothing() -> None:
    proofs = list(greedy_proofs(small_model(), [[1, 2, 3]], 2))
    ngram = [p for p in proofs if p.setting.startswith("ngram")]
    assert ngram
    assert all(p.status == "failed" and "nothing was drafted" in p.detail for p in ngram)


def test_exits_to_try() -> None:
    config = small_model().config
    assert exits_to_try(config) == [1, 3, 4]
    assert exits_to_try(replace(config, recommended_exit_layer=2)) == [1, 2, 3, 4]
    assert exits_to_try(replace(config, num_hidden_layers=1)) == []


def with_twin(model: TorchBackend, token: int, twin: int) -> TorchBackend:
    """A model in which two tokens are the same in everything: each is a tie with the other."""
    embed_tokens, lm_head = model.weights.embed_tokens.clone(), model.weights.lm_head.clone()
    embed_tokens[twin], lm_head[twin] = embed_tokens[token], lm_head[token]
    return TorchBackend(model.config, replace(model.weights, embed_tokens=embed_tokens, lm_head=lm_head))


def test_only_a_tie_excuses_a_difference() -> None:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    plain = run(tiny_model(), PROMPTS[:1], PLAIN, params, max_num_seqs=1)[0].token_ids
    token, twin = plain[3], 96
    assert twin not in plain
    model = with_twin(tiny_model(), token, twin)
    expected = run(model, PROMPTS[:1], PLAIN, params, max_num_seqs=1)[0].token_ids
    # equal weights, but a product may sum in another order at another column: either of the two may be the better
    assert [token if other == twin else other for other in expected] == plain
    chosen = expected[3]
    passed_over = token if chosen == twin else twin
    taken_the_other_way = [*expected[:3], passed_over, *expected[4:]]
    ties: list[Tie] = []
    assert compare_with_ties(model, 0, PROMPTS[0], expected, taken_the_other_way, ties) is None
    (tie,) = ties
    assert tie == Tie(0, 3, chosen, passed_over, tie.gap)
    assert tie.gap == pytest.approx(0.0, abs=1e-5)
    # the same difference without the tie, and a difference behind a tie
    assert compare_with_ties(tiny_model(), 0, PROMPTS[0], expected, taken_the_other_way, []) is not None
    wrong_later = [*taken_the_other_way[:6], (taken_the_other_way[6] + 1) % 90, taken_the_other_way[7]]
    assert "token 6 differs" in (compare_with_ties(model, 0, PROMPTS[0], expected, wrong_later, []) or "")


def test_same_bits_sees_the_last_bit() -> None:
    one = np.ones((2, 3), dtype=np.float32)
    assert same_bits(one, one.copy())
    assert not same_bits(one, np.nextafter(one, 2 * one))
    assert not same_bits(0 * one, -0.0 * one)
    assert same_bits(one * np.nan, one * np.nan)
    assert not same_bits(one, one[:1])


# -- sampling ----------------------------------------------------------------------------------------------------------


def sampling(prompts: list[list[int]] = PROMPTS, num_draws: int = 2000) -> list[Proof]:
    return list(sampling_proofs(row_exact_model(), prompts, 10, num_draws=num_draws))


def test_sampling_is_proved() -> None:
    proofs = sampling()
    assert all(p.status == "passed" for p in proofs), [p for p in proofs if p.status != "passed"]
    assert all(p.topic == "sampling" for p in proofs)
    assert [p.setting.split(",")[0] for p in proofs[:2]] == ["plain", "plain"]
    drafted = proofs[3:]
    assert {p.setting.split()[0] for p in drafted} == {"early-exit", "ngram", "both", "layer-skip"}
    assert any("runner-ups" in p.setting for p in drafted)
    assert all(p.counts["num_rejected_tokens"] > 0 for p in drafted)
    assert all("k=3" in p.setting for p in drafted)
    assert any(p.counts["num_rejected_tokens"] < p.counts["num_draft_tokens"] for p in drafted)


def test_sampling_is_proved_at_one_shape_where_rows_are_not_exact() -> None:
    proofs = list(sampling_proofs(small_model(), PROMPTS[:1], 10, num_draws=2000))
    assert all(p.status == "passed" for p in proofs), [p for p in proofs if p.status != "passed"]
    assert all("verify shape" in p.claim for p in proofs[2:])


def test_a_wrong_accept_rule_changes_sampled_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_one_too_many(
        draft_ids: Sequence[int], target_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> Verdict:
        verdict = verify(draft_ids, target_ids, parents)
        num_accepted = verdict.num_accepted
        if parents is not None or num_accepted == len(draft_ids):
            return verdict
        return Verdict((*verdict.path, num_accepted), target_ids[num_accepted + 1])

    monkeypatch.setattr(hopskip.engine.choose, "verify", accept_one_too_many)
    failed = {p.setting.split()[0] for p in sampling(PROMPTS[:1])[2:] if p.status == "failed"}
    assert failed >= {"early-exit", "ngram", "both", "layer-skip"}


def test_another_distribution_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hopskip.sampling._gumbel
    monkeypatch.setattr(hopskip.sampling, "_gumbel", lambda *all: 1.5 * right(*all))
    proof = next(sampling_proofs(row_exact_model(), PROMPTS[:1], 4, num_draws=2000))
    assert proof.status == "failed"
    assert "another distribution" in proof.detail


def test_a_seed_without_effect_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(key: Callable[[int, int], tuple[int, int]]) -> Proof:
        monkeypatch.setattr(hopskip.sampling, "noise_key", key)
        return list(itertools.islice(sampling_proofs(row_exact_model(), PROMPTS[:1], 4, num_draws=100), 2))[1]

    right = hopskip.sampling.noise_key
    calls = itertools.count()
    assert "the second text differs" in found(lambda seed, position: right(next(calls), position)).detail
    assert "other seeds give the same text" in found(lambda seed, position: right(0, position)).detail


def test_the_exact_distribution_follows_the_rule_for_ties() -> None:
    """Of equal logits the lowest ids stay, as in the sampler."""
    target_VV = torch.randint(0, 3, (5, 5), generator=torch.Generator().manual_seed(0)).float()
    target_VV[0] = 1.0
    table = TableBackend(small_model().config, target_VV.numpy(), target_VV.numpy())
    params = SamplingParams(max_new_tokens=3, temperature=1.0, top_k=3)
    expected = exact_joint(target_VV.double().numpy(), [0], params, skip=0, length=3)
    np.testing.assert_allclose(
        _exact_joint(table, replace(params, top_k=4)),
        exact_joint(target_VV.double().numpy(), [0], replace(params, top_k=4), skip=0, length=3),
        rtol=1e-12,
    )
    np.testing.assert_allclose(_exact_joint(table, params), expected, rtol=1e-12)


def test_chi_squared_p_value() -> None:
    from scipy.stats import chisquare

    expected = np.array([50.0, 30.0, 20.0])
    observed = np.array([61.0, 22.0, 17.0])
    assert chi_squared_p_value(observed, expected) == pytest.approx(chisquare(observed, expected).pvalue)
    assert chi_squared_p_value(np.array([99.0, 1.0]), np.array([100.0, 0.0])) == 0


# -- context -----------------------------------------------------------------------------------------------------------


def test_context_is_proved_where_rows_are_exact() -> None:
    proofs = list(context_proofs(row_exact_model(), PROMPTS, NUM_TOKENS))
    assert [p.status for p in proofs] == ["passed", "passed"]
    assert proofs[0].counts["num_cached_prompt_tokens"] > 0


def test_context_is_not_claimed_on_torch() -> None:
    proofs = list(context_proofs(small_model(), PROMPTS, NUM_TOKENS))
    assert [p.status for p in proofs] == ["not claimed", "not claimed"]
    assert not all_hold(proofs)


def test_companions_that_change_bits_are_found_out() -> None:
    proofs = list(context_proofs(row_exact_model(TouchedByCompanions), PROMPTS, NUM_TOKENS))
    assert proofs[1].status == "failed"


def test_a_spoiled_prefix_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    retire = Engine._retire

    def spoil(self: Engine) -> None:
        had_work = bool(self._running)
        retire(self)
        cache = self._slots._cache
        if had_work and not self._running and isinstance(cache, TensorCache):
            cache.v_LSHTD.mul_(-1)

    monkeypatch.setattr(Engine, "_retire", spoil)
    assert next(context_proofs(row_exact_model(), PROMPTS, NUM_TOKENS)).status == "failed"


# -- against transformers ----------------------------------------------------------------------------------------------


def test_against_transformers(tmp_path: Path) -> None:
    from hopskip import LLM

    theirs = write_checkpoint(tmp_path, tokenizer=True)
    llm = LLM(tmp_path, backend="torch", dtype="float32")
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    ours = [r.token_ids for r in run(llm.backend, PROMPTS, PLAIN, params, max_num_seqs=3)]
    proof = transformers_proof(theirs, PROMPTS, ours, "plain")
    assert proof.status == "passed"
    assert proof.counts["num_tokens"] == 48
    # every single token counts, the last one too
    for position in (0, 7, 15):
        changed = [list(ids) for ids in ours]
        changed[1][position] = (changed[1][position] + 1) % 320
        proof = transformers_proof(theirs, PROMPTS, changed, "plain")
        assert proof.status == "failed"
        assert f"prompt 1: token {position} is" in proof.detail


def test_tokenizer_proof() -> None:
    assert tokenizer_proof([[1, 2], [3]], [[1, 2], [3]]).status == "passed"
    proof = tokenizer_proof([[1, 2], [3]], [[1, 2], [4]])
    assert proof.status == "failed"
    assert proof.detail == "1 of 2 prompts have the same ids; not prompt 1"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return folder


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopskip.prove.sampled, "sampling_proofs", partial(sampling_proofs, num_draws=500))


ARGUMENTS = ["--backend", "torch", "--num-prompts", "3", "-n", "8"]


@pytest.mark.usefixtures("few_draws")
def test_command_prints_a_table(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(checkpoint), "--precision", "fp32", *ARGUMENTS])
    assert result.exit_code == 0, result.output
    assert "float32 greedy: ids equal plain decoding's" in result.output
    assert "early-exit E=1 k=3 recompute" in result.output
    assert "failed" not in result.output


@pytest.mark.usefixtures("few_draws")
def test_command_exits_with_1_when_a_proof_fails(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(draft: list[int], target: list[int], parents: object) -> Verdict:
        return Verdict(tuple(range(len(draft))) if parents is None else (), target[-1])

    monkeypatch.setattr(hopskip.engine.choose, "verify", accept_all)
    result = CliRunner().invoke(app, ["check", str(checkpoint), "--precision", "fp32", "--json", *ARGUMENTS])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    failed = [p for p in report["proofs"] if p["status"] == "failed"]
    assert failed
    assert all(p["topic"] in ("greedy", "sampling") and p["precision"] == "float32" for p in failed)


def test_command_against_transformers(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(checkpoint), "--against", "transformers", "--json", *ARGUMENTS])
    assert result.exit_code == 0, result.output
    proofs = json.loads(result.stdout)["proofs"]
    assert [p["status"] for p in proofs] == ["passed", "passed"]
    assert proofs[1]["counts"]["num_tokens"] == 3 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int3"], "'int3'"),
        (["--precision", "fp32,float32"], "each once"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--against", "vllm"], "'vllm'"),
        (["--against", "transformers", "--precision", "bf16"], "only float32 can be compared"),
        (["--num-prompts", "0"], "number of prompts is 0"),
        (["--num-prompts", "9999"], "number of prompts is 9999"),
        (["-n", "1"], "--max-new-tokens is 1"),
        (["--precision", "q8", "--backend", "torch"], ": quantize=q8 needs the native CPU backend"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["check", str(checkpoint), *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_parse_precisions() -> None:
    assert parse_precisions("bf16, q8") == ["bfloat16", "q8"]
    with pytest.raises(ConfigError, match="''"):
        parse_precisions("")
