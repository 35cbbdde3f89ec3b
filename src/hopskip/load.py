"""From a checkpoint to a decoder: which backend, which precision, which device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch

from hopskip import native
from hopskip.branch import ExitBranch
from hopskip.draft.self_draft import DraftPrecision
from hopskip.errors import ConfigError
from hopskip.model import BranchedModel, Transformer
from hopskip.packed import PackedWeights
from hopskip.weights import Checkpoint, load_weights

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["q8", "q4"]
Backend = Literal["auto", "native", "torch"]
KVDType = Literal["auto", "float32", "bfloat16", "int8"]
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: DType = "auto",
    quantize: Quantize | None = None,
    device: str = "auto",
    backend: Backend = "auto",
    threads: int | None = None,
    kv_dtype: KVDType = "auto",
    progress: Callable[[float], None] | None = None,
) -> BranchedModel:
    """Load the weights of an opened checkpoint.

    Args:
        dtype: precision of weights and arithmetic; `auto` keeps the checkpoint's own. On the native backend a quantized
            GGUF then stays as it is.
        quantize: pack the weights to 8 or 4 bits (native backend).
        device: `auto` takes a CUDA device where there is one, else the CPU.
        backend: `native` is the C++ engine for CPUs; `torch` runs anywhere; `auto` prefers native on a CPU.
        threads: CPU threads; None uses as many as the process may run on.
        kv_dtype: of cached keys and values (native backend); `auto` is float32 beside float32 weights, else bfloat16.
            `int8` halves the memory of long contexts and the time of reading it, at a small loss of precision.
        progress: told the share loaded so far, up to 1.

    Raises:
        ConfigError: an option has an unknown value, or two of them cannot be had together.
        CheckpointError: the weights are missing, damaged, or of an unsupported kind.
    """
    kind, target = resolve_backend(
        dtype=dtype, quantize=quantize, device=device, backend=backend, threads=threads, kv_dtype=kv_dtype
    )
    if kind == "native":
        return native.NativeModel.load(
            checkpoint, precision=quantize or dtype, threads=threads, kv_dtype=_KV_DTYPES[kv_dtype], progress=progress
        )
    if threads is not None:
        torch.set_num_threads(threads)
    torch_dtype = checkpoint.dtype if dtype == "auto" else _TORCH_DTYPES[dtype]
    return Transformer(checkpoint.config, load_weights(checkpoint, torch_dtype, target, progress))


def attach_drafts(
    model: BranchedModel,
    checkpoint: Checkpoint,
    branch: ExitBranch | None = None,
    draft_precision: DraftPrecision | None = None,
) -> None:
    """Put what it drafts with beside a model that was loaded from this checkpoint.

    Raises:
        ConfigError: one of them does not fit the model, or would gain nothing.
    """
    if branch is not None:
        model.attach(branch)
    if draft_precision is not None:
        if not isinstance(model, native.NativeModel):
            raise ConfigError(
                f"draft_precision={draft_precision} needs the native CPU backend, but this runs on torch; leave it out"
            )
        model.attach_copy(PackedWeights.load(checkpoint, draft_precision), draft_precision)


def resolve_backend(
    *,
    dtype: DType = "auto",
    quantize: Quantize | None = None,
    device: str = "auto",
    backend: Backend = "auto",
    threads: int | None = None,
    kv_dtype: KVDType = "auto",
) -> tuple[Literal["native", "torch"], torch.device]:
    """Where `load_model` would run a model with these options. Loads nothing.

    Raises:
        ConfigError: as `load_model`.
    """
    for name, value, choices in (
        ("dtype", dtype, DType),
        ("backend", backend, Backend),
        ("kv_dtype", kv_dtype, KVDType),
    ):
        if value not in get_args(choices):
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
    if quantize is not None and quantize not in get_args(Quantize):
        raise ConfigError(f"quantize is {quantize!r}; choose one of {', '.join(get_args(Quantize))}")
    if quantize is not None and dtype != "auto":
        raise ConfigError(f"quantize={quantize} and dtype={dtype} contradict each other; leave one out")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1")
    target = _device(device)
    if _use_native(backend, target, dtype, quantize):
        return "native", target
    if quantize is not None:
        raise ConfigError(f"quantize={quantize} needs the native CPU backend, but this runs on torch; leave it out")
    if kv_dtype != "auto":
        raise ConfigError(f"kv_dtype={kv_dtype} needs the native CPU backend, but this runs on torch; leave it out")
    return "torch", target


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try 'cpu' or 'cuda'") from None
    return device


def _use_native(backend: Backend, device: torch.device, dtype: DType, quantize: Quantize | None) -> bool:
    """Whether the C++ engine runs the model; says so in one line where it was to be expected and cannot."""
    if backend == "torch":
        return False
    obstacle = native.available()
    if device.type != "cpu":
        obstacle = f"it runs on CPUs, not on {device.type}"
    elif dtype == "float16":
        obstacle = "it has no float16 arithmetic; use bfloat16 or float32"
    if obstacle is None:
        return True
    if backend == "native":
        raise ConfigError(f"the native backend cannot be used: {obstacle}")
    if device.type == "cpu" and dtype != "float16":
        warnings.warn(f"running on torch, which is slower on a CPU: {obstacle}", stacklevel=3)
    return False
