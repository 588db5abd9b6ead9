"""Axes with round ticks, the same for the page and the picture. Pure."""

import math
from collections.abc import Sequence

import msgspec

_MIN_TICKS = 3
_COARSE = (1.0, 2.0, 5.0)
_FINE = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


class Axis(msgspec.Struct, frozen=True):
    """From ``low`` to ``high`` with labelled ``ticks``; ``log`` where equal distances are equal ratios."""

    low: float
    high: float
    ticks: list[float]
    log: bool


def log_axis(values: Sequence[float], *, whole: bool = False) -> Axis:
    """A logarithmic axis around positive ``values``; with ``whole`` its ticks are integers."""
    low, high = min(values) / 1.15, max(values) * 1.15
    for mantissas in (_COARSE, _FINE):
        ticks = _within(low, high, mantissas)
        if len(ticks) >= _MIN_TICKS:
            break
    else:
        ticks = _linear_ticks(low, high)
    return Axis(low, high, [tick for tick in ticks if not whole or tick == round(tick)], log=True)


def linear_axis(largest: float) -> Axis:
    """A linear axis from zero with room above ``largest``."""
    high = largest * 1.08 or 1.0
    return Axis(0.0, high, _linear_ticks(0.0, high), log=False)


def log_grid(low: float, high: float, points: int = 80) -> list[float]:
    """``points`` values from ``low`` to ``high``, both included, at equal ratios."""
    step = math.log(high / low) / (points - 1)
    return [low * math.exp(step * i) for i in range(points - 1)] + [float(high)]


def _within(low: float, high: float, mantissas: tuple[float, ...]) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (float(f"{mantissa}e{decade}") for decade in decades for mantissa in mantissas)
    return [tick for tick in ticks if low <= tick <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 7
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(decade * mantissa for mantissa in (1, 2, 2.5, 5, 10) if decade * mantissa >= rough * 0.999)
    first = math.ceil(low / step)
    # Rounded to the step's own digits: 3 × 0.1 is to read 0.3.
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, math.floor(high / step) + 1)]
