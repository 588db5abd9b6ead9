"""Runs levels: the thin shell that drives a closed loop through a level's states and reads the replies afterwards."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from loadstone.core.api.endpoint import Endpoint
from loadstone.core.api.reading import ContentWatch, to_record
from loadstone.core.clock import Clock
from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.target import Exchange, Request, Target
from loadstone.core.verdict import Finding, Verdict
from loadstone.measure.early import certain_failure, certain_shortage
from loadstone.measure.generator import ClosedLoop
from loadstone.measure.level import LevelPlan, LevelState, LiveView, Phase
from loadstone.measure.points import judge_level
from loadstone.measure.rules import Judgement, Rules, extension, loose_end, undecided
from loadstone.measure.steady import LevelData, LevelMeta, Summary
from loadstone.measure.telemetry import Telemetry, TelemetrySample, summarise_telemetry
from loadstone.measure.watch import LevelProgress, Watcher
from loadstone.measure.workload import Workload

_TICK_MIN_NS = 20_000_000
_TICK_MAX_NS = 250_000_000
_EVIDENCE_MIN_NS = 500_000_000
_DRAIN_MIN_S = 1.0
_DRAIN_POLL_S = 0.1
_DRAIN_MAX_S = 60.0
_UNKNOWN_GROWTH = 0.3
"""dlnR/dlnN assumed while only one level is known."""
_READ_BATCH = 64

Idle = Callable[[], Awaitable[bool | None]]
"""Whether the server has nothing running or waiting; None where it cannot tell."""


class Stamps(Protocol):
    """How receive times are taken; an HTTP target has kernel stamps to look after, the simulator none."""

    @property
    def kernel_stamps(self) -> bool: ...

    def remeasure(self) -> float: ...


@dataclass(frozen=True)
class RunnerSettings:
    """What is the same on every level."""

    endpoint: Endpoint
    rules: Rules
    streams: bool
    first_e2el_s: float
    """End-to-end time of the probe: what a request is expected to take at one slot."""
    max_level_s: float | None = None
    loopback: bool = False
    through_gate: bool = False


@dataclass(frozen=True)
class LevelResult:
    """A level that has ended, ready to be written."""

    data: LevelData
    samples: list[TelemetrySample]


class LevelRunner:
    """One closed loop over one target, taken from level to level."""

    def __init__(
        self,
        target: Target,
        clock: Clock,
        workload: Workload,
        telemetry: Telemetry,
        watcher: Watcher,
        settings: RunnerSettings,
        idle: Idle,
        stamps: Stamps | None,
    ) -> None:
        self._clock = clock
        self._workload = workload
        self._telemetry = telemetry
        self._watcher = watcher
        self._settings = settings
        self._idle = idle
        self._stamps = stamps
        self._loop = ClosedLoop(target, clock)
        self._dirty = False
        self._request_s: list[tuple[int, float]] = [(1, settings.first_e2el_s)]
        self._ttft_ms: list[tuple[int, float]] = []
        self._wake: asyncio.Future[None] | None = None
        self._ready: deque[Request] = deque()
        self._index = 0
        self._gate_reason = ""

    def __repr__(self) -> str:
        return f"<LevelRunner {self._loop!r}>"

    @property
    def gate_reason(self) -> str:
        """Why a Loadstone gate in front of the server refused a request; empty where none did."""
        return self._gate_reason

    def close(self) -> None:
        """Cut whatever is in flight."""
        self._loop.abort()

    async def run(self, plan: LevelPlan) -> LevelResult:
        """Run one level to its verdict. The loop goes on after a PASS, for the next level to take over."""
        expected_ns = int(self.expected_s(plan.concurrency) * 1e9)
        self._watcher.level_started(plan.ordinal, plan.kind, plan.concurrency, plan.requests)
        await self._prepare(plan)
        if self._dirty:
            await self._drain(expected_ns / 1e9)
        started_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        t0_ns = self._clock.now_ns()
        max_ns = None if self._settings.max_level_s is None else int(self._settings.max_level_s * 1e9)
        state = LevelState(plan, t0_ns, expected_ns, max_ns)
        live = LiveView(state, _ContentPeek(self._settings.endpoint), self._settings.streams)
        self._telemetry.start(t0_ns)
        if self._stamps is not None:
            self._stamps.remeasure()
        self._loop.take_over(
            plan.concurrency,
            expected_ns,
            lambda: self._next_request(plan.ordinal),
            state.on_send,
            lambda exchange: self._on_done(state, exchange),
        )
        try:
            return await self._to_verdict(state, live, started_at)
        except BaseException:
            self._loop.abort()
            await self._telemetry.stop()
            raise

    async def _to_verdict(self, state: LevelState, live: LiveView, started_at: str) -> LevelResult:
        reader = _Reader(self._settings, state)
        plan = state.plan
        while True:
            stopped = await self._until_over(state, live)
            if stopped:
                break
            await reader.read(state.hung(self._clock.now_ns()))
            data = self._data(state, reader, self._telemetry.samples, started_at, "")
            summary, judgement = judge_level(data, self._settings.rules, plan.stance)
            more, why = (0, "") if state.ran_out else self._missing(plan, summary, judgement)
            if not more:
                break
            self._watcher.note(f"{plan.concurrency}: {why}, {more} requests more")
            state.extend(more, self._clock.now_ns())
        passed = not stopped and judgement.verdict is Verdict.PASS
        hung = state.hung(self._clock.now_ns())
        await reader.read(hung)
        if passed:
            # A slot that hangs would be missing in the next level, which knows nothing of its request.
            self._loop.cut(hung)
        else:
            self._dirty = True
            await self._abort()
        samples = await self._telemetry.stop()
        await reader.read()
        clock_step_ms = self._stamps.remeasure() if self._stamps is not None else 0.0
        data = self._data(state, reader, samples, started_at, stopped, clock_step_ms)
        self._learn(data)
        return LevelResult(data, samples)

    def _missing(self, plan: LevelPlan, summary: Summary, judgement: Judgement) -> tuple[int, str]:
        """How many requests more this level needs, and why."""
        finding = undecided(summary, judgement, self._settings.rules)
        if finding is not None:
            more = extension(summary, finding, self._settings.rules, plan.requests, self._steepness(summary))
            return more, f"{finding.reason}: too close to tell"
        why = loose_end(summary, judgement)
        return (max(0, plan.most_requests - summary.requests), why) if why else (0, "")

    def _data(
        self,
        state: LevelState,
        reader: "_Reader",
        samples: list[TelemetrySample],
        started_at: str,
        stopped: str,
        clock_step_ms: float = 0.0,
    ) -> LevelData:
        start_s, end_s = (state.w0_ns - state.t0_ns) / 1e9, ((state.w1_ns or state.stopped_ns) - state.t0_ns) / 1e9
        stamps = self._stamps
        meta = LevelMeta(
            ordinal=state.plan.ordinal,
            kind=state.plan.kind,
            concurrency=state.plan.concurrency,
            planned_requests=state.planned,
            window_start_s=start_s,
            window_end_s=end_s,
            stopped_early=stopped,
            started_at=started_at,
            endpoint=self._settings.endpoint.name,
            streams=self._settings.streams,
            output_tokens_from=reader.output_tokens_from,
            kernel_stamps=stamps is not None and stamps.kernel_stamps,
            clock_step_ms=clock_step_ms,
            loopback=self._settings.loopback,
            through_gate=self._settings.through_gate,
        )
        return LevelData(meta, reader.records, summarise_telemetry(samples, start_s, end_s))

    # -- while it runs

    async def _until_over(self, state: LevelState, live: LiveView) -> str:
        """Wait for the level's end; the reason where it is stopped before."""
        tick_ns = min(max(state.expected_ns // 8, _TICK_MIN_NS), _TICK_MAX_NS)
        while state.phase is not Phase.OVER:
            await self._pause(tick_ns)
            now_ns = self._clock.now_ns()
            state.tick(now_ns)
            self._report(state, live, now_ns)
            reason = self._reason_to_stop(state, live, now_ns)
            if reason:
                state.stopped_ns = now_ns
                return reason
        if state.w0_ns == state.w1_ns:
            return "no steady window within --max-level-seconds"
        return ""

    def _reason_to_stop(self, state: LevelState, live: LiveView, now_ns: int) -> str:
        if self._gate_reason:
            return f"the gate in front of the server refused a request ({self._gate_reason})"
        if state.overdue(now_ns):
            return "judged requests did not end within --max-level-seconds"
        if state.phase not in (Phase.JUDGING, Phase.FOLLOWING):
            return ""
        if now_ns - state.w0_ns < max(_EVIDENCE_MIN_NS, state.expected_ns // 2):
            return ""
        failure = self._failure(state, live, now_ns) or self._shortage(state, now_ns)
        return failure.reason if failure is not None else ""

    def _shortage(self, state: LevelState, now_ns: int) -> Finding | None:
        elapsed = (state.w0_ns - state.t0_ns) / 1e9, (now_ns - state.t0_ns) / 1e9
        window_s = state.expected_window_ns(now_ns) / 1e9
        return certain_shortage(self._telemetry.samples, elapsed, window_s, state.planned, self._settings.rules)

    def _failure(self, state: LevelState, live: LiveView, now_ns: int) -> Finding | None:
        failure = certain_failure(live.view(now_ns), self._settings.rules, self._settings.streams)
        if failure is None or failure.rule == "success":
            return failure
        # Past the middle of its plan a level is cheaper finished than stopped now and run again in full.
        worth_it = state.plan.may_stop_early and 2 * state.sent <= state.planned
        return failure if worth_it else None

    async def _pause(self, for_ns: int) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        timer = self._clock.call_at(self._clock.now_ns() + for_ns, self._rouse)
        try:
            await self._wake
        finally:
            timer.cancel()
            self._wake = None

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _on_done(self, state: LevelState, exchange: Exchange) -> None:
        state.on_done(exchange, self._clock.now_ns())
        self._loop.set_request_time(state.mean_ns)
        reason = exchange.headers.get(b"x-loadstone-reason")
        if reason is not None:
            self._gate_reason = reason.decode("latin-1")
        if state.phase is Phase.OVER or self._gate_reason:
            self._rouse()

    def _report(self, state: LevelState, live: LiveView, now_ns: int) -> None:
        done = sum(1 for exchange in state.judged if exchange.done)
        window_s = (now_ns - state.w0_ns) / 1e9 if state.w0_ns else 0.0
        throughput_rps = done / window_s if done and window_s > 0 else None
        elapsed_s = (now_ns - state.t0_ns) / 1e9
        ttft_ms, in_flight = live.mean_ttft_ms(), self._loop.in_flight
        self._watcher.level_progress(LevelProgress(done, state.planned, throughput_rps, ttft_ms, elapsed_s, in_flight))

    # -- requests

    async def _prepare(self, plan: LevelPlan) -> None:
        """Build the bodies that the plan needs, without holding up the requests in flight."""
        self._index = 0
        fresh: deque[Request] = deque()
        for _ in range(plan.requests + 3 * plan.concurrency):
            fresh.append(self._build(plan.ordinal))
            if len(fresh) % _READ_BATCH == 0:
                await asyncio.sleep(0)
        self._ready = fresh

    def _build(self, ordinal: int) -> Request:
        self._index += 1
        return self._workload.request(ordinal, self._index - 1)

    def _next_request(self, ordinal: int) -> Request:
        return self._ready.popleft() if self._ready else self._build(ordinal)

    # -- between levels

    async def _abort(self) -> None:
        self._loop.abort()
        while self._loop.in_flight:
            await self._pause(_TICK_MIN_NS)

    async def _drain(self, expected_s: float) -> None:
        """Work that cut requests left behind in the server is not the next level's."""
        waited_s = 0.0
        at_least_s = max(2 * expected_s, _DRAIN_MIN_S)
        idle = await self._idle()
        while waited_s < (at_least_s if idle is None else _DRAIN_MAX_S) and not idle:
            await self._pause(int(_DRAIN_POLL_S * 1e9))
            waited_s += _DRAIN_POLL_S
            if idle is not None:
                idle = await self._idle()
        self._dirty = False

    # -- how long a request takes

    def expected_s(self, concurrency: int) -> float:
        """R̂: the mean end-to-end time of the last level, scaled by how it grew so far."""
        last_n, last_s = self._request_s[-1]
        growth = _UNKNOWN_GROWTH
        earlier = next(((n, s) for n, s in reversed(self._request_s[:-1]) if n != last_n), None)
        if earlier is not None:
            growth = math.log(last_s / earlier[1]) / math.log(last_n / earlier[0])
        return last_s * math.pow(concurrency / last_n, min(1.0, max(0.0, growth)))

    def _steepness(self, summary: Summary) -> float:
        """dln TTFT/dlnN since the nearest level below; 1 where none is known."""
        below = [(n, ms) for n, ms in self._ttft_ms if n < summary.concurrency and ms > 0]
        if not below or not summary.ttft.values_ms.size:
            return 1.0
        n, ms = max(below)
        return math.log(summary.ttft.mean_ms / ms) / math.log(summary.concurrency / n)

    def _learn(self, data: LevelData) -> None:
        times = [record.e2el_s for record in data.judged if record.ok and record.e2el_s > 0]
        if data.complete and times:
            self._request_s.append((data.meta.concurrency, sum(times) / len(times)))
        ttfts = [record.ttft_s * 1e3 for record in data.judged if record.ok and record.ttft_s is not None]
        if data.complete and ttfts:
            self._ttft_ms.append((data.meta.concurrency, sum(ttfts) / len(ttfts)))


class _Reader:
    """Reads each finished exchange of a level once, a few at a time so that the loop keeps turning."""

    def __init__(self, settings: RunnerSettings, state: LevelState) -> None:
        self._settings = settings
        self._state = state
        self._read: dict[Exchange, RequestRecord] = {}

    @property
    def records(self) -> list[RequestRecord]:
        """In send order."""
        return [self._read[exchange] for exchange in self._state.exchanges if exchange in self._read]

    @property
    def output_tokens_from(self) -> str:
        """``usage`` where the server counts, else ``chunks``: a lower bound, as chunks may hold several tokens."""
        good = [record for record in self._read.values() if record.ok]
        return "usage" if any(record.output_tokens is not None for record in good) or not good else "chunks"

    async def read(self, hung: frozenset[Exchange] = frozenset()) -> None:
        """Read what has ended since the last call; ``hung`` exchanges are recorded as time-outs."""
        count = 0
        for exchange in self._state.exchanges:
            if exchange in self._read or not (exchange.done or exchange in hung):
                continue
            self._read[exchange] = self._record(exchange, exchange in hung)
            count += 1
            if count % _READ_BATCH == 0:
                await asyncio.sleep(0)

    def _record(self, exchange: Exchange, hung: bool) -> RequestRecord:
        record = to_record(exchange, self._settings.endpoint, self._state.t0_ns)
        if hung:
            age_s = (self._state.hung_at_ns - (exchange.sent_ns or exchange.planned_ns)) / 1e9
            error = f"no end after {age_s:.1f} s, far longer than any request that succeeded"
            end_s = record.sent_s + age_s
            return msgspec.structs.replace(record, outcome=Outcome.TIMEOUT, end_s=end_s, error=error)
        if record.ok and record.output_tokens is None and self._settings.streams:
            return msgspec.structs.replace(record, output_tokens=record.chunks)
        return record


class _ContentPeek:
    """First content of exchanges that are still running."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._watches: dict[Exchange, ContentWatch] = {}

    def __call__(self, exchange: Exchange) -> int | None:
        watch = self._watches.setdefault(exchange, ContentWatch(exchange, self._endpoint))
        found_ns = watch.first_content_ns()
        if found_ns is not None or exchange.done:
            del self._watches[exchange]
        return found_ns
