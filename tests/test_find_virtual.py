"""Whole searches in virtual time: against the truth of the simulator, cut short and gone on with, through a gate."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pytest

from loadstone.cli.virtual import virtual_server
from loadstone.core.limits import loads
from loadstone.core.records import Outcome
from loadstone.core.settings import DataSettings, LadderSettings, RuleSettings
from loadstone.core.target import Exchange
from loadstone.core.verdict import LevelKind, LevelRow, RunVerdict, Verdict
from loadstone.measure.book import RunBook
from loadstone.measure.find import FindSettings, find, search_settings
from loadstone.measure.runs import RunFolder, create_run, open_run
from loadstone.measure.server import Server
from loadstone.measure.watch import LevelProgress
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.profiles import Profile, named
from loadstone.sim.truth import Truth

LADDERS = {"sharp-knee": "1,2,5,10,20,50", "refusing": "10,50,100,200", "ttft-queue": "10,50,100", "narrow": "1,2,5,10"}
NOW = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)


class Listener:
    """Keeps what it is told."""

    def __init__(self, interrupt_after: int = 0) -> None:
        self.rows: list[LevelRow] = []
        self.notes: list[str] = []
        self._interrupt_after = interrupt_after

    def level_started(self, ordinal: int, kind: LevelKind, concurrency: int, planned: int) -> None:
        """Interrupt here, where a level has just begun."""
        if self._interrupt_after and ordinal > self._interrupt_after:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    def level_progress(self, so_far: LevelProgress) -> None:
        assert so_far.done >= 0

    def level_decided(self, row: LevelRow) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)


def profile_of(name: str) -> Profile:
    return replace(named(name), stream_interval=16)


def settings_of(name: str) -> FindSettings:
    return FindSettings(
        rules=RuleSettings(min_gain=0.2 if name in ("sharp-knee", "narrow") else 0.0),
        ladder=LadderSettings(levels=LADDERS[name]),
        data=DataSettings(random_output_len=profile_of(name).default_output_tokens),
    )


def search(
    name: str,
    out: Path,
    *,
    listener: Listener | None = None,
    resume: bool = False,
    around: Callable[[Server], Server] = lambda server: server,
    admin: bool = False,
) -> RunVerdict:
    """``find`` against a profile; the folder is made, or gone on with."""

    async def main(clock: VirtualClock) -> RunVerdict:
        folder = open_run(str(out)) if resume else None
        return await find(
            around(virtual_server(profile_of(name), clock)),
            settings_of(name),
            lambda model: folder or create_run(str(out), model, NOW),
            listener or Listener(),
            command="loadstone find",
            earlier=folder.levels() if folder else (),
            admin=admin,
            now=lambda: NOW,
        )

    return run_virtual(main)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunFolder, RunVerdict]]:
    """A search that ran to its end, once for each profile."""

    @cache
    def run(name: str) -> tuple[RunFolder, RunVerdict]:
        out = tmp_path_factory.mktemp(name) / "run"
        verdict = search(name, out)
        return open_run(str(out)), verdict

    return run


Run = Callable[[str], tuple[RunFolder, RunVerdict]]


@cache
def line_of(name: str, binding: str) -> int:
    """The true line of the rule that binds."""
    profile, rules = profile_of(name), settings_of(name).rules
    truth = Truth(profile, 512, most=256)
    line = {
        "gain": lambda: truth.gain_line(rules.min_gain),
        "success": lambda: truth.largest(lambda level: level.success_share >= rules.min_success),
        "ttft": lambda: truth.largest(lambda level: level.mean_ttft_s * 1000 <= rules.max_ttft_ms),
    }[binding]()
    assert line is not None
    return line


# -- against the truth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "binding"), [("sharp-knee", "gain"), ("refusing", "success"), ("ttft-queue", "ttft"), ("narrow", "gain")]
)
def test_the_answer_is_within_the_resolution_of_the_truth(name: str, binding: str, run_of: Run) -> None:
    _, verdict = run_of(name)
    line = line_of(name, binding)
    assert verdict.binding == binding
    assert verdict.measured_max_concurrency == pytest.approx(line, abs=max(1.0, 0.05 * line))
    assert verdict.sure
    assert not verdict.non_monotone
    if verdict.gain_line is not None and binding == "gain":
        assert verdict.gain_line.low <= line <= verdict.gain_line.high


@pytest.mark.parametrize("name", ["refusing", "ttft-queue"])
def test_levels_at_or_below_the_line_pass_and_those_above_it_fail(name: str, run_of: Run) -> None:
    _, verdict = run_of(name)
    line = line_of(name, verdict.binding)
    for row in verdict.levels:
        if row.concurrency <= line * 0.95:
            assert row.verdict is Verdict.PASS
        if row.concurrency >= line * 1.05 + 1:
            assert (row.verdict, row.rule) == (Verdict.FAIL, verdict.binding)


@pytest.mark.parametrize("name", ["sharp-knee", "refusing", "ttft-queue"])
def test_what_is_left_on_disk(name: str, run_of: Run) -> None:
    folder, verdict = run_of(name)
    levels = folder.levels()
    assert [x.meta.ordinal for x in levels] == list(range(1, len(verdict.levels) + 1))
    answer, recommended = verdict.measured_max_concurrency, verdict.recommended_concurrency
    assert answer is not None
    assert sum(row.requests for row in verdict.levels if row.concurrency == answer) >= 8 * answer
    assert sum(len(x.records) for x in levels if x.meta.concurrency == answer) >= 9.5 * answer
    assert any(row.concurrency == recommended and row.throughput_rps for row in verdict.levels)
    assert verdict.recommended_throughput_rps is not None
    limits = loads((folder.path / "limits.toml").read_text(), "limits.toml")
    assert limits.limits.max_concurrency == recommended
    assert limits.evidence is not None
    assert limits.evidence.claim == verdict.claim
    assert f"{answer} held: n = " in verdict.claim


@pytest.mark.parametrize("name", ["sharp-knee", "refusing", "ttft-queue"])
def test_a_search_sends_hardly_more_than_its_ladder_at_ten_requests_a_slot(name: str, run_of: Run) -> None:
    """Which would know the line to a factor of two only."""
    folder, verdict = run_of(name)
    climbed = {row.concurrency for row in verdict.levels if row.kind is LevelKind.LADDER}
    sent = sum(len(level.records) for level in folder.levels())
    assert sent <= 1.6 * sum(10 * n for n in climbed)


def test_every_level_sends_the_same_lengths_and_other_texts(run_of: Run) -> None:
    folder, _ = run_of("ttft-queue")
    for level in folder.levels():
        indexes = sorted(record.index for record in level.records)
        assert indexes == sorted(set(indexes)), "each request once"
        assert indexes[: len(level.judged)] == list(range(len(level.judged)))


def test_judged_requests_are_all_followed_to_their_end(run_of: Run) -> None:
    folder, _ = run_of("refusing")
    for level in folder.levels():
        window = [r for r in level.records if level.meta.window_start_s <= r.sent_s < level.meta.window_end_s]
        if level.complete:
            assert len(window) >= level.meta.planned_requests
            assert not [r for r in window if r.outcome is Outcome.CUT]


# -- stopped and gone on with ---------------------------------------------------------------------------------------


def cut_back(folder: RunFolder, keep: int, to: Path) -> Path:
    """A copy of the run as it was after its first ``keep`` levels."""
    shutil.copytree(folder.path, to)
    for level in sorted((to / "levels").iterdir())[keep:]:
        shutil.rmtree(level)
    for name in ("verdict.json", "limits.toml"):
        (to / name).unlink(missing_ok=True)
    return to


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_a_search_that_is_resumed_gives_the_same_answer(keep: int, run_of: Run, tmp_path: Path) -> None:
    folder, whole = run_of("refusing")
    resumed = search("refusing", cut_back(folder, keep, tmp_path / "run"), resume=True)
    assert resumed.measured_max_concurrency == pytest.approx(whole.measured_max_concurrency, rel=0.05)
    assert (resumed.binding, resumed.levels[:keep]) == (whole.binding, whole.levels[:keep])
    assert open_run(str(tmp_path / "run")).read_run() == folder.read_run()


def test_a_search_that_was_over_is_not_run_again(run_of: Run, tmp_path: Path) -> None:
    folder, whole = run_of("narrow")
    copy = cut_back(folder, len(whole.levels), tmp_path / "run")
    listener = Listener()
    assert search("narrow", copy, listener=listener, resume=True) == whole
    assert listener.rows == []


def test_an_interrupted_search_leaves_a_run_that_reads_and_resumes(run_of: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(asyncio.CancelledError):
        search("narrow", out, listener=Listener(interrupt_after=2))
    assert [x.meta.ordinal for x in open_run(str(out)).levels()] == [1, 2]
    assert (out / "verdict.json").is_file()
    _, whole = run_of("narrow")
    resumed = search("narrow", out, resume=True)
    assert (resumed.measured_max_concurrency, resumed.binding) == (whole.measured_max_concurrency, whole.binding)


def test_judging_a_folder_needs_no_server_and_changes_nothing(run_of: Run) -> None:
    for name in ("sharp-knee", "refusing", "ttft-queue"):
        folder, verdict = run_of(name)
        chosen = settings_of(name)
        book = RunBook(search_settings(chosen.rules, chosen.ladder, True), folder.levels())
        assert book.verdict() == verdict == RunBook(book.settings, folder.levels()).verdict()
        assert book.ask() is None


def test_judging_under_other_rules_needs_no_server(run_of: Run) -> None:
    folder, verdict = run_of("ttft-queue")
    chosen = settings_of("ttft-queue")
    strict = search_settings(replace(chosen.rules, max_ttft_ms=50.0), chosen.ladder, True)
    loose = search_settings(replace(chosen.rules, max_ttft_ms=60_000.0), chosen.ladder, True)
    assert RunBook(strict, folder.levels()).verdict().measured_max_concurrency is None
    answer = RunBook(loose, folder.levels()).verdict().measured_max_concurrency
    assert answer is not None
    assert verdict.measured_max_concurrency is not None
    assert answer >= verdict.measured_max_concurrency


# -- through a gate -------------------------------------------------------------------------------------------------


class Gate:
    """A Loadstone gate in front: says who it is, and refuses what would be one more than it admits."""

    def __init__(self, server: Server, most: int) -> None:
        self._server = server
        self._most = most
        self._inside = 0

    def around(self) -> Server:
        async def send(request: object) -> Exchange:
            exchange = await self._server.send(request)  # type: ignore[arg-type]
            exchange.headers[b"server"] = b"loadstone"
            return exchange

        return replace(self._server, target=self, send=send)

    def start(self, exchange: Exchange, done: Callable[[Exchange], None]) -> None:
        refused = self._inside >= self._most
        self._inside += 1

        def ended(exchange: Exchange) -> None:
            self._inside -= 1
            exchange.headers[b"server"] = b"loadstone"
            done(exchange)

        def refuse() -> None:
            exchange.status = 503
            exchange.headers = {b"content-type": b"application/json", b"x-loadstone-reason": b"queue_full"}
            exchange.end_ns = self._server.clock.now_ns()
            exchange.log.append(exchange.end_ns, b'{"error": {"message": "service busy", "code": "queue_full"}}')
            ended(exchange)

        if refused:
            exchange.sent_ns = self._server.clock.now_ns()
            self._server.clock.call_at(exchange.sent_ns, refuse)
        else:
            self._server.target.start(exchange, ended)

    def cancel(self, exchange: Exchange) -> None:
        if not exchange.done:
            self._server.target.cancel(exchange)


def behind_gate(most: int) -> Callable[[Server], Server]:
    return lambda server: Gate(server, most).around()


def test_a_gate_that_refuses_ends_the_search(tmp_path: Path) -> None:
    listener = Listener()
    verdict = search("sharp-knee", tmp_path / "run", listener=listener, around=behind_gate(8))
    assert [row.concurrency for row in verdict.levels] == [1, 2, 5, 10], "the level that met the gate is the last"
    assert [row.verdict for row in verdict.levels[:3]] == [Verdict.PASS] * 3
    assert verdict.levels[-1].verdict is not Verdict.PASS
    assert verdict.levels[-1].stopped_early
    assert verdict.measured_max_concurrency == 5, "a refusal of the gate is not the server's limit"
    assert not verdict.sure
    assert any("queue_full" in note and "the search ends" in note for note in listener.notes)
    assert sum("without --admin-key" in note for note in listener.notes) == 1
    levels = open_run(str(tmp_path / "run")).levels()
    assert all(level.meta.through_gate for level in levels)
    assert {record.reason for record in levels[-1].records if not record.ok} <= {"queue_full", ""}
    limits = loads((tmp_path / "run/limits.toml").read_text(), "limits.toml")
    assert limits.evidence is not None
    assert limits.evidence.through_gate


def test_a_gate_that_lets_us_through_is_no_gate(tmp_path: Path) -> None:
    listener = Listener()
    verdict = search("narrow", tmp_path / "run", listener=listener, around=behind_gate(1000), admin=True)
    assert verdict.binding == "gain"
    assert not any("gate" in note for note in listener.notes)
    assert not any(level.meta.through_gate for level in open_run(str(tmp_path / "run")).levels())


def test_a_gate_that_refuses_in_spite_of_a_key_is_what_was_measured(tmp_path: Path) -> None:
    search("sharp-knee", tmp_path / "run", around=behind_gate(8), admin=True)
    limits = loads((tmp_path / "run/limits.toml").read_text(), "limits.toml")
    assert limits.evidence is not None
    assert limits.evidence.through_gate


def rows(verdicts: Sequence[LevelRow]) -> list[tuple[int, Verdict]]:
    return [(row.concurrency, row.verdict) for row in verdicts]


def test_what_the_watcher_hears_is_what_the_verdict_says(tmp_path: Path) -> None:
    listener = Listener()
    verdict = search("narrow", tmp_path / "run", listener=listener)
    assert rows(listener.rows) == rows(verdict.levels)
    assert any("the recommended level" in note for note in listener.notes)
