"""What a person sees while a search runs: a live display on a terminal, a line for each level elsewhere, or nothing.

All of it goes to standard error; standard output belongs to the answer.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from loadstone.core.verdict import LevelKind, LevelRow, Verdict
from loadstone.measure.watch import LevelProgress, Watcher

_REDRAW_EVERY_S = 0.25
_BAR_WIDTH = 24
_LEAST_BAR = 6
_BLOCKS = "▁▂▃▄▅▆▇█"

_MARKS = {
    Verdict.PASS: ("✓", "green"),
    Verdict.FAIL: ("✗", "red"),
    Verdict.UNRESOLVED: ("?", "yellow"),
    Verdict.INVALID: ("!", "magenta"),
}


@contextmanager
def progress(quiet: bool, stream: TextIO | None = None) -> Iterator[Watcher]:
    """The watcher that suits ``stream`` (standard error); the live display is taken down, whatever ends it."""
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False)
    if quiet:
        yield Silent()
    elif not console.is_terminal or console.is_dumb_terminal:
        yield LineProgress(stream)
    else:
        # No refresh thread: it would take the interpreter from the generator at moments of its own choosing.
        with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as live:
            yield RichProgress(live)


class Silent:
    """Shows nothing."""

    def level_started(self, ordinal: int, kind: LevelKind, concurrency: int, planned: int) -> None:
        pass

    def level_progress(self, so_far: LevelProgress) -> None:
        pass

    def level_decided(self, row: LevelRow) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class LineProgress(Silent):
    """One line for each decided level and each note."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def level_decided(self, row: LevelRow) -> None:
        print(f"{row.verdict.value:<10} {_figures(row)}  {_reason(row)}".rstrip(), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class RichProgress:
    """Decided levels scroll by and stay; below them the running level and the curve so far are redrawn in place."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._rows: list[LevelRow] = []
        self._title = ""
        self._drawn_s = 0.0

    def level_started(self, ordinal: int, kind: LevelKind, concurrency: int, planned: int) -> None:
        self._title = f"{_TITLES[kind]} {concurrency} at once"
        self._draw(0, planned, f"0/{planned}", 0.0)

    def level_progress(self, so_far: LevelProgress) -> None:
        if 0 <= so_far.elapsed_s - self._drawn_s < _REDRAW_EVERY_S:
            return
        figures = [f"{so_far.done}/{so_far.planned}", _time(so_far.elapsed_s)]
        if so_far.throughput_rps is not None:
            figures.append(f"{_number(so_far.throughput_rps)} req/s")
        if so_far.mean_ttft_ms is not None:
            figures.append(f"TTFT {_number(so_far.mean_ttft_ms)} ms")
        figures.append(f"{so_far.in_flight} in flight")
        self._draw(so_far.done, so_far.planned, " · ".join(figures), so_far.elapsed_s)

    def level_decided(self, row: LevelRow) -> None:
        self._rows.append(row)
        mark, colour = _MARKS[row.verdict]
        figures, reason = _figures(row), _reason(row)
        head = Text.assemble((f" {mark} ", f"bold {colour}"), figures)
        console = self._live.console
        if head.cell_len + 2 + len(reason) <= console.width:
            console.print(head.append(f"  {reason}"))
        else:
            console.print(head)
            console.print(Padding(Text(reason, style="dim"), (0, 0, 0, 6)))
        self._live.update(Group(*self._curve()), refresh=True)

    def note(self, text: str) -> None:
        self._live.console.print(Padding(Text(text, style="dim"), (0, 0, 0, 3)))

    def _draw(self, done: int, planned: int, figures: str, elapsed_s: float) -> None:
        self._drawn_s = elapsed_s
        width = max(_LEAST_BAR, min(_BAR_WIDTH, self._live.console.width - 80))
        filled = min(width, round(width * done / max(1, planned)))
        running = Text.assemble(
            ("   ", ""),
            (self._title, "bold"),
            "  ",
            ("━" * filled, "cyan"),
            ("━" * (width - filled), "bright_black"),
            "  ",
            figures,
            no_wrap=True,
            overflow="ellipsis",
        )
        self._live.update(Group(running, *self._curve()), refresh=True)

    def _curve(self) -> list[Text]:
        """Throughput against concurrency as one line of blocks, and where the line must lie by now."""
        points = {row.concurrency: row for row in self._rows if row.throughput_rps is not None}
        if len(points) < 2:
            return []
        ordered = [points[concurrency] for concurrency in sorted(points)]
        peak = max(ordered, key=_throughput)
        line = Text("   ", no_wrap=True, overflow="ellipsis")
        for row in ordered:
            block = _BLOCKS[round((len(_BLOCKS) - 1) * _throughput(row) / (_throughput(peak) or 1.0))]
            line.append(block, style=_MARKS[row.verdict][1])
        span = f"  {ordered[0].concurrency} … {ordered[-1].concurrency} at once"
        best = f"peak {_number(_throughput(peak))} req/s at {peak.concurrency}"
        line.append(" · ".join([span, best, *_bracket(self._rows)]), style="dim")
        return [line]


_TITLES = {LevelKind.LADDER: "climbing:", LevelKind.BISECT: "narrowing:", LevelKind.CONFIRM: "confirming:"}


def _figures(row: LevelRow) -> str:
    throughput = "" if row.throughput_rps is None else f"{_number(row.throughput_rps)} req/s"
    if row.stopped_early:
        throughput = "stopped early"
    latency = ""
    if row.mean_ttft_ms is not None:
        latency = f"TTFT {_number(row.mean_ttft_ms)} ms"
    elif row.mean_e2el_ms is not None:
        latency = f"latency {_number(row.mean_e2el_ms)} ms"
    return f"{row.concurrency:>5} at once  {throughput:>13}  {latency:<16}"


def _reason(row: LevelRow) -> str:
    kind = "" if row.kind is LevelKind.LADDER else f" ({row.kind.value})"
    said = f"{row.rule}: {row.reason}" if row.rule else row.reason
    return (said + kind).strip()


def _bracket(rows: Sequence[LevelRow]) -> list[str]:
    failed = [row.concurrency for row in rows if row.verdict is Verdict.FAIL]
    if not failed:
        return []
    passed = [row.concurrency for row in rows if row.verdict is Verdict.PASS and row.concurrency < min(failed)]
    return [f"the line is between {max(passed)} and {min(failed)}" if passed else f"the line is below {min(failed)}"]


def _throughput(row: LevelRow) -> float:
    return row.throughput_rps or 0.0


def _number(x: float) -> str:
    """Three digits, and never an exponent: 0.123, 12.3, 1,234."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
