"""The supervisor with real processes, on each loop: what starts, fails, crashes, hangs, and that nothing is left."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from loadstone.core.errors import UnreachableError
from loadstone.serve.engine_log import EngineLog
from loadstone.serve.lifecycle import Patience, State
from loadstone.serve.replica import Replica, ReplicaPlan
from loadstone.serve.supervisor import Supervisor
from pids import all_gone
from upstream_heard import Run

STAND_IN = Path(__file__).parent / "stand_in.py"
QUICK = Patience(first_backoff_s=0.01, most_backoff_s=0.02, probe_every_s=0.02)
MEMORY = (
    r"CUDA out of memory: lower --max-concurrency \(MAX_CONCURRENT\) to 2, --max-output-tokens \(max_tokens\) to 256"
)


class Supervised:
    """A supervisor, what it has said, and a way to wait for it."""

    def __init__(self, folder: Path, *words: str, patience: Patience = QUICK, ready_timeout_s: float = 20.0) -> None:
        self.said: list[str] = []
        self._changed = asyncio.Event()
        plans = [
            ReplicaPlan(f"engine {i}", stand_in(word), {"STAND_IN": "1"}, ready_timeout_s, folder / f"{i}.log")
            for i, word in enumerate(words, 1)
        ]
        self.supervisor = Supervisor(plans, time.monotonic_ns, self.said.append, self._changed.set, patience)

    @property
    def replicas(self) -> list[Replica]:
        return list(self.supervisor.replicas)

    async def until(self, true: Callable[[], bool]) -> None:
        """Something that a change of state, which there will be, makes true."""
        while not true():
            self._changed.clear()
            await self._changed.wait()


def stand_in(words: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, str(STAND_IN), str(port), *words.split()]


@contextlib.asynccontextmanager
async def started(folder: Path, *words: str, patience: Patience = QUICK) -> AsyncIterator[Supervised]:
    """All of them up."""
    supervised = Supervised(folder, *words, patience=patience)
    await supervised.supervisor.start()
    try:
        await supervised.until(lambda: all(replica.state is State.UP for replica in supervised.replicas))
        yield supervised
    finally:
        await supervised.supervisor.stop()


async def get(replica: Replica, path: str) -> bytes:
    """What the engine answers; empty where it hangs up."""
    url = urlsplit(replica.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"GET %b HTTP/1.0\r\n\r\n" % path.encode())
    try:
        return (await reader.read()).partition(b"\r\n\r\n")[2]
    except ConnectionError:
        return b""
    finally:
        writer.close()


def pid_of(replica: Replica) -> int:
    assert replica.pid is not None
    return replica.pid


def test_all_are_started_and_all_are_gone_after_stop(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "", "") as supervised:
            first, second = supervised.replicas
            assert first.url != second.url
            document = supervised.supervisor.document()
            pids = [pid_of(replica) for replica in supervised.replicas]
            assert [told["pid"] for told in document] == pids
            assert [told["state"] for told in document] == ["up", "up"]
            assert all(told["up_s"] >= 0 and told["restarts"] == 0 and not told["last_error"] for told in document)
            assert "engine 1 http://127.0.0.1:" in repr(supervised.supervisor)
        assert all_gone(pids)
        assert [replica.state for replica in supervised.replicas] == [State.STOPPED] * 2
        await supervised.supervisor.stop()
        assert supervised.said == []

    run(main())


def test_start_is_over_with_the_first_that_is_ready(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        supervised = Supervised(tmp_path, "deaf", "")
        await supervised.supervisor.start()
        assert [replica.state for replica in supervised.replicas] == [State.STARTING, State.UP]
        await supervised.supervisor.stop()

    run(main())


def test_one_that_cannot_start_is_one_line_and_the_end_of_all(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        supervised = Supervised(tmp_path, "deaf", "fail")
        with pytest.raises(UnreachableError, match=rf"engine 2 ended before it was ready: {MEMORY}.*\(log: .*2\.log\)"):
            await supervised.supervisor.start()
        assert [replica.state for replica in supervised.replicas] == [State.STOPPED, State.FAILED]
        assert [replica.pid for replica in supervised.replicas] == [None, None]
        assert supervised.said == []

    run(main())


def test_one_that_is_not_ready_in_time_is_ended(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        supervised = Supervised(tmp_path, "deaf", ready_timeout_s=0.0)
        with pytest.raises(UnreachableError, match="engine 1 was not ready after 0 s: it still ran; it wrote nothing"):
            await supervised.supervisor.start()
        assert supervised.replicas[0].pid is None

    run(main())


def test_a_command_that_is_not_there_is_told(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        plan = ReplicaPlan("engine", lambda _: ["/no/such/engine"], {}, 1.0, tmp_path / "log")
        supervisor = Supervisor([plan], time.monotonic_ns, lambda _: None, lambda: None)
        with pytest.raises(UnreachableError, match=r"engine cannot be started: .*No such file.*'/no/such/engine'"):
            await supervisor.start()

    run(main())


def test_one_that_fails_while_others_serve_is_said_and_left(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        supervised = Supervised(tmp_path, "", "deaf")
        await supervised.supervisor.start()
        first, second = supervised.replicas
        os.kill(pid_of(second), signal.SIGKILL)
        await supervised.until(lambda: second.state is State.FAILED)
        await supervised.supervisor.stop()
        (line,) = supervised.said
        assert line.startswith("engine 2 ended before it was ready: killed with SIGKILL, most likely by the kernel")
        assert line.endswith("it is not started again")
        assert (first.state, second.state) == (State.STOPPED, State.FAILED)

    run(main())


def test_one_that_crashes_is_started_again_at_the_same_url(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "") as supervised:
            (replica,) = supervised.replicas
            url, pid = replica.url, pid_of(replica)
            for restarts in (1, 2):
                await get(replica, "/crash")
                await supervised.until(lambda n=restarts: replica.restarts == n and replica.state is State.UP)
            assert replica.url == url
            assert replica.pid != pid
            assert [line.partition(":")[0] for line in supervised.said] == [
                "engine 1 ended while it served",
                "engine 1 is up again",
            ] * 2
            assert "; it starts again in 0.01 s (log: " in supervised.said[0]
            assert "; it starts again in 0.02 s (log: " in supervised.said[2]
            assert replica.last_error == supervised.said[2]

    run(main())


def test_what_a_crashed_engine_leaves_in_its_group_is_gone(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "parent-here") as supervised:
            (replica,) = supervised.replicas
            left = int(await get(replica, "/children"))
            await get(replica, "/crash")
            await supervised.until(lambda: replica.restarts == 1 and replica.state is State.UP)
            assert all_gone([left])

    run(main())


def test_one_that_answers_no_more_is_stuck_and_started_again(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "", patience=replace(QUICK, stuck_after_s=1.0)) as supervised:
            (replica,) = supervised.replicas
            await get(replica, "/hang")
            await supervised.until(lambda: replica.state is State.STUCK)
            assert "engine 1 is stuck: GET /health has had no answer for 1 s" in replica.last_error
            await supervised.until(lambda: replica.state is State.UP)
            assert "check that the GPU works (nvidia-smi) and what is stuck" in supervised.said[0]
            assert supervised.said[1:] == ["engine 1 is up again"]

    run(main())


def test_one_that_the_gate_reports_as_stalled_is_started_again(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "", "") as supervised:
            first, second = supervised.replicas
            supervised.supervisor.report_stalled("http://127.0.0.1:1")
            supervised.supervisor.report_stalled(second.url)
            supervised.supervisor.report_stalled(second.url)
            await supervised.until(lambda: second.restarts == 1 and second.state is State.UP)
            assert first.restarts == 0
            assert supervised.said[0].startswith("engine 2 is stuck: requests run, but nothing has come of them")
            assert supervised.said[1:] == ["engine 2 is up again"]

    run(main())


@pytest.mark.parametrize("words", ["foreign", "stubborn", "stubborn parent-here"])
def test_stop_goes_as_far_as_it_must(run: Run, tmp_path: Path, words: str) -> None:
    async def main() -> None:
        async with started(tmp_path, words, patience=Patience(stop_s=0.05)) as supervised:
            (replica,) = supervised.replicas
            pids = [pid_of(replica), *map(int, (await get(replica, "/children")).split())]
        assert all_gone(pids)

    run(main())


def test_nothing_is_left_of_a_start_that_was_cancelled(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        supervised = Supervised(tmp_path, "deaf")
        start = asyncio.create_task(supervised.supervisor.start())
        await supervised.until(lambda: supervised.replicas[0].state is State.STARTING)
        pid = pid_of(supervised.replicas[0])
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert all_gone([pid])

    run(main())


def test_engines_get_the_environment_that_is_added_for_them(run: Run, tmp_path: Path) -> None:
    def plan(environment: Mapping[str, str]) -> ReplicaPlan:
        code = 'import os, sys; sys.exit(f\'{os.environ["GPU"]} {"PATH" in os.environ}\')'
        return ReplicaPlan("engine", lambda _: [sys.executable, "-c", code], environment, 9.0, tmp_path / "log")

    async def main() -> None:
        supervisor = Supervisor([plan({"GPU": "7"})], time.monotonic_ns, lambda _: None, lambda: None)
        with pytest.raises(UnreachableError, match="its last words: 7 True"):
            await supervisor.start()

    run(main())


def test_all_are_gone_when_the_parent_is_killed(tmp_path: Path) -> None:
    """A replica that watches its input, and a foreign engine under the guard with a child in a session of its own."""
    program = f"""
import asyncio, sys, time, uvloop, psutil
from pathlib import Path
from loadstone.serve.supervisor import Supervisor
from loadstone.serve.replica import ReplicaPlan
def own(port): return [sys.executable, {str(STAND_IN)!r}, str(port)]
def foreign(port): return [sys.executable, "-m", "loadstone.serve.guard", "--grace-s", "0.1", "--",
                           *own(port), "foreign", "stubborn", "parent"]
async def main():
    up = asyncio.Event()
    def changed():
        if [told["state"] for told in supervisor.document()] == ["up", "up"]:
            up.set()
    plans = [ReplicaPlan(c.__name__, c, {{}}, 20.0, Path({str(tmp_path)!r}) / c.__name__) for c in (own, foreign)]
    supervisor = Supervisor(plans, time.monotonic_ns, print, changed)
    await supervisor.start()
    await up.wait()
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    await asyncio.Event().wait()
uvloop.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
        assert len(pids) == 4, "own, the guard, foreign, foreign's child"
        assert all_gone(pids)


def test_the_log_is_cut_while_the_engine_writes_and_tells_of_this_run_alone(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "logs" / "engine.log", most_bytes=100)
    log.begin().write(b"an earlier run\n")
    assert log.end() == "an earlier run\n"
    with log.begin() as file:
        assert log.end() == ""
        file.write(b"x" * 90)
        log.trim()
        assert log.end() == ""
        file.write(b"the end\n")
        assert log.end() == "the end\n"
        assert log.path.read_text() == "the end\n"
        assert log.path.with_name("engine.log.1").read_text() == "rlier run\n" + "x" * 90
    assert repr(log) == f"<EngineLog {log.path}>"


def test_only_the_last_of_a_long_log_is_read_even_where_it_was_deleted(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "engine.log")
    assert log.end() == ""
    with log.begin() as file:
        file.write(b"begin" + b"x" * 70_000 + b"end")
        log.path.unlink()
        assert len(log.end()) == 64 * 1024
        assert log.end().endswith("xend")


def test_a_log_that_cannot_be_kept_is_said_and_the_engine_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: EngineLog) -> None:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        async with started(tmp_path, "") as supervised:
            monkeypatch.setattr(EngineLog, "trim", full)
            (replica,) = supervised.replicas
            while not supervised.said:
                await get(replica, "/health")
            assert replica.state is State.UP
        assert "engine 1: the older part of its log is lost: [Errno 28] No space left on device" in supervised.said

    run(main())
