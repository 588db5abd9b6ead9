"""Does a server take a Poisson stream of requests as it comes, with a cap on those in flight?

U = 1 − ΔQ/A over the steady window: A requests fell due in it, and the client's own backlog of requests that were due
but found no slot grew by ΔQ. (Completed ÷ duration fails good servers for the drain alone.)
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from loadstone.core.records import RequestRecord
from loadstone.core.stats import quantile
from loadstone.core.verdict import Verdict
from loadstone.measure.rules import Rules, Stance, judge
from loadstone.measure.steady import Z_ONE_SIDED, LevelData, summarise

WARMUP_TIMES = 2
"""Mean request times until the window opens: by then as many are in flight as the rate keeps there."""
LEAST_TIMES = 5
"""A shorter window, in mean request times, decides nothing."""
_SLICES = 8


class OpenLoop(msgspec.Struct, frozen=True):
    """What the open-loop run at c* has shown."""

    verdict: Verdict
    reason: str
    requests: int
    """Sent in the window and judged."""
    success_rate: float
    window_s: float
    arrivals: int
    """A: requests that fell due in the window."""
    backlog_growth: int
    """ΔQ."""
    sustained: float
    """U."""
    sustained_se: float
    throughput_rps: float | None
    mean_response_ms: float | None
    """From the actual send, over successes."""
    mean_ttft_ms: float | None
    mean_wait_ms: float
    """From the planned to the actual send: what waiting for a slot costs."""
    p99_wait_ms: float
    client_late_p99_ms: float
    """Actual minus planned send where a slot was free: the generator's own."""


def window_of(records: Sequence[RequestRecord]) -> tuple[float, float]:
    """From two mean request times on to the last planned send, in seconds since t0."""
    times = [record.e2el_s for record in records if record.ok]
    last_due_s = max((record.planned_s for record in records), default=0.0)
    first_due_s = min((record.planned_s for record in records), default=0.0)
    warm_s = first_due_s + WARMUP_TIMES * (sum(times) / len(times) if times else 0.0)
    return min(warm_s, last_due_s), last_due_s


def sustained(records: Sequence[RequestRecord], start_s: float, end_s: float) -> tuple[int, int, float, float]:
    """(A, ΔQ, U, its standard error) of the window.

    The error comes from eight slices. How many requests fall due is fixed beforehand, so slices of the backlog's growth
    and slices of the sends both bound it from above; the first is near where slots are mostly free, the second where
    they never are. The smaller is taken.
    """
    due = np.sort([record.planned_s for record in records])
    sent = np.sort([record.sent_s for record in records])
    edges = np.linspace(start_s, end_s, _SLICES + 1)
    arrivals, sends = np.diff(np.searchsorted(due, edges)), np.diff(np.searchsorted(sent, edges))
    count, growth = int(arrivals.sum()), int((arrivals - sends).sum())
    if not count:
        return 0, 0, math.nan, math.inf
    error = min(_total_error(arrivals - sends), _total_error(sends)) / count
    return count, growth, 1 - growth / count, error


def _total_error(slices: npt.NDArray[np.int64]) -> float:
    return float(slices.std(ddof=1)) * math.sqrt(slices.size)


def judge_open_loop(level: LevelData, rules: Rules, wanted_share: float) -> OpenLoop:
    """Hold the run to U ≥ ``wanted_share``; ``level`` has its window as :func:`window_of` gives it.

    PASS where U is above it by more than its error (one-sided 5 %), FAIL where it is below by more, or where too few
    requests succeed; UNRESOLVED between the two and where the run was too short.
    """
    summary = summarise([level])
    judgement = judge(summary, rules, Stance.CONFIRM)
    arrivals, growth, share, error = sustained(level.records, level.meta.window_start_s, level.meta.window_end_s)
    verdict, reason = judgement.verdict, judgement.reason
    if verdict is not Verdict.INVALID and not (verdict is Verdict.FAIL and judgement.rule == "success"):
        verdict, reason = _hold(share, error, wanted_share, level)
    waits_ms = [max(0.0, record.late_s) * 1e3 for record in level.judged]
    own_ms = [ms for record, ms in zip(level.judged, waits_ms, strict=True) if record.turnaround_s is None]
    return OpenLoop(
        verdict=verdict,
        reason=reason,
        requests=summary.requests,
        success_rate=summary.success_rate,
        window_s=level.duration_s,
        arrivals=arrivals,
        backlog_growth=growth,
        sustained=share if math.isfinite(share) else 0.0,
        sustained_se=error if math.isfinite(error) else 1.0,
        throughput_rps=summary.throughput.rps if summary.throughput else None,
        mean_response_ms=summary.e2el.mean_ms if summary.successes else None,
        mean_ttft_ms=summary.ttft.mean_ms if summary.ttft.values_ms.size else None,
        mean_wait_ms=sum(waits_ms) / len(waits_ms) if waits_ms else 0.0,
        p99_wait_ms=quantile(waits_ms, 0.99) if waits_ms else 0.0,
        client_late_p99_ms=quantile(own_ms, 0.99) if own_ms else 0.0,
    )


def _hold(share: float, error: float, wanted: float, level: LevelData) -> tuple[Verdict, str]:
    times = [record.e2el_s for record in level.judged if record.ok]
    mean_s = sum(times) / len(times) if times else math.inf
    if not level.duration_s >= LEAST_TIMES * mean_s:
        short = f"the window of {level.duration_s:.1f} s is shorter than {LEAST_TIMES} request times"
        return Verdict.UNRESOLVED, f"{short}: more --num-prompts would tell"
    text = f"sustained {100 * share:.1f} ± {100 * Z_ONE_SIDED * error:.1f} % of the target"
    if share - Z_ONE_SIDED * error >= wanted:
        return Verdict.PASS, f"{text} ≥ {100 * wanted:g} %"
    if share + Z_ONE_SIDED * error < wanted:
        return Verdict.FAIL, f"{text} < {100 * wanted:g} %"
    return Verdict.UNRESOLVED, f"{text}, wanted {100 * wanted:g} %"
