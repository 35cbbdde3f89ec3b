"""What every request passes before it reaches a route: a request id, a log line, and everything that refuses it.

Plain ASGI, so that a disconnect reaches the routes as it comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hopskip.serve.settings import ServeSettings

_log = logging.getLogger("hopskip.serve.access")

_OPEN_PATHS = ("/health", "/health/live")


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    """An error as OpenAI writes it."""
    # a lone surrogate of a client's JSON cannot be written as UTF-8
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Refusal(Exception):  # noqa: N818 (not an error of ours)
    """The request goes no further."""

    def __init__(self, status: int, message: str, *, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        kind = "authentication_error" if status == 401 else "invalid_request_error"
        self.response = JSONResponse(error_body(message, kind=kind, code=code), status, headers=headers)


class Guard:
    """Middleware around the whole application.

    Args:
        on_response: told method, route and status of every answer.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, on_response: Callable[[str, str, int], None]) -> None:
        self._app = app
        self._settings = settings
        self._on_response = on_response
        self._keys = [_digest(key) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn, which knows better, sends no body
        request = Request(scope)
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {}).update(request_id=request_id, client=None)
        started = time.perf_counter()
        status = 499  # the client has gone before there was an answer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await asyncio.wait_for(send(message), self._settings.limits.send_seconds)

        try:
            try:
                scope["state"]["client"] = self._check(request)
                body = await self._read_body(request, receive)
            except Refusal as refusal:
                await refusal.response(scope, receive, watched_send)
            else:
                await self._app(scope, _replay(body, receive), watched_send)
        except (asyncio.TimeoutError, OSError):
            pass  # it reads no more, or has gone: its requests have been cancelled on the way here
        except Exception as error:
            _log.error("a request has failed", exc_info=error, extra={"fields": {"request_id": request_id}})
            if status == 499:
                message = f"the server has failed on this request; its log says why, under {request_id}"
                await JSONResponse(error_body(message, kind="server_error"), 500)(scope, receive, watched_send)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._on_response(method if len(method) < 8 else "other", path, status)
            _log.info(
                "request",
                extra={
                    "fields": {
                        "request_id": request_id,
                        "method": method[:16],
                        "path": scope["path"][:200],
                        **_id_of_client(request),
                        "status": status,
                        "seconds": round(time.perf_counter() - started, 4),
                    }
                },
            )

    def _check(self, request: Request) -> str | None:
        """Returns a name for the client: that of its API key, which tells nothing of the key."""
        settings = self._settings
        target = len(request.scope.get("raw_path") or b"") + len(request.scope["query_string"])
        size = target + sum(len(name) + len(value) for name, value in request.scope["headers"])
        if size > settings.limits.header_bytes:
            message = f"address and headers are larger than {settings.limits.header_bytes} bytes"
            raise Refusal(431, message, connection="close")
        hosts = settings.allowed_hosts
        if hosts is not None:
            host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower()
            if host not in hosts:
                raise Refusal(421, f"this server does not answer for that Host; it answers for: {', '.join(hosts)}")
        if self._keys and request.url.path not in _OPEN_PATHS:
            named = (
                _credentials(request.headers.get("authorization", "")) or request.headers.get("x-api-key", "").strip()
            )
            given = _digest(named)
            # all of them, however early one fits: how long it takes must tell nothing
            if sum(hmac.compare_digest(given, key) for key in self._keys) == 0:
                raise Refusal(
                    401,
                    "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    **{"WWW-Authenticate": 'Basic realm="hopskip", charset="UTF-8"'},
                )
            return given.hex()[:16]
        return None

    async def _read_body(self, request: Request, receive: Receive) -> bytes:
        limit = self._settings.limits.body_bytes
        too_large = Refusal(413, f"the request is larger than {limit} bytes", connection="close")
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limit:
            raise too_large
        body = bytearray()
        deadline = time.monotonic() + self._settings.limits.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise Refusal(408, "the request's body did not come in time", connection="close") from None
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the application the body that has been read, then whatever comes."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _id_of_client(request: Request) -> dict[str, str]:
    """What a client calls its request, for the log."""
    given = request.headers.get("x-request-id", "")
    return {"client_request_id": given[:128]} if given else {}


def _credentials(authorization: str) -> str:
    """The key of a bearer token, or the password that a browser has asked for."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


class JSONLines(logging.Formatter):
    """One JSON object per line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Structured logs of hopskip and uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for name in ("hopskip.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
