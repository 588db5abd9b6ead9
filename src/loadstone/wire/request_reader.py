"""Reads HTTP/1.1 requests out of bytes: no sockets, no clock.

Theory of operation. ``feed`` takes bytes however they are split. Complete requests gather in ``ready``; the first thing
that is wrong becomes ``error``, after which nothing is read any more, nor after a request that closes the connection.
httptools refuses most malformed messages by itself (both kinds of length, bare LF, folded lines, control bytes); what
it lets through and we don't is in ``request_head``. What a client may make us keep is bounded: the head, the number of
headers, the body, and by ``_MOST_FRAMING_BYTES`` all the rest (an unfinished header, chunk extensions, trailers).

``recognise`` is the short way for a request that comes whole, under a head that was read before (``head_memo``), while
the parser stands between two messages, where it keeps nothing that the next one could depend on.

An ``Upgrade`` is not taken up: the request is served as any other, and what follows it is HTTP. httptools takes all
behind the head for another protocol, even a body that the head announces (Java's client sends such requests); a new
parser, fed a plain head of the same length (``_resuming``), goes on with the body. Trailers are dropped.
"""

import enum
from http import HTTPStatus

import httptools

from loadstone.wire.head_memo import HeadMemo
from loadstone.wire.request_head import RejectedError, RequestHead, checked_head

PIECE_BYTES = 64 * 1024
"""To be fed at once at most."""
_MOST_HEAD_BYTES = PIECE_BYTES
_MOST_HEADERS = 256
_MOST_FRAMING_BYTES = 128 * 1024
_FRAMING_PER_BODY_BYTE = 8
"""A chunk of one byte comes in six."""

_VERSION_ERRORS = frozenset({"Invalid HTTP version", "Pause on PRI/Upgrade"})


class IncomingRequest:
    """One complete request."""

    __slots__ = ("body", "head", "peer")

    def __init__(self, head: RequestHead, body: bytes, peer: str) -> None:
        self.head = head
        self.body = body
        self.peer = peer
        """The client's address, empty where it is unknown."""

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def target(self) -> bytes:
        return self.head.target

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def query(self) -> bytes:
        return self.head.query

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.head.headers

    @property
    def version(self) -> str:
        return self.head.version

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its lower-case name."""
        return next((value for key, value in self.head.headers if key == name), None)


class Phase(enum.Enum):
    """What is being received."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"


# An enumeration's members are slow to read in Python 3.11, and this one is read for every request.
IDLE = Phase.IDLE


class RequestReader:
    """One connection's requests. ``close`` it, or it is garbage that only a collection frees."""

    __slots__ = (
        "_body",
        "_closed",
        "_fed_bytes",
        "_head",
        "_headers",
        "_keep_alive",
        "_known",
        "_memo",
        "_most_body_bytes",
        "_new",
        "_parser",
        "_resuming",
        "_target",
        "body_bytes",
        "error",
        "peer",
        "phase",
        "ready",
        "wants_continue",
    )

    def __init__(self, most_body_bytes: int, memo: HeadMemo[RequestHead] | None = None) -> None:
        """``memo``: shared by readers of the same ``most_body_bytes``."""
        self.peer = ""
        self._most_body_bytes = most_body_bytes
        self._memo = memo or HeadMemo()
        self._known = self._memo.known
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._closed = False
        self._new = False
        """The message began in the bytes being fed."""
        self._fed_bytes = 0
        """Of the message, after those that it began in."""
        self._headers: list[tuple[bytes, bytes]] = []
        """As they come: of the head, then of the trailer."""
        self._head: RequestHead | None = None
        """Of the message whose body is being received."""
        self._target = b""
        self._body: bytes | bytearray = b""
        self._resuming = False
        """The parser has stopped at an upgrade before the body."""
        self._keep_alive = False
        self.body_bytes = 0
        """Received of the body under way."""
        self.ready: list[tuple[IncomingRequest, bool]] = []
        """Complete requests in order, each with whether the connection may stay open after it."""
        self.error: RejectedError | None = None
        """What stands after all of ``ready``."""
        self.phase = Phase.IDLE
        self.wants_continue = False
        """The client waits for ``100 Continue`` before it sends the body."""

    def recognise(self, data: bytes) -> IncomingRequest | None:
        """The request that ``data`` is, where it is exactly one, under a known head; else it wants to be fed."""
        if self.phase is not IDLE or self._closed:
            return None
        end = data.find(b"\r\n\r\n") + 4
        head = self._known.get(data[:end])
        if head is None or len(data) - end != head.length:
            return None
        return IncomingRequest(head, data[end:], self.peer)

    def feed(self, data: bytes | bytearray) -> None:
        """Take the next bytes of the connection, at most ``PIECE_BYTES``. Never raises for what is in them."""
        rest: bytes | bytearray | memoryview = data
        try:
            while rest and not self._closed:
                rest = self._feed(rest)
        except httptools.HttpParserError as error:
            self._fail(error)
        except RejectedError as rejected:
            self.reject(rejected)

    def _feed(self, data: bytes | bytearray | memoryview) -> bytes | memoryview:
        """Returns what is left after an upgrade, at which the parser stops."""
        assert self._parser is not None
        between, ready = self.phase is IDLE, len(self.ready)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._resuming:
                self._parser = httptools.HttpRequestParser(self)
                self._parser.feed_data(self._head_to_resume())
            return memoryview(data)[upgrade.args[0] :]
        if self.phase is not IDLE:
            self._bound_framing(len(data))
        elif between and len(self.ready) == ready + 1 and isinstance(data, bytes):
            self._remember(data, *self.ready[-1])
        return b""

    def _remember(self, data: bytes, request: IncomingRequest, keep_alive: bool) -> None:
        """``data`` is one request from its first byte to its last."""
        head = request.head
        if keep_alive and head.length is not None and not head.expects_continue:
            self._memo.keep(data, head.length, head)

    def _head_to_resume(self) -> bytes:
        assert self._head is not None
        size = self._head.length
        length = b"transfer-encoding: chunked" if size is None else b"content-length: %d" % size
        connection = b"keep-alive" if self._keep_alive else b"close"
        return b"POST / HTTP/1.1\r\nconnection: %b\r\n%b\r\n\r\n" % (connection, length)

    def _bound_framing(self, size: int) -> None:
        if self._new:
            self._new = False
            return
        self._fed_bytes += size
        framing_bytes = self._fed_bytes - self.body_bytes
        if framing_bytes > _MOST_FRAMING_BYTES + _FRAMING_PER_BODY_BYTE * self.body_bytes:
            if self.phase is Phase.HEAD:
                raise RejectedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too large")
            raise RejectedError(HTTPStatus.BAD_REQUEST, "too much framing around the body")

    def _fail(self, error: httptools.HttpParserError) -> None:
        if isinstance(error, httptools.HttpParserCallbackError):
            cause = error.__context__
            if not isinstance(cause, RejectedError):
                raise error
            self.reject(cause)
        elif not self._closed:
            reason = str(error)
            wrong_version = reason in _VERSION_ERRORS
            status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED if wrong_version else HTTPStatus.BAD_REQUEST
            self.reject(RejectedError(status, reason))

    def reject(self, rejected: RejectedError) -> None:
        """Read no more; the request under way is wrong."""
        self._closed = True
        self.error = rejected
        self.wants_continue = False

    def close(self) -> None:
        """Read no more, and let go of the parser."""
        self._closed = True
        self._parser = None

    # -- httptools ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        self.phase = Phase.HEAD
        self._new = True
        self._fed_bytes = 0
        self._headers = []
        self._target = b""

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._resuming:
            self._resuming = False
            return
        parser = self._parser
        assert parser is not None
        self.phase = Phase.BODY
        headers, self._headers = self._headers, []
        self._bound_head(headers)
        head = self._head = checked_head(parser.get_method(), self._target, headers, parser.get_http_version())
        if head.length is not None and head.length > self._most_body_bytes:
            self._body_too_large()
        has_body = head.length != 0
        self.wants_continue = head.expects_continue and has_body
        self._keep_alive = parser.should_keep_alive()
        self._resuming = has_body and parser.should_upgrade()

    def _bound_head(self, headers: list[tuple[bytes, bytes]]) -> None:
        if len(headers) > _MOST_HEADERS:
            raise RejectedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {_MOST_HEADERS} headers")
        if self._new:  # all of it within one piece
            return
        size = len(self._target) + sum([len(name) + len(value) for name, value in headers])
        if size > _MOST_HEAD_BYTES:
            reason = f"the head is larger than {_MOST_HEAD_BYTES} bytes"
            raise RejectedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, reason)

    def on_body(self, data: bytes) -> None:
        self.wants_continue = False
        self.body_bytes += len(data)
        if self.body_bytes > self._most_body_bytes:
            self._body_too_large()
        self._body = joined(self._body, data)

    def _body_too_large(self) -> None:
        raise RejectedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {self._most_body_bytes} bytes"
        )

    def on_message_complete(self) -> None:
        if self._resuming:
            return
        assert self._head is not None
        self.ready.append((IncomingRequest(self._head, bytes(self._body), self.peer), self._keep_alive))
        self._headers, self._head, self._body = [], None, b""
        self.body_bytes = 0
        self.phase = Phase.IDLE
        self.wants_continue = False
        self._closed = not self._keep_alive

    def __repr__(self) -> str:
        state = f"refused {self.error.status}" if self.error else "closed" if self._closed else self.phase.value
        return f"<RequestReader {state}, {len(self.ready)} ready>"


def joined(have: bytes | bytearray, data: bytes) -> bytes | bytearray:
    """``have`` and ``data``; many small pieces grow in place, and the common single piece is not copied."""
    if not have:
        return data
    if isinstance(have, bytes):
        have = bytearray(have)
    have += data
    return have
