"""Static rounds: the tokens of the engine's plain greedy decoding, without a word from the host while they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hopskip import ConfigError, PromptError, SamplingParams, SpeculativeConfig
from hopskip.engine import Engine
from hopskip.model import Transformer
from hopskip.sequence import Sequence
from hopskip.static.decoder import Generated, StaticDecoder
from hopskip.static.matrix import Matrix, Precision
from hopskip.weights import load_weights, open_checkpoint
from tests.models import tiny_model
from tests.test_engine import PLAIN, new_ids, run
from tests.test_exit_branch import CONFIGS, IDS, own_branch, random_branch
from tests.tiny import FAMILIES, write_checkpoint

PROMPTS = [[5, 6, 7, 8] * 3, [9, 8, 7] * 20, [3], [11, 12], [90, 4, 17] * 5]


def early_exit(exit_layer: int, num_draft_tokens: int) -> SpeculativeConfig:
    return SpeculativeConfig(draft="early-exit", exit_layer=exit_layer, num_draft_tokens=num_draft_tokens)


def plain_ids(model: Transformer, prompts: list[list[int]], num_tokens: int, **settings: Any) -> list[list[int]]:
    engine = Engine(model, PLAIN, **settings)
    return new_ids(run(engine, prompts, SamplingParams(max_new_tokens=num_tokens)))


def ids(results: list[Generated]) -> list[list[int]]:
    return [result.token_ids for result in results]


def load(folder: Path, family: str) -> Transformer:
    write_checkpoint(folder, family)
    checkpoint = open_checkpoint(folder)
    return Transformer(checkpoint.config, load_weights(checkpoint, torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_engine(family: str, tmp_path: Path) -> None:
    """Ragged prompts, of which the second slides out of Mistral's window, more of them than slots."""
    model = load(tmp_path, family)
    expected = plain_ids(model, PROMPTS, 24)
    decoder = StaticDecoder(model, early_exit(2, 3), batch_size=2, max_model_len=100)
    results = decoder.generate(PROMPTS, 24)
    assert ids(results) == expected
    drafted = sum(r.stats.num_draft_tokens for r in results)
    accepted = sum(r.stats.num_accepted_tokens for r in results)
    assert 0 < accepted < drafted, "a draft that is never rejected, or never accepted, proves nothing"


def extra_accepted(result: Generated, sequence: Sequence) -> int:
    """The engine drafts less right before the end of a text and static rounds cannot, so a text's last token may count
    as accepted here and as the bonus there."""
    return result.stats.num_accepted_tokens - sequence.stats.num_accepted_tokens


@pytest.mark.parametrize(("exit_layer", "num_draft_tokens"), [(1, 4), (3, 1), (3, 7), (5, 4)])
def test_drafts_and_counts_are_those_of_the_engine(exit_layer: int, num_draft_tokens: int) -> None:
    model = tiny_model()
    config = early_exit(exit_layer, num_draft_tokens)
    params = SamplingParams(max_new_tokens=40)
    expected = run(Engine(model, config), PROMPTS, params)
    results = StaticDecoder(model, config, batch_size=5, max_model_len=128).generate(PROMPTS, 40)
    assert ids(results) == new_ids(expected) == plain_ids(model, PROMPTS, 40)
    for result, sequence in zip(results, expected, strict=True):
        assert result.stats.num_target_passes == sequence.stats.num_target_passes
        assert 0 <= extra_accepted(result, sequence) <= 1
        assert result.finish_reason == sequence.finish_reason == "length"


def test_bfloat16_is_that_of_plain_decoding_at_the_same_shape() -> None:
    model = tiny_model(torch.bfloat16)
    plain = StaticDecoder(model, PLAIN, batch_size=5, max_model_len=128, num_rows=5).generate(PROMPTS, 60)
    drafted = StaticDecoder(model, early_exit(4, 4), batch_size=5, max_model_len=128).generate(PROMPTS, 60)
    assert ids(drafted) == ids(plain)
    assert 0 < sum(r.stats.num_accepted_tokens for r in drafted) < sum(r.stats.num_draft_tokens for r in drafted)
    assert sum(r.stats.num_drafts for r in plain) == 0


def test_stop_tokens_inside_drafts_end_the_text() -> None:
    """Several tokens of the plain text in turn are made the stop token, so that some stand inside accepted drafts."""
    model = tiny_model()
    prompt = PROMPTS[1]
    text = plain_ids(model, [prompt], 40)[0]
    places = set()
    for stop in list(dict.fromkeys(text))[:7]:
        config = early_exit(5, 4)
        decoder = StaticDecoder(model, config, batch_size=2, max_model_len=128, stop_token_ids=[stop, 96])
        result, other = decoder.generate([prompt, PROMPTS[0]], 40)
        assert result.token_ids == text[: text.index(stop) + 1]
        assert result.finish_reason == "stop"
        assert other.token_ids == plain_ids(model, [PROMPTS[0]], 40, eos_token_ids=[stop, 96])[0]
        num_after_first = len(result.token_ids) - 1
        places.add(num_after_first - (result.stats.num_accepted_tokens + result.stats.num_target_passes))
    assert -1 in places, "no text ended inside a draft, before what followed was committed"


def test_a_sequence_that_has_ended_stands_still() -> None:
    model = tiny_model()
    decoder = StaticDecoder(model, early_exit(3, 4), batch_size=2, max_model_len=64)
    decoder.generate([[1, 2, 3]], 10)
    before = [t.clone() for t in (decoder.state.last_B, decoder.state.position_B, decoder.state.limit_B)]
    for _ in range(3):
        decoder.round(decoder.state)
    assert decoder.state.report_BC[:, 0].tolist() == [0, 0]
    for old, new in zip(before, (decoder.state.last_B, decoder.state.position_B, decoder.state.limit_B), strict=True):
        assert torch.equal(old, new)


def test_the_last_position_of_the_context_is_used() -> None:
    model = tiny_model()
    decoder = StaticDecoder(model, early_exit(4, 5), max_model_len=30)
    assert ids(decoder.generate([[1, 2, 3]], 27)) == plain_ids(model, [[1, 2, 3]], 27)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_trained_branch_drafts_as_in_the_engine(tmp_path: Path, config: Any) -> None:
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = Transformer(checkpoint.config, load_weights(checkpoint, torch.float32))
    model.attach(random_branch(checkpoint, config)[1])
    speculative = SpeculativeConfig(draft="exit-branch", num_draft_tokens=4)
    expected = run(Engine(model, speculative), PROMPTS, SamplingParams(max_new_tokens=30))
    results = StaticDecoder(model, speculative, batch_size=2, max_model_len=128).generate(PROMPTS, 30)
    assert ids(results) == new_ids(expected)
    assert all(0 <= extra_accepted(r, s) <= 1 for r, s in zip(results, expected, strict=True))
    assert [r.stats.num_target_passes for r in results] == [s.stats.num_target_passes for s in expected]


def test_the_models_own_layer_as_a_branch_is_always_right(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = Transformer(checkpoint.config, load_weights(checkpoint, torch.float32))
    model.attach(own_branch(checkpoint))
    results = StaticDecoder(model, SpeculativeConfig(), batch_size=2, max_model_len=128).generate(PROMPTS, 31)
    assert ids(results) == plain_ids(model, PROMPTS, 31)
    # 30 tokens behind the first, five in each round
    assert all(r.stats.num_target_passes == 6 for r in results if r.finish_reason == "length")


# -- precisions --------------------------------------------------------------------------------------------------------


def wide_model(dtype: torch.dtype = torch.float32) -> Transformer:
    """Wide enough for groups of 128 columns in two halves."""
    return tiny_model(dtype, hidden_size=256, intermediate_size=256, num_attention_heads=16, num_key_value_heads=4)


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.005), ("float8", 0.03), ("int4", 0.08)])
def test_packing_keeps_values(precision: Precision, error: float) -> None:
    weights = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    matrix = Matrix.pack(weights, precision)
    found = matrix.dequantize(torch.float32)
    assert matrix.shape == tuple(found.shape) == (40, 512)
    assert error / 4 < (found - weights).norm() / weights.norm() < error * 2
    bits = {"int8": 8, "float8": 8, "int4": 4}[precision]
    assert matrix.values.nbytes == weights.numel() * bits // 8


@pytest.mark.parametrize("precision", ["int8", "float8", "int4"])
def test_drafting_is_lossless_in_each_precision(precision: Precision) -> None:
    model = wide_model()
    settings: dict[str, Any] = {"batch_size": 2, "max_model_len": 80}
    prompts = PROMPTS[:2]
    exact = StaticDecoder(model, PLAIN, **settings).generate(prompts, 16)
    plain = StaticDecoder(model, PLAIN, precision=precision, **settings).generate(prompts, 16)
    drafted = StaticDecoder(model, early_exit(4, 3), precision=precision, **settings).generate(prompts, 16)
    assert ids(drafted) == ids(plain)
    assert ids(plain) != ids(exact), "a precision without effect"
    packed_draft = StaticDecoder(model, early_exit(4, 3), draft_precision=precision, **settings).generate(prompts, 16)
    unpacked_draft = StaticDecoder(model, early_exit(4, 3), **settings).generate(prompts, 16)
    assert ids(packed_draft) == ids(unpacked_draft) == ids(exact)
    accepted = [[r.stats.num_accepted_tokens for r in results] for results in (packed_draft, unpacked_draft)]
    assert accepted[0] != accepted[1], "a draft precision without effect"


# -- no host -----------------------------------------------------------------------------------------------------------


class NoHost(TorchDispatchMode):
    """Refuses what would wait for the device, or give a shape that depends on data."""

    refused = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "where_self"}
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.refused, f"aten.{name} waits for the device"
        if name == "index" or name == "index_put_":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a mask as an index has no shape"
        return func(*args, **(kwargs or {}))


def decoders(tmp_path: Path) -> list[StaticDecoder]:
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    branched = Transformer(checkpoint.config, load_weights(checkpoint, torch.float32))
    with torch.no_grad():  # as from a file: the random branch comes from a trainer
        branched.attach(random_branch(checkpoint, CONFIGS[2])[1])
    small = tiny_model(sliding_window=16, num_hidden_layers=2)
    return [
        StaticDecoder(small, early_exit(1, 3), batch_size=2, max_model_len=80),
        StaticDecoder(small, PLAIN, max_model_len=80),
        StaticDecoder(branched, SpeculativeConfig(num_draft_tokens=2), batch_size=2, max_model_len=80),
    ]


def test_a_round_never_asks_the_host(tmp_path: Path) -> None:
    for decoder in decoders(tmp_path):
        with torch.no_grad(), NoHost():
            decoder.round(decoder.state)
    with NoHost(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(()).item()


@pytest.mark.parametrize("which", [0, 2], ids=["early-exit", "branch"])
def test_torch_compile_takes_a_round_whole(which: int, tmp_path: Path) -> None:
    decoder = decoders(tmp_path)[which]
    expected = ids(decoder.generate(PROMPTS[:2], 16))
    whole = torch.compile(decoder.round, fullgraph=True, backend="aot_eager")
    decoder._run_round = lambda: whole(decoder.state)
    assert ids(decoder.generate(PROMPTS[:2], 16)) == expected
    torch.compiler.reset()


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": SpeculativeConfig(draft="ngram")}, "looks at the text on the host"),
        ({"speculative": SpeculativeConfig(draft="early-exit", verify="reuse")}, "verify 'reuse'"),
        ({"speculative": SpeculativeConfig(draft="early-exit", num_runner_ups=2)}, "are chains"),
        ({"speculative": SpeculativeConfig(draft="early-exit", min_confidence=0.5)}, "min_confidence=0.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_model_len": 4096}, "the model's context allows 2 to 2048"),
        ({"num_rows": 4}, "num_rows is 4; 4 draft tokens need at least 5"),
        ({"speculative": PLAIN, "draft_precision": "int8"}, "draft_precision=int8 has no effect"),
        ({"precision": "int3"}, "precision is 'int3'"),
        ({"precision": "int4"}, "multiple of 256, and this model has one of 64"),
        ({"kernels": "cutlass"}, "kernels is 'cutlass'"),
        ({"kernels": "triton"}, "run on CUDA, and this model is on cpu"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StaticDecoder(tiny_model(), **{"speculative": early_exit(2, 4), **options})


def test_bad_prompts_are_refused() -> None:
    decoder = StaticDecoder(tiny_model(), early_exit(2, 4), max_model_len=20)
    for prompt, message in [([], "empty"), ([1, 97], "token id 97"), ([1] * 11, "more than max_model_len, 20")]:
        with pytest.raises(PromptError, match=message):
            decoder.generate([[1], prompt], 10)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        decoder.generate([[1]], 0)
