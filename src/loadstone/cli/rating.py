"""A rate search from the command line: loop, server, progress, last words."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from loadstone.cli.progress import progress
from loadstone.cli.rate_view import print_rate
from loadstone.cli.searching import Secrets, connected
from loadstone.core.errors import EXIT_INTERRUPTED
from loadstone.measure.rate_answer import RateAnswer, exit_status
from loadstone.measure.rate_run import RATE_FILE, RateSettings, find_rate
from loadstone.measure.runs import RunFolder


@dataclass(frozen=True)
class Rated:
    """A rate search that has ended, by its answer or by Ctrl-C."""

    folder: Path
    answer: RateAnswer | None
    """None where it was interrupted."""


def search_rate(
    settings: RateSettings, open_folder: Callable[[str], RunFolder], secrets: Secrets, command: str, *, quiet: bool
) -> Rated:
    """Run it, ``command`` being what is kept as its command line.

    Ctrl-C ends it with everything measured on disk; before that, it is a plain interrupt.
    """
    folders: list[RunFolder] = []

    def remember(model: str) -> RunFolder:
        folders.append(open_folder(model))
        return folders[0]

    async def run() -> RateAnswer:
        async with connected(settings.find.server, secrets) as server:
            with progress(quiet) as watcher:
                admin = bool(secrets.admin_key)
                return await find_rate(server, settings, remember, watcher, command=command, admin=admin)

    try:
        answer = uvloop.run(run())
    except KeyboardInterrupt:
        if not folders:
            raise
        return Rated(folders[0].path, None)
    return Rated(folders[0].path, answer)


def conclude_rate(rated: Rated, *, quiet: bool, json: bool) -> int:
    """Print the answer and where everything lies; returns the exit status."""
    if rated.answer is None:
        print(f"loadstone: interrupted; what was measured is in {rated.folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not quiet:
        print_rate(rated.answer, Console())
        print(f"\nanswer   {rated.folder / RATE_FILE}")
    if json:
        document = {"run": str(rated.folder), **msgspec.to_builtins(rated.answer)}
        print(msgspec.json.encode(document).decode())
    return exit_status(rated.answer)
