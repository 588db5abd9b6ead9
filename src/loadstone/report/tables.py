"""The answer and the levels on a terminal; plain text without colours or rules where the output is not one."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadstone.core.verdict import LevelRow, RunVerdict, Verdict
from loadstone.report.answer import answer, number, percent

_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNRESOLVED: "yellow", Verdict.INVALID: "dim"}


def print_answer(verdict: RunVerdict, console: Console) -> None:
    """Print the table of levels, why levels did not pass, and the answer last, where the eye rests."""
    console.print(levels_table(verdict.levels, plain=not console.is_terminal))
    for row in verdict.levels:
        if row.verdict is not Verdict.PASS:
            rule = f" {row.rule}: " if row.rule else " "
            _line(console, Text.assemble(f"{row.concurrency:>6,} ", _word(row), rule, row.reason))
    console.print()
    _answer(verdict, console)


def levels_table(levels: list[LevelRow], *, plain: bool) -> Table:
    """One line for each level, at most 80 columns wide; ``plain`` leaves the rules out."""
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("N", "verdict", "n", "success", "req/s", "per slot", "TTFT ms", "p99", "ITL ms", "E2EL ms"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    for row in levels:
        per_slot = None if row.throughput_rps is None else row.throughput_rps / row.concurrency
        table.add_row(
            f"{row.concurrency:,}",
            _word(row),
            f"{row.requests:,}",
            percent(row.success_rate),
            number(row.throughput_rps),
            number(per_slot),
            number(row.mean_ttft_ms),
            number(row.p99_ttft_ms),
            number(row.mean_itl_ms),
            number(row.mean_e2el_ms),
        )
    return table


def _answer(verdict: RunVerdict, console: Console) -> None:
    words = answer(verdict)
    _line(console, Text(words.headline, style="bold"))
    _line(console, Text(words.recommendation, style="bold green"))
    half = f"{words.half} {words.why_half}".strip()
    for sentence in (words.binding, words.claim, words.certainty, half, *words.asides, *verdict.notes):
        _line(console, Text(sentence))


def _line(console: Console, text: Text) -> None:
    """Wrapped on a terminal; in a file one sentence stays one line. Nothing where there is nothing to say."""
    if text.plain:
        console.print(text, soft_wrap=not console.is_terminal, highlight=False)


def _word(row: LevelRow) -> Text:
    return Text(row.verdict.value, style=_STYLES[row.verdict])
