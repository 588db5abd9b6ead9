"""A search from the command line, as ``find`` and ``demo`` run it: loop, server, progress, report, last words."""

import asyncio
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from loadstone.cli.progress import progress
from loadstone.core.errors import EXIT_INTERRUPTED
from loadstone.core.settings import ServerSettings
from loadstone.core.verdict import RunVerdict
from loadstone.measure.find import FindSettings, exit_status, find
from loadstone.measure.runs import LIMITS_FILE, RunFolder
from loadstone.measure.server import Server, connect_server
from loadstone.measure.steady import LevelData
from loadstone.report.page import write_report
from loadstone.report.tables import print_answer
from loadstone.wire.clock import MonotonicClock
from loadstone.wire.process import paused_gc, raise_open_files


@dataclass(frozen=True)
class Secrets:
    """What is sent to the server and never written to disk."""

    api_key: str = ""
    admin_key: str = ""


@dataclass(frozen=True)
class Searched:
    """A search that has ended, by its answer or by Ctrl-C."""

    folder: Path
    verdict: RunVerdict | None
    """None where it was interrupted."""


def search(
    settings: FindSettings,
    open_folder: Callable[[str], RunFolder],
    secrets: Secrets,
    command: str,
    *,
    quiet: bool,
    earlier: Sequence[LevelData] = (),
) -> Searched:
    """Run the search, ``command`` being what is kept as its command line.

    Ctrl-C ends it with everything measured on disk; before that, it is a plain interrupt.
    """
    folders: list[RunFolder] = []

    def remember(model: str) -> RunFolder:
        folders.append(open_folder(model))
        return folders[0]

    try:
        verdict = uvloop.run(_find(settings, remember, secrets, command, quiet, earlier))
    except KeyboardInterrupt:
        if not folders:
            raise
        return Searched(folders[0].path, None)
    return Searched(folders[0].path, verdict)


async def _find(
    settings: FindSettings,
    open_folder: Callable[[str], RunFolder],
    secrets: Secrets,
    command: str,
    quiet: bool,
    earlier: Sequence[LevelData],
) -> RunVerdict:
    async with connected(settings.server, secrets) as server:
        with progress(quiet) as watcher:
            return await find(
                server,
                settings,
                open_folder,
                watcher,
                command=command,
                admin=bool(secrets.admin_key),
                earlier=earlier,
            )


@asynccontextmanager
async def connected(settings: ServerSettings, secrets: Secrets) -> AsyncIterator[Server]:
    """The server, ready to be measured: open files raised, garbage collection paused."""
    raise_open_files()
    clock = MonotonicClock(asyncio.get_running_loop())
    try:
        server = await connect_server(settings, clock, api_key=secrets.api_key, admin_key=secrets.admin_key)
        try:
            with paused_gc():
                yield server
        finally:
            server.close()
    finally:
        clock.close()


def conclude(searched: Searched, *, quiet: bool, json: bool) -> int:
    """Write the report, print the answer and where everything lies; returns the exit status."""
    run = shlex.quote(str(searched.folder))
    if searched.verdict is None:
        print(f"loadstone: interrupted; go on with: loadstone find --resume {run}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not quiet:
        print_answer(searched.verdict, Console())
    page, picture = write_report(searched.folder)
    if not quiet:
        print(f"\nreport   {page}\npicture  {picture}")
        limits = searched.folder / LIMITS_FILE
        if limits.is_file():
            print(f"limits   {limits}")
    if json:
        document = {"run": str(searched.folder), **msgspec.to_builtins(searched.verdict)}
        print(msgspec.json.encode(document).decode())
    return exit_status(searched.verdict)
