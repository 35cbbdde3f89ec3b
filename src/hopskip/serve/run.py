"""Running the application: uvicorn, signals, and what happens on the way down."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hopskip.errors import ConfigError
from hopskip.serve.engine_thread import EngineThread
from hopskip.serve.protocol import Connections, protocol_of
from hopskip.serve.settings import ServeSettings

_log = logging.getLogger(__name__)

_DEATH_CHECK_SECONDS = 0.5
_OTHER_FILES = 256
"""Open at one time, beside connections."""


class Runner(uvicorn.Server):
    """Serves until told to stop. The first SIGTERM or SIGINT drains: new requests are refused with 503, those there
    are have `shutdown_timeout` seconds to end. A second one aborts them.

    Args:
        app: of `create_app`.
        shutdown_timeout: seconds.
    """

    def __init__(self, app: FastAPI, *, host: str, port: int, shutdown_timeout: float) -> None:
        self._engine: EngineThread = app.state.server.engine
        self._settings: ServeSettings = app.state.server.settings
        limits = self._settings.limits
        self.connections = Connections(self._settings.max_connections, self._settings.max_connections_per_address)
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol_of(self.connections, limits.header_seconds),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_graceful_shutdown=5,
            )
        )
        self._shutdown_timeout = shutdown_timeout
        self._stopping: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.exit_code = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        _allow_open_files(self._settings.max_connections + _OTHER_FILES)
        watching = asyncio.create_task(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come (uvicorn's hook)."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """The first call drains, the second aborts. Called in the event loop."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._drain())
        else:
            _log.warning("aborting %d sequences", self._engine.num_outstanding)
            self._abort()

    async def _drain(self) -> None:
        engine = self._engine
        _log.info("draining %d sequences, for at most %g s", engine.num_outstanding, self._shutdown_timeout)
        if await engine.drain(self._shutdown_timeout):
            # answers have ended; give the last bytes of them the time to leave
            self.should_exit = True
        else:
            _log.warning("aborting %d sequences: the time is over", engine.num_outstanding)
            self._abort()

    def _abort(self) -> None:
        self.exit_code = 1
        self._engine.abort_all()
        self.should_exit = True

    async def _watch(self) -> None:
        """End the process when the engine has died, if that is wanted."""
        while True:
            await asyncio.sleep(_DEATH_CHECK_SECONDS)
            if self._engine.death is not None and self._settings.exit_when_dead:
                _log.critical("exiting: %s", self._engine.death)
                self.exit_code = 1
                await asyncio.sleep(_DEATH_CHECK_SECONDS)  # for the errors to reach their clients
                self.should_exit = True
                return


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; before the model is loaded, so that a taken port costs no time.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}); use another --host or --port") from None
    listener.set_inheritable(True)
    return listener


def bind_unix(path: Path) -> socket.socket:
    """A listening unix socket; who connects waits until somebody serves. One that was left behind is replaced.

    Raises:
        ConfigError: the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                try:
                    other.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
        listener.bind(str(path))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path} ({error.strerror or error}); use another --uds") from None
    listener.set_inheritable(True)
    return listener


def _allow_open_files(number: int) -> None:
    """Let this process have so many files open, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def die_with_parent(pipe: int) -> None:
    """Take the end of this pipe, which the parent holds open, for a SIGTERM: no worker outlives its supervisor."""

    def wait() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="hopskip-parent", daemon=True).start()
