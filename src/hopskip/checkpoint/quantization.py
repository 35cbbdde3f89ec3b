"""How a Hugging Face folder says that its weights are quantized, and which of those ways are read: FP8 with scales."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hopskip.errors import CheckpointError, shown

_REMEDY = "use the original model (--quantize q4 packs it to 4 bits) or a GGUF version of it"

FP8_METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark")
"""Values of `quant_method` that are read, the last three where they are FP8."""

_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "aqlm": "AQLM",
    "hqq": "HQQ",
    "auto-round": "AutoRound",
    "torchao": "torchao",
    "quanto": "Quanto",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
    "modelopt": "ModelOpt",
    "quark": "Quark",
    "mlx": "MLX",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}

_SIGNS = (
    (r"q_invperm|q_scale_max|trellis", "EXL2 or EXL3"),
    (r"qweight|qzeros|g_idx", "GPTQ or AWQ"),
    (r"weight_packed|weight_scale_2|weight_global_scale", "compressed-tensors or ModelOpt, in 4 bits"),
    (r"absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|SCB", "bitsandbytes"),
    (r"codebooks", "AQLM"),
    (r"W_q", "HQQ"),
    (r"scales|biases", "MLX"),
)
"""What the last part of a tensor's name tells, where the config says nothing."""


@dataclass(frozen=True)
class Fp8Format:
    """Weights of 8 bits, `F8_E4M3`, beside their scales."""

    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None where the shape of the scales tells."""


def fp8_format(config: Mapping[str, Any], modelopt: Mapping[str, Any] | None = None) -> Fp8Format | None:
    """What a `config.json` says of quantization; None for a plain checkpoint.

    FP8 comes in these kinds: `fp8` (of blocks, as DeepSeek and Qwen publish it, or of tensors, as AutoFP8), `mxfp8`,
    `fbgemm_fp8` (Meta), compressed-tensors with float groups of 8 bits, ModelOpt's `FP8*` and Quark's `fp8_*`.

    Args:
        modelopt: the contents of `hf_quant_config.json`, where there is one.

    Raises:
        CheckpointError: it is quantized in another way.
    """
    settings = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    if not settings and modelopt is not None:
        inner = modelopt.get("quantization")
        settings = {"quant_method": "modelopt", **(inner if isinstance(inner, Mapping) else {})}
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config is {shown(settings)} in the model's config; it must be an object")
    method = str(settings.get("quant_method") or _unnamed(settings))[:40].lower().replace("_tensors", "-tensors")
    kind = _other_than_fp8(method, settings)
    if kind is None:
        return Fp8Format((1, 32) if method == "mxfp8" else _block(settings))
    name = _NAMES.get(method.split("_")[0], method) + (f" ({kind[:80]})" if kind else "")
    raise CheckpointError(
        f"the model is quantized by {name}, which hopskip does not read (quantization_config, quant_method "
        f"{shown(settings.get('quant_method'))}); {_REMEDY}"
    )


def refuse_quantized_names(names: Iterable[str], place: object) -> None:
    """Raises CheckpointError if tensors are named as those of a quantized checkpoint whose config does not say so."""
    suffixes = {name.partition(".weight.")[2] or name.rpartition(".")[2] for name in names}
    for pattern, kind in _SIGNS:
        if any(re.fullmatch(pattern, suffix) for suffix in suffixes):
            raise CheckpointError(f"{place} is quantized by {kind}, which hopskip does not read; {_REMEDY}")


def _unnamed(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in settings:
        return "compressed-tensors"
    return "MLX" if "bits" in settings else "an unnamed method"


def _unless(value: str, pattern: str) -> str | None:
    return None if re.fullmatch(pattern, value, re.IGNORECASE) else value or "of an unnamed type"


def _dtype_in_quark(settings: Mapping[str, Any]) -> str:
    weight = _object(_object(settings.get("global_quant_config")).get("weight"))
    return str(weight.get("dtype", ""))


def _weight_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How each group of modules has its weights; a group that quantizes none of them is left out."""
    groups = _object(settings.get("config_groups")).values()
    return [weights for group in groups if (weights := _object(_object(group).get("weights")))]


def _other_than_fp8(method: str, settings: Mapping[str, Any]) -> str | None:
    """What a method makes of weights that is not FP8, as far as there is a name for it; None if it is FP8."""
    if method in FP8_METHODS[:3]:
        return None
    if method == "compressed-tensors":
        return _compressed_otherwise(settings)
    if method == "modelopt":
        return _unless(str(settings.get("quant_algo", "")), r"FP8.*|MXFP8")
    if method == "quark":
        return _unless(_dtype_in_quark(settings), r"fp8_e4m3|fp8_e5m2")
    return ""


def _compressed_otherwise(settings: Mapping[str, Any]) -> str | None:
    """The first kind of weights in compressed-tensors that is not float of 8 bits."""
    sparsity = str(_object(settings.get("sparsity_config")).get("format", "dense"))
    if sparsity != "dense":
        return sparsity
    for weights in _weight_groups(settings):
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return f"{settings.get('format')}, {weights.get('type')} of {weights.get('num_bits')} bits"
    return None


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size`, or compressed-tensors' `block_structure`."""
    sizes = settings.get("weight_block_size")
    for weights in _weight_groups(settings):
        sizes = sizes or weights.get("block_structure")
    if isinstance(sizes, str):  # "128x128"
        sizes = [int(size) for size in re.findall(r"\d{1,9}", sizes)]
    if not sizes:
        return None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(
            f"weight_block_size is {shown(sizes)} in the model's config; it must be two positive integers"
        )
    return sizes[0], sizes[1]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
