"""One HTTP/1.1 reply after another, from bytes, for the gate: heads without what belongs to the connection alone.

httptools finds the end of a reply, with three gaps that are closed here: it reports an interim reply (100, 103) as a
complete message, does not finish a reply that the end of the connection delimits, and takes a reply to HEAD for one
with a body. A callback stops the parser by raising; nothing that was parsed before is lost by it.

``recognise`` is the short way for a reply that comes whole, under a head that was read before (``head_memo``).
"""

import re
from typing import Any

import httptools

from loadstone.wire.head_memo import HeadMemo

MOST_HEAD_BYTES = 64 * 1024
_MOST_HEADERS = 256
_INTERIM = range(100, 200)
_SWITCHED = 101
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_OURS = frozenset(
    (b"connection", b"content-length", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
)


class Head:
    """The head of a final reply. Equal heads may share one, so it is only read."""

    __slots__ = ("headers", "length", "notes", "reason", "status")

    def __init__(
        self,
        status: int,
        reason: bytes,
        headers: list[tuple[bytes, bytes]],
        length: int | None,
        notes: Any = None,
    ) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        """In the order received, names in lower case, without content-length and what belongs to the connection."""
        self.length = length
        """Content-Length; None where the body is chunked or ends with the connection."""
        self.notes = notes
        """The reader's own, for what it makes of the head: kept as long as the head is."""


class _StopParserError(Exception):
    """Raised inside a callback to stop the parser; ``refused`` says why, unless the reply is complete."""


class ReplyReader:
    """Reads the reply that ``begin`` asked for. ``feed`` takes bytes and raises what ``refusal`` understands.

    ``memo`` is shared by the readers of one server's replies.

    After each ``feed``: ``head`` where it has been completed (the caller's to take), body bytes in ``parts`` (the
    caller's to clear), ``complete`` once the reply has ended.
    """

    __slots__ = (
        "_framed",
        "_head_bytes",
        "_head_only",
        "_headers",
        "_known",
        "_length",
        "_memo",
        "_named",
        "_parser",
        "_reason",
        "_refused",
        "_status",
        "begun",
        "complete",
        "feed",
        "head",
        "on_body",
        "parts",
        "reusable",
    )

    def __init__(self, memo: HeadMemo[Head] | None = None) -> None:
        self._memo = memo or HeadMemo()
        self._known = self._memo.known
        self.parts: list[bytes] = []
        self.on_body = self.parts.append
        self.reusable = True
        """False once the server wants the connection closed, or more came than the reply."""
        self._refused = ""
        self._parser = httptools.HttpResponseParser(self)
        self.feed = self._parser.feed_data
        self._head_only = False
        self._clear()

    def begin(self, head_only: bool) -> None:
        """The next bytes are a new reply; ``head_only``: its request was a HEAD."""
        self._head_only = head_only
        if self.begun:
            self._clear()

    def _clear(self) -> None:
        self.head: Head | None = None
        self.begun = False
        """A byte of a reply has come, be it of an interim one."""
        self.complete = False
        self._status = 0
        self._head_bytes = 0
        self._framed = False
        self._clear_head()

    def _clear_head(self) -> None:
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._named: frozenset[bytes] = frozenset()
        self._length: int | None = None

    def recognise(self, data: bytes) -> tuple[Head, bytes] | None:
        """Head and body where ``data`` is the whole reply, under a known head; else it wants to be fed."""
        if self.begun or self._head_only:
            return None
        end = data.find(b"\r\n\r\n") + 4
        head = self._known.get(data[:end])
        if head is None or len(data) - end != head.length:
            return None
        return head, data[end:]

    def remember(self, data: bytes, head: Head, body: bytes) -> None:
        """``data``, the first that was fed, was the whole reply: its head need not be read again."""
        if self.reusable and not self._head_only and head.length == len(body):
            self._memo.keep(data, len(body), head)

    @property
    def ends_with_connection(self) -> bool:
        """The head is there and gives no length: the end of the connection is the end of the body."""
        return self._status != 0 and not self._framed and not self.complete

    def refusal(self, error: Exception) -> str:
        """Why ``feed`` raised ``error``; empty where it only met what follows a complete reply."""
        if self.complete:
            self.reusable = False
            return ""
        if self._refused:
            return self._refused
        if isinstance(error, httptools.HttpParserCallbackError | httptools.HttpParserUpgrade):
            raise error  # neither is raised but for the reasons above
        return f"a reply that is not HTTP/1.1 ({error})"

    # -- httptools

    def on_message_begin(self) -> None:
        if self.complete:
            raise _StopParserError
        self.begun = True

    def on_status(self, text: bytes) -> None:
        self._reason += text
        self._head_bytes += len(text)
        if self._head_bytes > MOST_HEAD_BYTES:
            self._refuse_size()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MOST_HEAD_BYTES:
            self._refuse_size()
        if self._status:  # a trailer
            return
        key = name.lower()
        if key in _OURS or key.startswith(b"proxy-"):
            self._note(key, value)
        else:
            self._headers.append((key, value))
            if len(self._headers) > _MOST_HEADERS:
                self._refuse(f"more than {_MOST_HEADERS} headers")

    def _note(self, key: bytes, value: bytes) -> None:
        """A header that concerns this connection alone, or the framing."""
        if key == b"content-length":
            self._length = int(value)
            self._framed = True
        elif key == b"connection":
            self._named |= {name.strip().lower() for name in value.split(b",")}
        elif key == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                self._refuse("a transfer coding other than chunked")
            self._framed = True

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < _INTERIM.start or status == _SWITCHED:
            self._refuse(f"a status that nobody asked for ({status})")
        if status in _INTERIM:
            return
        if self._reason != b"OK" and _CONTROL.search(self._reason):
            self._refuse("control characters in its status line")
        named = self._named
        headers = [header for header in self._headers if header[0] not in named] if named else self._headers
        self._status = status
        self.head = Head(status, self._reason, headers, self._length)
        if self._head_only:  # whether a body follows after all, only the parser could tell: not used again
            self.reusable = False
            self.complete = True
            raise _StopParserError

    def on_message_complete(self) -> None:
        if not self._status:  # an interim reply: the real one follows
            self._clear_head()
            self._framed = False
            return
        self.complete = True
        if not self._parser.should_keep_alive():
            self.reusable = False

    def _refuse_size(self) -> None:
        self._refuse(f"a head of more than {MOST_HEAD_BYTES // 1024} KiB")

    def _refuse(self, why: str) -> None:
        self._refused = why
        raise _StopParserError

    def __repr__(self) -> str:
        state = (
            "complete" if self.complete else "in the body" if self._status else "in the head" if self.begun else "new"
        )
        return f"<ReplyReader {state}>"
