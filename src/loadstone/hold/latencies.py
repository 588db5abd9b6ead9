"""Latencies as the gate keeps them: the recent ones for people, histograms since the start for Prometheus."""

import math
from collections.abc import Sequence
from itertools import accumulate

WINDOW_S = 300.0
"""How far back "recent" reaches."""
_MOST_SAMPLES = 2048
_SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

REQUEST_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
WAIT_BOUNDS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Latencies:
    """One kind of latency: its counts by upper bound since the start, and the samples of the last ``WINDOW_S``.

    Of the recent ones no more than the newest 2,048 are kept.
    """

    __slots__ = ("_bounds_s", "_counts", "_ended_s", "_latencies_s", "_next", "sum_s")

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        # Rings of the same length: when each ended, and its latency.
        self._ended_s: list[float] = []
        self._latencies_s: list[float] = []
        self._next = 0
        """Where the next is put, once they are full."""
        self.sum_s = 0.0

    def add(self, ended_s: float, latency_s: float) -> None:
        """One more; ``ended_s`` never goes back."""
        bucket = 0
        for bound_s in self._bounds_s:
            if latency_s <= bound_s:
                break
            bucket += 1
        self._counts[bucket] += 1
        self.sum_s += latency_s
        if len(self._ended_s) < _MOST_SAMPLES:
            self._ended_s.append(ended_s)
            self._latencies_s.append(latency_s)
            return
        place = self._next
        self._ended_s[place] = ended_s
        self._latencies_s[place] = latency_s
        self._next = (place + 1) % _MOST_SAMPLES

    def summary(self, now_s: float) -> dict[str, float | int | None]:
        """{n, mean, p50, p95, p99} of the recent ones; all but ``n`` are None where there is none."""
        samples = zip(self._ended_s, self._latencies_s, strict=True)
        recent = sorted([latency_s for ended_s, latency_s in samples if ended_s > now_s - WINDOW_S])
        figures: dict[str, float | int | None] = {"n": len(recent), "mean": None, "p50": None, "p95": None, "p99": None}
        if recent:
            figures["mean"] = math.fsum(recent) / len(recent)
            figures |= {name: quantile(recent, share) for name, share in _SHARES.items()}
        return figures

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many were at most that), the last bound infinite: Prometheus' way."""
        bounds = (*map(str, self._bounds_s), "+Inf")
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))

    def __repr__(self) -> str:
        return f"<Latencies {sum(self._counts)} in all, {len(self._latencies_s)} kept>"


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linearly interpolated quantile (0 … 1) of a sorted sequence that isn't empty."""
    position = (len(ordered) - 1) * share
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
