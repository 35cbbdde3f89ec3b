"""The compiled extension, and which instruction set it uses."""

from __future__ import annotations

import importlib
import os
from typing import Any

from hopskip.errors import ConfigError

extension: Any
"""`hopskip._native`; None where it was not built."""
try:
    extension = importlib.import_module("hopskip._native")
    _import_error = ""
except ImportError as error:  # installed without a compiler
    extension, _import_error = None, str(error)

ISAS: tuple[str, ...] = extension.ISAS if extension is not None else ()
"""Instruction sets of this kind of processor that there are kernels for, best first: on x86-64 avx512, avx512_vnni,
avx_vnni and avx2, on ARM64 neon_i8mm, neon_dotprod and neon, and portable. The environment variable HOPSKIP_ISA forces
one."""


def obstacle() -> str | None:
    """None if the native engine can be used here, else the reason in one line."""
    if extension is None:
        return (
            f"the extension hopskip._native is not built ({_import_error}); reinstall hopskip with a C++ compiler, or "
            "run on PyTorch, which is slower: pip install 'hopskip[torch]'"
        )
    return None


def choose_isa() -> str:
    """The best instruction set of this processor, or the one that HOPSKIP_ISA names.

    Raises:
        ConfigError: HOPSKIP_ISA names one that does not exist, or that the processor lacks.
    """
    forced = os.environ.get("HOPSKIP_ISA")
    if not forced:
        return next(isa for isa in ISAS if extension.runs_here(isa))
    if forced not in ISAS:
        raise ConfigError(f"HOPSKIP_ISA is {forced!r}; choose one of {', '.join(ISAS)}, or unset it")
    if not extension.runs_here(forced):
        raise ConfigError(f"HOPSKIP_ISA is {forced!r}, which this processor cannot run; unset it")
    return forced
