"""From the name of a model to a decoder that is ready to draft: which backend, which precision, which device.

`hopskip --help` reads the options here, so PyTorch and what needs it are imported where they are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from hopskip.errors import ConfigError, check_choice, check_count, shown
from hopskip.machine import require
from hopskip.options import option
from hopskip.speculative import SpeculativeConfig

if TYPE_CHECKING:
    from hopskip.backends.base import Backend
    from hopskip.checkpoint.checkpoint import Checkpoint
    from hopskip.checkpoint.trained_exit import TrainedExit
    from hopskip.draft.make import Identity
    from hopskip.text.tokenizer import Tokenizer

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16", "fp32", "f32", "bf16", "fp16", "f16", "half", "float"]
"""With the names that others have for them."""
Quantize = Literal["q8", "q4"]
BackendName = Literal["auto", "native", "torch"]
KVDType = Literal["auto", "float32", "bfloat16", "int8"]

DTYPE_NAMES: dict[str, DType] = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    "bf16": "bfloat16",
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **{name: name for name in ("auto", "float32", "bfloat16", "float16")},
}

Progress = Callable[[str, float | None], None]
"""Told what takes its time, and the share of it that is done, up to 1; None where nobody knows."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Which model to load, in which precision, and on what.

    Raises:
        ConfigError: a value is unknown, or two of them contradict each other.
    """

    model: str | Path | None = option(
        None,
        "A Hugging Face folder, a GGUF file, or a Hub id, OWNER/REPO[:Q4_K_M] (default: SmolLM2-135M-Instruct).",
        "MODEL",
        short="-m",
        envvar="HOPSKIP_MODEL",
    )
    dtype: DType = option(
        "auto",
        "Precision of weights and arithmetic; auto is the checkpoint's own.",
        "TYPE",
    )
    """`auto` keeps the checkpoint's own. On the native backend a quantized GGUF then stays as it is."""
    quantize: Quantize | None = option(None, "Pack the weights to 8 or 4 bits (native backend).", "TYPE")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where that is faster.", "DEVICE")
    """`auto` stays with the native engine unless a GPU has room for the model, all options work there, and it is
    expected to be clearly faster (`hopskip.backends.gpu`). Where that engine cannot run, it takes a GPU if there is
    one."""
    backend: BackendName = option(
        "auto", "native (the C++ engine for CPUs), torch, or auto, which prefers native on a CPU.", "NAME"
    )
    threads: int | None = option(None, "CPU threads; by default as many as there are cores.", "N")
    kv_dtype: KVDType = option("auto", "Precision of cached keys and values (native backend).", "TYPE")
    """`auto` is float32 beside float32 weights, else bfloat16. `int8` halves the memory of long contexts and the time
    of reading it, at a small loss of precision."""

    def __post_init__(self) -> None:
        self._take_other_names()
        check_choice("dtype", self.dtype, DType)
        check_choice("backend", self.backend, BackendName)
        check_choice("kv_dtype", self.kv_dtype, KVDType)
        check_choice("quantize", self.quantize, Quantize)
        if self.quantize is not None and self.dtype != "auto":
            raise ConfigError(f"quantize={self.quantize} and dtype={self.dtype} contradict each other; leave one out")
        if self.threads is not None:
            check_count("threads", self.threads, "at least 1")
        if not isinstance(self.model, str | Path | None):
            raise ConfigError(f"model is {shown(self.model)}; give a folder, a file or a Hub id")

    def _take_other_names(self) -> None:
        """bf16 is bfloat16, and a dtype of so many bits in blocks is asked for by `quantize`."""
        dtype = str(self.dtype).lower().removeprefix("torch.")
        object.__setattr__(self, "dtype", DTYPE_NAMES.get(dtype, self.dtype))
        if isinstance(self.quantize, str):
            object.__setattr__(self, "quantize", self.quantize.lower())
        if dtype in get_args(Quantize) and self.quantize in (None, dtype):
            object.__setattr__(self, "quantize", dtype)
            object.__setattr__(self, "dtype", "auto")

    @property
    def precision(self) -> str:
        """Of the weights: `auto`, `float32`, ..., `q8`, `q4`."""
        return self.quantize or self.dtype

    def identity(self, checkpoint: Checkpoint) -> Identity:
        """By which is remembered what was measured of the model so loaded."""
        return {"weights": checkpoint.fingerprint, "precision": self.precision, "kv_dtype": self.kv_dtype}

    def where(
        self, checkpoint: Checkpoint | None = None, speculative: SpeculativeConfig | None = None
    ) -> tuple[Literal["native", "torch"], str]:
        """Which backend runs the model, and on which device. Loads nothing.

        Args:
            checkpoint, speculative: the model and how to draft with it: without the one, `auto` cannot know that a GPU
                is faster; the other may need the native engine.

        Raises:
            ConfigError: an option needs another backend or device than there is.
        """
        device = self._automatic_device(checkpoint, speculative) if self.device == "auto" else known_device(self.device)
        if self._is_native(device):
            return "native", device
        for name, value, default in ("quantize", self.quantize, None), ("kv_dtype", self.kv_dtype, "auto"):
            if value != default:
                raise ConfigError(f"{name}={value} needs the native CPU backend, but this runs on torch; leave it out")
        return "torch", device

    def _automatic_device(self, checkpoint: Checkpoint | None, speculative: SpeculativeConfig | None) -> str:
        from hopskip.backends.gpu import find_gpu

        if self.backend == "native":
            return "cpu"
        can_be_native = self.backend == "auto" and self._obstacle("cpu") is None
        drafts_natively = speculative is not None and speculative.uses_layer_skip
        drafts_natively |= speculative is not None and speculative.draft_precision is not None
        of_the_cpu = self.quantize or self.kv_dtype != "auto" or self.threads is not None or drafts_natively
        if can_be_native and (of_the_cpu or checkpoint is None):
            return "cpu"
        gpu = find_gpu()
        if gpu is None:
            return "cpu"
        if not can_be_native or checkpoint is None:
            return "cuda"
        dtype = checkpoint.dtype if self.dtype == "auto" else self.dtype
        return "cuda" if gpu.is_worth(checkpoint, dtype, self.precision) else "cpu"

    def _obstacle(self, device: str) -> str | None:
        """Why the C++ engine cannot run the model, if it cannot."""
        from hopskip.backends.native import isa

        if device != "cpu":
            return f"it runs on CPUs, not on {device}"
        if self.dtype == "float16":
            return "it has no float16 arithmetic; use bfloat16 or float32"
        return isa.obstacle()

    def _is_native(self, device: str) -> bool:
        """Whether the C++ engine runs the model; says so in one line where it was to be expected and cannot."""
        if self.backend == "torch":
            return False
        obstacle = self._obstacle(device)
        if obstacle is None:
            return True
        if self.backend == "native":
            raise ConfigError(f"the native backend cannot be used: {obstacle}")
        if device == "cpu" and self.dtype != "float16":
            warnings.warn(f"running on torch, which is slower on a CPU: {obstacle}", stacklevel=3)
        return False


class LoadOptions(TypedDict, total=False):
    """The fields of `LoadConfig` but the model, as keyword arguments."""

    dtype: DTypeName
    quantize: Quantize | None
    device: str
    backend: BackendName
    threads: int | None
    kv_dtype: KVDType


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model that can be run: all that `open_model` finds and makes."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    backend: Backend
    """With the trained exit and the copy attached that the configuration can use."""
    identity: Identity
    """See `LoadConfig.identity`."""


def open_model(
    load: LoadConfig,
    speculative: SpeculativeConfig | None = None,
    progress: Progress | None = None,
    chat_template: str | Path | None = None,
) -> OpenModel:
    """Find, check and load a model, with what it drafts with beside it.

    Args:
        speculative: None leaves everything to the model's recommendation.
        chat_template: a file, or a template's text, in place of the model's own.

    Raises:
        CheckpointError: the model or the exit cannot be found or read.
        ConfigError: an option cannot work with this model.
    """
    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.checkpoint.hub import find_model
    from hopskip.draft.make import resolve
    from hopskip.text.chat_template import read_template
    from hopskip.text.tokenizer_files import load_tokenizer

    template = None if chat_template is None else read_template(chat_template)
    speculative = speculative or SpeculativeConfig()
    checkpoint = open_checkpoint(find_model(load.model))
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config, checkpoint.metadata, template)
    # a wrong option must not cost the time of loading the weights
    trained_exit = find_exit(checkpoint, speculative)
    resolve(speculative, checkpoint.config, trained_exit)
    backend = load_backend(checkpoint, load, progress, speculative)
    if trained_exit is not None:
        backend.attach_exit(trained_exit)
    if speculative.draft_precision is not None:
        precision = speculative.draft_precision
        backend.attach_copy(checkpoint, precision, telling(progress, f"packing the copy in {precision}"))
    return OpenModel(checkpoint=checkpoint, tokenizer=tokenizer, backend=backend, identity=load.identity(checkpoint))


def load_backend(
    checkpoint: Checkpoint,
    load: LoadConfig,
    progress: Progress | None = None,
    speculative: SpeculativeConfig | None = None,
) -> Backend:
    """The weights of an opened checkpoint, in a backend that can draft as `speculative` says.

    Raises:
        ConfigError: an option cannot work here.
        CheckpointError: the weights are missing, damaged, or of an unsupported kind.
    """
    kind, device = load.where(checkpoint, speculative)
    if kind == "native":
        from hopskip.backends.native.backend import NativeBackend

        return NativeBackend.load(
            checkpoint,
            precision=load.precision,
            threads=load.threads,
            kv_dtype=None if load.kv_dtype == "auto" else load.kv_dtype,
            progress=telling(progress, "packing weights, once for each precision"),
        )
    torch = require("torch", "the torch backend")
    from hopskip.backends.torch.backend import TorchBackend
    from hopskip.backends.torch.weights import load_weights

    if load.threads is not None:
        torch.set_num_threads(load.threads)
    dtype = getattr(torch, checkpoint.dtype if load.dtype == "auto" else load.dtype)
    return TorchBackend(
        checkpoint.config, load_weights(checkpoint, dtype, device, telling(progress, "loading weights"))
    )


def telling(progress: Progress | None, what: str) -> Callable[[float], None] | None:
    """What `progress` is told of one piece of work: the share alone."""
    return None if progress is None else partial(progress, what)


def find_exit(checkpoint: Checkpoint, speculative: SpeculativeConfig) -> TrainedExit | None:
    """The trained exit to draft with: the one that is asked for, else the one that ships for the model, if any.

    Raises:
        CheckpointError: the exit cannot be read.
        ConfigError: it was trained for other weights.
    """
    from hopskip.checkpoint.trained_exit import TrainedExit, shipped_exit

    folder = speculative.exit_branch
    if folder is None and speculative.may_use_trained_exit:
        folder = shipped_exit(checkpoint.fingerprint)
    if folder is None:
        return None
    trained_exit = TrainedExit.load(Path(folder))
    trained_exit.check_base(checkpoint.fingerprint)
    return trained_exit


def known_device(name: str) -> str:
    """A device as PyTorch writes it; `auto` is a GPU if there is one, which is what training wants.

    Raises:
        ConfigError: there is no such device, or PyTorch is not installed.
    """
    if name == "auto":
        from hopskip.backends.gpu import find_gpu

        return "cpu" if find_gpu() is None else "cuda"
    if name == "cpu":
        return "cpu"
    torch = require("torch", f"device {name!r}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try 'cpu' or 'cuda'") from None
    return str(device)
