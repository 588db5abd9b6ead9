"""One engine's process in an asyncio loop: started in a group of its own, its end noticed, nothing of it left behind.

The loop hears of the end through a pidfd, which works on every loop and reaps nobody else's children, and is closed to
mistakes about process numbers that are used again.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from loadstone.serve.engine_log import EngineLog


class EngineProcess:
    """A running engine. The end of its standard input is its order to stop; the kernel gives it when this one dies.

    The session of its own keeps Ctrl-C in the terminal from it: an engine that ended before the gate has drained would
    look like one that failed. Raises OSError where the command cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: EngineLog) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        """Its exit status; of a signal, minus its number."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log.begin(),
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._on_end)

    def __repr__(self) -> str:
        return f"<EngineProcess {self.pid} {self.ended.result() if self.ended.done() else 'runs'}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self, patience_s: float) -> None:
        """End of its input, then SIGTERM, then SIGKILL, ``patience_s`` after one another; returns when it is gone."""
        try:
            self._close_input()
            for number in (signal.SIGTERM, signal.SIGKILL):
                done, _ = await asyncio.wait({self.ended}, timeout=patience_s)
                if done:
                    return
                self._signal_group(number)
            await asyncio.wait({self.ended}, timeout=patience_s)
        finally:
            # Also where the wait was cancelled. What cannot even be killed waits for a driver in the kernel.
            if not self.ended.done():
                self._signal_group(signal.SIGKILL)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Before its status is taken: until then its number, which is its group's as well, belongs to nobody else.
        self._signal_group(signal.SIGKILL)
        self._close_input()
        self.ended.set_result(self._process.wait())

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
