"""Responses that are kept in memory, to be gone on from."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stored:
    """A response, and what it was an answer to."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    """All that it was given, those of earlier responses too."""
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        size = sum(len(json.dumps(each)) for each in (self.response, *self.items))
        object.__setattr__(self, "num_bytes", size)


class _Shelf:
    """One client's."""

    def __init__(self) -> None:
        self.responses: OrderedDict[str, Stored] = OrderedDict()
        self.items: dict[str, tuple[dict[str, Any], str]] = {}
        """By their ids, each with the id of the last response that has it."""
        self.num_bytes = 0


class ResponseStore:
    """Keeps the responses used last. Clients do not see each other's.

    Args:
        max_responses: of one client.
        max_bytes: of one client; what several responses have in common counts for each.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._shelves: dict[str | None, _Shelf] = {}

    @property
    def is_on(self) -> bool:
        return self._max_responses > 0

    def put(self, client: str | None, stored: Stored) -> None:
        """Keep a response, instead of those that have not been used for longest."""
        shelf = self._shelves.setdefault(client, _Shelf())
        id = str(stored.response["id"])
        shelf.responses[id] = stored
        shelf.num_bytes += stored.num_bytes
        for item in (*stored.items, *stored.response["output"]):
            shelf.items[item["id"]] = (item, id)
        while len(shelf.responses) > self._max_responses or shelf.num_bytes > self._max_bytes:
            self._drop(shelf, next(iter(shelf.responses)))

    def get(self, client: str | None, id: str) -> Stored | None:
        """A response of this client; it counts as used."""
        shelf = self._shelves.get(client)
        if shelf is None or id not in shelf.responses:
            return None
        shelf.responses.move_to_end(id)
        return shelf.responses[id]

    def item(self, client: str | None, id: str) -> dict[str, Any] | None:
        """An item of one of this client's responses, or of what they were given; the response counts as used."""
        shelf = self._shelves.get(client)
        if shelf is None or id not in shelf.items:
            return None
        item, of_response = shelf.items[id]
        shelf.responses.move_to_end(of_response)
        return item

    def delete(self, client: str | None, id: str) -> bool:
        """Forget a response; False if there is none."""
        shelf = self._shelves.get(client)
        if shelf is None or id not in shelf.responses:
            return False
        self._drop(shelf, id)
        return True

    def _drop(self, shelf: _Shelf, id: str) -> None:
        stored = shelf.responses.pop(id)
        shelf.num_bytes -= stored.num_bytes
        for item in (*stored.items, *stored.response["output"]):
            if shelf.items.get(item["id"], (None, None))[1] == id:
                del shelf.items[item["id"]]
