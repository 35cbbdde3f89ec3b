"""Before and after an exit is trained: shapes for any depth, what it will take, and which candidate is chosen."""

from __future__ import annotations

import importlib.util
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.errors import ConfigError
from hopskip.train.exit import estimate
from hopskip.train.exit.choose import race, spread
from hopskip.train.exit.estimate import Work, check_disk, check_start, exit_parameters, flops_per_second
from hopskip.train.exit.recipe import Branch, ExitRecipe, FitConfig, PromptsRecipe, SearchRecipe
from tests.models import tiny_config

SHARES = Branch(start=0, num_layers=1, features=("50%", "90%", "100%"))


# -- shapes for any depth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "features"), [(30, (15, 27, 30)), (16, (8, 14, 16)), (32, (16, 29, 32)), (2, (1, 2)), (1, (1,))]
)
def test_shares_of_the_depth(depth: int, features: tuple[int, ...]) -> None:
    assert SHARES.of(depth) == ExitConfig(start=0, num_layers=1, features=features)


def test_layers_by_number_stay(tmp_path: Path) -> None:
    assert Branch(start=2, num_layers=1, features=(3, "100%")).of(8).features == (3, 8)
    assert Branch(start=0, num_layers=1, features=(15, 27, 30)).of(8).features == (15, 27, 30)
    for wrong in ("half", "50", "0%", "101%", "-5%", "5.5%"):
        with pytest.raises(ConfigError, match="give a layer's number, or a share such as 50%"):
            Branch(start=0, num_layers=1, features=(wrong,))
    with pytest.raises(ConfigError, match="must be rising"):
        Branch(start=0, num_layers=1, features=(3, 2))
    with pytest.raises(ConfigError, match="is none"):
        Branch(start=0, num_layers=0)


@pytest.mark.parametrize(
    ("base", "name"),
    [("./models/mine/", "mine"), ("a/b.gguf", "b"), ("owner/Repo-GGUF:Q4_K_M", "Repo-GGUF-Q4_K_M")],
)
def test_each_model_has_a_folder_of_its_own(base: str, name: str) -> None:
    assert recipe_of(base=base, output="runs/{model}").folder == Path("runs") / name
    assert recipe_of(base=base, output="runs/x").folder == Path("runs/x")


# -- what it will take ------------------------------------------------------------------------------------------------


def recipe_of(**changes: object) -> ExitRecipe:
    values: dict[str, object] = {
        "output": "x",
        "prompts": PromptsRecipe(self_written=1000),
        "branches": (SHARES,),
        "vocabulary": 50,
        "stages": (FitConfig(num_tokens=100, unroll_steps=1), FitConfig(num_tokens=10, unroll_steps=3)),
    }
    return ExitRecipe(**{**values, **changes})  # type: ignore[arg-type]


def test_work() -> None:
    model = tiny_config()
    work = Work.of(recipe_of(), model)
    assert work.collected_tokens == int(1000 * (64 + 0.7 * 256))
    assert work.disk_bytes == work.collected_tokens * 3 * 64 * 2
    assert work.collect_flops == 2 * model.num_parameters * work.collected_tokens
    (exit,) = recipe_of().exits(6)
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert exit_parameters(exit, model, 50) == layer + 5 * 64**2 + 50 * 64
    assert exit_parameters(ExitConfig(start=1, num_layers=2), model, 50) == 2 * layer + 50 * 64
    assert work.trained_tokens == 110
    assert work.train_flops == 6 * exit_parameters(exit, model, 50) * 130
    twice = Work.of(recipe_of(branches=(SHARES, Branch(start=2, num_layers=1), Branch(start=3, num_layers=0))), model)
    assert twice.trained_tokens == 220
    assert twice.disk_bytes == work.collected_tokens * 4 * 64 * 2, "layers 2, 3, 5 and 6"
    files = Work.of(recipe_of(prompts=PromptsRecipe(files=("a",), self_written=1000)), model)
    assert files.collected_tokens == 5 * work.collected_tokens
    assert Work.of(recipe_of(prompts=PromptsRecipe(files=("a",), max_prompts=1000)), model) == work
    assert work.seconds(1e6) == pytest.approx((work.collect_flops + work.train_flops) / 0.3e6)


def test_what_is_said_of_it() -> None:
    work = Work(
        collected_tokens=4_200_000,
        trained_tokens=9_200_000,
        collect_flops=1e15,
        train_flops=9e15,
        disk_bytes=50 * 10**9,
    )
    assert work.described(1e12) == (
        "about 9 h here, by estimate: 56 min to collect 4.2M tokens (50.0 GB on disk), the rest to train on 9.2M; the "
        "same command goes on after an interruption"
    )


def test_the_speed_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < flops_per_second(seconds=0.0) < 1e15
    clock = iter(range(100))
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(estimate, "num_usable_cores", lambda: 4)
    assert flops_per_second(seconds=0.5) == 2 * 1024**3
    assert flops_per_second(2, seconds=0.5) == 1024**3
    assert flops_per_second(9, seconds=0.5) == 2 * 1024**3


def test_a_disk_too_small_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = Work(collected_tokens=10**6, trained_tokens=0, collect_flops=1, train_flops=1, disk_bytes=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    check_disk(work, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9 - 10))
    with pytest.raises(ConfigError, match=r"take 1\.0 GB, and .* has 1\.0 GB free; give another output"):
        check_disk(work, tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard-00000.safetensors").write_bytes(b"x" * 10)
    check_disk(work, tmp_path)


def test_what_is_missing_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with_template, without = SimpleNamespace(has_chat_template=True), SimpleNamespace(has_chat_template=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_start(recipe_of(), with_template)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no chat template"):
        check_start(recipe_of(), without)  # type: ignore[arg-type]
    check_start(recipe_of(prompts=PromptsRecipe(files=("a",))), without)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"matplotlib, not installed: pip install 'hopskip\[train\]'"):
        check_start(recipe_of(), with_template)  # type: ignore[arg-type]


# -- the race ---------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """Decodes at so many times plain speed, with noise of some per cent."""

    speedup: float
    noise: float = 0.01
    logs: list[float] = field(default_factory=list)


def run_race(runners: list[Runner], **search: float) -> list[int]:
    """The number of runs of each."""
    rng = random.Random(1)
    race(
        runners,
        [[1], [2], [3], [4]],
        lambda prompt: prompt[0],
        lambda runner, prompt: prompt[0] / runner.speedup * rng.uniform(1 - runner.noise, 1 + runner.noise),
        SearchRecipe(**{"repeats": 2, "max_repeats": 50, **search}),  # type: ignore[arg-type]
    )
    return [len(runner.logs) for runner in runners]


def test_a_clear_race_is_short() -> None:
    runners = [Runner(1.6), Runner(1.2), Runner(0.8)]
    assert run_race(runners) == [8, 8, 8]
    middle, low, high = spread(runners[0].logs)
    assert low < 1.6 < high
    assert middle == pytest.approx(1.6, rel=0.02)


def test_what_is_close_runs_on_and_what_is_behind_does_not() -> None:
    best, close, behind = run_race([Runner(1.60, 0.1), Runner(1.53, 0.1), Runner(0.9, 0.1)])
    assert 8 == behind < close <= best < 200


def test_a_tie_ends_at_the_cap() -> None:
    assert run_race([Runner(1.5, 0.3), Runner(1.5, 0.3)], max_repeats=4) == [16, 16]
    assert run_race([Runner(1.5, 0.3)], repeats=1, max_repeats=1) == [4]


def test_whether_it_is_worth_it_must_be_known_too() -> None:
    """Around the least speed-up a single candidate runs on."""
    (sure,) = run_race([Runner(1.5)])
    (unsure,) = run_race([Runner(1.052, 0.02)])
    assert sure == 8 < unsure


def test_spread() -> None:
    middle, low, high = spread([0.1, 0.3])
    assert (middle, low, high) == pytest.approx((2.718281828**0.2, 1.0, 2.718281828**0.4))
    assert spread([0.5])[1] == 0.0
    assert spread([0.5])[2] > 1e300
    with pytest.raises(ConfigError, match=r"search.repeats is 3; it must be from 1 to max_repeats, 2"):
        SearchRecipe(max_repeats=2)
