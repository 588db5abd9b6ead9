"""What the charts show, and the axes they stand on."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import report_runs as runs
from loadstone.core.verdict import RunVerdict, Verdict
from loadstone.report.axis import linear_axis, log_axis
from loadstone.report.charts import Chart, charts
from loadstone.report.folder import Run
from loadstone.report.plots import picture


def drawn(verdict: RunVerdict) -> dict[str, Chart]:
    return {chart.key: chart for chart in charts(verdict, Run(Path("run"), verdict, runs.FACTS).fact)}


def test_a_streaming_run_has_the_four_panels_with_every_line_drawn_in() -> None:
    panels = drawn(runs.vllm_like())
    assert list(panels) == ["throughput", "efficiency", "ttft", "itl"]
    for panel in panels.values():
        assert [(mark.label, mark.at) for mark in panel.marks[:3]] == [
            ("recommended", 165),
            ("measured line", 220),
            ("gain line", 240),
        ]
        assert (panel.marks[2].low, panel.marks[2].high) == (228, 253)
        assert panel.x.low < 1
        assert panel.x.high > 253
    assert panels["ttft"].limit is not None
    assert panels["ttft"].limit.value == 1000
    assert [curve.label for curve in panels["ttft"].curves] == ["mean", "p50", "p95", "p99"]


def test_levels_without_steady_figures_are_not_drawn() -> None:
    assert 500 not in drawn(runs.vllm_like())["throughput"].curves[0].x
    measured = drawn(runs.troubled())["throughput"].curves[0]
    assert measured.x == [1, 2, 10, 20]
    assert measured.verdicts == ["PASS", "PASS", "PASS", "UNRESOLVED"]


def test_efficiency_is_throughput_for_each_slot_with_its_band() -> None:
    curve = drawn(runs.vllm_like())["efficiency"].curves[0]
    row = next(row for row in runs.vllm_like().levels if row.concurrency == 50)
    at = curve.x.index(50)
    assert row.throughput_rps is not None
    assert curve.y[at] == pytest.approx(row.throughput_rps / 50)
    assert curve.low[at] == pytest.approx(row.throughput_rps * 0.97 / 50)


def test_without_a_stream_the_end_to_end_latency_takes_their_place() -> None:
    panels = drawn(runs.single())
    assert list(panels) == ["throughput", "efficiency", "e2el"]
    assert panels["e2el"].limit is not None
    assert panels["e2el"].limit.value == 1000


def test_nothing_to_draw() -> None:
    assert drawn(runs.nothing_passed()) == {}


def test_the_fitted_peak_is_shown_only_where_the_levels_pin_it_down() -> None:
    # The fixture's law peaks at 407.
    up_to = {
        top: [runs.level(i, n) for i, n in enumerate((1, 2, 5, 10, 20, 50, 100, 200, 300, 500)) if n <= top]
        for top in (200, 300, 500)
    }
    panels = {
        top: drawn(msgspec.structs.replace(runs.vllm_like(), levels=rows))["throughput"] for top, rows in up_to.items()
    }
    assert "N*" not in panels[200].note
    assert "N* = 407" in panels[300].note
    assert all("N*" not in mark.label for mark in panels[300].marks)
    assert [mark.at for mark in panels[500].marks if "N*" in mark.label] == [pytest.approx(407, abs=1)]


def test_a_latency_axis_turns_logarithmic_where_values_spread_widely() -> None:
    panels = drawn(runs.vllm_like())
    assert panels["ttft"].y.log
    assert not panels["itl"].y.log


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
def test_a_log_axis_holds_its_values_and_a_readable_number_of_ticks(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low < min(values)
    assert max(values) < axis.high
    assert axis.ticks == sorted(set(axis.ticks))
    assert 2 <= len(axis.ticks) <= 30
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


@given(st.integers(1, 10_000))
def test_the_concurrency_axis_has_whole_ticks(n: int) -> None:
    ticks = log_axis([n], whole=True).ticks
    assert ticks
    assert all(tick == int(tick) for tick in ticks)


@given(st.floats(1e-4, 1e7))
def test_a_linear_axis_starts_at_zero(largest: float) -> None:
    axis = linear_axis(largest)
    assert axis.ticks[0] == 0
    assert 4 <= len(axis.ticks) <= 9
    assert axis.high > largest


def test_an_axis_of_zeros_is_still_an_axis() -> None:
    assert linear_axis(0).high == 1


@pytest.mark.parametrize("name", runs.RUNS)
def test_the_picture_is_a_png_whatever_the_run_and_its_model_are_called(name: str) -> None:
    png = picture(list(drawn(runs.RUNS[name]()).values()), "$模型$ <b>·</b> line_{1")
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) == 2100


def test_the_panels_hold_no_verdict_that_the_page_cannot_draw() -> None:
    rows = [runs.level(i, i + 1, verdict) for i, verdict in enumerate(Verdict)]
    panel = drawn(msgspec.structs.replace(runs.vllm_like(), levels=rows))["throughput"]
    assert set(panel.curves[0].verdicts) == {"PASS", "FAIL", "UNRESOLVED"}
