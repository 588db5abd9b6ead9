"""What a concurrency is worth after several runs, and rules that lean on more than one figure."""

import dataclasses

import pytest

from loadstone.core.records import Outcome
from loadstone.core.verdict import LevelKind, Verdict
from loadstone.measure.points import point_of
from loadstone.measure.rules import Rules, Stance, judge
from loadstone.measure.steady import summarise
from loadstone.measure.telemetry import ServerFigures
from made_levels import level, replace_meta

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
