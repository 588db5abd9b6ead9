"""``rate``: the smallest concurrency that sustains a request rate, as pure decisions over what was measured so far.

Theory of operation. c* is the smallest c whose closed-loop throughput X(c) is at least 95 % of the target: a closed
loop has no arrival noise, so X(c) is sharp and rises with c. Every call looks at all points anew:

1. a level whose interval contains the wanted rate is run again and pooled, up to three times, then its value decides;
   so is once a level that the generator spoiled, and a failing first one (a cold server fails it wrongly);
2. the ladder, up to the first level that reaches the rate or fails, or until no level left could reach it;
3. between the last level that falls short and the first that reaches, down to the resolution.

Success and validity are the only rules: a level is not failed for its latency, which the target does not speak of.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadstone.core.stats import Z_95
from loadstone.core.verdict import LevelKind, Verdict
from loadstone.measure.points import Point
from loadstone.measure.rules import Rules, Stance
from loadstone.measure.search import Ask

SUSTAINED = 0.95
"""Share of the target that counts as reaching it."""
REQUESTS_PER_SLOT = 5
MOST_RUNS = 3
MOST_STEPS = 12
"""Levels between two of the ladder at most."""
_QUICK_STEPS = 6
"""From then on plain halving: the curve is not what its neighbours promise."""


@dataclass(frozen=True)
class Goal:
    """What is asked for."""

    target_qps: float
    ladder: tuple[int, ...]
    resolution: float = 0.05

    @property
    def wanted_rps(self) -> float:
        return SUSTAINED * self.target_qps


class Reach(enum.Enum):
    """What a level says of the wanted rate."""

    REACHES = "reaches"
    SHORT = "short"
    OPEN = "open"
    """The interval contains the wanted rate and more requests may settle it."""
    FAILED = "failed"
    """Too few requests succeed."""
    VOID = "void"
    """The generator's own error, or no steady window."""


@dataclass(frozen=True)
class Bracket:
    """c* lies above ``low`` and not above ``high``."""

    low: Point | None
    """None: below the lowest level run."""
    high: Point | None
    """The lowest level that reaches the rate, else the lowest that failed or is void."""


def rate_rules(min_success: float, resolution: float) -> Rules:
    """Rules that judge success and validity alone."""
    return Rules(min_success, max_ttft_ms=None, min_gain=0.0, max_kv_use=math.inf, resolution=resolution)


def reach_of(point: Point, goal: Goal) -> Reach:
    """Hold one concurrency against the wanted rate."""
    if point.verdict is Verdict.FAIL and point.rule == "success":
        return Reach.FAILED
    if point.verdict is Verdict.INVALID or point.throughput is None:
        return Reach.VOID
    if not is_clear(point, goal) and point.runs < MOST_RUNS:
        return Reach.OPEN
    return Reach.REACHES if point.throughput.rps >= goal.wanted_rps else Reach.SHORT


def is_clear(point: Point, goal: Goal) -> bool:
    """The interval of its throughput lies wholly to one side of the wanted rate."""
    throughput = point.throughput
    return throughput is not None and abs(throughput.rps - goal.wanted_rps) > Z_95 * throughput.se_rps


def ask(points: Sequence[Point], goal: Goal) -> Ask | None:
    """The next level, or None when the search is over. ``points`` in ascending order."""
    steps = (_again, _climb, _narrow)
    return next((wanted for step in steps if (wanted := step(points, goal)) is not None), None)


def bracket_of(points: Sequence[Point], goal: Goal) -> Bracket:
    """Where c* must lie; ``high`` is None while nothing stands in the way upwards."""
    by_reach = [(point, reach_of(point, goal)) for point in points]
    reaching = next((p for p, reach in by_reach if reach is Reach.REACHES), None)
    high = reaching or next((p for p, reach in by_reach if reach in (Reach.FAILED, Reach.VOID)), None)
    below = [p for p in points if high is None or p.concurrency < high.concurrency]
    return Bracket(below[-1] if below else None, high)


def smallest(points: Sequence[Point], goal: Goal) -> Point | None:
    """c*, as the points have it; None where no level reaches the rate."""
    return next((point for point in points if reach_of(point, goal) is Reach.REACHES), None)


def crossing(points: Sequence[Point], rps: float) -> float | None:
    """The concurrency at which the measured curve passes ``rps``, on log–log lines between levels.

    Below the lowest level throughput is taken as proportional. None where no level delivers that much.
    """
    curve = [(p.concurrency, p.throughput.rps) for p in points if p.throughput is not None and p.throughput.rps > 0]
    if not curve:
        return None
    if curve[0][1] >= rps:
        return curve[0][0] * rps / curve[0][1]
    for (low, x_low), (high, x_high) in pairwise(curve):
        if x_low < rps <= x_high:
            return low * math.pow(high / low, math.log(rps / x_low) / math.log(x_high / x_low))
    return None


def is_hopeless(points: Sequence[Point], goal: Goal, up_to: int) -> bool:
    """No concurrency up to ``up_to`` can reach the rate.

    A throughput curve bends downwards, so it rises no faster than it last did. The last two steps must both say so:
    one may be a dip.
    """
    curve = [(p.concurrency, p.throughput) for p in points if p.throughput is not None and p.throughput.rps > 0]
    if len(curve) < 3:
        return False
    top, x_top = curve[-1]
    for (low, x_low), (high, x_high) in pairwise(curve[-3:]):
        rise = math.log(x_high.high_rps / max(x_low.low_rps, 1e-9)) / math.log(high / low)
        if x_top.high_rps * (up_to / top) ** min(1.0, max(0.0, rise)) >= goal.wanted_rps:
            return False
    return True


def _again(points: Sequence[Point], goal: Goal) -> Ask | None:
    for point in points:
        reach = reach_of(point, goal)
        if reach is Reach.OPEN:
            return _level(LevelKind.BISECT, point.concurrency, "its interval contains the wanted rate: once more", 2)
        if reach is Reach.VOID and point.runs < 2:
            return _level(LevelKind.BISECT, point.concurrency, "it could not be judged: once more")
        if reach is Reach.FAILED and len(points) == 1 and point.runs < 2:
            why = "the first level failed: once more, it may have been cold"
            return _level(LevelKind.LADDER, point.concurrency, why)
    return None


def _climb(points: Sequence[Point], goal: Goal) -> Ask | None:
    if bracket_of(points, goal).high is not None or is_hopeless(points, goal, goal.ladder[-1]):
        return None
    top = points[-1].concurrency if points else 0
    following = next((level for level in goal.ladder if level > top), None)
    return None if following is None else _level(LevelKind.LADDER, following, "")


def _narrow(points: Sequence[Point], goal: Goal) -> Ask | None:
    bracket = bracket_of(points, goal)
    low, high = bracket.low, bracket.high
    if high is None or is_closed(bracket, goal):
        return None
    steps = sum(1 for point in points if point.concurrency not in goal.ladder)
    if steps >= MOST_STEPS:
        return None
    if reach_of(high, goal) is not Reach.REACHES and is_hopeless(points[: points.index(high)], goal, high.concurrency):
        return None
    bottom = 0 if low is None else low.concurrency
    target = min(max(_guess(bracket, goal, steps), bottom + 1), high.concurrency - 1)
    why = f"{high.concurrency} {'is enough' if reach_of(high, goal) is Reach.REACHES else 'is too much'}"
    return _level(LevelKind.BISECT, target, f"{why}, {bottom} is too little" if low is not None else why)


def is_closed(bracket: Bracket, goal: Goal) -> bool:
    """Nothing is left to look at between the two."""
    if bracket.high is None:
        return False
    bottom = 0 if bracket.low is None else bracket.low.concurrency
    high = bracket.high.concurrency
    return high - bottom <= 1 or high <= bottom * (1 + goal.resolution) * 1.0001


def _guess(bracket: Bracket, goal: Goal, steps: int) -> int:
    """Where c* seems to be; once that is known well enough, just below it and just above, to close the bracket."""
    assert bracket.high is not None, "a guess needs an upper end"
    bottom = 0 if bracket.low is None else bracket.low.concurrency
    if steps >= _QUICK_STEPS:
        return round(math.sqrt(max(1, bottom) * bracket.high.concurrency))
    least, most = _reachable(bracket.low, bracket.high, goal)
    middle, half = math.sqrt(least * most), goal.resolution / 2
    if most > least * (1 + goal.resolution):
        return round(middle)
    below = math.floor(middle * (1 - half))
    return below if below > bottom else math.ceil(middle * (1 + half))


def _reachable(low: Point | None, high: Point, goal: Goal) -> tuple[float, float]:
    """Between which two concurrencies c* lies where the curve bends downwards.

    Throughput is then at most proportional from ``low`` on, and at least the straight line to ``high``.
    """
    least = 1.0 if low is None else float(low.concurrency)
    most = float(high.concurrency)
    if high.throughput is not None and high.throughput.rps >= goal.wanted_rps:
        most = min(most, crossing([p for p in (low, high) if p is not None], goal.wanted_rps) or most)
    if low is None:
        # Lightly loaded servers are nearly proportional.
        least = max(least, most * (1 - goal.resolution))
    elif low.throughput is not None and 0 < low.throughput.rps < goal.wanted_rps:
        least = min(most, least * goal.wanted_rps / low.throughput.rps)
    return least, max(least, most)


def _level(kind: LevelKind, concurrency: int, why: str, times: int = 1) -> Ask:
    requests = times * REQUESTS_PER_SLOT * concurrency
    return Ask(kind, concurrency, requests, Stance.EXPLORE, may_stop_early=True, why=why)
