"""``concurrency_analysis.png``: the panels of the page as one picture, for chats and documents."""

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from loadstone.report.axis import Axis
from loadstone.report.charts import Chart, Curve, Mark

_TONES = {
    "mean": "#1f5fbf",
    "p50": "#0f7b6c",
    "p95": "#b35900",
    "p99": "#7a3fb0",
    "fit": "#6e7781",
    "line": "#1b1f24",
    "recommended": "#1a7f37",
    "gain": "#9a6700",
    "limit": "#c0262d",
}
_POINTS = {"PASS": ("o", "#1a7f37"), "FAIL": ("X", "#c0262d"), "UNRESOLVED": ("D", "#9a6700")}
_MARK_ROW_PT = 12


def picture(charts: Sequence[Chart], title: str) -> bytes:
    """The PNG, 2 × 2 panels at 150 dpi; with no charts a picture that says so. Text is Latin: no CJK font is sure."""
    figure = Figure(figsize=(14, 10), dpi=150, layout="constrained")
    figure.suptitle(_latin(title), fontsize=13, parse_math=False)
    if not charts:
        figure.text(0.5, 0.5, "No level ran long enough to draw.", ha="center", fontsize=14)
    # The same room above every panel, so that neighbours stand level.
    mark_rows = max((len(chart.marks) for chart in charts), default=0)
    for chart, axes in zip(charts, figure.subplots(2, 2).flat if charts else (), strict=False):
        _panel(axes, chart, mark_rows)
    for axes in figure.axes[len(charts) :]:
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panel(axes: Any, chart: Chart, mark_rows: int) -> None:
    axes.set_xscale("log" if chart.x.log else "linear")
    axes.set_yscale("log" if chart.y.log else "linear")
    _axis(axes.xaxis, chart.x)
    _axis(axes.yaxis, chart.y)
    axes.set_xlim(chart.x.low, chart.x.high)
    axes.set_ylim(chart.y.low, chart.y.high)
    for curve in chart.curves:
        _curve(axes, curve)
    if chart.limit is not None:
        axes.axhline(chart.limit.value, color=_TONES["limit"], linestyle=(0, (6, 3)), label=chart.limit.label)
    for row, mark in enumerate(chart.marks):
        _mark(axes, mark, row, to_the_left=mark.at > math.sqrt(chart.x.low * chart.x.high))
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold", pad=6 + _MARK_ROW_PT * mark_rows)
    axes.set_xlabel("concurrent requests, log scale")
    axes.set_ylabel(f"{chart.unit}, log scale" if chart.y.log else chart.unit)
    axes.grid(True, color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    last = sorted(range(len(labels)), key=lambda i: labels[i] in _POINTS)
    axes.legend([handles[i] for i in last], [labels[i] for i in last], fontsize=8, framealpha=0.9)


def _axis(axis: Any, spec: Axis) -> None:
    axis.set_major_locator(FixedLocator(spec.ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _curve(axes: Any, curve: Curve) -> None:
    color = _TONES[curve.tone]
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
    style = "--" if curve.smooth else "-"
    marker = "" if curve.smooth or curve.verdicts else "."
    axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker=marker, linewidth=1.6, label=curve.label)
    if curve.low:
        _band(axes, curve, color)
    for verdict, (shape, paint) in _POINTS.items():
        chosen = [
            (x, y) for x, y, v in zip(curve.x, curve.y, curve.verdicts, strict=False) if v == verdict and y is not None
        ]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker=shape, color=paint, s=38, zorder=4, label=verdict)


def _band(axes: Any, curve: Curve, color: str) -> None:
    """Whiskers as well as a band: an interval of one lone level has no area."""
    ends = zip(curve.x, curve.low, curve.high, strict=True)
    known = [(x, low, high) for x, low, high in ends if low is not None and high is not None]
    if known:
        x, low, high = zip(*known, strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.vlines(x, low, high, color=color, linewidth=1.2)


def _mark(axes: Any, mark: Mark, row: int, *, to_the_left: bool) -> None:
    color = _TONES[mark.tone]
    if mark.low is not None and mark.high is not None and mark.low < mark.high:
        axes.axvspan(mark.low, mark.high, color=color, alpha=0.12, linewidth=0)
    axes.axvline(mark.at, color=color, linewidth=1.3, linestyle="-" if mark.tone == "line" else (0, (4, 2)))
    # One text row for each mark, above the panel: lines close together cannot write over each other.
    axes.annotate(
        f"{mark.label} {mark.at:,.0f}",
        (mark.at, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if to_the_left else 3, 4 + _MARK_ROW_PT * row),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        fontsize=8.5,
        color=color,
    )


def _latin(text: str) -> str:
    return text.encode("latin-1", "replace").decode("latin-1")
