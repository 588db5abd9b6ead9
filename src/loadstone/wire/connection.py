"""One connection to the server, driven by the loop's readers and writers.

Theory of operation. A connection lives through CONNECTING → (HANDSHAKE →) READY → CLOSED and carries at most one call.
It is opened for a call and writes that call's request as soon as it is READY; from then on the reader stays armed, so
that a server closing an idle connection is noticed at once. A request is written directly to the socket; what the
socket does not take waits for the writer. A failed write decides nothing: the reader finds out how the server ended
the connection, because a reply (413, 429) may already be waiting. Each way a call can end leads to exactly one of the
owner's ``finished`` (complete reply), ``failed``, or ``stale`` (a reused connection that was closed before it answered
anything, right after the request was written: the keep-alive race, which is no failure of the server).
"""

import asyncio
import enum
import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import httptools
import msgspec

from loadstone.core.chunk_log import ChunkLog
from loadstone.core.target import Break, Exchange
from loadstone.wire.causes import OURS, UNREAD, how_it_ended, tls_failure, why_no_connection
from loadstone.wire.origin import Address, Origin
from loadstone.wire.poller import Poller
from loadstone.wire.reply import ReplyReader, lone_chunk
from loadstone.wire.stamps import Receiver
from loadstone.wire.tls import TlsLayer

_NO_LOG = ChunkLog()
_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)
_HELD_BACK_BYTES = 16_384
"""Unread bytes from which on the server may have been waiting for us: receive windows start at some 64 KiB."""

_KEEP_ALIVE_RACE_NS = 500_000_000
"""A server that closes an idle connection just as we write to it was closing before it read the request: its FIN or
reset is here within a round trip. One that closes later had the request and dropped it."""


class State(enum.Enum):
    CONNECTING = "connecting"
    HANDSHAKE = "handshake"
    READY = "ready"
    CLOSED = "closed"


class Call(msgspec.Struct):
    """An exchange under way: its request's bytes, whom to tell, and since when."""

    exchange: Exchange
    data: bytes
    done: Callable[[Exchange], None]
    started_ns: int


class Owner(Protocol):
    """Whom a connection tells. Each is called with the connection already free (``finished``) or closed."""

    def finished(self, connection: "Connection", call: Call) -> None: ...
    def failed(self, call: Call, broken: Break, error: str) -> None: ...
    def stale(self, call: Call) -> None: ...
    def lost(self, connection: "Connection") -> None: ...


@dataclass(frozen=True)
class Wire:
    """What all connections of a client share."""

    loop: asyncio.AbstractEventLoop
    origin: Origin
    addresses: list[Address]
    """In the order to try them; the one that last worked is moved to the front."""
    tls: ssl.SSLContext | None
    timeout_ns: int
    """From a call's start, connecting included, to its last byte."""
    receiver: Receiver
    poller: Poller


class Connection:
    """See the theory of operation above."""

    __slots__ = (
        "_between_chunks",
        "_call",
        "_lag_ns",
        "_log",
        "_owner",
        "_reply",
        "_reused",
        "_silent",
        "_sock",
        "_tls",
        "_tries",
        "_unsent",
        "_wire",
        "state",
    )

    def __init__(self, wire: Wire, owner: Owner) -> None:
        self._wire = wire
        self._owner = owner
        self._reply = ReplyReader()
        self._tls: TlsLayer | None = None
        self._call: Call | None = None
        # Of the call's exchange and its reply: see _take.
        self._log = _NO_LOG
        self._lag_ns = 0
        self._between_chunks = False
        self._unsent = b""
        self._tries = iter(tuple(wire.addresses))
        self._reused = False
        self._silent = True
        self._sock: socket.socket | None = None
        self.state = State.CONNECTING

    def __repr__(self) -> str:
        return f"<Connection {self._wire.origin.netloc} {self.state.value}{' busy' if self._call else ''}>"

    @property
    def deadline_ns(self) -> int:
        """When the call it carries has to be complete."""
        assert self._call is not None
        return self._call.started_ns + self._wire.timeout_ns

    # -- opening

    def open(self, call: Call) -> None:
        """Connect, then send ``call``. Failures are told later, never from within."""
        self._call = call
        self._try_next(None)

    def _try_next(self, failure: OSError | None) -> None:
        for family, address in self._tries:
            try:
                self._dial(family, address)
            except OSError as error:
                self._drop_socket()
                failure = error
                if error.errno in OURS:
                    break
            else:
                return
        self._wire.loop.call_soon(self._give_up, failure)

    def _dial(self, family: socket.AddressFamily, address: object) -> None:
        sock = self._sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire.receiver.prepare(sock)
        code = sock.connect_ex(address)  # type: ignore[arg-type]
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        self._wire.loop.add_writer(sock.fileno(), self._on_connected, family, address)

    def _give_up(self, failure: OSError | None) -> None:
        if self.state is State.CONNECTING:
            self._fail(*why_no_connection(failure, self._wire.origin.netloc))

    def _on_connected(self, family: socket.AddressFamily, address: object) -> None:
        wire, sock = self._wire, self._socket()
        wire.loop.remove_writer(sock.fileno())
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._drop_socket()
            self._try_next(OSError(code, os.strerror(code)))
            return
        if wire.addresses[0] != (family, address):
            wire.addresses.remove((family, address))
            wire.addresses.insert(0, (family, address))
        if wire.tls is None:
            self._ready()
            wire.poller.add(sock.fileno(), self)
        else:
            self.state = State.HANDSHAKE
            self._tls = TlsLayer(wire.tls, wire.origin.host)
            wire.poller.add(sock.fileno(), self)
            self._shake_hands(b"")

    def _shake_hands(self, received: bytes | memoryview) -> bool:
        """Go on with the handshake; True once the connection is ready."""
        tls = self._tls
        assert tls is not None
        try:
            established = tls.handshake(received)
        except ssl.SSLError as error:
            self._write(tls.pending())
            self._fail(Break.TLS, tls_failure(error))
            return False
        self._write(tls.pending())
        if established:
            self._ready()
        return established

    def _ready(self) -> None:
        self.state = State.READY
        call = self._call
        assert call is not None
        call.exchange.connect_ns = time.monotonic_ns() - call.started_ns
        self.send(call)

    # -- writing

    def send(self, call: Call) -> None:
        """Send ``call`` on this connection, which is ready and has none."""
        self._call = call
        self._log, self._lag_ns = call.exchange.log, 0
        self._silent = True
        self._reply.begin(call.exchange)
        data = call.data if self._tls is None else self._tls.encrypt(call.data)
        call.exchange.sent_ns = time.monotonic_ns()
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._unsent:
            self._unsent += data
        elif data:
            self._push(data)

    def _on_writable(self) -> None:
        self._push(self._unsent)

    def _push(self, data: bytes) -> None:
        """Send what the socket takes, keep the rest for the writer."""
        assert self._sock is not None
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            if error.errno in OURS:
                self._wire.loop.call_soon(self._fail_call, self._call, OURS[error.errno])
            self._reply.reusable = False
            sent = len(data)
        if sent < len(data):
            if not self._unsent:
                self._wire.loop.add_writer(self._sock.fileno(), self._on_writable)
            self._unsent = data[sent:]
        elif self._unsent:
            self._unsent = b""
            self._wire.loop.remove_writer(self._sock.fileno())

    def _fail_call(self, call: Call | None, error: str) -> None:
        if call is not None and self._call is call:
            self._fail(Break.CLIENT, error)

    # -- reading

    def read(self) -> int:
        """Read once; the bytes read, 0 where nothing waits or the connection has ended."""
        receiver = self._wire.receiver
        assert self._sock is not None
        try:
            size = receiver.receive(self._sock)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._on_end(error)
            return 0
        if size == 0:
            self._on_end(None)
            return 0
        if self._tls is None:
            self._take(receiver.buffer, receiver.view, size, receiver.stamp_ns, receiver.lag_ns)
        else:
            self._take_ciphertext(self._tls, receiver.view[:size], receiver.stamp_ns, receiver.lag_ns)
        return size

    def _take_ciphertext(self, tls: TlsLayer, data: bytes | memoryview, stamp_ns: int, lag_ns: int) -> None:
        if self.state is State.HANDSHAKE:
            if not self._shake_hands(data):
                return
            data = b""
        try:
            plain = tls.decrypt(data)
        except ssl.SSLError as error:
            self._fail(Break.TLS, tls_failure(error))
            return
        self._write(tls.pending())
        if plain:
            self._take(plain, memoryview(plain), len(plain), stamp_ns, lag_ns)
        if tls.ended and self.state is State.READY:
            self._on_end(None)

    def _take(self, buffer: bytes | bytearray, view: memoryview, size: int, stamp_ns: int, lag_ns: int) -> None:
        """The first ``size`` bytes of ``buffer``, whose ``view`` is given so that it need not be made for each read."""
        # What a chunk touches is kept to the least: with a thousand streams each further object is a cache miss.
        if self._call is None:  # a server that speaks unasked (408, then close) ends the connection
            self._abandon()
            return
        self._silent = False
        if lag_ns > self._lag_ns:
            self._lag_ns = lag_ns
        body = lone_chunk(buffer, view, size) if self._between_chunks else b""
        if body:
            self._log.append(stamp_ns, body)
        else:
            self._parse(self._call, view[:size], stamp_ns)

    def _parse(self, call: Call, data: memoryview, stamp_ns: int) -> None:
        reply = self._reply
        malformed = ""
        try:
            reply.feed(data)
        except httptools.HttpParserUpgrade:
            malformed = "switched protocols unasked"
        except httptools.HttpParserError as error:
            malformed = str(error)
        self._between_chunks = reply.between_chunks
        body = reply.take()
        if body:
            self._log.append(stamp_ns, body)
        if reply.complete:
            if malformed:
                reply.reusable = False
            self._finish(call, stamp_ns)
        elif malformed:
            self._fail(Break.MALFORMED, f"the reply is not HTTP/1.1: {malformed}")

    def _on_end(self, error: OSError | None) -> None:
        call, reply = self._call, self._reply
        if call is None:
            self._abandon()
        elif self.state is State.HANDSHAKE:
            self._fail(Break.TLS, "TLS failed: the server closed the connection during the handshake")
        elif error is None and reply.ends_with_connection:
            reply.reusable = False
            self._finish(call, call.exchange.log.last_ns() or time.monotonic_ns())
        elif self._silent and self._reused and self._just_sent(call):
            self.close()
            self._owner.stale(call)
        else:
            self._fail(Break.DISCONNECT, how_it_ended(error, call.exchange.status, self._silent))

    def _just_sent(self, call: Call) -> bool:
        return time.monotonic_ns() - call.exchange.sent_ns <= _KEEP_ALIVE_RACE_NS

    # -- ending

    def _finish(self, call: Call, stamp_ns: int) -> None:
        if stamp_ns - call.started_ns > self._wire.timeout_ns:
            if self._wire.receiver.kernel_stamps:
                self._fail(Break.TIMEOUT, "")
            else:
                self._fail(Break.CLIENT, UNREAD)
            return
        self._call = None
        self._reused = True
        call.exchange.end_ns = stamp_ns
        call.exchange.lag_ns, self._log = self._lag_ns, _NO_LOG
        if self._unsent or not self._reply.reusable:
            self.close()
        self._owner.finished(self, call)

    def expire(self) -> None:
        """The call's deadline has passed: read what waits, then say whose time-out it is.

        All that the server had sent is in hand once the socket is empty, so an incomplete reply is the server's
        time-out, unless so much had waited unread that the server may have been held back by us.
        """
        call, waited = self._call, 0
        while self.state is State.READY and self._call is call and (size := self.read()):
            waited += size
        if self._call is not call:
            return
        if waited >= _HELD_BACK_BYTES:
            self._fail(Break.CLIENT, UNREAD)
        else:
            self._fail(Break.TIMEOUT, "" if self.state is State.READY else self._no_connection_yet())

    def _fail(self, broken: Break, error: str) -> None:
        call = self._call
        assert call is not None
        call.exchange.lag_ns = self._lag_ns
        self.abort()
        self._owner.failed(call, broken, error)

    def cut(self) -> None:
        """End the call at our own wish."""
        self._fail(Break.CUT, "")

    def _abandon(self) -> None:
        self.close()
        self._owner.lost(self)

    def abort(self) -> None:
        """As ``close``, with a reset, so that the server stops at once."""
        if self._sock is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
        self.close()

    def close(self) -> None:
        """Close; the call, if any, is told nothing."""
        self.state = State.CLOSED
        self._call = None
        self._unsent = b""
        self._drop_socket()

    def _drop_socket(self) -> None:
        if self._sock is not None:
            self._wire.poller.remove(self._sock.fileno())
            self._wire.loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _no_connection_yet(self) -> str:
        what = "TLS handshake" if self.state is State.HANDSHAKE else "connection"
        return f"no {what} with {self._wire.origin.netloc} within the time-out"

    def _socket(self) -> socket.socket:
        assert self._sock is not None
        return self._sock
