"""Trained exits: a few layers beside a frozen model, which draft what the model will say.

It takes the embedding of a token (or the output of the model's first `start` layers), runs `num_layers` layers of its
own, and reads the next token through the model's own norm and head, over a draft vocabulary. With `features` it also
sees hidden states that the last pass of the model left behind: those of the token before. Where a draft has gone on
beyond the last pass, its own output takes their place (EAGLE-3, arXiv 2503.01840).

One mechanism covers the known ones: start = E with no layers is LayerSkip's plain exit over a smaller vocabulary;
start = E with one layer the adapter of Kangaroo (2404.18911) and Balcony (2503.05005); start = 0 with features is
EAGLE's draft model.

Its layers follow the model's own, in numbering and in the cache: L .. L + num_layers - 1.

Shape letters: N rows, A features, D hidden size, n draft vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.safetensors import read_safetensors, write_safetensors
from hopskip.checkpoint.stored import StoredTensor
from hopskip.errors import CheckpointError, ConfigError

Array = Any
"""A numpy array or a PyTorch tensor."""
Weights = NDArray[np.float32] | StoredTensor
"""Of an exit: in memory, or still in its file. `numpy.asarray` reads both."""
_TENSORS, _DESCRIPTION = "exit.safetensors", "exit.json"
_EXITS = Path(__file__).parent.parent / "data" / "exits"
DEFAULT_EXIT = _EXITS / "smollm2-135m-instruct"
"""The trained exit of the default model."""


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """The shape of a trained exit.

    Raises:
        ConfigError: it would be no exit of any model.
    """

    start: int
    """The exit begins at the output of the model's layers 0..start-1; 0: at the embedding."""
    num_layers: int
    features: tuple[int, ...] = ()
    """The exit sees the outputs of the model's layers 0..f-1 for each f, rising; empty: none."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.num_layers < 0 or self.start + self.num_layers == 0:
            raise ConfigError(
                f"an exit of {self.num_layers} layers that starts at layer {self.start} is none; "
                "give it a layer, or let it start after one of the model's"
            )
        if list(self.features) != sorted(set(self.features)) or not all(f > 0 for f in self.features):
            raise ConfigError(f"features are {list(self.features)}; they must be rising layers of the model, from 1")
        if self.features and not self.num_layers:
            raise ConfigError("an exit without layers cannot use features; leave them out or give it a layer")

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the model whose outputs the exit needs of tokens that a pass has seen, rising."""
        return tuple(sorted({*self.features, *([self.start] if self.start else [])}))


@dataclass(frozen=True)
class TrainedExit:
    """A trained exit."""

    config: ExitConfig
    vocabulary: NDArray[np.int32]
    """[n], rising: the tokens that it can draft."""
    layers: Seq[Mapping[str, Weights]]
    """Tensors of each layer, by their names within a layer of the model."""
    mixing: Mapping[str, Weights]
    """`fuse` [D, A D]: from the features, each normalised, to one vector. `mix` [D, 2 D]: what token and features add
    to it. `token_norm`, `feature_norm` [D]: the norms before `mix`. Empty without features."""
    fingerprint: str
    """Identity of the weights that the exit was trained for (`Checkpoint.fingerprint`)."""
    num_draft_tokens: int
    """Recommended draft length."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """For people: the model's name, how the exit was trained, what it reached."""
    num_runner_ups: int = 0
    """Recommended number of tokens beside a draft."""

    @cached_property
    def vocabulary_list(self) -> list[int]:
        """The vocabulary as plain numbers."""
        tokens: list[int] = self.vocabulary.tolist()
        return tokens

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError if the exit does not fit models of this shape."""
        depth, size = model.num_hidden_layers, model.hidden_size
        config, num_features = self.config, len(self.config.features)
        if config.start >= depth or any(feature > depth for feature in config.features):
            raise ConfigError(
                f"the exit starts at layer {config.start} and sees layers {list(config.features)}, "
                f"but the model has {depth}; use the model that it was trained for"
            )
        if int(self.vocabulary.min()) < 0 or int(self.vocabulary.max()) >= model.vocab_size:
            raise ConfigError(
                f"the exit drafts token {int(self.vocabulary.max())}, but the model's vocabulary has "
                f"{model.vocab_size}; use the model that it was trained for"
            )
        shapes = model.layer_tensors().items()
        expected = {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in shapes}
        if num_features:
            expected |= {"fuse": (size, num_features * size), "mix": (size, 2 * size)}
            expected |= {"token_norm": (size,), "feature_norm": (size,)}
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ConfigError(
                    f"the exit's {name} has shape {found.get(name)}, but this model needs {expected.get(name)}; "
                    "use the model that it was trained for"
                )

    def tensors(self) -> dict[str, Weights]:
        """All trained tensors by name: `layers.0.mlp.up_proj.weight`, `fuse`, ..."""
        layers = {f"layers.{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.items()}
        return {**layers, **self.mixing}

    def check_base(self, fingerprint: str) -> None:
        """Raises ConfigError unless the exit was trained for these weights."""
        if fingerprint != self.fingerprint:
            base = self.notes.get("base_model", "another model")
            raise ConfigError(
                f"this exit was trained for {base} with weights {self.fingerprint[:12]}, but the model's weights are "
                f"{fingerprint[:12]}; train one for it with `hopskip train exit`, or leave the exit out"
            )

    def save(self, folder: Path) -> None:
        """Write `exit.safetensors` (bfloat16) and `exit.json` to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, tuple[str, NDArray[Any]]] = {
            name: ("BF16", _as_bfloat16(np.asarray(t))) for name, t in self.tensors().items()
        }
        tensors["vocabulary"] = ("I32", self.vocabulary.astype(np.int32))
        description = {
            "format": 1,
            **asdict(self.config),
            "num_draft_tokens": self.num_draft_tokens,
            "num_runner_ups": self.num_runner_ups,
            "fingerprint": self.fingerprint,
            "notes": dict(self.notes),
        }
        partial = folder / f"{_TENSORS}.partial"
        write_safetensors(partial, tensors)
        partial.replace(folder / _TENSORS)
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainedExit:
        """Read what `save` wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        description = read_description(folder)
        tensors, _ = read_safetensors(folder / _TENSORS)
        config = ExitConfig(
            start=description["start"], num_layers=description["num_layers"], features=tuple(description["features"])
        )
        layers: list[dict[str, Weights]] = [{} for _ in range(config.num_layers)]
        mixing: dict[str, Weights] = {}
        vocabulary = tensors.pop("vocabulary", None)
        try:
            for name, tensor in tensors.items():
                if name.startswith("layers."):
                    _, index, part = name.split(".", 2)
                    layers[int(index)][part] = tensor
                else:
                    mixing[name] = tensor
        except (IndexError, ValueError):
            raise CheckpointError(f"{folder / _TENSORS} does not fit {_DESCRIPTION} beside it: {name}") from None
        if vocabulary is None or vocabulary.type.name != "I32" or len(vocabulary.shape) != 1:
            raise CheckpointError(f"{folder / _TENSORS} has no draft vocabulary; copy or train the exit again")
        return cls(
            config=config,
            vocabulary=vocabulary.blocks().view(np.int32).reshape(-1),
            layers=layers,
            mixing=mixing,
            fingerprint=description["fingerprint"],
            num_draft_tokens=description["num_draft_tokens"],
            num_runner_ups=description["num_runner_ups"],
            notes=description["notes"],
        )


def shipped_exit(fingerprint: str) -> Path | None:
    """The folder of the trained exit that comes with the package for the model of this fingerprint, if there is one."""
    for folder in sorted(_EXITS.glob("*")):
        if read_description(folder)["fingerprint"] == fingerprint:
            return folder
    return None


def read_description(folder: Path) -> dict[str, Any]:
    """`exit.json` of a folder, checked.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / _DESCRIPTION
    try:
        description: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not an exit ({_DESCRIPTION}: {error})") from None
    kinds = {
        "format": int, "start": int, "num_layers": int, "features": list,
        "num_draft_tokens": int, "num_runner_ups": int, "fingerprint": str, "notes": dict,
    }  # fmt: skip
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    for name, kind in kinds.items():
        if not isinstance(description.get(name), kind):
            raise CheckpointError(f"{path} has {name} = {description.get(name)!r}; the file is damaged")
    if description["format"] != 1:
        raise CheckpointError(f"{path} has format {description['format']}; this version of hopskip reads format 1")
    return description


def _as_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, of two the even one. None of them may be NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def unit_rms(x: Array, eps: float) -> Array:
    """Scale the last dimension to a root mean square of 1, in float32."""
    xp = array_namespace(x)
    x = xp.astype(x, xp.float32)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


class Mixing:
    """What enters a trained exit's layers: the token, and what is known of the token before. Any kind of array will do.

    Args:
        weights: `TrainedExit.mixing`.
        eps: of the model's norms.
    """

    def __init__(self, weights: Mapping[str, Array], eps: float) -> None:
        self._eps = eps
        self._weights = weights

    def fuse(self, states_NAD: Array) -> Array:
        """One vector per row from the features: [N, D]."""
        fuse = self._weights["fuse"]
        xp = array_namespace(fuse)
        normed = unit_rms(states_NAD, self._eps)
        flat = xp.reshape(normed, (*normed.shape[:-2], normed.shape[-2] * normed.shape[-1]))
        return xp.astype(flat, fuse.dtype) @ fuse.T

    def mix(self, x_ND: Array, f_ND: Array) -> Array:
        """Add token states to fused features, or to the exit's own outputs in their place: [N, D]."""
        mix = self._weights["mix"]
        xp = array_namespace(mix)
        token = xp.astype(unit_rms(x_ND, self._eps), mix.dtype) * self._weights["token_norm"]
        feature = xp.astype(unit_rms(f_ND, self._eps), mix.dtype) * self._weights["feature_norm"]
        return f_ND + xp.concat((token, feature), axis=-1) @ mix.T
