"""Tells when a client that had stopped sending has gone altogether.

Theory of operation. ``close`` and ``shutdown(SHUT_WR)`` look the same from here: an end of file. The client that only
shut down still wants its answer; the one that closed must free its place at once. The difference shows when something
is sent to it: the kernel of the closed one answers with a reset. By then asyncio watches the socket no more, since an
end of file would wake it for ever; an epoll of our own with an empty mask reports hang-ups and errors alone.
"""

import asyncio
import select
from collections.abc import Callable


class HangupWatch:
    """Sockets whose peer has sent its end of file. Linux only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._on_events)

    def watch(self, fd: int, on_hangup: Callable[[], None]) -> None:
        """Call ``on_hangup`` once when the peer of ``fd`` resets the connection."""
        self._told[fd] = on_hangup
        self._epoll.register(fd, 0)

    def forget(self, fd: int) -> None:
        """Before ``fd`` is closed. No effect where it is not watched."""
        if self._told.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _on_events(self) -> None:
        for fd, _events in self._epoll.poll(0):
            on_hangup = self._told[fd]
            self.forget(fd)
            on_hangup()

    def close(self) -> None:
        """Watch nothing any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._told.clear()

    def __repr__(self) -> str:
        return f"<HangupWatch of {len(self._told)} sockets>"
