"""Where inside a bracket the line probably lies. Guesses choose the next level; only levels decide.

What a failing level tells comes first: a refusing server shows its own cap, a KV cache fills in proportion, and where a
latency failed Little's law says where its limit would just be met. The secant is what is left where none of these
speaks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadstone.core.verdict import Verdict
from loadstone.measure.points import Point

MAX_STEPS_DOWN = 3
"""A refuted answer steps down one resolution at most so many times; then the bracket is halved as any other."""
_CHEAP_RULES = ("success", "resource")


@dataclass(frozen=True)
class Guess:
    """Where to look next inside a bracket."""

    concurrency: float
    holds: bool
    """It is expected to pass: near enough to the line to be the answer."""


def guess_inside(low: Point, high: Point, points: Sequence[Point], resolution: float) -> Guess:
    """Where to look next between a level that held and one that failed."""
    bottom, top = low.concurrency, high.concurrency
    if high.refuted and sum(1 for point in points if point.refuted) <= MAX_STEPS_DOWN:
        return Guess(top / (1 + resolution), True)
    crossing = _crossing(low, high, points, resolution)
    if crossing is None:
        power = 0.75 if fails_cheaply(high.rule) else 0.6
        return Guess(bottom * (top / bottom) ** power, False)
    if crossing.concurrency <= closing(bottom, resolution):
        # It lies just above the level that held: the next one is to fail.
        return Guess(closing(bottom, resolution), False)
    # Where the crossing lies close to the level that failed, the lowest one that closes the bracket when it holds.
    closes = math.ceil(top / (1 + resolution))
    below = closes if closes <= crossing.concurrency else _below(crossing.concurrency, resolution)
    return Guess(below, crossing.holds)


def closing(bottom: int, resolution: float) -> int:
    """The highest level that closes the bracket above ``bottom`` when it fails: a resolution, or one slot, above it."""
    return max(bottom + 1, math.floor(bottom * (1 + resolution) * 1.0001))


def _below(crossing: float, resolution: float) -> int:
    """The level that has ``crossing`` in the middle between itself and the one above it that closes the bracket."""
    levels = range(max(1, math.floor(crossing * (1 - resolution))), math.floor(crossing) + 1)
    return min(levels, key=lambda n: abs(n + closing(n, resolution) - 2 * crossing))


def _crossing(low: Point, high: Point, points: Sequence[Point], resolution: float) -> Guess | None:
    """Where the failing rule seems to cross its limit; None where nothing tells.

    A limit that the server itself told holds up to there, so half a resolution more is where it is crossed.
    """
    bottom, top = low.concurrency, high.concurrency
    if high.accepted and high.rule == "success" and high.accepted < top:
        # The server itself says where its limit is: how much it was working on while it refused the rest.
        return Guess(max(bottom, high.accepted) * (1 + resolution / 2), True)
    kv_use = _pressure(low, "resource:kv")
    if high.rule in ("resource:kv", "resource:preemptions") and kv_use:
        # The cache fills in proportion to what runs.
        full = bottom / kv_use
        return Guess(min(full, top), True) if bottom < full else None
    if high.line_by_little is not None and bottom < high.line_by_little < top:
        return Guess(high.line_by_little, True)
    above = next((p for p in points if p.concurrency > top and p.verdict is Verdict.FAIL), None)
    return _secant(low, high, above)


def _secant(low: Point, high: Point, above: Point | None) -> Guess | None:
    """Where pressure on the failing rule crosses its limit.

    On the log–log line between the two ends; where two levels failed, on the straight line through them: what waits
    grows in proportion to the requests beyond the knee, so that line is the truer one.
    """
    p_low, p_high = _pressure(low, high.rule), _pressure(high, high.rule)
    if p_low is None or p_high is None or not p_low < 1 < p_high:
        return None
    if above is not None and (p_above := _pressure(above, high.rule)) is not None and p_above > p_high:
        slope = (p_above - p_high) / (above.concurrency - high.concurrency)
        straight = high.concurrency - (p_high - 1) / slope
        if low.concurrency < straight < high.concurrency:
            return Guess(straight, True)
    ratio = high.concurrency / low.concurrency
    return Guess(low.concurrency * ratio ** (math.log(1 / p_low) / math.log(p_high / p_low)), False)


def _pressure(point: Point, rule: str) -> float | None:
    return (point.pressure or {}).get(rule)


def fails_cheaply(rule: str) -> bool:
    """Failing costs little: refusals and a full cache show at once."""
    return rule.split(":")[0] in _CHEAP_RULES
