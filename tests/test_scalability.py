"""The universal scalability fit recovers the law it was fed, and admits what it cannot know."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.core.scalability import fit

LEVELS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]


def law(n: float, lam: float, sigma: float, kappa: float) -> float:
    return lam * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))


@settings(max_examples=30, deadline=None)
@given(lam=st.floats(1e-3, 1e4), sigma=st.floats(0, 0.9), kappa=st.floats(1e-6, 0.1))
def test_recovers_the_law_it_was_fed(lam: float, sigma: float, kappa: float) -> None:
    found = fit(LEVELS, [law(n, lam, sigma, kappa) for n in LEVELS])
    assert found is not None
    assert found.lam == pytest.approx(lam, rel=1e-4)
    assert found.sigma == pytest.approx(sigma, rel=1e-3, abs=1e-5)
    assert found.kappa == pytest.approx(kappa, rel=1e-3, abs=1e-9)
    assert found.peak == pytest.approx(max(1.0, math.sqrt((1 - sigma) / kappa)), rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 1e5), min_size=4, max_size=8))
def test_any_positive_curve_gives_a_law_within_its_bounds(throughputs: list[float]) -> None:
    found = fit(LEVELS[: len(throughputs)], throughputs)
    assert found is not None
    assert found.lam > 0
    assert found.sigma >= 0
    assert found.kappa >= 0
    assert 1 <= found.peak_low <= found.peak_high


def test_the_interval_of_the_peak_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(60):
        noisy = [law(n, 2, 0.02, 2e-4) * math.exp(0.02 * rng.normal()) for n in LEVELS]
        found = fit(LEVELS, noisy)
        assert found is not None
        covered += found.peak_low <= 70 <= found.peak_high
    assert covered >= 48


def test_a_straight_line_has_no_peak() -> None:
    found = fit(LEVELS, [0.5 * n for n in LEVELS])
    assert found is not None
    assert found.sigma == pytest.approx(0, abs=1e-9)
    assert found.peak > 1e4
    assert found.throughput_rps(30) == pytest.approx(15)


def test_throughput_that_only_falls_peaks_at_one() -> None:
    found = fit(LEVELS, [law(n, 5, 1.5, 0.1) for n in LEVELS])
    assert found is not None
    assert found.peak == 1


@pytest.mark.parametrize("levels", [[], [1], [1, 2, 4], [3, 3, 3, 3, 3]])
def test_fewer_than_four_levels_are_no_curve(levels: list[float]) -> None:
    assert fit(levels, [1.0] * len(levels)) is None
