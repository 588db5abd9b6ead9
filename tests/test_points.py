"""What a concurrency is worth after several runs, and rules that lean on more than one figure."""

import dataclasses

import pytest

from loadstone.core.records import Outcome
from loadstone.core.verdict import LevelKind, Verdict
from loadstone.measure.curve import Curve
from loadstone.measure.points import Point, Service, point_of
from loadstone.measure.rules import Rules, Stance, judge
from loadstone.measure.steady import LevelData, Throughput, summarise
from loadstone.measure.telemetry import ServerFigures
from made_levels import level, meta, record, replace_meta

RULES = Rules()


def test_a_confirmation_that_was_stopped_refutes() -> None:
    held = level(10)
    failed = level(
        10, failed=[Outcome.REFUSED] * 50, kind=LevelKind.CONFIRM, stopped_early="too many failed", ordinal=2
    )
    point = point_of([held, failed], RULES)
    assert (point.verdict, point.rule, point.refuted) == (Verdict.FAIL, "success", True)
    again = point_of([replace_meta(failed, kind=LevelKind.LADDER), held], RULES)
    assert again.verdict is Verdict.PASS, "a level that was only cold passes when it is run again"


def test_the_cold_first_level_of_a_run_is_not_pooled_with_its_repetition() -> None:
    cold = level(1, failed=[Outcome.TIMEOUT] * 4, waves=8, ordinal=1)
    warm = level(1, waves=8, ordinal=2)
    assert point_of([cold], RULES).verdict is Verdict.FAIL
    assert point_of([cold, warm], RULES).verdict is Verdict.PASS
    elsewhere = [replace_meta(cold, ordinal=7), replace_meta(warm, ordinal=8)]
    assert point_of(elsewhere, RULES).verdict is Verdict.FAIL


@pytest.mark.parametrize("stance", list(Stance))
def test_a_level_without_a_judged_request_decides_nothing(stance: Stance) -> None:
    assert judge(summarise([level(10, waves=2)]), RULES, stance).verdict is Verdict.UNRESOLVED


def test_time_outs_of_a_starved_client_are_not_the_servers() -> None:
    starved = level(10, failed=[Outcome.TIMEOUT] * 20, server=ServerFigures(run_queue_wait=0.9))
    assert judge(summarise([starved]), RULES).verdict is Verdict.INVALID


def test_a_confirmed_p99_of_as_many_requests_as_are_asked_for_is_sure() -> None:
    rules = dataclasses.replace(RULES, ttft_stat="p99")
    ttft_s = [0.1 + i / 2000 for i in range(300)]
    judged = judge(summarise([level(10, waves=32, ttft_s=ttft_s)]), rules, Stance.CONFIRM)
    assert (judged.verdict, judged.sure) == (Verdict.PASS, True)


# -- what a failing level tells -------------------------------------------------------------------------------------


def queueing(concurrency: int, capacity: int, served_s: float, until_s: float) -> LevelData:
    """Of ``concurrency`` slots ``capacity`` are served at once, evenly; the level is stopped at ``until_s``."""
    wait_s = (concurrency / capacity - 1) * served_s
    e2e_s = wait_s + served_s
    records = []
    for index in range(round(until_s / e2e_s * concurrency)):
        sent_s = index * e2e_s / concurrency
        done = sent_s + e2e_s <= until_s
        begun = sent_s + wait_s <= until_s
        records.append(
            record(
                index,
                sent_s,
                e2e_s=e2e_s if done else until_s - sent_s,
                ttft_s=wait_s if begun else None,
                outcome=Outcome.OK if done else Outcome.CUT,
            )
        )
    window = (1.2 * e2e_s, until_s)
    return LevelData(meta(concurrency, window, stopped_early="too slow", planned_requests=20), records, ServerFigures())


@pytest.mark.parametrize(("concurrency", "until_s"), [(60, 33.0), (60, 41.7), (100, 62.0), (41, 27.7)])
def test_a_queue_shows_what_is_served_at_once_and_where_its_wait_meets_the_limit(
    concurrency: int, until_s: float
) -> None:
    """Forty served at once for ten seconds each: one second of waiting is four more, N = X·(S + 1 s)."""
    level = queueing(concurrency, 40, 10.0, until_s)
    point = point_of([level], dataclasses.replace(RULES, max_ttft_ms=1000.0 if concurrency > 44 else 100.0))
    assert (point.verdict, point.rule) == (Verdict.FAIL, "ttft")
    assert point.service is not None
    assert point.service.busy == pytest.approx(40, rel=0.01)
    assert point.service.took_s == pytest.approx(10.0)
    assert point.line_by_little == pytest.approx(44 if concurrency > 44 else 40.4, rel=0.01)


def test_where_nothing_streams_all_in_flight_are_served() -> None:
    slow = level(20, e2e_s=2.0, ttft_s=(0.0,), streams=False)
    point = point_of([slow], RULES)
    assert (point.verdict, point.rule) == (Verdict.FAIL, "e2el")
    assert point.service is not None
    assert point.service.rps == pytest.approx(10)
    assert point.line_by_little == pytest.approx(10)


def test_a_level_that_holds_tells_nothing_of_its_capacity() -> None:
    point = point_of([level(10)], RULES)
    assert (point.verdict, point.service, point.line_by_little) == (Verdict.PASS, None, None)


def test_a_likely_curve_is_flat_from_what_the_failing_level_served_at_once() -> None:
    points = [Point(n, Verdict.PASS, throughput=Throughput(float(n), 0.01)) for n in (5, 10, 20)]
    points.append(Point(100, Verdict.FAIL, rule="ttft", service=Service(40.0, 1.0)))
    curve = Curve.likely(points)
    assert list(zip(curve.ns, curve.xs, strict=True)) == [(5, 5), (10, 10), (20, 20), (40, 40), (100, 40)]
    assert curve.likely_line(0.2) == pytest.approx(1.18 * 40, rel=0.01)
