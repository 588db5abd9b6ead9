"""Failures that are certain before the plan is done: sooner is cheaper, but looking often must not deceive."""

import numpy as np
import pytest

from loadstone.core.engine_metrics import EngineMetrics
from loadstone.core.records import Outcome
from loadstone.core.verdict import Verdict
from loadstone.measure.early import Latency, View, certain_failure, certain_shortage, view_of
from loadstone.measure.rules import Rules, Slo
from loadstone.measure.steady import LevelData
from loadstone.measure.telemetry import ServerFigures, TelemetrySample
from made_levels import level, meta, record

RULES = Rules(max_ttft_ms=1000.0)


def known(*values_ms: float) -> list[Latency]:
    return [Latency(value_ms, True) for value_ms in values_ms]


def waiting(*ages_ms: float) -> list[Latency]:
    return [Latency(age_ms, False) for age_ms in ages_ms]


def view(planned: int = 80, failures: int = 0, concurrency: int = 10, **latencies: list[Latency]) -> View:
    return View(concurrency, planned, failures, dict(latencies))


# -- success --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [8, 60, 200, 1000, 8000])
def test_few_failures_are_never_certain_and_many_are(planned: int) -> None:
    """Never sooner than the exact bound: while 5 % of what the level may grow to have not failed, it may pass."""
    exact = int(0.05 * max(planned, 60))
    assert certain_failure(view(planned, failures=exact), RULES, True) is None
    found = certain_failure(view(planned, failures=exact + planned // 10 + 10), RULES, True)
    assert found is not None
    assert (found.rule, found.verdict) == ("success", Verdict.FAIL)


def test_a_stray_error_does_not_fail_a_level_of_few_requests() -> None:
    assert certain_failure(view(planned=8, failures=2, concurrency=1), RULES, True) is None


def test_more_failures_never_make_it_less_certain() -> None:
    certain = [certain_failure(view(planned=400, failures=n), RULES, True) is not None for n in range(401)]
    assert certain == sorted(certain)
    assert certain[-1]


def test_a_rule_that_allows_all_failures_is_never_failed() -> None:
    assert certain_failure(view(failures=80), Rules(min_success=0.0), True) is None


# -- means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "planned", "fails"),
    [
        (known(*[1100.0] * 10), 80, False),  # the others may still be quick
        (known(*[9000.0] * 10), 80, True),  # 90 s already, 80 s are allowed
        (waiting(*[9000.0] * 10), 80, True),  # the age of what waits counts as well
        (known(*[100.0] * 10) + waiting(*[9000.0] * 10), 80, True),
        (known(*[4000.0] * 10) + waiting(*[3900.0] * 10), 80, False),
        (known(90_000.0), 80, False),  # one hiccup
        (known(45_000.0, 45_000.0) + known(*[10.0] * 10), 80, False),  # two
    ],
)
def test_a_mean_is_over_when_what_is_known_already_exceeds_what_all_may_take(
    samples: list[Latency], planned: int, fails: bool
) -> None:
    found = certain_failure(view(planned, ttft=samples), RULES, True)
    assert (found is not None) == fails
    if found is not None:
        assert found.rule == "ttft"
        assert "> 1000 ms" in found.reason


def test_a_steady_excess_is_seen_long_before_the_plan_is_done() -> None:
    rng = np.random.default_rng(1)
    samples = known(*rng.normal(1500, 100, 100))
    assert certain_failure(view(planned=8000, concurrency=20, ttft=samples), RULES, True) is not None
    assert certain_failure(view(planned=8000, concurrency=20, ttft=samples[:40]), RULES, True) is None


def test_what_finished_first_is_not_taken_for_all() -> None:
    """Slow ones first in the order of their end would be a biased sample: values count in send order."""
    mixed = [sample for i in range(100) for sample in (known(1500.0 + i) if i % 2 else waiting(10.0))]
    assert certain_failure(view(planned=8000, concurrency=20, ttft=mixed), RULES, True) is None


@pytest.mark.parametrize("cv", [0.05, 0.5])
def test_a_level_at_its_limit_is_not_stopped(cv: float) -> None:
    """Looked at after each request, a mean of exactly the limit is failed in a few of a hundred runs at most."""
    stopped = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        samples = known(*rng.gamma(1 / cv**2, 1000 * cv**2, 400))
        looks = range(20, 400, 10)
        stopped += any(certain_failure(view(400, concurrency=20, ttft=samples[:n]), RULES, True) for n in looks)
    assert stopped <= 8


def test_a_level_well_over_its_limit_is_stopped_before_the_middle() -> None:
    stopped = 0
    for seed in range(50):
        samples = known(*np.random.default_rng(seed).gamma(4, 2000 / 4, 200))
        stopped += any(
            certain_failure(view(400, concurrency=20, ttft=samples[:n]), RULES, True) for n in (100, 150, 200)
        )
    assert stopped >= 48


# -- quantiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "planned", "fails"),
    [(0, 300, False), (3, 300, False), (30, 300, True), (3, 3000, False), (100, 3000, True)],
)
def test_a_p99_is_over_when_too_many_exceed_it(over: int, planned: int, fails: bool) -> None:
    rules = Rules(max_ttft_ms=1000.0, ttft_stat="p99")
    samples = known(*[1200.0] * over, *[200.0] * 100)
    assert (certain_failure(view(planned, ttft=samples), rules, True) is not None) == fails


def test_failures_and_the_waiting_exceed_any_quantile() -> None:
    rules = Rules(max_ttft_ms=1000.0, ttft_stat="p95", min_success=0.5)
    slow = waiting(*[1500.0] * 15)
    found = certain_failure(view(planned=200, failures=15, ttft=slow), rules, True)
    assert found is not None
    assert found.rule == "ttft"
    assert certain_failure(view(planned=200, failures=0, ttft=waiting(*[500.0] * 30)), rules, True) is None


def test_rules_are_held_in_their_order() -> None:
    slow = known(*[9000.0] * 10)
    rules = Rules(slos=(Slo("e2el", "mean", 100.0),))
    found = certain_failure(view(ttft=slow, e2el=slow), rules, True)
    assert found is not None
    assert found.rule == "slo:e2el"
    found = certain_failure(view(failures=80, ttft=slow, e2el=slow), rules, True)
    assert found is not None
    assert found.rule == "success"


def test_without_a_stream_the_ttft_limit_holds_for_the_whole_request() -> None:
    found = certain_failure(view(e2el=known(*[9000.0] * 10)), RULES, False)
    assert found is not None
    assert found.rule == "e2el"


# -- read back ------------------------------------------------------------------------------------------------------


def test_what_stopped_a_level_is_found_again_in_its_records() -> None:
    records = [
        record(0, 0.5),  # before the window
        record(1, 1.0, ttft_s=0.2, e2e_s=2.0),
        record(2, 1.1, outcome=Outcome.CUT, e2e_s=5.0, ttft_s=None),
        record(3, 1.2, outcome=Outcome.CUT, e2e_s=5.0, ttft_s=3.0),
        record(4, 1.3, outcome=Outcome.REFUSED, e2e_s=0.01),
        record(5, 1.4, outcome=Outcome.CLIENT, e2e_s=0.01),
        record(6, 1.5, ttft_s=None),  # finished without content
    ]
    stopped = LevelData(meta(5, (1.0, 6.0), planned_requests=40, stopped_early="it was slow"), records, ServerFigures())
    seen = view_of(stopped)
    assert (seen.concurrency, seen.planned, seen.failures) == (5, 40, 1)
    assert [(round(s.ms), s.known) for s in seen.latencies["ttft"]] == [(200, True), (5000, False), (3000, True)]
    assert [(round(s.ms), s.known) for s in seen.latencies["e2el"]] == [
        (2000, True), (5000, False), (5000, False), (1000, True),
    ]  # fmt: skip


def test_a_level_that_ran_in_full_has_nothing_waiting() -> None:
    assert all(sample.known for sample in view_of(level(4)).latencies["ttft"])


# -- resources ------------------------------------------------------------------------------------------------------


def cache(*uses: float, preemptions: float = 0.0) -> list[TelemetrySample]:
    """Samples a second apart; all preemptions come at the end."""
    last = len(uses) - 1
    return [
        TelemetrySample(
            float(i), EngineMetrics("vllm", kv_use=use, preemptions_total=preemptions if i == last else 0.0)
        )
        for i, use in enumerate(uses)
    ]


@pytest.mark.parametrize(
    ("uses", "fails"),
    [
        ([1.0] * 5, False),  # the rest of ten seconds may lie below
        ([1.0] * 6, True),
        ([0.5] * 4 + [1.0] * 5, False),
        ([0.5] * 4 + [0.95] * 6, True),
        ([0.94] * 10, False),
        ([], False),
    ],
)
def test_a_median_is_certain_once_most_of_the_window_is_over_the_limit(uses: list[float], fails: bool) -> None:
    found = certain_shortage(cache(*uses), (0.0, float(len(uses))), 10.0, 100, RULES)
    assert (found is not None and found.rule == "resource:kv") is fails


def test_what_was_before_the_window_does_not_count() -> None:
    assert certain_shortage(cache(*[1.0] * 6, *[0.5] * 4), (6.0, 10.0), 4.0, 100, RULES) is None


def test_more_preemptions_than_the_plan_allows() -> None:
    assert certain_shortage(cache(0.5, 0.5, preemptions=4.0), (0.0, 2.0), 10.0, 400, RULES) is None
    found = certain_shortage(cache(0.5, 0.5, preemptions=5.0), (0.0, 2.0), 10.0, 400, RULES)
    assert found is not None
    assert found.rule == "resource:preemptions"


def test_a_server_without_metrics_lacks_nothing() -> None:
    assert certain_shortage([TelemetrySample(0.0), TelemetrySample(1.0)], (0.0, 2.0), 2.0, 100, RULES) is None
