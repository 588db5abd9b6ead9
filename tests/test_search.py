"""The search against servers whose line is known: it ends, near the line, and takes no trouble of ours for theirs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.core.gain import GainEstimate
from loadstone.core.limits import recommend
from loadstone.core.verdict import LevelKind, Verdict
from loadstone.measure.guess import closing, guess_inside
from loadstone.measure.points import Point, Service
from loadstone.measure.rules import Rules, Stance
from loadstone.measure.search import Ask, SearchSettings, _whole_line, ask, bracket_of, candidate_of
from loadstone.measure.steady import Throughput

LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
HARD = SearchSettings(Rules(min_gain=0.0), LADDER)
"""Without the gain rule."""
SOFT = SearchSettings(Rules(min_gain=0.2), LADDER)
MOST_LEVELS = 40
FEW = settings(max_examples=20, deadline=None)
"""A gain line takes a while, as it comes with its interval."""


def proportional(n: int) -> float:
    return float(n)


@dataclass
class Oracle:
    """A server that passes up to ``line`` and fails beyond it, seen as the points that its levels would give."""

    line: int
    rule: str = "ttft"
    steepness: float = 1.0
    """dln(pressure)/dlnN of what the rule watches."""
    accepted: int | None = None
    """What a refusing server worked on; None where it fails otherwise."""
    throughput_rps: Callable[[int], float] = proportional
    capacity: int | None = None
    """Requests that it serves at once; what waits beyond shows in the levels that fail."""
    void_once: frozenset[int] = frozenset()
    void_from: int | None = None
    failing_once: frozenset[int] = frozenset()
    refuting: frozenset[int] = frozenset()
    """Levels that pass until they are confirmed."""
    points: dict[int, Point] = field(default_factory=dict)
    asked: list[Ask] = field(default_factory=list)

    @property
    def known(self) -> list[Point]:
        return [point for _, point in sorted(self.points.items())]

    def search(self, chosen: SearchSettings) -> "Oracle":
        while (wanted := ask(self.known, chosen)) is not None:
            assert len(self.asked) < MOST_LEVELS, [a.concurrency for a in self.asked]
            self.asked.append(wanted)
            self.points[wanted.concurrency] = self._run(wanted)
        return self

    def answer(self, chosen: SearchSettings) -> int:
        candidate = candidate_of(self.known, chosen)
        assert candidate is not None
        return candidate.concurrency

    def binding(self, chosen: SearchSettings) -> str:
        candidate = candidate_of(self.known, chosen)
        assert candidate is not None
        return candidate.binding

    def _run(self, wanted: Ask) -> Point:
        n = wanted.concurrency
        before = self.points.get(n, Point(n, Verdict.UNRESOLVED, runs=0, full=False))
        if (n in self.void_once and before.runs == 0) or (self.void_from is not None and n >= self.void_from):
            return dataclasses.replace(before, verdict=Verdict.INVALID, rule="client", runs=before.runs + 1)
        confirming = wanted.kind is LevelKind.CONFIRM
        passes = n <= self.line and not (n in self.failing_once and before.runs == 0)
        passes = passes and not (n in self.refuting and confirming)
        exact = self.rule != "ttft"
        early = not passes and wanted.may_stop_early
        rps = self.throughput_rps(n)
        lasting = not early and wanted.window_times >= 3
        return Point(
            concurrency=n,
            verdict=Verdict.PASS if passes else Verdict.FAIL,
            rule="" if passes else self.rule,
            runs=before.runs + 1,
            full=before.full or not early or exact,
            requests=before.requests + (0 if early else wanted.requests),
            throughput=Throughput(rps, 0.002 * rps) if lasting else before.throughput,
            pressure=self._pressure(n),
            accepted=None if passes else self.accepted,
            service=self._service(passes),
            line_by_little=None if passes or self.capacity is None else self.line + 0.9,
            refuted=not passes and confirming,
        )

    def _service(self, passes: bool) -> Service | None:
        return None if passes or self.capacity is None else Service(self.capacity, self.capacity / self.peak_rps)

    @property
    def peak_rps(self) -> float:
        return max(self.throughput_rps(n) for n in range(1, LADDER[-1] + 1))

    @property
    def spent(self) -> int:
        """Requests judged."""
        return sum(wanted.requests for wanted in self.asked)

    def _pressure(self, n: int) -> Mapping[str, float] | None:
        return None if self.rule == "success" else {self.rule: (n / (self.line + 0.5)) ** self.steepness}


LINES = st.integers(1, 1300)
ORACLES = st.one_of(
    st.builds(Oracle, line=LINES, rule=st.just("ttft"), steepness=st.floats(0.1, 12)),
    st.builds(Oracle, line=LINES, rule=st.just("resource:kv"), steepness=st.just(1.0)),
    st.builds(Oracle, line=LINES, rule=st.just("slo:tpot"), steepness=st.floats(0.1, 3)),
    LINES.map(lambda line: Oracle(line, "success")),
    st.tuples(LINES, st.floats(0.9, 1.0)).map(lambda t: Oracle(t[0], "success", accepted=round(t[0] * t[1]))),
)


def within(answer: int, line: int, resolution: float) -> bool:
    """Nothing above the line is promised; what fails lies within the resolution, or one slot above."""
    return answer <= line and line < max(answer + 1, answer * (1 + resolution) * 1.0001)


# -- a monotone server ----------------------------------------------------------------------------------------------


@given(ORACLES, st.sampled_from([0.01, 0.05, 0.2]))
def test_it_ends_within_its_resolution(oracle: Oracle, resolution: float) -> None:
    chosen = dataclasses.replace(HARD, rules=Rules(min_gain=0.0, resolution=resolution))
    oracle.search(chosen)
    answer = oracle.answer(chosen)
    if oracle.line >= LADDER[-1]:
        assert (answer, oracle.binding(chosen)) == (LADDER[-1], "ladder")
    else:
        assert within(answer, oracle.line, resolution)
        assert oracle.binding(chosen) == oracle.rule


@given(ORACLES)
def test_the_answer_is_confirmed_and_the_recommended_level_measured(oracle: Oracle) -> None:
    oracle.search(HARD)
    answer = oracle.answer(HARD)
    assert oracle.points[answer].requests >= max(60, 8 * answer)
    assert oracle.points[recommend(answer)].throughput is not None


@given(ORACLES)
def test_an_upper_bound_never_rests_on_an_early_stop(oracle: Oracle) -> None:
    oracle.search(HARD)
    high = bracket_of(oracle.known).high
    assert high is None or high.full


@given(ORACLES)
def test_the_ladder_is_climbed_in_order_up_to_the_first_failure(oracle: Oracle) -> None:
    oracle.search(HARD)
    climbed = [a.concurrency for a in oracle.asked if a.kind is LevelKind.LADDER]
    wanted = [n for n in LADDER if n <= oracle.line]
    assert climbed == [*wanted, *LADDER[len(wanted) : len(wanted) + 1]]
    assert all(a.requests == max(8, 5 * a.concurrency) for a in oracle.asked if a.kind is LevelKind.LADDER)


@given(ORACLES)
def test_what_to_run_next_depends_on_the_points_alone(oracle: Oracle) -> None:
    """So a search that was interrupted goes on exactly as it would have."""
    oracle.search(HARD)
    again = Oracle(oracle.line, oracle.rule, oracle.steepness, oracle.accepted)
    for wanted in oracle.asked:
        remembered = [dataclasses.replace(point) for point in again.known]
        assert ask(remembered, HARD) == ask(again.known, HARD) == wanted
        assert remembered == again.known, "and asking changes nothing"
        again.points[wanted.concurrency] = again._run(wanted)
    assert ask(again.known, HARD) is None


@given(ORACLES, st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True).map(sorted))
def test_any_ladder_will_do(oracle: Oracle, ladder: list[int]) -> None:
    chosen = dataclasses.replace(HARD, ladder=tuple(ladder))
    oracle.search(chosen)
    if oracle.line < ladder[0]:
        assert candidate_of(oracle.known, chosen) is None
    elif oracle.line >= ladder[-1]:
        assert (oracle.answer(chosen), oracle.binding(chosen)) == (ladder[-1], "ladder")
    else:
        assert within(oracle.answer(chosen), oracle.line, 0.05)


@pytest.mark.parametrize(("line", "answer"), [(7, None), (8, 8), (500, 8)])
def test_a_ladder_of_one_level(line: int, answer: int | None) -> None:
    chosen = dataclasses.replace(SOFT, ladder=(8,))
    oracle = Oracle(line).search(chosen)
    candidate = candidate_of(oracle.known, chosen)
    assert (None if candidate is None else candidate.concurrency) == answer
    if candidate is None:
        assert [a.concurrency for a in oracle.asked] == [8, 8]
    else:
        assert candidate.binding == "ladder"


def test_a_ladder_level_judges_half_of_its_requests_at_first_and_all_where_throughput_scatters() -> None:
    first = ask([], dataclasses.replace(HARD, requests_per_slot=20))
    assert first is not None
    assert (first.kind, first.concurrency, first.stance) == (LevelKind.LADDER, 1, Stance.EXPLORE)
    assert (first.requests, first.most_requests) == (18, 20)


# -- accidents ------------------------------------------------------------------------------------------------------


def test_a_first_level_that_fails_once_was_cold() -> None:
    oracle = Oracle(40, failing_once=frozenset({1})).search(HARD)
    assert [a.concurrency for a in oracle.asked[:3]] == [1, 1, 2]
    assert within(oracle.answer(HARD), 40, 0.05)


def test_a_first_level_that_fails_twice_ends_the_search() -> None:
    oracle = Oracle(0).search(HARD)
    assert [a.concurrency for a in oracle.asked] == [1, 1]
    assert candidate_of(oracle.known, HARD) is None


@given(ORACLES, st.frozensets(st.sampled_from(LADDER), max_size=4))
def test_a_level_voided_once_is_run_again_and_changes_nothing(oracle: Oracle, void: frozenset[int]) -> None:
    troubled = dataclasses.replace(oracle, void_once=void, points={}, asked=[])
    oracle.search(HARD)
    troubled.search(HARD)
    assert troubled.answer(HARD) == oracle.answer(HARD)
    assert troubled.binding(HARD) == oracle.binding(HARD)


@given(st.integers(1, 600), st.integers(2, 700))
def test_a_generator_that_gives_out_makes_a_lower_bound(line: int, void_from: int) -> None:
    """INVALID never reads as "the server is full", and never lowers what the server has shown to hold."""
    oracle = Oracle(line, void_from=void_from).search(HARD)
    answer = oracle.answer(HARD)
    assert answer <= line
    assert answer >= max(p.concurrency for p in oracle.known if p.verdict is Verdict.PASS)
    ladder_below = [n for n in LADDER if n <= line and n < void_from]
    assert answer >= ladder_below[-1]
    first_not_passing = next(n for n in LADDER if n > ladder_below[-1])
    if void_from <= first_not_passing and line >= first_not_passing:
        assert oracle.binding(HARD) == "client"


def test_nothing_but_void_levels_is_no_answer() -> None:
    oracle = Oracle(100, void_from=1).search(HARD)
    assert candidate_of(oracle.known, HARD) is None
    assert [a.concurrency for a in oracle.asked] == [1, 1], "once more, then it is given up"


@given(st.integers(30, 900), st.floats(0, 0.12))
def test_an_answer_that_is_refuted_steps_down(line: int, share: float) -> None:
    """The topmost levels pass, but not when they are run to confirm the answer."""
    refuted = int(line * share)
    oracle = Oracle(line, refuting=frozenset(range(line - refuted + 1, line + 1))).search(HARD)
    answer = oracle.answer(HARD)
    assert oracle.points[answer].verdict is Verdict.PASS
    assert oracle.points[answer].requests >= 8 * answer
    above = bracket_of(oracle.known).high
    assert above is None or above.concurrency <= max(answer + 1, answer * 1.0501), "by a resolution, not by a bracket"
    assert answer >= (line - refuted) / 1.05**2 - 1


# -- not monotone ---------------------------------------------------------------------------------------------------


def failing_at(*ns: int) -> Oracle:
    """Passes everywhere else; the points below are known, as of a run under other rules."""

    class Dipping(Oracle):
        def _run(self, wanted: Ask) -> Point:
            point = super()._run(wanted)
            if wanted.concurrency not in ns:
                return point
            return dataclasses.replace(point, verdict=Verdict.FAIL, rule="ttft", full=True)

    return Dipping(100)


def test_a_failure_below_a_pass_is_looked_at_again_and_stands() -> None:
    oracle = failing_at(20)
    for n in (1, 2, 5, 10, 20, 50):
        oracle.points[n] = oracle._run(Ask(LevelKind.LADDER, n, 8 * n, Stance.EXPLORE))
    oracle.search(HARD)
    assert [(a.concurrency, a.kind, a.requests) for a in oracle.asked[:2]] == [
        (20, LevelKind.CONFIRM, 160), (50, LevelKind.CONFIRM, 400),
    ]  # fmt: skip
    assert within(oracle.answer(HARD), 19, 0.05)


def test_a_failure_below_a_pass_that_was_an_accident_is_forgotten() -> None:
    oracle = Oracle(60, failing_once=frozenset({20}))
    for n in (1, 2, 5, 10, 20, 50):
        oracle.points[n] = oracle._run(Ask(LevelKind.LADDER, n, 8 * n, Stance.EXPLORE))
    assert oracle.points[20].verdict is Verdict.FAIL
    oracle.search(HARD)
    assert within(oracle.answer(HARD), 60, 0.05)


# -- where to look next ---------------------------------------------------------------------------------------------


@given(st.floats(21, 99), st.sampled_from([0.01, 0.05, 0.2]))
def test_a_guess_and_the_level_that_closes_above_it_have_the_crossing_between_them(
    crossing: float, resolution: float
) -> None:
    low, high = Point(20, Verdict.PASS), Point(100, Verdict.FAIL, rule="ttft", line_by_little=crossing)
    guess = guess_inside(low, high, [low, high], resolution)
    n = round(guess.concurrency)
    assert n == guess.concurrency
    assert crossing <= closing(n, resolution) + 1e-9 or n == closing(20, resolution)
    assert n <= crossing or n == closing(20, resolution), "it is to hold; just above a level that held it is to fail"


def test_near_a_level_that_failed_the_lowest_that_closes_the_bracket_is_run() -> None:
    low, high = Point(20, Verdict.PASS), Point(50, Verdict.FAIL, rule="ttft", line_by_little=49.5)
    guess = guess_inside(low, high, [low, high], 0.05)
    assert (guess.concurrency, guess.holds) == (48, True)


@pytest.mark.parametrize(("kv_use", "target"), [(0.5, 39), (0.4, 48), (0.39, 48)])
def test_a_cache_fills_in_proportion(kv_use: float, target: int) -> None:
    """Also where it seems to be just full at the level that failed."""
    low = Point(20, Verdict.PASS, pressure={"resource:kv": kv_use})
    high = Point(50, Verdict.FAIL, rule="resource:preemptions")
    assert guess_inside(low, high, [low, high], 0.05).concurrency == target


# -- the gain line --------------------------------------------------------------------------------------------------


def knee(capacity: float) -> Callable[[int], float]:
    return lambda n: min(float(n), capacity)


def bent(half: float) -> Callable[[int], float]:
    """X = N/(a + bN) with a/b = ``half``."""
    return lambda n: n / (1 + n / half)


@FEW
@given(st.floats(3, 400))
def test_a_sharp_knee_gives_its_gain_line(capacity: float) -> None:
    oracle = Oracle(10_000, throughput_rps=knee(capacity)).search(SOFT)
    assert oracle.binding(SOFT) == "gain"
    assert oracle.answer(SOFT) == pytest.approx(1.18 * capacity, rel=0.12, abs=1.5)


@FEW
@given(st.floats(2, 150))
def test_a_soft_knee_gives_its_gain_line(half: float) -> None:
    oracle = Oracle(10_000, throughput_rps=bent(half)).search(SOFT)
    assert oracle.binding(SOFT) == "gain"
    candidate = candidate_of(oracle.known, SOFT)
    assert candidate is not None
    assert candidate.gain is not None
    assert candidate.gain.low - 1 <= 2.83 * half <= candidate.gain.high + 1
    assert oracle.answer(SOFT) == pytest.approx(2.83 * half, rel=0.25, abs=1.5)


@FEW
@given(st.integers(2, 900), st.floats(3, 400))
def test_gain_binds_only_below_all_other_rules(line: int, capacity: float) -> None:
    oracle = Oracle(line, throughput_rps=knee(capacity)).search(SOFT)
    answer, gain_line = oracle.answer(SOFT), 1.18 * capacity
    assert answer <= line
    if gain_line > 1.15 * line + 1:
        assert oracle.binding(SOFT) == "ttft"
        assert within(answer, line, 0.05)
    elif gain_line < 0.85 * line - 1:
        assert oracle.binding(SOFT) == "gain"
        assert answer == pytest.approx(gain_line, rel=0.12, abs=1.5)


@pytest.mark.parametrize(("capacity", "line"), [(5, 8), (34, 49), (40, 56), (45, 59), (150, 190)])
def test_a_gain_line_below_a_failing_rule_is_sought_first(capacity: int, line: int) -> None:
    """The level that failed shows what the server serves at once, so the rule's own line need not be found."""
    oracle = Oracle(line, throughput_rps=knee(capacity), capacity=capacity).search(SOFT)
    assert oracle.binding(SOFT) == "gain"
    assert oracle.answer(SOFT) == pytest.approx(1.18 * capacity, rel=0.05, abs=1.0)
    failing = [a for a in oracle.asked if a.concurrency > line]
    assert len(failing) <= 2, "the level of the ladder, and one that bounds the gain line"


def test_the_rule_that_failed_is_narrowed_where_the_gain_line_lies_beyond_it() -> None:
    oracle = Oracle(57, throughput_rps=knee(52), capacity=52).search(SOFT)
    off_ladder = [a.concurrency for a in oracle.asked if a.kind is not LevelKind.LADDER]
    assert (oracle.answer(SOFT), oracle.binding(SOFT)) == (57, "ttft")
    assert off_ladder == [57, 59, recommend(57)], "the answer and the level above it, each at once"
    assert [a.may_stop_early for a in oracle.asked if a.concurrency == 59] == [False]


@pytest.mark.parametrize(("line", "measured"), [(52.0, 51), (55.4, 55), (54.0, 54)])
def test_a_gain_line_is_answered_by_a_level_near_it_that_leaves_little_to_run(line: float, measured: int) -> None:
    """51 is confirmed; of 55 the recommended level, 41, is known; of 54 the line itself is as good as any."""
    rates = {1: 1.0, 2: 2.0, 5: 5.0, 10: 10.0, 20: 20.0, 41: 41.0, 51: 44.0, 200: 44.0}
    known = [Point(n, Verdict.PASS, requests=8 * n, throughput=Throughput(x, 0.002 * x)) for n, x in rates.items()]
    if measured != 51:
        known = [dataclasses.replace(p, requests=0) if p.concurrency == 51 else p for p in known]
    if measured == 54:
        known = [p for p in known if p.concurrency != 41]
    estimate = GainEstimate(line, 0.9 * line, 1.1 * line, True)
    assert _whole_line(estimate, known, SOFT) == measured


def test_the_climb_ends_where_doubling_no_longer_pays() -> None:
    oracle = Oracle(10_000, throughput_rps=knee(32)).search(SOFT)
    assert max(oracle.points) <= 200
    assert LADDER[-1] in Oracle(10_000, throughput_rps=knee(32)).search(HARD).points, "with the rule off it goes on"


def test_a_dip_at_two_does_not_end_the_climb() -> None:
    def dips(n: int) -> float:
        return 0.9 if n == 2 else min(float(n), 64.0)

    oracle = Oracle(10_000, throughput_rps=dips).search(SOFT)
    assert oracle.answer(SOFT) == pytest.approx(1.18 * 64, rel=0.12)


def test_a_server_that_gains_nothing_has_its_line_at_one() -> None:
    oracle = Oracle(10_000, throughput_rps=lambda n: 5.0).search(SOFT)
    assert oracle.answer(SOFT) <= 2
    assert max(oracle.points) <= 20


def test_an_early_stop_leaves_no_throughput_to_judge_gain_by() -> None:
    oracle = Oracle(30, throughput_rps=proportional).search(SOFT)
    assert oracle.binding(SOFT) == "ttft"
    assert math.isfinite(oracle.answer(SOFT))
