"""Recipe files: what is read, what is refused, and with what words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hopskip.errors import ConfigError
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.recipe import RECIPES, Recipe, find_recipe, load_recipe, read_recipe
from hopskip.train.run import run, training_arguments

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


STREAMED = "data.streaming=true"
EVALUATED = "data.holdout_every=5"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.save_only_model=true"], "training.save_only_model cannot be set: a run cannot go on"),
        (["training.do_eval=true"], "training.do_eval cannot be set: it has no effect"),
        (["training.include_for_metrics=[loss]"], "only `compute_metrics` of the Python API uses it"),
        ([STREAMED, "training.dataloader_drop_last=true"], "training.dataloader_drop_last has no effect on streamed"),
        (
            [STREAMED, "training.train_sampling_strategy=group_by_length"],
            "train_sampling_strategy has no effect on str",
        ),
        ([STREAMED, "training.data_seed=3"], "training.data_seed has no effect on streamed data without data.shuffle"),
        (["training.num_train_epochs=3"], "num_train_epochs has no effect beside training.max_steps"),
        (["training.eval_steps=3"], "eval_steps has no effect without anything to evaluate on"),
        (["training.per_device_eval_batch_size=3"], "per_device_eval_batch_size has no effect without anything to"),
        (["training.load_best_model_at_end=true"], "load_best_model_at_end has no effect without anything to evaluate"),
        (["training.eval_strategy=steps"], "training.eval_strategy needs something to evaluate on: data.eval or"),
        ([EVALUATED, "training.eval_steps=3"], "eval_steps has no effect without training.eval_strategy: steps"),
        ([EVALUATED, "training.eval_delay=3"], "eval_delay has no effect without training.eval_strategy"),
        (["training.save_strategy=epoch", "training.save_steps=3"], "save_steps has no effect with .*epoch"),
        (["training.logging_strategy=no", "training.logging_steps=3"], "logging_steps has no effect with"),
        (["training.gradient_checkpointing_kwargs={}"], "has no effect without training.gradient_checkpointing: true"),
        (["training.fsdp_config={}"], "fsdp_config has no effect without training.fsdp: true"),
        (["training.dataloader_prefetch_factor=3"], "has no effect without training.dataloader_num_workers"),
        (["training.run_name=x"], "run_name has no effect without training.report_to"),
        (["training.hub_model_id=x"], "hub_model_id has no effect without training.push_to_hub"),
        (["model.dtype=bfloat16"], "bfloat16 without lora: most updates are smaller than half a step"),
        (["model.attn_implementation=flex_attention"], "has masks that cannot be selected by sample"),
        (
            ["model.attn_implementation=flash_attention_2", "data.packing=documents"],
            "in batches of one row only, but training.per_device_train_batch_size is 8; set it to 1",
        ),
        (
            [
                *("model.attn_implementation=flash_attention_3", "data.packing=documents", EVALUATED),
                "training.per_device_train_batch_size=1",
            ],
            "but training.per_device_eval_batch_size is 8",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], message: str, minimal: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(minimal, overrides)


def test_settings_that_do(minimal: Path) -> None:
    load_recipe(minimal, [STREAMED, "training.max_steps=1"])
    load_recipe(minimal, [STREAMED, "data.shuffle_buffer=100", "training.data_seed=3", "training.run_name=x"][:3])
    load_recipe(minimal, [EVALUATED, "training.eval_strategy=steps", "training.eval_steps=3", "training.eval_delay=1"])
    load_recipe(minimal, ["training.report_to=[wandb]", "training.run_name=x", "training.gradient_checkpointing=true"])
    load_recipe(minimal, ["training.fsdp=true", "training.fsdp_config={version: 2}", "training.save_steps=3"])
    load_recipe(minimal, ["training.dataloader_num_workers=2", "training.dataloader_prefetch_factor=3"])
    load_recipe(minimal, ["model.dtype=bfloat16", "lora.r=4", "training.max_steps=-1", "training.num_train_epochs=3"])


def test_no_may_stand_without_quotes(minimal: Path, tmp_path: Path) -> None:
    no = ["training.eval_strategy=no", "training.save_strategy=no", "training.report_to=no", f"output={tmp_path}"]
    arguments = training_arguments(load_recipe(minimal, no))
    assert (arguments.eval_strategy, arguments.save_strategy, arguments.report_to) == ("no", "no", [])


def test_flash_attention_without_its_package(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_flash_attn_2_available", "is_kernels_available"):
        monkeypatch.setattr(f"transformers.utils.{name}", lambda: False)
    flash = ["model.attn_implementation=flash_attention_2", "data.packing=documents"]
    one_row = [*flash, "training.per_device_train_batch_size=1"]
    with pytest.raises(ConfigError, match=r"flash_attention_2 needs a GPU and the package flash-attn or kernels"):
        load_recipe(minimal, one_row)
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: True)
    assert load_recipe(minimal, one_row).model.attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(("package", "what"), [("matplotlib", "training"), ("peft", "LoRA")])
def test_missing_packages_are_found_first(
    package: str, what: str, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "peft":
        assert load_recipe(minimal)
    message = rf"{what} needs {package}, which is not installed; install it: pip install 'hopskip\[train\]'"
    with pytest.raises(ConfigError, match=message):
        load_recipe(minimal, ["lora.r=4"])


def test_lists_of_exits(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["layerskip.exits=[2, 4]", "layerskip.exit_weights=[1, 0.5]"])
    assert (recipe.layerskip.exits, recipe.layerskip.exit_weights) == ([2, 4], [1.0, 0.5])
    assert load_recipe(minimal, ["layerskip.exits=4"]).layerskip.exits == [4]
    with pytest.raises(ConfigError, match=r"layerskip.exits is 'a'; it must be int"):
        load_recipe(minimal, ["layerskip.exits=[a]"])


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor is 0.1"),
        ("training.report_to=tensorboard", "report_to: .*tensorboard"),
        ("training.fsdp=true", "fsdp needs several processes"),
        ("training.torch_compile=true", "torch_compile does not work here"),
    ],
)
def test_what_does_not_work_is_refused_before_weights_load(override: str, message: str, minimal: Path) -> None:
    """The model's folder is not even looked for."""
    recipe = load_recipe(minimal, [override, "model.base=/nowhere"])
    with pytest.raises(ConfigError, match=message):
        run(recipe)


def test_a_missing_source_is_found_before_weights_load(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["data.train=/nowhere.jsonl", "model.base=/nowhere"])
    with pytest.raises(ConfigError, match=r"data '/nowhere.jsonl': no such file"):
        run(recipe)


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
        ("zzz", "one that comes with hopskip; there are: from-scratch-tiny, .*smollm2-135m-lora"),
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
