"""Sets of prompts: those that come with the package, and files of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from hopskip.errors import ConfigError, PromptError
from hopskip.text.tokenizer import Tokenizer

_SHORT_SETS = ("alpaca", "gsm8k", "humaneval", "mt_bench", "copy")
PROMPT_SETS = (*_SHORT_SETS, "long")
"""Shipped with the package: four sets of 80 prompts; 12 whose answers repeat text of the prompt; and 40 of 700 to 1,500
tokens: summaries, questions on documents, chats about a text."""

T = TypeVar("T")

Content = str | tuple[Mapping[str, Any], ...]
"""What is asked: a plain text, or a chat."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: the set it belongs to, its name there, and either a chat or a plain text."""

    set: str
    id: str
    content: Content

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids: through the chat template where the model has one, else as the text itself."""
        return encode_content(self.content, tokenizer)


def encode_content(content: Content, tokenizer: Tokenizer) -> list[int]:
    """Token ids: through the chat template where the model has one, else as the text itself."""
    if not isinstance(content, str):
        return tokenizer.apply_chat_template(content)
    if tokenizer.has_chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": content}])
    return tokenizer.encode(content)


def content_of(
    row: Mapping[str, Any], *, prompt_field: str = "prompt", messages_field: str = "messages"
) -> Content | None:
    """What a row of prompts or of training data asks: its chat, else its prompt, else the first of its `turns`. None if
    it has nothing of the kind.

    >>> content_of({"turns": ["How old is it?", "And its sister?"]})
    'How old is it?'
    """
    turns = row.get("turns")
    value = (
        row.get(messages_field) or row.get(prompt_field) or (turns[0] if isinstance(turns, list) and turns else None)
    )
    if isinstance(value, str):
        return value
    return tuple(value) if isinstance(value, list | tuple) and value and all(map(_is_message, value)) else None


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and ("content" in value or "tool_calls" in value)
    )


def load_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Prompts of a named set or a JSON-lines file, `limit` of them at most, evenly spread over the set.

    A line of a file is an object with `prompt` (a text), `turns` (texts, the first is taken) or `messages` (a chat),
    and perhaps `question_id`.

    Raises:
        ConfigError: no such set or file, or `limit` is below 1.
        PromptError: the file is empty, or a line is not such an object.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of prompts is {limit}; it must be at least 1")
    text = _shipped(source) if source in PROMPT_SETS else _read(source)
    name = Path(source).stem
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise PromptError(f"{source} has no prompts; give one JSON object per line, such as {{'prompt': '...'}}")
    return spread([_parse(line, name, f"{source}:{number}", number) for number, line in lines], limit)


def mixed_prompts(num_prompts: int) -> list[Prompt]:
    """A little of every set of short prompts in turn, for proofs: chat, arithmetic, code, text that lookup copies."""
    columns = [load_prompts(name) for name in _SHORT_SETS]
    turns = max(len(column) for column in columns)
    prompts = [column[turn] for turn in range(turns) for column in columns if turn < len(column)]
    if not 1 <= num_prompts <= len(prompts):
        raise ConfigError(f"the number of prompts is {num_prompts}; it must be between 1 and {len(prompts)}")
    return prompts[:num_prompts]


def whole_prompts() -> list[str]:
    """The prompts of alpaca, gsm8k, humaneval and mt_bench in turn, all turns of each as one text: a text set that
    needs no network."""
    columns = []
    for name in ("alpaca", "gsm8k", "humaneval", "mt_bench"):
        lines = _shipped(name).splitlines()
        columns.append(["\n\n".join(json.loads(line)["turns"]) for line in lines])
    return [text for row in zip(*columns, strict=True) for text in row]


def spread(items: Seq[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly spread.

    >>> spread([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 4]
    """
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def shipped_path(name: str) -> Path:
    """The file of a set that comes with the package."""
    return Path(str(files("hopskip") / "data" / "prompts" / f"{name}.jsonl"))


def _shipped(name: str) -> str:
    return shipped_path(name).read_text(encoding="utf-8")


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"prompts {source!r}: neither a set ({', '.join(PROMPT_SETS)}) nor a file; check the path"
        ) from None
    except OSError as error:
        raise ConfigError(f"prompts {source!r} cannot be read ({error.strerror}); give a .jsonl file") from None
    except UnicodeDecodeError:
        raise PromptError(f"prompts {source!r} is not UTF-8 text; give a .jsonl file") from None


def _parse(line: str, name: str, place: str, number: int) -> Prompt:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{place} is not JSON ({error}); give one object per line") from None
    content = content_of(entry) if isinstance(entry, dict) else None
    if content is not None:
        return Prompt(name, str(entry.get("question_id", number)), content)
    raise PromptError(f"{place} has no prompt; give an object with 'prompt', 'turns' or 'messages'")
