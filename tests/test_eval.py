"""`hopskip eval`: scores and texts at every exit, with lm-eval where it is installed, else with what it needs."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hopskip import LLM, ConfigError
from hopskip.backends.rows import Rows, Segment
from hopskip.cli.eval import draw, numbers_of_layers, print_table
from hopskip.sampling import logprobs_of
from tests.tiny import write_checkpoint

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not HAS_LM_EVAL:

        class TemplateLM:
            def __init__(self) -> None:
                self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)

        utils: Any = SimpleNamespace(
            get_rolling_token_windows=lambda token_list, prefix_token, max_seq_len, context_len: [
                ([prefix_token, *token_list[:-1]], token_list)
            ],
            make_disjoint_window=lambda pair: (pair[0][: len(pair[0]) - len(pair[1]) + 1], pair[1]),
        )
        for name, values in {
            "lm_eval": {"utils": utils},
            "lm_eval.api": {},
            "lm_eval.api.model": {"TemplateLM": TemplateLM},
        }.items():
            module = types.ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hopskip.doors.harness", raising=False)
    import hopskip.doors.harness as module_

    yield module_
    monkeypatch.delitem(sys.modules, "hopskip.doors.harness", raising=False)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("eval")
    write_checkpoint(folder, tokenizer=True)
    with LLM(folder, dtype="float32", max_model_len=40) as llm:
        yield llm


def logprobs(llm: LLM, ids: list[int], stop: int) -> Any:
    """[N, V]: after each token, by one pass through some layers."""
    rows, cache = Rows([Segment(0, 0, len(ids))]), llm.backend.new_cache(1, len(ids))
    hidden = llm.backend.run_layers(llm.backend.embed(ids), 0, stop, rows, cache).hidden_ND
    return np.stack([logprobs_of(row) for row in llm.backend.on_host(llm.backend.logits(hidden))])


IDS = [9, 30, 41, 52, 63, 74, 85]


def test_continuations_are_scored_after_each_number_of_layers(harness: Any, llm: LLM) -> None:
    scores = harness.Scores(llm, [1, 3])
    found = scores.score(IDS, 3)
    for stop in (1, 3):
        own = logprobs(llm, IDS[:-1], stop)
        assert found[stop][0] == pytest.approx(sum(own[at, IDS[at + 1]] for at in (3, 4, 5)), abs=1e-4)
        assert found[stop][1] is False
    best = int(logprobs(llm, IDS, 1)[-1].argmax())
    assert scores.score([*IDS, best], 1)[1][1] is True
    assert scores.score([*IDS, best], 2)[1][1] is False
    assert scores.score(IDS, 3) is found


def test_what_is_longer_than_the_context_loses_its_beginning(harness: Any, llm: LLM) -> None:
    scores = harness.Scores(llm, [3])
    long = [20 + i for i in range(60)]
    assert scores.score(long, 5) == scores.score(long[-41:], 5)
    assert scores.score(long, 99) == scores.score(long[-41:], 40)


def test_rolling_starts_from_the_beginning_of_text(harness: Any, llm: LLM) -> None:
    lm = harness.HopskipLM(llm, harness.Scores(llm, [2, 3]), 2)
    ids = llm.tokenizer.encode("The quick fox")
    assert lm.prefix_token_id == 0  # <|im_start|>, as the tokenizer's settings have it
    assert lm.eot_token_id == llm.tokenizer.eos_token_ids[0]
    own = logprobs(llm, [0, *ids[:-1]], 2)
    [found] = lm.loglikelihood_rolling([SimpleNamespace(args=("The quick fox",))])
    assert found == pytest.approx(sum(own[at, token] for at, token in enumerate(ids)), abs=1e-3)


def generated(harness: Any, llm: LLM, stop: int, **asked: Any) -> str:
    lm = harness.HopskipLM(llm, harness.Scores(llm, [2, 3]), stop)
    [text] = lm.generate_until([SimpleNamespace(args=("The quick fox", asked))])
    return str(text)


def test_texts_at_an_exit_are_greedy_and_end_before_stops(harness: Any, llm: LLM) -> None:
    ids = llm.tokenizer.encode("The quick fox")
    new: list[int] = []
    for _ in range(10):
        new.append(int(logprobs(llm, [*ids, *new], 2)[-1].argmax()))
    assert not set(new) & set(llm.tokenizer.eos_token_ids)
    text = llm.tokenizer.decode(new, after=ids)
    assert generated(harness, llm, 2, max_gen_toks=10) == text
    assert generated(harness, llm, 2, max_gen_toks=10, until=[text[4:6]]) == text[: text.index(text[4:6])]
    assert generated(harness, llm, 3, max_gen_toks=10) == llm.generate([ids], max_tokens=10)[0].text
    with pytest.raises(ConfigError, match="after all layers only"):
        generated(harness, llm, 2, do_sample=True, temperature=0.5)


@pytest.mark.parametrize(
    ("text", "expected"), [(None, [12]), ("all", [12]), ("8, 4,all", [4, 8, 12]), ("4", [4, 12]), ("12", [12])]
)
def test_layers_to_read(text: str | None, expected: list[int]) -> None:
    assert numbers_of_layers(text, 12) == expected


@pytest.mark.parametrize("text", ["0", "13", "x", "4,,8", "-1"])
def test_layers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"this model has 12 layers: give 1 to 12, or all"):
        numbers_of_layers(text, 12)


ROWS: list[dict[str, Any]] = [
    {"exit_layer": None, "task": "t", "metric": "acc", "value": 0.5, "error": 0.25},
    {"exit_layer": 4, "task": "t", "metric": "acc", "value": 0.125, "error": None},
]


def test_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_table(ROWS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["task", "metric", "exit", "value"],
        ["t", "acc", "4", "0.1250"],
        ["t", "acc", "all", "0.5000", "±", "0.2500"],
    ]
    pytest.importorskip("matplotlib")
    draw(ROWS, 12, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(ROWS, 12, tmp_path / "no" / "a.svg")


TASKS = {
    "mc": ["multiple_choice", "'{{q}}'", "label", ["acc", "acc_norm"], "doc_to_choice: choices\n"],
    "ll": ["loglikelihood", "'{{q}}'", "'{{choices[0]}}'", ["perplexity", "acc"], ""],
    "roll": ["loglikelihood_rolling", "''", "'{{text}}'", ["word_perplexity", "byte_perplexity"], ""],
    "gen": [
        "generate_until",
        "'{{q}}'",
        "'{{text}}'",
        ["exact_match"],
        "generation_kwargs:\n  until: ['. ']\n  max_gen_toks: 12\n  do_sample: false\n",
    ],
}


def write_tasks(folder: Path) -> None:
    """Four toy tasks for lm-eval, of each kind of request."""
    words = ["brown", "red", "lazy", "quick", "odd", "blue", "tiny", "old"]
    choices = [" jumps", " over the lazy", " dog"]
    docs = [
        {"q": f"The {word} fox {i}", "choices": choices, "label": i % 3, "text": f"The quick {word} dog {i}"}
        for i, word in enumerate(words)
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, (kind, text, target, metrics, more) in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: toy_{name}\noutput_type: {kind}\ndoc_to_text: {text}\ndoc_to_target: {target}\n{more}"
            f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'docs.jsonl'}\n"
            "test_split: test\nmetadata:\n  version: 1\nmetric_list:\n"
            + "".join(f"  - metric: {metric}\n" for metric in metrics)
        )


@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm-eval")
@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_lm_evals_own_hf(harness: Any, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    write_checkpoint(tmp_path / "model", tokenizer=True)
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    options: Any = {"task_manager": TaskManager(include_path=str(tmp_path / "tasks")), "bootstrap_iters": 0}
    names = [f"toy_{name}" for name in TASKS]
    with LLM(tmp_path / "model", dtype="float32") as llm:
        rows = harness.evaluate(llm, [1, 3], names, **options)
    arguments = {"pretrained": str(tmp_path / "model"), "dtype": "float32"}
    theirs = lm_eval.simple_evaluate(model="hf", model_args=arguments, device="cpu", tasks=names, **options)["results"]
    assert {row["exit_layer"] for row in rows} == {1, None}
    full = [row for row in rows if row["exit_layer"] is None]
    assert len(full) == 7
    for row in full:
        assert row["value"] == pytest.approx(theirs[row["task"]][f"{row['metric']},none"], rel=1e-4)


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from hopskip.cli import app

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, ["eval", "--tasks", "x"])
    assert result.exit_code == 2
    assert "pip install 'hopskip[lm-eval]'" in result.output
