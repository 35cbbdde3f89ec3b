"""`hopskip serve`: an OpenAI-compatible server."""

from __future__ import annotations

import atexit
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hopskip.cli.console import load_llm
from hopskip.cli.options import DraftGroup, Group, LoadGroup, SamplingDefaults, with_options
from hopskip.errors import ConfigError
from hopskip.options import option

if TYPE_CHECKING:
    from hopskip.llm import LLM
    from hopskip.serve.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where to serve, to whom, and as what."""

    host: str = option("127.0.0.1", "Where to listen; 0.0.0.0 is everywhere.", "ADDRESS")
    port: int = option(8000, "0 takes a free one.", "N")
    uds: Path | None = option(None, "Listen on a unix socket instead.", "PATH")
    served_model_name: str | None = option(None, "What clients call the model.", "NAME")
    api_key_file: Path | None = option(None, "API keys, one a line; or in the environment: HOPSKIP_API_KEY.", "FILE")
    allowed_host: tuple[str, ...] = option(
        (),
        "Answer for this Host only; may be given several times (default: on a loopback address its names, "
        "elsewhere any).",
        "NAME",
    )
    cors_origin: tuple[str, ...] = option(
        (), "Let pages of this origin call the API; may be given several times.", "ORIGIN"
    )
    unknown_params: Literal["reject", "ignore", "warn"] = option(
        "reject", "What becomes of parameters that the API does not have."
    )
    chat_template: str | None = option(None, "A Jinja template in place of the model's own.", "FILE|TEXT")
    tool_format: Literal["auto", "hermes", "llama3", "json", "mistral", "mistral-args", "qwen3-coder"] = option(
        "auto", "How the model writes tool calls; auto is as its chat template does."
    )
    reasoning_format: Literal["auto", "none", "deepseek", "mistral"] = option(
        "auto",
        "Marks of a model's thoughts: those of its chat template, none (they stay in the text), <think> or [THINK].",
    )
    shutdown_timeout: float = option(30.0, "After SIGTERM, running requests have so long to end.", "SECONDS")
    restart: bool = option(False, "Start the server again when it dies.")

    def __post_init__(self) -> None:
        if self.uds is not None and (self.host, self.port) != (ServerOptions.host, ServerOptions.port):
            raise ConfigError("--uds leaves nothing to --host and --port; leave them out")
        if self.shutdown_timeout < 0:
            raise ConfigError(f"shutdown-timeout is {self.shutdown_timeout}; it must be 0 or above")


@dataclass(frozen=True, kw_only=True)
class CapacityOptions:
    """For how much a server has room."""

    max_model_len: int | None = option(
        None, "Longest sequence, prompt and output (default: the model's context, or what fits the memory).", "N"
    )
    max_num_seqs: int = option(16, "Sequences that are stepped together.", "N")
    max_queue: int = option(256, "Sequences that may wait; more get 429.", "N")
    max_connections: int = option(1024, "Connections that may be open; more get 503.", "N")
    max_connections_per_address: int = option(256, "Of them from one address, such as a proxy's.", "N")
    max_seqs_per_key: int | None = option(
        None, "Of them at most so many for one API key (default: three quarters, if there are several keys).", "N"
    )
    max_queue_per_key: int | None = option(
        None, "At most so many wait for one API key (default: half, if there are several keys).", "N"
    )
    max_tokens_per_key: int | None = option(
        None,
        "Tokens, prompts and outputs, that may run or wait for one API key (default: four times what the cache holds, "
        "if there are several keys).",
        "N",
    )
    max_stored_responses: int = option(
        256, "Responses of one API key that are kept in memory, for previous_response_id; 0 keeps none.", "N"
    )
    kv_memory: str | None = option(
        None, "Memory for keys and values: 800MiB, 4GiB (default: 70 % of what is free, on a GPU the card's).", "SIZE"
    )


@with_options
def serve(
    *,
    server: Annotated[ServerOptions, Group("Server")],
    capacity: Annotated[CapacityOptions, Group("Capacity")],
    inherit_socket: Annotated[str | None, typer.Option(hidden=True)] = None,
    load: LoadGroup,
    draft: DraftGroup,
    defaults: Annotated[SamplingDefaults, Group("Sampling")],
) -> None:
    """Serve a model over the OpenAI protocol, with a page to chat at `/`.

    Completions, chats, streams, tools, JSON schemas and grammars, metrics at `/metrics`. Needs `hopskip[serve]`.

    $ hopskip serve
    $ hopskip serve Qwen/Qwen3-4B --quantize q8 --host 0.0.0.0 --port 8000
    """
    _require_extra()
    from hopskip.serve.memory import free_memory, parse_size
    from hopskip.serve.run import bind, bind_unix, die_with_parent
    from hopskip.serve.settings import LOOPBACK, ServeSettings, model_name, read_api_keys
    from hopskip.text.chat_template import read_template

    budget = parse_size(capacity.kv_memory) if capacity.kv_memory is not None else None
    if server.chat_template is not None:
        read_template(server.chat_template)  # a wrong one is told of at once
    settings = ServeSettings(
        model_name=server.served_model_name or model_name(None if load.model is None else str(load.model)),
        api_keys=read_api_keys(server.api_key_file),
        max_queue=capacity.max_queue,
        max_connections=capacity.max_connections,
        max_connections_per_address=capacity.max_connections_per_address,
        max_seqs_per_key=capacity.max_seqs_per_key,
        max_queue_per_key=capacity.max_queue_per_key,
        max_tokens_per_key=capacity.max_tokens_per_key,
        max_stored_responses=capacity.max_stored_responses,
        allowed_hosts=server.allowed_host or (LOOPBACK if server.uds is None and server.host in LOOPBACK else None),
        cors_origins=server.cors_origin,
        unknown_params=server.unknown_params,
        tool_format=server.tool_format,
        reasoning_format=server.reasoning_format,
        exit_when_dead=inherit_socket is not None,
    )
    if draft.draft is None and draft.verify != "reuse":
        draft = replace(draft, draft="auto")  # what pays depends on how many requests there are
    if inherit_socket is None:
        listener = bind(server.host, server.port) if server.uds is None else bind_unix(server.uds)
        if server.uds is not None:
            atexit.register(server.uds.unlink, missing_ok=True)
        if server.restart:
            from hopskip.serve.supervisor import Supervisor

            listener.listen(1024)
            raise typer.Exit(Supervisor([sys.executable, "-m", "hopskip", *sys.argv[1:]], listener).run())
    else:
        listening, pipe = map(int, inherit_socket.split(","))
        listener = socket.socket(fileno=listening)
        die_with_parent(pipe)
    llm = load_llm(
        load,
        draft,
        max_model_len=capacity.max_model_len,
        max_num_seqs=capacity.max_num_seqs,
        generation_config=defaults.generation_config,
        chat_template=server.chat_template,
    )
    budget = budget or free_memory(llm.backend.traits.device) * 7 // 10
    llm.engine.reserve(budget, shrink=capacity.max_model_len is None)
    raise typer.Exit(_run(llm, settings, listener, server))


def _run(llm: LLM, settings: ServeSettings, listener: socket.socket, server: ServerOptions) -> int:
    import asyncio

    from prometheus_client import disable_created_metrics

    from hopskip.serve.app import create_app
    from hopskip.serve.guard import log_to_stderr
    from hopskip.serve.run import Runner
    from hopskip.serve.settings import LOOPBACK

    host, port = server.host, 0
    log_to_stderr()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter, which nobody reads
    if server.uds is None:
        port = listener.getsockname()[1]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    else:
        address = f"unix:{server.uds}"
    engine = llm.engine
    print(
        f"serving {settings.model_name} at {address} "
        f"({engine.max_num_seqs} sequences of {engine.max_model_len} tokens, draft {engine.speculative.draft})",
        flush=True,
    )
    if server.uds is None and host not in LOOPBACK and not settings.api_keys:
        print("hopskip: warning: everybody who can connect is served; set HOPSKIP_API_KEY", file=sys.stderr)
    runner = Runner(create_app(llm, settings), host=host, port=port, shutdown_timeout=server.shutdown_timeout)
    asyncio.run(runner.serve([listener]))
    return runner.exit_code


def _require_extra() -> None:
    import importlib.util

    missing = [
        name
        for name in ("fastapi", "uvicorn", "pydantic", "prometheus_client", "llguidance")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}, not installed: pip install 'hopskip[serve]'")
