"""A run goes on only with the settings that its folder was made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.errors import ConfigError
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.exit.recipe import Branch, ExitRecipe, FitConfig, PromptsRecipe, SearchRecipe
from hopskip.train.exit.stored import check_stored
from tests.tiny import CHAT_TEMPLATE, write_checkpoint, write_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tokenizer=True)
    return open_checkpoint(folder)


@pytest.fixture
def recipe(checkpoint: Checkpoint, tmp_path: Path) -> ExitRecipe:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    return ExitRecipe(
        output=str(tmp_path / "run"),
        base=str(checkpoint.path),
        prompts=PromptsRecipe(
            files=(str(tmp_path / "prompts.jsonl"), "owner/set"), exclude=(str(tmp_path / "folder"),)
        ),
        branches=(Branch(start=0, num_layers=1, features=("50%", 3)),),
        stages=(FitConfig(num_tokens=100),),
    )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint.path, checkpoint.config)


def section(recipe: ExitRecipe, name: str, **changes: Any) -> ExitRecipe:
    return replace(recipe, **{name: replace(getattr(recipe, name), **changes)})


def test_the_same_recipe_goes_on(recipe: ExitRecipe, checkpoint: Checkpoint) -> None:
    tokenizer = tokenizer_of(checkpoint)
    check_stored(recipe, checkpoint, tokenizer)
    (recipe.folder / "prompts.jsonl").write_text("{}")
    check_stored(recipe, checkpoint, tokenizer)
    for changed in (
        replace(recipe, device="cpu", threads=3, num_workers=2, base="/another/name/of/it"),
        replace(recipe, search=SearchRecipe(num_prompts=99)),
        replace(recipe, branches=(Branch(start=1, num_layers=1),), stages=(FitConfig(num_tokens=7),)),
        section(recipe, "collect", max_num_seqs=3),
    ):
        check_stored(changed, checkpoint, tokenizer)
    (recipe.folder.rename(recipe.folder.parent / "moved"))
    check_stored(replace(recipe, output=str(recipe.folder.parent / "moved")), checkpoint, tokenizer)


@pytest.mark.parametrize(
    ("name", "key", "before", "after"),
    [
        ("prompts", "seed", "0", 1),
        ("prompts", "self_written", "0", 9),
        ("prompts", "files", r"\['.*", ("owner/set",)),
        ("prompts", "max_prompt_tokens", "1024", 10),
        ("collect", "max_new_tokens", "256", 10),
        ("collect", "precision", "'bfloat16'", "q8"),
        ("", "vocabulary", "8192", 10),
        ("", "precision", "'float32'", "bfloat16"),
        ("", "held_out_every", "40", 41),
        ("", "initial", "nothing", "default"),
    ],
)
def test_another_setting_is_refused_by_name(
    recipe: ExitRecipe, checkpoint: Checkpoint, name: str, key: str, before: str, after: Any
) -> None:
    check_stored(recipe, checkpoint, tokenizer_of(checkpoint))
    stored = (recipe.folder / "recipe.json").read_bytes()
    changed = section(recipe, name, **{key: after}) if name else replace(recipe, **{key: after})
    place = f"{name}.{key}" if name else key
    with pytest.raises(
        ConfigError, match=rf"run was made with {place} = {before}, not .*: set it back, or use another"
    ):
        check_stored(changed, checkpoint, tokenizer_of(checkpoint))
    assert (recipe.folder / "recipe.json").read_bytes() == stored


def test_what_names_stand_for_counts(recipe: ExitRecipe, checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(checkpoint)
    check_stored(recipe, checkpoint, tokenizer)
    files = Path(recipe.prompts.files[0]), tmp_path / "folder" / "a.txt"
    for path in files:
        text = path.read_text()
        path.write_text(text.replace("a", "b"))
        with pytest.raises(
            ConfigError, match=r"made with another content of \S*(prompts\.jsonl|folder); use another output"
        ):
            check_stored(recipe, checkpoint, tokenizer)
        path.write_text(text)
    write_checkpoint(tmp_path / "other", seed=1, tokenizer=True)
    other = open_checkpoint(tmp_path / "other")
    with pytest.raises(ConfigError, match="another content of the model's weights; use"):
        check_stored(recipe, other, tokenizer_of(other))
    write_tokenizer(tmp_path / "other", chat_template=CHAT_TEMPLATE + " ")
    with pytest.raises(ConfigError, match="another content of the model's tokenizer; use"):
        check_stored(recipe, checkpoint, tokenizer_of(other))
    check_stored(recipe, checkpoint, tokenizer)


def test_data_of_unknown_settings_is_refused(recipe: ExitRecipe, checkpoint: Checkpoint) -> None:
    path = recipe.folder / "data" / "shard-00000.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds data, but no recipe.json that says of what run; use another output"):
        check_stored(recipe, checkpoint, tokenizer_of(checkpoint))
    path.unlink()
    check_stored(recipe, checkpoint, tokenizer_of(checkpoint))
    (recipe.folder / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json is damaged"):
        check_stored(recipe, checkpoint, tokenizer_of(checkpoint))
    (recipe.folder / "recipe.json").write_text(json.dumps({"recipe": {"prompts": {"seed": 0}}, "content": {}}))
    with pytest.raises(ConfigError, match=r"made with collect\.answers = nothing, not 'model'"):
        check_stored(recipe, checkpoint, tokenizer_of(checkpoint))
