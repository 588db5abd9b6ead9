"""``find``: from a server to a line. Composes probe, levels, search and run folder; decides nothing itself."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec

from loadstone import __version__
from loadstone.core.api import ENDPOINTS
from loadstone.core.api.endpoint import BodyOptions, Endpoint
from loadstone.core.errors import EXIT_FAILED, EXIT_INVALID, EXIT_OK, UnreachableError, UsageError
from loadstone.core.records import Outcome
from loadstone.core.settings import (
    DataSettings,
    LadderSettings,
    RuleSettings,
    ServerSettings,
    check_range,
    parse_levels,
)
from loadstone.core.verdict import RunVerdict, Verdict
from loadstone.measure.answer import Subject, limits_of
from loadstone.measure.book import RunBook
from loadstone.measure.level import LevelPlan
from loadstone.measure.prepare import Prepared, prepare
from loadstone.measure.probe import Rehearsal, first_model, rehearse
from loadstone.measure.rules import Rules, Slo
from loadstone.measure.runner import LevelRunner, RunnerSettings
from loadstone.measure.runs import RunFolder
from loadstone.measure.search import Ask, SearchSettings
from loadstone.measure.server import Server
from loadstone.measure.steady import LevelData
from loadstone.measure.telemetry import Telemetry
from loadstone.measure.tokens import load_tokenizer
from loadstone.measure.vllm_result import ResultSettings, vllm_result
from loadstone.measure.watch import Watcher
from loadstone.measure.workload import WorkloadSettings

FEWEST_REQUESTS_PER_SLOT = 5
_REHEARSALS = 8
_WARM_WITHIN = 1.3
"""A server whose last two lone requests took nearly the same time is warm."""
_DEFAULT_PERCENTILES = (50.0, 95.0, 99.0)


@dataclass(frozen=True)
class FindSettings:
    """Everything that decides a search; what a resumed run goes on with."""

    server: ServerSettings = field(default_factory=ServerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rules: RuleSettings = field(default_factory=RuleSettings)
    ladder: LadderSettings = field(default_factory=LadderSettings)


def search_settings(rules: RuleSettings, ladder: LadderSettings, streams: bool) -> SearchSettings:
    """The search that the flags ask for. Raises UsageError for one that makes no sense."""
    check_range("--min-success", rules.min_success, 0.0, 1.0)
    check_range("--min-gain", rules.min_gain, 0.0, 0.99)
    check_range("--resolution", rules.resolution, 0.001, 0.5)
    check_range("--headroom", rules.headroom, 0.05, 1.0)
    check_range("--requests-per-slot", ladder.requests_per_slot, 3, 100_000)
    check_range("--max-level-seconds", ladder.max_level_seconds, 0.0, 1e6)
    check_range("--max-kv-use", rules.max_kv_use, 0.0, 1.0)
    check_range("--max-gpu-memory", rules.max_gpu_memory, 0.0, 1.0)
    for flag, limit_ms in (("--max-ttft-ms", rules.max_ttft_ms), ("--max-e2el-ms", rules.max_e2el_ms)):
        check_range(flag, limit_ms, 0.0, 1e9)
    if rules.ttft_stat not in ("mean", "p50", "p95", "p99"):
        raise UsageError(f"--ttft-stat {rules.ttft_stat}: choose mean, p50, p95 or p99")
    return SearchSettings(
        rules=Rules(
            min_success=rules.min_success,
            max_ttft_ms=rules.max_ttft_ms or None,
            ttft_stat=rules.ttft_stat,
            max_e2el_ms=rules.max_e2el_ms or None,
            min_gain=rules.min_gain,
            max_kv_use=rules.max_kv_use,
            max_waiting=None if rules.max_waiting < 0 else rules.max_waiting,
            max_gpu_memory=rules.max_gpu_memory or None,
            slos=tuple(Slo.parse(text) for text in rules.slo),
            resolution=rules.resolution,
        ),
        ladder=parse_levels(ladder.levels),
        requests_per_slot=ladder.requests_per_slot,
        headroom=rules.headroom,
        streams=streams,
    )


def endpoint_of(name: str) -> Endpoint:
    """Raises UsageError for an endpoint that is not to be had."""
    if name not in ENDPOINTS:
        raise UsageError(f"--endpoint {name}: choose {', '.join(ENDPOINTS)}")
    return ENDPOINTS[name]


def workload_settings(data: DataSettings) -> WorkloadSettings:
    """The data set that the flags ask for. Raises UsageError."""
    return WorkloadSettings(
        dataset_name=data.dataset_name,
        dataset_path=data.dataset_path or None,
        input_len=data.random_input_len,
        output_len=data.random_output_len,
        input_range_ratio=data.random_range_ratio,
        output_range_ratio=data.random_range_ratio,
        prefix_len=data.random_prefix_len,
        batch_size=data.random_batch_size or None,
        seed=data.seed,
    )


def extra_body(text: str) -> dict[str, Any]:
    """``--extra-body``; raises UsageError where it is no JSON object."""
    if not text:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UsageError(f"--extra-body is not a JSON object: {error}") from None


@dataclass(frozen=True)
class Ready:
    """A server that has been probed, with the workload cut to it."""

    model: str
    endpoint: Endpoint
    prepared: Prepared
    rehearsal: Rehearsal

    @property
    def through_gate(self) -> bool:
        return self.prepared.probe.through_gate


async def make_ready(
    server: Server, settings: FindSettings, watcher: Watcher, *, admin: bool, used_rows: int = 0
) -> Ready:
    """Probe the server, calibrate the workload, warm up. Raises what the probe raises."""
    endpoint = endpoint_of(settings.server.endpoint)
    workload = workload_settings(settings.data)
    tokenizer = load_tokenizer(settings.data.tokenizer) if settings.data.tokenizer else None
    model = settings.server.model or await first_model(server.fetch, endpoint)
    options = BodyOptions(
        model=model, ignore_eos=settings.data.dataset_name == "random", extra=extra_body(settings.server.extra_body)
    )
    prepared = await prepare(
        server.send,
        server.fetch,
        endpoint,
        endpoint.path,
        options,
        workload,
        base_url=server.base_url,
        tokenizer=tokenizer,
        used_rows=used_rows,
    )
    for note in prepared.notes:
        watcher.note(note)
    if prepared.probe.through_gate:
        await _meet_gate(server, watcher, admin=admin)
    rehearsal = await _warm_up(server, endpoint, prepared)
    return Ready(model, endpoint, prepared, rehearsal)


async def _meet_gate(server: Server, watcher: Watcher, *, admin: bool) -> None:
    """Raises UsageError where the gate does not accept the key."""
    if not admin:
        watcher.note("a Loadstone gate answers: without --admin-key its own limits are measured, not the server's")
        return
    try:
        status = (await server.fetch("GET", "/stats")).status
    except UnreachableError:
        # Only a 401 tells of the key; requests that fail will tell themselves.
        return
    if status == HTTPStatus.UNAUTHORIZED:
        raise UsageError("--admin-key: the gate does not accept it; give the key that it was started with")


async def _warm_up(server: Server, endpoint: Endpoint, prepared: Prepared) -> Rehearsal:
    """Lone requests until two in a row take nearly the same time: a cold server must not fail the first level."""
    last = await rehearse(server.send, endpoint, prepared.workload.request(0, 0))
    for index in range(1, _REHEARSALS):
        again = await rehearse(server.send, endpoint, prepared.workload.request(0, index))
        steady = max(last.e2e_s, again.e2e_s) <= _WARM_WITHIN * min(last.e2e_s, again.e2e_s)
        last = again
        if steady:
            break
    return last


async def find(
    server: Server,
    settings: FindSettings,
    open_folder: Callable[[str], RunFolder],
    watcher: Watcher,
    *,
    command: str,
    admin: bool = False,
    earlier: Sequence[LevelData] = (),
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> RunVerdict:
    """Search until the line is found; everything measured is on disk as soon as it stands.

    ``open_folder`` gives the run's folder once the server has answered, by the model's name; ``earlier`` are the
    levels that stand in it already. Raises LoadstoneError where nothing can be measured; cancelled, it leaves a run
    that reads and resumes.
    """
    search_settings(settings.rules, settings.ladder, True)
    used_rows = sum(len(level.records) for level in earlier)
    ready = await make_ready(server, settings, watcher, admin=admin, used_rows=used_rows)
    search = search_settings(settings.rules, settings.ladder, ready.rehearsal.streams)
    settings = replace(settings, server=replace(settings.server, model=ready.model))
    folder = open_folder(ready.model)
    if not earlier:
        folder.write_run(run_document(settings, ready, command, now()))
    if settings.ladder.requests_per_slot < FEWEST_REQUESTS_PER_SLOT:
        watcher.note(
            f"--requests-per-slot {settings.ladder.requests_per_slot} is little: 5 to 10 requests for each slot give "
            "figures to rely on"
        )
    book = RunBook(search, earlier)
    runner = level_runner(server, settings, ready, search, watcher, admin)
    try:
        await _search(book, runner, folder, watcher, settings)
    finally:
        runner.close()
        lifted = admin and not runner.gate_reason
        verdict = conclude(book, folder, settings, subject_of(folder, ready, settings, lifted), now())
    for note in ready.prepared.workload.notes:
        watcher.note(note)
    return verdict


async def _search(
    book: RunBook, runner: LevelRunner, folder: RunFolder, watcher: Watcher, settings: FindSettings
) -> None:
    while (wanted := book.ask()) is not None:
        if wanted.why:
            watcher.note(f"{wanted.concurrency}: {wanted.why}")
        result = await runner.run(level_plan(wanted, book.next_ordinal))
        folder.write_level(result.data, result.samples, level_json(result.data, settings))
        watcher.level_decided(book.add(result.data))
        folder.write_verdict(book.verdict())
        if runner.gate_reason:
            watcher.note(f"the gate refuses ({runner.gate_reason}): the search ends, its limit is not the server's")
            return


def level_plan(wanted: Ask, ordinal: int) -> LevelPlan:
    """The level that was asked for, as the ``ordinal``-th of its run."""
    return LevelPlan(
        ordinal=ordinal,
        kind=wanted.kind,
        concurrency=wanted.concurrency,
        requests=wanted.requests,
        stance=wanted.stance,
        may_stop_early=wanted.may_stop_early,
        window_times=wanted.window_times,
        most_requests=wanted.most_requests,
    )


def level_runner(
    server: Server, settings: FindSettings, ready: Ready, search: SearchSettings, watcher: Watcher, admin: bool
) -> LevelRunner:
    """What runs the levels of this search; close it in the end."""
    return LevelRunner(
        server.target,
        server.clock,
        ready.prepared.workload,
        Telemetry(server.clock, server.metrics, server.machine),
        watcher,
        RunnerSettings(
            endpoint=ready.endpoint,
            rules=search.rules,
            streams=ready.rehearsal.streams,
            first_e2el_s=ready.rehearsal.e2e_s,
            max_level_s=settings.ladder.max_level_seconds or None,
            loopback=server.loopback,
            through_gate=ready.through_gate and not admin,
        ),
        server.idle,
        server.stamps,
    )


def subject_of(folder: RunFolder, ready: Ready, settings: FindSettings, lifted: bool) -> Subject:
    """What was measured, for the evidence in ``limits.toml``; ``lifted``: a gate's limits did not hold for it."""
    return Subject(
        model=ready.model,
        endpoint=ready.endpoint.name,
        base_url=settings.server.base_url,
        run=str(folder.path),
        through_gate=ready.through_gate and not lifted,
    )


def conclude(book: RunBook, folder: RunFolder, settings: FindSettings, subject: Subject, now: datetime) -> RunVerdict:
    """Write ``verdict.json`` and, where something passed, ``limits.toml``."""
    verdict = book.verdict()
    folder.write_verdict(verdict)
    limits = limits_of(verdict, book.levels, book.settings, subject, settings.server.request_timeout_s, now)
    folder.write_limits(limits)
    return verdict


def exit_status(verdict: RunVerdict) -> int:
    """0 found; 1 the server failed at the first level; 4 no level could be judged."""
    if verdict.measured_max_concurrency is not None:
        return EXIT_OK
    failed = any(row.verdict is Verdict.FAIL for row in verdict.levels)
    return EXIT_FAILED if failed else EXIT_INVALID


def run_document(settings: FindSettings, ready: Ready, command: str, now: datetime) -> dict[str, Any]:
    """``run.toml``; secrets are never part of the settings."""
    return {
        "schema": 1,
        "command": command,
        "created_at": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "loadstone": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        # Headers may hold keys; a resumed run takes them from its own command line.
        "settings": asdict(replace(settings, server=replace(settings.server, header=()))),
        "workload": {"notes": list(ready.prepared.notes)},
        "server": {
            "base_url": settings.server.base_url,
            "model": ready.model,
            "endpoint": ready.endpoint.name,
            "streams": ready.rehearsal.streams,
            "through_gate": ready.through_gate,
            "first_e2el_s": ready.rehearsal.e2e_s,
        },
    }


def settings_of(document: Mapping[str, Any], name: str) -> FindSettings:
    """The settings of a recorded run. Raises UsageError where they cannot be read."""
    try:
        return msgspec.convert(document["settings"], FindSettings)
    except (KeyError, msgspec.ValidationError) as error:
        raise UsageError(f"{name}: the settings cannot be read ({error})") from None


_BACKENDS = {
    "chat": "openai-chat",
    "completions": "openai",
    "embeddings": "openai-embeddings",
    "rerank": "vllm-rerank",
}
"""What vLLM's benchmark calls an endpoint family; it does not know the others."""


def level_json(data: LevelData, settings: FindSettings, request_rate: float = math.inf) -> dict[str, Any]:
    """The benchmark JSON over the whole level, what we cut left out."""
    meta = data.meta
    records = [record for record in data.records if record.outcome is not Outcome.CUT]
    pooling = not ENDPOINTS[meta.endpoint].streams
    result_settings = ResultSettings(
        date=datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        backend=_BACKENDS.get(meta.endpoint, meta.endpoint),
        model_id=settings.server.model,
        num_prompts=len(records),
        tokenizer_id=settings.data.tokenizer or None,
        request_rate=request_rate,
        max_concurrency=meta.concurrency,
        pooling=pooling,
        metrics=("e2el",) if pooling else ("ttft", "tpot", "itl", "e2el"),
        percentiles=_DEFAULT_PERCENTILES,
    )
    duration_s = max((record.end_s for record in records), default=0.0)
    return vllm_result(records, result_settings, max(duration_s, 1e-9))
