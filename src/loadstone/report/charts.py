"""What each chart shows, decided once for the page (uPlot) and the picture (matplotlib). Pure."""

from collections.abc import Callable
from typing import Any

import msgspec

from loadstone.core import scalability
from loadstone.core.verdict import LevelRow, RunVerdict
from loadstone.report.answer import judged
from loadstone.report.axis import Axis, linear_axis, log_axis, log_grid

_LOG_SPREAD = 20.0
"""A latency axis turns logarithmic where its values spread by more than this."""


class Curve(msgspec.Struct, frozen=True):
    """One line over concurrency; ``y`` is None where a level has no such figure. ``low`` and ``high``: its band."""

    label: str
    tone: str
    """Name of a colour in the page's and the picture's palette."""
    x: list[float]
    y: list[float | None]
    low: list[float | None] = []
    high: list[float | None] = []
    verdicts: list[str] = []
    """PASS, FAIL or UNRESOLVED for each point; empty where the points carry no mark."""
    smooth: bool = False
    """A fitted curve: dashed, without points."""


class Mark(msgspec.Struct, frozen=True):
    """A vertical line at a concurrency, with an interval where there is one."""

    label: str
    tone: str
    at: float
    low: float | None = None
    high: float | None = None


class Limit(msgspec.Struct, frozen=True):
    """A horizontal line: what the rule allows."""

    label: str
    value: float


class Chart(msgspec.Struct, frozen=True):
    """One panel over concurrency."""

    key: str
    title: str
    title_zh: str
    unit: str
    x: Axis
    y: Axis
    curves: list[Curve]
    marks: list[Mark]
    limit: Limit | None = None
    note: str = ""


class _Panel(msgspec.Struct, frozen=True):
    """What is particular to one panel; the x axis and the marks of the answer are common to all."""

    key: str
    title: str
    title_zh: str
    unit: str
    curves: list[Curve]
    marks: list[Mark] = []
    limit: Limit | None = None
    note: str = ""
    may_be_log: bool = False

    def values(self) -> list[float]:
        """Everything the y axis has to hold."""
        values = [
            v for curve in self.curves for part in (curve.y, curve.low, curve.high) for v in part if v is not None
        ]
        return values + ([self.limit.value] if self.limit and values else [])


def charts(verdict: RunVerdict, fact: Callable[[str], Any]) -> list[Chart]:
    """The panels for ``verdict``, none where no level ran long enough to draw.

    ``fact`` looks a setting of the run up by name (``max_ttft_ms``, ``ttft_stat``, ``max_e2el_ms``).
    """
    rows = [row for row in judged(verdict.levels) if not row.stopped_early]
    if not rows:
        return []
    panels = [_throughput(rows), _efficiency(rows)]
    streams = any(row.mean_ttft_ms is not None for row in rows)
    panels += [_latency(rows, metric, fact, streams) for metric in (("ttft", "itl") if streams else ("e2el",))]
    marks = _marks(verdict)
    ends = [end for mark in marks for end in (mark.at, mark.low, mark.high) if end is not None]
    x = log_axis([*_x(rows), *ends], whole=True)
    return [_chart(panel, x, marks) for panel in panels if panel.values()]


def _chart(panel: _Panel, x: Axis, marks: list[Mark]) -> Chart:
    values = panel.values()
    log = panel.may_be_log and min(values) > 0 and max(values) > _LOG_SPREAD * min(values)
    return Chart(
        key=panel.key,
        title=panel.title,
        title_zh=panel.title_zh,
        unit=panel.unit,
        x=x,
        y=log_axis(values) if log else linear_axis(max(values)),
        curves=[curve for curve in panel.curves if any(value is not None for value in curve.y)],
        marks=[*marks, *panel.marks],
        limit=panel.limit,
        note=panel.note,
    )


def _fit(rows: list[LevelRow]) -> scalability.ScalabilityFit | None:
    points = [(row.concurrency, row.throughput_rps) for row in rows if row.throughput_rps]
    return scalability.fit([n for n, _ in points], [x for _, x in points])


def _marks(verdict: RunVerdict) -> list[Mark]:
    """Left to right as a reader meets them: recommended, line, gain line."""
    marks = []
    if verdict.recommended_concurrency is not None:
        marks.append(Mark("recommended", "recommended", verdict.recommended_concurrency))
    if verdict.measured_max_concurrency is not None:
        marks.append(Mark("measured line", "line", verdict.measured_max_concurrency))
    if (gain := verdict.gain_line) is not None:
        marks.append(Mark("gain line", "gain", gain.concurrency, gain.low, gain.high))
    return marks


def _throughput(rows: list[LevelRow]) -> _Panel:
    measured = Curve(
        "measured, 95 % band",
        "mean",
        _x(rows),
        [row.throughput_rps for row in rows],
        [row.throughput_low_rps for row in rows],
        [row.throughput_high_rps for row in rows],
        _verdicts(rows),
    )
    panel = _Panel("throughput", "Throughput vs concurrency", "吞吐量 vs 并发度", "req/s", [measured])
    fit = _fit(rows)
    if fit is None:
        return panel
    low, high = rows[0].concurrency, rows[-1].concurrency
    grid = log_grid(low, high)
    law = Curve("universal scalability fit", "fit", grid, [fit.throughput_rps(x) for x in grid], smooth=True)
    note = f"Fit: σ = {fit.sigma:.3g}, κ = {fit.kappa:.2g}. A picture: it decides nothing."
    marks = []
    # Beyond the levels the law invents a peak; N* is only worth showing where the data pin it down.
    if fit.peak_high < 2 * high:
        note += f" It peaks at N* = {fit.peak:.0f} (95 % interval {fit.peak_low:.0f} to {fit.peak_high:.0f})."
        marks = [Mark("N* of the fit", "fit", fit.peak)] if fit.peak <= high else []
    return msgspec.structs.replace(panel, curves=[measured, law], marks=marks, note=note)


def _efficiency(rows: list[LevelRow]) -> _Panel:
    def per_slot(values: list[float | None]) -> list[float | None]:
        return [None if x is None else x / row.concurrency for row, x in zip(rows, values, strict=True)]

    curve = Curve(
        "req/s per slot, 95 % band",
        "mean",
        _x(rows),
        per_slot([row.throughput_rps for row in rows]),
        per_slot([row.throughput_low_rps for row in rows]),
        per_slot([row.throughput_high_rps for row in rows]),
        _verdicts(rows),
    )
    return _Panel("efficiency", "Efficiency vs concurrency", "并发效率 vs 并发度", "req/s per slot", [curve])


_LATENCIES = {
    "ttft": ("Time to first token vs concurrency", "首 token 延迟 (TTFT) vs 并发度"),
    "itl": ("Inter-token latency vs concurrency", "token 间延迟 (ITL) vs 并发度"),
    "e2el": ("End-to-end latency vs concurrency", "端到端延迟 (E2EL) vs 并发度"),
}


def _latency(rows: list[LevelRow], metric: str, fact: Callable[[str], Any], streams: bool) -> _Panel:
    """Mean and percentiles of ``metric``; failures are infinite in a percentile, so its curve ends where they reach."""
    title, title_zh = _LATENCIES[metric]
    mean = Curve(
        "mean",
        "mean",
        _x(rows),
        _figures(rows, f"mean_{metric}_ms"),
        _figures(rows, "ttft_low_ms") if metric == "ttft" else [],
        _figures(rows, "ttft_high_ms") if metric == "ttft" else [],
        _verdicts(rows),
    )
    curves = [mean] + [Curve(p, p, _x(rows), _figures(rows, f"{p}_{metric}_ms")) for p in ("p50", "p95", "p99")]
    return _Panel(metric, title, title_zh, "ms", curves, limit=_limit(metric, fact, streams), may_be_log=True)


def _limit(metric: str, fact: Callable[[str], Any], streams: bool) -> Limit | None:
    """What the rules allow; where nothing streams, the limit on the TTFT holds for the end-to-end time."""
    value = fact(f"max_{metric}_ms") or (fact("max_ttft_ms") if metric == "e2el" and not streams else None)
    if not isinstance(value, int | float) or not value > 0:
        return None
    stat = fact("ttft_stat") if metric == "ttft" or not streams else None
    return Limit(f"limit on the {stat or 'mean'}: {value:,g} ms", float(value))


def _figures(rows: list[LevelRow], name: str) -> list[float | None]:
    return [getattr(row, name) for row in rows]


def _x(rows: list[LevelRow]) -> list[float]:
    return [float(row.concurrency) for row in rows]


def _verdicts(rows: list[LevelRow]) -> list[str]:
    return [row.verdict.value for row in rows]
