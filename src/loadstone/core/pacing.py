"""Spaces out the starts of requests while a server is overloaded.

Requests that start together end together where replies are about equally long. Then the places become free all at once,
the whole batch is filled from the few that wait and whoever comes next, their prompts are computed together, and who
has just missed it waits for a whole batch: some are served late and others not at all, although the server does as much
as ever. Let go a little faster than the places become free on average, starts spread over a service time within a few
of them, and so do ends.
"""

_NS = 1_000_000_000
_FASTER = 1.25
"""Than the server ends requests: so a server that has become faster is followed."""


class Pacing:
    """When the next one may start. ``due_ns`` is set while one is held back by it alone."""

    __slots__ = ("_next_ns", "due_ns")

    def __init__(self) -> None:
        self._next_ns = 0
        self.due_ns: int | None = None

    def holds_back(self, now_ns: int) -> bool:
        """Whether it is too early for the next start."""
        self.due_ns = self._next_ns if now_ns < self._next_ns else None
        return self.due_ns is not None

    def started(self, now_ns: int, rate_per_s: float) -> None:
        """One has started, while ``rate_per_s`` end. A start that came late by less than a gap does not delay the
        next."""
        gap_ns = round(_NS / (_FASTER * rate_per_s))
        due_ns = self._next_ns if now_ns - self._next_ns < gap_ns else now_ns
        self._next_ns = due_ns + gap_ns

    def __repr__(self) -> str:
        return f"<Pacing{'' if self.due_ns is None else f', one is held back until {self.due_ns}'}>"
