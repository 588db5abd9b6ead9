"""What Loadstone itself says of a ``bench`` level: the steady-state window, beside vLLM's figures over everything.

The window opens when every slot that was used has finished a request and closes with the last send: before it the
level fills, after it the level drains. In an open loop latencies also count from the planned send, so that a slow
server cannot hide its delay in requests that were sent late.
"""

import math
from collections.abc import Sequence
from typing import Any

from loadstone.core.api.endpoint import Endpoint
from loadstone.core.records import RequestRecord
from loadstone.core.stats import quantile
from loadstone.core.verdict import LevelKind
from loadstone.measure.bench import BenchPlan, Played
from loadstone.measure.steady import STEADY_WAVES, LevelData, LevelMeta, Metric, Summary, summarise
from loadstone.measure.telemetry import ServerFigures
from loadstone.measure.vllm_result import most_in_flight

_QUANTILES = (0.5, 0.95, 0.99)


def bench_level(played: Played, plan: BenchPlan, endpoint: Endpoint) -> LevelData:
    """The level as it goes into a run folder."""
    start_s, end_s = steady_window(played.records)
    meta = LevelMeta(
        ordinal=1,
        kind=LevelKind.LADDER,
        concurrency=plan.max_concurrency or max(1, most_in_flight(played.records)),
        planned_requests=plan.num_prompts,
        window_start_s=start_s,
        window_end_s=end_s,
        endpoint=endpoint.name,
        streams=any(record.first_choice_s is not None for record in played.records),
        output_tokens_from=played.output_tokens_from,
    )
    return LevelData(meta, played.records, ServerFigures())


def steady_window(records: Sequence[RequestRecord]) -> tuple[float, float]:
    """(start, end) in seconds: from the slowest slot's first reply to the last send; empty where they cross."""
    first_end_s: dict[int, float] = {}
    for record in records:
        first_end_s[record.slot] = min(record.end_s, first_end_s.get(record.slot, math.inf))
    last_send_s = max((record.sent_s for record in records), default=0.0)
    start_s = min(max(first_end_s.values(), default=0.0), last_send_s)
    return start_s, last_send_s


def bench_view(level: LevelData, *, open_loop: bool) -> dict[str, Any]:
    """The figures of the window, and whether it is long enough to be believed."""
    summary = summarise([level])
    times_s = [record.e2el_s for record in level.judged if record.ok]
    mean_s = sum(times_s) / len(times_s) if times_s else math.inf
    steady = level.duration_s >= STEADY_WAVES * mean_s
    view: dict[str, Any] = {
        "window_start_s": level.meta.window_start_s,
        "window_end_s": level.meta.window_end_s,
        "steady": steady,
        "requests": summary.requests,
        "success_rate": summary.success_rate,
        "throughput_rps": summary.throughput.rps if summary.throughput else None,
        "output_tps": summary.output_tps,
        "no_content": summary.no_content,
        **_latencies(summary),
    }
    if open_loop:
        view |= _from_planned_send(level.judged)
    return view


def _latencies(summary: Summary) -> dict[str, float | None]:
    return {
        f"{stat}_{name}_ms": value for name, metric in summary.metrics.items() for stat, value in _stats(metric).items()
    }


def _stats(metric: Metric) -> dict[str, float | None]:
    if not metric.values_ms.size:
        return {}
    named = {f"p{100 * q:.0f}": metric.quantile_ms(q) for q in _QUANTILES}
    return {name: value if math.isfinite(value) else None for name, value in {"mean": metric.mean_ms, **named}.items()}


def _from_planned_send(records: Sequence[RequestRecord]) -> dict[str, float]:
    good = [record for record in records if record.ok]
    ttfts_ms = [(record.ttft_s + record.late_s) * 1e3 for record in good if record.ttft_s is not None]
    e2els_ms = [(record.e2el_s + record.late_s) * 1e3 for record in good]
    late_ms = [max(0.0, record.late_s) * 1e3 for record in records]
    named = {"ttft": ttfts_ms, "e2el": e2els_ms}
    means = {f"mean_{name}_from_plan_ms": sum(values) / len(values) for name, values in named.items() if values}
    tails = {f"p99_{name}_from_plan_ms": quantile(values, 0.99) for name, values in named.items() if values}
    return {**means, **tails, "late_p99_ms": quantile(late_ms, 0.99) if late_ms else 0.0}
