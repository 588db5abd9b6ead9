"""``loadstone bench``: one level, with the flags, the printed block and the JSON of ``vllm bench serve``."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.cli.bench_settings import BenchSettings
from loadstone.cli.command import CommandLine

if TYPE_CHECKING:
    import ssl

    from loadstone.cli.bench_setup import Setup
    from loadstone.core.target import Exchange
    from loadstone.measure.bench import Played

_REDRAW_EVERY_S = 0.25
_DEFAULTS = BenchSettings()


def bench(settings: BenchSettings = _DEFAULTS, *, command: CommandLine = "") -> int:
    """Measure one level: the flags, output and JSON of `vllm bench serve`.

    With --result-filename, --save-result or --append-result the result is written to a file as well.
    """
    import json
    import math
    from datetime import datetime

    import uvloop

    from loadstone.cli.bench_files import prepare_folder, result_file, save, write_run
    from loadstone.cli.bench_setup import setup_of
    from loadstone.core.errors import EXIT_FAILED, EXIT_OK, UnreachableError
    from loadstone.measure.bench import failure_lines
    from loadstone.measure.bench_view import bench_level, bench_view
    from loadstone.measure.runs import check_out
    from loadstone.measure.vllm_result import printed, vllm_result

    now = datetime.now().astimezone()
    setup = setup_of(settings, now)
    if settings.out:
        check_out(settings.out)
    if (file := result_file(settings, setup.result)) is not None:
        prepare_folder(file)
    try:
        setup, played, notes = uvloop.run(_measure(settings, setup))
    except UnreachableError as error:
        if settings.base_url:
            raise
        raise UnreachableError(str(error).replace("--base-url", "--host and --port, or --base-url")) from None
    level = bench_level(played, setup.plan, setup.endpoint)
    view = bench_view(level, open_loop=math.isfinite(settings.request_rate))
    own = {"output_tokens_from": played.output_tokens_from, "notes": notes, "steady": view}
    result = vllm_result(played.records, setup.result, played.duration_s, loadstone=own)
    if settings.out:
        write_run(settings, setup, level, result, now, command)

    if not settings.quiet:
        _say(failure_lines(played.records))
    if not (settings.quiet and settings.json):
        print(printed(result, setup.result))
    if settings.json:
        print(json.dumps(result))
    if (file := result_file(settings, setup.result)) is not None:
        save(file, result, settings.append_result)
    return EXIT_OK if result["completed"] else EXIT_FAILED


async def _measure(settings: BenchSettings, setup: "Setup") -> "tuple[Setup, Played, list[str]]":
    """(the setup with the model's name in it, what was played, what is to be said)."""
    import asyncio
    from dataclasses import replace

    from loadstone.measure.bench import run_bench
    from loadstone.measure.prepare import prepare
    from loadstone.measure.probe import first_model, when_ready
    from loadstone.wire.client import connect_target
    from loadstone.wire.clock import MonotonicClock
    from loadstone.wire.process import paused_gc, raise_open_files

    raise_open_files()
    clock = MonotonicClock(asyncio.get_running_loop())
    target = await connect_target(
        setup.base_url,
        clock,
        timeout_s=settings.request_timeout_s,
        api_key=settings.api_key or "",
        headers=setup.headers,
        tls=_unverified() if settings.insecure else None,
    )
    try:
        if not setup.result.model_id:
            endpoint = setup.endpoint
            model = await when_ready(lambda: first_model(target.fetch, endpoint), settings.ready_check_timeout_sec)
            tokenizer_id = setup.result.tokenizer_id or model
            setup = replace(setup, result=replace(setup.result, model_id=model, tokenizer_id=tokenizer_id))
        options = setup.body_options(settings.served_model_name or setup.result.model_id)
        prepared = await when_ready(
            lambda: prepare(
                target.send,
                target.fetch,
                setup.endpoint,
                setup.path,
                options,
                setup.workload,
                base_url=setup.base_url,
                tokenizer=setup.tokenizer,
            ),
            settings.ready_check_timeout_sec,
        )
        notes = [*setup.notes, *prepared.notes]
        if prepared.probe.through_gate:
            notes.append("a Loadstone gate answers: its limits are part of what is measured")
        if not settings.quiet:
            _say(notes)
        with (
            paused_gc(),
            _progress(setup.plan.num_prompts, shown=not (settings.disable_tqdm or settings.quiet)) as on_done,
        ):
            played = await run_bench(
                target, clock, prepared.workload, setup.endpoint, setup.plan, setup.tokenizer, on_done
            )
    finally:
        target.close()
        clock.close()
    later = list(prepared.workload.notes)
    if not settings.quiet:
        _say(later)
    return setup, played, [*notes, *later]


def _unverified() -> "ssl.SSLContext":
    import ssl

    from loadstone.wire.tls import client_context

    context = client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"loadstone: {line}", file=sys.stderr)


@contextmanager
def _progress(total: int, shown: bool) -> "Iterator[Callable[[Exchange], None] | None]":
    """A bar on standard error where that is a terminal; without a thread, which would disturb the timing."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=total)
        drawn_s = 0.0

        def on_done(exchange: "Exchange") -> None:
            nonlocal drawn_s
            bar.advance(task)
            if (now_s := time.monotonic()) - drawn_s >= _REDRAW_EVERY_S:
                drawn_s = now_s
                bar.refresh()

        yield on_done
