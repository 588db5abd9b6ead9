"""Twenty thousand requests, of which many are cut, badly put or too long, on upstreams that are killed: is any lost?

``storm`` is one such run at any size. Theory of operation: arrivals fall due by a seeded Poisson process; each request
draws what it is and when, if ever, its client leaves. Meanwhile one upstream after the other is killed and started
again. Once all requests have ended for their clients, the gate is asked for its own account: what it received must be
the sum of its outcomes, nothing may be in flight, and it may have fewer answers to its credit than the clients saw of
no kind. Then, all upstreams back, every slot must be usable at once; and once the clients are gone and the upstreams
stopped, the gate must hold no more open files than before the first request.
"""

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import uvloop
from client import line
from gate_run import Bench
from gate_servers import Server, running_gate, sim

from loadstone.core.target import Break, Exchange, Request
from loadstone.sim.profiles import MODEL
from loadstone.wire.client import HttpTarget, connect_target
from loadstone.wire.clock import MonotonicClock

_PATH = "/v1/chat/completions"
_UPSTREAMS = 3
_SLOTS = 32
_SIM = ("--profile", "sharp-knee", "--max-num-seqs", str(_SLOTS))
_GATE = (
    *("--max-concurrency", str(_SLOTS), "--max-queue", "64", "--queue-timeout-s", "0.25"),
    *("--request-timeout-s", "1.5", "--requests-per-minute", "0", "--requests-per-hour", "0"),
)
_RATE = 500.0
_HUNG_S = 30.0
_KILL_EVERY_S = (2.0, 5.0)
_DOWN_S = (0.1, 1.0)
_QUIET_S = 10.0
_BACK_S = 40.0
_LONG_TOKENS = 400
_SLOT_TOKENS = 40


@dataclass
class Storm:
    """What came of it. All of ``leaked_slots``, ``lost``, ``leaked_files`` and ``contradictions`` should be nothing."""

    sent: int
    received: int = 0
    """By the gate's account: requests that were cut before they were written never reach it."""
    outcomes: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    """How they ended for their clients."""
    kills: int = 0
    leaked_slots: int = 0
    """In flight or queued by the gate's account although every request has ended."""
    lost: int = 0
    """Received and in no outcome, or without an end for their client."""
    usable_slots: int = 0
    """In flight at once when, after it all, as many were asked for as there are slots."""
    slots: int = _UPSTREAMS * _SLOTS
    files_before: int = 0
    files_after: int = 0
    most_upstream_connections: int = 0
    contradictions: list[str] = field(default_factory=list)

    @property
    def leaked_files(self) -> int:
        return max(0, self.files_after - self.files_before)


def storms(bench: Bench) -> None:
    """The row of the bench."""
    for seed in range(1 if bench.quick else bench.rounds):
        told = storm(2_000 if bench.quick else 20_000, seed, load_core=bench.load_core, gate_core=bench.proxy_core)
        name = f"storm {seed + 1}: {told.sent:,} requests, {told.kills} upstreams killed"
        line(f"{name}: received · outcomes", f"{told.received:,} · {_listed(told.outcomes)}")
        line(f"{name}: seen by clients", _listed(told.seen))
        line(f"{name}: leaked slots · lost requests", f"{told.leaked_slots} · {told.lost}", "0 · 0")
        line(f"{name}: slots usable afterwards", f"{told.usable_slots} of {told.slots}", "all")
        files = f"{told.files_before} · {told.files_after} ({told.most_upstream_connections} upstream at most)"
        line(f"{name}: open files before · after", files, "no more")
        line(f"{name}: contradictions", "; ".join(told.contradictions) or "none", "none")


def storm(count: int, seed: int, *, load_core: int, gate_core: int) -> Storm:
    """Run one: ``count`` requests on a gate before three simulated upstreams."""
    return uvloop.run(_storm(count, seed, load_core, gate_core))


async def _storm(count: int, seed: int, load_core: int, gate_core: int) -> Storm:
    told = Storm(sent=count)
    with ExitStack() as stack:
        upstreams = _Upstreams(load_core, random.Random(seed))
        stack.callback(upstreams.close)
        gate = stack.enter_context(running_gate(gate_core, [server.port for server in upstreams.running()], *_GATE))
        await _settled(lambda: _stats(gate)["capacity"] == told.slots, _BACK_S)
        told.files_before = gate.open_files()
        async with _client(gate) as target:
            killing = asyncio.create_task(upstreams.harass())
            watching = asyncio.create_task(_watch_connections(gate, upstreams, told))
            exchanges = await _send_all(target, count, random.Random(seed))
            await _cancelled(killing)
            _account(told, exchanges, await _quiet_stats(gate))
            upstreams.revive()
            told.usable_slots = await _usable(gate, target, told.slots)
            await _cancelled(watching)
        told.kills = upstreams.kills
        upstreams.close()
        await _settled(lambda: gate.open_files() <= told.files_before, _QUIET_S)
        told.files_after = gate.open_files()
    return told


class _Upstreams:
    """Simulated upstreams on fixed ports, killed and started again."""

    def __init__(self, core: int, draw: random.Random) -> None:
        self._core = core
        self._draw = draw
        self._ports = _ports(draw)
        self._reviving = threading.Lock()
        self._alive: dict[int, tuple[Server, ExitStack]] = {}
        self.kills = 0
        self.revive()

    def __repr__(self) -> str:
        return f"<_Upstreams {len(self._alive)} of {len(self._ports)} run, {self.kills} killed>"

    def running(self) -> list[Server]:
        return [server for server, _ in self._alive.values()]

    @property
    def ports(self) -> frozenset[int]:
        return frozenset(self._ports)

    async def harass(self) -> None:
        """Until cancelled: kill one, now and then all, and bring them back a moment later."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._draw.uniform(*_KILL_EVERY_S))
            some = self._ports if self._draw.random() < 0.1 else [self._draw.choice(self._ports)]
            for port in some:
                self._kill(port)
            await asyncio.sleep(self._draw.uniform(*_DOWN_S))
            await loop.run_in_executor(None, self.revive)

    def revive(self) -> None:
        """Start those that don't run."""
        with self._reviving:
            for port in self._ports:
                if port not in self._alive:
                    stack = ExitStack()
                    server = stack.enter_context(sim(self._core, *_SIM, "--port", str(port)))
                    self._alive[port] = server, stack

    def close(self) -> None:
        while self._alive:
            self._alive.popitem()[1][1].close()

    def _kill(self, port: int) -> None:
        server, stack = self._alive.pop(port)
        psutil.Process(server.pids[0]).kill()
        stack.close()
        self.kills += 1


def _ports(draw: random.Random) -> list[int]:
    """Free ports below those that the kernel gives to clients, who would take that of an upstream that is down."""
    ports: list[int] = []
    while len(ports) < _UPSTREAMS:
        port = draw.randint(20_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


@dataclass(frozen=True)
class _Plan:
    """One request, and after how long its client leaves."""

    body: bytes
    leaves_after_s: float | None


def _plan(draw: random.Random) -> _Plan:
    kind = draw.random()
    if kind < 0.01:
        return _Plan(b'{"model": ', None)
    tokens = _LONG_TOKENS if kind < 0.05 else draw.randint(1, 20)
    leaves_after_s = None
    if draw.random() < 0.25:
        leaves_after_s = draw.choice((draw.uniform(0, 0.002), draw.uniform(0, 0.05), draw.uniform(0, 0.5)))
    return _Plan(_body(tokens, stream=draw.random() < 0.7), leaves_after_s)


def _body(tokens: int, *, stream: bool) -> bytes:
    messages = [{"role": "user", "content": "word " * 16}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": stream}).encode()


async def _send_all(target: HttpTarget, count: int, draw: random.Random) -> list[Exchange]:
    """Start them as they fall due; return when each has ended for its client."""
    clock = MonotonicClock(asyncio.get_running_loop())
    exchanges: list[Exchange] = []
    running = count
    all_ended = asyncio.Event()

    def done(_: Exchange) -> None:
        nonlocal running
        running -= 1
        if not running:
            all_ended.set()

    def fire() -> None:
        plan = _plan(draw)
        exchange = Exchange(Request(path=_PATH, body=plan.body, index=len(exchanges)))
        exchanges.append(exchange)
        target.start(exchange, done)
        now_ns = time.monotonic_ns()
        if plan.leaves_after_s is not None:
            clock.call_at(now_ns + int(plan.leaves_after_s * 1e9), lambda: target.cancel(exchange))
        if len(exchanges) < count:
            clock.call_at(now_ns + int(draw.expovariate(_RATE) * 1e9), fire)

    fire()
    await all_ended.wait()
    clock.close()
    return exchanges


def _account(told: Storm, exchanges: list[Exchange], stats: dict[str, Any]) -> None:
    """The clients' view held against the gate's."""
    told.received = stats["received"]
    told.outcomes = {name: number for name, number in stats["outcomes"].items() if number}
    told.leaked_slots = stats["in_flight"] + stats["queued"] + sum(each["in_flight"] for each in stats["upstreams"])
    seen = Counter(_how(exchange) for exchange in exchanges)
    told.seen = dict(seen.most_common())
    hung = sum(exchange.broken is Break.TIMEOUT for exchange in exchanges)
    told.lost = abs(told.received - sum(told.outcomes.values())) + hung
    answered = Counter(_outcome_seen(exchange) for exchange in exchanges if exchange.broken is None)
    for outcome, number in answered.items():
        if number > stats["outcomes"].get(outcome, 0):
            told.contradictions.append(f"{number} clients saw {outcome}, the gate {stats['outcomes'].get(outcome, 0)}")
    if told.received > told.sent:
        told.contradictions.append(f"{told.sent} were sent, {told.received} received")


def _how(exchange: Exchange) -> str:
    reason = exchange.headers.get(b"x-loadstone-reason", b"").decode()
    return " ".join(filter(None, (str(exchange.status), reason, exchange.broken and exchange.broken.value)))


def _outcome_seen(exchange: Exchange) -> str:
    if reason := exchange.headers.get(b"x-loadstone-reason"):
        return reason.decode()
    return "ok" if exchange.status == 200 else "upstream_error"


async def _quiet_stats(gate: Server) -> dict[str, Any]:
    """``/stats`` once nothing is in flight, or after long enough."""
    await _settled(lambda: not (stats := _stats(gate))["in_flight"] and not stats["queued"], _QUIET_S)
    return _stats(gate)


async def _usable(gate: Server, target: HttpTarget, slots: int) -> int:
    """Ask for as many at once as there are slots; the most that are in flight together."""
    await _settled(lambda: _stats(gate)["capacity"] == slots, _BACK_S)
    request = Request(path=_PATH, body=_body(_SLOT_TOKENS, stream=True), index=0)
    calls = [asyncio.create_task(target.send(request)) for _ in range(slots)]
    most = 0
    while not all(call.done() for call in calls):
        most = max(most, _stats(gate)["in_flight"])
        await asyncio.sleep(0.02)
    failed = sum(call.result().status != 200 for call in calls)
    return min(most, slots - failed)


async def _watch_connections(gate: Server, upstreams: _Upstreams, told: Storm) -> None:
    process = psutil.Process(gate.pids[0])
    while True:
        connections = process.net_connections("tcp")
        standing = sum(bool(each.raddr) and each.raddr.port in upstreams.ports for each in connections)
        told.most_upstream_connections = max(told.most_upstream_connections, standing)
        await asyncio.sleep(0.5)


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _settled(true: Callable[[], bool], timeout_s: float) -> None:
    """Wait for it, no longer than this."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        if true():
            return
        await asyncio.sleep(0.05)


def _stats(gate: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{gate.url}/stats", timeout=10) as reply:
        stats: dict[str, Any] = json.loads(reply.read())
        return stats


@asynccontextmanager
async def _client(gate: Server) -> AsyncIterator[HttpTarget]:
    clock = MonotonicClock(asyncio.get_running_loop())
    target = await connect_target(gate.url, clock, timeout_s=_HUNG_S)
    try:
        yield target
    finally:
        target.close()
        clock.close()


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
