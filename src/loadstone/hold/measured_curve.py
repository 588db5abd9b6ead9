"""What a healthy engine does at each concurrency, read from the evidence of ``limits.toml``. Pure."""

import math
from collections.abc import Sequence
from itertools import pairwise

from loadstone.core.limits import EvidenceLevel

_Points = tuple[tuple[int, float], ...]


class MeasuredCurve:
    """Between two measured concurrencies the figures are interpolated log–log; beyond the ends the end counts."""

    __slots__ = ("_early", "_gaps")

    def __init__(self, levels: Sequence[EvidenceLevel]) -> None:
        ordered = sorted(levels, key=lambda level: level.concurrency)
        self._gaps = _gaps(ordered)
        self._early = tuple(
            (level.concurrency, level.throughput_rps * level.ttft_p50_ms / 1e3)
            for level in ordered
            if level.ttft_p50_ms is not None and 0 < level.throughput_rps * level.ttft_p50_ms < math.inf
        )

    def __bool__(self) -> bool:
        """Whether anything was measured that is of use here."""
        return bool(self._gaps or self._early)

    def gap_s(self, concurrency: float) -> float | None:
        """Mean time between two chunks of a stream; None where nothing streamed."""
        return _interpolate(self._gaps, concurrency)

    def before_first_token(self, concurrency: float) -> float | None:
        """How many requests had no token yet, by Little's law throughput · TTFT; None where nothing streamed."""
        return _interpolate(self._early, concurrency)

    def __repr__(self) -> str:
        return f"<MeasuredCurve {len(self._gaps)} levels>"


def _gaps(ordered: Sequence[EvidenceLevel]) -> _Points:
    """The mean gap at each level.

    The evidence holds medians, and a median knows nothing of the gaps in which prompts are read until every second gap
    is one. The mean follows from the time that replies take after the first token, all levels sending the same ones: it
    grows as that time does, and at the lowest level, where few prompts interfere, it is the median. Replies that end by
    themselves make that time uncertain, so the median counts where it is longer: nothing is to look slow by mistake.
    """
    medians_ms: list[tuple[EvidenceLevel, float]] = [
        (level, level.itl_p50_ms)
        for level in ordered
        if level.itl_p50_ms is not None and 0 < level.itl_p50_ms < math.inf
    ]
    if not medians_ms:
        return ()
    lowest, lowest_ms = medians_ms[0]
    growths = [_growth(lowest, level) for level, _ in medians_ms]
    return tuple(
        (level.concurrency, max(median_ms, lowest_ms * growth) / 1e3)
        for (level, median_ms), growth in zip(medians_ms, growths, strict=True)
    )


def _growth(lowest: EvidenceLevel, level: EvidenceLevel) -> float:
    """How many times longer a reply takes after its first token than at the ``lowest`` level; 0 where unknown."""
    times_ms = [
        it.e2el_mean_ms - it.ttft_p50_ms
        for it in (lowest, level)
        if it.e2el_mean_ms is not None and it.ttft_p50_ms is not None
    ]
    if len(times_ms) < 2 or not all(0 < time_ms < math.inf for time_ms in times_ms):
        return 0.0
    return times_ms[1] / times_ms[0]


def _interpolate(points: _Points, at: float) -> float | None:
    """The value at ``at``, on straight lines between the logarithms of ascending ``points``."""
    if not points:
        return None
    if at <= points[0][0]:
        return points[0][1]
    for (low, low_value), (high, high_value) in pairwise(points):
        if low < at <= high:
            share = math.log(at / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(low_value) + share * math.log(high_value))
    return points[-1][1]
