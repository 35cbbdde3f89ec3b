"""A server for benchmarks, in a thread of their own process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hopskip import LLM


@contextmanager
def serving(llm: LLM) -> Iterator[str]:
    """A server of a model, in a thread: its URL."""
    from hopskip.serve.app import create_app
    from hopskip.serve.run import Runner, bind
    from hopskip.serve.settings import ServeSettings

    listener = bind("127.0.0.1", 0)
    app = create_app(llm, ServeSettings(model_name="default"))
    runner = Runner(app, host="127.0.0.1", port=listener.getsockname()[1], shutdown_timeout=0)
    thread = threading.Thread(target=lambda: asyncio.run(runner.serve([listener])), daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join()
