"""The exact bound by example; the confidence sequence by simulation with a fixed seed."""

import numpy as np
import pytest

from loadstone.core.early_stop import mean_certain, mean_exceeds


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
