"""Reads HTTP/1.1 requests out of bytes: no sockets, no clock.

Theory of operation. ``feed`` takes bytes however they are split. Complete requests gather in ``ready``; the first thing
that is wrong becomes ``error``, after which nothing is read any more, nor after a request that closes the connection.
httptools refuses most malformed messages by itself (both kinds of length, bare LF, folded lines, control bytes); what
it lets through and we don't is in ``_check_head``. What a client may make us keep is bounded: the head, the number of
headers, the body, and by ``_MOST_FRAMING_BYTES`` all the rest (an unfinished header, chunk extensions, trailers).

An ``Upgrade`` is not taken up: the request is served as any other, and what follows it is HTTP. httptools takes all
behind the head for another protocol, even a body that the head announces (Java's client sends such requests); a new
parser, fed a plain head of the same length (``_resuming``), goes on with the body. Trailers are dropped.
"""

import enum
from dataclasses import dataclass
from http import HTTPStatus

import httptools

PIECE_BYTES = 64 * 1024
"""To be fed at once at most."""
_MOST_HEAD_BYTES = PIECE_BYTES
_MOST_HEADERS = 256
_MOST_FRAMING_BYTES = 128 * 1024
_FRAMING_PER_BODY_BYTE = 8
"""A chunk of one byte comes in six."""

_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
_VERSION_ERRORS = frozenset({"Invalid HTTP version", "Pause on PRI/Upgrade"})
_JUDGED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})


@dataclass(slots=True)
class IncomingRequest:
    """One complete request."""

    method: str
    target: bytes
    """As received: it may be absolute (``http://host/path``)."""
    path: str
    """Without the query; always that of the target, whatever form it had."""
    query: bytes
    headers: list[tuple[bytes, bytes]]
    """In the order received, names in lower case, without trailers."""
    body: bytes
    peer: str
    """The client's address, empty where it is unknown."""
    version: str
    """1.1 or 1.0."""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its lower-case name."""
        return next((value for key, value in self.headers if key == name), None)


class RejectedError(Exception):
    """A request that is answered with ``status``, and its connection closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Phase(enum.Enum):
    """What is being received."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"


class RequestReader:
    """One connection's requests. ``close`` it, or it is garbage that only a collection frees."""

    __slots__ = (
        "_body",
        "_closed",
        "_fed_bytes",
        "_head",
        "_headers",
        "_keep_alive",
        "_length_bytes",
        "_method",
        "_most_body_bytes",
        "_new",
        "_parser",
        "_resuming",
        "_target",
        "_version",
        "body_bytes",
        "error",
        "peer",
        "phase",
        "ready",
        "wants_continue",
    )

    def __init__(self, most_body_bytes: int) -> None:
        self.peer = ""
        self._most_body_bytes = most_body_bytes
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._closed = False
        self._new = False
        """The message began in the bytes being fed."""
        self._fed_bytes = 0
        """Of the message, after those that it began in."""
        self._headers: list[tuple[bytes, bytes]] = []
        """As they come: of the head, then of the trailer."""
        self._head: list[tuple[bytes, bytes]] = []
        self._target = b""
        self._body: bytes | bytearray = b""
        self._method = self._version = ""
        self._length_bytes: int | None = 0
        """Of the body, as announced; None: chunked."""
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
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._resuming:
                self._parser = httptools.HttpRequestParser(self)
                self._parser.feed_data(self._head_to_resume())
            return memoryview(data)[upgrade.args[0] :]
        if self.phase is not Phase.IDLE:
            self._bound_framing(len(data))
        return b""

    def _head_to_resume(self) -> bytes:
        size = self._length_bytes
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
        self._head, self._headers = self._headers, []
        self._bound_head()
        self._version = parser.get_http_version()
        self._method = _check_line(parser.get_method(), self._target, self._version)
        self._length_bytes, expects = _check_head(self._head, self._version)
        if self._length_bytes is not None and self._length_bytes > self._most_body_bytes:
            self._body_too_large()
        has_body = self._length_bytes != 0
        self.wants_continue = expects and has_body
        self._keep_alive = parser.should_keep_alive()
        self._resuming = has_body and parser.should_upgrade()

    def _bound_head(self) -> None:
        if len(self._head) > _MOST_HEADERS:
            raise RejectedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {_MOST_HEADERS} headers")
        if self._new:  # all of it within one piece
            return
        size = len(self._target) + sum([len(name) + len(value) for name, value in self._head])
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
        path, query = _path_of(self._target)
        request = IncomingRequest(
            self._method, self._target, path, query, self._head, bytes(self._body), self.peer, self._version
        )
        self.ready.append((request, self._keep_alive))
        self._headers, self._head, self._body = [], [], b""
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


def _check_line(verb: bytes, target: bytes, version: str) -> str:
    """The method. Raises RejectedError for a request line that we don't serve."""
    if version not in ("1.1", "1.0"):
        raise RejectedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version} is not served")
    method = _METHODS.get(verb)
    if method is None:
        raise RejectedError(HTTPStatus.NOT_IMPLEMENTED, f"the method {verb.decode()} is not served")
    origin_form = target.startswith(b"/") or (target == b"*" and method == "OPTIONS")
    if b"#" in target or not (origin_form or target.lower().startswith((b"http://", b"https://"))):
        raise RejectedError(HTTPStatus.BAD_REQUEST, "the request target is not a path")
    return method


def _check_head(headers: list[tuple[bytes, bytes]], version: str) -> tuple[int | None, bool]:
    """The length of the body (None: chunked) and whether 100 Continue is expected. Raises RejectedError."""
    length: int | None = 0
    hosts = 0
    codings: list[bytes] = []
    expects = False
    for name, value in headers:
        if name not in _JUDGED:
            continue
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif version == "1.1":
            expects = _expects_continue(value)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise RejectedError(HTTPStatus.BAD_REQUEST, f"{hosts} Host headers")
    if codings:
        _check_codings(codings, version)
        length = None
    return length, expects


def _check_codings(codings: list[bytes], version: str) -> None:
    if version != "1.1" or len(codings) > 1:
        raise RejectedError(HTTPStatus.BAD_REQUEST, "Transfer-Encoding is repeated, or of HTTP/1.0")
    if codings != [b"chunked"]:
        raise RejectedError(HTTPStatus.NOT_IMPLEMENTED, "the only Transfer-Encoding served is chunked")


def _expects_continue(value: bytes) -> bool:
    if value.lower() != b"100-continue":
        raise RejectedError(HTTPStatus.EXPECTATION_FAILED, "the only expectation served is 100-continue")
    return True


def _path_of(target: bytes) -> tuple[str, bytes]:
    """Path and query of any form of target; an absolute one without a path means ``/``."""
    if not target.startswith((b"/", b"*")):
        _scheme, _, rest = target.partition(b"://")
        start = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
        target = rest[start:]
        if not target.startswith(b"/"):
            target = b"/" + target
    path, _, query = target.partition(b"?")
    return path.decode("latin-1"), query
