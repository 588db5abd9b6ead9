"""The smallest concurrency for a request rate: the search, the open loop, against the simulator, from the shell."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loadstone.cli.main import main
from loadstone.cli.progress import Silent
from loadstone.cli.rate_view import print_rate
from loadstone.cli.virtual import virtual_server
from loadstone.core.records import Outcome
from loadstone.core.settings import DataSettings, LadderSettings, RuleSettings, ServerSettings
from loadstone.core.verdict import Verdict
from loadstone.measure.find import FindSettings
from loadstone.measure.open_loop import judge_open_loop, sustained, window_of
from loadstone.measure.points import Point
from loadstone.measure.rate import MOST_RUNS, Goal, ask, crossing, is_hopeless, rate_rules, smallest
from loadstone.measure.rate_answer import RateAnswer, answer_of, exit_status
from loadstone.measure.rate_run import RateSettings, find_rate
from loadstone.measure.runs import RunFolder, create_run
from loadstone.measure.steady import LevelData, Throughput
from loadstone.measure.telemetry import ServerFigures
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.profiles import Profile, named
from loadstone.sim.truth import Truth
from made_levels import meta, record
from servers import serving

LADDER = (10, 20, 50, 100, 200)
Curve = Callable[[int], float]


def point(n: int, rps: float, runs: int = 1, se: float = 0.002, **changes: object) -> Point:
    made = Point(n, Verdict.PASS, runs=runs, requests=5 * n * runs, throughput=Throughput(rps, se * rps))
    return dataclasses.replace(made, **changes)


def searched(curve: Curve, goal: Goal, se: float = 0.002, fails_from: float = math.inf) -> tuple[list[Point], int]:
    """(points, levels run) of a search on a server that is known."""
    points: dict[int, Point] = {}
    levels = 0
    while (wanted := ask([points[n] for n in sorted(points)], goal)) is not None:
        levels += 1
        assert levels < 60, "the search does not end"
        n = wanted.concurrency
        runs = points[n].runs + 1 if n in points else 1
        if n >= fails_from:
            points[n] = point(n, 1.0, runs, verdict=Verdict.FAIL, rule="success", throughput=None)
        else:
            points[n] = point(n, curve(n), runs, se)
    return [points[n] for n in sorted(points)], levels


def sharp(knee: int, each_rps: float) -> Curve:
    return lambda n: min(n, knee) * each_rps


def soft(a: float, b: float) -> Curve:
    return lambda n: n / (a + b * n)


def truth(curve: Curve, goal: Goal, most: int = 200) -> int | None:
    return next((n for n in range(1, most + 1) if curve(n) >= goal.wanted_rps), None)


CURVES = st.one_of(
    st.builds(sharp, st.integers(2, 180), st.floats(0.05, 20)),
    st.builds(soft, st.floats(0.1, 5), st.floats(0.001, 0.1)),
)


@given(CURVES, st.floats(0.02, 1.3), st.floats(0.01, 0.2))
def test_the_search_ends_at_the_smallest_within_its_resolution(curve: Curve, share: float, resolution: float) -> None:
    goal = Goal(share * curve(200), LADDER, resolution)
    points, levels = searched(curve, goal)
    found, true = smallest(points, goal), truth(curve, goal)
    if found is None:
        # What is wanted may lie within the noise of the highest level.
        assert true is None or curve(200) <= goal.wanted_rps * 1.004
        return
    assert true is not None
    assert levels <= 24
    assert true <= found.concurrency <= max(true + 1, true * (1 + resolution) * 1.0001)


def test_a_level_whose_interval_contains_the_wanted_rate_is_settled_by_its_value() -> None:
    goal = Goal(20.0, LADDER)
    points, _ = searched(sharp(40, 0.475), goal, se=0.01)
    exact = next(p for p in points if p.concurrency == 40)
    assert exact.runs == MOST_RUNS
    answer = answer_of(points, [], None, goal)
    assert (answer.concurrency, answer.sure) == (40, False)


@pytest.mark.parametrize(
    ("curve", "fails_from", "target_qps", "stopped_by", "best"),
    [
        (sharp(15, 1.0), math.inf, 190.0, "flat", (20, 15.0)),
        (soft(1.0, 0.001), math.inf, 190.0, "ladder", (100, 100 / 1.1)),
        (sharp(1000, 1.0), 60, 190.0, "success", (50, 50.0)),
        (sharp(1000, 1.0), 199, 209.0, "success", (198, 198.0)),
        (sharp(1000, 1.0), 1, 190.0, "success", None),
    ],
)
def test_a_target_that_is_never_reached(
    curve: Curve, fails_from: float, target_qps: float, stopped_by: str, best: tuple[int, float] | None
) -> None:
    goal = Goal(target_qps, LADDER, resolution=0.01)
    points, _ = searched(curve, goal, fails_from=fails_from)
    answer = answer_of(points, [], None, goal)
    assert (answer.concurrency, answer.stopped_by) == (None, stopped_by)
    assert (answer.best and (answer.best.concurrency, answer.best.throughput_rps)) == (best and pytest.approx(best))


def test_a_void_level_is_run_twice_and_never_read_as_a_full_server() -> None:
    goal = Goal(30.0, LADDER)
    points = [point(10, 10.0), point(20, 20.0), point(50, 40.0, verdict=Verdict.INVALID, rule="client")]
    wanted = ask(points, goal)
    assert wanted is not None
    assert wanted.concurrency == 50
    void = dataclasses.replace(points[2], runs=2)
    assert answer_of([*points[:2], void], [], None, goal).stopped_by == "client"
    assert exit_status(answer_of([void], [], None, goal)) == 4


@pytest.mark.parametrize(
    ("rates", "hopeless"),
    [
        ((10.0, 10.1), False),
        ((10.0, 10.1, 10.1), True),
        ((5.0, 10.0, 10.1), False),
        ((10.0, 14.0, 21.0), False),
        ((10.0, 4.0, 9.0), False),
    ],
)
def test_when_no_level_left_can_reach_it(rates: tuple[float, ...], hopeless: bool) -> None:
    points = [point(n, rps) for n, rps in zip((10, 20, 40), rates, strict=False)]
    assert is_hopeless(points, Goal(30.0, (10, 20, 40, 200)), 200) is hopeless


def test_crossing_on_log_log_lines() -> None:
    points = [point(10, 10.0), point(40, 20.0)]
    assert crossing(points, 5.0) == pytest.approx(5.0)
    assert crossing(points, 10 * math.sqrt(2)) == pytest.approx(20.0)
    assert crossing(points, 20.1) is None
    assert crossing([], 1.0) is None


def test_littles_mean_and_the_comfortable_cap() -> None:
    answer = answer_of([point(20, 19.0), point(36, 38.0)], [], None, Goal(20.0, LADDER))
    assert answer.in_flight is not None
    assert answer.in_flight.mean == pytest.approx(20 * (36 / 20) ** (math.log(20 / 19) / math.log(2)))
    a = answer.in_flight.mean
    assert answer.in_flight.comfortable_cap == math.ceil(a + 1.3 * math.sqrt(a))
    short = answer_of([point(10, 10.0), point(20, 19.5)], [], None, Goal(20.0, LADDER))
    assert (short.concurrency, short.in_flight) == (20, None)


# -- the open loop


def played(served_rps: float, rate_rps: float = 10.0, count: int = 600, **changes: object) -> LevelData:
    """A constant stream of requests to a server that sends one off each 1/served_rps."""
    records = []
    free_s = 0.0
    for index in range(count):
        due_s = index / rate_rps
        sent_s = max(due_s, free_s)
        free_s = sent_s + 1 / served_rps
        records.append(record(index, sent_s, planned_s=due_s, turnaround_s=0.0 if sent_s > due_s else None, **changes))
    return LevelData(meta(10, window_of(records)), records, ServerFigures())


@pytest.mark.parametrize(
    ("served_rps", "share", "verdict"),
    [(20.0, 1.0, Verdict.PASS), (9.8, 0.98, Verdict.PASS), (9.0, 0.9, Verdict.FAIL), (5.0, 0.5, Verdict.FAIL)],
)
def test_what_keeps_up_and_what_falls_behind(served_rps: float, share: float, verdict: Verdict) -> None:
    run = judge_open_loop(played(served_rps), rate_rules(0.95, 0.05), 0.95)
    assert run.sustained == pytest.approx(share, abs=0.005)
    assert run.verdict is verdict
    assert run.arrivals == pytest.approx(10 * run.window_s, abs=1)
    assert run.client_late_p99_ms == 0.0
    assert (run.mean_wait_ms > 0) is (served_rps < 10)


def test_the_drain_does_not_count_against_a_server() -> None:
    data = played(10.0, count=400, e2e_s=5.0)
    completed_over_duration = 400 / max(r.end_s for r in data.records)
    assert completed_over_duration < 0.95 * 10
    assert judge_open_loop(data, rate_rules(0.95, 0.05), 0.95).sustained == 1.0


def test_an_open_loop_that_tells_nothing() -> None:
    rules = rate_rules(0.95, 0.05)
    short = judge_open_loop(played(20.0, count=40), rules, 0.95)
    assert short.verdict is Verdict.UNRESOLVED
    assert "--num-prompts" in short.reason
    failing = judge_open_loop(played(20.0, outcome=Outcome.HTTP_ERROR), rules, 0.95)
    assert (failing.verdict, failing.mean_response_ms) == (Verdict.FAIL, None)
    assert "success" in failing.reason


def test_nothing_due_in_the_window() -> None:
    assert sustained([record(0, 1.0)], 5.0, 9.0)[:2] == (0, 0)


# -- against the simulator


def rated(profile: Profile, target_qps: float, out: Path, num_prompts: int = 400) -> RateAnswer:
    find = FindSettings(
        ServerSettings(base_url="sim://virtual"),
        DataSettings(random_output_len=profile.default_output_tokens),
        RuleSettings(),
        LadderSettings(levels="10,20,50,100,200"),
    )
    settings = RateSettings(target_qps, num_prompts, find)

    async def run(clock: VirtualClock) -> RateAnswer:
        server = virtual_server(dataclasses.replace(profile, stream_interval=64), clock)
        return await find_rate(
            server, settings, lambda name: create_run(str(out), name, datetime.now(UTC)), Silent(), command="rate"
        )

    return run_virtual(run)


@pytest.mark.parametrize(("name", "target_qps"), [("sharp-knee", 10.0), ("soft-knee", 12.0), ("wide", 40.0)])
def test_against_a_fine_sweep(name: str, target_qps: float, tmp_path: Path) -> None:
    profile = named(name)
    answer = rated(profile, target_qps, tmp_path / "run")
    sweep = Truth(profile)
    true = next(n for n in range(1, 201) if sweep.at(n).throughput_rps >= 0.95 * target_qps)
    assert answer.concurrency is not None
    assert abs(answer.concurrency - true) <= max(1, 0.05 * true)
    assert answer.open_loop is not None
    assert answer.open_loop.verdict in (Verdict.PASS, Verdict.UNRESOLVED)
    assert answer.open_loop.sustained == pytest.approx(sweep.at(true).throughput_rps / target_qps, abs=0.05)
    assert answer.in_flight is not None
    assert sweep.at(round(answer.in_flight.mean)).throughput_rps == pytest.approx(target_qps, rel=0.05)
    assert answer.document_concurrency == pytest.approx(answer.concurrency, rel=0.01)
    assert exit_status(answer) == 0


def test_the_run_folder_and_the_printed_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = rated(named("narrow"), 2.0, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    written = json.loads((folder.path / "rate.json").read_text())
    assert (written["concurrency"], written["wanted_rps"]) == (4, 1.9)
    assert len(folder.levels()) == len(answer.levels) == len(written["levels"])
    (open_loop,) = RunFolder(folder.path / "open_loop").levels()
    assert len(open_loop.records) == 400
    (result,) = (folder.path / "open_loop/levels").glob("*/result.json")
    assert json.loads(result.read_text())["request_rate"] == 2.0
    assert folder.read_run()["settings"]["rate"] == {"target_qps": 2.0, "num_prompts": 400}
    print_rate(answer, Console())
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("\n\n")[1].splitlines())) <= 80
    assert "2 requests per second need a concurrency of 4." in shown
    assert re.search(r"3\.8\d  in flight then: min\(max concurrency, rate × mean response time\)", shown)


def test_the_other_verbs_know_a_run_of_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = rated(named("narrow"), 2.0, Path("run"))
    assert main(["report", "run"]) == 0
    assert "2 requests per second need a concurrency of 4." in capsys.readouterr().out
    for command in (["judge", "run"], ["find", "--resume", "run"], ["compare", "run", "run"]):
        assert main(command) == 2
        assert "a run of rate" in capsys.readouterr().err
    Path("run/rate.json").write_text("{}")
    assert main(["report", "run"]) == 2
    assert "run/rate.json is not an answer of this version" in capsys.readouterr().err
    assert answer.concurrency == 4


def test_a_rate_beyond_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = rated(named("narrow"), 9.0, tmp_path / "run")
    assert (answer.concurrency, answer.open_loop, exit_status(answer)) == (None, None, 1)
    print_rate(answer, Console())
    shown = capsys.readouterr().out
    assert "9 requests per second were never reached: at best 2.60 req/s, at 10." in shown
    assert "hardly adds throughput" in shown


def test_failing_requests_are_no_throughput(tmp_path: Path) -> None:
    answer = rated(named("broken"), 2.0, tmp_path / "run")
    assert (answer.concurrency, answer.stopped_by, exit_status(answer)) == (None, "success", 1)


# -- from the shell

VERDICTS = tuple(verdict.value for verdict in Verdict)
"""A line of progress that begins so tells of a level that stands."""
SMALL = ["--levels", "1,2", "--random-input-len", "8", "--random-output-len", "4", "--out", "run"]


def test_on_a_real_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(token_s=0.005) as server:
        status = main(
            ["rate", "--base-url", server.url, "--target-qps", "10", "--num-prompts", "10", "--json", "--quiet", *SMALL]
        )
    answer = json.loads(capsys.readouterr().out)
    # A machine that starves the generator makes levels INVALID (4), which is no failure here.
    assert status in (0, 4)
    assert answer["run"] == "run"
    assert answer["target_qps"] == 10.0
    assert json.loads(Path("run/rate.json").read_text())["levels"] == answer["levels"]


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [sys.executable, "-m", "loadstone", "rate", "--target-qps", "100000", *SMALL]
    with serving(token_s=0.005) as server:
        process = subprocess.Popen([*argv, "--base-url", server.url], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            while not process.stderr.readline().startswith(VERDICTS):
                assert process.poll() is None, "the search ends by itself"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert err.endswith("loadstone: interrupted; what was measured is in run\n")
    assert len(RunFolder(Path("run")).levels()) == 1
    assert not Path("run/rate.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--target-qps"),
        (["--target-qps", "0"], "--target-qps 0: give requests per second, more than 0"),
        (["--target-qps", "inf"], "--target-qps inf"),
        (["--target-qps", "5", "--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
        (["--target-qps", "5", "--levels", "5,2"], "did you mean 2,5?"),
        (["--target-qps", "5", "--resolution", "2"], "--resolution 2"),
    ],
)
def test_what_makes_no_sense(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rate", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("loadstone: ")
    assert said in err
