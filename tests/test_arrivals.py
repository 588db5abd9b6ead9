"""Arrival times: monotone, repeatable, and of the rate that was asked for."""

import itertools
import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.measure.arrivals import Arrivals, offsets_ns

INF = math.inf


def test_all_at_once() -> None:
    assert offsets_ns(Arrivals(), 3, seed=0) == [0, 0, 0]
    assert offsets_ns(Arrivals(), 0, seed=0) == []


def test_constant() -> None:
    assert offsets_ns(Arrivals(10.0, INF), 4, seed=0) == [100_000_000, 200_000_000, 300_000_000, 400_000_000]


@pytest.mark.parametrize(("burstiness", "cv"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_burstiness_is_the_gamma_shape(burstiness: float, cv: float) -> None:
    offsets = offsets_ns(Arrivals(100.0, burstiness), 20_000, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(offsets)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)


@given(st.floats(0.01, 1e5), st.floats(0.2, 20) | st.just(INF), st.integers(1, 200), st.integers(0, 99))
def test_monotone_repeatable_and_of_that_rate(rate_rps: float, burstiness: float, count: int, seed: int) -> None:
    arrivals = Arrivals(rate_rps, burstiness)
    offsets = offsets_ns(arrivals, count, seed)
    assert offsets == sorted(offsets) == offsets_ns(arrivals, count, seed)
    assert offsets[0] >= 0
    assert offsets[-1] == pytest.approx(count / rate_rps * 1e9, abs=1)


def test_seeds_differ() -> None:
    assert offsets_ns(Arrivals(1.0), 10, seed=1) != offsets_ns(Arrivals(1.0), 10, seed=2)


@pytest.mark.parametrize(("ramp", "middle_rps"), [("linear", 505.0), ("exponential", 100.0)])
def test_ramps(ramp: str, middle_rps: float) -> None:
    arrivals = Arrivals(burstiness=INF, ramp=ramp, ramp_start_rps=10, ramp_end_rps=1000)
    rates = arrivals.rates_rps(101)
    assert (rates[0], rates[50], rates[100]) == pytest.approx((10.0, middle_rps, 1000.0))
    offsets = offsets_ns(arrivals, 101, seed=0)
    assert offsets == sorted(offsets)
    assert offsets[0] == pytest.approx(1e8)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rate_rps": 0.0}, "--request-rate"),
        ({"rate_rps": math.nan}, "--request-rate"),
        ({"burstiness": 0.0}, "--burstiness"),
        ({"ramp": "steep"}, "linear or exponential"),
        ({"ramp": "linear"}, "--ramp-up-start-rps"),
        ({"ramp": "linear", "rate_rps": 5.0}, "leave out --request-rate"),
        ({"ramp": "linear", "ramp_start_rps": 5.0, "ramp_end_rps": 1.0}, "at most"),
        ({"ramp": "exponential", "ramp_start_rps": 0.0, "ramp_end_rps": 1.0}, "greater than 0"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Arrivals(**wrong)
