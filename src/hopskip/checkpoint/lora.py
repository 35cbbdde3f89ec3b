"""LoRA adapters (arXiv 2106.09685) as peft writes them, merged into their base model while its weights are read.

A merged weight is W + s B A, with s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353)
scales each row of it to a length of its own. Nothing is written: rows are merged when they are asked for, in float32,
and rounded once to the precision of the base.

    O, I: outputs and inputs of a linear     R: the adapter's rank
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.safetensors import has_weights, read_json, read_safetensors, some
from hopskip.checkpoint.stored import BLOCK_TYPES, StoredTensor, plain_blocks
from hopskip.errors import CheckpointError, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MERGE_BY_PEFT = (
    "merge it with peft and give the folder that this writes: "
    "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
)
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.weight")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. The others (PiSSA, OLoRA, ...) change its weights."""
_BFLOAT16 = next(block for block in BLOCK_TYPES.values() if block.name == "BF16")


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A matrix [O, I] of the base with what an adapter adds to it."""

    base: StoredTensor
    down_RI: StoredTensor
    up_OR: StoredTensor
    scale: float
    magnitude_O: StoredTensor | None
    """DoRA's length of each row."""

    def blocks(self, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        """See `StoredTensor.blocks`: the bytes that a merged checkpoint of this type would have."""
        rows = self.base.values(first, count)
        up, down = self.up_OR.values(first, len(rows)), self.down_RI.values()
        merged = rows + np.float32(self.scale) * (up @ down)
        if self.magnitude_O is not None:
            lengths = self.magnitude_O.values().reshape(-1)[first : first + len(rows)]
            with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros is refused as others without a value
                merged *= (lengths / np.sqrt((merged * merged).sum(axis=1)))[:, None]
        return plain_blocks(merged, self.type.name)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter on disk, checked. Opening it reads no weights."""

    folder: Path
    base_name: str
    """What it says its base model is: a folder, or a Hub id."""
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    """By the names of the file, without peft's `base_model.model.` before them."""
    header_size: int
    """Of the file of weights, bytes."""

    def merged_with(self, base: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors of the merged model. With a head of its own where the adapter changes that of a tied one.

        Raises:
            CheckpointError: the adapter was made for another model, or has parts that are not read.
        """
        tensors = dict(base)
        embedding = base["model.embed_tokens.weight"]  # which may be the head as well, until now
        for name, tensor in self._whole():
            expected = base.get(name, embedding).shape
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{self.folder} has {name!r} of shape {list(tensor.shape)}, its base {list(expected)}: "
                    f"{self._other_base}, or if its vocabulary has grown, {MERGE_BY_PEFT}"
                )
            tensors[name] = tensor
        for module, found in self._parts().items():
            name = f"{module}.weight"
            below = tensors.get(name, embedding if name == "lm_head.weight" else None)
            if below is None or len(below.shape) != 2:
                raise CheckpointError(f"{self.folder} changes {module!r}, which its base lacks; {self._other_base}")
            tensors[name] = self._merge(name, below, found)
        return tensors

    @property
    def _other_base(self) -> str:
        return f"use the model that it was trained on ({CONFIG} says {self.base_name!r})"

    def _parts(self) -> dict[str, dict[str, StoredTensor]]:
        """Of each module that is changed: `lora_A`, `lora_B`, and DoRA's magnitudes."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            if match := _PART.fullmatch(name):
                parts.setdefault(match["module"], {})[match["part"]] = tensor
        for module, found in parts.items():
            wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if self.config.get("use_dora") else set())
            if found.keys() != wanted:
                raise CheckpointError(
                    f"{self.folder} has {some(found)} for {module!r} instead of {some(wanted)}; copy it again"
                )
        return parts

    def _whole(self) -> Iterator[tuple[str, StoredTensor]]:
        """Modules that were trained whole (`modules_to_save`): name in the base, tensor."""
        unread = []
        for name, tensor in self.tensors.items():
            match = _SAVED.fullmatch(name)
            saved = self.config.get("modules_to_save") or ()
            if _PART.fullmatch(name):
                continue
            if match is None or match["module"].rpartition(".")[2] not in ("embed_tokens", "lm_head", *saved):
                unread.append(name)
            else:
                yield f"{match['module']}.weight", tensor
        if unread:
            raise CheckpointError(
                f"{self.folder} has parts that hopskip does not merge ({some(unread, 3)}); {MERGE_BY_PEFT}"
            )

    def _merge(self, name: str, below: StoredTensor, found: Mapping[str, StoredTensor]) -> MergedTensor:
        down, up, magnitude = found["lora_A"], found["lora_B"], found.get("lora_magnitude_vector")
        rank = down.shape[0]
        outputs, inputs = below.shape
        if (
            down.shape != (rank, inputs)
            or up.shape != (outputs, rank)
            or (magnitude and magnitude.num_values != outputs)
        ):
            raise CheckpointError(
                f"{self.folder} changes {name!r} by {list(up.shape)} x {list(down.shape)}, which does not fit its "
                f"base's {list(below.shape)}; {self._other_base}"
            )
        kind = below.type if below.type.dtype is not None else _BFLOAT16  # 8-bit floats have nowhere to put a change
        return MergedTensor(
            below.path, below.offset, kind, below.shape, below, down, up, self._scale(name, rank), magnitude
        )

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))
        told = self._by_pattern("rank_pattern", module, self.config.get("r", rank))
        if told != rank:
            raise CheckpointError(
                f"{self.folder / CONFIG} says rank {told} for {name!r}, which has {rank}; copy it again"
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_pattern(self, key: str, module: str, default: Any) -> float:
        """As in peft: the first key that fits the end of a module's name, as a regular expression."""
        patterns = self.config.get(key) or {}
        try:
            found = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)
            return float(found)
        except (re.error, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / CONFIG} has a {key} that cannot be read ({error}); copy it again"
            ) from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG).exists() and not has_weights(file.name for file in folder.iterdir())


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not merged here; the message says how else.
    """
    config = read_json(folder / CONFIG, "")
    if "fine_tune_type" in config or "lora_parameters" in config:
        raise CheckpointError(f"{folder} is an adapter for MLX; merge it there (mlx_lm.fuse --dequantize)")
    if reason := _unmerged(config):
        raise CheckpointError(f"{folder} is an adapter with {reason}, which hopskip does not merge; {MERGE_BY_PEFT}")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / CONFIG} does not say what its base model is; {MERGE_BY_PEFT}")
    if not (folder / WEIGHTS).exists():
        remedy = (
            "holds pickled weights, which can run code when read"
            if (folder / "adapter_model.bin").exists()
            else "is incomplete"
        )
        raise CheckpointError(f"{folder} is an adapter without {WEIGHTS}: it {remedy}; {MERGE_BY_PEFT}")
    tensors, header_size = read_safetensors(folder / WEIGHTS)
    if plain := [name for name, tensor in tensors.items() if tensor.type.dtype is None]:
        raise CheckpointError(f"{folder / WEIGHTS} has tensors of no plain type ({some(plain, 3)}); {MERGE_BY_PEFT}")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    return Adapter(folder=folder, base_name=base, config=config, tensors=named, header_size=header_size)


def _unmerged(config: Mapping[str, Any]) -> str | None:
    """What an adapter has that would be merged wrongly; None if there is nothing."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"peft_type {shown(kind)}"
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        return f"init_lora_weights {shown(start)}"
    if config.get("bias") not in (None, "none"):
        return f"bias {shown(config['bias'])}"
    # `fan_in_fan_out` is of no effect: it is for GPT-2's Conv1D, and peft ignores it for linears
    unread = ("layer_replication", "megatron_config", "use_qalora", "use_bdlora", "arrow_config", "target_parameters")
    return next((name for name in (*unread, "trainable_token_indices", "lora_bias") if config.get(name)), None)
