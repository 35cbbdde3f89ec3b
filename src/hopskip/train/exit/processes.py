"""Which process this is, of those that train together, and where it computes; trackers of experiments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from hopskip.errors import ConfigError
from hopskip.loading import known_device
from hopskip.train.exit.recipe import ExitRecipe

_LONGEST_WAIT = timedelta(days=7)
"""That processes wait for one of them, which times the exits, or asks a server."""


def check_trackers(names: Seq[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know, or whose package is missing."""
    available = [str(name.value if hasattr(name, "value") else name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"report_to has {name!r}; choose of {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
        if name not in available:
            raise ConfigError(f"report_to has {name!r}, which is not installed: pip install {name.replace('_', '-')}")


def make_accelerator(device: str, report_to: Seq[str], folder: Path, settings: Mapping[str, Any]) -> Accelerator:
    """Joins the processes of a launch by `torchrun`, if this is one.

    Args:
        device: as `known_device` takes it.
        settings: what trackers are told of the run.

    Raises:
        ConfigError: a GPU is named, though each process has its own.
    """
    kind = known_device(device)
    # whoever trained in this process before may have had another precision, which would hold for us too
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision="no",  # an exit has its own, see `ExitTrainer`
        log_with=list(report_to) or None,
        project_dir=str(folder),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # the head is one, and the same everywhere
            InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
        ],
    )
    if accelerator.num_processes > 1 and ":" in device:
        raise ConfigError(f"device is {device}, but {accelerator.num_processes} processes have one each; leave it out")
    if report_to:
        plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers("hopskip-exit", plain)
    return accelerator


def device_of(accelerator: Accelerator, device: str) -> torch.device:
    """Where this process computes."""
    return torch.device(accelerator.device if accelerator.num_processes > 1 else known_device(device))


def is_first() -> bool:
    """Whether this is the process that speaks to people."""
    return int(os.environ.get("RANK", "0")) == 0


def agreed(recipe: ExitRecipe) -> ExitRecipe:
    """That of the first process: each may have measured another speed of the machine."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return recipe
    make_accelerator(recipe.device, (), recipe.folder, {})
    found: list[ExitRecipe] = broadcast_object_list([recipe])
    return found[0]
