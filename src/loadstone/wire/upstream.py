"""The gate's connections to one upstream: kept alive, reused, and cut as soon as nobody wants the reply.

Theory of operation. A call takes the idle connection that was used last, or has one opened (the only task there is);
it stands in ``_calls`` from ``send`` to its end. Each call ends in exactly one way: the sink's ``on_read`` with
``ended``, its ``on_failed``, or ``UpstreamCall.cancel``, after which the sink hears nothing.
"""

import asyncio
import ssl
from typing import cast

from loadstone.core.errors import UnreachableError
from loadstone.wire.dialer import Dialer
from loadstone.wire.head_memo import HeadMemo
from loadstone.wire.origin import Origin
from loadstone.wire.upstream_connection import Connection, Failure, Sink, Stage, UpstreamCall
from loadstone.wire.upstream_reply import Head

__all__ = ["Failure", "Head", "Sink", "Stage", "UpstreamCall", "UpstreamPool"]


class UpstreamPool:
    """All connections to ``origin``, and the calls on them. Belongs to the running loop.

    ``tls``: what to trust for https, the system's authorities where None. ``connect_timeout_s`` covers name, connect
    and TLS handshake. A connection without a call is closed after once to twice ``idle_timeout_s``.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 5.0,
        idle_timeout_s: float = 60.0,
        max_idle: int = 256,
    ) -> None:
        self.netloc = origin.netloc
        self.heads: HeadMemo[Head] = HeadMemo()
        self._loop = asyncio.get_running_loop()
        self._dialer = Dialer(origin, tls, connect_timeout_s)
        self._idle_timeout_s = idle_timeout_s
        self._max_idle = max_idle
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._calls: set[UpstreamCall] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        """Connections that stand, until they have been closed to the last."""
        return len(self._connections)

    @property
    def idle(self) -> int:
        """Connections that wait for a call."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """Calls that have not ended, those that wait for their connection among them."""
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<UpstreamPool {self.netloc}, {self.open} open, {self.idle} idle, {self.busy} busy>"

    def send(self, data: bytes, sink: Sink, *, head_only: bool = False) -> UpstreamCall:
        """Send ``data``, a whole HTTP/1.1 request; ``head_only`` says that it is a HEAD."""
        call = UpstreamCall(self, data, sink, head_only)
        self._calls.add(call)
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.send(call):
                return call
        self.open_for(call)
        return call

    def close(self) -> None:
        """Close what is idle now, and every other connection when its call ends; no connection is kept from here on."""
        self._max_idle = 0
        for connection in tuple(self._idle):
            connection.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def abort(self) -> None:
        """As ``close``, and fail every call now; the sinks hear of it from within."""
        self.close()
        for call in tuple(self._calls):
            if call in self._calls:
                stage = call.connection.stage if call.connection is not None else Stage.CONNECT
                call.cancel()
                call.sink.on_failed(Failure(stage, f"{self.netloc} was given up: the gate closes"))

    # -- what calls and connections tell

    def open_for(self, call: UpstreamCall) -> None:
        """The call needs a fresh connection."""
        call.opening = self._loop.create_task(self._open(call))

    async def _open(self, call: UpstreamCall) -> None:
        try:
            sock, tls = await self._dialer.dial()
        except UnreachableError as error:
            self.fail(call, Failure(Stage.CONNECT, str(error)))
            return
        finally:  # from here on the task is not cancelled: uvloop would leave the socket open, and its number in use
            call.opening = None
        connection = Connection(self, sock, tls)
        await self._loop.create_connection(lambda: cast(asyncio.Protocol, connection), sock=sock)
        if call not in self._calls:
            connection.close()
        elif not connection.send(call):
            self.fail(call, Failure(Stage.CONNECT, f"{self.netloc} closed the connection as soon as it stood"))
        else:
            call.data = b""
            if call.paused:
                connection.pause()

    def fail(self, call: UpstreamCall, failure: Failure) -> None:
        """The call has ended without a complete reply; the sink does not know it yet."""
        self._calls.remove(call)
        call.sink.on_failed(failure)

    def forget(self, call: UpstreamCall) -> None:
        """The call has ended."""
        self._calls.discard(call)

    def opened(self, connection: Connection) -> None:
        """The connection stands."""
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        """The connection is gone."""
        self._connections.discard(connection)

    def free(self, connection: Connection, call: UpstreamCall) -> None:
        """The call has ended, and the connection is free for another."""
        self._calls.discard(call)
        if len(self._idle) >= self._max_idle:
            connection.close()
            return
        connection.old = False
        self._idle[connection] = None
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._idle_timeout_s, self._sweep)

    def drop(self, connection: Connection) -> None:
        """The connection takes no more calls."""
        self._idle.pop(connection, None)

    def _sweep(self) -> None:
        """Close what was idle at the last look and has been since; no clock is read for each reply."""
        self._sweeper = None
        for connection in tuple(self._idle):
            if connection.old:
                connection.close()
            connection.old = True
        if self._idle:
            self._sweeper = self._loop.call_later(self._idle_timeout_s, self._sweep)
