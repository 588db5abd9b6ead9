"""The mock server of the benches, compiled on the spot and pinned to a core of its own."""

import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mock:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def busy_s(self) -> float:
        """Seconds of work done so far; the rest of its core's time it polled for more."""
        with urllib.request.urlopen(f"{self.url}/busy") as reply:
            return int(reply.read()) / 1e9

    def stamps_requests(self) -> bool:
        """False at first: the kernel begins to stamp packets a moment after the first socket asks."""
        with urllib.request.urlopen(f"{self.url}/stream/1/1") as reply:
            return b'"rx":0' not in reply.read()


@contextmanager
def running_mock(core: int, *, sleeps: bool = False) -> Iterator[Mock]:
    """Compile ``mock.c`` with gcc and serve on a free port of 127.0.0.1 until the block ends.

    ``sleeps`` leaves the core to others while there is nothing to do.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "mock")
        subprocess.run(["gcc", "-O2", "-o", binary, Path(__file__).with_name("mock.c")], check=True)
        command = ["taskset", "-c", str(core), str(binary), *(["sleep"] if sleeps else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                mock = Mock(port=int(server.stdout.readline()))
                while not mock.stamps_requests():
                    time.sleep(0.05)
                yield mock
            finally:
                server.kill()
