"""`hopskip serve`: an OpenAI-compatible server."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopskip.cli.console import loading
from hopskip.cli.options import DraftOptions, LoadOptions, with_options
from hopskip.errors import ConfigError

if TYPE_CHECKING:
    from hopskip.llm import LLM

_SERVER, _CAPACITY = "Server", "Capacity"


@with_options
def serve(
    *,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.", rich_help_panel=_SERVER),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.", rich_help_panel=_SERVER)] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call the model.", show_default=False, rich_help_panel=_SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys, one a line; or in the environment: HOPSKIP_API_KEY.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer for this Host only; may be given several times (default: on a loopback address its names, "
            "elsewhere any).",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let pages of this origin call the API; may be given several times.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="After SIGTERM, running requests have so long to end.", rich_help_panel=_SERVER
        ),
    ] = 30.0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start the server again when it dies.", rich_help_panel=_SERVER)
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest sequence, prompt and output (default: the model's context, or what fits the memory).",
            show_default=False,
            rich_help_panel=_CAPACITY,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(metavar="N", help="Sequences that are stepped together.", rich_help_panel=_CAPACITY)
    ] = 16,
    max_queue: Annotated[
        int, typer.Option(metavar="N", help="Sequences that may wait; more get 429.", rich_help_panel=_CAPACITY)
    ] = 256,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for keys and values: 800MiB, 4GiB (default: 70 % of what is free).",
            show_default=False,
            rich_help_panel=_CAPACITY,
        ),
    ] = None,
    inherit_socket: Annotated[str | None, typer.Option(hidden=True)] = None,
    load: LoadOptions,
    draft: DraftOptions,
) -> None:
    """Serve a model over the OpenAI protocol, with a page to chat at `/`.

    Completions, chats, streams, tools, JSON schemas and grammars, metrics at `/metrics`. Needs `hopskip[serve]`.
    """
    _require_extra()
    from hopskip.serve.memory import free_memory, parse_size
    from hopskip.serve.run import bind, die_with_parent
    from hopskip.serve.settings import LOOPBACK, ServeSettings, model_name, read_api_keys

    if shutdown_timeout < 0:
        raise ConfigError(f"shutdown-timeout is {shutdown_timeout}; it must be 0 or above")
    budget = parse_size(kv_memory) if kv_memory is not None else None
    settings = ServeSettings(
        model_name=served_model_name or model_name(load.model),
        api_keys=read_api_keys(api_key_file),
        max_queue=max_queue,
        allowed_hosts=tuple(allowed_host) if allowed_host else (LOOPBACK if host in LOOPBACK else None),
        cors_origins=tuple(cors_origin or ()),
        exit_when_dead=inherit_socket is not None,
    )
    speculative = draft.config()
    if speculative.draft is None and speculative.verify != "reuse":
        speculative = replace(speculative, draft="auto")  # what pays depends on how many requests there are
    if inherit_socket is None:
        listener = bind(host, port)
        if restart:
            from hopskip.serve.supervisor import Supervisor

            listener.listen(1024)
            raise typer.Exit(Supervisor([sys.executable, "-m", "hopskip", *sys.argv[1:]], listener).run())
    else:
        listening, pipe = map(int, inherit_socket.split(","))
        listener = socket.socket(fileno=listening)
        die_with_parent(pipe)
    with loading(load.model, quiet=False) as progress:
        llm = load.load(speculative, max_model_len=max_model_len, max_num_seqs=max_num_seqs, progress=progress)
        llm.engine.reserve(free_memory() * 7 // 10 if budget is None else budget, shrink=max_model_len is None)
    raise typer.Exit(_run(llm, settings, listener, host, shutdown_timeout))


def _run(llm: LLM, settings: object, listener: socket.socket, host: str, shutdown_timeout: float) -> int:
    import asyncio

    from prometheus_client import disable_created_metrics

    from hopskip.serve.app import create_app
    from hopskip.serve.guard import log_to_stderr
    from hopskip.serve.run import Runner
    from hopskip.serve.settings import LOOPBACK, ServeSettings

    assert isinstance(settings, ServeSettings)
    log_to_stderr()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter, which nobody reads
    port = listener.getsockname()[1]
    engine = llm.engine
    print(
        f"serving {settings.model_name} at http://{f'[{host}]' if ':' in host else host}:{port} "
        f"({engine.max_num_seqs} sequences of {engine.max_model_len} tokens, draft {engine.speculative.draft})",
        flush=True,
    )
    if host not in LOOPBACK and not settings.api_keys:
        print("hopskip: warning: everybody who can connect is served; set HOPSKIP_API_KEY", file=sys.stderr)
    runner = Runner(create_app(llm, settings), host=host, port=port, shutdown_timeout=shutdown_timeout)
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
