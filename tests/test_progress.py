"""What is shown while a search runs: on a terminal, in a log, and when quiet."""

import io

import pytest
from rich.console import Console
from rich.live import Live

from loadstone.cli.progress import LineProgress, RichProgress, Silent, progress
from loadstone.core.verdict import LevelKind, LevelRow, Verdict
from loadstone.measure.watch import LevelProgress, Watcher


def row(
    concurrency: int, verdict: Verdict = Verdict.PASS, throughput_rps: float | None = 1.0, **more: object
) -> LevelRow:
    fields: dict[str, object] = {
        "ordinal": 1,
        "kind": LevelKind.LADDER,
        "rule": "",
        "reason": "success 100 %",
        "requests": 10,
        "success_rate": 1.0,
        "error_rate": 0.0,
    } | more
    return LevelRow(concurrency=concurrency, verdict=verdict, throughput_rps=throughput_rps, **fields)  # type: ignore[arg-type]


FAILED = row(
    100,
    Verdict.FAIL,
    None,
    stopped_early=True,
    kind=LevelKind.BISECT,
    rule="ttft",
    reason="mean TTFT 1804 ± 40 ms is over the limit of 1000 ms",
    mean_ttft_ms=1804.0,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(watcher: Watcher) -> None:
    watcher.note("The server rejects ignore_eos.")
    watcher.level_started(1, LevelKind.LADDER, 20, 200)
    watcher.level_progress(LevelProgress(50, 200, 4.2, 81.0, 12.0, 20))
    watcher.level_decided(row(20, throughput_rps=4.2, mean_ttft_ms=81.0))
    watcher.level_started(2, LevelKind.BISECT, 100, 1000)
    watcher.level_progress(LevelProgress(10, 1000, None, None, 0.3, 100))
    watcher.level_decided(FAILED)


def test_lines() -> None:
    stream = io.StringIO()
    tell(LineProgress(stream))
    assert stream.getvalue().splitlines() == [
        "The server rejects ignore_eos.",
        "PASS          20 at once     4.20 req/s  TTFT 81.0 ms      success 100 %",
        "FAIL         100 at once  stopped early  TTFT 1,804 ms     "
        "ttft: mean TTFT 1804 ± 40 ms is over the limit of 1000 ms (bisect)",
    ]


def test_an_embedding_level_tells_its_latency() -> None:
    stream = io.StringIO()
    LineProgress(stream).level_decided(row(5, throughput_rps=1234.5, mean_e2el_ms=4.5, reason=""))
    assert stream.getvalue() == "PASS           5 at once    1,234 req/s  latency 4.50 ms\n"


def test_only_a_level_that_was_stopped_is_called_so() -> None:
    stream = io.StringIO()
    LineProgress(stream).level_decided(row(5, throughput_rps=None, mean_ttft_ms=81.0, reason=""))
    LineProgress(stream).level_decided(row(5, throughput_rps=None, stopped_early=True, reason=""))
    first, second = stream.getvalue().splitlines()
    assert first.split() == ["PASS", "5", "at", "once", "TTFT", "81.0", "ms"]
    assert second.split() == ["PASS", "5", "at", "once", "stopped", "early"]


def screen(width: int, told: list[LevelRow]) -> str:
    # Whatever terminal the tests run in; a dumb one has its own width.
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=50)
    with console.capture() as capture, Live(console=console, auto_refresh=False) as live:
        watcher = RichProgress(live)
        for decided in told:
            watcher.level_decided(decided)
        watcher.level_started(9, LevelKind.CONFIRM, 50, 500)
        watcher.level_progress(LevelProgress(250, 500, 7.25, 90.0, 75.0, 49))
    return capture.get()


def test_a_wide_terminal() -> None:
    shown = screen(140, [row(10, throughput_rps=2.0), row(20, throughput_rps=4.0), row(40, throughput_rps=8.0), FAILED])
    assert " ✓    10 at once     2.00 req/s                    success 100 %" in shown
    assert " ✗   100 at once  stopped early  TTFT 1,804 ms     ttft: mean TTFT 1804" in shown
    assert (
        "confirming: 50 at once  ━━━━━━━━━━━━━━━━━━━━━━━━  250/500 · 1:15 · 7.25 req/s · TTFT 90.0 ms · 49 in flight"
        in shown
    )
    assert "▃▅█  10 … 40 at once · peak 8.00 req/s at 40 · the line is between 40 and 100" in shown


def test_a_narrow_terminal_keeps_the_reason() -> None:
    lines = screen(70, [FAILED]).splitlines()
    assert any("      ttft: mean TTFT 1804 ± 40 ms is over the limit of 1000 ms" in line for line in lines)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(1, Verdict.UNRESOLVED), row(2, Verdict.FAIL)], "the line is below 2"),
        ([row(1, Verdict.FAIL), row(2)], "the line is below 1"),
        ([row(1), row(4), row(2, Verdict.FAIL)], "the line is between 1 and 2"),
    ],
)
def test_where_the_line_must_lie(rows: list[LevelRow], said: str) -> None:
    assert said in screen(140, rows)


def test_without_a_failure_the_line_may_lie_anywhere() -> None:
    assert "the line is" not in screen(140, [row(1), row(2, Verdict.INVALID)])


def test_no_throughput_at_all_is_no_error() -> None:
    assert "peak 0.00 req/s" in screen(140, [row(1, throughput_rps=0.0), row(2, throughput_rps=0.0)])


def test_the_display_suits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    with progress(True, Terminal()) as watcher:
        assert type(watcher) is Silent
        tell(watcher)
    with progress(False, io.StringIO()) as watcher:
        assert type(watcher) is LineProgress
    terminal = Terminal()
    with progress(False, terminal) as watcher:
        assert type(watcher) is RichProgress
        tell(watcher)
    assert "20 at once" in terminal.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    with progress(False, Terminal()) as watcher:
        assert type(watcher) is LineProgress


def test_quiet_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(True) as watcher:
        tell(watcher)
    assert capsys.readouterr() == ("", "")
