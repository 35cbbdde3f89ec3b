"""Chats in files: what was said and the settings, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopskip.cli.talk.conversation import Exchange, Message
from hopskip.errors import ConfigError, shown
from hopskip.machine import replacing_file

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SavedChat:
    """What a file holds."""

    system: str | None
    exchanges: tuple[Exchange, ...]
    settings: Mapping[str, Any]
    model: str | None


def path_of(text: str) -> Path:
    """The file that was typed, with or without quotes.

    Raises:
        ConfigError: none was.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text or "\0" in text:
        raise ConfigError("name a file, such as chat.json")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ConfigError(f"{text}: {error}") from None


def save(path: Path, messages: list[Message], settings: Mapping[str, Any], model: str) -> None:
    """Write a chat, whole or not at all. A file that is there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {"hopskip_chat": _VERSION, "model": model, "settings": settings, "messages": messages}
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a file; name another")
        if not path.parent.is_dir():
            raise ConfigError(f"the folder {path.parent} does not exist; make it first, or name another file")
        with replacing_file(path.resolve()) as partial:
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:
        raise ConfigError(f"{path} cannot be written: {_reason(error)}") from None


def load(path: Path) -> SavedChat:
    """Read a chat.

    Raises:
        ConfigError: the file cannot be read, or is no chat; the message says why.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; name one" if path.exists() else f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no saved chat: it is not JSON ({error})") from None
    try:
        return _parse(content)
    except ConfigError as error:
        raise ConfigError(f"{path} is no saved chat: {error}") from None


def _parse(content: Any) -> SavedChat:
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise ConfigError('it has no list of "messages"')
    if content.get("hopskip_chat", _VERSION) != _VERSION:
        raise ConfigError(f"it is of version {shown(content['hopskip_chat'])}; this hopskip reads {_VERSION}")
    settings, model = content.get("settings", {}), content.get("model")
    if not isinstance(settings, dict):
        raise ConfigError('its "settings" are no object')
    messages = content["messages"]
    for number, message in enumerate(messages, start=1):
        _check_message(number, message)
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = messages[0]["content"] if has_system else None
    turns = messages[has_system:]
    for number, message in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            place = number + 1 + has_system
            raise ConfigError(f"message {place} is from {shown(message['role'])}, where {wanted!r} is expected")
    if len(turns) % 2:
        raise ConfigError("its last message has no answer")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return SavedChat(
        system=system,
        exchanges=tuple(Exchange(question["content"], answer["content"]) for question, answer in pairs),
        settings=settings,
        model=model if isinstance(model, str) else None,
    )


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise ConfigError(f'message {number} has no "role" and "content" that are texts')
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise ConfigError(f"message {number} is not valid Unicode") from None


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
