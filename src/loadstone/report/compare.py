"""Is run B worse than run A? Two run folders side by side. Pure but for the printing."""

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadstone.core.errors import InvalidLevelError
from loadstone.core.verdict import LevelRow, RunVerdict, Verdict
from loadstone.report.answer import judged, number, percent, server_failed
from loadstone.report.folder import Run, flat

_CONDITIONS = (
    *("workload.", "settings.server.", "settings.data.", "settings.rules."),
    *("server.base_url", "server.model", "server.endpoint", "server.streams", "server.through_gate"),
)
"""What two runs must share to measure the same thing; the rest of ``run.toml`` says how, where and when."""
_LOWER_BOUND = ("ladder", "client")


class LevelPair(msgspec.Struct, frozen=True):
    """One concurrency that both runs measured in full."""

    concurrency: int
    a: LevelRow
    b: LevelRow

    @property
    def ratio(self) -> float | None:
        """Throughput of B over that of A."""
        if not self.a.throughput_rps or self.b.throughput_rps is None:
            return None
        return self.b.throughput_rps / self.a.throughput_rps

    def lower_by_more_than(self, tolerance: float) -> bool:
        """B's throughput lies below (1 − ``tolerance``) of A's, and beyond both 95 % intervals."""
        if self.ratio is None or self.a.throughput_low_rps is None or self.b.throughput_high_rps is None:
            return False
        return self.ratio < 1 - tolerance and self.b.throughput_high_rps < self.a.throughput_low_rps


class Comparison(msgspec.Struct, frozen=True):
    """What a reader and an exit status need."""

    a: Run
    b: Run
    pairs: list[LevelPair]
    worse: list[str]
    """One sentence for each way in which B is worse; empty where it is not."""
    caveats: list[str]
    """What limits the comparison: lines that are lower bounds, conditions that differ."""


def compare(a: Run, b: Run, *, tolerance: float) -> Comparison:
    """Hold ``b`` against ``a``. ``tolerance`` is a share: 0.05 forgives 5 % of the line and of the throughput.

    Raises :class:`InvalidLevelError` where either run could judge no level at all.
    """
    for run in (a, b):
        if all(row.verdict is Verdict.INVALID for row in run.verdict.levels):
            raise InvalidLevelError(f"{run.path} holds no level that could be judged; measure it again")
    rows_a, rows_b = _measured(a.verdict), _measured(b.verdict)
    pairs = [LevelPair(n, rows_a[n], rows_b[n]) for n in sorted(rows_a.keys() & rows_b.keys())]
    worse = [*_line_worse(a.verdict, b.verdict, tolerance), *_throughput_worse(pairs, tolerance)]
    return Comparison(a, b, pairs, worse, _caveats(a, b))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print both answers, the levels in common, and whether B is worse and why."""
    plain = not console.is_terminal
    for name, run in (("A", comparison.a), ("B", comparison.b)):
        console.print(Text(f"{name}: {run.path}"), soft_wrap=plain, highlight=False)
    for table in (_answers(comparison, plain=plain), _levels(comparison, plain=plain)):
        console.print(table)
    for caveat in comparison.caveats:
        console.print(Text(f"Note: {caveat}"), soft_wrap=plain, highlight=False)
    for sentence in comparison.worse:
        console.print(Text(f"Worse: {sentence}", style="red"), soft_wrap=plain, highlight=False)
    if not comparison.worse:
        console.print(Text("B is not worse than A.", style="green"))


def _measured(verdict: RunVerdict) -> dict[int, LevelRow]:
    return {row.concurrency: row for row in judged(verdict.levels) if not row.stopped_early}


def _line_worse(a: RunVerdict, b: RunVerdict, tolerance: float) -> list[str]:
    line_a, line_b = a.measured_max_concurrency, b.measured_max_concurrency
    if line_a is None or (line_b is not None and b.binding in _LOWER_BOUND):
        return []
    if line_b is None:
        return [f"A's line is {line_a:,}; in B no level passed."] if server_failed(b) else []
    if line_b < line_a * (1 - tolerance):
        return [f"the line fell from {line_a:,} to {line_b:,} ({percent(line_b / line_a - 1)})."]
    return []


def _throughput_worse(pairs: list[LevelPair], tolerance: float) -> list[str]:
    return [
        f"at {pair.concurrency:,} throughput fell from {number(pair.a.throughput_rps)} to "
        f"{number(pair.b.throughput_rps)} req/s, beyond both intervals."
        for pair in pairs
        if pair.lower_by_more_than(tolerance)
    ]


def _caveats(a: Run, b: Run) -> list[str]:
    texts = [
        f"{name}'s line is a lower bound: the search ended at {run.verdict.measured_max_concurrency:,} unbroken."
        for name, run in (("A", a), ("B", b))
        if run.verdict.measured_max_concurrency is not None and run.verdict.binding in _LOWER_BOUND
    ]
    texts += [
        f"{name}'s line is not known: no level could be judged."
        for name, run in (("A", a), ("B", b))
        if run.verdict.measured_max_concurrency is None and not server_failed(run.verdict)
    ]
    values_a, values_b = flat(a.facts), flat(b.facts)
    keys = [key for key in {**values_a, **values_b} if key.startswith(_CONDITIONS)]
    differing = [key for key in keys if values_a.get(key) != values_b.get(key)]
    return texts + [
        f"{key} differs: {values_a.get(key, 'absent')} in A, {values_b.get(key, 'absent')} in B." for key in differing
    ]


def _answers(comparison: Comparison, *, plain: bool) -> Table:
    table = _table("", "A", "B", "B ÷ A", plain=plain)
    a, b = comparison.a.verdict, comparison.b.verdict
    for heading, x, y in (
        ("measured line", a.measured_max_concurrency, b.measured_max_concurrency),
        ("recommended", a.recommended_concurrency, b.recommended_concurrency),
        ("peak req/s", a.peak_throughput_rps, b.peak_throughput_rps),
    ):
        table.add_row(heading, number(x), number(y), number(y / x if x and y is not None else None))
    table.add_row("binding", Text(a.binding or "–"), Text(b.binding or "–"), "")
    return table


def _levels(comparison: Comparison, *, plain: bool) -> Table:
    table = _table("N", "A req/s", "B req/s", "B ÷ A", "A mean TTFT ms", "B mean TTFT ms", plain=plain)
    for pair in comparison.pairs:
        table.add_row(
            f"{pair.concurrency:,}",
            number(pair.a.throughput_rps),
            number(pair.b.throughput_rps),
            number(pair.ratio),
            _ttft(pair.a),
            _ttft(pair.b),
        )
    return table


def _table(*headings: str, plain: bool) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def _ttft(row: LevelRow) -> str:
    if row.ttft_low_ms is None or row.ttft_high_ms is None:
        return number(row.mean_ttft_ms)
    return f"{number(row.mean_ttft_ms)} [{number(row.ttft_low_ms)}–{number(row.ttft_high_ms)}]"
