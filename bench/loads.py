"""One load on the mock, run in a process of its own on one core: ``loads.py NAME CORE PORT NUMBERS…``.

Prints one JSON object. ``client.py`` starts it; figures mean something only beside those of the same session.
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
ERRORS_UP_TO = 600_000
"""Chunks beyond which only memory is of interest: reading them all back would cost more than the load."""

Figures = dict[str, float]
Event = tuple[int, dict[str, Any]]
"""When an event was received, and the event with the mock's own times: ``rx`` of its request, ``tx`` of its write."""


class Window:
    """CPU and wall time between two moments of a run, ramp and drain left out."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._marks: list[tuple[int, float]] = []
        loop.call_later(begin_s, self._mark)
        loop.call_later(end_s, self._mark)

    def _mark(self) -> None:
        self._marks.append((time.monotonic_ns(), time.process_time()))

    def figures(self, moments_ns: list[int]) -> Figures:
        """``count`` of the moments inside; peak memory of the process so far in MB."""
        (begin_ns, begin_cpu_s), (end_ns, end_cpu_s) = self._marks
        moments = np.array(moments_ns)
        return {
            "count": int(np.count_nonzero((moments >= begin_ns) & (moments < end_ns))),
            "total": len(moments_ns),
            "wall_s": (end_ns - begin_ns) / 1e9,
            "cpu_s": end_cpu_s - begin_cpu_s,
        }


async def short(port: int, connections: int, seconds: int) -> Figures:
    """Closed loop of short JSON replies; every exchange is kept."""
    async with Client(port) as target:
        request = Request(path="/short", body=BODY, index=0)
        window = Window(0.3, seconds)
        exchanges = await closed_loop(target, request, connections, seconds, spread_s=0.0)
        figures = window.figures([exchange.end_ns for exchange in exchanges])
        return figures | {"failed": sum(exchange.status != 200 for exchange in exchanges)}


async def stream(port: int, streams: int, chunks: int, period_us: int, seconds: int) -> Figures:
    """``streams`` slots opened over a second, refilled until ``seconds`` have passed; errors by the mock's stamps."""
    async with Client(port) as target:
        await closed_loop(target, Request(path="/short", body=BODY, index=0), streams, 0.0, spread_s=0.0)
        request = Request(path=f"/stream/{chunks}/{period_us}", body=BODY, index=0)
        window = Window(1.2, seconds)
        exchanges = await closed_loop(target, request, streams, seconds, spread_s=1.0)
        figures = {
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "failed": sum(exchange.status != 200 or exchange.broken is not None for exchange in exchanges),
            "kernel_stamps": target.kernel_stamps,
        }
        if len(exchanges) * chunks > ERRORS_UP_TO:
            return figures
        reads = sum(len(exchange.log) for exchange in exchanges)
        return figures | {"reads": reads} | _figures(window, [(e.sent_ns, _events(e)) for e in exchanges])


async def vllm_stream(port: int, streams: int, chunks: int, period_us: int, seconds: int) -> Figures:
    """The same load with the logic of vLLM's own benchmark client."""
    url = f"http://127.0.0.1:{port}/stream/{chunks}/{period_us}"
    payload = json.loads(BODY)
    timelines: list[tuple[int, list[Event]]] = []
    connector = aiohttp.TCPConnector(limit=streams, limit_per_host=streams, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=6 * 3600)) as session:
        end_ns = time.monotonic_ns() + seconds * 1_000_000_000

        async def one_slot(slot: int) -> None:
            await asyncio.sleep(slot / streams)
            while time.monotonic_ns() < end_ns:
                timelines.append(await _vllm_request(session, url, payload))

        window = Window(1.2, seconds)
        await asyncio.gather(*(one_slot(slot) for slot in range(streams)))
    return _figures(window, timelines)


async def _vllm_request(session: aiohttp.ClientSession, url: str, payload: dict[str, Any]) -> tuple[int, list[Event]]:
    sent_ns = time.monotonic_ns()
    events: list[Event] = []
    text, splitter = "", _VllmSplitter()
    async with session.post(url=url, json=payload) as response:
        async for chunk in response.content.iter_any():
            for message in splitter.messages(chunk.strip()):
                data = message.removeprefix("data: ")
                if data != "[DONE]":
                    now_ns = time.monotonic_ns()
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


class Client:
    """The measuring client with its clock, for one ``async with``."""

    def __init__(self, port: int, timeout_s: float = 600) -> None:
        self._port = port
        self._timeout_s = timeout_s

    async def __aenter__(self) -> HttpTarget:
        self._clock = MonotonicClock(asyncio.get_running_loop())
        self._target = await connect_target(f"http://127.0.0.1:{self._port}", self._clock, timeout_s=self._timeout_s)
        return self._target

    async def __aexit__(self, *_: object) -> None:
        self._target.close()
        self._clock.close()


async def closed_loop(
    target: HttpTarget, request: Request, slots: int, seconds: float, spread_s: float
) -> list[Exchange]:
    """A closed loop driven by callbacks, as the generator's: a reply sends the slot's next request in the same turn."""
    loop = asyncio.get_running_loop()
    clock = MonotonicClock(loop)
    exchanges: list[Exchange] = []
    finished = loop.create_future()
    open_slots = slots

    def fire() -> None:
        exchange = Exchange(request)
        exchanges.append(exchange)
        target.start(exchange, done)

    def done(exchange: Exchange) -> None:
        nonlocal open_slots
        if exchange.end_ns < end_ns:
            fire()
            return
        open_slots -= 1
        if open_slots == 0:
            finished.set_result(None)

    with paused_gc():
        t0_ns = time.monotonic_ns()
        end_ns = t0_ns + int(seconds * 1e9)
        for slot in range(slots):
            clock.call_at(t0_ns + int(spread_s * 1e9 * slot / slots), fire)
        await finished
    clock.close()
    return exchanges


def _events(exchange: Exchange) -> list[Event]:
    lines = [(t_ns, line) for t_ns, data in exchange.log for line in data.split(b"\n\n")]
    return [(t_ns, json.loads(line[6:])) for t_ns, line in lines if line.startswith(b"data: {")]


def _figures(window: Window, timelines: list[tuple[int, list[Event]]]) -> Figures:
    """Milliseconds by which TTFT and ITL are off: (receive stamp - write) + (arrival at the mock - send stamp)."""
    ttft, itl = [], []
    for sent_ns, events in timelines:
        received = np.array([t_ns for t_ns, _ in events])
        written = np.array([event["tx"] for _, event in events])
        ttft.append(received[0] - written[0] + events[0][1]["rx"] - sent_ns)
        itl.append(np.diff(received) - np.diff(written))
    figures = window.figures([t_ns for _, events in timelines for t_ns, _ in events])
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
