"""Virtual time: an asyncio loop that jumps to the next timer as soon as nothing else is left to do."""

import asyncio
import heapq
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_NS = 1_000_000_000


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is armed: the program under the virtual loop would wait for ever."""


class _VirtualTimer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _VirtualSelector(selectors.BaseSelector):
    """Polls real file descriptors; instead of waiting, it asks the loop to advance its clock."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        self._real = selectors.DefaultSelector()
        self._advance = advance

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if not ready and timeout != 0:
            self._advance(timeout)
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time starts at 0 and passes only while it would otherwise wait. Nothing may run in threads.

    Its own timers (``call_at_ns``) are in whole nanoseconds, so hours don't drift; asyncio's work as well, in floats.
    Raises DeadlockError out of ``run_until_complete`` where no timer could ever end the wait.
    """

    def __init__(self) -> None:
        self._now_ns = 0
        self._timers: list[tuple[int, int, _VirtualTimer]] = []
        self._armed = 0
        super().__init__(_VirtualSelector(self._advance))

    def time(self) -> float:
        return self._now_ns / _NS

    def now_ns(self) -> int:
        """Virtual nanoseconds since the loop was made."""
        return self._now_ns

    def call_at_ns(self, when_ns: int, callback: Callable[[], object]) -> _VirtualTimer:
        """Run ``callback`` at ``when_ns``, or next where that has passed; timers of one time keep their order."""
        timer = _VirtualTimer(callback)
        self._armed += 1
        heapq.heappush(self._timers, (max(when_ns, self._now_ns), self._armed, timer))
        return timer

    def _advance(self, timeout_s: float | None) -> None:
        """Jump to the next timer, ours or asyncio's (``timeout_s`` away), and make ours ready."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        times_ns = [self._timers[0][0]] if self._timers else []
        if timeout_s is not None:
            times_ns.append(self._now_ns + max(1, round(timeout_s * _NS)))
        if not times_ns:
            raise DeadlockError("nothing is ready and no timer is armed: virtual time would stand still for ever")
        self._now_ns = min(times_ns)
        while self._timers and self._timers[0][0] <= self._now_ns:
            timer = heapq.heappop(self._timers)[2]
            self.call_soon(self._fire, timer)

    @staticmethod
    def _fire(timer: _VirtualTimer) -> None:
        callback, timer.callback = timer.callback, None
        if callback is not None:
            callback()

    def __repr__(self) -> str:
        return f"<VirtualLoop at {self._now_ns / _NS:.6f} s, {len(self._timers)} timers>"


class VirtualClock:
    """``core.clock.Clock`` of a virtual loop."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now_ns(self) -> int:
        return self._loop.now_ns()

    def call_at(self, when_ns: int, callback: Callable[[], object]) -> _VirtualTimer:
        return self._loop.call_at_ns(when_ns, callback)

    def __repr__(self) -> str:
        return f"<VirtualClock of {self._loop!r}>"


def run_virtual(main: Callable[[VirtualClock], Coroutine[Any, Any, T]]) -> T:
    """Run ``main(clock)`` to its end in virtual time, as ``asyncio.run`` would. Raises DeadlockError."""
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(VirtualClock(loop)))
