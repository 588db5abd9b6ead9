"""Scores from a vLLM of our own, over loopback.

vLLM gets tokens, not texts: the prompt, what is read of a long document and the errors are then the same as on every
engine. It batches by itself, so each request goes to it at once, and a client that leaves hangs up on vLLM as well.
"""

import asyncio
import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from loadstone.core.engine import EngineError
from loadstone.core.errors import UnreachableError
from loadstone.core.target import Exchange, Request
from loadstone.serve.batching import Done
from loadstone.serve.child import healthy
from loadstone.serve.commands import guarded
from loadstone.serve.engines.qwen_prompt import QwenPrompt
from loadstone.serve.pairs import Pair, Score, Tokenised, scored
from loadstone.wire.client import HttpTarget, connect_target
from loadstone.wire.clock import MonotonicClock

_LONGEST_REQUEST_S = 3600.0
"""The gate in front cuts requests; this only ends what nobody waits for."""
_POLL_S = 0.1
_STOP_S = 15.0
_NS = 1e9


class _Class(msgspec.Struct):
    probs: list[float]


class _Classes(msgspec.Struct):
    data: list[_Class]


@contextlib.contextmanager
def running_vllm(command: Sequence[str], port: int, ready_timeout_s: float) -> Iterator[str]:
    """Run vLLM's ``command``, which serves on ``port``, for the length of the block; gives its base URL once it is
    ready. It writes to this process's output. Should it end within the block, this process gets SIGTERM.

    Raises UnreachableError where it ends or is not ready in time.
    """
    with subprocess.Popen(guarded(command), stdin=subprocess.PIPE) as process:
        try:
            _await_health(process, port, ready_timeout_s)
            threading.Thread(target=_end_with, args=(process,), daemon=True).start()
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


class VllmScores:
    """Scores of Qwen3-Reranker from the vLLM at ``base_url``; ``threads`` tokenise."""

    def __init__(self, base_url: str, model: str, prompt: QwenPrompt, threads: int) -> None:
        self._base_url = base_url
        self._model = model
        self._prompt = prompt
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")
        self._clock: MonotonicClock | None = None
        self._target: HttpTarget | None = None
        self._running = 0
        self._answered = 0

    async def start(self) -> None:
        self._clock = MonotonicClock(asyncio.get_running_loop())
        self._target = await connect_target(self._base_url, self._clock, timeout_s=_LONGEST_REQUEST_S)

    async def stop(self) -> None:
        if self._target is not None and self._clock is not None:
            self._target.close()
            self._clock.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Where vLLM ends, this process ends with it."""
        return self._target is not None

    async def submit(self, items: Sequence[Pair]) -> list[Done[Score]]:
        """The scores of ``items`` in order. vLLM's own queue is part of the inference time. Raises EngineError."""
        assert self._target is not None, "start() comes first"
        started_ns = time.monotonic_ns()
        pairs = await asyncio.get_running_loop().run_in_executor(self._pool, self._tokenise, items)
        body = msgspec.json.encode({"model": self._model, "input": [pair.ids for pair in pairs]})
        sent_ns = time.monotonic_ns()
        self._running += len(pairs)
        try:
            exchange = await self._target.send(Request("/classify", body, 0, sequences=len(pairs)))
        finally:
            self._running -= len(pairs)
        scores = _scores(exchange, pairs)
        self._answered += len(pairs)
        tokenise_s, inference_s = (sent_ns - started_ns) / _NS, (time.monotonic_ns() - sent_ns) / _NS
        return [Done(score, tokenise_s, 0.0, inference_s) for score in scores]

    def figures(self) -> dict[str, int]:
        """Pairs in vLLM now, and those answered since the start."""
        return {"running": self._running, "items": self._answered}

    def _tokenise(self, items: Sequence[Pair]) -> list[Tokenised]:
        return [self._prompt.tokenise(item) for item in items]

    def __repr__(self) -> str:
        return f"<VllmScores {self._base_url}, {self._running} running>"


def _scores(exchange: Exchange, pairs: Sequence[Tokenised]) -> list[Score]:
    if exchange.broken is not None:
        raise EngineError(f"vLLM gave no answer: {exchange.error or exchange.broken.value}")
    body = exchange.log.body()
    if exchange.status != http.HTTPStatus.OK:
        raise EngineError(f"vLLM answered {exchange.status}: {body.decode(errors='replace')[:500]}")
    try:
        classes = msgspec.json.decode(body, type=_Classes).data
    except msgspec.DecodeError as error:  # NaN, for one, is not JSON
        raise EngineError(f"vLLM's scores cannot be read: {error}") from None
    if len(classes) != len(pairs):
        raise EngineError(f"vLLM gave {len(classes)} scores for {len(pairs)} documents")
    made = [scored(each.probs[-1], pair) for each, pair in zip(classes, pairs, strict=True)]
    for score in made:
        if isinstance(score, EngineError):
            raise score
    return [score for score in made if isinstance(score, Score)]


def _await_health(process: "subprocess.Popen[bytes]", port: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not healthy(port):
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise UnreachableError(f"vLLM ended with status {process.wait(_POLL_S)} before it was ready")
        if time.monotonic() > deadline:
            raise UnreachableError(f"vLLM was not ready after {timeout_s:.0f} s; raise --ready-timeout-s")


def _end_with(process: "subprocess.Popen[bytes]") -> None:
    status = process.wait()
    if process.stdin is not None and not process.stdin.closed:
        print(f"vLLM ended with status {status}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """The guard ends vLLM, and then itself, at the end of its input."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
