"""What drivers of clients share: where the server is, what is asked, and how results are told.

A driver registers checks, each of a row (a client, or one of its ways) and a capability, and calls `report`: one line
of JSON goes to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any

URL = os.environ["CLIENTS_URL"]
"""Of the API, with `/v1`."""
ROOT = URL.removesuffix("/v1")
KEY = os.environ["CLIENTS_KEY"]
MODEL = os.environ["CLIENTS_MODEL"]

QUESTION = "Name three colours."
HISTORY: list[Any] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": QUESTION},
]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city", "parameters": CITY},
}
TOO_LONG = "word " * 20_000
"""More than the model's context."""

_checks: list[tuple[str, str, Callable[[], Any]]] = []


def check(capability: str, row: str = "") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a check: it passes if it returns, and says what is wrong by raising."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        _checks.append((row, capability, function))
        return function

    return register


def report(*packages: str) -> None:
    """Run all checks and print their results, with the versions of these packages."""
    results = []
    for row, capability, function in _checks:
        try:
            with redirect_stdout(sys.stderr):
                function()
            error = None
        except Exception as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"[:500]
        results.append({"row": row, "capability": capability, "error": error})
    print(json.dumps({"versions": {name: version(name) for name in packages}, "results": results}))


def arguments_ok(arguments: Any) -> None:
    """Of a call of TOOL, as JSON or what it stands for."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert given["city"] in ("Paris", "Rome"), given
    assert 1 <= given["days"] <= 9, given


def raises(kind: type[BaseException] | tuple[type[BaseException], ...], function: Callable[[], Any]) -> Any:
    """The error that a call must raise."""
    try:
        result = function()
    except kind as error:
        return error
    raise AssertionError(f"nothing was raised, but {result!r} returned")
