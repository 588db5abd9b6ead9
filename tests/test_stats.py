"""Estimates and their errors: tables first, then coverage by simulation with fixed seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.stats import (
    design_effect,
    fractional_throughput,
    lag_one,
    mean_se,
    needed_for_mean,
    quantile,
    quantile_interval,
    student_95,
    throughput_se,
    wilson,
)


@pytest.mark.parametrize(
    ("values", "q", "n_infinite", "expected"),
    [
        ([1.0, 2.0, 3.0], 0.5, 0, 2.0),
        ([3.0, 1.0], 0.25, 0, 1.5),
        ([5.0], 0.99, 0, 5.0),
        ([1.0, 2.0, 3.0], 1.0, 0, 3.0),
        ([1.0, 2.0, 3.0], 0.5, 1, 2.5),
        ([1.0, 2.0], 0.5, 1, 2.0),
        ([1.0], 0.5, 1, math.inf),
        ([1.0], 0.0, 9, 1.0),
        ([], 0.5, 3, math.inf),
        (range(101), 0.99, 0, 99.0),
    ],
)
def test_quantile(values: list[float], q: float, n_infinite: int, expected: float) -> None:
    assert quantile(values, q, n_infinite) == expected


def test_quantile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(quantile([], 0.5))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_quantile_grows_with_q_and_with_failures(values: list[float], q: float, failures: int) -> None:
    here = quantile(values, q, failures)
    assert here <= quantile(values, min(1.0, q + 0.1), failures) + 1e-6
    assert here <= quantile(values, q, failures + 1) + 1e-6
    assert failures or here == pytest.approx(float(np.quantile(values, q)), abs=1e-6)


def test_quantile_interval_of_few_samples_has_no_upper_end() -> None:
    low, high = quantile_interval(np.arange(100), 0.99)
    assert high == math.inf
    assert 90 <= low < 99
    assert quantile_interval([], 0.5) == (-math.inf, math.inf)
    assert quantile_interval([1.0, 2.0], 0.5) == (-math.inf, math.inf)


def test_quantile_interval_counts_failures_as_infinite() -> None:
    low, high = quantile_interval(np.arange(900), 0.95, n_infinite=100)
    assert (low, high) == (math.inf, math.inf)
    low, high = quantile_interval(np.arange(960), 0.95, n_infinite=40)
    assert low < 950 < high == math.inf


@pytest.mark.parametrize(("q", "n"), [(0.5, 40), (0.9, 200), (0.99, 1000)])
def test_quantile_interval_covers(q: float, n: int) -> None:
    rng = np.random.default_rng(7)
    truth = -math.log(1 - q)
    held = 0
    for _ in range(400):
        low, high = quantile_interval(rng.exponential(size=n), q)
        held += low <= truth <= high
    assert held >= 0.94 * 400


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(60, 60, 0.9398, 1.0), (0, 10, 0.0, 0.2775), (95, 100, 0.8883, 0.9785), (0, 0, 0.0, 1.0)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_widens_with_the_design_effect() -> None:
    assert wilson(95, 100, design_effect=4.0) == pytest.approx(wilson(95 / 4, 25))


@given(st.integers(0, 50), st.integers(0, 50), st.floats(1, 10))
def test_wilson_contains_the_rate(good: int, bad: int, deff: float) -> None:
    low, high = wilson(good, good + bad, design_effect=deff)
    assert 0 <= low <= high <= 1
    if good + bad:
        assert low <= good / (good + bad) <= high


def test_design_effect_of_independent_and_of_clustered_failures() -> None:
    rng = np.random.default_rng(3)
    independent = [list(rng.random(10) < 0.9) for _ in range(400)]
    clustered = [[bool(rng.random() < 0.9)] * 10 for _ in range(400)]
    assert design_effect(independent) == pytest.approx(1.0, abs=0.25)
    assert design_effect(clustered) == pytest.approx(10.0, rel=0.2)
    assert design_effect([[True] * 5, [True] * 5]) == 1.0
    assert design_effect([[True, False]]) == 1.0
    assert design_effect([]) == 1.0


def test_mean_se_of_waves() -> None:
    estimate = mean_se([1.0, 3.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0], wave_size=4)
    assert (estimate.mean, estimate.se, estimate.n, estimate.waves) == (4.0, 0.0, 8, 2)


def test_mean_se_falls_back_to_single_values() -> None:
    estimate = mean_se([1.0, 2.0, 3.0], wave_size=2)
    assert estimate.waves == 0
    assert estimate.se == pytest.approx(1 / math.sqrt(3))
    assert estimate.margin_95 == pytest.approx(4.303 / math.sqrt(3))


def test_mean_se_of_one_value_and_of_none() -> None:
    one, none = mean_se([2.0], 1), mean_se([], 1)
    assert (one.mean, one.se, one.margin_95) == (2.0, math.inf, math.inf)
    assert math.isnan(none.mean)
    assert none.margin_95 == math.inf


def test_mean_se_counts_a_remainder() -> None:
    assert mean_se(np.arange(10.0), 4).mean == 4.5
    assert mean_se(np.arange(10.0), 4).waves == 2


def test_mean_se_covers_correlated_requests() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        waves = np.repeat(rng.standard_normal(10), 20)
        estimate = mean_se(waves + 0.5 * rng.standard_normal(200), wave_size=20)
        held += abs(estimate.mean) <= estimate.margin_95
    assert held >= 0.93 * 400


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (9, 2.262), (1000, 1.962)])
def test_student(degrees: int, t: float) -> None:
    assert student_95(degrees) == pytest.approx(t, rel=0.01)


def test_lag_one() -> None:
    assert lag_one([1.1] * 9) == 0.0
    assert lag_one([1.0, -1.0] * 20) < -0.9
    assert 0.9 < lag_one(np.arange(100)) < 1.0


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], 1.0),
        ([-1.0], [1.0], 0.5 / 3),
        ([2.0], [6.0], 0.25 / 3),
        ([-5.0, 4.0], [-4.0, 5.0], 0.0),
        ([-3.0], [6.0], 3 / 9 / 3),
        ([0.0, 3.0, -1.0], [0.0, 3.0, -1.0], 1 / 3),
        ([], [], 0.0),
    ],
)
def test_fractional_throughput(starts: list[float], ends: list[float], expected: float) -> None:
    assert fractional_throughput(starts, ends, 0.0, 3.0) == pytest.approx(expected)


def test_fractional_throughput_is_unbiased_where_a_raw_count_is_not() -> None:
    rng = np.random.default_rng(2)
    slots = [np.cumsum(rng.gamma(4, 0.25, size=40)) for _ in range(50)]
    ends = np.concatenate(slots)
    starts = np.concatenate([np.concatenate(([0.0], slot[:-1])) for slot in slots])
    x = fractional_throughput(starts, ends, 5.0, 25.0)
    se = throughput_se(starts, ends, 5.0, 25.0)
    assert abs(x - 50.0) < 4 * se
    assert 0.002 * x <= se < 0.03 * x


def test_throughput_se_has_a_floor() -> None:
    starts = np.arange(0.0, 80.0, 0.01)
    assert throughput_se(starts, starts + 1.0, 10.0, 50.0) == pytest.approx(0.2, rel=1e-6)


def test_needed_for_mean() -> None:
    assert needed_for_mean(cv=0.5, resolution=0.05) == 769
    assert needed_for_mean(cv=0.5, resolution=0.05, b=2.0, tau=1.0) == 97
