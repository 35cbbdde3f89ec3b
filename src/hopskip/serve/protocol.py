"""HTTP/1.1 as uvicorn speaks it, without connections that keep the others away: too many, or too slow."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from uvicorn.protocols.http.h11_impl import H11Protocol

from hopskip.serve.guard import error_body


class Connections:
    """Counts open connections, in all and by address.

    Args:
        most_of_address: of each address; connections without one (unix sockets) count for all only.
    """

    def __init__(self, most: int, most_of_address: int) -> None:
        self._most, self._most_of_address = most, most_of_address
        self._addresses: Counter[str] = Counter()
        self._num_open = 0

    def __len__(self) -> int:
        return self._num_open

    def enter(self, address: str | None) -> str:
        """Count one more. Returns why there is no room for it, empty if there is."""
        if self._num_open >= self._most:
            return f"{self._num_open} connections are open; at most {self._most} may be"
        if address is not None and self._addresses[address] >= self._most_of_address:
            number = self._addresses[address]
            return f"{number} connections of your address are open; at most {self._most_of_address} may be"
        self._num_open += 1
        if address is not None:
            self._addresses[address] += 1
        return ""

    def leave(self, address: str | None) -> None:
        """One that was counted has ended."""
        self._num_open -= 1
        if address is not None:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]


class CarefulProtocol(H11Protocol):
    """Closes connections that do not get to the point, with their first request or a later one; and refuses those for
    which there is no room."""

    open_connections: Connections
    header_seconds: float
    """From a connection's start, and from the first byte of each further request, to the end of its headers."""

    _timer: asyncio.TimerHandle | None = None
    _is_counted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        reason = self.open_connections.enter(self._address)
        if reason:
            transport.write(_refusal(reason))
            transport.close()
            return
        self._is_counted = True
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        if self._is_counted:
            self._is_counted = False
            self.open_connections.leave(self._address)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._start_timer()

    @property
    def _address(self) -> str | None:
        return self.client[0] if self.client else None

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol_of(connections: Connections, header_seconds: float) -> type[CarefulProtocol]:
    """The protocol of one server."""
    return type("Protocol", (CarefulProtocol,), {"open_connections": connections, "header_seconds": header_seconds})


def _refusal(reason: str) -> bytes:
    body = json.dumps(
        error_body(f"{reason}; try again later", kind="server_error", code="too_many_connections")
    ).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
