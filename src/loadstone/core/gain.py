"""The gain line: up to which concurrency does doubling it still pay?

Throughput is read between levels by straight lines in log–log coordinates. G(N) = log2 X(√2·N) − log2 X(N/√2) is the
gain of a doubling centred on N, and the gain line is the largest N with G(N) >= log2(1 + min_gain). A sharp knee at C
gives 1.18·C, X = N/(a + bN) gives 2.83·a/b (both for a minimum gain of 0.2).

The interval holds two errors. Noise: the curve is drawn again many times from its standard errors. Interpolation: real
curves bend downwards, so between two levels throughput lies above the chord and below what the neighbouring segments
promise, never steeper than proportional.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]

_REDRAWS = 200
_GRID_PER_DOUBLING = 32
_DEGREES_OF_FREEDOM = 7
"""Of an error taken from eight slices of a window."""
_HALF = 0.5
"""log2 √2"""


class GainEstimate(msgspec.Struct, frozen=True):
    """The gain line with its 95 % interval, as concurrencies that need not be whole."""

    line: float
    low: float
    high: float
    """Infinite where the levels do not reach far enough to bound it."""
    reached: bool
    """False where doubling still pays at the right end: the line is then only a lower bound."""


def log_log_interpolate(ns: Sequence[float], xs: Sequence[float], n: float) -> float | None:
    """Throughput at concurrency ``n`` from levels in any order; None outside the measured range."""
    us, ys = _curve(ns, xs)
    u = math.log2(n)
    if us.size == 0 or not us[0] - 1e-9 <= u <= us[-1] + 1e-9:
        return None
    return float(2.0 ** np.interp(u, us, ys))


def gain(ns: Sequence[float], xs: Sequence[float], n: float) -> float | None:
    """G(n) = log2 X(√2·n) − log2 X(n/√2); None where either end is outside the measured range."""
    above = log_log_interpolate(ns, xs, n * math.sqrt(2))
    below = log_log_interpolate(ns, xs, n / math.sqrt(2))
    if above is None or below is None:
        return None
    return math.log2(above / below)


def gain_line(
    ns: Sequence[float], xs: Sequence[float], ses: Sequence[float] | None, min_gain: float
) -> GainEstimate | None:
    """The largest n with G(n) >= log2(1 + min_gain), 0 < min_gain < 1; None where the levels span less than a doubling.

    ``xs`` in requests per second with standard errors ``ses`` (None: taken as exact). Give each concurrency once, and
    only levels with a usable throughput. Where doubling pays nowhere in the range, throughput below the lowest level is
    taken as proportional: with levels from 1 on the line is then 1 and a bit.
    """
    us, ys = _curve(ns, xs)
    if us.size < 2 or us[-1] - us[0] < 1.0:
        return None
    threshold = math.log2(1 + min_gain)
    lowest, right_end = float(us[0]), float(us[-1]) - _HALF
    us, ys = np.concatenate(([lowest - 1.0], us)), np.concatenate(([ys[0] - 1.0], ys))
    grid = _grid(us)
    draws = _redraw(ns, xs, ses, ys)

    above, below = grid + _HALF, grid - _HALF
    ys = ys[None, :]
    chord_line = float(_last_crossing(grid, _chord(us, ys, above) - _chord(us, ys, below), threshold)[0])
    low_lines = _last_crossing(grid, _chord(us, draws, above) - _ceiling(us, draws, below), threshold)
    high_lines = _last_crossing(grid, _ceiling(us, draws, above) - _chord(us, draws, below), threshold)

    reached = math.isfinite(chord_line)
    line = chord_line if reached else right_end
    low = min(line, _ordered(low_lines, 0.025), _reflected(us, draws, grid, threshold, line), right_end)
    high = max(line, _ordered(high_lines, 0.975)) if reached else math.inf
    if lowest > 0.0 and line < lowest + _HALF:
        low, high = 0.0, max(high, lowest + _HALF)
    return GainEstimate(2.0**line, 2.0**low, 2.0**high, reached)


def _reflected(us: _Array, draws: _Array, grid: _Array, threshold: float, line: float) -> float:
    """The lower end of the basic bootstrap interval (Davison & Hinkley, 5.2.1), from noise alone.

    The last crossing of a noisy curve lies too far right rather than too far left: how far the redrawn lines run ahead
    of the line tells how far the line may have run ahead of the truth.
    """
    lines = _last_crossing(grid, _chord(us, draws, grid + _HALF) - _chord(us, draws, grid - _HALF), threshold)
    ahead = min(_ordered(lines, 0.975), float(us[-1])) - line
    return line - max(0.0, ahead)


def _curve(ns: Sequence[float], xs: Sequence[float]) -> tuple[_Array, _Array]:
    """log2 of the levels, ascending; levels without throughput have no place in logarithms."""
    points = sorted((n, x) for n, x in zip(ns, xs, strict=True) if x > 0)
    return np.log2([n for n, _ in points]), np.log2([x for _, x in points])


def _redraw(ns: Sequence[float], xs: Sequence[float], ses: Sequence[float] | None, ys: _Array) -> _Array:
    """``ys`` drawn again with their errors, one curve a row; its first level moves with the one it was taken from."""
    if ses is None:
        return ys[None, :]
    points = sorted((n, se / x) for n, x, se in zip(ns, xs, ses, strict=True) if x > 0)
    relative = np.array([error for _, error in points])
    noise = np.random.default_rng(0).standard_t(_DEGREES_OF_FREEDOM, (_REDRAWS, relative.size)) * relative / math.log(2)
    return np.asarray(ys + np.concatenate((noise[:, :1], noise), axis=1))


def _grid(us: _Array) -> _Array:
    """Where G is looked at: its own corners, and enough between them to interpolate a bent one."""
    low, high = us[0] + _HALF, us[-1] - _HALF
    even = np.linspace(low, high, max(2, math.ceil((high - low) * _GRID_PER_DOUBLING)))
    corners = np.concatenate((us - _HALF, us + _HALF))
    return np.unique(np.concatenate((even, corners[(corners > low) & (corners < high)])))


def _chord(us: _Array, ys: _Array, u: _Array) -> _Array:
    """Straight lines between the levels. ``ys``: (curves, levels); result: (curves, points)."""
    segment = _segment(us, u)
    slopes = np.diff(ys) / np.diff(us)
    return np.asarray(ys[:, segment] + slopes[:, segment] * (u - us[segment]))


def _segment(us: _Array, u: _Array) -> npt.NDArray[np.intp]:
    """The levels between which each ``u`` lies, by the index of the lower."""
    return np.clip(np.searchsorted(us, u, side="right") - 1, 0, us.size - 2)


def _ceiling(us: _Array, ys: _Array, u: _Array) -> _Array:
    """The highest curve through the levels that bends only downwards; the chord where the levels bend upwards.

    The slope that a neighbour promises is taken over at least half a doubling: longer is still a bound where the curve
    bends downwards, and two levels close together would only promise their noise.
    """
    left = np.maximum(np.minimum(us[1:] - _HALF, us[:-1]), us[0])
    right = np.minimum(np.maximum(us[:-1] + _HALF, us[1:]), us[-1])
    before, after = np.ones_like(ys), np.full_like(ys, -1e9)
    before[:, 1:] = np.minimum((ys[:, 1:] - _chord(us, ys, left)) / (us[1:] - left), 1.0)
    after[:, :-1] = (_chord(us, ys, right) - ys[:, :-1]) / (right - us[:-1])
    segment = _segment(us, u)
    from_left = ys[:, segment] + before[:, segment] * (u - us[segment])
    from_right = ys[:, segment + 1] - after[:, segment + 1] * (us[segment + 1] - u)
    return np.maximum(np.minimum(from_left, from_right), _chord(us, ys, u))


def _last_crossing(grid: _Array, gains: _Array, threshold: float) -> _Array:
    """For each row the largest grid value with gain >= threshold: +∞ if at the right end, the left end if nowhere."""
    pays = gains >= threshold - 1e-9
    last = np.where(pays.any(axis=1), grid.size - 1 - np.argmax(pays[:, ::-1], axis=1), 0)
    following = np.minimum(last + 1, grid.size - 1)
    rows = np.arange(gains.shape[0])
    here, there = gains[rows, last], gains[rows, following]
    fall = np.where(here > there, here - there, 1.0)
    crossing = grid[last] + np.clip((here - threshold) / fall, 0.0, 1.0) * (grid[following] - grid[last])
    return np.where(pays[:, -1], np.inf, crossing)


def _ordered(values: _Array, q: float) -> float:
    """The ``q`` quantile without interpolation: infinite values stay what they are."""
    return float(np.sort(values)[min(values.size - 1, math.floor(q * values.size))])
