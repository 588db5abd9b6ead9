"""How fast places become free, and how long a request is served: what waits and Retry-After are predicted from.

Two estimates of the rate, and each errs only towards "too slow": the recent ends over the time they took (where there
was idleness in between), and Little's law, what runs over the mean service time (after a few very long requests). The
larger is taken: to refuse a request that would have been served in time is the worse error.

Nothing is predicted before 20 requests were served, nor after a gap without any end: then what was learned is stale,
and learning starts anew.
"""

from collections import deque

_NS = 1_000_000_000
_ENOUGH = 20
_WINDOW = 64
_MEMORY = 32
"""Requests over which the mean service time is smoothed."""
_GAP_NS = 30 * _NS
_GAP_SERVICES = 4
"""A gap is at least so many mean service times, as slow servers end few requests."""


class Drain:
    """What was learned from the requests that ended."""

    __slots__ = ("_ends_ns", "_mean_ns", "_served")

    def __init__(self) -> None:
        self._ends_ns: deque[int] = deque(maxlen=_WINDOW)
        self._mean_ns = 0.0
        self._served = 0

    def ended(self, now_ns: int, service_ns: int | None) -> None:
        """A place became free, after a service of ``service_ns``; None where it was broken off."""
        ends_ns = self._ends_ns
        if ends_ns and now_ns - ends_ns[-1] > _GAP_NS:
            self.forget_if_stale(now_ns)
        ends_ns.append(now_ns)
        if service_ns is not None:
            served = self._served = self._served + 1
            self._mean_ns += (service_ns - self._mean_ns) / (served if served < _MEMORY else _MEMORY)

    def forget_if_stale(self, now_ns: int) -> None:
        """Start anew after a gap."""
        ends_ns = self._ends_ns
        if ends_ns and now_ns - ends_ns[-1] > _GAP_NS and now_ns - ends_ns[-1] > _GAP_SERVICES * self._mean_ns:
            ends_ns.clear()
            self._mean_ns = 0.0
            self._served = 0

    @property
    def service_ns(self) -> int:
        """Mean service time; 0 where it is not known."""
        return round(self._mean_ns) if self._served >= _ENOUGH else 0

    def rate_per_s(self, now_ns: int, running: int) -> float | None:
        """Places that become free each second while ``running`` run; None where it is not known."""
        self.forget_if_stale(now_ns)
        if self._served < _ENOUGH:
            return None
        seen = (len(self._ends_ns) - 1) / max(1, now_ns - self._ends_ns[0])
        return max(seen, running / max(1.0, self._mean_ns)) * _NS

    def __repr__(self) -> str:
        return f"<Drain: {self._served} served, mean {self._mean_ns / _NS:.3f} s>"
