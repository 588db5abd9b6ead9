"""What the generator sends requests to: an HTTP server or the simulator in virtual time."""

import enum
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import zstandard


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


_BLOCK_BYTES = 16_384
_WORTH_PACKING_BYTES = 1_024
_COMPRESS = zstandard.ZstdCompressor(level=1)
_DECOMPRESS = zstandard.ZstdDecompressor()


class ChunkLog:
    """The received body as (time-stamp, bytes) pairs, kept small: full blocks of bytes are compressed.

    About 300 B of raw event per streamed chunk become some 20–30 B; a level of a million chunks fits in tens of MB.
    """

    __slots__ = ("_blocks", "_lengths", "_recent", "_recent_bytes", "_stamps_ns")

    def __init__(self) -> None:
        self._recent: list[Any] = []
        """Not yet packed: stamp, bytes, stamp, bytes … in one list, as most logs of short replies hold one pair."""
        self._recent_bytes = 0
        self._stamps_ns: array[int] | None = None
        self._lengths: array[int] | None = None
        self._blocks: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self._recent) // 2 + (len(self._stamps_ns) if self._stamps_ns is not None else 0)

    def append(self, t_ns: int, data: bytes) -> None:
        """Record ``data`` as received at ``t_ns`` (monotonic nanoseconds)."""
        self._recent += (t_ns, data)
        self._recent_bytes += len(data)
        if self._recent_bytes >= _BLOCK_BYTES:
            self._pack()

    def seal(self) -> None:
        """Compress what is left, once the exchange has ended; short bodies stay as they are."""
        if self._recent_bytes > _WORTH_PACKING_BYTES:
            self._pack()

    def _pack(self) -> None:
        if self._stamps_ns is None or self._lengths is None or self._blocks is None:
            self._stamps_ns, self._lengths, self._blocks = array("q"), array("I"), []
        pieces = self._recent[1::2]
        self._stamps_ns.extend(self._recent[0::2])
        self._lengths.extend(map(len, pieces))
        # A copy: what compress returns keeps the memory of an incompressible block.
        self._blocks.append(memoryview(_COMPRESS.compress(b"".join(pieces))).tobytes())
        self._recent = []
        self._recent_bytes = 0

    def first_ns(self) -> int:
        """Stamp of the first byte of the body, 0 where there is none."""
        first_ns: int = 0
        if self._stamps_ns:
            first_ns = self._stamps_ns[0]
        elif self._recent:
            first_ns = self._recent[0]
        return first_ns

    def last_ns(self) -> int:
        """Stamp of the last byte of the body, 0 where there is none."""
        last_ns: int = 0
        if self._recent:
            last_ns = self._recent[-2]
        elif self._stamps_ns:
            last_ns = self._stamps_ns[-1]
        return last_ns

    def body(self) -> bytes:
        """The whole body."""
        return self._packed() + b"".join(self._recent[1::2])

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        packed = self._packed()
        start = 0
        for t_ns, length in zip(self._stamps_ns or (), self._lengths or (), strict=True):
            yield t_ns, packed[start : start + length]
            start += length
        yield from zip(self._recent[0::2], self._recent[1::2], strict=True)

    def _packed(self) -> bytes:
        return b"".join([_DECOMPRESS.decompress(block) for block in self._blocks or ()])

    def __repr__(self) -> str:
        return f"<ChunkLog {len(self)} chunks>"


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
