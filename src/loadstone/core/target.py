"""What the generator sends requests to: an HTTP server or the simulator in virtual time."""

import enum
from collections.abc import Callable
from typing import Protocol

import msgspec

from loadstone.core.chunk_log import ChunkLog


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request, ready to be written: JSON is built before the level, never on the hot path."""

    path: str
    """Path below the base URL, such as ``/v1/chat/completions``."""
    body: bytes
    index: int
    """Its place in the workload: the same index has the same lengths on every level, with new text."""
    input_tokens: int | None = None
    """Prompt tokens asked for, where known beforehand."""
    output_tokens: int | None = None
    """Tokens asked for in the reply."""
    sequences: int = 1
    """Texts in the request (rerank and embeddings send several)."""


class Break(enum.StrEnum):
    """Why an exchange ended without a complete HTTP response."""

    CONNECT = "connect"
    """The connection was refused, reset while connecting, or the host is unreachable."""
    TLS = "tls"
    TIMEOUT = "timeout"
    DISCONNECT = "disconnect"
    """The server closed or reset the connection before the response was complete."""
    MALFORMED = "malformed"
    """The bytes are not HTTP/1.1."""
    CLIENT = "client"
    """This machine's own limits: open files, ports, buffers, or bytes that waited unread past the time-out."""
    CUT = "cut"
    """We cancelled it."""


class Exchange:
    """One request on the wire and what came back, filled in while it runs. All times are monotonic nanoseconds."""

    __slots__ = (
        "broken",
        "connect_ns",
        "end_ns",
        "error",
        "headers",
        "lag_ns",
        "log",
        "planned_ns",
        "request",
        "sent_ns",
        "slot",
        "status",
        "turnaround_ns",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.slot = -1
        self.planned_ns = 0
        """When the schedule wanted it sent."""
        self.turnaround_ns = -1
        """Write minus the last byte of the slot's previous exchange; -1 where the slot had paused or just opened."""
        self.sent_ns = 0
        """Clock read just before the request's first byte is written, connecting not included; 0 until then."""
        self.connect_ns = 0
        """Time from ``start`` to the write that went into connecting; 0 on a connection that was already open."""
        self.status = 0
        """HTTP status, 0 until the head of the response is complete."""
        self.headers: dict[bytes, bytes] = {}
        """Of the response head, lower case: content-type, retry-after, server, x-loadstone-reason."""
        self.log = ChunkLog()
        self.lag_ns = 0
        """Largest delay between the kernel's stamp of a read and the read itself; 0 without kernel stamps."""
        self.end_ns = 0
        """Stamp of the last byte, or the time of the failure; 0 while in flight."""
        self.broken: Break | None = None
        self.error = ""

    @property
    def done(self) -> bool:
        return self.end_ns != 0

    def __repr__(self) -> str:
        state = self.broken or (f"status {self.status}" if self.done else "in flight")
        return f"<Exchange {self.request.index} {state}, {len(self.log)} chunks>"


class Target(Protocol):
    """Where requests go. One implementation speaks HTTP, one is the simulator."""

    def start(self, exchange: Exchange, done: Callable[[Exchange], None]) -> None:
        """Send ``exchange.request``; call ``done`` exactly once when it has ended, and never from within this call."""
        ...

    def cancel(self, exchange: Exchange) -> None:
        """End an exchange now as ``Break.CUT`` and close its connection; ``done`` is called. No effect once done."""
        ...
