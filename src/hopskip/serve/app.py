"""The routes. `create_app` makes the ASGI application that `hopskip serve` runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from hopskip.errors import HopskipError
from hopskip.llm import LLM
from hopskip.serve import models, schema
from hopskip.serve.answers import Answer, event
from hopskip.serve.anthropic import routes as anthropic
from hopskip.serve.anthropic.errors import AnthropicErrors
from hopskip.serve.door import ChatAnswer, dropped_header
from hopskip.serve.engine_thread import BusyError, EngineThread, GenerationError, UnavailableError
from hopskip.serve.guard import Guard, error_body
from hopskip.serve.jobs import Planner
from hopskip.serve.logprobs import token_text
from hopskip.serve.metrics import Metrics
from hopskip.serve.policy import ParameterError, describe, refuse_unknown, unknown_params
from hopskip.serve.responses import routes as responses
from hopskip.serve.settings import ServeSettings
from hopskip.text.requests import text_stream

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_log = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_NAMES_LOGGED = 20
_Error = {"description": "An error in OpenAI's shape.", "model": models.Error}
_RESPONSES: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 408, 413, 421, 429, 431, 500, 503), _Error)

_HEALTH: dict[int | str, dict[str, Any]] = {200: {"model": models.Health}, 503: {"model": models.Health}}

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The page runs scripts and styles from here, calls this server, and nothing else; text never becomes markup."""
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


class Server:
    """The state behind the routes: one model, its engine's thread, its metrics."""

    def __init__(self, llm: LLM, settings: ServeSettings) -> None:
        self.llm = llm
        self.settings = settings
        self.planner = Planner(llm, settings)
        self.metrics = Metrics(settings.model_name)
        engine = llm.engine
        engine.max_seqs_per_client = settings.seqs_per_key(engine.max_num_seqs)
        self.engine = EngineThread(
            engine,
            partial(text_stream, llm.tokenizer),
            max_queue=settings.max_queue,
            room_of_client=settings.room_per_key(engine.max_num_seqs, engine.max_model_len),
            observer=self.metrics,
        )

    async def begin(self, http: Request, request: schema.ChatRequest | schema.CompletionRequest) -> Answer:
        """Let the engine begin with an answer. Whoever takes it must `cancel` it in the end.

        Raises:
            HTTPException: the request is for another model.
            HopskipError: it cannot be served, or not now.
        """
        self.check(http, request)
        if isinstance(request, schema.ChatRequest):
            plan = await self.planner.chat(request)
        else:
            plan = await self.planner.completion(request)
        jobs = [job.of_client(http.state.client, request.cache_salt) for job in plan.jobs]
        batch = await self.engine.submit(jobs, is_race=plan.is_race)
        return Answer(request, plan, batch, self.llm, self.settings.model_name, http.state.request_id)

    async def answer(self, http: Request, request: schema.ChatRequest | schema.CompletionRequest) -> Response:
        """Generate, as a whole or as a stream; the client's leaving ends it."""
        answer = await self.begin(http, request)
        if request.stream:
            return self.stream(http, answer, _openai_events(answer), answer.dropped)
        return JSONResponse(await self.whole(http, answer), headers=dropped_header(answer.dropped))

    async def whole(self, http: Request, answer: ChatAnswer) -> dict[str, Any]:
        """All of an answer; the client's leaving ends it.

        Raises:
            ConnectionResetError: the client has left.
        """
        try:
            return await unless_disconnected(http, answer.whole())
        finally:
            answer.cancel()

    def stream(
        self, http: Request, answer: ChatAnswer, events: AsyncIterator[bytes], dropped: Seq[str]
    ) -> StreamingResponse:
        """A stream of server-sent events; the client's leaving ends the answer, and so does the stream's end."""

        async def watched() -> AsyncIterator[bytes]:
            gone = asyncio.create_task(_disconnected(http))
            # a client that leaves while nothing is there to be sent must be noticed too
            gone.add_done_callback(lambda task: None if task.cancelled() else answer.cancel())
            try:
                async for part in events:
                    yield part
            finally:
                gone.cancel()
                answer.cancel()

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **dropped_header(dropped)}
        return StreamingResponse(watched(), media_type="text/event-stream", headers=headers)

    async def count_tokens(self, request: schema.ChatRequest) -> int:
        """Tokens of the prompt that a chat would have."""
        return len(await self.planner.chat_prompt(request))

    def check(self, http: Request, request: schema.Parameters) -> None:
        """Whether a request is for this model, and its parameters are known.

        Raises:
            HTTPException: it is for another model.
            ParameterError: a parameter is not known, and the settings refuse such.
        """
        self.check_model(getattr(request, "model", None))
        if self.settings.unknown_params == "reject":
            refuse_unknown(request)
        elif self.settings.unknown_params == "warn":
            names = [name for name, _ in unknown_params(request)][:_NUM_NAMES_LOGGED]
            if names:
                fields = {"request_id": http.state.request_id, "params": names}
                _log.warning("parameters are ignored that this API does not have", extra={"fields": fields})

    def check_model(self, name: str | None) -> None:
        """Raises HTTPException: the request is for another model."""
        if name is not None and name != self.settings.model_name:
            raise HTTPException(404, f"the model {name[:200]!r} is not served here; {self.settings.model_name!r} is")

    def model_card(self) -> dict[str, Any]:
        engine, config = self.llm.engine, self.llm.backend.config
        speculative = engine.speculative
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "hopskip",
            "max_model_len": engine.max_model_len,
            "hopskip": {
                "recommended_sampling": self.llm.recommended_sampling,
                "num_hidden_layers": config.num_hidden_layers,
                "max_num_seqs": engine.max_num_seqs,
                "has_chat_template": self.llm.tokenizer.has_chat_template,
                "has_tools": self.llm.tokenizer.has_chat_template,
                "draft": speculative.draft,
                "exit_layer": speculative.exit_layer,
                "num_draft_tokens": speculative.num_draft_tokens,
                "verify": speculative.verify,
            },
        }


def create_app(llm: LLM, settings: ServeSettings) -> FastAPI:
    """The application. Its engine runs from startup to shutdown; `app.state.server` is its `Server`."""
    server = Server(llm, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await server.engine.stop()
        await server.planner.close()

    app = FastAPI(
        title="hopskip",
        summary="OpenAI-compatible API of a self-speculative engine",
        lifespan=lifespan,
        docs_url=None,  # both would fetch scripts from elsewhere
        redoc_url=None,
        responses=_RESPONSES,
    )
    app.state.server = server
    _add_routes(app, server)
    app.include_router(responses.routes(server))
    app.include_router(anthropic.routes(server))
    _add_error_handlers(app)
    app.add_middleware(Guard, settings=settings, on_response=server.metrics.on_response)
    app.add_middleware(AnthropicErrors, path=anthropic.PATH)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-hopskip-dropped", "retry-after"],
        )
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    engine, planner = server.engine, server.planner

    @app.post("/v1/completions", responses=_answer(models.Completion, models.Completion))
    async def completions(http: Request, request: schema.CompletionRequest) -> Response:
        return await server.answer(http, request)

    @app.post("/v1/chat/completions", responses=_answer(models.ChatCompletion, models.ChatChunk))
    async def chat_completions(http: Request, request: schema.ChatRequest) -> Response:
        return await server.answer(http, request)

    @app.get("/v1/models", response_model=models.ModelList)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model_card()]}

    @app.get("/v1/models/{name:path}", response_model=models.ModelCard)
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model_card()

    @app.post("/tokenize", response_model=models.Tokens)
    async def tokenize(http: Request, request: schema.TokenizeRequest) -> dict[str, Any]:
        server.check(http, request)
        tokens = await planner.tokenize(request)
        strings = [token_text(server.llm.tokenizer, token) for token in tokens] if request.return_token_strs else None
        max_model_len = server.llm.engine.max_model_len
        return {"tokens": tokens, "count": len(tokens), "max_model_len": max_model_len, "token_strs": strings}

    @app.post("/detokenize", response_model=models.Prompt)
    async def detokenize(http: Request, request: schema.DetokenizeRequest) -> dict[str, Any]:
        server.check(http, request)
        decode = partial(server.llm.tokenizer.decode, skip_special_tokens=False)
        return {"prompt": await asyncio.to_thread(decode, request.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The template and special tokens, as vLLM tells them to lm-eval and others that count tokens themselves."""
        tokenizer = server.llm.tokenizer
        return {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens}

    @app.get("/health", responses=_HEALTH)
    async def health() -> Response:
        """Whether requests are answered: 200 or 503."""
        if engine.death is not None:
            return JSONResponse({"status": "dead"}, 503)
        if not engine.is_ready:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/health/live", responses=_HEALTH)
    async def live() -> Response:
        """Whether the engine lives; a server that drains does."""
        return JSONResponse({"status": "ok" if engine.death is None else "dead"}, 200 if engine.death is None else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page_files = _read_page()
    html = page_files.pop("index.html")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page_response(*html)

    @app.get("/page/{name:path}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in page_files:
            raise HTTPException(404, "the page has no such file")
        return _page_response(*page_files[name])


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = describe(error.errors(), error.body)
        return JSONResponse(error_body(message, param=param), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        code = "model_not_found" if "is not served here" in error.detail else None
        return JSONResponse(error_body(error.detail, code=code), error.status_code, headers=error.headers)

    @app.exception_handler(HopskipError)
    async def unserved(_: Request, error: HopskipError) -> Response:
        if isinstance(error, BusyError):
            body = error_body(str(error), kind="rate_limit_error", code="queue_full")
            return JSONResponse(body, 429, headers={"Retry-After": str(error.retry_after)})
        if isinstance(error, UnavailableError):
            body = error_body(str(error), kind="server_error", code="unavailable")
            return JSONResponse(body, 503, headers={"Retry-After": "5"})
        if isinstance(error, GenerationError):
            return JSONResponse(error_body(str(error), kind="server_error"), 500)
        if isinstance(error, ParameterError):
            return JSONResponse(error_body(str(error), param=error.param, code=error.code), 400)
        return JSONResponse(error_body(str(error)), 400)


def _answer(whole: Any, chunk: Any) -> dict[int | str, dict[str, Any]]:
    """How an answer is described: as a whole, or as a stream."""
    events = {"type": "string", "description": f"Events with {chunk.__name__} as data; the last data is `[DONE]`."}
    content = {"text/event-stream": {"schema": events}}
    return {200: {"model": whole, "content": content, "description": "The answer, or with `stream` its events."}}


async def _openai_events(answer: Answer) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.chunks():
            yield event(chunk)
        yield event("[DONE]")
    except UnavailableError as error:
        yield event(error_body(str(error), kind="server_error", code="unavailable"))
    except HopskipError as error:
        yield event(error_body(str(error), kind="server_error"))


async def unless_disconnected(http: Request, work: Awaitable[T]) -> T:
    """Await `work`, or drop it when the client leaves.

    Raises:
        ConnectionResetError: the client has left.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionResetError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    receive: Callable[[], Awaitable[Any]] = http.receive
    while (await receive())["type"] != "http.disconnect":
        pass


def _read_page(folder: Traversable | None = None, prefix: str = "") -> dict[str, tuple[bytes, str]]:
    """Content and media type of the page's files, by their paths in its folder."""
    found: dict[str, tuple[bytes, str]] = {}
    for entry in (folder or files("hopskip.serve") / "page").iterdir():
        if entry.is_dir():
            found |= _read_page(entry, f"{prefix}{entry.name}/")
        elif (suffix := Path(entry.name).suffix) in _PAGE_TYPES:
            found[prefix + entry.name] = (entry.read_bytes(), _PAGE_TYPES[suffix])
    return found


def _page_response(content: bytes, media_type: str) -> Response:
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # files of two versions do not go together
    }
    return Response(content, headers=headers, media_type=media_type)
