"""One engine as a child process: started on a free port, awaited, and gone when its parent is gone.

Theory of operation: the child's standard input is a pipe that nobody writes to. While the parent lives the pipe stays
open; when the parent closes it, exits, or is killed with SIGKILL, the kernel closes it and the child reads end of
file, which is its order to stop. (Linux could signal the child instead, with PR_SET_PDEATHSIG, but that fires when the
*thread* that started the child ends.) The child gets a session of its own, so that Ctrl-C in the terminal reaches the
parent alone: an engine that died first would look like a server that failed.
"""

import contextlib
import http.client
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from loadstone.core.errors import UnreachableError

_POLL_S = 0.02
_LOG_LINES = 5
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PRIVILEGED, _PORTS, _TRIES = 1024, 10_000, 64


@contextlib.contextmanager
def running_child(
    name: str,
    command: Callable[[int], Sequence[str]],
    log_path: Path,
    *,
    ready_timeout_s: float = 60.0,
    stop_timeout_s: float = 5.0,
) -> Iterator[str]:
    """Run ``command(port)`` until the ``with`` block ends; gives the base URL once ``/health`` answers 200.

    The command must serve HTTP on that port of the loopback and stop at the end of its standard input. Its output goes
    to ``log_path``. Raises UnreachableError, with the end of the log, where it dies or is not ready in time.
    """
    port = free_port()
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command(port), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            _await_ready(name, process, port, log_path, ready_timeout_s)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process, stop_timeout_s)


def free_port() -> int:
    """A port of the loopback that nobody listens on at this moment."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listens on at this moment."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(_listener()) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _listener() -> socket.socket:
    """On a port below those of outgoing connections: one of these would take it while an engine loads for minutes."""
    first = _first_outgoing_port()
    below = range(first - _PORTS, first)
    if below.start > _PRIVILEGED:
        for port in random.sample(below, _TRIES):
            with contextlib.suppress(OSError):
                return socket.create_server(("127.0.0.1", port))
    return socket.create_server(("127.0.0.1", 0))


def _first_outgoing_port() -> int:
    """0 where the system does not tell."""
    try:
        return int(_OUTGOING.read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _await_ready(name: str, process: subprocess.Popen[bytes], port: int, log_path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not healthy(port):
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(_POLL_S)
            raise UnreachableError(f"{name} ended with status {status} before it was ready; {_end_of(log_path)}")
        if time.monotonic() > deadline:
            raise UnreachableError(f"{name} was not ready after {timeout_s:.0f} s; {_end_of(log_path)}")


def healthy(port: int) -> bool:
    """Does ``/health`` answer 200 on that port of the loopback?"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end_of(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return f"the end of its log ({log_path}): " + " | ".join(lines[-_LOG_LINES:] or ["empty"])


def _stop(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End of file first, then SIGTERM, then SIGKILL; each with ``timeout_s`` to take effect."""
    if process.stdin is not None:
        process.stdin.close()
    for escalate in (process.terminate, process.kill):
        try:
            process.wait(timeout_s)
            return
        except subprocess.TimeoutExpired:
            escalate()
