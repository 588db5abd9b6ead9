"""``rate``: from a server and a target to a concurrency. Composes probe, levels, open loop and run folder."""

import asyncio
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from loadstone.core.errors import UsageError
from loadstone.core.settings import check_range, parse_levels
from loadstone.core.target import Exchange
from loadstone.core.verdict import LevelKind
from loadstone.measure.answer import row_of
from loadstone.measure.arrivals import Arrivals, offsets_ns
from loadstone.measure.bench import BenchPlan, plan_notes, run_bench
from loadstone.measure.find import FindSettings, Ready, level_json, level_plan, level_runner, make_ready, run_document
from loadstone.measure.open_loop import judge_open_loop, window_of
from loadstone.measure.rate import SUSTAINED, Goal, rate_rules
from loadstone.measure.rate_answer import RateAnswer
from loadstone.measure.rate_book import RateBook
from loadstone.measure.runner import LevelRunner
from loadstone.measure.runs import RunFolder
from loadstone.measure.search import SearchSettings
from loadstone.measure.server import Server
from loadstone.measure.steady import LevelData, LevelMeta
from loadstone.measure.telemetry import Telemetry, TelemetrySample, summarise_telemetry
from loadstone.measure.watch import LevelProgress, Watcher

RATE_FILE = "rate.json"
OPEN_LOOP_FOLDER = "open_loop"
_POLL_S = 0.1
_IDLE_MAX_S = 60.0


@dataclass(frozen=True)
class RateSettings:
    """The target, and the rest as ``find`` knows it: server, data, ``min_success`` and ``resolution``, the ladder."""

    target_qps: float
    num_prompts: int
    find: FindSettings

    def goal(self) -> Goal:
        """Raises UsageError for settings that make no sense."""
        if not 0 < self.target_qps < float("inf"):
            raise UsageError(f"--target-qps {self.target_qps:g}: give requests per second, more than 0")
        if self.num_prompts < 1:
            raise UsageError(f"--num-prompts {self.num_prompts} must be at least 1")
        check_range("--resolution", self.find.rules.resolution, 0.001, 0.5)
        return Goal(self.target_qps, parse_levels(self.find.ladder.levels), self.find.rules.resolution)

    def search(self, streams: bool) -> SearchSettings:
        """Levels held to success and validity alone."""
        rules = self.find.rules
        check_range("--min-success", rules.min_success, 0.0, 1.0)
        return SearchSettings(rules=rate_rules(rules.min_success, rules.resolution), streams=streams)


async def find_rate(
    server: Server,
    settings: RateSettings,
    open_folder: Callable[[str], RunFolder],
    watcher: Watcher,
    *,
    command: str,
    admin: bool = False,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> RateAnswer:
    """Search c* in closed loops, then play the target at it in an open loop. Writes the run folder as it goes.

    Raises LoadstoneError where nothing can be measured. Cancelled, it leaves every level that stood.
    """
    goal = settings.goal()
    settings.search(True)
    ready = await make_ready(server, settings.find, watcher, admin=admin)
    search = settings.search(ready.rehearsal.streams)
    folder = open_folder(ready.model)
    document = run_document(settings.find, ready, command, now())
    document["settings"]["rate"] = {"target_qps": settings.target_qps, "num_prompts": settings.num_prompts}
    folder.write_run(document)
    book = RateBook(goal, search)
    runner = level_runner(server, settings.find, ready, search, watcher, admin)
    try:
        await _climb(book, runner, folder, watcher, settings.find)
    finally:
        runner.close()
    open_loop = None
    concurrency = book.found()
    if concurrency is not None and not runner.gate_reason:
        await _until_idle(server, max(2 * runner.expected_s(concurrency), 1.0))
        plan = _open_loop_plan(settings, concurrency, len(book.levels) + 1)
        data, samples = await _play(server, ready, plan, watcher)
        # A folder of its own: levels/ holds closed loops alone.
        RunFolder(folder.path / OPEN_LOOP_FOLDER).write_level(
            data, samples, level_json(data, settings.find, settings.target_qps)
        )
        open_loop = judge_open_loop(data, search.rules, SUSTAINED)
        verdict = {"verdict": open_loop.verdict, "rule": "", "reason": open_loop.reason}
        watcher.level_decided(msgspec.structs.replace(row_of(data, search), **verdict))
    answer = book.answer(open_loop)
    folder.write_document(RATE_FILE, answer)
    for note in ready.prepared.workload.notes:
        watcher.note(note)
    return answer


async def _climb(
    book: RateBook, runner: LevelRunner, folder: RunFolder, watcher: Watcher, settings: FindSettings
) -> None:
    while (wanted := book.ask()) is not None:
        if wanted.why:
            watcher.note(f"{wanted.concurrency}: {wanted.why}")
        result = await runner.run(level_plan(wanted, len(book.levels) + 1))
        folder.write_level(result.data, result.samples, level_json(result.data, settings))
        watcher.level_decided(book.add(result.data))
        if runner.gate_reason:
            watcher.note(f"the gate refuses ({runner.gate_reason}): the search ends, its limit is not the server's")
            return


async def _until_idle(server: Server, at_least_s: float) -> None:
    """What the closed loop left behind in the server is not the open loop's."""
    waited_s = 0.0
    idle = await server.idle()
    while not idle and waited_s < (at_least_s if idle is None else _IDLE_MAX_S):
        await asyncio.sleep(_POLL_S)
        waited_s += _POLL_S
        idle = await server.idle()


@dataclass(frozen=True)
class _OpenLoopPlan:
    bench: BenchPlan
    concurrency: int
    target_qps: float
    ordinal: int


def _open_loop_plan(settings: RateSettings, concurrency: int, ordinal: int) -> _OpenLoopPlan:
    arrivals = Arrivals(rate_rps=settings.target_qps)
    seed = settings.find.data.seed
    bench = BenchPlan(settings.num_prompts, arrivals, max_concurrency=concurrency, seed=seed, level=ordinal)
    return _OpenLoopPlan(bench, concurrency, settings.target_qps, ordinal)


async def _play(
    server: Server, ready: Ready, plan: _OpenLoopPlan, watcher: Watcher
) -> tuple[LevelData, list[TelemetrySample]]:
    """The open loop as a level; its window is the steady part of the arrivals."""
    rate = f"{plan.target_qps:g} requests a second, arriving at random"
    for note in (f"open loop: {rate}, at most {plan.concurrency} at once", *plan_notes(plan.bench)):
        watcher.note(note)
    watcher.level_started(plan.ordinal, LevelKind.CONFIRM, plan.concurrency, plan.bench.num_prompts)
    telemetry = Telemetry(server.clock, server.metrics, server.machine)
    if server.stamps is not None:
        server.stamps.remeasure()
    started_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    t0_ns = server.clock.now_ns()
    telemetry.start(t0_ns)
    due_ns = offsets_ns(plan.bench.arrivals, plan.bench.num_prompts, plan.bench.seed)
    done = 0

    def on_done(exchange: Exchange) -> None:
        nonlocal done
        done += 1
        elapsed_ns = server.clock.now_ns() - t0_ns
        in_flight = min(plan.concurrency, max(0, bisect(due_ns, elapsed_ns) - done))
        elapsed_s = max(elapsed_ns / 1e9, 1e-3)
        so_far = LevelProgress(done, plan.bench.num_prompts, done / elapsed_s, None, elapsed_s, in_flight)
        watcher.level_progress(so_far)

    workload, endpoint = ready.prepared.workload, ready.endpoint
    try:
        played = await run_bench(server.target, server.clock, workload, endpoint, plan.bench, on_done=on_done)
    finally:
        samples = await telemetry.stop()
    start_s, end_s = window_of(played.records)
    meta = LevelMeta(
        ordinal=plan.ordinal,
        kind=LevelKind.CONFIRM,
        concurrency=plan.concurrency,
        planned_requests=plan.bench.num_prompts,
        window_start_s=start_s,
        window_end_s=end_s,
        started_at=started_at,
        endpoint=endpoint.name,
        streams=ready.rehearsal.streams,
        output_tokens_from=played.output_tokens_from,
        kernel_stamps=server.stamps is not None and server.stamps.kernel_stamps,
        loopback=server.loopback,
        through_gate=ready.through_gate,
    )
    return LevelData(meta, played.records, summarise_telemetry(samples, start_s, end_s)), samples
