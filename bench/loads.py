"""One load on the mock, run in a process of its own on one core: ``loads.py NAME CORE PORT NUMBERS…``.

Prints one JSON object. ``client.py`` starts it; figures mean something only beside those of the same run.
"""

import asyncio
import codecs
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import numpy as np
import uvloop

from loadstone.core.target import Exchange, Request
from loadstone.wire.client import HttpTarget, connect_target
from loadstone.wire.clock import MonotonicClock
from loadstone.wire.process import paused_gc, raise_open_files

BODY = json.dumps({"model": "mock", "prompt": "word " * 32, "max_tokens": 128, "stream": True}).encode()

Figures = dict[str, float]


async def short(port: int, connections: int, seconds: int) -> Figures:
    """Closed loop of short JSON replies; every exchange is kept."""
    clock = MonotonicClock(asyncio.get_running_loop())
    target = await connect_target(f"http://127.0.0.1:{port}", clock, timeout_s=60)
    request = Request(path="/short", body=BODY, index=0)
    await _run(target, [request] * connections, lambda elapsed_s: False)
    start = _Meter()
    exchanges = await _run(target, [request] * connections, lambda elapsed_s: elapsed_s < seconds)
    figures = start.figures() | {"requests": len(exchanges), "failed": sum(e.status != 200 for e in exchanges)}
    target.close()
    clock.close()
    return figures


async def stream(port: int, streams: int, chunks: int, period_us: int, waves: int) -> Figures:
    """``streams`` at once, each refilled until ``waves`` have run; errors against the mock's own stamps."""
    clock = MonotonicClock(asyncio.get_running_loop())
    target = await connect_target(f"http://127.0.0.1:{port}", clock, timeout_s=600)
    await _run(target, [Request(path="/short", body=BODY, index=0)] * streams, lambda elapsed_s: False)
    request = Request(path=f"/stream/{chunks}/{period_us}", body=BODY, index=0)
    seconds = (waves - 0.5) * chunks * period_us / 1e6
    start = _Meter()
    exchanges = await _run(target, [request] * streams, lambda elapsed_s: elapsed_s < seconds, period_us / 1e6)
    figures = start.figures() | {"chunks": len(exchanges) * chunks, "reads": sum(len(e.log) for e in exchanges)}
    figures["failed"] = sum(e.status != 200 or e.broken is not None for e in exchanges)
    figures["kernel_stamps"] = target.kernel_stamps
    if len(exchanges) * chunks <= 600_000:
        figures |= _errors(
            [(e.sent_ns, [(t, event) for t, data in e.log for event in _events(data)]) for e in exchanges]
        )
    target.close()
    clock.close()
    return figures


async def vllm_stream(port: int, streams: int, chunks: int, period_us: int, waves: int) -> Figures:
    """The same load with the logic of vLLM's own benchmark client: aiohttp, ``json.loads`` for each event."""
    url = f"http://127.0.0.1:{port}/stream/{chunks}/{period_us}"
    payload = json.loads(BODY)
    timelines: list[tuple[int, list[tuple[int, dict[str, Any]]]]] = []
    connector = aiohttp.TCPConnector(limit=streams, limit_per_host=streams, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=6 * 3600)) as session:

        async def one_slot(slot: int) -> None:
            await asyncio.sleep(period_us / 1e6 * slot / streams)
            timelines.extend([await _vllm_request(session, url, payload) for _ in range(waves)])

        start = _Meter()
        await asyncio.gather(*(one_slot(slot) for slot in range(streams)))
        figures = start.figures()
    return figures | {"chunks": len(timelines) * chunks} | _errors(timelines)


async def _vllm_request(
    session: aiohttp.ClientSession, url: str, payload: dict[str, Any]
) -> tuple[int, list[tuple[int, dict[str, Any]]]]:
    sent_ns = time.perf_counter_ns()
    events: list[tuple[int, dict[str, Any]]] = []
    text, splitter = "", _VllmSplitter()
    async with session.post(url=url, json=payload) as response:
        async for chunk in response.content.iter_any():
            for message in splitter.messages(chunk.strip()):
                data = message.removeprefix("data: ")
                if data != "[DONE]":
                    now_ns = time.perf_counter_ns()
                    event = json.loads(data)
                    if choices := event.get("choices"):
                        text += choices[0]["delta"].get("content") or ""
                        events.append((now_ns, {"rx": event["rx"], "tx": event["tx"]}))
    return sent_ns, events


class _VllmSplitter:
    """As the reference cuts a stream: the chunk comes stripped, so what ends it is known only by parsing it once."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""

    def messages(self, chunk: bytes) -> list[str]:
        *complete, rest = (self._rest + self._decoder.decode(chunk)).split("\n\n")
        data = rest.removeprefix("data: ").strip()
        if data and (data == "[DONE]" or _is_json(data)):
            complete.append(rest)
            rest = ""
        self._rest = rest
        return [message.strip() for message in complete if message.strip()]


def _is_json(data: str) -> bool:
    try:
        json.loads(data)
    except json.JSONDecodeError:
        return False
    return True


async def _run(
    target: HttpTarget, first: list[Request], go_on: Callable[[float], bool], spread_s: float = 0.0
) -> list[Exchange]:
    """A closed loop driven by callbacks, as the generator's: a reply sends the slot's next request in the same turn."""
    clock = MonotonicClock(asyncio.get_running_loop())
    exchanges: list[Exchange] = []
    finished = asyncio.get_running_loop().create_future()
    open_slots = len(first)
    t0_ns = time.monotonic_ns()

    def fire(request: Request) -> None:
        exchange = Exchange(request)
        exchanges.append(exchange)
        target.start(exchange, done)

    def done(exchange: Exchange) -> None:
        nonlocal open_slots
        if go_on((exchange.end_ns - t0_ns) / 1e9):
            fire(exchange.request)
            return
        open_slots -= 1
        if open_slots == 0:
            finished.set_result(None)

    with paused_gc():
        for slot, request in enumerate(first):
            clock.call_at(t0_ns + int(spread_s * 1e9 * slot / len(first)), lambda request=request: fire(request))
        await finished
    clock.close()
    return exchanges


class _Meter:
    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def figures(self) -> Figures:
        """Wall and CPU seconds since the start, peak memory of the process so far in MB."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        wall_s, cpu_s = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb}


def _events(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]


def _errors(timelines: list[tuple[int, list[tuple[int, dict[str, Any]]]]]) -> Figures:
    """Milliseconds by which TTFT and ITL are off: (receive stamp - write) + (arrival at the mock - send stamp)."""
    ttft, itl = [], []
    for sent_ns, events in timelines:
        received = np.array([t for t, _ in events])
        written = np.array([event["tx"] for _, event in events])
        ttft.append(received[0] - written[0] + events[0][1]["rx"] - sent_ns)
        itl.append(np.diff(received) - np.diff(written))
    figures: Figures = {}
    for name, errors in (("ttft", np.abs(np.array(ttft)) / 1e6), ("itl", np.abs(np.concatenate(itl)) / 1e6)):
        figures[f"{name}_error_p50_ms"], figures[f"{name}_error_p99_ms"] = np.quantile(errors, [0.5, 0.99]).tolist()
    return figures


def main() -> None:
    name, core, *numbers = sys.argv[1], *map(int, sys.argv[2:])
    os.sched_setaffinity(0, {core})
    raise_open_files()
    load: Callable[..., Coroutine[Any, Any, Figures]] = {"short": short, "stream": stream, "vllm": vllm_stream}[name]
    run = asyncio.run if name == "vllm" else uvloop.run
    print(json.dumps(run(load(*numbers))))


if __name__ == "__main__":
    main()
