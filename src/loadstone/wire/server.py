"""The server side of HTTP/1.1: bytes in, ``handler(request, response)``, bytes out. No task for each request.

A request reaches the handler once it is complete. The handler keeps the ``Response`` and answers whenever it likes.
Requests that a client pipelines wait in order until the one before has been answered. What cannot be understood, is
too large or too slow never reaches the handler: it is answered 400, 408, 413, 417, 431, 501 or 505, and the
connection closed. Such a refusal is final: bytes behind it are not looked at.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from loadstone.wire.hangups import HangupWatch
from loadstone.wire.head_memo import HeadMemo
from loadstone.wire.request_head import RejectedError, RequestHead
from loadstone.wire.request_reader import IncomingRequest, Phase
from loadstone.wire.response import Headers, Response
from loadstone.wire.server_connection import ServerConnection

__all__ = ["ErrorBody", "Handler", "Headers", "HttpServer", "IncomingRequest", "RequestHead", "Response"]

Handler = Callable[[IncomingRequest, Response], None]
ErrorBody = Callable[[int, str], tuple[Headers, bytes]]
"""Status and reason → headers and body of a refusal."""

_SWEEP_S = 1.0


class HttpServer:
    """Listens on one address and hands every complete request to ``handler``. Deadlines are kept to within 1 s.

    Of a request, the head must be complete ``head_timeout_s`` after its first byte, and the body ``body_timeout_s``
    after the head, plus a second for each 64 KiB received. A connection without a request is closed after
    ``idle_timeout_s``; one whose client has fallen behind (``Response.congested``) and takes nothing for
    ``write_stall_s`` is cut.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        name: bytes = b"",
        max_body_bytes: int = 16 * 1024 * 1024,
        head_timeout_s: float = 10.0,
        body_timeout_s: float = 60.0,
        idle_timeout_s: float = 75.0,
        write_stall_s: float = 30.0,
        error_body: ErrorBody | None = None,
        on_reject: Callable[[int], None] | None = None,
    ) -> None:
        self.handler = handler
        self.name_line = b"server: %b\r\n" % name if name else b""
        self.max_body_bytes = max_body_bytes
        self.allowed_s = {Phase.IDLE: idle_timeout_s, Phase.HEAD: head_timeout_s, Phase.BODY: body_timeout_s}
        self.idle_timeout_s = idle_timeout_s
        self.write_stall_s = write_stall_s
        self.draining = False
        self.connections: set[ServerConnection] = set()
        self.heads: HeadMemo[RequestHead] = HeadMemo()
        self._error_body = error_body or _plain_body
        self._on_reject = on_reject
        self._hangups: HangupWatch | None = None
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (a free one for 0). Raises OSError where the address cannot be had."""
        loop = asyncio.get_running_loop()
        self.draining = False
        self._listener = await loop.create_server(
            lambda: cast(asyncio.Protocol, ServerConnection(self, loop)), host, port, backlog=4096
        )
        sockets = cast(Any, self._listener).sockets  # a tuple of asyncio, a list of uvloop
        bound: int = sockets[0].getsockname()[1]
        return bound

    async def drain(self) -> None:
        """Listen no more, answer what is under way, each with ``Connection: close``; returns when all are gone."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.drain()
        await self._until_empty()

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._listener is None:
            return
        self.draining = True  # a connection accepted before may yet be announced
        self._listener.close()
        for connection in tuple(self.connections):
            connection.abort()
        await self._until_empty()
        await self._listener.wait_closed()
        self._listener = None
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._hangups is not None:
            self._hangups.close()
            self._hangups = None

    async def _until_empty(self) -> None:
        self._empty.clear()
        if self.connections:
            await self._empty.wait()

    # -- for its connections ------------------------------------------------------------------------------------

    def remember(self, connection: ServerConnection) -> None:
        """A connection has begun."""
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def forget(self, connection: ServerConnection, watched_fd: int) -> None:
        """A connection has ended; its socket, perhaps watched for a hang-up, is about to be closed."""
        self.connections.discard(connection)
        if self._hangups is not None:
            self._hangups.forget(watched_fd)
        if not self.connections:
            self._empty.set()

    def watch_hangup(self, fd: int, on_hangup: Callable[[], None]) -> None:
        """This client sends no more; tell when it has gone."""
        if self._hangups is None:
            self._hangups = HangupWatch(asyncio.get_running_loop())
        self._hangups.watch(fd, on_hangup)

    def refusal(self, rejected: RejectedError) -> tuple[Headers, bytes]:
        """Headers and body for a request that the handler does not see."""
        if self._on_reject is not None:
            self._on_reject(rejected.status)
        return self._error_body(rejected.status, rejected.reason)

    def _sweep(self) -> None:
        """One timer for all deadlines: with 9,000 idle connections this takes 1–2 ms a second."""
        self._sweeper = None
        if not self.connections:
            return
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)
        now_s = loop.time()
        for connection in [one for one in self.connections if one.deadline_s <= now_s]:
            connection.overdue(now_s)

    def __repr__(self) -> str:
        state = "stopped" if self._listener is None else "draining" if self.draining else "listening"
        return f"<HttpServer {state}, {len(self.connections)} connections>"


def _plain_body(status: int, reason: str) -> tuple[Headers, bytes]:
    return [(b"content-type", b"text/plain")], f"{HTTPStatus(status).phrase}: {reason}\n".encode()
