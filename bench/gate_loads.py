"""One load on the gate or a peer, in a process of its own on one core: ``gate_loads.py NAME CORE OPTIONS``.

``OPTIONS`` is a JSON object of the load's arguments. Prints one JSON object; a load that is held (``streams_held``,
``idle_held``) prints its object once all stand, and lets go when its standard input ends.
"""

import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import uvloop
from loads import Client, closed_loop

from loadstone.core.target import Break, Exchange, Request
from loadstone.wire.client import HttpTarget
from loadstone.wire.clock import MonotonicClock
from loadstone.wire.process import paused_gc, raise_open_files

PATH = "/v1/chat/completions"
_EVENT = re.compile(rb'"rx":(\d+),"tx":(\d+)\}\n\n')
_WARM_S = 1.2
_TIMEOUT_S = 600
_BATCH = 250
_REFUSED = (429, 503)

Figures = dict[str, Any]


def chat_body(*, stream: bool) -> bytes:
    """Some 300 bytes."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant; answer briefly."},
        {"role": "user", "content": "word " * 24},
    ]
    return json.dumps({"model": "mock", "messages": messages, "max_tokens": 128, "stream": stream}).encode()


async def paced(
    port: int, streams: int, chunks: int, period_us: int, seconds: float, pids: list[int] | None = None
) -> Figures:
    """``streams`` at once, an event each ``period_us``, refilled until ``seconds`` have passed.

    Delays in milliseconds by the mock's stamps: of an event from its write to its receipt, of a first token the way of
    the request added. With ``pids``, the CPU seconds that those took in the window, ramp and drain left out, and the
    events that were received in it.
    """
    async with Client(port) as target:
        body = chat_body(stream=True)
        await closed_loop(target, Request(path=PATH, body=body, index=0), streams, 0.0, spread_s=0.0)
        cost = _Cost(pids or [], _WARM_S, seconds)
        request = Request(path=f"{PATH}?chunks={chunks}&us={period_us}", body=body, index=0)
        exchanges = await closed_loop(target, request, streams, seconds, spread_s=1.0)
        _check(exchanges)
    events = [(exchange, list(_events(exchange))) for exchange in exchanges]
    found = sum(len(of_one) for _, of_one in events)
    if found < 0.999 * chunks * len(exchanges):
        raise RuntimeError(f"{found} events of {chunks * len(exchanges)} came through")
    delays_ms = [(t_ns - tx) / 1e6 for _, of_one in events for t_ns, _, tx in of_one]
    ttft_ms = [(of_one[0][0] - of_one[0][2] + of_one[0][1] - exchange.sent_ns) / 1e6 for exchange, of_one in events]
    figures = cost.figures([t_ns for _, of_one in events for t_ns, _, _ in of_one])
    for name, values in (("chunk", delays_ms), ("ttft", ttft_ms)):
        figures[f"{name}_p50_ms"], figures[f"{name}_p99_ms"] = np.quantile(values, [0.5, 0.99]).tolist()
    return figures


async def tokens(port: int, clients: int, model: str, output_tokens: int, seconds: float) -> Figures:
    """A closed loop of streamed requests; the events received in the window."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "word " * 16}],
            "max_tokens": output_tokens,
            "stream": True,
        }
    ).encode()
    async with Client(port) as target:
        cost = _Cost([], _WARM_S, seconds)
        exchanges = await closed_loop(target, Request(path=PATH, body=body, index=0), clients, seconds, spread_s=0.5)
        _check(exchanges)
    return cost.figures([t_ns for exchange in exchanges for t_ns, data in exchange.log for _ in _events_in(data)])


async def open_loop(
    port: int,
    body: str,
    rate: float,
    warm_s: float,
    seconds: float,
    timeout_s: float,
    max_ttft_s: float,
    seed: int,
) -> Figures:
    """Poisson arrivals at ``rate`` a second, nobody tries again; figures of those that arrived after ``warm_s``.

    ``good`` is what was complete within ``timeout_s`` and had its first byte within ``max_ttft_s``, both counted from
    the planned arrival; rates are requests a second, times milliseconds.
    """
    async with Client(port, timeout_s) as target:
        request = Request(path=PATH, body=body.encode(), index=0)
        exchanges = await _arrive(target, request, _poisson(rate, warm_s + seconds, seed))
    begin_ns = exchanges[0].planned_ns + int(warm_s * 1e9)
    judged = [exchange for exchange in exchanges if exchange.planned_ns >= begin_ns]
    whole = [exchange for exchange in judged if _whole(exchange) and _took_s(exchange) <= timeout_s]
    admitted = [exchange for exchange in judged if exchange.status == 200 and exchange.log.first_ns()]
    refused = [exchange for exchange in judged if exchange.status in _REFUSED]
    ttft_ms = [(exchange.log.first_ns() - exchange.planned_ns) / 1e6 for exchange in admitted]
    refusal_ms = [(exchange.end_ns - exchange.sent_ns + exchange.connect_ns) / 1e6 for exchange in refused]
    late_ms = [(exchange.sent_ns - exchange.connect_ns - exchange.planned_ns) / 1e6 for exchange in judged]
    good = [exchange for exchange in whole if exchange.log.first_ns() - exchange.planned_ns <= max_ttft_s * 1e9]
    return {
        "offered_rps": len(judged) / seconds,
        "whole_rps": len(whole) / seconds,
        "good_rps": len(good) / seconds,
        "admitted": len(admitted),
        "refused": len(refused),
        "ends": dict(Counter(_how(exchange) for exchange in judged)),
        "ttft_p50_ms": _quantile(ttft_ms, 0.5),
        "ttft_p99_ms": _quantile(ttft_ms, 0.99),
        "refusal_p50_ms": _quantile(refusal_ms, 0.5),
        "refusal_p99_ms": _quantile(refusal_ms, 0.99),
        "late_p99_ms": _quantile(late_ms, 0.99),
    }


async def streams_held(port: int, count: int, period_us: int) -> Figures:
    """``count`` streams without end."""
    async with Client(port) as target:
        request = Request(path=f"{PATH}?chunks=1000000&us={period_us}", body=chat_body(stream=True), index=0)
        exchanges = [Exchange(request) for _ in range(count)]
        for begin in range(0, count, _BATCH):
            for exchange in exchanges[begin : begin + _BATCH]:
                target.start(exchange, _ignore)
            await _until(partial(_all_begun, exchanges[begin : begin + _BATCH]))
        _say({"standing": sum(exchange.status == 200 and not exchange.done for exchange in exchanges)})
        await _input_ends()
        return {"standing": sum(exchange.status == 200 and not exchange.done for exchange in exchanges)}


async def idle_held(port: int, count: int) -> Figures:
    """``count`` connections that have carried one request each and are kept."""
    loop = asyncio.get_running_loop()
    body = chat_body(stream=False)
    fields = ("Host: gate", "Content-Type: application/json", f"Content-Length: {len(body)}")
    head = "\r\n".join((f"POST {PATH} HTTP/1.1", *fields, "", ""))
    kept: list[_Kept] = []
    for begin in range(0, count, _BATCH):
        size = min(_BATCH, count - begin)
        made = await asyncio.gather(*(loop.create_connection(_Kept, "127.0.0.1", port) for _ in range(size)))
        for transport, protocol in made:
            transport.write(head.encode() + body)
            kept.append(protocol)
        await _until(partial(_all_answered, kept))
    _say({"standing": sum(protocol.standing for protocol in kept)})
    await _input_ends()
    return {"standing": sum(protocol.standing for protocol in kept)}


class _Kept(asyncio.Protocol):
    """A client's connection that has had its answer."""

    def __init__(self) -> None:
        self.answered = False
        self.lost = False

    @property
    def standing(self) -> bool:
        return self.answered and not self.lost

    def data_received(self, data: bytes) -> None:
        self.answered = self.answered or data.startswith(b"HTTP/1.1 200")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


@dataclass(frozen=True)
class _Mark:
    t_ns: int
    cpu_s: float


class _Cost:
    """CPU time of other processes between two moments of a run."""

    def __init__(self, pids: list[int], begin_s: float, end_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._processes = [psutil.Process(pid) for pid in pids]
        self._marks: list[_Mark] = []
        loop.call_later(begin_s, self._mark)
        loop.call_later(end_s, self._mark)

    def _mark(self) -> None:
        times = [process.cpu_times() for process in self._processes]
        self._marks.append(_Mark(time.monotonic_ns(), sum(each.user + each.system for each in times)))

    def figures(self, moments_ns: list[int]) -> Figures:
        begin, end = self._marks
        moments = np.array(moments_ns)
        return {
            "count": int(np.count_nonzero((moments >= begin.t_ns) & (moments < end.t_ns))),
            "wall_s": (end.t_ns - begin.t_ns) / 1e9,
            "cpu_s": end.cpu_s - begin.cpu_s,
        }


async def _arrive(target: HttpTarget, request: Request, delays_s: list[float]) -> list[Exchange]:
    """Start one exchange at each of these times, whatever has become of those before; return when all have ended."""
    clock = MonotonicClock(asyncio.get_running_loop())
    exchanges: list[Exchange] = []
    running = len(delays_s)
    all_ended = asyncio.Event()

    def done(_: Exchange) -> None:
        nonlocal running
        running -= 1
        if not running:
            all_ended.set()

    def fire() -> None:
        exchange = Exchange(request)
        exchange.planned_ns = planned_ns[len(exchanges)]
        exchanges.append(exchange)
        target.start(exchange, done)
        if len(exchanges) < len(planned_ns):
            clock.call_at(planned_ns[len(exchanges)], fire)

    with paused_gc():
        t0_ns = time.monotonic_ns()
        planned_ns = [t0_ns + int(delay_s * 1e9) for delay_s in delays_s]
        clock.call_at(planned_ns[0], fire)
        await all_ended.wait()
    clock.close()
    return exchanges


def _poisson(rate: float, seconds: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    times, now_s = [], 0.0
    while (now_s := now_s + draw.expovariate(rate)) < seconds:
        times.append(now_s)
    return times


def _events(exchange: Exchange) -> Iterator[tuple[int, int, int]]:
    """(receive stamp, the mock's receive stamp of the request, its stamp of the write) of each event."""
    for t_ns, data in exchange.log:
        for found in _EVENT.finditer(data):
            yield t_ns, int(found[1]), int(found[2])


def _events_in(data: bytes) -> range:
    return range(data.count(b"data: {"))


def _whole(exchange: Exchange) -> bool:
    return exchange.status == 200 and exchange.broken is None and exchange.log.body().endswith(b"data: [DONE]\n\n")


def _took_s(exchange: Exchange) -> float:
    return (exchange.end_ns - exchange.planned_ns) / 1e9


def _how(exchange: Exchange) -> str:
    reason = exchange.headers.get(b"x-loadstone-reason", b"").decode()
    return " ".join(filter(None, (str(exchange.status), reason, exchange.broken and exchange.broken.value)))


def _check(exchanges: list[Exchange]) -> None:
    failed = [exchange for exchange in exchanges if exchange.status != 200 or exchange.broken is not None]
    if failed:
        told = f"{failed[0]!r} {failed[0].error} {failed[0].log.body()[:200]!r}"
        raise RuntimeError(f"{len(failed)} of {len(exchanges)} failed, the first: {told}")


def _all_begun(exchanges: list[Exchange]) -> bool:
    return all(exchange.log.first_ns() or exchange.done for exchange in exchanges)


def _all_answered(kept: list[_Kept]) -> bool:
    return all(protocol.answered or protocol.lost for protocol in kept)


def _quantile(values: list[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def _ignore(exchange: Exchange) -> None:
    if exchange.broken is not Break.CUT:
        print(f"a stream ended: {exchange!r} {exchange.error}", file=sys.stderr)


async def _until(true: Callable[[], bool]) -> None:
    while True:
        if true():
            return
        await asyncio.sleep(0.02)


async def _input_ends() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def _say(figures: Figures) -> None:
    print(json.dumps(figures), flush=True)


def main() -> None:
    name, core, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    os.sched_setaffinity(0, {core})
    raise_open_files()
    loads: dict[str, Callable[..., Coroutine[Any, Any, Figures]]] = {
        load.__name__: load for load in (paced, tokens, open_loop, streams_held, idle_held)
    }
    _say(uvloop.run(loads[name](**options)))


if __name__ == "__main__":
    main()
