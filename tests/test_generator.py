"""The two loops in virtual time: nothing is sent before its time, no slot is lost, nothing is left running."""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.target import Break, Exchange, Request
from loadstone.measure.generator import ClosedLoop, play
from loadstone.sim.clock import VirtualClock, run_virtual
from made_levels import FakeTarget

MS = 1_000_000
SECOND = 1_000_000_000
WHEN = st.integers(0, 3 * SECOND)


def requests(count: int) -> list[Request]:
    return [Request(path="/", body=b"{}", index=index) for index in range(count)]


def virtual(main: Callable[[VirtualClock], Coroutine[Any, Any, Any]]) -> Any:
    """Starts at a time that is not zero, as real clocks do."""

    async def later(clock: VirtualClock) -> Any:
        await asyncio.sleep(7)
        return await main(clock)

    return run_virtual(later)


# -- the open loop --------------------------------------------------------------------------------------------------


@given(st.lists(WHEN, min_size=1, max_size=30).map(sorted), st.one_of(st.none(), st.integers(1, 5)))
def test_nothing_is_sent_before_its_plan_nor_beyond_the_slots(offsets_ns: list[int], slots: int | None) -> None:
    async def main(clock: VirtualClock) -> None:
        target = FakeTarget(clock)
        most = 0

        def count(_exchange: Exchange) -> None:
            nonlocal most
            most = max(most, target.in_flight + 1)

        t0_ns = clock.now_ns()
        sent = await play(target, clock, requests(len(offsets_ns)), offsets_ns, slots, count)
        assert [e.request.index for e in sent] == list(range(len(offsets_ns)))
        assert [e.planned_ns - t0_ns for e in sent] == offsets_ns
        assert all(e.done and e.sent_ns >= e.planned_ns for e in sent)
        if slots is None:
            assert all(e.sent_ns == e.planned_ns for e in sent)
        else:
            assert most <= slots
            assert {e.slot for e in sent} <= set(range(slots))

    virtual(main)


def test_a_late_request_goes_as_soon_as_a_slot_is_free_and_keeps_its_plan() -> None:
    async def main(clock: VirtualClock) -> None:
        t0_ns = clock.now_ns()
        sent = await play(FakeTarget(clock), clock, requests(3), [0, 100 * MS, 5 * SECOND], 1)
        assert [e.sent_ns - t0_ns for e in sent] == [0, SECOND, 5 * SECOND]
        assert [e.planned_ns - t0_ns for e in sent] == [0, 100 * MS, 5 * SECOND]
        # Only the second had a slot to wait for: the delay of its write after that is the client's own.
        assert [e.turnaround_ns for e in sent] == [-1, 0, -1]

    virtual(main)


def test_a_failure_is_kept_like_any_reply_and_takes_no_pause() -> None:
    async def main(clock: VirtualClock) -> None:
        target = FakeTarget(clock)
        target.failing = {0: 503, 1: Break.CONNECT}
        t0_ns = clock.now_ns()
        sent = await play(target, clock, requests(3), [0, 0, 0], 1)
        assert [(e.status, e.broken) for e in sent] == [(503, None), (200, Break.CONNECT), (200, None)]
        assert [e.sent_ns - t0_ns for e in sent] == [0, 0, 0]

    virtual(main)


def test_nothing_to_send_is_nothing_to_wait_for() -> None:
    async def main(clock: VirtualClock) -> list[Exchange]:
        return await play(FakeTarget(clock), clock, [], [], None)

    assert virtual(main) == []


def test_a_cancelled_open_loop_cuts_what_is_in_flight_and_sends_no_more() -> None:
    async def main(clock: VirtualClock) -> None:
        target = FakeTarget(clock)
        ended: list[Exchange] = []
        playing = asyncio.ensure_future(
            play(target, clock, requests(20), [i * 300 * MS for i in range(20)], None, ended.append)
        )
        await asyncio.sleep(1.0)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        assert target.in_flight == 0
        started = len(target.started)
        assert [e.broken for e in ended].count(Break.CUT) == 3
        assert set(ended) == set(target.started)
        await asyncio.sleep(30)
        assert len(target.started) == started

    virtual(main)


# -- the closed loop ------------------------------------------------------------------------------------------------


class Loop:
    """A closed loop that numbers its requests, and what it sent and heard."""

    def __init__(self, clock: VirtualClock, took_ns: int = SECOND) -> None:
        self.target = FakeTarget(clock, took_ns)
        self.loop = ClosedLoop(self.target, clock)
        self.sent: list[Exchange] = []
        self.ended: list[Exchange] = []
        self.most = 0
        self._index = 0

    def take_over(self, size: int, spread_ns: int = SECOND) -> None:
        self.loop.take_over(size, spread_ns, self._next, self._on_send, self.ended.append)

    def _next(self) -> Request:
        self._index += 1
        return Request(path="/", body=b"{}", index=self._index - 1)

    def _on_send(self, exchange: Exchange) -> None:
        self.sent.append(exchange)
        self.most = max(self.most, self.loop.in_flight)


def test_slots_open_one_after_the_other_over_a_requests_time() -> None:
    async def main(clock: VirtualClock) -> None:
        loop, t0_ns = Loop(clock), clock.now_ns()
        loop.take_over(4, 2 * SECOND)
        await asyncio.sleep(0.9)
        assert [e.sent_ns - t0_ns for e in loop.sent] == [0, 500 * MS]
        await asyncio.sleep(5)
        first = {e.slot: e.sent_ns - t0_ns for e in reversed(loop.sent)}
        assert first == {slot: slot * 500 * MS for slot in range(4)}
        assert all(e.sent_ns >= e.planned_ns for e in loop.sent)

    virtual(main)


def test_a_slot_refills_in_the_very_turn_of_a_success() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.take_over(3)
        await asyncio.sleep(20)
        assert loop.most == loop.loop.in_flight == 3
        for slot in range(3):
            own = [e for e in loop.sent if e.slot == slot]
            assert len(own) >= 19
            assert all(after.planned_ns == before.end_ns == after.sent_ns for before, after in pairwise(own))
            assert [e.turnaround_ns for e in own if e.done] == [-1] + [0] * (len(own) - 2)

    virtual(main)


@pytest.mark.parametrize(
    ("request_s", "pause_s"), [(0.004, 0.010), (0.040, 0.010), (1.0, 0.25), (3.2, 0.8), (4.0, 1.0), (60.0, 1.0)]
)
@pytest.mark.parametrize("failure", [503, 429, 500, 404, Break.DISCONNECT, Break.CONNECT, Break.TIMEOUT])
def test_after_a_failure_a_slot_pauses_a_quarter_of_a_request(
    request_s: float, pause_s: float, failure: Break | int
) -> None:
    async def main(clock: VirtualClock) -> None:
        loop, t0_ns = Loop(clock), clock.now_ns()
        loop.target.failing = {0: failure}
        loop.take_over(1, round(request_s * SECOND))
        await asyncio.sleep(2.5)
        assert loop.sent[1].sent_ns - t0_ns == round(pause_s * SECOND)
        assert loop.sent[1].planned_ns == loop.sent[1].sent_ns
        assert (loop.sent[1].done, loop.sent[1].turnaround_ns) == (True, -1), "a planned pause is no delay of ours"

    virtual(main)


def test_the_pause_follows_what_a_request_takes_now() -> None:
    async def main(clock: VirtualClock) -> None:
        loop, t0_ns = Loop(clock), clock.now_ns()
        loop.target.failing = {0: 503}
        loop.take_over(1, 4 * SECOND)
        loop.loop.set_request_time(400 * MS)
        await asyncio.sleep(2)
        assert loop.sent[1].sent_ns - t0_ns == 100 * MS

    virtual(main)


def test_retry_after_is_not_obeyed() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.target.failing = {0: 503}
        loop.take_over(1)
        loop.sent[0].headers = {b"retry-after": b"30"}
        await asyncio.sleep(1)
        assert len(loop.sent) == 2

    virtual(main)


def test_a_larger_level_takes_over_without_a_drain() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.take_over(4)
        await asyncio.sleep(10.1)
        before, running = len(loop.sent), loop.loop.pending
        loop.take_over(10)
        assert set(loop.loop.pending) >= set(running)
        assert len(loop.sent) - before == 1, "the new slots open one after the other"
        await asyncio.sleep(1)
        assert loop.loop.in_flight == loop.most == 10
        assert all(e.broken is None for e in loop.ended)
        opened = {e.slot: e.sent_ns for e in reversed(loop.sent) if e.slot >= 4}
        assert {b - a for a, b in pairwise(sorted(opened.values()))} == {100 * MS}

    virtual(main)


def test_a_smaller_level_takes_over_without_a_drain() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.take_over(10)
        await asyncio.sleep(10.05)
        running = loop.loop.pending
        loop.take_over(4)
        assert set(loop.loop.pending) == set(running)
        await asyncio.sleep(1)
        assert loop.loop.in_flight == 4
        assert set(running) <= set(loop.ended), "the next level hears of what the last one sent"
        assert all(e.broken is None for e in loop.ended)
        last = {e.slot: e.sent_ns for e in loop.sent}
        assert all(last[slot] < clock.now_ns() - SECOND for slot in range(4, 10))

    virtual(main)


def test_a_slot_that_was_to_close_but_is_wanted_again_goes_on() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.take_over(10)
        await asyncio.sleep(10.05)
        loop.take_over(4)
        await asyncio.sleep(0.1)
        loop.take_over(10)
        await asyncio.sleep(3)
        assert loop.loop.in_flight == loop.most == 10
        assert {e.slot for e in loop.loop.pending} == set(range(10))

    virtual(main)


def test_a_pausing_slot_that_is_no_longer_wanted_closes() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.target.failing = {1: 503}
        loop.take_over(2, 4 * SECOND)
        await asyncio.sleep(2.5)
        loop.take_over(1)
        await asyncio.sleep(5)
        assert [e.slot for e in loop.sent].count(1) == 1
        assert loop.loop.in_flight == 1

    virtual(main)


def test_what_is_still_in_flight_has_no_turnaround_yet() -> None:
    """A request that never ends is read while it runs: it must not carry a time of day as its delay."""

    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.target.hanging = {1}
        loop.take_over(1)
        await asyncio.sleep(30)
        assert [e.turnaround_ns for e in loop.sent] == [-1, -1]

    virtual(main)


def test_an_abort_cuts_everything_and_sends_no_more() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.target.failing = {0: 503}
        loop.take_over(8, 4 * SECOND)
        await asyncio.sleep(0.6)
        assert loop.loop.in_flight == 1, "one runs, one pauses, six are still to open"
        loop.loop.abort()
        assert loop.loop.in_flight == loop.target.in_flight == 0
        assert [e.broken for e in loop.ended] == [None, Break.CUT]
        started = len(loop.sent)
        await asyncio.sleep(60)
        assert len(loop.sent) == started
        loop.loop.abort()
        loop.take_over(2)
        await asyncio.sleep(1.2)
        assert loop.loop.in_flight == 2, "and it can be taken over again"

    virtual(main)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3000)), min_size=1, max_size=6),
    st.sets(st.integers(0, 60), max_size=20),
)
def test_no_slot_is_lost_or_doubled(levels: list[tuple[int, int]], failing: set[int]) -> None:
    async def main(clock: VirtualClock) -> None:
        loop = Loop(clock)
        loop.target.failing = dict.fromkeys(failing, 503)
        for size, for_ms in levels:
            loop.take_over(size)
            await asyncio.sleep(for_ms / 1000)
            slots = [e.slot for e in loop.loop.pending]
            assert len(slots) == len(set(slots))
        loop.target.failing = {}
        await asyncio.sleep(3)
        assert sorted(e.slot for e in loop.loop.pending) == list(range(levels[-1][0]))
        assert len(loop.ended) + loop.loop.in_flight == len(loop.sent) == len(loop.target.started)
        loop.loop.abort()
        assert len(loop.ended) == len(loop.sent)

    virtual(main)
