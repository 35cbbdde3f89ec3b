"""Answers from an OpenAI-compatible server: many at once, tried again where that helps, kept as they come."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import httpx

from hopskip.errors import ConfigError, TrainingError, shown
from hopskip.train.exit.recipe import ServerRecipe
from hopskip.train.exit.turns import Chat

_MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that may be others soon."""
_REFUSED = (400, 413, 422)
"""Statuses of a chat that the server will not take, too long perhaps: it is left out."""
_LONGEST_PAUSE = 60.0


def ask_server(
    server: ServerRecipe,
    chats: Seq[Chat],
    path: Path,
    *,
    max_new_tokens: int,
    report: Callable[[str], None] = lambda line: None,
    doing: Callable[[float], None] = lambda share: None,
) -> list[Chat]:
    """Let a server answer every question of every chat, each with the answers before it. What it has answered is
    written to `path`, a JSON line for each chat, and not asked again.

    Returns:
        Those that were answered, in the order of `chats`.

    Raises:
        ConfigError: the server refuses the key, does not know the model or the address, or takes no chat at all.
        TrainingError: it does not answer any more; what it has answered stays.
    """
    found = _read(path)
    todo = [number for number in range(len(chats)) if number not in found]
    if todo:
        asyncio.run(_Client(server, path, max_new_tokens, doing).ask(chats, todo, found))
    refused = [found[number]["refused"] for number in sorted(found) if "refused" in found[number]]
    if refused:
        report(f"{server.url} refused {len(refused)} of {len(chats)} chats, the first with: {refused[0]}")
    if len(refused) == len(chats):
        raise ConfigError(f"{server.url} refused every chat, the first with: {refused[0]}")
    answered = (found[number] for number in range(len(chats)) if "messages" in found[number])
    return [Chat(tuple(a["messages"]), tuple(a["tools"]), tuple(a["unfinished"])) for a in answered]


def _read(path: Path) -> dict[int, Any]:
    """What has been written, by the numbers of chats. A line that was cut off is dropped from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return {row["chat"]: row for row in map(json.loads, whole.splitlines())}


class _Client:
    def __init__(self, server: ServerRecipe, path: Path, max_new_tokens: int, doing: Callable[[float], None]) -> None:
        self._server, self._path, self._max_new_tokens, self._doing = server, path, max_new_tokens, doing
        self._model = server.model

    async def ask(self, chats: Seq[Chat], todo: Seq[int], found: dict[int, Any]) -> None:
        server = self._server
        key = os.environ.get(server.api_key_env)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        limits = httpx.Limits(max_connections=server.concurrency)
        async with httpx.AsyncClient(
            base_url=server.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=server.timeout,
            limits=limits,
        ) as self._http:
            if self._model is None:
                self._model = await self._first_model()
            numbers = iter(todo)
            with self._path.open("a", encoding="utf-8") as self._file:
                num_workers = min(server.concurrency, len(todo))
                workers = [asyncio.create_task(self._work(chats, numbers, found)) for _ in range(num_workers)]
                try:
                    await asyncio.gather(*workers)
                finally:  # the first that fails ends all
                    for worker in workers:
                        worker.cancel()

    async def _work(self, chats: Seq[Chat], numbers: Any, found: dict[int, Any]) -> None:
        """Chat after chat, as long as there are some."""
        for number in numbers:
            try:
                row = {"chat": number, **await self._answer(chats[number])}
            except _RefusedError as error:
                row = {"chat": number, "refused": str(error)}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            found[number] = row
            self._doing(len(found) / len(chats))

    async def _answer(self, chat: Chat) -> dict[str, Any]:
        messages: list[Mapping[str, Any]] = []
        unfinished: list[int] = []
        for question in chat.questions:
            messages += question
            body = {
                "model": self._model,
                "messages": messages,
                "max_tokens": self._max_new_tokens,
                "temperature": 0,
                **({"tools": list(chat.tools)} if chat.tools else {}),
            }
            response = await self._request("POST", "chat/completions", json=body)
            try:
                choice = response["choices"][0]
                answer = {name: choice["message"].get(name) for name in ("content", "reasoning_content", "tool_calls")}
            except (KeyError, IndexError, TypeError, AttributeError):
                raise TrainingError(
                    f"{self._server.url} answers with {shown(response)}, which is no completion"
                ) from None
            if choice.get("finish_reason") == "length":
                unfinished.append(len(messages))
            messages.append({"role": "assistant", **{name: value for name, value in answer.items() if value}})
            if answer["tool_calls"]:
                break  # the next question follows what the tool would return
        return {"messages": messages, "tools": list(chat.tools), "unfinished": unfinished}

    async def _first_model(self) -> str:
        listed = await self._request("GET", "models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{self._server.url} lists no model; name one (collect.server.model)") from None

    async def _request(self, method: str, path: str, **options: Any) -> Any:
        """A request, tried again while that may help; its JSON."""
        place = f"{self._server.url} ({path})"
        for attempt in range(self._server.max_retries + 1):
            pause = min(_LONGEST_PAUSE, 2.0**attempt)
            try:
                response = await self._http.request(method, path, **options)
            except httpx.InvalidURL as error:
                raise ConfigError(f"collect.server.url is {self._server.url!r}: {error}") from None
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.is_success:
                    try:
                        return response.json()
                    except ValueError:
                        raise ConfigError(f"{place} does not answer with JSON; is the address right?") from None
                reason = f"{response.status_code}: {_message(response)}"
                if response.status_code in _REFUSED:
                    raise _RefusedError(reason)
                if response.status_code not in _MAY_PASS:
                    raise ConfigError(f"{place} says {reason}; check collect.server (url, model, api_key_env)")
                after = response.headers.get("retry-after", "")
                pause = min(_LONGEST_PAUSE, float(after)) if after.isdecimal() else pause
            if attempt < self._server.max_retries:
                await asyncio.sleep(pause)
        raise TrainingError(
            f"{place} does not answer ({reason}), tried {self._server.max_retries + 1} times; what it has answered "
            "stays: run the same command again to go on"
        )


class _RefusedError(Exception):
    """The server will not take this chat."""


def _message(response: httpx.Response) -> str:
    """What an error says, in one line."""
    try:
        error = response.json()["error"]
        text = error["message"] if isinstance(error, Mapping) else error
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200]
