"""``judge``: a run's verdict again from its records, under its own rules or others, and benchmark results as a run."""

import dataclasses
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w

from loadstone.cli.judge import RuleFlags, given
from loadstone.cli.main import build_app, main
from loadstone.cli.progress import Silent
from loadstone.cli.virtual import virtual_server
from loadstone.core.limits import loads
from loadstone.core.settings import DataSettings, LadderSettings, RuleSettings, ServerSettings
from loadstone.core.verdict import RunVerdict
from loadstone.measure.find import FindSettings, find
from loadstone.measure.judged import judge_run
from loadstone.measure.runs import RunFolder, create_run
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.profiles import named

SETTINGS = FindSettings(
    ServerSettings(base_url="sim://virtual"),
    DataSettings(random_output_len=128),
    RuleSettings(max_ttft_ms=1500.0, min_gain=0.0),
    LadderSettings(levels="1,2,5,10,20"),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on a simulated server whose line is 8 by TTFT: five slots decode, the others wait."""
    path = tmp_path_factory.mktemp("judge") / "run"

    async def search(clock: VirtualClock) -> None:
        server = virtual_server(dataclasses.replace(named("narrow"), stream_interval=64), clock)
        moment = datetime(2026, 11, 20, 10, tzinfo=UTC)
        await find(
            server,
            SETTINGS,
            lambda name: create_run(str(path), name, moment),
            Silent(),
            command="loadstone find",
            now=lambda: moment,
        )

    run_virtual(search)
    return path


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(measured, tmp_path / "run"))


def verdict_in(path: Path) -> RunVerdict:
    return msgspec.json.decode((path / "verdict.json").read_bytes(), type=RunVerdict)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def judged(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """(exit status, what --json says)."""
    status = main(["judge", *argv, "--json", "--quiet"])
    return status, json.loads(capsys.readouterr().out)


def test_the_same_rules_give_the_same_verdict(run: Path) -> None:
    again = judge_run(RunFolder(run), {})
    assert again.verdict == verdict_in(run)
    assert again.document == RunFolder(run).read_run()


def test_nothing_is_written_unless_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    assert main(["judge", str(run), "--max-ttft-ms", "100"]) == 0
    shown = capsys.readouterr().out
    assert "This server takes 5 concurrent requests." in shown
    assert contents(run) == before


def test_only_what_is_given_overrides(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = verdict_in(run)
    assert recorded.binding == "ttft"
    looser = judge_run(RunFolder(run), {"headroom": 0.5})
    assert looser.verdict.measured_max_concurrency == recorded.measured_max_concurrency
    assert looser.document["settings"]["rules"]["max_ttft_ms"] == 1500.0
    assert given(RuleFlags()) == {}
    assert given(RuleFlags(min_gain=0.0, slo=("ttft:p99:9",))) == {"min_gain": 0.0, "slo": ("ttft:p99:9",)}


def test_the_environment_overrides_too(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOADSTONE_MAX_TTFT_MS", "100")
    status, verdict = judged([str(run)], capsys)
    assert (status, verdict["measured_max_concurrency"], verdict["binding"]) == (0, 5, "ttft")


def test_write_makes_the_folder_say_what_was_judged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, verdict = judged([str(run), "--max-ttft-ms", "100", "--slo", "itl:mean:5000", "--write"], capsys)
    assert status == 0
    assert verdict["run"] == str(run)
    assert verdict_in(run).measured_max_concurrency == verdict["measured_max_concurrency"] == 5
    limits = loads((run / "limits.toml").read_text(), "limits.toml")
    assert limits.limits.max_concurrency == verdict["recommended_concurrency"] == 4
    assert limits.evidence is not None
    document = RunFolder(run).read_run()
    assert document["settings"]["rules"]["max_ttft_ms"] == 100.0
    assert document["measured_under"]["max_ttft_ms"] == 1500.0
    assert "limit on the mean: 100 ms" in (run / "report.html").read_text()
    assert judged([str(run)], capsys)[1] == verdict
    # Back to the rules it was measured under.
    assert judged([str(run), "--max-ttft-ms", "1500"], capsys)[1]["binding"] == "ttft"


def test_limits_grow_old_from_the_measurement(run: Path) -> None:
    last = RunFolder(run).levels()[-1].meta.started_at
    limits = judge_run(RunFolder(run), {}).limits
    assert limits is not None
    assert limits.evidence is not None
    assert limits.evidence.measured_at == last


def test_where_nothing_passes_no_limits_are_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, verdict = judged([str(run), "--max-ttft-ms", "1", "--write"], capsys)
    assert (status, verdict["measured_max_concurrency"], verdict["binding"]) == (1, None, "ttft")
    assert not (run / "limits.toml").exists()


def test_help_says_of_each_rule_what_find_says() -> None:
    def rules(verb: str) -> dict[str, str]:
        arguments = build_app(None)[verb].assemble_argument_collection(parse_docstring=True)
        return {argument.names[0]: argument.parameter.help or "" for argument in arguments if argument.show}

    find_says, judge_says = rules("find"), rules("judge")
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(RuleSettings)]
    assert {flag: judge_says[flag] for flag in flags} == {flag: find_says[flag] for flag in flags}


# -- benchmark results


def result(concurrency: int | None = 10, **changes: Any) -> dict[str, Any]:
    """As ``vllm bench serve`` writes it, shortened."""
    n = concurrency or 1
    return {
        "date": "20261120-100000",
        "backend": "openai-chat",
        "model_id": "Qwen/Qwen3-8B",
        "num_prompts": 10 * n,
        "request_rate": "inf",
        "max_concurrency": concurrency,
        "duration": 9.5,
        "completed": 10 * n,
        "failed": 0,
        "request_throughput": float(min(n, 40)),
        "output_throughput": 128.0 * min(n, 40),
        "mean_ttft_ms": 20.0 * n,
        "median_ttft_ms": 18.0 * n,
        "p99_ttft_ms": 60.0 * n,
        **changes,
    }


def results_in(folder: Path, *documents: Any) -> str:
    folder.mkdir(exist_ok=True)
    for place, document in enumerate(documents):
        (folder / f"result_{place}.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return str(folder)


def test_the_guides_own_result_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results_in(tmp_path / "concurrency_results", *(result(n) for n in (1, 2, 5, 10, 20, 50, 100)))
    status, verdict = judged([folder, "--min-gain", "0", "--write"], capsys)
    assert status == 0
    assert (verdict["measured_max_concurrency"], verdict["binding"], verdict["sure"]) == (50, "ttft", False)
    assert verdict["half_of_failing"] == 50
    last = verdict["levels"][-1]
    assert (last["verdict"], last["reason"]) == ("FAIL", "mean TTFT 2000 ms > 1000 ms")
    assert (last["p50_ttft_ms"], last["p99_ttft_ms"], last["p95_ttft_ms"]) == (1800.0, 6000.0, None)
    assert verdict["claim"].startswith("50 held: n = 500, mean TTFT 1000 ms ≤ 1000 ms; 100 failed: mean TTFT 2000 ms")
    limits = loads((tmp_path / "concurrency_results/limits.toml").read_text(), "limits.toml")
    assert limits.evidence is not None
    assert (limits.evidence.endpoint, limits.evidence.model) == ("chat", "Qwen/Qwen3-8B")
    assert judged([folder, "--min-gain", "0"], capsys)[1] == verdict


def test_levels_of_a_run_are_benchmark_results(measured: Path, tmp_path: Path) -> None:
    verdict = verdict_in(measured)
    (tmp_path / "flat").mkdir()
    for file in sorted((measured / "levels").glob("*/result.json")):
        shutil.copy(file, tmp_path / f"flat/concurrency_{file.parent.name.partition('-c')[2]}.json")
    assert main(["judge", str(tmp_path / "flat"), "--max-ttft-ms", "1500", "--min-gain", "0", "--quiet"]) == 0
    assert verdict.measured_max_concurrency is not None


@pytest.mark.parametrize(
    ("changes", "flags", "verdict", "reason"),
    [
        ({}, [], "PASS", "mean TTFT 200 ms ≤ 1000 ms"),
        ({"completed": 94, "failed": 6}, [], "FAIL", "success 94 % of 100 < 95 %"),
        ({"completed": 95, "failed": None}, [], "PASS", "mean TTFT 200 ms ≤ 1000 ms"),
        ({"completed": 0, "failed": 100, "request_throughput": 0.0}, [], "FAIL", "success 0 % of 100 < 95 %"),
        ({}, ["--ttft-stat", "p99", "--max-ttft-ms", "599"], "FAIL", "p99 TTFT 600 ms > 599 ms"),
        ({}, ["--slo", "ttft:p50:100"], "FAIL", "p50 TTFT 180 ms > 100 ms"),
        ({}, ["--slo", "tpot:p99:1"], "PASS", "mean TTFT 200 ms ≤ 1000 ms"),
        # Where nothing streams the limit holds for the end-to-end time.
        ({"mean_ttft_ms": 0.0, "mean_e2el_ms": 1200.0}, [], "FAIL", "mean E2EL 1200 ms > 1000 ms"),
    ],
)
def test_point_values_against_the_rules(
    changes: dict[str, Any],
    flags: list[str],
    verdict: str,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, said = judged([results_in(tmp_path / "results", result(10, **changes)), *flags], capsys)
    (level,) = said["levels"]
    assert (level["verdict"], level["reason"], level["sure"]) == (verdict, reason, False)


def test_results_at_a_rate_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results_in(tmp_path / "results", result(1), result(2), result(5, request_rate=20.0), {"other": "JSON"})
    _, verdict = judged([folder], capsys)
    assert [level["concurrency"] for level in verdict["levels"]] == [1, 2]
    assert "left out, as a request rate held them back: result_2.json" in verdict["notes"]


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "holds neither a run (levels/) nor closed-loop results"),
        (["{"], "result_0.json cannot be read as a benchmark result"),
        ([{"request_throughput": "fast"}], "result_0.json cannot be read as a benchmark result"),
        ([result(None)], "result_0.json does not say its max_concurrency"),
        ([result(5), result(5)], "result_0.json and result_1.json are both at concurrency 5; keep one of them"),
        ([result(5, request_rate=3)], "holds neither a run"),
    ],
)
def test_results_that_cannot_be_used(
    documents: list[Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", results_in(tmp_path / "results", *documents)]) == 2
    assert said in capsys.readouterr().err


def test_folders_that_cannot_be_judged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    shutil.rmtree(run / "levels")
    (run / "levels").mkdir()
    assert main(["judge", str(run)]) == 2
    assert "holds no finished level" in capsys.readouterr().err
    (run / "run.toml").write_text(tomli_w.dumps({"schema": 1}))
    assert main(["judge", str(run)]) == 2
    assert "the settings cannot be read" in capsys.readouterr().err
