"""When bytes arrived: the kernel's own receive time-stamps, on the monotonic clock.

Linux stamps each packet as it comes in (``SO_TIMESTAMPNS``), so the time of a chunk does not depend on when this
process got round to reading it. The stamp is on the realtime clock; ``Receiver`` knows its offset to the monotonic
one. Where the system offers no stamps, or its realtime clock was moved, the time of a read is the clock just before it.
"""

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Callable

_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_ANCILLARY_BYTES = 64
READ_BYTES = 65_536
"""The most that one read brings."""

_MAX_MOVE_NS = 1_000_000
_SWITCH_ON_S = 0.1
_SWITCH_ON_STEP_S = 0.001


def clock_offset_ns(rounds: int = 21) -> int:
    """Realtime minus monotonic clock: the pair read closest together out of ``rounds``, good to some 50 ns."""
    best_gap, best = 1 << 62, 0
    for _ in range(rounds):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if after - before < best_gap:
            best_gap, best = after - before, wall - (before + after) // 2
    return best


class Receiver:
    """Reads sockets into one shared buffer and says when the bytes came.

    After ``receive`` the bytes are the first ``size`` of ``buffer`` and of its ``view``, ``stamp_ns`` is their arrival
    and ``lag_ns`` how long they waited.
    """

    __slots__ = ("_buffers", "_offset_ns", "_stamped_pair", "buffer", "kernel_stamps", "lag_ns", "stamp_ns", "view")

    def __init__(self, offset_ns: Callable[[], int] = clock_offset_ns) -> None:
        self.buffer = bytearray(READ_BYTES)
        self.view = memoryview(self.buffer)
        self._buffers = [self.view]
        self._stamped_pair = _open_stamped_pair()
        self.kernel_stamps = self._stamped_pair is not None
        """False where the clock is read in place of the kernel's stamps, from the start or since it was moved."""
        self._offset_ns = offset_ns()
        self.stamp_ns = 0
        self.lag_ns = 0

    def prepare(self, sock: socket.socket) -> None:
        """Ask for stamps on a new socket, before it connects."""
        if self.kernel_stamps:
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)

    def receive(self, sock: socket.socket) -> int:
        """Read once; the number of bytes, 0 at the end of the stream. Raises what ``recv`` raises."""
        if not self.kernel_stamps:
            self.stamp_ns = time.monotonic_ns()
            return sock.recv_into(self.view)
        size, ancillary, _, _ = sock.recvmsg_into(self._buffers, _ANCILLARY_BYTES)
        now_ns = self.stamp_ns = time.monotonic_ns()
        self.lag_ns = 0
        if ancillary:
            seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
            stamp_ns = seconds * 1_000_000_000 + nanoseconds - self._offset_ns
            if stamp_ns <= now_ns:
                self.stamp_ns = stamp_ns
                self.lag_ns = now_ns - stamp_ns
            elif stamp_ns > now_ns + _MAX_MOVE_NS:
                self._fall_back()
        return size

    def remeasure(self, offset_ns: Callable[[], int] = clock_offset_ns) -> float:
        """Measure the offset again and return by how many ms it moved; by more than 1 ms, stamps are given up."""
        fresh_ns = offset_ns()
        moved_ns = fresh_ns - self._offset_ns
        self._offset_ns = fresh_ns
        if abs(moved_ns) > _MAX_MOVE_NS:
            self._fall_back()
        return moved_ns / 1e6

    def _fall_back(self) -> None:
        self.kernel_stamps = False
        self.lag_ns = 0

    def close(self) -> None:
        for sock in self._stamped_pair or ():
            sock.close()

    def __repr__(self) -> str:
        return f"<Receiver {'kernel stamps' if self.kernel_stamps else 'clock'}>"


def _open_stamped_pair() -> tuple[socket.socket, socket.socket] | None:
    """A connection to ourselves that receives stamps; None where the system gives none.

    The kernel starts stamping a moment after the first socket asks, and stops when the last one closes: the pair is
    therefore kept open, so that the first reply of every later connection is stamped too.
    """
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.ExitStack() as undo:
        try:
            listener = undo.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
            near = undo.enter_context(socket.create_connection(listener.getsockname()))
            far = undo.enter_context(listener.accept()[0])
            near.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            near.settimeout(1.0)
            if not _stamps_arrive(near, far):
                return None
        except OSError:
            return None
        listener.close()
        undo.pop_all()
        return near, far


def _stamps_arrive(near: socket.socket, far: socket.socket) -> bool:
    give_up = time.monotonic() + _SWITCH_ON_S
    while time.monotonic() < give_up:
        far.send(b"?")
        ancillary = near.recvmsg(1, _ANCILLARY_BYTES)[1]
        if any(kind == _SO_TIMESTAMPNS and len(data) == _TIMESPEC.size for _, kind, data in ancillary):
            return True
        time.sleep(_SWITCH_ON_STEP_S)
    return False
