"""The measuring client: requests out, exchanges with time-stamped bytes back.

Theory of operation. A call takes the idle connection that was used last, or opens another. It stands in ``_running``
from ``start`` until its ``done``; as the time-out is one constant, that insertion-ordered dict is also the list of
deadlines, and one timer serves them all. Latency counts from ``Exchange.sent_ns``, read just before the request's first
byte is written on an established connection: time spent connecting is in ``Exchange.connect_ns``, not in the latency.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import quote

from loadstone import __version__
from loadstone.core.clock import Clock, Timer
from loadstone.core.errors import UnreachableError, UsageError
from loadstone.core.target import Break, Exchange, Request
from loadstone.wire.connection import Call, Connection, State, Wire
from loadstone.wire.origin import Address, Origin, parse_origin, resolve
from loadstone.wire.poller import make_poller
from loadstone.wire.stamps import Receiver
from loadstone.wire.tls import client_context

_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection"})
_PATH_SAFE = "/?&=%:@!$'()*+,;~-._"


class Reply(NamedTuple):
    """A complete answer to ``fetch``."""

    status: int
    headers: dict[bytes, bytes]
    """As ``Exchange.headers``: only the few that are kept."""
    body: bytes


async def connect_target(
    base_url: str,
    clock: Clock,
    *,
    timeout_s: float,
    api_key: str = "",
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> "HttpTarget":
    """An ``HttpTarget`` for ``base_url``, its host's name resolved once. No connection is opened yet.

    Raises UsageError for a URL or header that cannot be used, UnreachableError for a host that is unknown.
    """
    origin = parse_origin(base_url)
    fixed = _fixed_headers(origin, api_key, headers or {})
    context = (tls or client_context()) if origin.scheme == "https" else None
    return HttpTarget(origin, await resolve(origin), clock, timeout_s=timeout_s, fixed_headers=fixed, tls=context)


class HttpTarget:
    """``core.target.Target`` over HTTP/1.1 keep-alive connections. Belongs to the running loop."""

    def __init__(
        self,
        origin: Origin,
        addresses: list[Address],
        clock: Clock,
        *,
        timeout_s: float,
        fixed_headers: bytes,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._receiver = Receiver()
        timeout_ns = int(timeout_s * 1e9)
        self._poller = make_poller(self._loop, may_rest=lambda: self._receiver.kernel_stamps)
        self._wire = Wire(self._loop, origin, addresses, tls, timeout_ns, self._receiver, self._poller)
        self._fixed_headers = fixed_headers
        self._heads: dict[str, bytes] = {}
        self._idle: dict[Connection, None] = {}
        self._running: dict[Exchange, Connection] = {}
        self._timer: Timer | None = None

    @property
    def kernel_stamps(self) -> bool:
        """Whether receive times are the kernel's; False where each is the clock read just before the bytes."""
        return self._receiver.kernel_stamps

    def remeasure(self) -> float:
        """Check the kernel's stamps after a level: how many ms the realtime clock moved against the monotonic one.

        By more than 1 ms, the stamps since the last check are that much in doubt, and what follows is timed by the
        clock (``kernel_stamps`` turns False).
        """
        return self._receiver.remeasure()

    def __repr__(self) -> str:
        return f"<HttpTarget {self._wire.origin.netloc}, {len(self._running)} in flight, {len(self._idle)} idle>"

    # -- calls

    def start(self, exchange: Exchange, done: Callable[[Exchange], None]) -> None:
        """See ``core.target.Target``. Calls may be started from within ``done``."""
        request = exchange.request
        head = self._heads.get(request.path) or self._post_head(request.path)
        body = request.body
        self._begin(Call(exchange, b"%b%d\r\n\r\n%b" % (head, len(body), body), done, time.monotonic_ns()))

    def cancel(self, exchange: Exchange) -> None:
        """See ``core.target.Target``."""
        connection = self._running.get(exchange)
        if connection is not None:
            connection.cut()

    async def send(self, request: Request) -> Exchange:
        """Send one request and wait for its end; a failure is in the exchange, not raised."""
        exchange = Exchange(request)
        ended: asyncio.Future[Exchange] = self._loop.create_future()
        self.start(exchange, lambda _: _settle(ended, exchange))
        return await self._wait(exchange, ended)

    async def fetch(self, method: str, path: str, body: bytes = b"") -> Reply:
        """One request beside the measurement, such as ``GET /metrics``; ``path`` counts from the service's root.

        A trailing ``/v1`` of the base URL is not part of that root. Raises UnreachableError where no complete answer
        comes.
        """
        exchange = Exchange(Request(path=path, body=body, index=-1))
        ended: asyncio.Future[Exchange] = self._loop.create_future()
        head = self._head(method, self._wire.origin.service_path(path))
        data = b"%b%d\r\n\r\n%b" % (head, len(body), body)
        self._begin(Call(exchange, data, lambda _: _settle(ended, exchange), time.monotonic_ns()))
        await self._wait(exchange, ended)
        if exchange.broken is not None:
            raise UnreachableError(f"{method} {path}: {exchange.error or exchange.broken.value}")
        return Reply(exchange.status, exchange.headers, exchange.log.body())

    async def _wait(self, exchange: Exchange, ended: asyncio.Future[Exchange]) -> Exchange:
        try:
            return await ended
        except asyncio.CancelledError:
            self.cancel(exchange)
            raise

    def _begin(self, call: Call) -> None:
        if self._idle:
            connection, _ = self._idle.popitem()
            self._running[call.exchange] = connection
            connection.send(call)
        else:
            self._connect(call)
        if self._timer is None:
            self._timer = self._clock.call_at(call.started_ns + self._wire.timeout_ns, self._expire)

    def _connect(self, call: Call) -> None:
        connection = self._running[call.exchange] = Connection(self._wire, self)
        connection.open(call)

    # -- what connections tell (connection.Owner)

    def finished(self, connection: Connection, call: Call) -> None:
        exchange = call.exchange
        del self._running[exchange]
        self._poller.prompt = True
        exchange.log.seal()
        if connection.state is State.READY:
            self._idle[connection] = None
        call.done(exchange)

    def failed(self, call: Call, broken: Break, error: str) -> None:
        exchange = call.exchange
        del self._running[exchange]
        exchange.broken = broken
        exchange.error = error or self._explain(broken)
        exchange.end_ns = time.monotonic_ns()
        exchange.log.seal()
        self._loop.call_soon(call.done, exchange)

    def stale(self, call: Call) -> None:
        self._connect(call)

    def lost(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def _explain(self, broken: Break) -> str:
        return f"no complete reply within {self._wire.timeout_ns / 1e9:g} s" if broken is Break.TIMEOUT else ""

    # -- time-outs and the end

    def _expire(self) -> None:
        self._timer = None
        now_ns = time.monotonic_ns()
        try:
            while self._running:
                connection = next(iter(self._running.values()))
                if connection.deadline_ns > now_ns:
                    break
                connection.expire()
        finally:
            if self._running and self._timer is None:
                oldest = next(iter(self._running.values()))
                self._timer = self._clock.call_at(oldest.deadline_ns, self._expire)

    def close(self) -> None:
        """Cut what runs (its ``done`` is still called), close all connections."""
        for exchange in list(self._running):
            self.cancel(exchange)
        while self._idle:
            self._idle.popitem()[0].close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._poller.close()
        self._receiver.close()

    # -- request heads

    def _post_head(self, path: str) -> bytes:
        head = self._heads[path] = self._head("POST", self._wire.origin.request_path(path))
        return head

    def _head(self, method: str, path: str) -> bytes:
        """All of the request's head but the value of Content-Length, which comes last."""
        line = f"{method} {quote(path, safe=_PATH_SAFE)} HTTP/1.1\r\n"
        return line.encode() + self._fixed_headers + b"Content-Length: "


def _settle(ended: "asyncio.Future[Exchange]", exchange: Exchange) -> None:
    if not ended.done():
        ended.set_result(exchange)


def _fixed_headers(origin: Origin, api_key: str, extra: Mapping[str, str]) -> bytes:
    headers = {
        "Host": origin.netloc,
        "User-Agent": f"loadstone/{__version__}",
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
    }
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    for name, value in extra.items():
        if name.lower() in _OWN_HEADERS:
            raise UsageError(f"--header {name}: this header is set by loadstone itself")
        headers = {kept: text for kept, text in headers.items() if kept.lower() != name.lower()} | {name: value}
    return b"".join(_header_line(name, value) for name, value in headers.items())


def _header_line(name: str, value: str) -> bytes:
    token = name.replace("-", "").replace("_", "")
    if not (token.isascii() and token.isalnum()) or not value.isprintable() or not value.isascii():
        raise UsageError(f"header {name!r}: name and value must be printable ASCII on one line")
    return f"{name}: {value}\r\n".encode("ascii")
