"""What an upstream's tokens and its engine tell of how it keeps up, as ``adaptive`` weighs it. Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from loadstone.core.engine_metrics import EngineMetrics
from loadstone.hold.measured_curve import MeasuredCurve

_NS = 1_000_000_000
_LONGEST_GAP_NS = 2 * _NS
_LEAST_EVENTS = 10
_LEAST_NS = 2 * _NS
_FADING_NS = 5 * _NS
_LASTS_NS = 2 * _NS
_KV_FULL = 0.95
_WAITING_LEEWAY = 2.0
_WAITING_SHARE = 1 / 8


class Pace:
    """The gaps between the chunks of all streams of one upstream since it was last asked. On the hot path."""

    __slots__ = ("_events", "_sum_ns")

    def __init__(self) -> None:
        self._sum_ns = 0
        self._events = 0

    def add(self, gap_ns: int, events: int) -> None:
        """``events`` (≥ 1) came together, ``gap_ns`` after the stream's last; a long silence counts as 2 s.

        Longer ones are a tool call that the server holds back or a preempted request, not the engine's pace.
        """
        self._sum_ns += gap_ns if gap_ns < _LONGEST_GAP_NS else _LONGEST_GAP_NS
        self._events += events

    def take(self) -> tuple[float, int]:
        """(sum of the gaps in seconds, events), and begin anew."""
        taken = self._sum_ns / _NS, self._events
        self._sum_ns = self._events = 0
        return taken

    def __repr__(self) -> str:
        return f"<Pace {self._events} events in {self._sum_ns / _NS:.3f} s>"


class Reading(NamedTuple):
    """The engine's own figures, and when they were read."""

    at_ns: int
    metrics: EngineMetrics


@dataclass(frozen=True, slots=True)
class Signals:
    """What was seen of one upstream since the last decision."""

    in_flight: int
    queued: int
    """Waiting at the gate."""
    gaps_s: float = 0.0
    """Sum of the token gaps."""
    gap_events: int = 0
    replies: int = 0
    """Whole replies so far, since any start."""
    busy_replies: int = 0
    """429 and 503 of its own so far."""
    engine: Reading | None = None


class Slowness:
    """How many times slower than measured tokens come, over the last seconds.

    The time that all streams waited for their tokens, divided by the time that the same tokens take at a healthy engine
    with as many in flight; both fade with a time constant of 5 s. An average of ratios would count slow moments, in
    which fewer tokens come, for too much.
    """

    __slots__ = ("_curve", "_events", "_measured_s", "_now_ns", "_since_ns", "_waited_s")

    def __init__(self, curve: MeasuredCurve) -> None:
        self._curve = curve
        self._waited_s = 0.0
        self._measured_s = 0.0
        self._events = 0.0
        self._now_ns = 0
        self._since_ns = 0

    def add(self, signals: Signals, now_ns: int) -> None:
        """What came since the last time."""
        fading = math.exp(-(now_ns - self._now_ns) / _FADING_NS)
        self._now_ns = now_ns
        measured_s = self._curve.gap_s(max(1, signals.in_flight))
        if measured_s is None:
            return
        if self._events < 1:
            self._since_ns = now_ns
        self._waited_s = self._waited_s * fading + signals.gaps_s
        self._measured_s = self._measured_s * fading + signals.gap_events * measured_s
        self._events = self._events * fading + signals.gap_events

    @property
    def value(self) -> float | None:
        """None where too few tokens came lately, or only for a moment."""
        known = self._events >= _LEAST_EVENTS and self._now_ns - self._since_ns >= _LEAST_NS
        return self._waited_s / self._measured_s if known else None

    @property
    def learning(self) -> bool:
        """Tokens come, too few as yet to tell."""
        return self._events >= 1 and self.value is None

    def __repr__(self) -> str:
        return f"<Slowness {'unknown' if self.value is None else f'{self.value:.2f}'}>"


class Pressure:
    """The engine's own signals, and which of them last."""

    __slots__ = ("_busy", "_curve", "_preemptions", "_read_ns", "_seen_ns")

    def __init__(self, curve: MeasuredCurve) -> None:
        self._curve = curve
        self._busy: int | None = None
        self._preemptions: float | None = None
        self._read_ns = -1
        self._seen_ns: dict[str, int] = {}

    def lasting(self, signals: Signals, now_ns: int) -> str:
        """Why the limit should go down; empty where it should not."""
        reasons = []
        for kind, reason in self._seen(signals):
            before_ns = self._seen_ns.get(kind)
            self._seen_ns[kind] = now_ns
            if before_ns is not None and now_ns - before_ns < _LASTS_NS:
                reasons.append(reason)
        return reasons[0] if reasons else ""

    def _seen(self, signals: Signals) -> Iterator[tuple[str, str]]:
        """(kind, reason) of each signal that is there; each reading of the engine counts once."""
        if self._busy is not None and signals.busy_replies > self._busy:
            yield "busy", "the upstream itself answers 429 or 503"
        self._busy = signals.busy_replies
        reading = signals.engine
        if reading is None or reading.at_ns <= self._read_ns:
            return
        self._read_ns = reading.at_ns
        metrics = reading.metrics
        before, self._preemptions = self._preemptions, metrics.preemptions_total
        if before is not None and metrics.preemptions_total is not None and metrics.preemptions_total > before:
            yield "preemptions", "the engine preempts requests"
        if metrics.kv_use is not None and metrics.kv_use >= _KV_FULL:
            yield "kv", f"the KV cache is {metrics.kv_use:.0%} full"
        if metrics.waiting is not None and metrics.waiting > self._waiting_allowed(signals.in_flight):
            yield "waiting", f"{metrics.waiting:.0f} requests wait inside the engine"

    def _waiting_allowed(self, in_flight: int) -> float:
        """What waits at a healthy engine.

        Every request waits for the step under way at least, so there is always someone at a busy one. Where nothing
        streamed the engine works in batches, and what waits for the next is no sign of anything.
        """
        if not self._curve:
            return in_flight * _WAITING_SHARE
        early = self._curve.before_first_token(max(1, in_flight))
        return math.inf if early is None else 1 + _WAITING_LEEWAY * early

    def __repr__(self) -> str:
        return f"<Pressure, seen {', '.join(self._seen_ns) or 'nothing'}>"
