"""Which contenders a benchmark has: ours, plain and drafting, then those it is asked to run against."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from hopskip.bench.contenders import Contender, Hopskip, LlamaCpp, Precision, Transformers
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import ConfigError
from hopskip.llm import find_exit
from hopskip.speculative import SpeculativeConfig, layer_list

OPPONENTS = ("transformers", "transformers-early-exit", "llama.cpp", "llama.cpp-lookup")


def lineup(
    path: Path,
    config: ModelConfig,
    precision: Precision,
    speculative: SpeculativeConfig,
    *,
    settings: Seq[str] = (),
    against: Seq[str] = (),
    llama_cpp_models: Seq[Path] = (),
) -> list[Contender]:
    """Contenders, ours first.

    Args:
        path, config: the model.
        precision, speculative: of `hopskip` and `hopskip-plain`.
        settings: further contenders of ours that differ from `hopskip`: `draft=ngram,num_draft_tokens=3`, or
            `quantize=q8`. Each new precision brings a plain contender of its own.
        against: of `OPPONENTS`.
        llama_cpp_models: GGUF files for llama.cpp; the model's own if none is given.

    Raises:
        ConfigError: an unknown opponent, or a setting that cannot work.
    """
    resolved = _resolve(path, config, speculative)
    ours: dict[str, Contender] = {}
    _add_ours(ours, path, precision, resolved, "hopskip", "hopskip-plain")
    for text in settings:
        own_precision, own_speculative = parse_setting(text, precision, speculative)
        changed = [
            f"{f.name}={getattr(own_precision, f.name)}"
            for f in fields(Precision)
            if getattr(own_precision, f.name) != getattr(precision, f.name)
        ]
        plain = f"hopskip-plain({','.join(changed)})" if changed else "hopskip-plain"
        _add_ours(ours, path, own_precision, _resolve(path, config, own_speculative), f"hopskip({text})", plain)
    theirs: list[Contender] = []
    for opponent in dict.fromkeys(against):
        if opponent == "transformers":
            theirs += [_transformers(path, dtype) for dtype in (torch.float32, torch.bfloat16)]
        elif opponent == "transformers-early-exit":
            theirs.append(_early_exit(path, config, precision, resolved))
        elif opponent in ("llama.cpp", "llama.cpp-lookup"):
            num_lookup_tokens = (resolved.num_draft_tokens or 6) if opponent == "llama.cpp-lookup" else None
            theirs += [_llama_cpp(model, num_lookup_tokens) for model in llama_cpp_models or [path]]
        else:
            raise ConfigError(f"against has {opponent!r}; choose from {', '.join(OPPONENTS)}")
    if llama_cpp_models and not any(isinstance(contender, LlamaCpp) for contender in theirs):
        raise ConfigError("llama-cpp-model has no effect without llama.cpp among the contenders (--against llama.cpp)")
    names = {contender.name for contender in theirs}
    # what is measured only as somebody's plain half is compared with it only where it takes part
    theirs = [c if c.plain in names else replace(c, plain=None) for c in theirs]
    return [*ours.values(), *theirs]


def _resolve(path: Path, config: ModelConfig, speculative: SpeculativeConfig) -> SpeculativeConfig:
    if not speculative.may_use_trained_exit:
        return speculative.resolve(config)
    return speculative.resolve(config, find_exit(open_checkpoint(path), speculative))


def parse_setting(
    text: str, precision: Precision, speculative: SpeculativeConfig
) -> tuple[Precision, SpeculativeConfig]:
    """A setting of `key=value` pairs on top of the given ones.

    >>> parse_setting("quantize=q8,draft=none", Precision(), SpeculativeConfig())[0].quantize
    'q8'
    """
    loading: dict[str, Any] = {}
    drafting: dict[str, Any] = {}
    numbers = {"exit_layer": int, "num_draft_tokens": int, "num_runner_ups": int, "min_confidence": float}
    for pair in text.split(","):
        key, separator, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        names = [f.name for f in fields(Precision)] + [f.name for f in fields(SpeculativeConfig)]
        if not separator or key not in names:
            raise ConfigError(f"setting {text!r} has {pair!r}; give key=value, with keys from {', '.join(names)}")
        try:
            converted = layer_list(value) if key == "skip_layers" else numbers.get(key, str.strip)(value)
        except ValueError:
            raise ConfigError(f"setting {text!r}: {key} is {value!r}; it must be a number") from None
        (loading if hasattr(precision, key) else drafting)[key] = converted
    if "quantize" in loading and "dtype" not in loading:
        loading["dtype"] = "auto"
    if "dtype" in loading and "quantize" not in loading:
        loading["quantize"] = None
    # what fits another draft source does not fit this one
    base = SpeculativeConfig() if "draft" in drafting else speculative
    return replace(precision, **loading), replace(base, **drafting)


def _add_ours(
    ours: dict[str, Contender], path: Path, precision: Precision, speculative: SpeculativeConfig, name: str, plain: str
) -> None:
    """Add a contender and its plain half, which two settings may share."""
    drafts = speculative.draft != "none"
    if drafts:
        if name in ours:
            raise ConfigError(f"setting {name!r} is given twice; leave one out")
        ours[name] = Hopskip(name=name, plain=plain, path=path, precision=precision, speculative=speculative)
    no_draft = SpeculativeConfig(draft="none")
    ours.setdefault(plain, Hopskip(name=plain, path=path, precision=precision, speculative=no_draft))


def _transformers(path: Path, dtype: torch.dtype) -> Transformers:
    return Transformers(name=f"transformers-{_name(dtype)}", variant_of="transformers", path=path, dtype=dtype)


def _early_exit(path: Path, config: ModelConfig, precision: Precision, speculative: SpeculativeConfig) -> Transformers:
    """With the exit and draft length of ours; where ours has none, those it would have."""
    if speculative.exit_layer is None:
        early_exit = SpeculativeConfig(draft="early-exit", num_draft_tokens=speculative.num_draft_tokens)
        speculative = early_exit.resolve(config)
    dtype = torch.float32 if precision.dtype == "float32" else torch.bfloat16
    return Transformers(
        name=f"transformers-early-exit-{_name(dtype)}",
        plain=f"transformers-{_name(dtype)}",
        path=path,
        dtype=dtype,
        exit_layer=speculative.exit_layer,
        num_draft_tokens=speculative.num_draft_tokens,
    )


def _llama_cpp(path: Path, num_lookup_tokens: int | None) -> LlamaCpp:
    plain = f"llama.cpp({path.name})"
    if num_lookup_tokens is None:
        return LlamaCpp(name=plain, path=path)
    return LlamaCpp(name=f"llama.cpp-lookup({path.name})", plain=plain, path=path, num_lookup_tokens=num_lookup_tokens)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
