"""The processes of the gate's bench: each pinned to a core, each ended with its ``with`` block."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
from gate_peers import write_nginx_conf

from loadstone.serve.child import free_port

_READY_S = 20.0
_END_S = 5.0
_KEEPALIVE = 128
_PLENTY = "1000000000"
NOTHING_REFUSED = (
    *("--max-concurrency", "100000", "--max-queue", "100000", "--queue-timeout-s", "600"),
    *("--request-timeout-s", "600", "--max-output-tokens", "100000", "--max-tokens-in-flight", _PLENTY),
    *("--requests-per-minute", _PLENTY, "--requests-per-hour", _PLENTY, "--tokens-per-minute", _PLENTY),
)
"""Every limit and quota is in force and counted, none is ever reached."""


@dataclass(frozen=True)
class Server:
    """A server that listens on a port of the loopback. ``pids`` are the processes that do its work."""

    name: str
    port: int
    pids: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu_s(self) -> float:
        """User and system time so far."""
        times = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(time.user + time.system for time in times)

    def rss_mb(self) -> float:
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids) / 1e6

    def open_files(self) -> int:
        return sum(psutil.Process(pid).num_fds() for pid in self.pids)


Launch = Callable[[int, int], AbstractContextManager[Server]]
"""(core, port of the upstream) → a proxy before it."""


@contextlib.contextmanager
def running_gate(core: int, upstreams: Sequence[int | str], *flags: str) -> Iterator[Server]:
    """``loadstone gate`` before these ports (or URLs), with these flags."""
    urls = [f"http://127.0.0.1:{port}" if isinstance(port, int) else port for port in upstreams]
    command = [sys.executable, "-m", "loadstone", "gate", "--port", "0", *flags]
    command += [word for url in urls for word in ("--upstream", url)]
    with _announced("loadstone", command, core) as server:
        yield server


def gate(core: int, upstream_port: int) -> AbstractContextManager[Server]:
    """Everything on, nothing refused, no access log."""
    return running_gate(core, [upstream_port], *NOTHING_REFUSED)


@contextlib.contextmanager
def nginx(core: int, upstream_port: int, *, streams: bool = False) -> Iterator[Server]:
    """nginx with one worker."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        conf = write_nginx_conf(Path(folder), port, upstream_port, keepalive=_KEEPALIVE, streams=streams)
        with _running("nginx", [program, "-p", folder, "-c", str(conf)], core, subprocess.DEVNULL) as (process, _):
            _await(lambda: _listens(port) and bool(psutil.Process(process.pid).children()), "nginx")
            workers = tuple(child.pid for child in psutil.Process(process.pid).children())
            yield Server("nginx", port, workers)


def streaming_nginx(core: int, upstream_port: int) -> AbstractContextManager[Server]:
    """nginx with ``proxy_buffering off``."""
    return nginx(core, upstream_port, streams=True)


def aiohttp_proxy(core: int, upstream_port: int) -> AbstractContextManager[Server]:
    """The proxy of ``gate_peers.py``."""
    command = [sys.executable, str(Path(__file__).with_name("gate_peers.py")), str(upstream_port)]
    return _announced("aiohttp", command, core)


def sim(core: int, *flags: str) -> AbstractContextManager[Server]:
    """``loadstone sim`` with these flags."""
    return _announced("sim", [sys.executable, "-m", "loadstone", "sim", *flags], core)


@contextlib.contextmanager
def _announced(name: str, command: Sequence[str], core: int) -> Iterator[Server]:
    """A process that says ``ready on http://HOST:PORT`` on its standard output."""
    with _running(name, command, core, subprocess.PIPE) as (process, log):
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        found = re.search(r"ready on http://[\d.]+:(\d+)", line)
        if found is None:
            process.wait(_END_S)
            raise RuntimeError(f"{name} did not start: {line}{log.read_text(encoding='utf-8')[-2000:]}")
        yield Server(name, int(found[1]), (process.pid,))


@contextlib.contextmanager
def _running(
    name: str, command: Sequence[str], core: int, stdout: int
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """A process of a session of its own, so that Ctrl-C reaches it only through us; and the file of its errors.

    Were we killed, it would be terminated.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, f"{name}.log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", str(core), *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=errors,
                start_new_session=True,
            )
        try:
            yield process, log
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate; kill what has not ended in time."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _await(true: Callable[[], bool], name: str) -> None:
    until_s = time.monotonic() + _READY_S
    while not true():
        if time.monotonic() > until_s:
            raise RuntimeError(f"{name} was not ready after {_READY_S:.0f} s")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
