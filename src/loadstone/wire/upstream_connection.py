"""One connection of the gate to an upstream, and the call that it carries.

Theory of operation. A connection is opened for a call, and carries one at most at a time. A request is written straight
to the socket (uvloop would queue it until the end of the turn); what the socket does not take waits in the transport.
A failed write decides nothing, as a reply (413, 429) may already be waiting: reading finds out how the connection
ended. While idle it is still read, so that a server that closes it is noticed at once.

The connection is kept for another call only where the reply ended cleanly, the request had been written whole, and
nothing followed. A server that closes it just as we write again is the keep-alive race: it had not read the request,
which goes once more, over a fresh connection. What follows from then on counts as if the first attempt had not been.
"""

import asyncio
import enum
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import httptools

from loadstone.wire.causes import tls_failure
from loadstone.wire.tls import TlsLayer
from loadstone.wire.upstream_reply import MOST_HEAD_BYTES, Head, ReplyReader

if TYPE_CHECKING:
    from loadstone.wire.upstream import UpstreamPool

_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)

_KEEP_ALIVE_RACE_S = 0.5
"""A server that closes an idle connection just as we write to it was closing before it read the request: its FIN or
reset is here within a round trip. One that closes later had the request and dropped it."""


class Stage(enum.Enum):
    """How far a failed call had come."""

    CONNECT = "connect"
    """Nothing was sent: it can go elsewhere."""
    SENT = "sent"
    """Sent, perhaps in part; no byte of a reply came."""
    REPLY = "reply"
    """The reply had begun."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call has no complete reply."""

    stage: Stage
    reason: str
    """One line that names ``host:port`` and the cause."""


class Sink(Protocol):
    """Whom a call tells; never from within ``UpstreamPool.send`` nor a method of the call."""

    def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
        """What one read of the socket brought: the head where it is complete now, body bytes, and whether that is all.

        Called at most once for each read, and not for one that brought none of the three.
        """

    def on_failed(self, failure: Failure) -> None:
        """No more will come."""


class UpstreamCall:
    """One request under way: what ``UpstreamPool.send`` returns.

    Its methods may be called at any time, from within the sink's and after the end as well. The attributes are the
    pool's and the connection's.
    """

    __slots__ = ("connection", "data", "head_only", "opening", "owner", "paused", "sink")

    def __init__(self, owner: "UpstreamPool", data: bytes, sink: Sink, head_only: bool) -> None:
        self.owner = owner
        self.data = data
        """Kept only as long as it may have to be sent again."""
        self.sink = sink
        self.head_only = head_only
        self.paused = False
        self.connection: Connection | None = None
        self.opening: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Close the connection at once, so that the engine stops; the sink hears nothing more."""
        self.owner.forget(self)
        if self.opening is not None:
            self.opening.cancel()
        if self.connection is not None:
            self.connection.reset()

    def pause(self) -> None:
        """Stop reading the reply; what has arrived stays with the kernel, which slows the upstream down."""
        if not self.paused:
            self.paused = True
            if self.connection is not None:
                self.connection.pause()

    def resume(self) -> None:
        """Go on reading."""
        if self.paused:
            self.paused = False
            if self.connection is not None:
                self.connection.resume()

    def __repr__(self) -> str:
        if self.connection is not None:
            state = self.connection.stage.value
        else:
            state = "connecting" if self.opening is not None else "over"
        return f"<UpstreamCall {self.owner.netloc} {state}{' paused' if self.paused else ''}>"


class Connection:
    """See the theory of operation above. An ``asyncio.Protocol`` by its methods: a compiled class has no such base."""

    __slots__ = (
        "_barren_bytes",
        "_call",
        "_owner",
        "_reply",
        "_reused",
        "_sent_s",
        "_sock",
        "_tls",
        "_transport",
        "old",
    )

    def __init__(self, owner: "UpstreamPool", sock: socket.socket, tls: TlsLayer | None) -> None:
        self._owner = owner
        self._sock = sock
        self._tls = tls
        self._call: UpstreamCall | None = None
        self._transport: asyncio.Transport
        self._reply = ReplyReader(owner.heads)
        self._reused = False
        self._sent_s = 0.0
        self._barren_bytes = 0
        self.old = False
        """Idle since before the pool last looked."""

    @property
    def stage(self) -> Stage:
        return Stage.REPLY if self._reply.begun else Stage.SENT

    @property
    def closing(self) -> bool:
        return self._transport.is_closing()

    def __repr__(self) -> str:
        return f"<Connection {self._owner.netloc} {'busy' if self._call else 'closed' if self.closing else 'idle'}>"

    # -- writing

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._owner.opened(self)

    def send(self, call: UpstreamCall) -> bool:
        """Write ``call``; the connection has none. False where it has been closed meanwhile."""
        if self._transport.is_closing():
            return False
        self._call = call
        call.connection = self
        self._reply.begin(call.head_only)
        self._barren_bytes = 0
        self._sent_s = time.monotonic()
        data = call.data if self._tls is None else self._tls.encrypt(call.data)
        try:
            sent = self._sock.send(data)
        except ConnectionError:
            self._reply.reusable = False
            return True
        except OSError:  # full, or no memory: the transport waits for room, or finds that there is none
            sent = 0
        if sent < len(data):
            self._transport.write(memoryview(data)[sent:])
        return True

    # -- reading

    def data_received(self, data: bytes) -> None:
        if self._tls is None:
            self._take(data)
        else:
            self._take_ciphertext(self._tls, data)

    def _take_ciphertext(self, tls: TlsLayer, data: bytes) -> None:
        try:
            plain = tls.decrypt(data)
        except ssl.SSLError as error:
            self._broken(f"{self._owner.netloc}: {tls_failure(error)}")
            return
        if answer := tls.pending():
            self._transport.write(answer)
        if tls.ended:
            self._reply.reusable = False
        if plain:
            self._take(plain)
        if tls.ended:
            self._on_end(None)

    def _take(self, data: bytes) -> None:
        call, reply = self._call, self._reply
        if call is None:  # a server that speaks unasked (408, then close) ends the connection
            self.close()
            return
        whole = reply.recognise(data)
        if whole is not None:
            self._finish(call, *whole)
            return
        first = not reply.begun
        try:
            reply.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if why := reply.refusal(error):
                self._broken(f"{self._owner.netloc} sent {why}")
                return
        head, reply.head = reply.head, None
        parts = reply.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if reply.complete:
            if first and head is not None:
                reply.remember(data, head, body)
            self._finish(call, head, body)
        elif body or head is not None:
            self._barren_bytes = 0
            if head is not None:
                call.data = b""
            call.sink.on_read(head, body, False)
        else:
            self._count_barren(len(data))

    def _count_barren(self, size: int) -> None:
        """The parser gathers an unfinished header without bound: 64 KiB in a row of which nothing comes are enough."""
        self._barren_bytes += size
        if self._barren_bytes > MOST_HEAD_BYTES:
            self._broken(f"{self._owner.netloc} sent a head of more than {MOST_HEAD_BYTES // 1024} KiB")

    def eof_received(self) -> None:
        self._on_end(None)

    def pause_writing(self) -> None:
        """Nothing is held back for it: a request is in memory as a whole, and its size is bounded."""

    def resume_writing(self) -> None:
        """See ``pause_writing``."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.closed(self)
        self._on_end(exc)

    def pause(self) -> None:
        if not self.closing:
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self.closing:
            self._transport.resume_reading()

    # -- ending

    def _finish(self, call: UpstreamCall, head: Head | None, body: bytes) -> None:
        """The reply is complete. The connection is free, or closed, before the sink hears of it."""
        transport = self._transport
        if self._reply.reusable and not (call.paused or transport.is_closing() or transport.get_write_buffer_size()):
            self._call = call.connection = None
            self._reused = True
            self._owner.free(self, call)
        else:
            self._owner.forget(call)
            self.close()
        call.sink.on_read(head, body, True)

    def _on_end(self, error: Exception | None) -> None:
        call, reply = self._call, self._reply
        if call is None:
            self.close()
        elif error is None and reply.ends_with_connection:
            reply.reusable = False
            self._finish(call, None, b"")
        elif self._reused and not reply.begun and time.monotonic() - self._sent_s <= _KEEP_ALIVE_RACE_S:
            self.close()
            self._owner.open_for(call)
        else:
            how = "closed" if error is None else "broke"
            when = "in the middle of the reply" if reply.begun else "before it answered"
            self._broken(f"{self._owner.netloc} {how} the connection {when}")

    def _broken(self, reason: str) -> None:
        """The connection cannot go on, and so its call has failed."""
        call, stage = self._call, self.stage
        self.reset()
        if call is not None:
            self._owner.fail(call, Failure(stage, reason))

    def reset(self) -> None:
        """As ``close``, with a reset, so that the server stops at once."""
        if not self.closing:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
        self.close()

    def close(self) -> None:
        """Close; the call, if any, is told nothing."""
        call, self._call = self._call, None
        if call is not None:
            call.connection = None
        self._owner.drop(self)
        self._transport.abort()
