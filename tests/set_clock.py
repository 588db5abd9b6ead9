"""A clock that stands where the test puts it."""

from collections.abc import Callable

from loadstone.core.clock import Timer


class SetClock:
    """``core.clock.Clock`` for what reads the time and arms no timer."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns

    def call_at(self, when_ns: int, callback: Callable[[], object]) -> Timer:
        raise AssertionError("no timer was expected here")
