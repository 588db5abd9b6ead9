"""llama.cpp's own OpenAI server, through xllamacpp, as a child process of Loadstone.

In a process of its own the engine can be pinned to cores that the generator leaves alone, and a crash in native code
is a message instead of the end of a run.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from loadstone.core.errors import UsageError
from loadstone.serve.child import running_child
from loadstone.serve.cores import pinned_to

MODEL_NAME = "loadstone-tiny-random"
_HTTP_THREADS = 256
"""Each open connection occupies one thread: with fewer, /metrics and /health wait behind the streams."""
_WARNINGS = 2
"""llama.cpp's log level: at the next one it writes a line for each request."""


@contextlib.contextmanager
def running_engine(
    model_path: Path, *, parallel: int, context_tokens: int, cores: frozenset[int], log_path: Path
) -> Iterator[str]:
    """Run llama.cpp on ``model_path`` for the length of the ``with`` block; gives its base URL once it is ready.

    ``parallel`` requests are decoded together, each with room for ``context_tokens``; what comes beyond them waits
    inside the engine. Raises UsageError where xllamacpp is not installed, UnreachableError where the engine dies or
    does not get ready.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError("the embedded engine needs xllamacpp: pip install 'loadstone[llamacpp]'")

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", __spec__.name, "--model", str(model_path), "--port", str(port)),
            *("--parallel", str(parallel), "--context-tokens", str(context_tokens)),
            *("--cores", ",".join(map(str, sorted(cores)))),
        ]

    with running_child("llama.cpp", command, log_path) as base_url:
        yield base_url


def serve(model_path: Path, port: int, parallel: int, context_tokens: int, cores: frozenset[int]) -> None:
    """Serve on ``port`` of the loopback until standard input is closed: the body of the child process."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model_path)
    params.model_alias = {MODEL_NAME}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = parallel
    params.n_ctx = parallel * context_tokens
    params.n_threads_http = _HTTP_THREADS
    params.cpuparams.n_threads = len(cores)
    params.cpuparams_batch.n_threads = len(cores)
    params.endpoint_metrics = True
    params.verbosity = _WARNINGS
    # A prompt seen before must cost what a new one costs, or the later levels of a measurement look better.
    params.cache_prompt = False
    params.cache_ram_mib = 0
    with pinned_to(cores):  # the engine's threads inherit it
        server = xllamacpp.Server(params)
    print("serving on", server.listening_address, file=sys.stderr, flush=True)
    # The other end of this pipe is the parent's: it closes when the parent closes it and when the parent is killed,
    # so no engine is ever left behind, whatever ends the parent.
    sys.stdin.buffer.read()
    os._exit(0)  # without waiting for the threads that still hold requests


def _cores(text: str) -> frozenset[int]:
    return frozenset(int(core) for core in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadstone.serve.engines.llamacpp")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True)
    parser.add_argument("--context-tokens", type=int, required=True)
    parser.add_argument("--cores", required=True, help="comma-separated core numbers")
    told = parser.parse_args()
    serve(told.model, told.port, told.parallel, told.context_tokens, _cores(told.cores))


if __name__ == "__main__":
    main()
