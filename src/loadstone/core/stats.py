"""Estimates from the records of a level, each with its error: quantiles, rates, means, throughput.

The gain line of a curve is in ``core.gain``, the bounds that end a failing level early in ``core.early_stop``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

Z_95 = 1.96
"""Two-sided 95 % of the normal distribution."""

_SLICES = 8
_LEAST_THROUGHPUT_ERROR = 0.002


def quantile(values: npt.ArrayLike, q: float, n_infinite: int = 0) -> float:
    """Linearly interpolated ``q`` quantile (0 … 1) of ``values`` and ``n_infinite`` failures, which count as +∞.

    Infinite where it falls among the failures, NaN where there is nothing at all.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    total = ordered.size + n_infinite
    if total == 0:
        return math.nan
    position = (total - 1) * q
    below = math.floor(position)
    above = math.ceil(position)
    if above >= ordered.size:
        return math.inf
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def quantile_interval(values: npt.ArrayLike, q: float, n_infinite: int = 0, z: float = Z_95) -> tuple[float, float]:
    """Interval of the ``q`` quantile (0 < q < 1) by order statistics, exact for any distribution.

    The ranks come from Binomial(n, q). Where n is too small for a bound it is infinite: the maximum of 100 samples
    is no upper bound of their p99.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    total = ordered.size + n_infinite
    if total == 0:
        return -math.inf, math.inf
    tail = math.erfc(z / math.sqrt(2)) / 2
    at_most = np.cumsum(_binomial(total, q))
    low_rank = int(np.searchsorted(at_most, tail, side="right"))
    high_rank = int(np.searchsorted(at_most, 1 - tail)) + 1
    low = -math.inf if low_rank == 0 else _order_statistic(ordered, low_rank)
    high = math.inf if high_rank > total else _order_statistic(ordered, high_rank)
    return low, high


def _order_statistic(ordered: npt.NDArray[np.float64], rank: int) -> float:
    return float(ordered[rank - 1]) if rank <= ordered.size else math.inf


def _binomial(n: int, p: float) -> npt.NDArray[np.float64]:
    """Probabilities of 0 … n successes."""
    k = np.arange(1, n + 1)
    log_choose = np.concatenate(([0.0], np.cumsum(np.log((n - k + 1) / k))))
    successes = np.arange(n + 1)
    log_p = log_choose + successes * math.log(p) + (n - successes) * math.log1p(-p)
    return np.asarray(np.exp(log_p))


def wilson(successes: float, n: float, z: float = Z_95, design_effect: float = 1.0) -> tuple[float, float]:
    """Wilson's interval of a success rate; (0, 1) without observations.

    ``design_effect`` (>= 1) says how many clustered observations are worth one independent one.
    """
    if n <= 0:
        return 0.0, 1.0
    rate = successes / n
    effective = n / design_effect
    spread = z * z / effective
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / effective + spread / (4 * effective)) / (1 + spread)
    # Rounding must not push a certain end off its exact value: 60 of 60 reaches 1.
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    high = 1.0 if successes >= n else min(1.0, centre + half)
    return low, high


def design_effect(outcomes_by_wave: Sequence[Sequence[bool]]) -> float:
    """How much failures that come together widen a success rate's variance: at least 1, 1 where it cannot be told.

    Variance of the ratio estimator over the waves, divided by p(1 − p)/n.
    """
    sizes = np.array([len(wave) for wave in outcomes_by_wave if len(wave)], dtype=float)
    good = np.array([sum(wave) for wave in outcomes_by_wave if len(wave)], dtype=float)
    if sizes.size < 2:
        return 1.0
    n = float(sizes.sum())
    rate = float(good.sum()) / n
    if rate in (0.0, 1.0):
        return 1.0
    clustered = sizes.size / (sizes.size - 1) * float(np.sum((good - rate * sizes) ** 2)) / n**2
    return max(1.0, clustered / (rate * (1 - rate) / n))


class MeanEstimate(msgspec.Struct, frozen=True):
    """A mean and what is known of its error."""

    mean: float
    """NaN without values."""
    se: float
    """Standard error; infinite with fewer than two values."""
    n: int
    waves: int
    """Waves whose means gave the error; 0 where there were fewer than two and single values had to do."""

    @property
    def margin_95(self) -> float:
        """Half the 95 % interval, by Student's t: the spread of four wave means is itself uncertain."""
        if math.isinf(self.se):
            return math.inf
        return student_95((self.waves or self.n) - 1) * self.se


def mean_se(values: npt.ArrayLike, wave_size: int) -> MeanEstimate:
    """Mean of ``values`` (in send order) with the error of its batch means.

    A wave is a run of ``wave_size`` requests (the concurrency), a remainder joins them; single requests of one wave
    share the server's state, so their own spread says too little or too much. sd/√k·√((1 + ρ₁)/(1 − ρ₁)).
    """
    data = np.asarray(values, dtype=float)
    n = data.size
    if n == 0:
        return MeanEstimate(math.nan, math.inf, 0, 0)
    waves = n // max(1, wave_size)
    if waves < 2:
        se = float(data.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return MeanEstimate(float(data.mean()), se, n, 0)
    means = np.array([wave.mean() for wave in np.array_split(data, waves)]) if waves < n else data
    return MeanEstimate(float(data.mean()), _series_se(means), n, waves)


def _series_se(series: npt.NDArray[np.float64]) -> float:
    """Standard error of the mean of a correlated series: sd/√k·√((1 + ρ₁)/(1 − ρ₁)), ρ₁ not below 0."""
    rho = max(0.0, lag_one(series))
    return float(series.std(ddof=1)) / math.sqrt(series.size) * math.sqrt((1 + rho) / (1 - rho))


def lag_one(series: npt.ArrayLike) -> float:
    """Lag-1 autocorrelation, always below 1; 0 for a constant series."""
    data = np.asarray(series, dtype=float)
    deviations = data - data.mean()
    power = float(deviations @ deviations)
    # What rounding leaves of a constant series is no correlation.
    if power <= data.size * (1e-12 * float(np.abs(data).max())) ** 2:
        return 0.0
    return float(deviations[1:] @ deviations[:-1]) / power


def student_95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; exact for 1 and 2, within 1 % beyond (Cornish–Fisher)."""
    if degrees <= 2:
        return {1: 12.706, 2: 4.303}.get(degrees, math.inf)
    z = Z_95
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


def fractional_throughput(starts_s: npt.ArrayLike, ends_s: npt.ArrayLike, w0_s: float, w1_s: float) -> float:
    """Requests per second in the window: (1/T)·Σ|[sᵢ, eᵢ] ∩ window|/(eᵢ − sᵢ).

    A raw count of completions is 5–14 % high, requests ÷ wall time 6–19 % low. Give successes only, those that
    overlap the window at either end included.
    """
    starts, ends = np.asarray(starts_s, dtype=float), np.asarray(ends_s, dtype=float)
    durations = ends - starts
    overlaps = np.minimum(ends, w1_s) - np.maximum(starts, w0_s)
    instant = durations <= 0
    shares = np.clip(overlaps, 0.0, None) / np.where(instant, 1.0, durations)
    shares[instant] = (starts[instant] >= w0_s) & (starts[instant] < w1_s)
    return float(shares.sum()) / (w1_s - w0_s)


def throughput_se(starts_s: npt.ArrayLike, ends_s: npt.ArrayLike, w0_s: float, w1_s: float) -> float:
    """Standard error of ``fractional_throughput`` from eight slices of the window; at least 0.2 % of it."""
    edges = np.linspace(w0_s, w1_s, _SLICES + 1)
    slices = np.array([fractional_throughput(starts_s, ends_s, low, high) for low, high in pairwise(edges)])
    return max(_series_se(slices), _LEAST_THROUGHPUT_ERROR * float(slices.mean()))


def needed_for_mean(cv: float, resolution: float, b: float = 1.0, tau: float = 2.0) -> int:
    """Requests for a mean near its limit: τ(1.96·cv/(res·b))².

    ``cv`` of a single value, ``b`` = dln(value)/dlnN, ``tau`` the loss by correlation.
    """
    return math.ceil(tau * (Z_95 * cv / (resolution * b)) ** 2)
