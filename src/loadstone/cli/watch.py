"""``loadstone watch``: a gate's own figures, live on a terminal."""

from typing import TYPE_CHECKING, Annotated, Any

import cyclopts

if TYPE_CHECKING:
    import asyncio

    from rich.console import Console

    from loadstone.wire.client import HttpTarget

_PATIENCE_S = 5.0


def watch(
    url: Annotated[str, cyclopts.Parameter(help="Where the gate is.")] = "http://127.0.0.1:9000",
    /,
    *,
    admin_key: Annotated[str, cyclopts.Parameter(help="The gate's admin key, where it wants one.")] = "",
    interval_s: Annotated[float, cyclopts.Parameter(help="Seconds from one look to the next.")] = 1.0,
    once: Annotated[bool, cyclopts.Parameter(help="One table, then end.", negative=())] = False,
) -> int:
    """Show what a gate does: in flight, queue, refusals, latencies, upstreams and clients, until interrupted.

    Where standard output is not a terminal, each look is one line.
    """
    import asyncio

    from rich.console import Console

    from loadstone.core.errors import EXIT_OK, LoadstoneError
    from loadstone.core.settings import check_range

    check_range("--interval-s", interval_s, 0.1, 3600.0)
    try:
        asyncio.run(_watch(url, admin_key, interval_s, Console(highlight=False), once=once))
    except LoadstoneError as error:
        # What takes URLs apart knows only the flag of the measuring verbs.
        raise type(error)(str(error).replace("--base-url", "URL")) from None
    return EXIT_OK


async def _watch(url: str, admin_key: str, interval_s: float, console: "Console", *, once: bool) -> None:
    import asyncio
    import signal

    from loadstone.hold.watch_view import screen
    from loadstone.wire.client import connect_target
    from loadstone.wire.clock import MonotonicClock

    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    clock = MonotonicClock(loop)
    headers = {"X-Loadstone-Admin": admin_key} if admin_key else {}
    try:
        gate = await connect_target(url, clock, timeout_s=_PATIENCE_S, headers=headers)
        try:
            first = await read_stats(gate)
            if once:
                console.print(screen(first, url))
            elif console.is_terminal and not console.is_dumb_terminal:
                await show_live(console, url, gate, first, interval_s, stopped)
            else:
                await print_lines(console, gate, first, interval_s, stopped)
        finally:
            gate.close()
    finally:
        clock.close()


async def read_stats(gate: "HttpTarget") -> dict[str, Any]:
    """The document of ``/stats``.

    Raises UnreachableError where no answer comes, RefusedError where it is no such document or the gate wants its key.
    """
    import msgspec

    from loadstone.core.errors import RefusedError

    status, _, body = await gate.fetch("GET", "/stats")
    if status in (401, 403):
        raise RefusedError("the gate wants its admin key: give the right one with --admin-key")
    try:
        stats = msgspec.json.decode(body) if status == 200 else None
    except msgspec.DecodeError:
        stats = None
    if not isinstance(stats, dict) or "in_flight" not in stats:
        raise RefusedError(f"GET /stats gives no figures (status {status}); is this a Loadstone gate?")
    return stats


async def show_live(
    console: "Console",
    url: str,
    gate: "HttpTarget",
    stats: dict[str, Any],
    interval_s: float,
    stopped: "asyncio.Event",
) -> None:
    """Draw again and again; while the gate does not answer, its last figures stay and the reason stands above them."""
    from rich.live import Live

    from loadstone.core.errors import LoadstoneError
    from loadstone.hold.watch_view import screen

    with Live(screen(stats, url), console=console, screen=True, auto_refresh=False) as live:
        while await _pause(stopped, interval_s):
            trouble = ""
            try:
                stats = await read_stats(gate)
            except LoadstoneError as error:
                trouble = str(error)
            live.update(screen(stats, url, trouble), refresh=True)


async def print_lines(
    console: "Console", gate: "HttpTarget", stats: dict[str, Any], interval_s: float, stopped: "asyncio.Event"
) -> None:
    """A line for each look, with the time of day."""
    from datetime import datetime

    from loadstone.core.errors import LoadstoneError
    from loadstone.hold.watch_view import line

    said = line(stats)
    while True:
        print(f"{datetime.now().astimezone():%H:%M:%S}  {said}", file=console.file, flush=True)
        if not await _pause(stopped, interval_s):
            return
        try:
            said = line(await read_stats(gate))
        except LoadstoneError as error:
            said = f"no answer: {error}"


async def _pause(stopped: "asyncio.Event", seconds: float) -> bool:
    """Wait; False where it was interrupted."""
    import asyncio

    try:
        await asyncio.wait_for(stopped.wait(), seconds)
    except TimeoutError:
        return True
    return False
