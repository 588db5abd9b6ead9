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
from dataclasses import dataclass
from pathlib import Path

from loadstone.core.errors import UsageError
from loadstone.serve.child import running_child
from loadstone.serve.cores import available_cores, pinned_to

MODEL_NAME = "loadstone-tiny-random"
DEFAULT_CONTEXT_TOKENS = 4096
"""Of one slot. llama.cpp lowers it to what the model was made for."""
_HTTP_THREADS = 256
"""Each open connection occupies one thread: with fewer, /metrics and /health wait behind the streams."""
_WARNINGS = 2
"""llama.cpp's log level: at the next one it writes a line for each request."""


@dataclass(frozen=True)
class Slots:
    """How one llama.cpp server runs."""

    parallel: int
    """Requests decoded together; what comes beyond them waits inside the engine."""
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    """Room of each of them, prompt and reply together."""
    cores: frozenset[int] = frozenset()
    """Cores that it computes on, a thread each; all that it may run on where none is named."""
    alias: str = MODEL_NAME
    """What clients call the model; llama.cpp answers to any name."""
    reuse_prompts: bool = False
    """Keep the beginning of a slot's last prompt for the next one: right for a service. A measurement must not, as a
    prompt seen before has to cost what a new one costs, or the later levels look better."""


@contextlib.contextmanager
def running_engine(
    model_path: Path, *, parallel: int, context_tokens: int, cores: frozenset[int], log_path: Path
) -> Iterator[str]:
    """Run llama.cpp on ``model_path`` for the length of the ``with`` block, as it is to be measured; gives its base URL
    once it is ready. Raises UsageError where xllamacpp is not installed, UnreachableError where the engine dies or
    does not get ready.
    """
    check_installed()
    slots = Slots(parallel, context_tokens, cores)
    with running_child("llama.cpp", lambda port: command(model_path, port, slots), log_path) as base_url:
        yield base_url


def check_installed() -> None:
    """Raises UsageError where xllamacpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError("the embedded engine needs xllamacpp: pip install 'loadstone[llamacpp]'")


def command(model_path: Path, port: int, slots: Slots) -> list[str]:
    """The command line that serves ``model_path`` on ``port`` of the loopback until standard input is closed."""
    told = [
        *(sys.executable, "-m", __spec__.name, "--model", str(model_path), "--port", str(port)),
        *("--parallel", str(slots.parallel), "--context-tokens", str(slots.context_tokens), "--alias", slots.alias),
    ]
    if slots.cores:
        told += ["--cores", ",".join(map(str, sorted(slots.cores)))]
    return [*told, "--reuse-prompts"] if slots.reuse_prompts else told


def serve(model_path: Path, port: int, slots: Slots) -> None:
    """Serve on ``port`` of the loopback until standard input is closed: the body of the child process."""
    xllamacpp = importlib.import_module("xllamacpp")
    cores = slots.cores or available_cores()
    params = xllamacpp.CommonParams()
    params.model.path = str(model_path)
    params.model_alias = {slots.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots.parallel
    params.n_ctx = slots.parallel * slots.context_tokens
    params.n_threads_http = _HTTP_THREADS
    params.cpuparams.n_threads = len(cores)
    params.cpuparams_batch.n_threads = len(cores)
    params.endpoint_metrics = True
    params.verbosity = _WARNINGS
    params.cache_prompt = slots.reuse_prompts
    params.cache_ram_mib = 0  # else it keeps the prompts of all slots in up to 8 GiB
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
    parser.add_argument("--context-tokens", type=int, default=DEFAULT_CONTEXT_TOKENS, help="of each slot")
    parser.add_argument("--alias", default=MODEL_NAME, help="what clients call the model")
    parser.add_argument("--cores", type=_cores, default=frozenset(), help="comma-separated core numbers")
    parser.add_argument("--reuse-prompts", action="store_true", help="keep the beginning of a prompt for the next one")
    told = parser.parse_args()
    slots = Slots(told.parallel, told.context_tokens, told.cores, told.alias, told.reuse_prompts)
    serve(told.model, told.port, slots)


if __name__ == "__main__":
    main()
