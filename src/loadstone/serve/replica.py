"""One replica: its process, watched and started again. A thin shell around ``Lifecycle``."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.serve.advice import TIMEOUTS
from loadstone.serve.diagnosis import diagnose
from loadstone.serve.engine_log import EngineLog
from loadstone.serve.lifecycle import Lifecycle, Patience, State
from loadstone.serve.process import EngineProcess

_NS = 1_000_000_000
_PROBES_WITHIN_PATIENCE = 3
_STARTING_PROBE_S = 0.1


@dataclass(frozen=True)
class ReplicaPlan:
    """How one replica is run."""

    name: str
    """As messages call it."""
    command: Callable[[int], Sequence[str]]
    """From the port. It serves HTTP there on the loopback, answers GET /health with 200 once it takes requests, and
    ends at the end of its standard input."""
    environment: Mapping[str, str]
    """Added to this process's own."""
    ready_timeout_s: float
    log_path: Path


class Replica:
    """An engine at ``url``, the same after every restart."""

    def __init__(
        self,
        plan: ReplicaPlan,
        port: int,
        patience: Patience,
        clock_ns: Callable[[], int],
        say: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self.name = plan.name
        self.url = f"http://127.0.0.1:{port}"
        self.last_error = ""
        """The line that told why it last ended."""
        self._plan = plan
        self._port = port
        self._patience = patience
        self._clock_ns = clock_ns
        self._say = say
        self._on_change = on_change
        self._life = Lifecycle(patience, plan.ready_timeout_s)
        self._log = EngineLog(plan.log_path)
        self._process: EngineProcess | None = None
        self._given_up: asyncio.Future[str] | None = None

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.url} {self.state} pid {self.pid}>"

    @property
    def state(self) -> State:
        return self._life.state

    @property
    def restarts(self) -> int:
        return self._life.restarts

    @property
    def up_since_ns(self) -> int | None:
        return self._life.up_since_ns

    @property
    def pid(self) -> int | None:
        """Of its process; None where none runs."""
        return self._process.pid if self._process is not None else None

    def document(self) -> dict[str, Any]:
        """What /health tells of it."""
        up_since_ns = self.up_since_ns
        return {
            "name": self.name,
            "url": self.url,
            "state": str(self.state),
            "pid": self.pid,
            "restarts": self.restarts,
            "up_s": None if up_since_ns is None else (self._clock_ns() - up_since_ns) / _NS,
            "last_error": self.last_error,
            "log": str(self._log.path),
        }

    async def live(self) -> None:
        """Start it, and again whenever it has ended; returns when it has failed for good, as ``last_error`` tells."""
        while True:
            self._life.started(self._clock_ns())
            self._on_change()
            why = await self._run()
            now_ns = self._clock_ns()
            self._life.ended(now_ns)
            if self._life.restart_at_ns is None:
                self.last_error = self._line(why)
                self._on_change()
                return
            pause_s = (self._life.restart_at_ns - now_ns) / _NS
            self._report(f"{why}; it starts again in {pause_s:.2g} s")
            self._on_change()
            await asyncio.sleep(pause_s)

    async def stop(self) -> None:
        """End its process; nobody may be in ``live`` any more. Called again, it does nothing."""
        if self._process is not None:
            await self._process.stop(self._patience.stop_s)
            self._process = None
        self._log.close()
        if self.state is not State.STOPPED:
            self._life.stopped()
            self._on_change()

    def stalled(self) -> None:
        """It is up but gives nothing although requests run: end it and start it again."""
        if self._life.stalled():
            self._give_up(f"is stuck: requests run, but nothing has come of them for long; {TIMEOUTS}")

    def _give_up(self, why: str) -> None:
        assert self._given_up is not None
        if not self._given_up.done():
            self._given_up.set_result(why)

    async def _run(self) -> str:
        """One process from its start to its end; returns why it ended."""
        try:
            self._process = process = EngineProcess(self._plan.command(self._port), self._plan.environment, self._log)
        except OSError as error:
            return f"cannot be started: {error}"
        self._given_up = asyncio.get_running_loop().create_future()
        watching = asyncio.create_task(self._watch())
        any_of: set[asyncio.Future[Any]] = {process.ended, self._given_up, watching}
        try:
            await asyncio.wait(any_of, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
        if process.ended.done():
            when = "before it was ready" if self.state is State.STARTING else "while it served"
            why = f"ended {when}: {diagnose(process.ended.result(), self._log.end())}"
        else:
            if not self._given_up.done():
                watching.result()
            why = self._given_up.result()
            self.last_error = self._line(why)
            self._on_change()
            await process.stop(self._patience.stop_s)
        self._process = None
        return why

    async def _watch(self) -> None:
        """Probe it for as long as its process runs; give it up where it has not answered for too long."""
        timeout_s = self._patience.stuck_after_s / _PROBES_WITHIN_PATIENCE
        while True:
            answered = await healthy(self._port, timeout_s)
            was = self.state
            if answered:
                self._answered()
            elif self._life.unanswered(self._clock_ns()):
                self._give_up(self._no_answer(was))
            self._trim_log()
            await asyncio.sleep(_STARTING_PROBE_S if self.state is State.STARTING else self._patience.probe_every_s)

    def _trim_log(self) -> None:
        try:
            self._log.trim()
        except OSError as error:  # a full disk is no reason to watch the engine no more
            self._say(f"{self.name}: the older part of its log is lost: {error}")

    def _answered(self) -> None:
        if self._life.answered(self._clock_ns()):
            if self.restarts:
                self._say(f"{self.name} is up again")
            self._on_change()

    def _no_answer(self, was: State) -> str:
        if was is State.STARTING:
            return f"was not ready after {self._plan.ready_timeout_s:.0f} s: {diagnose(None, self._log.end())}"
        return f"is stuck: GET /health has had no answer for {self._patience.stuck_after_s:.0f} s; {TIMEOUTS}"

    def _report(self, what: str) -> None:
        self.last_error = self._line(what)
        self._say(self.last_error)

    def _line(self, what: str) -> str:
        return f"{self.name} {what} (log: {self._log.path})"


async def healthy(port: int, timeout_s: float) -> bool:
    """Does GET /health on this port of the loopback answer 200 within ``timeout_s``?"""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n" % port)
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.split(b" ", 2)[1:2] == [b"200"]
