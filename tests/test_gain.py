"""The gain line against curves whose line is known, and its interval under noise."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.core.gain import gain, gain_line, log_log_interpolate

LADDER = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
DENSE = [2 ** (i / 20) for i in range(220)]


def knee(capacity: float) -> Callable[[float], float]:
    return lambda n: min(n, capacity)


def soft(half: float) -> Callable[[float], float]:
    return lambda n: n / (half + n)


def test_the_embedding_table() -> None:
    estimate = gain_line([10, 50, 100, 200, 500], [45, 180, 320, 450, 520], None, 0.2)
    assert estimate is not None
    assert round(estimate.line) == 227
    assert estimate.reached
    assert 100 < estimate.low < 227 < estimate.high < 500


@pytest.mark.parametrize("capacity", [3, 30, 77])
def test_sharp_knee(capacity: int) -> None:
    line = math.sqrt(2) / 1.2 * capacity
    levels = sorted({*LADDER, capacity, line * math.sqrt(2), line / math.sqrt(2)})
    estimate = gain_line(levels, [min(n, capacity) for n in levels], None, 0.2)
    assert estimate is not None
    assert estimate.line == pytest.approx(1.1785 * capacity, rel=1e-3)
    assert estimate.low <= estimate.line * 1.0001
    assert estimate.high >= estimate.line


def test_soft_knee_on_a_dense_grid() -> None:
    a, b = 10.0, 0.3
    estimate = gain_line(DENSE, [n / (a + b * n) for n in DENSE], None, 0.2)
    assert estimate is not None
    assert estimate.line == pytest.approx(2.83 * a / b, rel=0.005)
    assert estimate.high / estimate.low < 1.01


@pytest.mark.parametrize(
    ("curve", "line"),
    [(knee(13), 15.32), (knee(77), 90.74), (knee(150), 176.8), (soft(5), 14.14), (soft(30), 84.85), (soft(150), 424.3)],
)
def test_a_coarse_ladder_keeps_the_truth_in_its_interval(curve: Callable[[float], float], line: float) -> None:
    estimate = gain_line(LADDER, [curve(n) for n in LADDER], None, 0.2)
    assert estimate is not None
    assert estimate.low <= line * 1.001
    assert line * 0.999 <= estimate.high


@pytest.mark.parametrize("curve", [knee(77), soft(77)])
def test_measuring_at_either_side_narrows_it(curve: Callable[[float], float]) -> None:
    points = {float(n): curve(n) for n in LADDER}
    first = gain_line(list(points), list(points.values()), None, 0.2)
    for _ in range(3):
        estimate = gain_line(list(points), list(points.values()), None, 0.2)
        assert estimate is not None
        for n in (round(estimate.line / math.sqrt(2)), round(estimate.line * math.sqrt(2))):
            points[float(n)] = curve(n)
    assert first is not None
    assert estimate.high / estimate.low < 0.5 * (first.high / first.low - 1) + 1


def test_noise_is_in_the_interval() -> None:
    rng = np.random.default_rng(11)
    truth = 2.828 * 77
    levels = [*LADDER, 154, 308]
    held = 0
    for _ in range(100):
        xs = [soft(77)(n) * (1 + 0.01 * rng.standard_normal()) for n in levels]
        estimate = gain_line(levels, xs, [0.01 * x for x in xs], 0.2)
        assert estimate is not None
        held += estimate.low <= truth <= estimate.high
    assert held >= 95


def test_still_gaining_at_the_right_end() -> None:
    estimate = gain_line([1, 2, 5, 10, 20], [1, 2, 5, 10, 20], [0.01] * 5, 0.2)
    assert estimate is not None
    assert not estimate.reached
    assert estimate.line == pytest.approx(20 / math.sqrt(2))
    assert estimate.high == math.inf


def test_gaining_nowhere() -> None:
    from_one = gain_line(LADDER, [1.0] * 10, None, 0.2)
    from_ten = gain_line(LADDER[3:], [1.0] * 7, None, 0.2)
    assert from_one is not None
    assert from_one.line == pytest.approx(1.1785, rel=1e-3)
    assert from_ten is not None
    assert from_ten.line < 10 * math.sqrt(2)
    assert (from_ten.low, from_ten.high) == (1.0, pytest.approx(10 * math.sqrt(2)))


def test_a_dip_at_two_does_not_hide_what_follows() -> None:
    levels = [1, 2, 4, 8, 16, 32, 64, 128]
    dip = [1.0, 0.9, 3.5, 7.0, 14.0, 14.2, 14.2, 14.2]
    estimate = gain_line(levels, dip, None, 0.2)
    assert estimate is not None
    assert 15 < estimate.line < 25


@pytest.mark.parametrize(
    ("levels", "xs"), [([], []), ([5], [1.0]), ([10, 15], [1.0, 2.0]), ([1, 2, 4], [1.0, 0.0, 0.0])]
)
def test_too_little_for_a_line(levels: list[float], xs: list[float]) -> None:
    assert gain_line(levels, xs, None, 0.2) is None


@settings(max_examples=40, deadline=None)
@given(st.floats(1.1, 3000), st.floats(0.05, 0.9), st.lists(st.floats(0.001, 0.1), min_size=10, max_size=10))
def test_the_line_lies_in_its_interval(half: float, min_gain: float, errors: list[float]) -> None:
    xs = [soft(half)(n) for n in LADDER]
    estimate = gain_line(LADDER, xs, [x * e for x, e in zip(xs, errors, strict=True)], min_gain)
    assert estimate is not None
    assert 0 < estimate.low <= estimate.line <= estimate.high


def test_the_order_of_levels_does_not_matter() -> None:
    xs = [soft(40)(n) for n in LADDER]
    ses = [0.01 * x for x in xs]
    assert gain_line(LADDER[::-1], xs[::-1], ses[::-1], 0.2) == gain_line(LADDER, xs, ses, 0.2)


def test_gain_inside_and_outside_the_range() -> None:
    assert gain([1, 2, 4], [1, 2, 4], 2.0) == pytest.approx(1.0)
    assert gain([1, 2, 4], [1, 2, 2], 2 * math.sqrt(2)) == pytest.approx(0.0)
    assert gain([1, 2, 4], [1, 2, 4], 1.2) is None
    assert gain([1, 2, 4], [1, 2, 4], 3.5) is None


def test_log_log_interpolation() -> None:
    assert log_log_interpolate([1, 4], [1, 16], 2) == pytest.approx(4.0)
    assert log_log_interpolate([1, 4], [1, 16], 1) == pytest.approx(1.0)
    assert log_log_interpolate([1, 4], [1, 16], 5) is None
    assert log_log_interpolate([], [], 5) is None
