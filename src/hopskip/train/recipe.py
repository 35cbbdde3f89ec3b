"""Recipes: YAML files with a section for each part of a run, and overrides from the command line."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hopskip.errors import ConfigError
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.effects import OWN_ARGUMENTS, check_recipe
from hopskip.train.read import DataConfig

T = TypeVar("T")

RECIPES = Path(__file__).parent.parent / "data" / "recipes"
"""The recipes that come with hopskip."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Where training starts: weights (`base`), or a shape (`config`) with random ones.

    Raises:
        ConfigError: neither or both are given.
    """

    base: str | None = None
    """A folder, a GGUF file or a Hub id, as for `hopskip generate --model`; `default` is hopskip's default model."""
    config: str | None = None
    """A `config.json`, or a folder with one: train from scratch."""
    tokenizer: str | None = None
    """A folder, GGUF file or Hub id whose tokenizer is used; None takes that of `base` or beside `config`."""
    dtype: str = "float32"
    """Precision of the weights while training. With `training.bf16: true` only arithmetic is bfloat16."""
    attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        if (self.base is None) == (self.config is None):
            raise ConfigError("a recipe needs one of model.base (weights) and model.config (from scratch)")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"model.dtype is {self.dtype!r}; choose one of float32, bfloat16")


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Low-rank adapters (arXiv 2106.09685) instead of training all weights. Fields as in peft's `LoraConfig`."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers_to_transform: tuple[int, ...] | None = None
    use_rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """What the checkpoint recommends for drafting; what is None is chosen from the measured agreement of the exits."""

    exit_layer: int | None = None
    num_draft_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `training` goes to transformers' `TrainingArguments` as it is."""

    output: str
    """Folder of the run: checkpoints, log, plot, and in the end the finished model."""
    model: ModelRecipe
    data: DataConfig
    layerskip: LayerSkipRecipe = field(default_factory=LayerSkipRecipe)
    lora: LoraRecipe | None = None
    draft: DraftRecipe = field(default_factory=DraftRecipe)
    training: Mapping[str, Any] = field(default_factory=dict)
    save_dtype: str | None = None
    """Precision of the finished model; None is that of training."""

    def __post_init__(self) -> None:
        if self.save_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"save_dtype is {self.save_dtype!r}; choose one of float32, bfloat16, float16")
        if self.model.dtype == "bfloat16" and self.lora is None:
            raise ConfigError(
                "model.dtype is bfloat16 without lora: most updates are smaller than half a step of that precision and "
                "would be lost; use float32 (with training.bf16: true only arithmetic is bfloat16), or lora"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        values = _plain(self)
        assert isinstance(values, dict)
        return values


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of a LayerSkip run, as `read_recipe`."""
    path = find_recipe(path)
    recipe = read_recipe(Recipe, path, overrides)
    _check_training(recipe)
    shape = recipe.model.config
    if shape is not None and not Path(shape).exists() and (path.parent / shape).exists():
        recipe = replace(recipe, model=replace(recipe.model, config=str(path.parent / shape)))
    return recipe


def read_recipe(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a recipe, see `find_recipe`; `overrides` are `section.key=value`, their values written as in YAML.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest one is named) or a value is wrong.
    """
    path = find_recipe(path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read ({error}); give a .yaml file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {str(path)!r} is not a mapping of sections (model, data, ...); see {RECIPES}")
    for override in overrides:
        apply_override(values, override)
    recipe = make(kind, values, "")
    assert isinstance(recipe, kind)
    return recipe


def find_recipe(path: Path) -> Path:
    """A recipe's file: the path itself or, where there is none, the recipe of that name that comes with hopskip.

    Raises:
        ConfigError: there is neither; the message names those that come with hopskip.
    """
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml")
    known = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if name in known and path.parent in (Path(), Path("recipes")):
        return known[name]
    if path.exists():
        raise ConfigError(f"recipe {str(path)!r} is a folder; give a .yaml file")
    raise ConfigError(
        f"recipe {str(path)!r} does not exist; give a .yaml file, or the name of one that comes with hopskip"
        f"{nearest(name, known)}"
    )


def parse_yaml(text: str, place: str) -> Any:
    """YAML, with numbers such as 3e-5 read as numbers, which YAML 1.1 does not.

    Raises:
        ConfigError: it is not YAML, or the package for it is missing.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError("recipes need the package pyyaml: pip install 'hopskip[train]'") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is not YAML: {' '.join(str(error).split())}") from None


def make(kind: Any, values: Mapping[str, Any], place: str) -> Any:
    """A dataclass from plain values.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown key {place + name!r}{nearest(name, hints)}")
    required = {f.name for f in fields(kind) if f.default is f.default_factory}  # both are MISSING
    if missing := sorted(required - values.keys()):
        raise ConfigError(f"the recipe lacks {', '.join(repr(place + name) for name in missing)}")
    return kind(**{name: _convert(value, hints[name], place + name) for name, value in values.items()})


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """`; did you mean 'x'?`, or the list of what there is."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known))}"


def _convert(value: Any, hint: Any, place: str) -> Any:
    """The value as the field's type, where nothing is lost by it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        fitting = (kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind))
        return _convert(value, next(fitting, kinds[0]), place)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return make(hint, value, f"{place}.")
    elif origin in (tuple, list):
        items = value if isinstance(value, list | tuple) else [value]
        return origin(_convert(item, arguments[0], place) for item in items)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif not isinstance(hint, type) or isinstance(value, hint):  # a Literal is checked by its class
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{place} is {value!r}; it must be {'a section of keys' if is_dataclass(hint) else name}")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in nested sections.

    Raises:
        ConfigError: it is not of that form, or a section is a value.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = path.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        values = inner
    values[key] = parse_yaml(text, f"override {override!r}")


def _check_training(recipe: Recipe) -> None:
    from transformers import TrainingArguments

    known = [f.name for f in fields(TrainingArguments) if f.init]
    for name in recipe.training:
        if name in OWN_ARGUMENTS:
            raise ConfigError(f"training.{name} cannot be set: {OWN_ARGUMENTS[name]}")
        if name not in known:
            raise ConfigError(f"unknown key 'training.{name}'{nearest(name, known)}")
    check_recipe(recipe)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
