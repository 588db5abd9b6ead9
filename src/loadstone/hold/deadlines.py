"""When requests are out of time, by one timer for all of them.

All have the same time from their arrival, so they are due in the order in which they came: the timer is set for the
oldest alone, and set anew only when it fires.
"""

from collections.abc import Callable

from loadstone.core.clock import Clock, Timer


class Deadlines:
    """Callbacks that are due ``timeout_ns`` after they were added; with None never."""

    def __init__(self, clock: Clock, timeout_ns: int | None) -> None:
        self._clock = clock
        self._timeout_ns = timeout_ns
        self._due: dict[Callable[[], None], int] = {}
        self._timer: Timer | None = None

    def __repr__(self) -> str:
        return f"<Deadlines of {len(self._due)} requests>"

    def add(self, expire: Callable[[], None]) -> int | None:
        """Call ``expire`` when its time is up, at the time that is returned, unless it was removed before."""
        if self._timeout_ns is None:
            return None
        due_ns = self._due[expire] = self._clock.now_ns() + self._timeout_ns
        if self._timer is None:
            self._timer = self._clock.call_at(due_ns, self._fire)
        return due_ns

    def remove(self, expire: Callable[[], None]) -> None:
        """It was done in time, or was called."""
        self._due.pop(expire, None)

    def _fire(self) -> None:
        now_ns = self._clock.now_ns()
        for expire in [expire for expire, due_ns in self._due.items() if due_ns <= now_ns]:
            del self._due[expire]
            expire()
        first_ns = next(iter(self._due.values()), None)
        self._timer = None if first_ns is None else self._clock.call_at(first_ns, self._fire)

    def close(self) -> None:
        """Drop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
