"""How many tokens a reply really cost, read from what passes by: ``usage`` where the server tells, else its events."""

import msgspec

from loadstone.hold.bodies import Usage, decode_reply

_MOST_KEPT_BYTES = 1024 * 1024


class UsageReader:
    """Fed with every piece of a body. Of a stream only the last two pieces are kept, of a document up to 1 MiB."""

    __slots__ = ("_events", "_kept", "_kept_bytes", "_streams")

    def __init__(self, streams: bool) -> None:
        self._streams = streams
        self._events = 0
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    def __repr__(self) -> str:
        return f"<UsageReader {self._events} events>" if self._streams else f"<UsageReader {self._kept_bytes} bytes>"

    def feed(self, data: bytes) -> int:
        """Take note of a piece of the body; returns how many events it holds."""
        events = 0
        if self._streams:
            events = data.count(b"data:")
            self._events += events
            self._kept = [self._kept[-1], data] if self._kept else [data]
        elif self._kept_bytes <= _MOST_KEPT_BYTES:
            self._kept.append(data)
            self._kept_bytes += len(data)
        return events

    @property
    def within_event(self) -> bool:
        """The stream stopped short of an event's end, as far as the last piece tells."""
        return bool(self._kept) and not self._kept[-1].endswith((b"\n\n", b"\r\n\r\n"))

    def tokens(self) -> tuple[int | None, int]:
        """(all tokens of the request as the server counts them, or None; output tokens, at least as many)."""
        body = b"".join(self._kept)
        if not self._streams:
            return tokens_of(body)
        return _figures(_last_usage(body), max(0, self._events - 1))


def tokens_of(document: bytes) -> tuple[int | None, int]:
    """As ``UsageReader.tokens``, of a whole JSON document."""
    usage = _read(document) if document.rfind(b'"usage"') >= 0 else None  # it stands last, where it does
    if usage is None:
        return None, 0
    return usage.total_tokens or usage.prompt_tokens + usage.completion_tokens, usage.completion_tokens


def _figures(usage: Usage | None, output_tokens: int) -> tuple[int | None, int]:
    if usage is None:
        return None, output_tokens
    return usage.total_tokens or usage.prompt_tokens + usage.completion_tokens, usage.completion_tokens


def _last_usage(stream: bytes) -> Usage | None:
    if b'"usage"' not in stream:
        return None
    lines = [line[5:] for line in reversed(stream.splitlines()) if line.startswith(b"data:")]
    return next((usage for line in lines if b"usage" in line and (usage := _read(line)) is not None), None)


def _read(document: bytes) -> Usage | None:
    try:
        return decode_reply(document).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Whatever the server means by it: its own count is not to be had, and the reply has gone out unread.
        return None
