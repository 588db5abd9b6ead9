"""Exact bounds by table and by force; the confidence sequence by simulation with a fixed seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.early_stop import failures_certain, mean_certain, mean_exceeds, quantile_certain
from loadstone.core.stats import quantile


@pytest.mark.parametrize(
    ("n_failed", "n_plan", "min_success", "certain"),
    [
        (5, 100, 0.95, False),
        (6, 100, 0.95, True),
        (1, 10, 0.9, False),
        (2, 10, 0.9, True),
        (0, 9, 1.0, False),
        (1, 9, 1.0, True),
    ],
)
def test_failures_certain(n_failed: int, n_plan: int, min_success: float, certain: bool) -> None:
    assert failures_certain(n_failed, n_plan, min_success) is certain


@pytest.mark.parametrize(("n_plan", "q", "least"), [(100, 0.99, 2), (1000, 0.99, 11), (100, 0.5, 51), (20, 0.95, 2)])
def test_quantile_certain(n_plan: int, q: float, least: int) -> None:
    assert not quantile_certain(least - 1, n_plan, q)
    assert quantile_certain(least, n_plan, q)


@given(st.integers(1, 300), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_certain_quantile_is_exceeded_at_its_very_best(n_plan: int, data: st.DataObject, q: float) -> None:
    n_exceeding = data.draw(st.integers(0, n_plan))
    at_best = [0.0] * (n_plan - n_exceeding) + [1.0] * n_exceeding
    if quantile_certain(n_exceeding, n_plan, q):
        assert quantile(at_best, q) == 1.0
    else:
        assert quantile(at_best, q) < 1.0


def test_mean_certain() -> None:
    assert not mean_certain(sum_done=8.0, sum_age_pending=2.0, limit=1.0, n_plan=10)
    assert mean_certain(sum_done=8.0, sum_age_pending=2.1, limit=1.0, n_plan=10)


def test_mean_exceeds_waits_for_three_batches() -> None:
    assert not mean_exceeds([5.0] * 59, concurrency=1, limit=1.0)
    assert mean_exceeds([5.0] * 60, concurrency=1, limit=1.0)
    assert not mean_exceeds([5.0] * 299, concurrency=200, limit=1.0)
    assert not mean_exceeds([0.5] * 600, concurrency=1, limit=1.0)


@pytest.mark.parametrize(("rho", "allowed"), [(0.0, 0.03), (0.2, 0.05), (0.4, 0.09)])
def test_looking_after_each_batch_seldom_deceives(rho: float, allowed: float) -> None:
    rng = np.random.default_rng(1)
    batches, runs = 25, 400
    noise = rng.standard_normal((runs, batches))
    for i in range(1, batches):
        noise[:, i] = rho * noise[:, i - 1] + np.sqrt(1 - rho**2) * noise[:, i]
    crossed = sum(
        any(mean_exceeds(np.repeat(1 + 0.1 * run[:k], 20), 1, limit=1.0) for k in range(3, batches + 1))
        for run in noise
    )
    assert crossed <= allowed * runs


def test_a_clear_failure_is_seen_soon() -> None:
    rng = np.random.default_rng(1)
    values = rng.gamma(4, 0.5, size=(200, 100))
    assert sum(mean_exceeds(run, 10, limit=1.0) for run in values) >= 190
