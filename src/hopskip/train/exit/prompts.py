"""Prompts that a model writes itself, to collect training text with.

An instruct model that is given the opening of a user turn continues it with a request of the kind that it was tuned on
(Magpie, arXiv 2406.08464). Such prompts need no data set, and cover what the model has learned to answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

from hopskip.errors import ConfigError
from hopskip.llm import LLM
from hopskip.sampling import SamplingParams

_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"
_MIN_WORDS = 4


def self_prompts(
    llm: LLM, number: int, *, openings: Seq[str] = ("",), max_tokens: int = 96, seed: int = 0
) -> Iterator[str]:
    """User turns that the model writes itself, sampled at temperature 1 from the 50 best tokens.

    Args:
        number: how many to sample. Those that are too short, unfinished or repeated are left out, so fewer come.
        openings: beginnings of the user turn, taken in rotation; an opening is part of its prompt.
        seed: of the first prompt; each further one has the next.

    Raises:
        ConfigError: the model has no chat template.
    """
    if not llm.tokenizer.has_chat_template:
        raise ConfigError("the model has no chat template, so it cannot write prompts itself; give a file of prompts")
    head = llm.tokenizer.render_chat([{"role": "user", "content": _MARK}]).split(_MARK)[0]
    prompts = [llm.tokenizer.encode(head + opening, add_special_tokens=False) for opening in openings]
    params = SamplingParams(max_new_tokens=max_tokens, temperature=1.0, top_k=50, seed=seed)
    size = 4 * llm.engine.max_num_seqs
    seen: set[str] = set()
    for first in range(0, number, size):
        batch = range(first, min(first + size, number))
        results = llm.generate(
            [prompts[i % len(prompts)] for i in batch], [replace(params, seed=seed + i) for i in batch]
        )
        for i, result in zip(batch, results, strict=True):
            text = (openings[i % len(openings)] + result.text).strip()
            if result.finish_reason == "stop" and len(text.split()) >= _MIN_WORDS and text not in seen:
                seen.add(text)
                yield text
