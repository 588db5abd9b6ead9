"""The server side of HTTP/1.1: bytes in, ``handler(request, response)``, bytes out. No task for each request.

A request reaches the handler once it is complete. The handler keeps the ``Response`` and answers whenever it likes, by
``reply`` or by ``start`` … ``write`` … ``end``. Requests that a client pipelines wait in order until the one before has
been answered. What cannot be understood is answered 400, 413 or 431, and the connection closed.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus

import httptools

_MOST_HEAD_BYTES = 64 * 1024
_MOST_HEADERS = 256
_MOST_PIPELINED = 16
_LINGER_S = 2.0
"""A refused client may still be sending: closing at once would reset the connection before it has read why."""

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(slots=True)
class IncomingRequest:
    """One complete request."""

    method: str
    path: str
    """Without the query."""
    query: bytes
    headers: list[tuple[bytes, bytes]]
    """In the order received, names in lower case."""
    body: bytes
    peer: str
    """The client's address, empty where it is unknown."""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its lower-case name."""
        return next((value for key, value in self.headers if key == name), None)


class Response:
    """The answer to one request. Everything written after the client has left is dropped."""

    __slots__ = ("_chunked", "_connection", "_ended", "_headless", "_keep_alive", "_started", "on_disconnect")

    def __init__(self, connection: "_Connection", *, headless: bool, chunked: bool, keep_alive: bool) -> None:
        self._connection = connection
        self._headless = headless
        self._chunked = chunked
        self._keep_alive = keep_alive
        self._started = False
        self._ended = False
        self.on_disconnect: Callable[[], None] | None = None
        """Called once if the client leaves before the response has ended."""

    def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole response at once. Raises RuntimeError after ``start``."""
        self._claim()
        length = (b"content-length", b"%d" % len(body))
        head = self._head(status, [*headers, length])
        self._connection.send(head if self._headless else head + body)
        self._finish()

    def start(self, status: int, headers: Headers) -> None:
        """Send the head of a body of unknown length. Raises RuntimeError where one has been sent."""
        self._claim()
        self._keep_alive = self._keep_alive and self._chunked
        framing = [(b"transfer-encoding", b"chunked")] if self._chunked else []
        self._connection.send(self._head(status, [*headers, *framing]))

    def write(self, data: bytes) -> None:
        """Send a piece of the body. Raises RuntimeError before ``start`` or after ``end``."""
        if not self._started or self._ended:
            raise RuntimeError(f"{self!r} takes no data")
        if data and not self._headless:
            self._connection.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """The body is complete. Raises RuntimeError before ``start`` or where it has ended."""
        if not self._started or self._ended:
            raise RuntimeError(f"{self!r} cannot end")
        if self._chunked and not self._headless:
            self._connection.send(b"0\r\n\r\n")
        self._finish()

    def disconnected(self) -> None:
        """The connection is gone: tell the handler, once."""
        on_disconnect, self.on_disconnect = self.on_disconnect, None
        if on_disconnect is not None and not self._ended:
            on_disconnect()

    def _claim(self) -> None:
        if self._started:
            raise RuntimeError(f"{self!r} has been started before")
        self._started = True

    def _head(self, status: int, headers: Headers) -> bytes:
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if self._connection.server_name:
            lines.append(b"server: %b\r\n" % self._connection.server_name)
        lines.append(b"\r\n" if self._keep_alive else b"connection: close\r\n\r\n")
        return b"".join(lines)

    def _finish(self) -> None:
        self._ended = True
        self.on_disconnect = None
        self._connection.answered(self._keep_alive)

    def __repr__(self) -> str:
        state = "ended" if self._ended else "started" if self._started else "waiting"
        return f"<Response {state}>"


Handler = Callable[[IncomingRequest, Response], None]


@dataclass(slots=True)
class _Parsed:
    """A request under way through the parser, or an error to be answered in its turn."""

    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: list[bytes] = field(default_factory=list)
    head_bytes: int = 0
    body_bytes: int = 0
    method: str = ""
    version: str = "1.1"
    keep_alive: bool = True
    error: int = 0


class _RejectedError(Exception):
    """Raised inside a parser callback to stop the parser."""


class _Connection(asyncio.Protocol):
    """One client. ``_queue[0]`` is the request being answered while ``_response`` is set."""

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self.server_name = server.name
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._parser = httptools.HttpRequestParser(self)
        self._parsed = _Parsed()
        self._queue: deque[_Parsed] = deque()
        self._response: Response | None = None
        self._serving = False
        self._deaf = False
        """Nothing more is parsed: after an error, an upgrade, or a last response."""
        self._paused = False
        self._linger: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._server.connections.add(self)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.forget(self)
        if self._linger is not None:
            self._linger.cancel()
        self._queue.clear()
        response, self._response = self._response, None
        if response is not None:
            response.disconnected()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True
            self._queue[-1].keep_alive = False
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError) and not self._parsed.error:
                raise
            self._deaf = True
            self._parsed.error = self._parsed.error or HTTPStatus.BAD_REQUEST
            self._queue.append(self._parsed)
        self._serve()

    # -- httptools ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._parsed = _Parsed()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        self._parsed.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        self._parsed.headers.append((name.lower(), value))
        if len(self._parsed.headers) > _MOST_HEADERS:
            self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        parsed = self._parsed
        parsed.method = self._parser.get_method().decode("ascii")
        parsed.version = self._parser.get_http_version()
        parsed.keep_alive = self._parser.should_keep_alive()
        names = [name for name, _value in parsed.headers]
        if names.count(b"host") != 1 and (parsed.version == "1.1" or b"host" in names):
            self._reject(HTTPStatus.BAD_REQUEST)
        for name, value in parsed.headers:
            if name == b"content-length" and int(value) > self._server.max_body_bytes:
                self._reject(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if (b"expect", b"100-continue") in parsed.headers and self._response is None and not self._queue:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        parsed = self._parsed
        parsed.body_bytes += len(data)
        if parsed.body_bytes > self._server.max_body_bytes:
            self._reject(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        parsed.body.append(data)

    def on_message_complete(self) -> None:
        self._queue.append(self._parsed)

    def _count_head(self, size: int) -> None:
        self._parsed.head_bytes += size
        if self._parsed.head_bytes > _MOST_HEAD_BYTES:
            self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _reject(self, status: HTTPStatus) -> None:
        self._parsed.error = status
        raise _RejectedError

    # -- answering ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Hand over what is queued, one after the other; a handler that answers at once is not called from within."""
        if self._serving:
            return
        self._serving = True
        try:
            while self._queue and self._response is None:
                self._handle(self._queue.popleft())
        finally:
            self._serving = False
        self._pace_reading()

    def _pace_reading(self) -> None:
        """Stop reading from a client that pipelines far ahead, until it has been answered."""
        pause = len(self._queue) > _MOST_PIPELINED
        if self._transport is None or self._transport.is_closing() or pause == self._paused:
            return
        self._paused = pause
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _handle(self, parsed: _Parsed) -> None:
        self._response = response = Response(
            self,
            headless=parsed.method == "HEAD",
            chunked=parsed.version == "1.1",
            keep_alive=parsed.keep_alive and not parsed.error,
        )
        path, _mark, query = parsed.target.partition(b"?")
        if parsed.error:
            reason = HTTPStatus(parsed.error).phrase.encode() + b"\n"
            response.reply(parsed.error, [(b"content-type", b"text/plain")], reason)
            return
        headers, body = parsed.headers, b"".join(parsed.body)
        request = IncomingRequest(parsed.method, path.decode("latin-1"), query, headers, body, self._peer)
        try:
            self._server.handler(request, response)
        except Exception:
            self.close()
            raise

    def send(self, data: bytes) -> None:
        """Write to the client, if it is still there."""
        if self._transport is not None:
            self._transport.write(data)

    def answered(self, keep_alive: bool) -> None:
        """The response has ended: on to the next request, or close."""
        self._response = None
        if keep_alive:
            self._serve()
            return
        rejected, self._deaf = self._deaf, True
        self._queue.clear()
        if self._transport is None:
            return
        if rejected and self._transport.can_write_eof():
            self._transport.write_eof()
            self._linger = asyncio.get_running_loop().call_later(_LINGER_S, self.close)
        else:
            self._transport.close()

    def close(self) -> None:
        """Cut the connection, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()


class HttpServer:
    """Listens on one address and hands every complete request to ``handler``."""

    def __init__(self, handler: Handler, *, name: bytes = b"", max_body_bytes: int = 16 * 1024 * 1024) -> None:
        self.handler = handler
        self.name = name
        """The ``Server`` header, none where empty."""
        self.max_body_bytes = max_body_bytes
        self.connections: set[_Connection] = set()
        self._listener: asyncio.Server | None = None
        self._empty = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (a free one for 0). Raises OSError where the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Connection(self), host, port, backlog=4096)
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._listener is None:
            return
        self._listener.close()
        self._empty.clear()
        for connection in self.connections:
            connection.close()
        if self.connections:
            await self._empty.wait()
        await self._listener.wait_closed()
        self._listener = None

    def forget(self, connection: _Connection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def __repr__(self) -> str:
        state = "listening" if self._listener is not None else "stopped"
        return f"<HttpServer {state}, {len(self.connections)} connections>"
