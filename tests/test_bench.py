"""Benchmarks: turns, medians and ratios; contenders that are absent, fail or die; who takes part; what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.backends.native.isa import obstacle
from hopskip.bench.contenders import (
    AbsentError,
    Contender,
    Footprint,
    Hopskip,
    LlamaCpp,
    Transformers,
)
from hopskip.bench.lineup import lineup, parse_setting
from hopskip.bench.machine import measure_read_bandwidth, versions
from hopskip.bench.measure import PromptResult, Result, measure, ratio, report
from hopskip.bench.turns import medians, take_turns
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.draft import timing
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig
from hopskip.prompts import Prompt
from tests.scripted import Scripted
from tests.tiny import make_model, write_checkpoint, write_gguf

PROMPTS = [(Prompt("one", "a", "x"), [1, 2, 3]), (Prompt("one", "b", "x"), [4, 5]), (Prompt("two", "c", "x"), [6])]


# -- turns, with made-up contenders ------------------------------------------------------------------------------------


def test_turns() -> None:
    log: list[str] = []

    def run(name: str, item: int) -> float:
        log.append(f"{name}{item}")
        return float(item**2)

    found = take_turns({"a": lambda item: run("a", item), "b": lambda item: -run("b", item)}, [3, 1, 2])
    assert log == ["a3", "b3", "a1", "b1", "a2", "b2"]
    assert found == {"a": [9, 1, 4], "b": [-9, -1, -4]}
    assert medians(found) == {"a": 4, "b": -4}


def run(*contenders: Contender, repeats: int = 1) -> dict[str, Result]:
    results = measure(contenders, PROMPTS, num_tokens=5, repeats=repeats, threads=1)
    assert [r.name for r in results] == [c.name for c in contenders]
    return {r.name: r for r in results}


def test_contenders_take_turns_prompt_by_prompt(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = run(Scripted(name="A", log=log), Scripted(name="B", log=log, plain="A"), repeats=2)
    warm_up = ["A1", "B1"]
    turns = ["A1", "B1", "A4", "B4", "A6", "B6"]
    assert log.read_text().split() == warm_up + turns + turns
    # runs take 0.1, 0.2, .. 0.7 s; the first warmed up, so the first prompt's are the 2nd and the 5th
    rates = [p.decode_tokens_per_second for p in results["A"].per_prompt]
    assert rates == pytest.approx([(4 / 0.2 + 4 / 0.5) / 2, (4 / 0.3 + 4 / 0.6) / 2, (4 / 0.4 + 4 / 0.7) / 2])
    assert results["A"].per_prompt[0].prefill_tokens_per_second == 3 / 0.5
    assert results["B"].lossless is True
    assert results["A"].lossless is None


def test_a_contender_that_cannot_go_on_is_reported_and_the_others_finish(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = run(
        Scripted(name="A", log=log),
        Scripted(name="absent", log=log, is_absent=True),
        Scripted(name="raises", log=log, fails_at=2),
        Scripted(name="dies", log=log, dies_at=1),
        Scripted(name="early", log=log, fails_at=0),
        Scripted(name="other", log=log, first_token=8, plain="A"),
    )
    assert [(r.name, r.status, r.reason) for r in results.values()] == [
        ("A", "measured", None),
        ("absent", "absent", "it is on holiday"),
        ("raises", "failed", "ValueError: no more"),
        ("dies", "failed", "its process died (exit code 3)"),
        ("early", "failed", "ValueError: no more"),
        ("other", "measured", None),
    ]
    assert len(results["A"].per_prompt) == 3
    assert results["raises"].per_prompt == []
    assert results["other"].lossless is False
    whole = report(
        list(results.values()),
        machine={"read_bytes_per_second": 1e6},
        versions=versions(),
        settings={"max_new_tokens": 5},
    )
    json.dumps(whole, allow_nan=False)
    entries = {c["name"]: c for c in whole["contenders"]}
    assert entries["dies"]["decode_tokens_per_second"] is None
    assert set(entries["A"]["decode_ratio_to"]) == {"other"}


def test_figures_of_a_report() -> None:
    def result(name: str, rates: list[float]) -> Result:
        own = Result(contender=LlamaCpp(name=name, path=Path("x")))
        own.footprint = Footprint(weight_bytes=1000, kv_bytes_per_position=10)
        own.per_prompt = [
            PromptResult(
                set=prompt.set,
                id=prompt.id,
                num_prompt_tokens=10,
                prefill_tokens_per_second=1.0,
                decode_tokens_per_second=rate,
                tokens_per_pass=1.0,
                mean_acceptance_length=1.0,
            )
            for (prompt, _), rate in zip(PROMPTS, rates, strict=True)
        ]
        return own

    ours, theirs = result("ours", [10.0, 40.0, 30.0]), result("theirs", [5.0, 10.0, 30.0])
    assert ours.middle("decode_tokens_per_second") == 30
    assert ours.middle("decode_tokens_per_second", "one") == 25
    # prompt by prompt 2, 4 and 1: the ratio of the medians would be 3
    assert ratio(ours, theirs, "decode_tokens_per_second") == 2
    assert ratio(ours, theirs, "decode_tokens_per_second", "two") == 1
    # 1000 bytes of weights, and keys and values of 10 prompt tokens and half of 20 new ones, 30 times a second
    assert ours.mbu(20, read_bandwidth=60_000) == pytest.approx(30 * (1000 + 10 * 20) / 60_000)


# -- real contenders, on a tiny checkpoint ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return folder


IDS = [5, 9, 2, 5, 9, 2, 5, 9]


def test_hopskip_and_transformers_generate_the_same(checkpoint: Path) -> None:
    plain = SpeculativeConfig(draft="none")
    on_torch = LoadConfig(model=checkpoint, backend="torch", dtype="float32")
    contenders: list[Contender] = [
        Hopskip(name="plain", load=on_torch, speculative=plain),
        Hopskip(name="ours", load=on_torch, speculative=SpeculativeConfig(draft="early-exit")),
        Transformers(name="transformers", path=checkpoint, dtype="float32"),
        Transformers(name="early exit", path=checkpoint, dtype="float32", exit_layer=1, num_draft_tokens=3),
    ]
    expected = LLM(checkpoint, speculative=plain, backend="torch", dtype="float32").generate(
        [IDS], SamplingParams(max_new_tokens=20, ignore_eos=True)
    )
    weight_bytes = set()
    for contender in contenders:
        runner = contender.start(threads=torch.get_num_threads(), max_model_len=64)
        for _ in range(2):  # nothing is kept from one run to the next
            got = runner.generate(IDS, 20)
            assert got.token_ids == expected[0].token_ids, contender.name
        assert got.prefill_seconds > 0
        assert got.decode_seconds > 0
        assert (got.tokens_per_pass > 1) <= (contender.name in ("ours", "early exit"))
        assert got.num_decoded == 19 or contender.name == "early exit"
        weight_bytes.add(runner.footprint.weight_bytes)
        assert runner.footprint.kv_bytes_per_position == 3 * 2 * 2 * 16 * 4
    assert len(weight_bytes) == 1


@pytest.mark.parametrize("load", [{"backend": "torch", "dtype": "float32"}, {"dtype": "bfloat16"}, {"quantize": "q8"}])
def test_costs_that_another_has_measured_are_not_measured_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: dict[str, Any]
) -> None:
    if load.get("backend") != "torch" and obstacle() is not None:
        pytest.skip("not built")
    monkeypatch.setenv("HOPSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "_SECONDS", 0.01)
    auto = SpeculativeConfig(draft="auto")
    LLM(checkpoint, speculative=auto, threads=1, **load)
    kept = sorted(tmp_path.glob("*.costs.json"))
    assert len(kept) == 1
    contenders = lineup(open_checkpoint(checkpoint), LoadConfig(**load), auto)
    monkeypatch.setattr(timing, "measure", lambda *arguments, **options: pytest.fail("measured again"))
    contenders[0].start(threads=1, max_model_len=64)
    assert sorted(tmp_path.glob("*.costs.json")) == kept


def test_assistant_early_exit_really_drafts(checkpoint: Path) -> None:
    """Drafting with all but no layers missing: everything is accepted, so every pass gives k + 1 tokens."""
    lengths = []
    for num_draft_tokens in (1, 4):
        contender = Transformers(
            name="x", path=checkpoint, dtype="float32", exit_layer=3, num_draft_tokens=num_draft_tokens
        )
        lengths.append(contender.start(2, 64).generate(IDS, 21).mean_acceptance_length)
    assert lengths[0] == pytest.approx(2, abs=0.2)
    assert lengths[1] == pytest.approx(5, abs=0.8)


def test_ends_of_text_do_not_shorten_a_run(tmp_path: Path) -> None:
    """Every token ends a text here, and still all contenders generate as many."""
    write_checkpoint(tmp_path, tokenizer=True)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**settings, "eos_token_id": list(range(320))}))
    for contender in (
        Hopskip(name="a", load=LoadConfig(model=tmp_path, backend="torch")),
        Transformers(name="b", path=tmp_path, dtype="float32"),
        Transformers(name="c", path=tmp_path, dtype="float32", exit_layer=1, num_draft_tokens=2),
    ):
        assert len(contender.start(1, 64).generate(IDS, 9).token_ids) == 9


def test_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from tests.tiny import byte_level_tokenizer

    path = tmp_path / "tiny.gguf"
    write_gguf(path, make_model("smollm2"), tokenizer=byte_level_tokenizer())
    # float32 weights, so llama.cpp's tokens are ours but for near-ties
    ours = Hopskip(name="ours", load=LoadConfig(model=path, backend="torch", dtype="float32")).start(1, 128)
    runner = LlamaCpp(name="x", path=path).start(1, 128)
    first, again = runner.generate(IDS, 12), runner.generate(IDS, 12)
    assert first.token_ids == again.token_ids
    assert first.token_ids[:4] == ours.generate(IDS, 12).token_ids[:4]
    assert first.num_decoded == 11
    assert runner.footprint.weight_bytes == ours.footprint.weight_bytes
    drafting = LlamaCpp(name="y", path=path, num_lookup_tokens=3).start(1, 128)
    assert len(drafting.generate(IDS, 12).token_ids) == 12


def test_llama_cpp_is_absent_without_a_gguf_file(checkpoint: Path) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(AbsentError, match="--llama-cpp-model"):
        LlamaCpp(name="x", path=checkpoint).start(1, 64)


# -- who takes part --------------------------------------------------------------------------------------------------


def names(checkpoint: Path, **options: Any) -> list[str]:
    draft = options.pop("draft", SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=4))
    return [c.name for c in lineup(open_checkpoint(checkpoint), LoadConfig(), draft, **options)]


def test_lineup(checkpoint: Path) -> None:
    assert names(checkpoint) == ["hopskip", "hopskip-plain"]
    assert names(checkpoint, draft=SpeculativeConfig(draft="none")) == ["hopskip-plain"]
    assert names(checkpoint, settings=["draft=ngram", "quantize=q8", "quantize=q8,draft=none"]) == [
        "hopskip",
        "hopskip-plain",
        "hopskip(draft=ngram)",
        "hopskip(quantize=q8)",
        "hopskip-plain(quantize=q8)",
    ]
    opponents = ["transformers", "transformers-early-exit", "llama.cpp", "llama.cpp-lookup"]
    assert names(checkpoint, against=opponents, llama_cpp_models=[Path("q8.gguf"), Path("q4.gguf")])[2:] == [
        "transformers-float32",
        "transformers-bfloat16",
        "transformers-early-exit-bfloat16",
        "llama.cpp(q8.gguf)",
        "llama.cpp(q4.gguf)",
        "llama.cpp-lookup(q8.gguf)",
        "llama.cpp-lookup(q4.gguf)",
    ]


def test_opponents_draft_as_we_do(checkpoint: Path) -> None:
    draft = SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=4)
    contenders = lineup(open_checkpoint(checkpoint), LoadConfig(), draft, against=["transformers-early-exit"])
    early_exit = contenders[-1]
    assert isinstance(early_exit, Transformers)
    assert (early_exit.exit_layer, early_exit.num_draft_tokens) == (2, 4)
    assert early_exit.plain is None  # nobody measures what it speculates on top of
    assert contenders[0].plain == "hopskip-plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ["vllm"]}, "'vllm'"),
        ({"llama_cpp_models": [Path("x.gguf")]}, "llama-cpp-model has no effect"),
        ({"settings": ["exit_layer=99"]}, "exit_layer is 99"),
        ({"settings": ["exit_layer=two"]}, "exit_layer is 'two'"),
        ({"settings": ["min-confidence=high"]}, "min_confidence is 'high'; it must be a number"),
        ({"settings": ["skip_layers=1;2"]}, "setting 'skip_layers=1;2': skip_layers is '1;2'"),
        ({"settings": ["kv_dtype=q4"]}, "kv_dtype is 'q4'"),
        ({"settings": ["speed=high"]}, "'speed=high'"),
        ({"settings": ["threads=2"]}, "'threads=2'; give key=value, with keys from dtype, quantize, backend, kv_dtype"),
        ({"settings": ["draft=ngram", "draft=ngram"]}, "given twice"),
        ({"settings": ["ngram"]}, "give key=value"),
    ],
)
def test_wrong_lineups(checkpoint: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        names(checkpoint, **options)


def test_settings_build_on_the_given_ones() -> None:
    load, draft = LoadConfig(dtype="bfloat16"), SpeculativeConfig(draft="early-exit", exit_layer=2)
    assert parse_setting("num-draft-tokens=3", load, draft) == (load, replace(draft, num_draft_tokens=3))
    assert parse_setting("draft=ngram", load, draft)[1] == SpeculativeConfig(draft="ngram")
    assert parse_setting("quantize=q4", load, draft) == (LoadConfig(quantize="q4"), draft)
    assert parse_setting("dtype=float32", LoadConfig(quantize="q4"), draft) == (LoadConfig(dtype="float32"), draft)
    text = "kv_dtype=int8, draft=layer-skip,skip_layers=3+1,min_confidence=0.5,exit_branch=folder"
    with pytest.raises(ConfigError, match="exit_branch=folder has no effect"):
        parse_setting(text, load, draft)
    assert parse_setting(text.removesuffix(",exit_branch=folder"), load, draft) == (
        replace(load, kv_dtype="int8"),
        SpeculativeConfig(draft="layer-skip", skip_layers=(1, 3), min_confidence=0.5),
    )


# -- the machine -------------------------------------------------------------------------------------------------------


def test_read_bandwidth_is_that_of_memory() -> None:
    before = torch.get_num_threads()
    assert 1e8 < measure_read_bandwidth(1, repeats=3) < 1e13
    assert torch.get_num_threads() == before
