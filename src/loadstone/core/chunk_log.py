"""The body of a reply as it came, piece by piece, each with its time-stamp."""

from array import array
from collections.abc import Iterator
from typing import Any

import zstandard

_BLOCK_BYTES = 16_384
_WORTH_PACKING_BYTES = 1_024
_COMPRESS = zstandard.ZstdCompressor(level=-2)
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
        self._recent.append(t_ns)
        self._recent.append(data)
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
