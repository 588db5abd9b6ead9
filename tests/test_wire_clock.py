"""Timers never fire early; stamps are on the monotonic clock; the poller reads everything."""

import asyncio
import contextlib
import resource
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from loadstone.wire import process
from loadstone.wire.clock import LoopAlarm, MonotonicClock, TimerfdAlarm
from loadstone.wire.poller import EpollPoller, LoopPoller
from loadstone.wire.stamps import READ_BYTES, Receiver, clock_offset_ns
from wire_servers import turns_until

Runner = Callable[[Coroutine[Any, Any, None]], None]
RUNNERS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
ALARMS = {"timerfd": TimerfdAlarm, "loop": LoopAlarm} if sys.platform == "linux" else {"loop": LoopAlarm}
POLLERS: dict[str, Callable[[asyncio.AbstractEventLoop], EpollPoller | LoopPoller]] = {
    "loop": LoopPoller,
    "epoll": lambda loop: EpollPoller(loop, may_rest=lambda: True),
}

every_loop = pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS.keys())
every_alarm = pytest.mark.parametrize("alarm", ALARMS.values(), ids=ALARMS.keys())


@every_loop
@every_alarm
def test_timers_fire_in_order_and_never_early(runner: Runner, alarm: type[TimerfdAlarm | LoopAlarm]) -> None:
    async def main() -> None:
        clock = MonotonicClock(asyncio.get_running_loop(), alarm)
        start_ns = clock.now_ns()
        delays_us = [5000, 100, 3000, 3000, -100, 0, 7000, 1, 2500]
        fired: list[tuple[int, int]] = []
        for delay_us in delays_us:
            when_ns = start_ns + delay_us * 1000
            clock.call_at(when_ns, lambda when_ns=when_ns: fired.append((when_ns, clock.now_ns())))
        assert fired == []
        await turns_until(lambda: len(fired) == len(delays_us))
        assert [when_ns for when_ns, _ in fired] == sorted(start_ns + delay_us * 1000 for delay_us in delays_us)
        assert all(now_ns >= when_ns for when_ns, now_ns in fired)
        clock.close()

    runner(main())


@every_loop
@every_alarm
def test_cancelled_timers_and_timers_set_from_timers(runner: Runner, alarm: type[TimerfdAlarm | LoopAlarm]) -> None:
    async def main() -> None:
        clock = MonotonicClock(asyncio.get_running_loop(), alarm)
        fired: list[str] = []

        def again() -> None:
            fired.append("again")
            if len(fired) < 4:
                clock.call_at(clock.now_ns(), again)

        cancelled = clock.call_at(clock.now_ns() + 1000, lambda: fired.append("cancelled"))
        clock.call_at(clock.now_ns() + 2000, again)
        cancelled.cancel()
        await turns_until(lambda: len(fired) == 4)
        assert fired == ["again"] * 4
        done = clock.call_at(clock.now_ns(), lambda: fired.append("last"))
        await turns_until(lambda: fired[-1] == "last")
        done.cancel()
        clock.close()

    runner(main())


@every_loop
@every_alarm
def test_an_error_in_a_timer_reaches_the_loop_and_the_others_fire(
    runner: Runner, alarm: type[TimerfdAlarm | LoopAlarm]
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reported: list[BaseException] = []
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        clock = MonotonicClock(loop, alarm)
        fired = loop.create_future()
        now_ns = clock.now_ns()
        clock.call_at(now_ns, lambda: 1 // 0)
        clock.call_at(now_ns + 1, lambda: fired.set_result(None))
        await fired
        assert [type(error) for error in reported] == [ZeroDivisionError]
        clock.close()

    runner(main())


def test_a_stepped_realtime_clock_is_noticed_and_stamps_are_given_up() -> None:
    receiver = Receiver()
    stamped = receiver.kernel_stamps
    assert receiver.remeasure() == pytest.approx(0.0, abs=0.5)
    assert receiver.kernel_stamps == stamped
    assert receiver.remeasure(lambda: clock_offset_ns() + 5_000_000) == pytest.approx(5.0, abs=0.5)
    assert not receiver.kernel_stamps
    assert "clock" in repr(receiver)
    receiver.close()


def read_once(receiver: Receiver) -> tuple[int, int]:
    """Send bytes to ourselves and receive them; the clock just before the sending, and the size."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as near:
        receiver.prepare(near)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        with far:
            before_ns = time.monotonic_ns()
            far.send(b"abc")
            return before_ns, receiver.receive(near)


def test_a_stamp_lies_between_the_sending_and_the_reading() -> None:
    receiver = Receiver()
    before_ns, size = read_once(receiver)
    assert size == 3
    assert bytes(receiver.view[:size]) == b"abc"
    assert before_ns - 100_000 <= receiver.stamp_ns <= time.monotonic_ns()
    assert receiver.lag_ns >= 0
    receiver.close()


def test_a_stamp_from_the_future_gives_the_stamps_up() -> None:
    receiver = Receiver(offset_ns=lambda: clock_offset_ns() - 60_000_000_000)
    if receiver.kernel_stamps:
        before_ns, _ = read_once(receiver)
        assert not receiver.kernel_stamps
        assert before_ns <= receiver.stamp_ns <= time.monotonic_ns()
    receiver.close()


class Bytes:
    """Counts what one end of a pair of sockets receives; raises in the middle of it."""

    def __init__(self, near: socket.socket, fail_at: int) -> None:
        self.near = near
        self.received = 0
        self.ends = 0
        self._fail_at = fail_at

    def read(self) -> int:
        size = len(self.near.recv(READ_BYTES))
        before, self.received = self.received, self.received + size
        self.ends += size == 0
        if before < self._fail_at <= self.received:
            raise ValueError("in the middle")
        return size


@every_loop
@pytest.mark.parametrize("make", POLLERS.values(), ids=POLLERS.keys())
def test_the_poller_reads_what_waits_and_survives_errors(
    runner: Runner, make: Callable[[asyncio.AbstractEventLoop], EpollPoller | LoopPoller]
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        errors: list[BaseException] = []
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        poller = make(loop)
        pairs = [socket.socketpair() for _ in range(20)]
        readers = [Bytes(near, fail_at=1 + turn % 2 * READ_BYTES) for turn, (near, _) in enumerate(pairs)]
        size = READ_BYTES + 10
        for reader, (near, far) in zip(readers, pairs, strict=True):
            near.setblocking(False)
            assert far.send(b"x" * size) == size, "more than one read, before there is an edge"
            poller.add(near.fileno(), reader)
        await turns_until(lambda: [reader.received for reader in readers] == [size] * len(pairs))
        assert len(errors) == len(pairs)
        for _, far in pairs:
            far.send(b"last")
            far.shutdown(socket.SHUT_WR)
        await turns_until(lambda: all(reader.ends for reader in readers))
        assert [reader.received for reader in readers] == [size + 4] * len(pairs)
        for near, far in pairs:
            poller.remove(near.fileno())
            poller.remove(near.fileno())
            near.close()
            far.close()
        poller.close()

    runner(main())


@every_loop
@pytest.mark.parametrize("make", POLLERS.values(), ids=POLLERS.keys())
def test_the_poller_leaves_alone_what_was_removed(
    runner: Runner, make: Callable[[asyncio.AbstractEventLoop], EpollPoller | LoopPoller]
) -> None:
    async def main() -> None:
        poller = make(asyncio.get_running_loop())
        with contextlib.ExitStack() as sockets:
            near, far = (sockets.enter_context(end) for end in socket.socketpair())
            reader = Bytes(near, fail_at=0)
            poller.add(near.fileno(), reader)
            poller.remove(near.fileno())
            far.send(b"x")
            for _ in range(3):
                await asyncio.sleep(0)
            assert reader.received == 0
            poller.close()

    runner(main())


def test_open_files_are_raised_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        raised = process.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == raised
        assert raised > 256
        assert process.raise_open_files() == raised
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
