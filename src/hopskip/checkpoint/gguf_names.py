"""What the names of GGUF files say: quantization tags, parts of split models, files that are no models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hopskip.errors import CheckpointError

PREFERRED_TAGS = ("Q4_K_M", "Q8_0")
"""What llama.cpp and Ollama take of a repository of several files when no tag is given, in this order."""

_PART = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_QUANTIZATION = r"(?:UD-)?(?:I?Q|TQ|MXFP|NVFP|B?F|FP)\d\w*"
_OWN_TAG = re.compile(rf"(?:^|[-._/])({_QUANTIZATION})$", re.IGNORECASE)
_BESIDE_MODELS = re.compile(r"(?:mtp|eagle3|dflash|dspark)-|.*(?:mmproj|imatrix)", re.IGNORECASE)
"""Vision projectors, importance matrices and draft heads: they come beside a model, and run no text."""


@dataclass(frozen=True)
class Part:
    """Which part of a split model a file is, by its name."""

    prefix: str
    number: int
    """From 1."""
    count: int
    suffix: str

    def name_of(self, number: int) -> str:
        return f"{self.prefix}-{number:05}-of-{self.count:05}{self.suffix}"

    def names(self) -> list[str]:
        """All parts, in order."""
        return [self.name_of(number) for number in range(1, self.count + 1)]


def part_of(name: str) -> Part | None:
    """The part that a name stands for; None for a file that is a model as a whole.

    >>> part_of("m-Q8_0-00002-of-00003.gguf").names()[0]
    'm-Q8_0-00001-of-00003.gguf'
    """
    match = _PART.fullmatch(name)
    if match is None:
        return None
    part = Part(match["prefix"], int(match["number"]), int(match["count"]), match["suffix"])
    return part if 1 <= part.number <= part.count else None


def part_names(name: str) -> list[str]:
    """The names of all files of the model that `name` belongs to, part one first; of a whole model just its own."""
    part = part_of(name)
    return [name] if part is None else part.names()


def is_gguf_name(name: str) -> bool:
    return name.lower().endswith(".gguf")


def models_among(names: Iterable[str]) -> list[str]:
    """The GGUF models among the files of a folder, sorted: split ones by their first part, no projectors."""
    ggufs = (name for name in names if is_gguf_name(name) and not _BESIDE_MODELS.match(name.rpartition("/")[2]))
    return sorted({part_names(name)[0] for name in ggufs})


def choose(names: Iterable[str], tag: str | None, place: str) -> str | None:
    """The model that a tag stands for among the files of `place`; None if there is none, or no such.

    A tag is a quantization, whatever the case (`q4_k_m`), or a file's whole name, as Ollama takes it. Without a tag, or
    with Ollama's `latest`: the only model, else the first that `PREFERRED_TAGS` names.

    Raises:
        CheckpointError: several models fit.
    """
    models = models_among(names)
    if tag is None or tag.lower() == "latest":
        tags = PREFERRED_TAGS if len(models) > 1 else ()
        fitting = next((found for found in (_tagged(models, preferred) for preferred in tags) if found), models)
    else:
        fitting = _tagged(models, tag)
    if len(fitting) > 1:
        raise CheckpointError(
            f"{place} holds {len(fitting)} GGUF files that fit; give one of them, such as {place}/{fitting[0]} "
            f"({_listed(fitting)})"
        )
    return fitting[0] if fitting else None


def own_tag(name: str) -> str | None:
    """The quantization at the end of a file's name.

    >>> own_tag("Qwen3-8B-UD-Q4_K_XL.gguf"), own_tag("model.gguf")
    ('UD-Q4_K_XL', None)
    """
    match = _OWN_TAG.search(_stem(name))
    return match[1] if match else None


def tags_of(names: Iterable[str]) -> list[str]:
    """What could be asked for: the tag of each model, or its name."""
    return [own_tag(name) or name for name in models_among(names)]


def _stem(name: str) -> str:
    part = part_of(name)
    return part.prefix if part else name[: -len(".gguf")]


def _tagged(models: list[str], tag: str) -> list[str]:
    """The models that a tag fits: those that end with it, else those that have it anywhere in their names."""
    wanted = tag.lower()
    exact = [name for name in models if wanted in (name.lower(), name.rpartition("/")[2].lower())]
    at_end = [name for name in models if wanted in ((own_tag(name) or "").lower(), _stem(name).lower())]
    # `_` before a tag may belong to a longer one: K_M is no tag of a file of type Q4_K_M
    before = "[-._/]" if re.fullmatch(_QUANTIZATION, tag, re.IGNORECASE) else "[-./]"
    anywhere = re.compile(rf"(?:^|{before}){re.escape(wanted)}[-.]")
    return exact or at_end or [name for name in models if anywhere.search(f"{_stem(name)}.".lower())]


def _listed(models: list[str], limit: int = 8) -> str:
    more = f" and {len(models) - limit} more" if len(models) > limit else ""
    return ", ".join(models[:limit]) + more
