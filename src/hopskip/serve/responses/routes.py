"""The routes of `/v1/responses`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from weakref import WeakValueDictionary

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hopskip.serve.door import Chats, dropped_header, typed_event
from hopskip.serve.policy import ParameterError
from hopskip.serve.responses import models, schema
from hopskip.serve.responses.answer import ResponseAnswer
from hopskip.serve.responses.store import ResponseStore, Stored
from hopskip.serve.responses.translate import translate

_STREAM = {"description": "The response, or with `stream` its events.", "content": {"text/event-stream": {}}}
_PAGE = 20
"""Items that a client gets who does not say how many."""


class _Responses:
    """What there is behind the routes: responses that are kept, and streams that run."""

    def __init__(self, server: Chats) -> None:
        settings = server.settings
        self._server = server
        self.store = ResponseStore(settings.max_stored_responses, settings.limits.stored_bytes)
        # a client's leaving may end a stream anywhere
        self._running: WeakValueDictionary[tuple[str | None, str], ResponseAnswer] = WeakValueDictionary()

    async def create(self, http: Request, request: schema.ResponseRequest) -> Response:
        server, client = self._server, http.state.client
        server.check(http, request)
        translated = translate(request, self.store, client)
        answer = await server.begin(http, translated.chat)
        is_stored = self.store.is_on and request.store is not False
        response = ResponseAnswer(request, translated, answer, server.settings.model_name, is_stored=is_stored)

        def keep(whole: dict[str, Any]) -> None:
            if is_stored:
                self.store.put(client, Stored(whole, translated.items))

        async def events() -> AsyncIterator[bytes]:
            self._running[client, response.id] = response
            try:
                async for event in response.events():
                    if event["type"] in ("response.completed", "response.incomplete"):
                        keep(event["response"])
                    yield typed_event(event)
            finally:
                self._running.pop((client, response.id), None)

        if request.stream:
            return server.stream(http, answer, events(), response.dropped)
        whole = response.whole(await server.whole(http, answer))
        keep(whole)
        return JSONResponse(whole, headers=dropped_header(response.dropped))

    def stored(self, http: Request, id: str) -> Stored:
        """Raises HTTPException: there is none."""
        found = self.store.get(http.state.client, id)
        if found is None:
            raise HTTPException(404, f"Response with id '{id[:64]}' not found.")
        return found

    def cancel(self, http: Request, id: str) -> dict[str, Any]:
        """Raises HTTPException or ParameterError: there is none, or it has ended."""
        if (response := self._running.get((http.state.client, id))) is not None:
            return response.cancel()
        self.stored(http, id)
        raise ParameterError("Cannot cancel a response that has ended.", param="id")


def routes(server: Chats) -> APIRouter:
    """The routes, and behind them the responses that are kept."""
    router = APIRouter(prefix="/v1/responses")
    responses = _Responses(server)

    @router.post("", responses={200: {"model": models.Response, **_STREAM}})
    async def create(http: Request, request: schema.ResponseRequest) -> Response:
        return await responses.create(http, request)

    @router.post("/input_tokens", responses={200: {"model": models.InputTokens}})
    async def input_tokens(http: Request, request: schema.PromptRequest) -> dict[str, Any]:
        """Tokens of the prompt that a response would have."""
        server.check(http, request)
        chat = translate(request, responses.store, http.state.client).chat
        return {"object": "response.input_tokens", "input_tokens": await server.count_tokens(chat)}

    @router.get("/{id}", responses={200: {"model": models.Response}})
    async def retrieve(http: Request, id: str, stream: bool = False) -> Response:
        if stream:
            raise ParameterError("stream is not supported here: only whole responses are kept", param="stream")
        return JSONResponse(responses.stored(http, id).response)

    @router.delete("/{id}", responses={200: {"model": models.Deleted}})
    async def delete(http: Request, id: str) -> dict[str, Any]:
        responses.stored(http, id)
        responses.store.delete(http.state.client, id)
        return {"id": id, "object": "response", "deleted": True}

    @router.get("/{id}/input_items", responses={200: {"model": models.Items}})
    async def input_items(
        http: Request,
        id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = _PAGE,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """What a response was given, those of the responses before it too; a page at a time."""
        items = responses.stored(http, id).items
        return _page(items if order == "asc" else items[::-1], limit, after)

    @router.post("/{id}/cancel", responses={200: {"model": models.Response}})
    async def cancel(http: Request, id: str) -> Response:
        """End a stream early: its last event has what there is."""
        return JSONResponse(responses.cancel(http, id))

    return router


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    if after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise ParameterError(f"after is '{after[:64]}', which is no item of this response", param="after")
        items = items[place + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
