"""The guard with real processes: whatever ends it, nothing of its command is left."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from pids import all_gone

# Says its own number and its child's, a process in a session of its own; ends neither at SIGTERM nor with its input.
FAMILY = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(os.getpid(), child.pid, flush=True)
"""
PARENT_ENDS = f"{FAMILY}\nos._exit(5)"
PARENT_STAYS = f"{FAMILY}\nsignal.pause()"


@contextmanager
def guarded(*command: str, options: Sequence[str] = ("--grace-s", "0.05")) -> Iterator["subprocess.Popen[str]"]:
    guard = [sys.executable, "-m", "loadstone.serve.guard", *options, "--", *command]
    with subprocess.Popen(
        guard, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as it:
        try:
            yield it
        finally:
            it.kill()


def output(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def close_input(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_it_ends_with_its_commands_status(code: str, status: int) -> None:
    with guarded(sys.executable, "-c", code) as guard:
        assert guard.wait(20) == status


def test_the_commands_output_is_its_own() -> None:
    with guarded(sys.executable, "-c", "import sys; print('said', repr(sys.stdin.read()))") as guard:
        assert output(guard) == "said ''\n"
        assert guard.wait(20) == 0


@pytest.mark.parametrize("end", ["input", "SIGTERM", "SIGINT", "SIGHUP"])
def test_all_descendants_are_gone_when_it_is_asked_to_stop(end: str) -> None:
    with guarded(sys.executable, "-c", PARENT_STAYS) as guard:
        pids = [int(word) for word in output(guard).split()]
        if end == "input":
            close_input(guard)
        else:
            guard.send_signal(signal.Signals[end])
        assert guard.wait(20) == 0
        assert all_gone(pids)


def test_what_a_command_that_ended_has_left_is_gone_too() -> None:
    with guarded(sys.executable, "-c", PARENT_ENDS) as guard:
        pids = [int(word) for word in output(guard).split()]
        assert guard.wait(20) == 5
        assert all_gone(pids)


def test_the_command_may_choose_the_signal_and_take_its_time() -> None:
    code = """
import signal, sys
def end(*_):
    print("tidied up", flush=True)
    sys.exit()
signal.signal(signal.SIGQUIT, end)
print("ready", flush=True)
while True:
    signal.pause()
"""
    with guarded(sys.executable, "-c", code, options=("--stop-signal", "QUIT", "--grace-s", "20")) as guard:
        assert output(guard) == "ready\n"
        close_input(guard)
        assert output(guard) == "tidied up\n"
        assert guard.wait(20) == 0


def test_a_command_that_is_not_there_is_told_in_a_line() -> None:
    with guarded("/no/such/engine") as guard:
        assert output(guard) == "cannot start /no/such/engine: No such file or directory\n"
        assert guard.wait(20) == 127


def test_a_signal_that_is_none_is_refused() -> None:
    with guarded("true", options=("--stop-signal", "GENTLY")) as guard:
        assert guard.wait(20) == 2
        assert guard.stdout is not None
        assert "GENTLY is no signal: give TERM" in guard.stdout.read()
