"""The prompts whose answers an exit is trained on: those of files, and those that the model writes itself.

An instruct model that is given the opening of a user turn continues it with a request of the kind that it was tuned on
(Magpie, arXiv 2406.08464). Such prompts need no data set, and cover what the model has learned to answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

from hopskip.engine.engine import Engine
from hopskip.errors import ConfigError
from hopskip.prompts import PROMPT_SETS, shipped_path
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.text.tokenizer import Tokenizer
from hopskip.train.chats import chat_of, tools_of
from hopskip.train.checkpoint import replacing_file
from hopskip.train.exit.recipe import PromptsRecipe
from hopskip.train.exit.turns import Chat
from hopskip.train.read import DataConfig, read_split

_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"
_MIN_WORDS = 4
_QUESTIONS = ("instruction", "question")


def read_chats(settings: PromptsRecipe) -> list[Chat]:
    """The chats of all files, `max_prompts` of them at most, chosen at random; without repetitions, and without those
    that ask what must not be trained on.

    Raises:
        ConfigError: a file cannot be read, or has a row that is no chat and no prompt.
    """
    excluded = {text for chat in _rows(settings.exclude, settings) for text in chat.asked}
    rng = random.Random(settings.seed)
    kept: list[Chat] = []
    seen: set[int] = set()
    for chat in _rows(settings.files, settings):
        identity = hash((chat.asked, len(chat.messages)))
        if identity in seen or not any(chat.asked) or excluded.intersection(chat.asked):
            continue
        seen.add(identity)
        if settings.max_prompts is None or len(kept) < settings.max_prompts:
            kept.append(chat)
        elif (place := rng.randrange(len(seen))) < settings.max_prompts:  # so that each has the same chance
            kept[place] = chat
    return kept


def write_prompts(
    settings: PromptsRecipe,
    chats: Seq[Chat],
    tokenizer: Tokenizer,
    make_engine: Callable[[], Engine],
    path: Path,
    is_usable: Callable[[Chat], bool],
    report: Callable[[str], None],
    doing: Callable[[float], None] = lambda share: None,
) -> None:
    """Bring together what the model is to be asked, in a random order: a JSON line with `messages` each.

    Args:
        chats: those of files.
        make_engine: one that decodes plainly; asked for if the model is to write prompts itself.
        is_usable: whether a chat is to be kept.
        doing: told the share of these prompts that are written.

    Raises:
        ConfigError: the model cannot write prompts itself, or none is usable.
        TrainingError: `path` cannot be written.
    """
    found = list(chats)
    if settings.self_written:
        known = {chat.asked for chat in chats}
        excluded = {text for chat in _rows(settings.exclude, settings) for text in chat.asked}
        written = self_prompts(
            tokenizer,
            make_engine(),
            settings.self_written,
            openings=settings.openings,
            seed=settings.seed,
            doing=doing,
        )
        for number, text in enumerate(written, start=1):
            if text not in excluded and (text,) not in known:
                found.append(Chat(({"role": "user", "content": text},)))
            if number % 100 == 0:
                report(f"the model has written {number} prompts")
    kept = [chat for chat in found if is_usable(chat)]
    if not kept:
        raise ConfigError(
            f"none of {len(found)} chats can be used: their prompts have more than {settings.max_prompt_tokens} tokens "
            "(prompts.max_prompt_tokens), or answers are to be given, and there are none (prompts.response_field)"
        )
    if len(kept) < len(found):
        report(
            f"{len(found) - len(kept):,} of {len(found):,} chats are left out: too long, without an answer, or refused "
            "by the chat template"
        )
    random.Random(settings.seed).shuffle(kept)
    with replacing_file(path) as partial:
        partial.write_text("".join(json.dumps(vars(chat)) + "\n" for chat in kept), encoding="utf-8")


def read_prompts(path: Path) -> list[Chat]:
    """What `write_prompts` wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Chat(**{name: tuple(values) for name, values in row.items()}) for row in rows]


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


def _rows(sources: Seq[str], settings: PromptsRecipe) -> Iterator[Chat]:
    """The chats of some files or data sets."""
    messages, prompt, response = settings.messages_field, settings.prompt_field, settings.response_field
    for name in sources:
        source = str(shipped_path(name)) if name in PROMPT_SETS else name
        data = DataConfig(train=(source,), split=settings.split, subset=settings.subset, where=settings.where)
        for row in read_split(data, held_out=False):
            found = chat_of(row, messages_field=messages, prompt_field=prompt, response_field=response)
            found = found or _questions(row, settings)
            if found is None:
                raise ConfigError(
                    f"a row of {source} has no chat and no prompt, but {', '.join(sorted(row))}; name its fields "
                    "(prompts.messages_field, prompts.prompt_field), or choose rows (prompts.where)"
                )
            yield Chat(tuple(found), tuple(tools_of(row) or ()))


def _questions(row: Mapping[str, Any], settings: PromptsRecipe) -> list[Mapping[str, Any]] | None:
    """Of a row without answers: its prompt, or its `turns`, with what a system says before."""
    turns = row.get(settings.prompt_field) or row.get("turns") or next((row[f] for f in _QUESTIONS if row.get(f)), None)
    texts = [turns] if isinstance(turns, str) else turns
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    system = row.get("system") or row.get("system_prompt")
    before = [{"role": "system", "content": system}] if isinstance(system, str) else []
    return [*before, *({"role": "user", "content": text} for text in texts)]
