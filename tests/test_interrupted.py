"""A search that is stopped, killed or out of disk loses nothing that it had measured, and goes on with --resume."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

import servers
from loadstone.cli.main import main
from loadstone.measure.runs import open_run
from servers import Asked, Peer, serving

FLAGS = ["--levels", "1,2", "--random-input-len", "8", "--random-output-len", "4", "--max-level-seconds", "0.4"]
WRITTEN_ONCE = ("records.jsonl.zst", "telemetry.jsonl.zst", "result.json")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def searching(url: str) -> Iterator["subprocess.Popen[str]"]:
    """``loadstone find`` as a process of its own."""
    argv = [sys.executable, "-m", "loadstone", "find", "--base-url", url, "--out", "run", *FLAGS]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_first_level(process: "subprocess.Popen[str]") -> None:
    """Read progress until the first level has been decided."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if line.split(maxsplit=1)[0].isupper():
            return
    raise AssertionError(f"the search ended by itself: {''.join(lines)}")


def standing() -> dict[str, bytes]:
    """Everything that was written for the levels that stand."""
    folders = [result.parent for result in Path("run/levels").glob("*/result.json")]
    return {f"{folder.name}/{name}": (folder / name).read_bytes() for folder in folders for name in WRITTEN_ONCE}


def resumed() -> dict[str, bytes]:
    """Go on to the end. A machine that starves the generator makes levels INVALID (4), which is no failure here."""
    assert main(["find", "--resume", "run", "--quiet"]) in (0, 4)
    verdict = json.loads(Path("run/verdict.json").read_text())
    folders = sorted(result.parent.name for result in Path("run/levels").glob("*/result.json"))
    assert [f"{row['ordinal']:03d}-c{row['concurrency']}" for row in verdict["levels"]] == folders
    assert {row["concurrency"] for row in verdict["levels"]} <= {1, 2}
    assert Path("run/report.html").is_file()
    return standing()


def test_ctrl_c_leaves_a_readable_run_that_resumes() -> None:
    with serving(token_s=0.005) as server:
        with searching(server.url) as process:
            until_first_level(process)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        assert (process.returncode, out) == (130, "")
        assert err.endswith("loadstone: interrupted; go on with: loadstone find --resume run\n")
        assert "Traceback" not in err
        assert main(["report", "run"]) == 0
        before = standing()
        assert len(open_run("run").levels()) == len(before) // len(WRITTEN_ONCE) >= 1
        assert before.items() <= resumed().items()


def test_ctrl_c_before_anything_is_measured() -> None:
    started: Future[subprocess.Popen[str]] = Future()

    async def interrupts(asked: Asked, peer: Peer) -> None:
        (await asyncio.wrap_future(started)).send_signal(signal.SIGINT)
        await servers.hangs(asked, peer)

    with serving(interrupts) as server, searching(server.url) as process:
        started.set_result(process)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "loadstone: interrupted\n")
    assert not Path("run").exists()


def test_a_killed_search_resumes_and_runs_a_torn_level_again() -> None:
    with serving(token_s=0.005) as server:
        with searching(server.url) as process:
            until_first_level(process)
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = standing()
        assert before
        for concurrency in (1, 2):
            torn = Path(f"run/levels/{len(open_run('run').levels()) + 1:03d}-c{concurrency}")
            torn.mkdir(exist_ok=True)
            (torn / "records.jsonl.zst").write_bytes(b"half a frame")
        assert before.items() <= resumed().items()


SECOND = [Path(f"run/levels/002-c{concurrency}/records.jsonl.zst") for concurrency in (1, 2)]


def fill_second_level() -> None:
    """Once the first level stands, the second one's records are to be written to a full disk."""
    if list(Path("run/levels").glob("001-*/result.json")):
        for records in SECOND:
            records.parent.mkdir(exist_ok=True)
            if not records.is_symlink():
                records.symlink_to("/dev/full")


def test_a_full_disk_stops_the_search_and_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    has_space = threading.Event()

    async def fills_the_disk(asked: Asked, peer: Peer) -> None:
        if not has_space.is_set():
            fill_second_level()
        await servers.well(asked, peer)

    with serving(fills_the_disk, token_s=0.005) as server:
        assert main(["find", "--base-url", server.url, "--out", "run", *FLAGS]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("loadstone: run/levels/002-c")
        assert last.endswith(
            "records.jsonl.zst cannot be written (No space left on device); "
            "the levels before it stand: free some space and go on with --resume"
        )
        before = standing()
        assert len(open_run("run").levels()) == 1
        assert Path("run/verdict.json").is_file()
        has_space.set()
        for records in SECOND:
            records.unlink()
            records.parent.rmdir()
        assert before.items() <= resumed().items()


def test_a_limit_of_file_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import resource, sys; from loadstone.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY)); sys.exit(main(sys.argv[1:]))"
    )
    with serving(token_s=0.005) as server:
        argv = [sys.executable, "-c", script, "find", "--base-url", server.url, "--out", "run", "--quiet", *FLAGS]
        ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert "(File too large)" in ended.stderr
    assert "raise the limit of file sizes (ulimit -f) and go on with --resume" in ended.stderr
