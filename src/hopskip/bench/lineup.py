"""Which contenders a benchmark has: ours, plain and drafting, then those it is asked to run against."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hopskip.bench.contenders import Contender, Hopskip, LlamaCpp, Transformers
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.draft.make import resolve
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig, find_exit
from hopskip.speculative import SpeculativeConfig

OPPONENTS = ("transformers", "transformers-early-exit", "llama.cpp", "llama.cpp-lookup")
_COMMON = ("model", "device", "threads")
"""Options that all contenders of ours share."""


def lineup(
    checkpoint: Checkpoint,
    load: LoadConfig,
    speculative: SpeculativeConfig,
    *,
    settings: Seq[str] = (),
    against: Seq[str] = (),
    llama_cpp_models: Seq[Path] = (),
) -> list[Contender]:
    """Contenders, ours first. They run on the CPU.

    Args:
        load, speculative: of `hopskip` and `hopskip-plain`; the model is the checkpoint, whatever `load` names.
        settings: further contenders of ours that differ from `hopskip`: `draft=ngram,num_draft_tokens=3`, or
            `quantize=q8`. Each new precision brings a plain contender of its own.
        against: of `OPPONENTS`.
        llama_cpp_models: GGUF files for llama.cpp; the model's own if none is given.

    Raises:
        ConfigError: an unknown opponent, or a setting that cannot work.
    """
    load = replace(load, model=checkpoint.path, device="cpu")
    resolved = _resolve(checkpoint, speculative)
    ours: dict[str, Contender] = {}
    _add_ours(ours, load, speculative, resolved, "hopskip", "hopskip-plain")
    for text in settings:
        own_load, own_speculative = parse_setting(text, load, speculative)
        changed = [
            f"{field.name}={getattr(own_load, field.name)}"
            for field in fields(LoadConfig)
            if getattr(own_load, field.name) != getattr(load, field.name)
        ]
        plain = f"hopskip-plain({','.join(changed)})" if changed else "hopskip-plain"
        _add_ours(ours, own_load, own_speculative, _resolve(checkpoint, own_speculative), f"hopskip({text})", plain)
    theirs = _theirs(checkpoint, load, resolved, against, llama_cpp_models)
    if llama_cpp_models and not any(isinstance(contender, LlamaCpp) for contender in theirs):
        raise ConfigError("llama-cpp-model has no effect without llama.cpp among the contenders (--against llama.cpp)")
    names = {contender.name for contender in theirs}
    # what is measured only as somebody's plain half is compared with it only where it takes part
    theirs = [c if c.plain in names else replace(c, plain=None) for c in theirs]
    return [*ours.values(), *theirs]


def _resolve(checkpoint: Checkpoint, speculative: SpeculativeConfig) -> SpeculativeConfig:
    return resolve(speculative, checkpoint.config, find_exit(checkpoint, speculative))


def parse_setting(text: str, load: LoadConfig, speculative: SpeculativeConfig) -> tuple[LoadConfig, SpeculativeConfig]:
    """A setting of `key=value` pairs on top of the given ones.

    >>> parse_setting("quantize=q8,draft=none", LoadConfig(), SpeculativeConfig())[0].quantize
    'q8'

    Raises:
        ConfigError: there is no such option, or its value cannot be.
    """
    options: dict[str, tuple[type, Field[Any]]] = {
        field.name: (LoadConfig, field) for field in fields(LoadConfig) if field.name not in _COMMON
    }
    options |= {field.name: (SpeculativeConfig, field) for field in fields(SpeculativeConfig)}
    chosen: dict[type, dict[str, Any]] = {LoadConfig: {}, SpeculativeConfig: {}}
    for pair in text.split(","):
        key, separator, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or key not in options:
            raise ConfigError(f"setting {text!r} has {pair!r}; give key=value, with keys from {', '.join(options)}")
        owner, field = options[key]
        try:
            chosen[owner][key] = _parse_value(owner, field, value)
        except ConfigError as error:
            raise ConfigError(f"setting {text!r}: {error}") from None
    loading, drafting = chosen[LoadConfig], chosen[SpeculativeConfig]
    if "quantize" in loading and "dtype" not in loading:
        loading["dtype"] = "auto"
    if "dtype" in loading and "quantize" not in loading:
        loading["quantize"] = None
    # what fits another draft source does not fit this one
    base = SpeculativeConfig() if "draft" in drafting else speculative
    return replace(load, **loading), replace(base, **drafting)


def _parse_value(owner: type, field: Field[Any], text: str) -> Any:
    """The value of an option from its text: by the option's own parser, else as the number or text that it holds."""
    if (parse := field.metadata["parse"]) is not None:
        return parse(text)
    kind = get_type_hints(owner)[field.name]
    for number in (int, float):
        if number in (kind, *get_args(kind)):
            try:
                return number(text)
            except ValueError:
                raise ConfigError(f"{field.name} is {text!r}; it must be a number") from None
    return text.strip()


def _add_ours(
    ours: dict[str, Contender],
    load: LoadConfig,
    speculative: SpeculativeConfig,
    resolved: SpeculativeConfig,
    name: str,
    plain: str,
) -> None:
    """Add a contender and its plain half, which two settings may share."""
    if resolved.draft != "none":
        if name in ours:
            raise ConfigError(f"setting {name!r} is given twice; leave one out")
        ours[name] = Hopskip(name=name, plain=plain, load=load, speculative=speculative)
    ours.setdefault(plain, Hopskip(name=plain, load=load, speculative=SpeculativeConfig(draft="none")))


def _theirs(
    checkpoint: Checkpoint,
    load: LoadConfig,
    resolved: SpeculativeConfig,
    against: Seq[str],
    llama_cpp_models: Seq[Path],
) -> list[Contender]:
    path = checkpoint.path
    theirs: list[Contender] = []
    for opponent in dict.fromkeys(against):
        if opponent == "transformers":
            theirs += [_transformers(path, dtype) for dtype in ("float32", "bfloat16")]
        elif opponent == "transformers-early-exit":
            theirs.append(_early_exit(path, checkpoint.config, load, resolved))
        elif opponent in ("llama.cpp", "llama.cpp-lookup"):
            num_lookup_tokens = (resolved.num_draft_tokens or 6) if opponent == "llama.cpp-lookup" else None
            theirs += [_llama_cpp(model, num_lookup_tokens) for model in llama_cpp_models or [path]]
        else:
            raise ConfigError(f"against has {opponent!r}; choose from {', '.join(OPPONENTS)}")
    return theirs


def _transformers(path: Path, dtype: str) -> Transformers:
    return Transformers(name=f"transformers-{dtype}", variant_of="transformers", path=path, dtype=dtype)


def _early_exit(path: Path, config: ModelConfig, load: LoadConfig, speculative: SpeculativeConfig) -> Transformers:
    """With the exit and draft length of ours; where ours has none, those it would have."""
    if speculative.exit_layer is None:
        early_exit = SpeculativeConfig(draft="early-exit", num_draft_tokens=speculative.num_draft_tokens)
        speculative = resolve(early_exit, config)
    dtype = "float32" if load.dtype == "float32" else "bfloat16"
    return Transformers(
        name=f"transformers-early-exit-{dtype}",
        plain=f"transformers-{dtype}",
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
