"""The real clock: monotonic nanoseconds and timers that never fire early.

asyncio's own timers have a grain of 1 ms under uvloop and fire up to 0.7 ms early, so on Linux one timerfd wakes the
loop at the absolute time of the earliest timer. Elsewhere the loop's timer is used and armed again while it is early.
"""

import asyncio
import ctypes
import heapq
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_NS = 1_000_000_000


class _Timer:
    __slots__ = ("callback", "when_ns")

    def __init__(self, when_ns: int, callback: Callable[[], object]) -> None:
        self.when_ns = when_ns
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: "_Timer") -> bool:
        return self.when_ns < other.when_ns

    def __repr__(self) -> str:
        return f"<Timer {'cancelled' if self.callback is None else f'at {self.when_ns} ns'}>"


class MonotonicClock:
    """``core.clock.Clock`` on ``time.monotonic_ns`` and the given loop. Timers of equal time fire in any order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, alarm: "type[TimerfdAlarm | LoopAlarm] | None" = None) -> None:
        self._timers: list[_Timer] = []
        self._armed_ns = 0
        make_alarm = alarm or (TimerfdAlarm if sys.platform == "linux" else LoopAlarm)
        self._alarm = make_alarm(loop, self._fire)

    # Read several times for each request: a method around it would cost more than it.
    now_ns = staticmethod(time.monotonic_ns)

    def call_at(self, when_ns: int, callback: Callable[[], object]) -> _Timer:
        """Run ``callback`` at or as soon as possible after ``when_ns``; never before, never within this call."""
        timer = _Timer(when_ns, callback)
        heapq.heappush(self._timers, timer)
        if self._timers[0] is timer:
            self._arm()
        return timer

    def _arm(self) -> None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        when_ns = max(self._timers[0].when_ns, 1) if self._timers else 0
        if when_ns != self._armed_ns:
            self._armed_ns = when_ns
            self._alarm.set(when_ns)

    def _fire(self) -> None:
        now_ns = time.monotonic_ns()
        self._armed_ns = 0
        try:
            while self._timers and self._timers[0].when_ns <= now_ns:
                timer = heapq.heappop(self._timers)
                callback, timer.callback = timer.callback, None
                if callback is not None:
                    callback()
        finally:
            self._arm()

    def close(self) -> None:
        """Drop all timers and free the alarm."""
        self._timers.clear()
        self._alarm.close()

    def __repr__(self) -> str:
        return f"<MonotonicClock {len(self._timers)} timers>"


class LoopAlarm:
    """Wakes at a time by the loop's own timer, for systems without timerfd."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._wake = wake
        self._handle: asyncio.TimerHandle | None = None

    def set(self, when_ns: int) -> None:
        """Wake once at ``when_ns``; 0 disarms."""
        self.close()
        if when_ns:
            delay_s = max(0.0, (when_ns - time.monotonic_ns()) / _NS)
            self._handle = self._loop.call_later(delay_s, self._on_timer, when_ns)

    def _on_timer(self, when_ns: int) -> None:
        if time.monotonic_ns() < when_ns:
            self.set(when_ns)
        else:
            self._wake()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class TimerfdAlarm:
    """Wakes at an absolute time of CLOCK_MONOTONIC, some 0.05 ms after it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._wake = wake
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._checked(self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        self._spec = (ctypes.c_long * 4)()
        loop.add_reader(self._fd, self._on_readable)

    def set(self, when_ns: int) -> None:
        """Wake once at ``when_ns``; 0 disarms."""
        self._spec[2], self._spec[3] = divmod(when_ns, _NS)
        self._checked(self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._spec, None))

    def _on_readable(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # armed anew for a later time since the loop was woken
            return
        self._wake()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, os.strerror(errno))
        return result
