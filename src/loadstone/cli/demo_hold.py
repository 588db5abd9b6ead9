"""The second half of the demo: more than the server takes, first straight at it, then through a gate before it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from loadstone.cli.progress import Silent
from loadstone.core import limits as limits_file
from loadstone.core.api.reading import to_record
from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.settings import LimitSettings
from loadstone.core.stats import quantile
from loadstone.core.target import Break, Exchange
from loadstone.hold.configuration import Enforced, enforce
from loadstone.hold.gate import Gate
from loadstone.hold.options import GateOptions
from loadstone.measure.arrivals import Arrivals, offsets_ns
from loadstone.measure.find import FindSettings, Ready, make_ready
from loadstone.measure.generator import play
from loadstone.measure.server import Server, connect_server
from loadstone.wire.clock import MonotonicClock
from loadstone.wire.process import paused_gc, raise_open_files

OVERLOAD = 4
SECONDS = 4.0
_SETTLE_S = 1.0
"""The engine finishes what was cut before it is asked anew."""


@dataclass(frozen=True)
class Overloaded:
    """What became of the requests of one overload."""

    offered: int
    in_time: int
    """Complete, with the first token within the limit."""
    late: int
    """Complete, with the first token beyond the limit."""
    refused: int
    unfinished: int
    """Still waiting or under way when the time was up."""
    ttft_p99_ms: float
    refused_p50_ms: float


def overloaded(records: Sequence[RequestRecord], offered: int, max_ttft_ms: float) -> Overloaded:
    """Counts, the p99 of those answered and the median of those refused; NaN where there is none."""
    answered = [(r.ttft_s or r.e2el_s) * 1e3 for r in records if r.ok]
    refused = [r.e2el_s * 1e3 for r in records if r.outcome is Outcome.REFUSED]
    in_time = sum(1 for ms in answered if ms <= max_ttft_ms)
    return Overloaded(
        offered=offered,
        in_time=in_time,
        late=len(answered) - in_time,
        refused=len(refused),
        unfinished=offered - len(answered) - len(refused),
        ttft_p99_ms=quantile(answered, 0.99),
        refused_p50_ms=quantile(refused, 0.5),
    )


def hold(settings: FindSettings, limits_path: Path, rate_rps: float) -> tuple[Overloaded, Overloaded]:
    """Offer ``OVERLOAD`` × ``rate_rps`` to the server of ``settings``: straight, then through a gate with the limits.

    Raises what the probe of a server raises.
    """
    raise_open_files()
    file = limits_file.loads(limits_path.read_text("utf-8"), limits_path.name)
    enforced = enforce(file, limits_path.name, LimitSettings(), [settings.server.base_url], datetime.now(UTC))
    with paused_gc():
        return uvloop.run(_hold(settings, enforced, OVERLOAD * rate_rps))


async def _hold(settings: FindSettings, enforced: Enforced, rate_rps: float) -> tuple[Overloaded, Overloaded]:
    clock = MonotonicClock(asyncio.get_running_loop())
    gate = Gate(enforced, GateOptions(), clock, _mute)
    try:
        straight = await _offer(settings, rate_rps, clock, 0)
        await asyncio.sleep(_SETTLE_S)
        port = await gate.start("127.0.0.1", 0)
        gated = replace(settings, server=replace(settings.server, base_url=f"http://127.0.0.1:{port}"))
        through = await _offer(gated, rate_rps, clock, 1)
    finally:
        await gate.stop()
        clock.close()
    return straight, through


async def _offer(settings: FindSettings, rate_rps: float, clock: MonotonicClock, level: int) -> Overloaded:
    server = await connect_server(settings.server, clock)
    try:
        ready = await make_ready(server, settings, Silent(), admin=False)
        return await _play(server, ready, settings, rate_rps, clock, level)
    finally:
        server.close()


async def _play(
    server: Server, ready: Ready, settings: FindSettings, rate_rps: float, clock: MonotonicClock, level: int
) -> Overloaded:
    count = round(rate_rps * SECONDS)
    workload = ready.prepared.workload
    requests = [workload.request(1000 + level, index) for index in range(count)]
    done: list[Exchange] = []
    t0_ns = clock.now_ns()
    try:
        async with asyncio.timeout(SECONDS):
            await play(server.target, clock, requests, offsets_ns(Arrivals(rate_rps), count, level), None, done.append)
    except TimeoutError:
        # What has not been answered by now is counted as unfinished.
        pass
    ended = [to_record(exchange, ready.endpoint, t0_ns) for exchange in done if exchange.broken is not Break.CUT]
    return overloaded(ended, count, settings.rules.max_ttft_ms)


def _mute(line: str) -> None:
    """The demo tells what matters itself."""


def show(straight: Overloaded, through: Overloaded, max_ttft_ms: float, limit: int, queue: int) -> None:
    """Both as a table."""
    console = Console(highlight=False)
    console.print(
        f"\nNow {OVERLOAD} × that load for {SECONDS:.0f} s, straight at the engine, then through a gate that holds it "
        f"to {limit} in flight\nand {queue} in the queue:",
        soft_wrap=not console.is_terminal,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("in time", "too late", "unfinished", "refused", "TTFT p99", "refusal p50"):
        table.add_column(heading, justify="right")
    for name, seen in (("straight", straight), ("through the gate", through)):
        counts = (seen.in_time, seen.late, seen.unfinished, seen.refused)
        latencies = (seen.ttft_p99_ms, seen.refused_p50_ms)
        table.add_row(name, *map(str, counts), *(f"{ms:,.3g} ms" if ms == ms else "" for ms in latencies))
    console.print(table)
    console.print(
        f"In time: the first token within {max_ttft_ms:g} ms. A refused client is told when to come back.",
        soft_wrap=not console.is_terminal,
    )
