"""Recipe files: what is read, what is refused, and with what words."""

from __future__ import annotations

from pathlib import Path

import pytest

from hopskip.errors import ConfigError
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.recipe import RECIPES, Recipe, find_recipe, load_recipe, read_recipe
from hopskip.train.run import training_arguments

OURS = sorted(RECIPES.glob("*.yaml"))
MINIMAL = """
output: out
model: {base: default}
data: {train: data.jsonl}
training: {max_steps: 10, learning_rate: 3e-4, use_cpu: true}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_values_and_defaults(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.data.train == ("data.jsonl",)
    assert recipe.training["learning_rate"] == 3e-4
    assert recipe.layerskip.p_max == 0.1
    assert recipe.lora is None


def test_overrides(minimal: Path) -> None:
    overrides = ["layerskip.e_scale=1", "lora.r=4", "data.where={src: gsm8k}", "training.learning_rate=1e-5"]
    recipe = load_recipe(minimal, [*overrides, "model.base=null", "model.config=shape.json"])
    assert recipe.layerskip.e_scale == 1.0
    assert recipe.lora is not None
    assert recipe.lora.r == 4
    assert recipe.data.where == {"src": "gsm8k"}
    assert recipe.training["learning_rate"] == 1e-5
    assert recipe.model.config == "shape.json"


def test_what_is_written_reads_the_same(minimal: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    recipe = load_recipe(minimal, ["lora.r=4", "layerskip.curriculum=gradual"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(recipe.as_dict()))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layerskip.pmax=0.2", r"unknown key 'layerskip.pmax'; did you mean 'p_max'\?"),
        ("layer_skip.p_max=0.2", r"unknown key 'layer_skip'; did you mean 'layerskip'\?"),
        ("training.learnin_rate=1", r"unknown key 'training.learnin_rate'; did you mean 'learning_rate'\?"),
        ("training.output_dir=x", "training.output_dir cannot be set: set `output`"),
        ("layerskip.p_max=high", "layerskip.p_max is 'high'; it must be float"),
        ("data.max_length=1.5", "data.max_length is 1.5; it must be int"),
        ("data.streaming=1", "data.streaming is 1; it must be bool"),
        ("lora=8", "lora is 8; it must be a section"),
        ("model.config=shape.json", "one of model.base"),
        ("output.x=1", "'output' is a value, not a section"),
        ("p_max", "not of the form section.key=value"),
        ("data.where={", "is not YAML"),
        ("save_dtype=int8", "save_dtype is 'int8'"),
    ],
)
def test_mistakes_are_named(override: str, message: str, minimal: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(minimal, [override])


def test_streaming_needs_a_length(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"must say training\.max_steps"):
        load_recipe(minimal, ["data.streaming=true", "training={}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; give a .yaml file, or the name of one"),
        ("- a", "not a mapping"),
        ("data: {train: x}", "lacks 'model'"),
    ],
)
def test_bad_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_what_transformers_refuses(minimal: Path, tmp_path: Path) -> None:
    recipe = load_recipe(minimal, [f"output={tmp_path}", "training.save_strategy=sometimes"])
    with pytest.raises(ConfigError, match="sometimes"):
        training_arguments(recipe)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_recipes_are_valid(path: Path) -> None:
    if "-exit" in path.stem:
        assert read_recipe(ExitRecipe, path, ["prompts.files=mine.jsonl"]).branches
    else:
        assert isinstance(load_recipe(path, ["data.train=mine.jsonl"]), Recipe)


@pytest.mark.parametrize("name", ["smollm2-135m-exit", "smollm2-135m-exit.yaml", "recipes/smollm2-135m-exit.yaml"])
def test_recipes_that_come_with_hopskip_have_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one's own of that name comes first; a folder of that name, such as that of a run, does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-exit").mkdir()
    assert find_recipe(Path(name)) == RECIPES / "smollm2-135m-exit.yaml"
    assert read_recipe(ExitRecipe, Path(name)).output == "runs/smollm2-135m-exit"
    (tmp_path / "smollm2-135m-exit").rmdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / name).write_text("output: mine")
    assert find_recipe(Path(name)) == Path(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-exits", r"does not exist; .*; did you mean 'smollm2-135m-exit'\?"),
        ("zzz", "one that comes with hopskip; there are: any-model-exit, from-scratch-tiny, .*smollm2-135m-lora"),
        ("elsewhere/smollm2-135m-exit", "does not exist"),
        ("folder", "is a folder; give a .yaml file"),
    ],
)
def test_recipes_that_are_none(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_recipe(Path(name))


def test_a_shape_may_lie_beside_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("from-scratch-tiny"), ["data.train=books/"])
    assert recipe.model.config == str(RECIPES / "from-scratch-tiny.json")
    (tmp_path / "from-scratch-tiny.json").write_text("{}")
    assert load_recipe(Path("from-scratch-tiny"), ["data.train=books/"]).model.config == "from-scratch-tiny.json"
