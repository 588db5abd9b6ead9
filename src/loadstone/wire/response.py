"""The answer to one request, as bytes: status line, framing, and what the handler is told about its client."""

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadstone.wire.server_connection import ServerConnection

Headers = Iterable[tuple[bytes, bytes]] | bytes
"""Names and values, or the lines as they go out, each with its line end."""

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_BODYLESS = frozenset({204, 304})


class Response:
    """The answer to one request: ``reply``, or ``start`` … ``write`` … ``end``.

    Misuse raises RuntimeError: a second start, data before the start or after the end, more or fewer bytes than
    ``length`` promised (the connection is cut then, or the rest would be read as the next response).
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_ended",
        "_headless",
        "_keep_alive",
        "_left",
        "_version",
        "close_after",
        "on_disconnect",
        "on_drained",
        "started",
    )

    def __init__(self, connection: "ServerConnection", method: str, version: str, keep_alive: bool) -> None:
        self._connection = connection
        self._headless = method == "HEAD"
        self._version = version
        self._keep_alive = keep_alive
        self._chunked = False
        self._left: int | None = None
        """Bytes of the body still owed, None where no length was given."""
        self._ended = False
        self.started = False
        self.close_after = False
        """Set before ``start`` or ``reply``: the connection closes after this response."""
        self.on_disconnect: Callable[[], None] | None = None
        """Called once if the client leaves, or is cut, before the response has ended."""
        self.on_drained: Callable[[], None] | None = None
        """Called each time that ``congested`` has turned false again."""

    @property
    def congested(self) -> bool:
        """More than 64 KiB wait for the client: pause the source until ``on_drained``."""
        return self._connection.congested

    def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole response at once."""
        self._claim(status)
        framing = b"" if status in _BODYLESS else b"content-length: %d\r\n" % len(body)
        self._ended = True
        self.on_disconnect = self.on_drained = None
        connection = self._connection
        connection.send(self._head(status, headers, framing, b"" if self._headless else body))
        connection.answered(self._keep_alive)

    def start(self, status: int, headers: Headers, length: int | None = None) -> None:
        """The head; it goes out with the first piece of the body, or as soon as the loop turns.

        A body of ``length`` bytes; without it one that is chunked, or for HTTP/1.0 ends with the connection. 204, 304
        and the answer to HEAD have none, whatever is written.
        """
        self._claim(status)
        framing = b""
        if status in _BODYLESS:
            pass
        elif length is not None:
            self._left = length
            framing = b"content-length: %d\r\n" % length
        elif self._version == "1.1":
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        elif not self._headless:
            self._keep_alive = False
        self._connection.hold(self._head(status, headers, framing, b""))

    def write(self, data: bytes) -> None:
        """A piece of the body."""
        self._take(len(data), "takes no data")
        if data and not self._headless:
            self._connection.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self, data: bytes = b"") -> None:
        """The body is complete, ``data`` its last piece."""
        self._take(len(data), "cannot end")
        if self._left and not self._headless:
            self.fail()
            raise RuntimeError(f"{self!r} ended {self._left} bytes short")
        if self._headless:
            data = b""
        elif self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        self._ended = True
        self.on_disconnect = self.on_drained = None
        self._connection.send(data)
        self._connection.answered(self._keep_alive)

    def fail(self) -> None:
        """Break off, so that the client can tell; what was written before still goes out. No effect after the end.

        A body that ends with the connection leaves no other sign than a reset.
        """
        if self._ended:
            return
        self._ended = True
        self.on_disconnect = self.on_drained = None
        unframed = self.started and not self._headless and not self._chunked and self._left is None
        self._connection.cut(reset=unframed)

    def disconnected(self) -> None:
        """The connection is gone: tell the handler, once."""
        on_disconnect, self.on_disconnect = self.on_disconnect, None
        self.on_drained = None
        if on_disconnect is not None:
            on_disconnect()

    def drained(self) -> None:
        """The client has caught up: tell the handler."""
        if self.on_drained is not None:
            self.on_drained()

    def probe(self) -> bytes:
        """Bytes that may be sent now without changing the answer: those that must come next in any case, or none.

        A client that has left answers them with a reset; one that has only stopped sending does not notice.
        """
        if not self.started:
            return b"HTTP/1.1 "
        return b"0" if self._chunked and not self._headless else b""

    def _claim(self, status: int) -> None:
        if self.started:
            raise RuntimeError(f"{self!r} has been started before")
        self.started = True
        self._headless = self._headless or status in _BODYLESS
        self._keep_alive = self._keep_alive and not self.close_after and not self._connection.draining

    def _take(self, size: int, complaint: str) -> None:
        if not self.started or self._ended:
            raise RuntimeError(f"{self!r} {complaint}")
        if self._left is not None and not self._headless:
            self._left -= size
            if self._left < 0:
                self.fail()
                raise RuntimeError(f"{self!r} got {-self._left} bytes more than it promised")

    def _head(self, status: int, headers: Headers, framing: bytes, body: bytes) -> bytes:
        """The head, and the body behind it."""
        lines = headers if isinstance(headers, bytes) else b"".join([b"%b: %b\r\n" % header for header in headers])
        line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        last = b""
        if not self._keep_alive:
            last = b"connection: close\r\n"
        elif self._version == "1.0":
            last = b"connection: keep-alive\r\n"
        return b"".join((line, lines, framing, self._connection.name_line, last, b"\r\n", body))

    def __repr__(self) -> str:
        state = "ended" if self._ended else "started" if self.started else "waiting"
        return f"<Response {state}>"
