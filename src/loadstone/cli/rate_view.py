"""``rate.json`` as a person reads it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadstone.core.errors import UsageError
from loadstone.core.verdict import Verdict
from loadstone.measure.open_loop import OpenLoop
from loadstone.measure.rate_answer import RateAnswer
from loadstone.report.answer import number, percent
from loadstone.report.tables import levels_table

_STOPPED_BY = {
    "ladder": "no level of the ladder is enough, and the curve still rises: higher --levels may reach it",
    "flat": "more concurrency hardly adds throughput any more, so none would reach it",
    "success": "above that too few requests succeed",
    "client": "above that the generator was the bottleneck: a faster or quieter machine may reach it",
}
_OPEN_LOOP = {
    Verdict.PASS: "It keeps up with the target arriving at random",
    Verdict.FAIL: "It does not keep up with the target arriving at random",
    Verdict.UNRESOLVED: "Whether it keeps up with the target arriving at random is too close to tell",
    Verdict.INVALID: "The run at the target rate could not be judged",
}


def read_rate(path: Path) -> RateAnswer:
    """Raises UsageError where ``path`` holds no answer of ``rate``."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RateAnswer)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not an answer of this version ({error}); run rate again") from None


def print_rate(answer: RateAnswer, console: Console) -> None:
    """The levels, the figures beside c*, and the answer last; plain where the output is no terminal."""
    console.print(levels_table(answer.levels, plain=not console.is_terminal))
    console.print()
    figures = list(_figures(answer))
    if figures:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for value, meaning in figures:
            table.add_row(Text(value, style="bold"), meaning)
        console.print(table)
        console.print()
    headline, *rest = sentences(answer)
    console.print(Text(headline, style="bold"), soft_wrap=not console.is_terminal)
    for sentence in rest:
        console.print(Text(sentence), soft_wrap=not console.is_terminal)


def sentences(answer: RateAnswer) -> Iterator[str]:
    """The answer in words, the most important first."""
    target = f"{answer.target_qps:g} requests per second"
    if answer.concurrency is None:
        best = answer.best
        if best is None:
            yield f"No level could be judged, so nothing is known about {target}."
            return
        yield f"{target} were never reached: at best {number(best.throughput_rps, 'req/s')}, at {best.concurrency:,}."
        yield f"{_STOPPED_BY[answer.stopped_by].capitalize()}."
        yield answer.claim
        return
    yield f"{target} need a concurrency of {answer.concurrency:,}."
    yield answer.claim
    if not answer.sure:
        yield "Not sure: a deciding level's 95 % interval contains the wanted rate."
    if answer.open_loop is not None:
        yield f"{_OPEN_LOOP[answer.open_loop.verdict]}: {answer.open_loop.reason}."


def _figures(answer: RateAnswer) -> Iterator[tuple[str, str]]:
    """(value, what it is in at most 66 characters)."""
    if answer.concurrency is None or answer.throughput_rps is None:
        return
    yield f"{answer.concurrency:,}", "smallest concurrency that reaches 95 % of the target"
    per_slot = number(answer.throughput_rps / answer.concurrency)
    yield number(answer.throughput_rps, "req/s"), f"what it delivers with every slot busy: {per_slot} for each slot"
    if answer.open_loop is not None:
        yield from _open_loop_figures(answer.open_loop)
    if answer.document_concurrency is not None:
        formula = "min(max concurrency, rate × mean response time)"
        yield number(answer.document_concurrency), f"in flight then: {formula}"
    if answer.in_flight is None:
        yield "–", "in flight without a cap: no level delivers the whole target"
        return
    spread = f"95 % of the time {answer.in_flight.low:.0f} to {answer.in_flight.high:.0f}"
    yield number(answer.in_flight.mean), f"in flight without a cap (Little's mean); {spread}"
    yield f"{answer.in_flight.comfortable_cap:,}", "comfortable cap: requests seldom wait for a slot"


def _open_loop_figures(run: OpenLoop) -> Iterator[tuple[str, str]]:
    yield percent(run.sustained), f"of the target sustained, arriving at random ({run.arrivals:,} arrivals)"
    if run.mean_response_ms is not None:
        yield number(run.mean_response_ms, "ms"), "mean response time then"
    yield number(run.mean_wait_ms, "ms"), f"mean wait for a slot before it (p99 {number(run.p99_wait_ms)} ms)"
