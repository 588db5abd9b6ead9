"""A limit that follows an engine that has become slower than it was measured, and comes back with it. Pure.

Theory of operation
    ``decide`` is called about twice a second with what was seen since. The limit starts at the ceiling (the configured
    one, which is at most what was measured) and moves by one step at a time, never above the ceiling nor below 1.

    Tokens. The mean time between a stream's chunks, divided by the one measured at the concurrency of this moment, is
    the slowness s, over the last few seconds. An engine that is s times slower finishes 1/s of the requests, so by
    Little's law it keeps the promised latency with 1/s of them in flight: ceiling/s is where the limit goes. Up to an s
    of 1.25 the engine is as it was measured, and the limit is the ceiling; from there to 1.5 the one goes over into the
    other. Within a twentieth of the ceiling around that goal the limit stays, so that noise does not move it. As s is
    taken against the curve at the concurrency of the moment, a lower limit does not by itself look like recovery.

    The engine's own signals, each one step down while it lasts, which is when it is seen twice within two seconds: more
    requests wait inside than the measured TTFT accounts for, preemptions, a KV cache that is full, 429 and 503 of its
    own. After one of them the limit rests before it rises again. Without a measured curve, and where nothing streams,
    these are all there is.

    Up it goes at half the pace, only while it was reached or something queued, and only while replies or tokens come:
    an idle limit tells nothing, and a hung engine is no fast one.

Not signals
    A request's total time follows the length of its reply, and its TTFT the length of its prompt and what of it the
    prefix cache holds, which the gate cannot know: both move with what clients ask for, the engine being as it was.
    Divided by prompt tokens TTFT still is mostly the wait for the step under way. What is worth knowing of it, that
    requests pile up before their first token, the engine's waiting count says.
"""

from collections.abc import Sequence

from loadstone.core.limits import EvidenceLevel
from loadstone.hold.measured_curve import MeasuredCurve
from loadstone.hold.signals import Pressure, Signals, Slowness

_NS = 1_000_000_000
_FINE = 1.25
_SLOW = 1.5
_DEAD_BAND = 0.05
_REST_NS = 15 * _NS
_USED_NS = 2 * _NS
_RAISE_EVERY_NS = 900_000_000
"""A second, less the jitter of the timer that calls ``decide``."""
_STEPS_IN_CEILING = 100


class AdaptiveLimit:
    """See the theory of operation. ``limit`` is in force, ``reason`` says what last changed it."""

    __slots__ = (
        "_ceiling",
        "_levels",
        "_pressure",
        "_raised_ns",
        "_replies",
        "_rest_until_ns",
        "_slowness",
        "_used_ns",
        "limit",
        "reason",
    )

    def __init__(self, ceiling: int, curve: Sequence[EvidenceLevel]) -> None:
        self.limit = ceiling
        self.reason = ""
        self._ceiling = ceiling
        self._replies = 0
        self._used_ns: int | None = None
        self._raised_ns: int | None = None
        self._rest_until_ns = 0
        self._learn(curve)

    def configure(self, ceiling: int, curve: Sequence[EvidenceLevel]) -> int:
        """Another ceiling or curve, after a reload: a limit that was lowered stays where it is, below the ceiling."""
        if self.limit == self._ceiling or self.limit > ceiling:
            self.limit = ceiling
        self._ceiling = ceiling
        if tuple(curve) != self._levels:
            self._learn(curve)
        return self.limit

    def _learn(self, curve: Sequence[EvidenceLevel]) -> None:
        self._levels = tuple(curve)
        measured = MeasuredCurve(curve)
        self._slowness = Slowness(measured)
        self._pressure = Pressure(measured)

    @property
    def ceiling(self) -> int:
        return self._ceiling

    def decide(self, signals: Signals, now_ns: int) -> int:
        """The limit from now on."""
        if signals.in_flight >= self.limit or signals.queued:
            self._used_ns = now_ns
        alive = signals.gap_events > 0 or signals.replies != self._replies
        self._replies = signals.replies
        self._slowness.add(signals, now_ns)
        pressure = self._pressure.lasting(signals, now_ns)
        slowness = self._slowness.value or 1.0
        goal = self._ceiling * _share(slowness)
        if pressure:
            self._rest_until_ns = now_ns + _REST_NS
            self._move(-1, pressure)
        elif self._slowness.learning or not alive:
            return self.limit
        elif self.limit - goal >= self._dead_band:
            self._move(-1, f"tokens come {slowness:.1f} × slower than measured")
        elif (goal == self._ceiling or goal - self.limit >= self._dead_band) and self._may_rise(now_ns):
            self._raised_ns = now_ns
            self._move(1, "the engine keeps up" if slowness <= _FINE else f"tokens come only {slowness:.1f} × slower")
        return self.limit

    def _may_rise(self, now_ns: int) -> bool:
        if self.limit >= self._ceiling or now_ns < self._rest_until_ns:
            return False
        if self._raised_ns is not None and now_ns - self._raised_ns < _RAISE_EVERY_NS:
            return False
        return self._used_ns is not None and now_ns - self._used_ns < _USED_NS

    @property
    def _step(self) -> int:
        """One, or a hundredth of a large ceiling: in single steps a limit of 1,000 would take minutes to halve."""
        return max(1, self._ceiling // _STEPS_IN_CEILING)

    @property
    def _dead_band(self) -> float:
        """How far ceiling/s must be from the limit to move it."""
        return max(self._step, _DEAD_BAND * self._ceiling)

    def _move(self, direction: int, why: str) -> None:
        before = self.limit
        self.limit = max(1, min(before + direction * self._step, self._ceiling))
        if self.limit != before:
            self.reason = f"limit {before} → {self.limit}: {why}"

    def __repr__(self) -> str:
        return f"<AdaptiveLimit {self.limit} of {self._ceiling}, {self._slowness!r}>"


def _share(slowness: float) -> float:
    """Of the ceiling, what an engine so many times slower takes; without a leap where it begins to be slow."""
    if slowness <= _FINE:
        return 1.0
    if slowness >= _SLOW:
        return 1 / slowness
    return 1 - (1 - 1 / _SLOW) * (slowness - _FINE) / (_SLOW - _FINE)
