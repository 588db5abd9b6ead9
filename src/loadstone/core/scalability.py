"""The universal scalability law, fitted to a measured curve: a picture beside the answer, never a judge of it.

X(N) = λN / (1 + σ(N−1) + κN(N−1)) (Gunther). It has no term for a cap, so beyond a sharp knee it invents a peak.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MIN_LEVELS = 4
_RESAMPLES = 200
_MAX_STEPS = 25

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class ScalabilityFit:
    """λ in requests per second, σ (contention) and κ (coherence) dimensionless."""

    lam: float
    sigma: float
    kappa: float
    peak: float
    """N* = √((1−σ)/κ), at least 1; infinite where κ = 0."""
    peak_low: float
    """95 % interval of N* by residual bootstrap; an end may be infinite."""
    peak_high: float

    def throughput_rps(self, concurrency: float) -> float:
        """X(N) in requests per second."""
        n = concurrency
        return self.lam * n / (1 + self.sigma * (n - 1) + self.kappa * n * (n - 1))


def fit(concurrency: Sequence[float], throughput_rps: Sequence[float], *, seed: int = 0) -> ScalabilityFit | None:
    """Fit least squares of ln X with σ, κ ≥ 0; None with fewer than four distinct levels.

    ``concurrency`` and ``throughput_rps`` have equal length and are positive; levels stopped early do not belong in.
    """
    if len(set(concurrency)) < _MIN_LEVELS:
        return None
    n = np.asarray(concurrency, dtype=np.float64)
    log_per_slot = np.log(np.asarray(throughput_rps, dtype=np.float64)) - np.log(n)
    basis = np.column_stack((np.ones_like(n), n - 1, n * (n - 1)))
    params = _solve(basis, log_per_slot, np.array([math.exp(-log_per_slot[np.argmin(n)]), 0.0, 0.0]))
    low, high = _peak_interval(basis, log_per_slot, params, np.random.default_rng(seed))
    a, b, c = (float(value) for value in params)
    return ScalabilityFit(lam=1 / a, sigma=b / a, kappa=c / a, peak=_peak(params), peak_low=low, peak_high=high)


def _residuals(basis: Floats, log_per_slot: Floats, params: Floats) -> Floats:
    # With D(N) = a + b(N−1) + cN(N−1), a = 1/λ, σ = b/a, κ = c/a, the law reads ln(X/N) = −ln D(N).
    return log_per_slot + np.log(basis @ params)


def _solve(basis: Floats, log_per_slot: Floats, params: Floats) -> Floats:
    """Gauss–Newton in (a, b, c) from ``params``; each step is a small non-negative least-squares problem.

    D is linear in the parameters, so linearising ln D about them leaves ‖(basis/D)·p − (1 − r)‖ to be minimised.
    """
    residuals = _residuals(basis, log_per_slot, params)
    cost = float(residuals @ residuals)
    for _ in range(_MAX_STEPS):
        scaled = basis / (basis @ params)[:, None]
        step = _non_negative(scaled, 1 - residuals) - params
        shrink = 1.0
        while True:
            trial = params + shrink * step
            trial_residuals = _residuals(basis, log_per_slot, trial)
            trial_cost = float(trial_residuals @ trial_residuals)
            if trial_cost < cost:
                break
            shrink /= 2
            if shrink < 1e-6:
                return params
        settled = cost - trial_cost <= 1e-8 * cost
        params, residuals, cost = trial, trial_residuals, trial_cost
        if settled:
            break
    return params


def _non_negative(matrix: Floats, target: Floats) -> Floats:
    """Least squares with a > 0 and b, c ≥ 0: with two constraints the four active sets can simply be tried.

    Where the free solution keeps to the bounds no other can be better.
    """
    best = np.array([1.0, 0.0, 0.0])
    best_cost = math.inf
    for free in ((0, 1, 2), (0, 1), (0, 2), (0,)):
        columns = matrix[:, free]
        scale = columns.max(axis=0)
        solution = np.linalg.lstsq(columns / scale, target, rcond=None)[0] / scale
        error = columns @ solution - target
        cost = float(error @ error)
        if solution[0] > 0 and solution.min() >= 0 and cost < best_cost:
            best, best_cost = np.zeros(3), cost
            best[list(free)] = solution
            if len(free) == len(best):
                break
    return best


def _peak(params: Floats) -> float:
    a, b, c = (float(value) for value in params)
    return max(1.0, math.sqrt(max(a - b, 0.0) / c)) if c > 0 else math.inf


def _peak_interval(
    basis: Floats, log_per_slot: Floats, params: Floats, rng: np.random.Generator
) -> tuple[float, float]:
    residuals = _residuals(basis, log_per_slot, params)
    # Three parameters were spent on these residuals: they are too small by this factor.
    residuals = residuals * math.sqrt(len(residuals) / (len(residuals) - 3))
    fitted = -np.log(basis @ params)
    peaks = [
        _peak(_solve(basis, fitted + rng.choice(residuals, size=len(residuals)), params)) for _ in range(_RESAMPLES)
    ]
    # No interpolation: it would make NaN of two infinite neighbours.
    low, high = np.quantile(peaks, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)
