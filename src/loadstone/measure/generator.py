"""The load generator: an open loop that plays a schedule, and a closed loop of slots that a level takes over.

Theory of operation. Both are callbacks over a :class:`~loadstone.core.target.Target` and a
:class:`~loadstone.core.clock.Clock`: a reply's ``done`` sends the slot's next request at once, in the same turn of the
event loop, so that no scheduler stands between two requests of a slot. Neither parses anything; an
:class:`~loadstone.core.target.Exchange` is kept whole and read after the level.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from loadstone.core.clock import Clock, Timer
from loadstone.core.target import Exchange, Request, Target

PAUSE_MIN_NS = 10_000_000
PAUSE_MAX_NS = 1_000_000_000


async def play(
    target: Target,
    clock: Clock,
    requests: Sequence[Request],
    offsets_ns: Sequence[int],
    max_concurrency: int | None,
    on_done: Callable[[Exchange], None] | None = None,
) -> list[Exchange]:
    """Send request i at t0 + ``offsets_ns[i]``, or as soon after it as a slot is free; wait for the last reply.

    Never raises for a failed request. Cancelled, it cancels what is in flight. Exchanges come back in send order.
    """
    player = _Player(target, clock, requests, offsets_ns, max_concurrency, on_done)
    return await player.run()


class _Player:
    def __init__(
        self,
        target: Target,
        clock: Clock,
        requests: Sequence[Request],
        offsets_ns: Sequence[int],
        max_concurrency: int | None,
        on_done: Callable[[Exchange], None] | None,
    ) -> None:
        self._target = target
        self._clock = clock
        self._requests = requests
        self._offsets_ns = offsets_ns
        self._on_done = on_done
        slots = min(max_concurrency or len(requests), len(requests))
        self._free = list(range(slots - 1, -1, -1))
        self._freed_ns = [0] * slots
        self._exchanges: list[Exchange] = []
        self._unfinished = len(requests)
        self._timer: Timer | None = None
        self._t0_ns = 0
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> list[Exchange]:
        if not self._requests:
            return []
        self._t0_ns = self._clock.now_ns()
        self._pump()
        try:
            await self._finished
        finally:
            self._stop()
        return self._exchanges

    def _pump(self) -> None:
        sent = len(self._exchanges)
        while self._free and sent < len(self._requests):
            due_ns = self._t0_ns + self._offsets_ns[sent]
            if due_ns > self._clock.now_ns():
                self._wait_until(due_ns)
                return
            self._send(sent, due_ns)
            sent += 1

    def _wait_until(self, due_ns: int) -> None:
        if self._timer is None:
            self._timer = self._clock.call_at(due_ns, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _send(self, index: int, due_ns: int) -> None:
        exchange = Exchange(self._requests[index])
        exchange.slot = self._free.pop()
        exchange.planned_ns = due_ns
        self._exchanges.append(exchange)
        self._target.start(exchange, self._done)

    def _done(self, exchange: Exchange) -> None:
        freed_ns = self._freed_ns[exchange.slot]
        if exchange.planned_ns <= freed_ns:
            exchange.turnaround_ns = _turnaround_ns(exchange, freed_ns)
        self._freed_ns[exchange.slot] = exchange.end_ns
        self._free.append(exchange.slot)
        if self._on_done is not None:
            self._on_done(exchange)
        self._unfinished -= 1
        if self._unfinished == 0 and not self._finished.done():
            self._finished.set_result(None)
        elif not self._finished.done():
            self._pump()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for exchange in self._exchanges:
            if not exchange.done:
                self._target.cancel(exchange)


class ClosedLoop:
    """N slots with one request in flight in each. It outlives a level: the next one takes over without a drain.

    A slot refills at once after a success. After a failure it pauses a quarter of a request's time (10 ms to 1 s), or
    one refusing server would burn the whole budget of requests.
    """

    def __init__(self, target: Target, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._next_request: Callable[[], Request] | None = None
        self._on_done: Callable[[Exchange], None] = _ignore
        self._on_send: Callable[[Exchange], None] = _ignore
        self._size = 0
        self._open: set[int] = set()
        self._timers: dict[int, Timer] = {}
        self._in_flight: dict[int, Exchange] = {}
        self._freed_ns: dict[int, int] = {}
        """Last byte of the request before the one in flight, by slot; none where the slot had paused or just opened."""
        self._pause_ns = PAUSE_MIN_NS

    def __repr__(self) -> str:
        return f"<ClosedLoop {len(self._in_flight)} in flight in {len(self._open)} slots of {self._size}>"

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def pending(self) -> list[Exchange]:
        return list(self._in_flight.values())

    def take_over(
        self,
        size: int,
        spread_ns: int,
        next_request: Callable[[], Request],
        on_send: Callable[[Exchange], None],
        on_done: Callable[[Exchange], None],
    ) -> None:
        """Become a loop of ``size`` slots, new ones opening evenly over ``spread_ns`` (one request's expected time).

        A burst of equal requests would lock into cohorts and inflate TTFT threefold. Slots beyond ``size`` end with
        the request that they hold.
        """
        self._size = size
        self._next_request = next_request
        self._on_send = on_send
        self._on_done = on_done
        self.set_request_time(spread_ns)
        new = [slot for slot in range(size) if slot not in self._open]
        now_ns = self._clock.now_ns()
        for position, slot in enumerate(new):
            self._open.add(slot)
            self._fire_at(slot, now_ns + spread_ns * position // size)
        for slot in [slot for slot in self._timers if slot >= size]:
            self._close_slot(slot)

    def set_request_time(self, request_ns: int) -> None:
        """What a request takes now: the pause after a failure is a quarter of it."""
        self._pause_ns = min(max(request_ns // 4, PAUSE_MIN_NS), PAUSE_MAX_NS)

    def cut(self, exchanges: Iterable[Exchange]) -> None:
        """End these now; their slots go on after a pause."""
        for exchange in exchanges:
            self._target.cancel(exchange)

    def abort(self) -> None:
        """Cut everything in flight and close every slot."""
        self._size = 0
        for slot in list(self._timers):
            self._close_slot(slot)
        for exchange in list(self._in_flight.values()):
            self._target.cancel(exchange)

    def _close_slot(self, slot: int) -> None:
        self._timers.pop(slot).cancel()
        self._open.discard(slot)

    def _fire_at(self, slot: int, when_ns: int) -> None:
        if when_ns <= self._clock.now_ns():
            self._fire(slot, when_ns, freed_ns=None)
            return

        def fire() -> None:
            del self._timers[slot]
            self._fire(slot, when_ns, freed_ns=None)

        self._timers[slot] = self._clock.call_at(when_ns, fire)

    def _fire(self, slot: int, planned_ns: int, freed_ns: int | None) -> None:
        assert self._next_request is not None, "a slot fires only after take_over"
        exchange = Exchange(self._next_request())
        exchange.slot = slot
        exchange.planned_ns = planned_ns
        if freed_ns is not None:
            self._freed_ns[slot] = freed_ns
        self._in_flight[slot] = exchange
        self._on_send(exchange)
        self._target.start(exchange, self._done)

    def _done(self, exchange: Exchange) -> None:
        slot = exchange.slot
        del self._in_flight[slot]
        freed_ns = self._freed_ns.pop(slot, None)
        if freed_ns is not None and exchange.sent_ns:
            exchange.turnaround_ns = _turnaround_ns(exchange, freed_ns)
        if slot >= self._size:
            self._open.discard(slot)
            self._on_done(exchange)
            return
        if exchange.broken is None and exchange.status < 400:
            self._fire(slot, exchange.end_ns, exchange.end_ns)
        else:
            self._fire_at(slot, self._clock.now_ns() + self._pause_ns)
        self._on_done(exchange)


def _turnaround_ns(exchange: Exchange, freed_ns: int) -> int:
    """From the slot's last byte to the write. Connecting again is the server's wish, not the generator's delay."""
    return max(0, exchange.sent_ns - freed_ns - exchange.connect_ns)


def _ignore(exchange: Exchange) -> None:
    """Before the first level takes over, nobody listens."""
