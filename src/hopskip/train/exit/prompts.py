"""The prompts whose answers an exit is trained on: those of files, and those that the model writes itself.

An instruct model that is given the opening of a user turn continues it with a request of the kind that it was tuned on
(Magpie, arXiv 2406.08464). Such prompts need no data set, and cover what the model has learned to answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

from hopskip.engine.engine import Engine
from hopskip.errors import ConfigError
from hopskip.prompts import content_of, encode_content
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.checkpoint import replacing_file
from hopskip.train.exit.recipe import PromptsRecipe
from hopskip.train.read import DataConfig, read

_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"
_MIN_WORDS = 4


def write_prompts(
    settings: PromptsRecipe,
    tokenizer: Tokenizer,
    make_engine: Callable[[], Engine],
    path: Path,
    report: Callable[[str], None],
    doing: Callable[[float], None] = lambda share: None,
) -> None:
    """Bring together what the model is to be asked, in a random order: a JSON line with `prompt` each.

    Args:
        make_engine: one that decodes plainly; asked for if the model is to write prompts itself.
        doing: told the share of these prompts that are written.

    Raises:
        ConfigError: a file cannot be read or has a row without a prompt, or the model cannot write prompts itself.
        TrainingError: `path` cannot be written.
    """
    excluded = {text.strip() for source in settings.exclude for text in _read_texts(source, settings)}
    texts = [text for source in settings.files for text in _read_texts(source, settings)]
    rng = random.Random(settings.seed)
    if settings.max_prompts is not None and len(texts) > settings.max_prompts:
        texts = rng.sample(texts, settings.max_prompts)
    if settings.self_written:
        written = self_prompts(
            tokenizer,
            make_engine(),
            settings.self_written,
            openings=settings.openings,
            seed=settings.seed,
            doing=doing,
        )
        for number, text in enumerate(written, start=1):
            texts.append(text)
            if number % 100 == 0:
                report(f"the model has written {number} prompts")
    texts = [text for text in dict.fromkeys(texts) if text.strip() and text.strip() not in excluded]
    rng.shuffle(texts)
    with replacing_file(path) as partial:
        partial.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")


def encode_prompts(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Token ids of what `write_prompts` wrote, longer prompts left out.

    Raises:
        ConfigError: none is left.
    """
    texts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    encoded = [encode_content(text, tokenizer) for text in texts]
    kept = [ids for ids in encoded if len(ids) <= max_tokens]
    if not kept:
        raise ConfigError(f"none of {len(encoded)} prompts has at most {max_tokens} tokens")
    return kept


def self_prompts(
    tokenizer: Tokenizer,
    engine: Engine,
    number: int,
    *,
    openings: Seq[str] = ("",),
    max_tokens: int = 96,
    seed: int = 0,
    doing: Callable[[float], None] = lambda share: None,
) -> Iterator[str]:
    """User turns that the model writes itself, sampled at temperature 1 from the 50 best tokens.

    Args:
        number: how many to sample. Those that are too short, unfinished or repeated are left out, so fewer come.
        openings: beginnings of the user turn, taken in rotation; an opening is part of its prompt.
        seed: of the first prompt; each further one has the next.
        doing: told the share that has been sampled.

    Raises:
        ConfigError: the model has no chat template.
    """
    if not tokenizer.has_chat_template:
        raise ConfigError("the model has no chat template, so it cannot write prompts itself; give a file of prompts")
    head = tokenizer.render_chat([{"role": "user", "content": _MARK}]).split(_MARK)[0]
    prompts = [tokenizer.encode(head + opening, add_special_tokens=False) for opening in openings]
    params = SamplingParams(max_new_tokens=max_tokens, temperature=1.0, top_k=50, seed=seed)
    size = 4 * engine.max_num_seqs
    seen: set[str] = set()
    for first in range(0, number, size):
        batch = range(first, min(first + size, number))
        requests = [Request(prompts[i % len(prompts)], replace(params, seed=seed + i)) for i in batch]
        for i, sequence in zip(batch, _finish(engine, requests), strict=True):
            written = tokenizer.decode([token.id for token in sequence.tokens], after=prompts[i % len(prompts)])
            text = (openings[i % len(openings)] + written).strip()
            if sequence.finish_reason == "stop" and len(text.split()) >= _MIN_WORDS and text not in seen:
                seen.add(text)
                yield text
        doing(batch.stop / number)


def _finish(engine: Engine, requests: Seq[Request]) -> list[Sequence]:
    sequences = [engine.add(request) for request in requests]
    while engine.has_work:
        engine.step()
    return sequences


def _read_texts(source: str, settings: PromptsRecipe) -> Iterator[str]:
    """What the user says first in every row of a file."""
    for row in read(source, DataConfig(train=(source,))):
        content = content_of(row, prompt_field=settings.prompt_field, messages_field=settings.messages_field)
        if content is None:
            raise ConfigError(
                f"a row of {source} has none of {settings.prompt_field}, turns, {settings.messages_field}: {dict(row)}"
            )
        if isinstance(content, str):
            yield content
        else:
            yield next((m["content"] for m in content if m["role"] == "user"), "")
