"""Which sockets can be read: all of a client's behind one descriptor of the loop.

Theory of operation. At tens of thousands of chunks a second, waking up for each costs more than reading it. The
kernel has stamped its arrival already, so nothing is lost by reading a moment later: while reads come thicker than one
in 50 µs the poller rests 0.5 ms after each round, and the next round finds them together (a network card's interrupt
moderation, one floor up). A planned send may be late by that much, and is recorded so. It does not rest after a round
in which a reply ended, because a slot waits to be refilled, nor where there are no kernel stamps, because then the
time of reading is the figure.

Readiness is edge-triggered: level-triggered, the kernel looks at each socket once more after it was read. A read that
leaves room in its buffer has emptied the socket, and what comes later is a new edge; after a full read, and where an
end of the stream was told together with the bytes before it, the socket is armed again, which tells what still waits.
"""

import asyncio
import select
import sys
import time
from collections.abc import Callable
from typing import Protocol

from loadstone.wire.stamps import READ_BYTES

_EDGES = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET if sys.platform == "linux" else 0
_BYTES_ONLY = select.EPOLLIN if sys.platform == "linux" else 0
_THICK_NS = 50_000
_REST_S = 0.0005
_ROUND = 256
_SMOOTHING = 16


class Reader(Protocol):
    """Is called when its socket can be read."""

    def read(self) -> int:
        """Read once, up to ``READ_BYTES``; the bytes read, 0 where nothing waits or the stream has ended."""


class Poller(Protocol):
    """Calls a reader for as long as its descriptor has something to be read."""

    prompt: bool
    """Set during a round: do not rest after this one."""

    def add(self, fd: int, reader: Reader) -> None: ...
    def remove(self, fd: int) -> None: ...
    def close(self) -> None: ...


def make_poller(loop: asyncio.AbstractEventLoop, may_rest: Callable[[], bool]) -> Poller:
    """The gathering poller on Linux, the loop's own readers elsewhere."""
    return EpollPoller(loop, may_rest) if sys.platform == "linux" else LoopPoller(loop)


class EpollPoller:
    """See the theory of operation above. An error in a reader is the loop's to report; the others are read next."""

    def __init__(self, loop: asyncio.AbstractEventLoop, may_rest: Callable[[], bool]) -> None:
        self.prompt = False
        self._loop = loop
        self._may_rest = may_rest
        self._epoll = select.epoll()
        self._readers: list[Reader | None] = []
        """By descriptor."""
        self._sockets = 0
        self._last_ns = time.monotonic_ns()
        self._gap_ns = 1_000_000_000
        loop.add_reader(self._epoll.fileno(), self._round)

    def __repr__(self) -> str:
        return f"<EpollPoller {self._sockets} sockets, a read each {self._gap_ns / 1000:.0f} µs>"

    def add(self, fd: int, reader: Reader) -> None:
        readers = self._readers
        readers += [None] * (fd + 1 - len(readers))
        readers[fd] = reader
        self._sockets += 1
        self._epoll.register(fd, _EDGES)

    def remove(self, fd: int) -> None:
        if fd < len(self._readers) and self._readers[fd] is not None:
            self._readers[fd] = None
            self._sockets -= 1
            self._epoll.unregister(fd)

    def _round(self) -> None:
        self.prompt = False
        ready = self._epoll.poll(0, _ROUND)
        done = 0
        try:
            for fd, events in ready:
                done += 1
                reader = self._readers[fd]
                if reader is not None:
                    size = reader.read()
                    if (size == READ_BYTES or (size and events != _BYTES_ONLY)) and self._readers[fd] is reader:
                        self._epoll.modify(fd, _EDGES)
        except BaseException:
            self._arm_again(ready[done - 1 :])
            raise
        self._count(len(ready))
        if self._gap_ns < _THICK_NS and not self.prompt and self._may_rest():
            time.sleep(_REST_S)

    def _arm_again(self, unread: list[tuple[int, int]]) -> None:
        for fd, _ in unread:
            if self._readers[fd] is not None:
                self._epoll.modify(fd, _EDGES)

    def _count(self, reads: int) -> None:
        now_ns = time.monotonic_ns()
        if reads:
            self._gap_ns += ((now_ns - self._last_ns) // reads - self._gap_ns) // _SMOOTHING
            self._last_ns = now_ns

    def close(self) -> None:
        self._readers = [None] * len(self._readers)  # a reader may have called this from within a round
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()


class LoopPoller:
    """The loop's own readers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.prompt = False
        self._loop = loop

    def add(self, fd: int, reader: Reader) -> None:
        self._loop.add_reader(fd, reader.read)

    def remove(self, fd: int) -> None:
        self._loop.remove_reader(fd)

    def close(self) -> None:
        """Nothing is held."""
