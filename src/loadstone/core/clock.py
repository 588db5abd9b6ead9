"""Time as the shells see it: one protocol, real or virtual."""

from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A callback that waits for its time."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """A monotonic clock in nanoseconds, with timers that never fire before their time.

    ``loop.time()`` is not used anywhere: uvloop's has a grain of 1 ms and its timers fire up to 0.7 ms early.
    """

    def now_ns(self) -> int: ...

    def call_at(self, when_ns: int, callback: Callable[[], object]) -> Timer:
        """Run ``callback`` at or as soon as possible after ``when_ns``; never before, never within this call."""
        ...
