"""What the routes of other protocols need of the server: they are translations onto its one way to answer chats."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import StreamingResponse

from hopskip.sampling_params import SamplingParams
from hopskip.serve.events import line_of
from hopskip.serve.policy import ParameterError
from hopskip.serve.schema import ChatRequest, Parameters, Sampling
from hopskip.serve.settings import ServeSettings


class ChatAnswer(Protocol):
    """A chat's answer as it grows."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Parts of the request's JSON schemas that are not enforced."""

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompt."""

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen."""

    @property
    def usage(self) -> dict[str, Any]:
        """Of tokens so far, in OpenAI's shape."""

    @property
    def stop_text(self) -> str | None:
        """Which of the request's stop texts has ended it."""

    def whole(self) -> Any:
        """Awaited, the answer in OpenAI's shape."""

    def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream in OpenAI's shape."""

    def cancel(self) -> None:
        """End it, if it has not ended."""


class Chats(Protocol):
    """The server, as far as the routes of other protocols know it."""

    settings: ServeSettings

    def check(self, http: Request, request: Parameters) -> None:
        """Raises HTTPException or ParameterError: another model, or a parameter that is not known."""

    async def begin(self, http: Request, request: ChatRequest) -> ChatAnswer:
        """Let the engine begin with an answer. Whoever takes it must `cancel` it in the end."""

    async def whole(self, http: Request, answer: ChatAnswer) -> dict[str, Any]:
        """All of an answer, unless its client leaves."""

    def stream(
        self, http: Request, answer: ChatAnswer, events: AsyncIterator[bytes], dropped: Seq[str]
    ) -> StreamingResponse:
        """A stream of server-sent events; the client's leaving ends the answer, and so does the stream's end."""

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of the prompt that a chat would have."""


def chat_request(given: Parameters, **values: Any) -> ChatRequest:
    """A chat with the sampling parameters of a request in another protocol, and other values.

    Raises:
        ParameterError: these do not go together.
    """
    for name in Sampling.model_fields:
        if name in given.model_fields_set and name != "model":
            values.setdefault(name, getattr(given, name))
    try:
        return ChatRequest.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ParameterError(message) from None


def typed_event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event that has its type as its name too."""
    return f"event: {data['type']}\ndata: {line_of(data)}\n\n".encode()


def dropped_header(dropped: Seq[str]) -> dict[str, str]:
    """Tells of the parts of a JSON schema that are not enforced; the answer's `hopskip.dropped` has them whole."""
    text = "; ".join(dropped).encode("ascii", "backslashreplace").decode()
    return {"x-hopskip-dropped": "".join(c if c.isprintable() else " " for c in text)[:1000]} if dropped else {}
