"""One HTTP/1.1 response after another, from bytes, into exchanges. No sockets here.

httptools finds the end of a response, with three gaps that are closed here: it reports an interim response (100, 103)
as a complete message, does not finish a response that the end of the connection delimits, and says nothing of bytes
that follow a complete response.

A stream's reads are nearly all one whole chunk each. Such a read is taken without the parser: at the start of a chunk
the parser is in the same state before it and after it, and so need not be told.
"""

import httptools

from loadstone.core.target import Exchange

_KEPT = frozenset({b"content-type", b"retry-after", b"server", b"x-loadstone-reason"})
_LINES = [b"%x\r\n" % length for length in range(0x1000)]
"""The first lines of chunks as servers write them: lower-case digits, no zeros before them."""


def lone_chunk(buffer: bytes | bytearray, view: memoryview, size: int) -> bytes:
    """The data of the one whole chunk that the first ``size`` bytes are, where a chunk starts; else empty.

    Longer chunks than there are ``_LINES``, and those whose length is written otherwise, are the parser's to read.
    """
    length = size - (5 if size <= 0xF + 5 else 6 if size <= 0xFF + 6 else 7)  # what is left beside digits and CRLFs
    if not 0 < length < len(_LINES):
        return b""
    line = _LINES[length]
    start, end = len(line), size - 2
    if end - start == length and buffer.startswith(line) and buffer.startswith(b"\r\n", end):
        return bytes(view[start:end])
    return b""


class UnaskedError(Exception):
    """Stops the parser before what nobody asked for becomes part of the reply."""


class ReplyReader:
    """Fills in status and headers of the current exchange; body bytes gather until ``take``.

    Raises ``httptools.HttpParserError`` from ``feed`` where the bytes are not HTTP/1.1.
    """

    __slots__ = (
        "_exchange",
        "_first",
        "_framed",
        "_headers",
        "_parser",
        "_rest",
        "between_chunks",
        "complete",
        "reusable",
    )

    def __init__(self) -> None:
        self._first = b""
        self._rest: list[bytes] | None = None
        """Of the body: a read seldom brings more than one piece."""
        self._exchange: Exchange | None = None
        self._headers: dict[bytes, bytes] = {}
        self._framed = False
        self.between_chunks = False
        """The parser has seen the end of a chunk, and nothing since: ``lone_chunk`` may read the next."""
        self.complete = True
        self.reusable = True
        """False once the server wants the connection closed, or has sent what nobody asked for."""
        self._parser = httptools.HttpResponseParser(self)

    def begin(self, exchange: Exchange) -> None:
        """The next response belongs to ``exchange``."""
        self._exchange = exchange
        self._framed = False
        self.complete = False

    @property
    def ends_with_connection(self) -> bool:
        """The head is there and gives no length: the end of the connection is the end of the body."""
        return not self.complete and not self._framed and self._exchange is not None and self._exchange.status != 0

    def feed(self, data: memoryview) -> None:
        """Let the parser read ``data``; body bytes are there for ``take`` even where it raises."""
        self._parser.feed_data(data)
        if self.between_chunks and bytes(data[-2:]) != b"\r\n":  # it has seen a part of the next length
            self.between_chunks = False

    def take(self) -> bytes:
        """The bytes of the body since the last call."""
        body, self._first = self._first, b""
        if self._rest is not None:
            body, self._rest = b"".join((body, *self._rest)), None
        return body

    def on_body(self, data: bytes) -> None:
        if not self._first:
            self._first = data
        elif self._rest is None:
            self._rest = [data]
        else:
            self._rest.append(data)

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False
            raise UnaskedError("a second reply to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key in _KEPT:
            if self._exchange is not None and not self.complete:
                self._exchange.headers[key] = value
        elif key == b"content-length" or (key == b"transfer-encoding" and b"chunked" in value.lower()):
            self._framed = True

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        exchange = self._exchange
        if status < 200 or exchange is None or self.complete:
            return
        exchange.status = status
        if exchange.headers == self._headers:  # one dict for all alike: it would be a third of a short exchange
            exchange.headers = self._headers
        else:
            self._headers = exchange.headers

    def on_chunk_header(self) -> None:
        self.between_chunks = False

    def on_chunk_complete(self) -> None:
        self.between_chunks = True

    def on_message_complete(self) -> None:
        self.between_chunks = False
        if self.complete or self._exchange is None:
            return
        if self._exchange.status == 0:  # an interim response: the real one follows
            self._exchange.headers.clear()
            self._framed = False
            return
        self.complete = True
        if not self._parser.should_keep_alive():
            self.reusable = False
        self._exchange = None
