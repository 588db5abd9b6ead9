"""A reply that is streamed."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loadstone.core.engine import EngineError
from loadstone.core.refusals import error_body
from loadstone.serve.chat_replies import DONE, Usage, Wording, event
from loadstone.serve.chat_text import Reply
from loadstone.serve.disconnect import while_connected

Pieces = AsyncGenerator[str]
"""The text of a reply, piece by piece."""


class EventStream(Response):
    """Server-sent events as they come. The head is sent with the first of them, so that a failure before it is a
    status of its own. Hanging up closes ``events``."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(Request(scope, receive), self._send_all(send))

    async def _send_all(self, send: Send) -> Response:
        async with aclosing(self._events) as events:
            body = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            async for body in events:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        return self


async def events(
    wording: Wording, pieces: Pieces, reply: Reply, prompt_tokens: int, include_usage: bool
) -> AsyncGenerator[bytes]:
    """The events of one reply: role, content, reason of the end, usage where asked for, [DONE].

    An EngineError before the first piece is raised; later it is the last event, without [DONE].
    """
    opening = wording.first()
    try:
        async with aclosing(pieces):
            async for text in pieces:
                yield opening + wording.piece(text)
                opening = b""
    except EngineError as error:
        if opening or reply.tokens == 0:
            raise
        yield event(error_body(f"the model failed: {error}", "server_error", "engine_error"))
        return
    closing = opening + wording.last(reply.finish_reason)
    if include_usage:
        closing += wording.usage(Usage(prompt_tokens, reply.tokens))
    yield closing + DONE
