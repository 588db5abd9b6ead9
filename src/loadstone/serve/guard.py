"""Runs an engine that does not watch its standard input, and leaves nothing of it behind.

    python -m loadstone.serve.guard [--stop-signal TERM] [--grace-s 5] -- COMMAND …

Theory of operation: a replica's order to stop is the end of its standard input, which the kernel closes even where the
parent was killed. A foreign engine does not read it, and starts processes of its own that outlive their first one. The
guard stands between: it starts the command in its own process group, with its own output, and waits. At the end of
its input, at SIGTERM, SIGINT or SIGHUP, and when the command has ended, it ends everything below it: the stop signal
for all, then SIGKILL for what is left. It is the reaper of all its descendants, so that one whose parent has died, or
that has made a session of its own, is still found.

Exit status: the command's (128 + the signal that ended it, as shells say); 0 where it was asked to stop.
"""

import argparse
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_KILL_WITHIN_S = 10.0
"""A process that waits for a device's driver cannot be killed at once."""
_LOOK_AGAIN_S = 0.02
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Guard:
    """One command and all that comes of it; ``run`` is its whole life."""

    def __init__(self, command: Sequence[str], stop_signal: signal.Signals, grace_s: float) -> None:
        self._command = command
        self._stop_signal = stop_signal
        self._grace_s = grace_s
        self._signalled, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._pid = 0
        self._status: int | None = None

    def __repr__(self) -> str:
        return f"<Guard of {self._command[0]} {self._pid} {'runs' if self._status is None else self._status}>"

    def run(self) -> int:
        """Start the command, wait for whatever ends it, end its processes; returns the exit status."""
        _adopt_orphans()
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (*_STOP, signal.SIGCHLD):
            signal.signal(number, _noted)
        try:
            self._pid = os.posix_spawnp(
                self._command[0],
                list(self._command),
                os.environ,
                file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
                setsigdef=[signal.SIGPIPE],  # Python ignores it, and what is ignored is inherited
            )
        except OSError as error:
            print(f"cannot start {self._command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        asked = self._wait()
        self._end_all()
        return 0 if asked or self._status is None else self._status

    def _wait(self) -> bool:
        """Until the command has ended (False) or is to end (True)."""
        while self._status is None:
            ready, _, _ = select.select([sys.stdin.fileno(), self._signalled], [], [])
            if self._signalled in ready and any(number in _STOP for number in self._signalled.recv(4096)):
                return True
            if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
                return True
            self._reap()
        return False

    def _end_all(self) -> None:
        for number, patience_s in ((self._stop_signal, self._grace_s), (signal.SIGKILL, _KILL_WITHIN_S)):
            deadline = time.monotonic() + patience_s
            told: set[psutil.Process] = set()
            while (alive := self._descendants()) and time.monotonic() < deadline:
                for process in alive - told:
                    _send(process, number)
                told |= alive
                time.sleep(_LOOK_AGAIN_S)

    def _descendants(self) -> set[psutil.Process]:
        self._reap()
        return set(psutil.Process().children(recursive=True))

    def _reap(self) -> None:
        """Take note of all children that have ended, adopted ones as well."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process instead of the machine's first one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _noted(_number: int, _frame: FrameType | None) -> None:
    """The signal's number has been written to the wake-up socket: ``_wait`` reads it there."""


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return


def _signal(name: str) -> signal.Signals:
    try:
        return signal.Signals[f"SIG{name.removeprefix('SIG')}"]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name} is no signal: give TERM, INT, QUIT or the like") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadstone.serve.guard")
    parser.add_argument("--stop-signal", type=_signal, default="TERM", help="asks the command to end")
    parser.add_argument("--grace-s", type=float, default=5.0, help="seconds that it then has before SIGKILL")
    parser.add_argument("command", nargs="+")
    told = parser.parse_args()
    sys.exit(Guard(told.command, told.stop_signal, told.grace_s).run())


if __name__ == "__main__":
    main()
