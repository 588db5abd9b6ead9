"""The gain rule over a run's points, and what it may say beyond the last level that passed.

Above a hard line (TTFT, success, a resource, the end of the ladder) the server is not to be measured, yet G(N) looks
half an octave ahead. A throughput curve that bends downwards cannot rise there faster than its last stretch did, and
just past its line it has not collapsed either: the true continuation lies between flat and that slope. Both are tried
and bound the gain line; between them the line itself follows X = N/(a + bN), whose slope e falls as
e/(1 − e) ∝ 1/N.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadstone.core.gain import GainEstimate, gain_line, log_log_interpolate
from loadstone.measure.points import Point

_FLAT = 0.02
"""Throughput that varies by less than this across the interval is settled: a gain line is soft."""
_LEAST_ERROR = 0.005
"""No two levels run under quite the same conditions, however steady each is by itself."""
_STEPS_PER_DOUBLING = 8


@dataclass(frozen=True)
class Curve:
    """Points with a usable throughput, ascending."""

    ns: tuple[float, ...]
    xs: tuple[float, ...]
    ses: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[Point]) -> "Curve":
        usable = [(float(p.concurrency), p.throughput) for p in points if p.throughput and p.throughput.rps > 0]
        return cls(
            tuple(n for n, _ in usable),
            tuple(x.rps for _, x in usable),
            tuple(max(x.se_rps, _LEAST_ERROR * x.rps) for _, x in usable),
        )

    @classmethod
    def likely(cls, points: Sequence[Point]) -> "Curve":
        """With what a level that failed its latency tells of the capacity: reached with as many requests as it served.

        A guess, without errors: such a level may have been stopped early.
        """
        known = {float(p.concurrency): p.throughput.rps for p in points if p.throughput and p.throughput.rps > 0}
        saturated = next((p for p in points if p.service is not None), None)
        if saturated is not None and saturated.service is not None:
            service = saturated.service
            known = {float(saturated.concurrency): service.rps, service.busy: service.rps} | known
        ns = sorted(known)
        return cls(tuple(ns), tuple(known[n] for n in ns), tuple(0.0 for _ in ns))

    def gain(self, min_gain: float) -> GainEstimate | None:
        """The gain line from what was measured; None without a doubling to look at, or without the rule."""
        if min_gain <= 0 or len(self.ns) < 2:
            return None
        return gain_line(self.ns, self.xs, self.ses, min_gain)

    def gain_under_line(self, min_gain: float) -> GainEstimate | None:
        """The same where the last level is the last that may be measured: bounded by its two continuations."""
        measured = self.gain(min_gain)
        if measured is None or measured.reached:
            return measured
        slope, error = self._last_slope()
        flat = self._continued(0.0).gain(min_gain)
        likely = self._continued(_bent(slope)).gain(min_gain)
        steep = self._continued(min(1.0, slope + error)).gain(min_gain)
        if flat is None or likely is None or steep is None or not flat.reached:
            return measured
        if not likely.reached:
            return GainEstimate(max(measured.line, flat.line), flat.low, math.inf, False)
        # Beyond the last level nothing is known; a line that lies there does not bind.
        high = max(likely.high, steep.high) if steep.reached else math.inf
        return GainEstimate(likely.line, min(flat.low, likely.low), high, likely.line < self.ns[-1])

    def likely_line(self, min_gain: float) -> float | None:
        """Where the gain line will probably be once more levels are known: where to measure, never what to answer.

        Between levels 1/X runs straight in 1/N, as it does for X = N/(a + bN); chords lie below such a curve and put
        the line too high.
        """
        if min_gain <= 0 or len(self.ns) < 2:
            return None
        dense = self._filled()
        ahead = dense._continued(_bent(dense._last_slope()[0]))
        estimate = gain_line(ahead.ns, ahead.xs, None, min_gain)
        return estimate.line if estimate is not None and estimate.reached else None

    def is_settled(self, estimate: GainEstimate, resolution: float) -> bool:
        """The interval is within the resolution, or throughput hardly varies across it."""
        if estimate.high <= estimate.low * (1 + resolution):
            return True
        low = log_log_interpolate(self.ns, self.xs, max(estimate.low, self.ns[0]))
        high = log_log_interpolate(self.ns, self.xs, min(estimate.high, self.ns[-1]))
        return math.isfinite(estimate.high) and low is not None and high is not None and abs(high / low - 1) < _FLAT

    def near(self, n: float, share: float) -> bool:
        """A level with usable throughput lies within ``share`` of ``n``."""
        return any(abs(known / n - 1) <= share for known in self.ns)

    def _filled(self) -> "Curve":
        ns: list[float] = []
        xs: list[float] = []
        for n, following, x, next_x in zip(self.ns, self.ns[1:], self.xs, self.xs[1:], strict=False):
            steps = max(1, round(_STEPS_PER_DOUBLING * math.log2(following / n)))
            for step in range(steps):
                between = n * (following / n) ** (step / steps)
                share = (1 / n - 1 / between) / (1 / n - 1 / following)
                ns.append(between)
                xs.append(1 / ((1 - share) / x + share / next_x))
        return Curve((*ns, self.ns[-1]), (*xs, self.xs[-1]), tuple(0.0 for _ in (*ns, 0)))

    def _last_slope(self) -> tuple[float, float]:
        """dlnX/dlnN at the end and its error, together between 0 and 1.

        Where a curve bends downwards every chord to its end is steeper than its end, so the flattest tells most; but a
        short chord tells mostly noise, so the flattest is the one that is so with its error added.
        """
        slopes = [(1.0, 0.0)]
        for n, x, se in zip(self.ns[:-1], self.xs, self.ses, strict=False):
            span = math.log(self.ns[-1] / n)
            error = math.hypot(se / x, self.ses[-1] / self.xs[-1]) / span
            slopes.append((math.log(self.xs[-1] / x) / span, error))
        slope, error = min(slopes, key=sum)
        return max(0.0, slope), error

    def _continued(self, slope: float) -> "Curve":
        """The curve with exact points beyond its end, so close that nothing is left to interpolation."""
        factors = [2 ** (step / _STEPS_PER_DOUBLING) for step in range(1, _STEPS_PER_DOUBLING + 1)]
        ns = tuple(self.ns[-1] * factor for factor in factors)
        xs = tuple(self.xs[-1] * factor**slope for factor in factors)
        return Curve((*self.ns, *ns), (*self.xs, *xs), (*self.ses, *(0.0 for _ in factors)))


def _bent(slope: float) -> float:
    """Mean slope over the next doubling of a curve X = N/(a + bN) that had ``slope`` over its last half octave."""
    if slope >= 1.0:
        return 1.0
    if slope <= 0.0:
        return 0.0
    # From the middle of the last half octave to the middle of the next doubling lie three quarters of an octave.
    return 1 / (1 + (1 / slope - 1) * 2**0.75)
