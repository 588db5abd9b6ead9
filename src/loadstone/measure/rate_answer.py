"""``rate.json``: the answer of ``rate``, from its closed-loop points and the open-loop run at c*. Pure."""

import math
from collections.abc import Sequence

import msgspec

from loadstone.core.errors import EXIT_FAILED, EXIT_INVALID, EXIT_OK
from loadstone.core.verdict import LevelRow, Verdict
from loadstone.measure.open_loop import OpenLoop
from loadstone.measure.points import Point
from loadstone.measure.rate import (
    SUSTAINED,
    Goal,
    Reach,
    bracket_of,
    crossing,
    is_clear,
    is_closed,
    is_hopeless,
    reach_of,
    smallest,
)

_COMFORT = 1.3
"""Slots above the mean in standard deviations, from which on waiting is rare: a + 1.3·√a."""

_FAR = 4
"""A curve that does not reach the rate at this many times the highest level is called flat."""


class Best(msgspec.Struct, frozen=True):
    """The level that delivered most, whether that was enough or not."""

    concurrency: int
    throughput_rps: float


class InFlight(msgspec.Struct, frozen=True):
    """What the target keeps in flight by itself where nothing caps it."""

    mean: float
    """a: Little's mean, the N that solves N = q·R(N) on the measured curve."""
    low: float
    high: float
    """95 % of the time it is between the two: what arrives at random is in flight at random, nearly Poisson."""
    comfortable_cap: int
    """a + 1.3·√a: a request seldom waits for a slot."""


class RateAnswer(msgspec.Struct, frozen=True):
    """The whole of ``rate.json``."""

    target_qps: float
    wanted_rps: float
    """95 % of the target."""
    concurrency: int | None
    """c*, the smallest concurrency that reaches the wanted rate; null where none does."""
    throughput_rps: float | None
    """Closed loop, at c*."""
    sure: bool
    """The intervals of c* and of the level below it do not contain the wanted rate."""
    best: Best | None
    stopped_by: str
    """Why no level reached it: ladder | flat (the curve no longer rises) | success | client; empty where one did."""
    claim: str
    document_concurrency: float | None
    """min(max_concurrency, rate × mean response time), the guide's formula, at c* as the open loop measured it."""
    in_flight: InFlight | None
    """Null where the server does not deliver the whole target at any measured concurrency."""
    open_loop: OpenLoop | None
    levels: list[LevelRow]


def answer_of(points: Sequence[Point], rows: list[LevelRow], open_loop: OpenLoop | None, goal: Goal) -> RateAnswer:
    """Everything that follows from the levels; ``rows`` in running order."""
    found = smallest(points, goal)
    return RateAnswer(
        target_qps=goal.target_qps,
        wanted_rps=goal.wanted_rps,
        concurrency=found.concurrency if found else None,
        throughput_rps=found.throughput.rps if found and found.throughput else None,
        sure=found is not None and _is_sure(points, goal),
        best=_best(points),
        stopped_by="" if found else _stopped_by(points, goal),
        claim=_claim(points, goal),
        document_concurrency=_documents(found, open_loop, goal),
        in_flight=_in_flight(points, goal),
        open_loop=open_loop,
        levels=rows,
    )


def row_for(row: LevelRow, goal: Goal) -> LevelRow:
    """A level's row in the terms of ``rate``: only success and validity fail it, the reason speaks of the rate."""
    if row.verdict is Verdict.INVALID or row.rule == "success" or row.throughput_rps is None:
        return row
    reaches = "enough for" if row.throughput_rps >= goal.wanted_rps else "short of"
    reason = f"{_interval(row)} req/s, {reaches} {goal.wanted_rps:g}"
    findings = [finding for finding in row.findings if finding.rule == "success"]
    return msgspec.structs.replace(row, verdict=Verdict.PASS, rule="", reason=reason, findings=findings)


def exit_status(answer: RateAnswer) -> int:
    """0 reached; 1 never reached, or shown not to keep up with random arrivals; 4 nothing could be judged."""
    verdicts = {row.verdict for row in answer.levels}
    if answer.open_loop is not None and answer.open_loop.verdict is Verdict.INVALID:
        return EXIT_INVALID
    if answer.concurrency is None:
        return EXIT_INVALID if verdicts <= {Verdict.INVALID} else EXIT_FAILED
    failed = answer.open_loop is not None and answer.open_loop.verdict is Verdict.FAIL
    return EXIT_FAILED if failed else EXIT_OK


def _best(points: Sequence[Point]) -> Best | None:
    """The lowest concurrency that may be the best: among equals more slots only add waiting."""
    known = [(p.concurrency, p.throughput) for p in points if p.throughput]
    most_rps = max((throughput.rps for _, throughput in known), default=0.0)
    return next((Best(n, throughput.rps) for n, throughput in known if throughput.high_rps >= most_rps), None)


def _is_sure(points: Sequence[Point], goal: Goal) -> bool:
    bracket = bracket_of(points, goal)
    ends = [point for point in (bracket.low, bracket.high) if point is not None]
    return is_closed(bracket, goal) and all(is_clear(point, goal) for point in ends)


def _stopped_by(points: Sequence[Point], goal: Goal) -> str:
    high = bracket_of(points, goal).high
    if high is not None:
        return "success" if reach_of(high, goal) is Reach.FAILED else "client"
    if not points:
        return "client"
    return "flat" if is_hopeless(points, goal, _FAR * points[-1].concurrency) else "ladder"


def _claim(points: Sequence[Point], goal: Goal) -> str:
    """What was seen, in one sentence."""
    bracket = bracket_of(points, goal)
    found, low = smallest(points, goal), bracket.low
    wanted = f"{goal.wanted_rps:g} ({100 * SUSTAINED:g} % of {goal.target_qps:g})"
    if found is not None:
        below = f"; {low.concurrency} delivered {_delivered(low)}" if low is not None else ""
        return f"{found.concurrency} delivered {_delivered(found)} req/s, {wanted} wanted{below}"
    best = _best(points)
    if best is None:
        return "nothing was judged"
    high = bracket.high
    above = f"; {high.concurrency} could not be used: {high.reason}" if high is not None else ""
    return f"at best {best.throughput_rps:.4g} req/s, at {best.concurrency}; {wanted} wanted{above}"


def _delivered(point: Point) -> str:
    if point.throughput is None:
        return "nothing usable"
    return f"{point.throughput.rps:.4g} ± {point.throughput.high_rps - point.throughput.rps:.2g}"


def _interval(row: LevelRow) -> str:
    assert row.throughput_rps is not None, "only a level with throughput has one"
    if row.throughput_high_rps is None:
        return f"{row.throughput_rps:.4g}"
    return f"{row.throughput_rps:.4g} ± {row.throughput_high_rps - row.throughput_rps:.2g}"


def _documents(found: Point | None, open_loop: OpenLoop | None, goal: Goal) -> float | None:
    if found is None or open_loop is None or open_loop.mean_response_ms is None:
        return None
    return min(found.concurrency, goal.target_qps * open_loop.mean_response_ms / 1e3)


def _in_flight(points: Sequence[Point], goal: Goal) -> InFlight | None:
    # In a closed loop N = X·R, so N = q·R(N) is where the curve delivers the whole target.
    mean = crossing(points, goal.target_qps)
    if mean is None:
        return None
    spread = math.sqrt(mean)
    return InFlight(mean, max(0.0, mean - 1.96 * spread), mean + 1.96 * spread, math.ceil(mean + _COMFORT * spread))
