"""Loadstone's own commands as processes, for tests with real clients and real engines."""

import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

LOADSTONE = Path(sys.executable).parent / "loadstone"
NO_QUOTAS = ("--requests-per-minute", 0, "--requests-per-hour", 0)
MODEL = "loadstone-sim"
CHAT = "/v1/chat/completions"

_PATIENCE_S = 30.0
_LOOK_AGAIN_S = 0.005

T = TypeVar("T")


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class Running:
    """A command that serves HTTP at ``url``."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url
        self.killed = False

    def kill(self) -> None:
        """``kill -9``."""
        self.killed = True
        self.process.kill()

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def stats(self) -> dict[str, Any]:
        """``/stats`` of a gate."""
        document: dict[str, Any] = fetch(self.url, "/stats").document
        return document

    def outcomes(self) -> dict[str, int]:
        """Those that have happened; checks that they account for every request."""
        stats = self.stats()
        counts: dict[str, int] = {name: count for name, count in stats["outcomes"].items() if count}
        assert sum(counts.values()) == stats["received"] - stats["in_flight"] - stats["queued"]
        return counts

    def in_engine(self, *figures: str) -> float:
        """Sum of ``figures`` in the engine's ``/metrics``; of vLLM's names, what runs and what waits inside."""
        return engine_figure(self.url, *figures or ("vllm:num_requests_running", "vllm:num_requests_waiting"))


@contextmanager
def running(*words: object, patience_s: float = _PATIENCE_S, **environment: str) -> Iterator[Running]:
    """Run ``loadstone WORDS`` until the block ends. Its log is printed, and must hold no traceback.

    ``patience_s`` is the longest that it may take to be ready, and to stop.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [LOADSTONE, *map(str, words)], stdout=subprocess.PIPE, stderr=log, text=True, env=clean() | environment
        )
        try:
            command = Running(process, _ready(process, patience_s))
            yield command
            if not command.killed:
                process.terminate()
                assert process.wait(patience_s) == 0
        finally:
            process.kill()
            process.communicate()
            log.seek(0)
            text = log.read()
            print(f"--- loadstone {' '.join(map(str, words))}\n{text}", file=sys.stderr)
        assert "Traceback" not in text


def gate_before(*upstreams: str | Running, options: tuple[object, ...] = (), **environment: str) -> Any:
    """``running`` a gate on a free port."""
    urls = [one.url if isinstance(one, Running) else one for one in upstreams]
    given = [word for url in urls for word in ("--upstream", url)]
    return running("gate", "--port", 0, *given, *options, **environment)


def simulated(*options: object, port: int = 0) -> Any:
    """``running`` a simulated engine: 10 ms and a little for each token."""
    return running("sim", "--port", port, *options)


def loadstone(*words: object) -> "subprocess.CompletedProcess[str]":
    """A command that ends by itself; what it says on standard error is printed."""
    done = subprocess.run(
        [LOADSTONE, *map(str, words)], capture_output=True, text=True, check=False, env=clean(), timeout=300
    )
    print(f"--- loadstone {' '.join(map(str, words))}\n{done.stderr}", file=sys.stderr)
    assert "Traceback" not in done.stderr
    return done


def clean() -> dict[str, str]:
    """The environment, without settings of the caller's that would change what is tested."""
    ours = ("LOADSTONE_", "OPENAI_", "MAX_", "WORKERS", "THREADS", "GPU_MEMORY_", "TENSOR_PARALLEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def chat(tokens: int = 4, *, model: str = MODEL, **more: Any) -> dict[str, Any]:
    """A request body."""
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens} | more


def fetch(
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    patience_s: float = _PATIENCE_S,
) -> Answer:
    """GET, or POST where there is a ``body``. Raises TimeoutError where no byte comes for ``patience_s``."""
    with open_reply(url, path, body, headers, patience_s=patience_s) as reply:
        return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())


@contextmanager
def open_reply(
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    patience_s: float = _PATIENCE_S,
) -> Iterator[http.client.HTTPResponse]:
    """A reply whose head has come; leaving the block hangs up."""
    where = urlsplit(url)
    assert where.hostname is not None
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=patience_s)
    try:
        given = {"Content-Type": "application/json"} | dict(headers or {})
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), given)
        with connection.getresponse() as reply:
            yield reply
    finally:
        connection.close()


def engine_figure(url: str, *names: str) -> float:
    """Sum of these figures in ``/metrics``."""
    told = fetch(url, "/metrics").body.decode().splitlines()
    lines = [line for line in told if line.partition(" ")[0].partition("{")[0] in names]
    assert lines, f"no {' or '.join(names)} in the metrics of {url}"
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def until(reached: Callable[[], T], patience_s: float = _PATIENCE_S) -> T:
    """Ask again and again until the answer is yes."""
    deadline = time.monotonic() + patience_s
    while not (answer := reached()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(_LOOK_AGAIN_S)
    return answer


def _ready(process: "subprocess.Popen[str]", patience_s: float) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], patience_s)[0], "it says nothing"
    line = process.stdout.readline()
    assert "ready on" in line, f"it is not ready: {line!r}"
    return line.partition("ready on ")[2].split()[0]
