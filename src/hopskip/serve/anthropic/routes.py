"""The routes of `/v1/messages`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hopskip.serve.anthropic import models, schema
from hopskip.serve.anthropic.answer import MessageAnswer
from hopskip.serve.anthropic.translate import translate
from hopskip.serve.door import Chats, dropped_header, typed_event

PATH = "/v1/messages"
_STREAM = {"description": "The message, or with `stream` its events.", "content": {"text/event-stream": {}}}


def routes(server: Chats) -> APIRouter:
    """The routes, for `AnthropicErrors` to go around."""
    router = APIRouter(prefix=PATH, responses={400: {"model": models.Error}})

    @router.post("", responses={200: {"model": models.Message, **_STREAM}})
    async def create(http: Request, request: schema.MessagesRequest) -> Response:
        server.check(http, request)
        chat, dropped = translate(request)
        answer = await server.begin(http, chat)
        message = MessageAnswer(answer, server.settings.model_name, dropped)

        async def events() -> AsyncIterator[bytes]:
            async for event in message.events():
                yield typed_event(event)

        if request.stream:
            return server.stream(http, answer, events(), message.dropped)
        whole = message.whole(await server.whole(http, answer))
        return JSONResponse(whole, headers=dropped_header(message.dropped))

    @router.post("/count_tokens", responses={200: {"model": models.Count}})
    async def count_tokens(http: Request, request: schema.Prompt) -> dict[str, Any]:
        """Tokens of the prompt that a message would have."""
        server.check(http, request)
        chat, _ = translate(request)
        return {"input_tokens": await server.count_tokens(chat)}

    return router
