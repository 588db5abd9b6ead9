"""One client of the server: its socket, its requests in order, its deadlines.

Theory of operation. One request is answered at a time. What arrives meanwhile is kept unread in ``_backlog`` (reading
stops beyond ``_MOST_BACKLOG_BYTES``), so a client that pipelines costs no more than that, and ``100 Continue`` and
refusals come out in their turn. ``_advance`` is the only place where requests are taken: it runs after bytes have come,
after an answer has ended, and after the client has caught up with reading.

A connection that has answered for the last time shuts its own side and reads on for a while (``_closing``): closing
at once would reset it before the client has read why. ``deadline_s`` is all that the server's sweep looks at.
"""

import asyncio
import fcntl
import math
import os
import socket
import struct
import sys
import termios
from http import HTTPStatus
from typing import TYPE_CHECKING

from loadstone.wire.request_head import RejectedError
from loadstone.wire.request_reader import IDLE, PIECE_BYTES, IncomingRequest, Phase, RequestReader, joined
from loadstone.wire.response import Response

if TYPE_CHECKING:
    from loadstone.wire.server import HttpServer

_MOST_BACKLOG_BYTES = 64 * 1024
_LINGER_S = 2.0
_BODY_FLOOR_BPS = 64 * 1024
"""A body that comes at least this fast is never too slow."""
_RESET = struct.pack("ii", 1, 0)


class ServerConnection:
    """What its responses are written to. A handler's exception closes it and goes to the loop's exception handler.

    An ``asyncio.Protocol`` by its methods: a compiled class has no such base.
    """

    __slots__ = (
        "_advancing",
        "_backlog",
        "_closing",
        "_eof",
        "_fd",
        "_held",
        "_lone",
        "_loop",
        "_output_bytes",
        "_paused",
        "_phase",
        "_probed",
        "_reader",
        "_response",
        "_server",
        "_since_s",
        "_taken_bytes",
        "_taken_s",
        "_transport",
        "_watched_fd",
        "congested",
        "deadline_s",
        "name_line",
    )

    def __init__(self, server: "HttpServer", loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self.name_line = server.name_line
        self._transport: asyncio.Transport | None = None
        self._fd = self._watched_fd = -1
        self._reader = RequestReader(server.max_body_bytes, server.heads)
        self._backlog: bytes | bytearray = b""
        self._response: Response | None = None
        self._advancing = False
        self._closing = False
        self._eof = False
        self._paused = False
        self._lone = False
        """All that has come since the last answer is one request that was recognised: nothing stands behind it."""
        self._held = b""
        """To go out with the next bytes, or as soon as the loop turns."""
        self._probed = 0
        """So many bytes of the next output have been sent."""
        self._phase: Phase | None = None
        """None while a request is being answered."""
        self._since_s = 0.0
        self.congested = False
        self._output_bytes = 0
        """What stood when the client fell behind, and what has been written since."""
        self._taken_bytes = 0
        """What it had taken of that when last looked at."""
        self._taken_s: float | None = None
        """When it last took some; None: not looked at."""
        self.deadline_s = math.inf

    # -- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._fd = transport.get_extra_info("socket").fileno()
        peer = transport.get_extra_info("peername")
        self._reader.peer = peer[0] if isinstance(peer, tuple) else ""
        self._server.remember(self)
        self._set_deadline()
        if self.draining:
            self.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._closing = True
        self._reader.close()
        self._backlog = b""
        self._server.forget(self, self._watched_fd)
        response, self._response = self._response, None
        if response is not None:
            response.disconnected()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._backlog or self._response is not None or self.congested or len(data) > PIECE_BYTES:
            self._backlog = joined(self._backlog, data)
        else:  # nothing stands before it, which is nearly always so
            request = self._reader.recognise(data)
            if request is not None:
                self._lone = True
                self._phase = None
                self.deadline_s = math.inf
                self._handle(request, True)
                return
            self._reader.feed(data)
        self._lone = False
        self._advance()

    def eof_received(self) -> bool:
        """Whether to stay: only where something is still to be answered."""
        self._eof = True
        self._lone = False
        if self._closing or not self._has_requests():
            return False
        self._watched_fd = self._fd
        self._server.watch_hangup(self._watched_fd, self.abort)
        self._probe()
        return True

    def pause_writing(self) -> None:
        self.congested = True
        self._lone = False
        self._taken_s = None
        self._set_deadline()

    def resume_writing(self) -> None:
        self.congested = False
        self._phase = None
        if self._response is not None:
            self._response.drained()
        self._advance()

    # -- taking requests ----------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take what can be taken; a handler that answers at once is not called from within another."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._take_next():
                pass
        finally:
            self._advancing = False
        if self._response is not None and not self._backlog and not self.congested and not self._paused:
            # One is being answered and nothing stands behind it: no deadline of this side runs.
            self._phase = None
            self.deadline_s = math.inf
        else:
            self._settle()

    def _take_next(self) -> bool:
        """One step; False where there is none until something happens."""
        reader = self._reader
        if self._response is not None or self._closing or self.congested:
            return False
        if reader.ready:
            self._handle(*reader.ready.pop(0))
        elif reader.error is not None:
            self._refuse(reader.error)
        elif self._backlog:
            data, self._backlog = self._backlog, b""
            if len(data) > PIECE_BYTES:
                data, self._backlog = data[:PIECE_BYTES], data[PIECE_BYTES:]
            reader.feed(data)
        else:
            return False
        return True

    def _handle(self, request: IncomingRequest, keep_alive: bool) -> None:
        head = request.head
        response = self._response = Response(self, head.method, head.version, keep_alive)
        try:
            self._server.handler(request, response)
        except Exception as error:
            self.abort()
            said = f"{request.method} {request.path} could not be handled"
            self._loop.call_exception_handler({"message": said, "exception": error, "protocol": self})

    def _refuse(self, rejected: RejectedError) -> None:
        self._response = response = Response(self, "", "1.1", False)
        headers, body = self._server.refusal(rejected)
        response.reply(rejected.status, headers, body)

    def _settle(self) -> None:
        """After all that could be taken: interim answer, half-closed client, reading, deadline."""
        if self._transport is None or self._closing:
            return
        if self._has_requests():
            self._pace_reading()
        elif self._eof:
            self._shut()
            return
        elif self._reader.wants_continue:
            self._reader.wants_continue = False
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._set_deadline()

    def _has_requests(self) -> bool:
        """One is being answered, or more is there to be looked at first."""
        return self._response is not None or bool(self._reader.ready) or bool(self._backlog)

    def _pace_reading(self) -> None:
        pause = len(self._backlog) > _MOST_BACKLOG_BYTES
        if pause == self._paused or self._transport is None or self._eof or self._transport.is_closing():
            return
        self._paused = pause
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # -- what a response does -----------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        return self._server.draining

    def hold(self, data: bytes) -> None:
        """Send with what follows, which is usually at hand: one system call instead of two."""
        self._held = data
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._held:
            self.send(b"")

    def send(self, data: bytes) -> None:
        """After what is held."""
        transport = self._transport
        if self._held:
            data, self._held = self._held + data, b""
        if transport is None or not data or transport.is_closing():
            return
        if self._probed:
            data, self._probed = data[self._probed :], 0
        if self._taken_s is not None:
            self._output_bytes += len(data)
        if transport.get_write_buffer_size() == 0:  # straight away: the loop would queue it until the end of the turn
            try:
                sent = os.write(self._fd, data)
            except OSError:  # full, or the client has gone: the transport waits for room, or finds that out
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    def answered(self, keep_alive: bool) -> None:
        """The response has ended: on to the next request, or close."""
        self._response = None
        self._phase = None
        if not keep_alive or self._server.draining:
            self._shut()
        elif not self._lone:
            self._advance()
        else:
            self._phase = IDLE
            self._since_s = since_s = self._loop.time()
            self.deadline_s = since_s + self._server.idle_timeout_s

    def cut(self, *, reset: bool) -> None:
        """Close after what has been written; with ``reset`` so that the client sees an error."""
        self._response = None
        self._flush()
        if self._transport is None:
            return
        if reset:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.abort()
        else:
            self._shut()

    def _probe(self) -> None:
        """Send what must come next anyway: a client that has left answers it with a reset."""
        if self._response is None or self._held:
            return
        early = self._response.probe()
        self.send(early)
        if not self._response.started:
            self._probed = len(early)

    # -- the end ------------------------------------------------------------------------------------------------

    def _shut(self) -> None:
        """Nothing more will be said or understood."""
        self._closing = True
        self._backlog = b""
        self._reader.close()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self.deadline_s = self._loop.time() + _LINGER_S
        if self._eof:
            transport.close()
            return
        try:
            transport.write_eof()
        except OSError:  # the client has reset the connection
            transport.abort()
            return
        if self._paused:
            transport.resume_reading()

    def abort(self) -> None:
        """Cut the connection, whatever is under way."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def drain(self) -> None:
        """Close where no request is under way."""
        if self._phase is Phase.IDLE and not self._closing:
            self._close_idle()

    def _close_idle(self) -> None:
        """At once, except for output that waits."""
        self._eof = True
        self._shut()

    # -- deadlines ----------------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        if self._closing:
            return
        if self._has_requests():
            self._phase = None
            self.deadline_s = -math.inf if self.congested else math.inf
            return
        phase = self._reader.phase
        if phase is not self._phase:
            self._phase = phase
            self._since_s = self._loop.time()
        allowed_s = self._server.allowed_s[phase] + self._reader.body_bytes / _BODY_FLOOR_BPS
        self.deadline_s = -math.inf if self.congested else self._since_s + allowed_s

    def overdue(self, now_s: float) -> None:
        """``deadline_s`` has passed."""
        transport = self._transport
        if transport is None:
            return
        if self._closing or self.congested:
            waiting = transport.get_write_buffer_size() > 0
            if self._output_stalls(transport, now_s) if waiting else self._closing:
                self.abort()
            elif self._closing:
                self.deadline_s = now_s + _LINGER_S
        elif self._phase is Phase.IDLE:
            self._close_idle()
        else:
            what = self._reader.phase.value
            self._reader.reject(RejectedError(HTTPStatus.REQUEST_TIMEOUT, f"the {what} of the request took too long"))
            self._advance()

    def _output_stalls(self, transport: asyncio.Transport, now_s: float) -> bool:
        """The client has taken none of its output for too long.

        What counts is what its kernel has acknowledged: ours tells the transport of room in steps of a megabyte.
        """
        unacknowledged = int.from_bytes(fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        standing_bytes = transport.get_write_buffer_size() + unacknowledged
        if self._taken_s is None:
            self._output_bytes, self._taken_bytes, self._taken_s = standing_bytes, 0, now_s
        taken_bytes = self._output_bytes - standing_bytes
        if taken_bytes != self._taken_bytes:
            self._taken_bytes, self._taken_s = taken_bytes, now_s
        return now_s - self._taken_s >= self._server.write_stall_s

    def __repr__(self) -> str:
        state = "closing" if self._closing else self._phase.value if self._phase is not None else "answering"
        return f"<ServerConnection {state}>"
