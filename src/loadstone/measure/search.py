"""The search: which concurrency to run next, from what is known so far. Pure and without memory.

Theory of operation. Every call looks at all points anew, so a resumed search goes on exactly as it would have:

1. a level that was INVALID is run once more; so is a failing first level (a cold server fails it wrongly);
2. the ladder, up to the first failure or until a doubling no longer pays;
3. where a doubling seems to stop paying below the line of the rule that failed, the levels that tell;
4. else the bracket between the highest PASS and the lowest FAIL above it, down to the resolution; where the gain line
   is soft, the levels half an octave to each side of it;
5. an early FAIL that became the final upper bound, once more in full;
6. the answer's own level, up to ten requests sent for each slot; refuted, it steps down one resolution;
7. the recommended level, so that the figures written for it are measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadstone.core.gain import GainEstimate
from loadstone.core.limits import recommend
from loadstone.core.verdict import LevelKind, Verdict
from loadstone.measure.curve import Curve
from loadstone.measure.guess import closing, guess_inside
from loadstone.measure.points import Point
from loadstone.measure.rules import Rules, Stance, requests_for

DEFAULT_LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
BRACKET_REQUESTS = 5
ANSWER_REQUESTS = 8
TOP_UP_REQUESTS = 2
WINDOW_TIMES = 5
"""A window of fewer request times holds too few waves to judge by itself."""
MAX_RUNS = 3
"""Of one level: more would not settle what these did not."""
MAX_BISECTIONS = 16
MAX_GAIN_LEVELS = 6
_NEAR_ABOVE = 0.19
"""A quarter octave: a level so near to half an octave above the gain line serves in its stead."""


@dataclass(frozen=True)
class SearchSettings:
    """What the search may do."""

    rules: Rules
    ladder: tuple[int, ...] = DEFAULT_LADDER
    requests_per_slot: int = 10
    headroom: float = 0.75
    streams: bool = True

    @property
    def ladder_requests(self) -> int:
        """Judged requests per slot on the ladder: half, as long as throughput is steady; all, where it scatters."""
        return max(1, math.ceil(self.requests_per_slot / 2))

    @property
    def answer_requests(self) -> int:
        """Judged requests per slot at the answer: of ten that are sent one warms up and one keeps the load on."""
        return max(ANSWER_REQUESTS, self.requests_per_slot - 2)


@dataclass(frozen=True)
class Ask:
    """The next level to run."""

    kind: LevelKind
    concurrency: int
    requests: int
    stance: Stance
    may_stop_early: bool = True
    why: str = ""
    window_times: int = WINDOW_TIMES
    most_requests: int = 0
    """So many where throughput scatters or the verdict is not sure; 0: ``requests`` will do."""


@dataclass(frozen=True)
class Bracket:
    """Between the highest PASS and the lowest level above it that did not pass."""

    low: Point | None
    high: Point | None
    """A FAIL, or a level that stayed INVALID."""

    def closed(self, resolution: float) -> bool:
        if self.low is None or self.high is None:
            return False
        return self.high.concurrency <= closing(self.low.concurrency, resolution)


@dataclass(frozen=True)
class Candidate:
    """The answer as it stands: a concurrency and the rule that binds there."""

    concurrency: int
    binding: str
    gain: GainEstimate | None


def bracket_of(points: Sequence[Point]) -> Bracket:
    """A resolved FAIL below a PASS stands (after both were run again): the answer is below it."""
    failing = [p for p in points if p.verdict is Verdict.FAIL]
    high = failing[0] if failing else None
    passing = [p for p in points if p.verdict is Verdict.PASS and (high is None or p.concurrency < high.concurrency)]
    low = passing[-1] if passing else None
    if high is None:
        void = [p for p in points if p.verdict is Verdict.INVALID and (low is None or p.concurrency > low.concurrency)]
        high = void[0] if void else None
    return Bracket(low, high)


def candidate_of(points: Sequence[Point], settings: SearchSettings) -> Candidate | None:
    """The answer that the points support now; None where nothing passed."""
    bracket = bracket_of(points)
    if bracket.low is None:
        return None
    gain = binding_gain(points, bracket, settings)
    if gain is not None:
        return Candidate(_whole_line(gain, points, settings), "gain", gain)
    binding = "ladder" if bracket.high is None else _binding(bracket.high)
    return Candidate(bracket.low.concurrency, binding, None)


def _whole_line(gain: GainEstimate, points: Sequence[Point], settings: SearchSettings) -> int:
    """The gain line as a number of slots.

    Every level measured near it moves it a little, and a soft line is not worth chasing: within the resolution a level
    stands that was confirmed, else one whose recommended level has been measured.
    """
    within = settings.rules.resolution
    low, high = gain.line * (1 - within), min(gain.line * (1 + within), gain.high)
    known = {p.concurrency: p for p in points if p.verdict is Verdict.PASS}

    def left_to_run(n: int) -> tuple[bool, bool]:
        confirmed = n in known and known[n].requests >= _needed(n, settings)
        return not confirmed, not _has_throughput(known.get(recommend(n, settings.headroom)))

    near = [n for n in range(max(1, math.ceil(low)), math.floor(high) + 1) if not all(left_to_run(n))]
    return min(near, key=lambda n: (left_to_run(n), abs(n - gain.line)), default=round_line(gain.line))


def _has_throughput(point: Point | None) -> bool:
    return point is not None and point.throughput is not None


def _needed(concurrency: int, settings: SearchSettings) -> int:
    """Requests to judge at the answer."""
    base = settings.answer_requests * concurrency
    return requests_for(Stance.CONFIRM, concurrency, base, settings.rules, settings.streams)


def _binding(high: Point) -> str:
    return "client" if high.verdict is Verdict.INVALID else high.rule


def round_line(line: float) -> int:
    """A gain line as whole slots: to the nearest, as its interval is wider than that anyway."""
    return max(1, round(line))


def binding_gain(points: Sequence[Point], bracket: Bracket, settings: SearchSettings) -> GainEstimate | None:
    """The gain line where it lies below the hard line; None where it does not bind."""
    assert bracket.low is not None, "a gain line needs a level that passed"
    low = bracket.low.concurrency
    curve = Curve.of([p for p in points if p.verdict is Verdict.PASS or p.throughput])
    estimate = curve.gain_under_line(settings.rules.min_gain)
    if estimate is None or not estimate.reached or round_line(estimate.line) > low:
        return None
    return estimate if bracket.high is not None or round_line(estimate.line) < low else None


def ask(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """The next level, or None when the search is over. ``points`` in ascending order."""
    steps = (_again, _climb, _decide_gain, _narrow, _refine_gain, _prove_high, _confirm, _recommended)
    return next((wanted for step in steps if (wanted := step(points, settings)) is not None), None)


def _again(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """Run once more what may be an accident: INVALID, a failing first level, a FAIL below a PASS."""
    for point in points:
        if point.verdict is Verdict.INVALID and point.runs < 2:
            return _ladder(point.concurrency, settings, "the generator was late: once more")
    bracket = bracket_of(points)
    if bracket.high is None:
        return None
    if bracket.low is None and bracket.high.runs < 2 and bracket.high.verdict is Verdict.FAIL:
        return _ladder(bracket.high.concurrency, settings, "the first level failed: once more, it may have been cold")
    above = [p for p in points if p.verdict is Verdict.PASS and p.concurrency > bracket.high.concurrency]
    for point in (bracket.high, *above[-1:]):
        if above and point.runs < 2:
            return _confirming(point.concurrency, settings, "a failing level lies below a passing one: both once more")
    return None


def _ladder(concurrency: int, settings: SearchSettings, why: str) -> Ask:
    # A single slot has to show a few more, or a server that fails one in ten mostly passes the first level.
    base = max(settings.ladder_requests * concurrency, settings.requests_per_slot - 2)
    requests = requests_for(Stance.EXPLORE, concurrency, base, settings.rules, settings.streams)
    most = settings.requests_per_slot * concurrency
    return Ask(LevelKind.LADDER, concurrency, requests, Stance.EXPLORE, why=why, most_requests=most)


def _confirming(concurrency: int, settings: SearchSettings, why: str, have: int = 0) -> Ask:
    times = TOP_UP_REQUESTS if have >= BRACKET_REQUESTS * concurrency else BRACKET_REQUESTS
    requests = max(_needed(concurrency, settings) - have, times * concurrency)
    most = settings.requests_per_slot * concurrency - have
    return Ask(
        LevelKind.CONFIRM, concurrency, requests, Stance.CONFIRM, why=why, window_times=times, most_requests=most
    )


def _climb(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """The next level of the ladder, while nothing failed and doubling still pays."""
    if bracket_of(points).high is not None or _doubling_stopped_paying(points, settings):
        return None
    known = {point.concurrency for point in points}
    low = bracket_of(points).low
    top = low.concurrency if low is not None else 0
    following = next((level for level in settings.ladder if level > top and level not in known), None)
    return None if following is None else _ladder(following, settings, "")


def _doubling_stopped_paying(points: Sequence[Point], settings: SearchSettings) -> bool:
    """One level is looked ahead where the line is low or the curve is short: 1 → 2 often dips."""
    curve = Curve.of(points)
    estimate = curve.gain(settings.rules.min_gain)
    if estimate is None or not estimate.reached:
        return False
    if estimate.line >= 16 and len(curve.ns) >= 4:
        return True
    earlier = Curve(curve.ns[:-1], curve.xs[:-1], curve.ses[:-1])
    before = earlier.gain(settings.rules.min_gain)
    return before is not None and before.reached


def _narrow(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """Inside the bracket, unless the gain line is already known to lie below it."""
    bracket = bracket_of(points)
    low, high = bracket.low, bracket.high
    if low is None or high is None or bracket.closed(settings.rules.resolution):
        return None
    if high.verdict is Verdict.INVALID:
        # Where the generator gives out says nothing of the server: the answer stays a lower bound.
        return None
    if binding_gain(points, bracket, settings) is not None:
        return None
    inside = [p for p in points if low.concurrency < p.concurrency < high.concurrency]
    if len(points) > len(settings.ladder) + MAX_BISECTIONS:
        return None
    guess = guess_inside(low, high, points, settings.rules.resolution)
    target = min(max(math.floor(guess.concurrency), low.concurrency + 1), high.concurrency - 1)
    if any(p.concurrency == target for p in inside):
        return None
    answers = guess.holds and _likely_gain_line(points, settings) is None
    return _bracket_ask(target, answers, low, high, settings)


def _bracket_ask(target: int, holds: bool, low: Point, high: Point, settings: SearchSettings) -> Ask:
    resolution = settings.rules.resolution
    would_close = high.concurrency <= closing(target, resolution)
    likely_bound = target <= closing(low.concurrency, resolution)
    why = f"between {low.concurrency} that held and {high.concurrency} that did not"
    if holds or (would_close and not likely_bound):
        return replace(_answering(target, why, settings), may_stop_early=not likely_bound)
    return Ask(LevelKind.BISECT, target, BRACKET_REQUESTS * target, Stance.EXPLORE, not likely_bound, why)


def _decide_gain(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """Where the gain line seems to lie below the hard one: the levels that tell, instead of closing the bracket."""
    bracket = bracket_of(points)
    low, high = bracket.low, bracket.high
    if low is None or high is None or high.verdict is not Verdict.FAIL or bracket.closed(settings.rules.resolution):
        return None
    line = _likely_gain_line(points, settings)
    if line is None or _off_ladder(points, settings) >= MAX_GAIN_LEVELS:
        return None
    resolution, curve, target = settings.rules.resolution, Curve.of(points), round_line(line)
    why = f"a doubling pays up to {target} only"
    below = recommend(target, settings.headroom)
    if not curve.near(below, resolution):
        return _measuring(points, below, f"the recommended level, if {why}")
    if target <= low.concurrency or curve.near(target, resolution):
        return None
    return _answering(target, f"it seems that {why}", settings)


def _likely_gain_line(points: Sequence[Point], settings: SearchSettings) -> float | None:
    """Where it seems to lie; None where that is not below the hard line."""
    line = Curve.likely(points).likely_line(settings.rules.min_gain)
    return line if line is not None and line < _hard_line(points, settings) else None


def _hard_line(points: Sequence[Point], settings: SearchSettings) -> float:
    """Where the rule that failed seems to cross its limit; just beyond the ladder where none did."""
    bracket = bracket_of(points)
    low, high = bracket.low, bracket.high
    if high is None:
        return settings.ladder[-1] + 1
    if low is None or high.verdict is not Verdict.FAIL or bracket.closed(settings.rules.resolution):
        return high.concurrency
    return guess_inside(low, high, points, settings.rules.resolution).concurrency


def _off_ladder(points: Sequence[Point], settings: SearchSettings) -> int:
    return sum(1 for point in points if point.concurrency not in settings.ladder)


def _answering(target: int, why: str, settings: SearchSettings) -> Ask:
    """A level that is probably the answer: its confirmation is cheaper now than in a level of its own."""
    most = settings.requests_per_slot * target
    return Ask(LevelKind.BISECT, target, _needed(target, settings), Stance.EXPLORE, why=why, most_requests=most)


def _refine_gain(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """Measure half an octave to each side of the gain line: that is where it is read from."""
    candidate = candidate_of(points, settings)
    if candidate is None or candidate.gain is None:
        return None
    curve = Curve.of(points)
    settled = curve.is_settled(candidate.gain, settings.rules.resolution)
    if settled or _off_ladder(points, settings) >= MAX_GAIN_LEVELS:
        return None
    known = {point.concurrency for point in points}
    line = curve.likely_line(settings.rules.min_gain) or candidate.gain.line
    target = round(line * math.sqrt(2))
    if target < _hard_line(points, settings) and target not in known and not curve.near(target, _NEAR_ABOVE):
        why = f"half an octave above {round(line)}, beyond which a doubling seems to gain too little"
        return Ask(LevelKind.BISECT, target, BRACKET_REQUESTS * target, Stance.EXPLORE, why=why)
    # Half an octave below lies nearly the recommended level, which is run in any case.
    below = recommend(max(1, round(line)), settings.headroom)
    if curve.near(below, settings.rules.resolution):
        return None
    return _measuring(points, below, f"the level to recommend if the line is near {round(line)}")


def _prove_high(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """The final upper bound must not rest on an early stop."""
    candidate = candidate_of(points, settings)
    high = bracket_of(points).high
    if candidate is None or candidate.gain is not None or high is None or high.full or high.runs > 2:
        return None
    if high.verdict is not Verdict.FAIL:
        return None
    requests = BRACKET_REQUESTS * high.concurrency
    why = "it failed early and is now the upper bound: once more in full"
    return Ask(LevelKind.BISECT, high.concurrency, requests, Stance.EXPLORE, False, why)


def _confirm(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """At the answer itself as many requests as it needs."""
    candidate = candidate_of(points, settings)
    if candidate is None:
        return None
    if candidate.gain is not None and (measuring := _recommended(points, settings)) is not None:
        # It lies where a gain line is read from: known first, it does not move a line that was confirmed.
        return measuring
    here = next((p for p in points if p.concurrency == candidate.concurrency), None)
    have = here.requests if here is not None else 0
    if have >= _needed(candidate.concurrency, settings) or (here is not None and here.runs > MAX_RUNS):
        return None
    return _confirming(candidate.concurrency, settings, "the answer's own level", have)


def _recommended(points: Sequence[Point], settings: SearchSettings) -> Ask | None:
    """The level that will be written into limits.toml."""
    candidate = candidate_of(points, settings)
    if candidate is None:
        return None
    target = recommend(candidate.concurrency, settings.headroom)
    return _measuring(points, target, "the recommended level, to measure it")


def _measuring(points: Sequence[Point], target: int, why: str) -> Ask | None:
    """A level that is run for its figures; None where they are known or not to be had."""
    here = next((p for p in points if p.concurrency == target), None)
    if here is not None and (here.runs > 1 or (here.throughput is not None and not _implausible(here, points))):
        return None
    return Ask(LevelKind.CONFIRM, target, BRACKET_REQUESTS * target, Stance.CONFIRM, False, why)


def _implausible(point: Point, points: Sequence[Point]) -> bool:
    """Less throughput than at a lower concurrency, beyond both errors: rather an accident than the server."""
    assert point.throughput is not None, "only a measured level can be implausible"
    below = [p.throughput for p in points if p.concurrency < point.concurrency and p.throughput is not None]
    return any(point.throughput.high_rps < other.low_rps for other in below)
