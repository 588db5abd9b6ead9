"""Server-sent events: bytes in, events out, whatever the split of the bytes.

Theory of operation. Line ends (LF, CRLF, CR) become LF as the bytes come in; a CR at the end of one piece swallows an
LF at the start of the next. Bytes without a line end wait in ``_rest``; complete lines are fields of the event being
gathered; an empty line gives the event out. What is gathered and not given out when the stream ends is half an event.
"""

from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event: its ``data`` lines joined by LF, and its name (empty where the stream names none)."""

    data: bytes
    name: bytes = b""


class SseParser:
    """Incremental parser of one stream, after the WHATWG definition; ``id`` and ``retry`` mean nothing here."""

    __slots__ = ("_after_cr", "_data", "_name", "_rest", "_started")

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._name = b""
        self._after_cr = False
        self._started = False

    def __repr__(self) -> str:
        return f"<SseParser {len(self.leftover)} bytes of half an event>"

    def feed(self, piece: bytes) -> list[Event]:
        """The events that ``piece`` completes, in order."""
        piece = self._with_lf_only(piece)
        if b"\n" not in piece:
            if piece:
                self._rest.append(piece)
            return []
        self._rest.append(piece)
        lines = b"".join(self._rest).split(b"\n")
        self._rest = [last] if (last := lines.pop()) else []
        events: list[Event] = []
        for line in lines:
            if line:
                self._take_line(line)
            elif self._data:
                events.append(Event(b"\n".join(self._data), self._name))
                self._forget_event()
            else:
                self._forget_event()
        return events

    @property
    def leftover(self) -> bytes:
        """Data of an event that was begun and not completed; empty where the stream stands between two events."""
        data = list(self._data)
        rest = b"".join(self._rest)
        if rest and not rest.startswith(b":"):
            data.append(_value(rest.partition(b":")[2]) or rest)
        return b"\n".join(data)

    def _with_lf_only(self, piece: bytes) -> bytes:
        if not piece:
            return piece
        if self._after_cr:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return piece

    def _take_line(self, line: bytes) -> None:
        if not self._started:
            self._started = True
            line = line.removeprefix(_BOM)
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(_value(value))
        elif field == b"event":
            self._name = _value(value)

    def _forget_event(self) -> None:
        self._started = True
        self._data = []
        self._name = b""


def _value(value: bytes) -> bytes:
    return value[1:] if value.startswith(b" ") else value
