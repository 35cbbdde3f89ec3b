"""A server on a tiny random model, in a thread of its own, at a free port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from hopskip import LLM, SpeculativeConfig
from hopskip.engine import Engine
from hopskip.sequence import Sequence
from hopskip.serve.app import Server, create_app
from hopskip.serve.run import Runner, bind
from hopskip.serve.settings import ServeSettings
from tests.tiny import CHAT_TEMPLATE, byte_level_tokenizer, write_checkpoint, write_tokenizer

TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + ' Answer with <tool_call>' + '<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = "tiny"


def tiny_llm(folder: Path, draft: str = "both", **options: Any) -> LLM:
    """A random chat model of three layers, whose exit after the second one is right now and then."""
    if not (folder / "config.json").exists():
        write_checkpoint(folder, "smollm2")
        write_tokenizer(folder, chat_template=TOOLS_TEMPLATE, eos_token="<|im_end|>")
    exit_layer = 2 if draft in ("early-exit", "both") else None
    speculative = (
        SpeculativeConfig(draft="none")
        if draft == "none"
        else SpeculativeConfig(draft=draft, exit_layer=exit_layer, num_draft_tokens=4)  # type: ignore[arg-type]
    )
    return LLM(folder, speculative=speculative, backend="native", **options)


def tool_llm(folder: Path, **options: Any) -> LLM:
    """The same, with a token for each mark of the formats of tool calls, as their own models have them."""
    if not (folder / "config.json").exists():
        write_checkpoint(folder, "smollm2")
        tokenizer = byte_level_tokenizer(
            marks=("<tool_call>", "</tool_call>", "<think>", "</think>"),
            special_marks=("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
        )
        # it knows of tools, but saying what they are would not fit the tiny context
        template = CHAT_TEMPLATE + "{% if tools %}{% endif %}"
        write_tokenizer(folder, tokenizer, chat_template=template, eos_token="<|im_end|>")
    return tiny_llm(folder, draft="ngram", **options)


class Brake:
    """Lets no request of an engine go beyond its first few tokens until it is released, however fast the machine.

    A braked engine goes on taking orders: what is cancelled or aborted leaves.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._step = engine.step
        self._is_on = True
        engine.step = self._braked_step  # type: ignore[method-assign]

    def release(self) -> None:
        self._is_on = False

    @property
    def is_holding(self) -> bool:
        """True if a request has come as far as it may."""
        return self._is_on and any(len(sequence.tokens) > 3 for sequence in self._engine.running)

    def _braked_step(self, only: Seq[Sequence] | None = None, *, resting: Seq[Sequence] = ()) -> None:
        if self.is_holding:
            time.sleep(0.001)
        else:
            self._step(only, resting=resting)


@dataclass
class Live:
    """A server that runs."""

    url: str
    server: Server
    runner: Runner
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    errors: list[BaseException]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.runner.stop)


@contextmanager
def live_server(llm: LLM, *, shutdown_timeout: float = 0.5, **settings: Any) -> Iterator[Live]:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    app = create_app(llm, ServeSettings(model_name=MODEL, **settings))
    runner = Runner(app, host="127.0.0.1", port=port, shutdown_timeout=shutdown_timeout)
    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            loop.run_until_complete(runner.serve([listener]))
        except BaseException as error:
            errors.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    live = Live(f"http://127.0.0.1:{port}", app.state.server, runner, loop, thread, errors)
    try:
        while not runner.started and thread.is_alive():
            thread.join(0.01)
        assert thread.is_alive(), errors
        yield live
    finally:
        if thread.is_alive():
            live.stop()
        thread.join(20)
        assert not thread.is_alive()
        listener.close()
    assert not errors
