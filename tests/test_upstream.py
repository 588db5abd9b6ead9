"""The gate's upstream connections on real sockets: opened, reused, raced, cancelled, and none left behind."""

import asyncio
import gc
import random
import socket
from typing import Any

import pytest

from loadstone.sim.clock import run_virtual
from loadstone.wire import dialer, upstream_connection
from loadstone.wire.origin import Origin
from loadstone.wire.upstream import Failure, Head, Stage, UpstreamCall, UpstreamPool
from upstream_heard import (
    CHUNKED,
    CONTINUE,
    REQUEST,
    Heard,
    Run,
    ask,
    origin,
    pool_of,
    split,
    trickle,
)
from wire_servers import OK, Script, answering, read_request, serving, turns_until


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_no_connection_is_one_line_and_nothing_was_sent(run: Run) -> None:
    async def main() -> None:
        port = unused_port()
        async with pool_of(port) as pool:
            heard = await ask(pool)
            assert heard.failure == Failure(Stage.CONNECT, f"127.0.0.1:{port} refused the connection")

    run(main())


def test_an_unknown_host_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_named: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def main() -> None:
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        pool = UpstreamPool(origin(8001, host="gpu7"))
        heard = await ask(pool)
        assert heard.failure is not None
        assert heard.failure.stage is Stage.CONNECT
        assert heard.failure.reason == "host 'gpu7' of gpu7:8001 is unknown (Name or service not known)"

    run(main())


def test_addresses_are_tried_in_turn_and_looked_up_again_after_a_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = 0

    async def main() -> None:
        closed = unused_port()
        addresses = [(socket.AF_INET, ("127.0.0.1", closed))]

        async def look_up(_origin: Origin) -> list[Any]:
            nonlocal lookups
            lookups += 1
            return list(addresses)

        monkeypatch.setattr(dialer, "_look_up", look_up)
        async with serving(answering(OK, close=True)) as port, pool_of(port) as pool:
            assert (await ask(pool)).failure is not None
            addresses.append((socket.AF_INET, ("127.0.0.1", port)))
            assert (await ask(pool)).status == 200
            assert (await ask(pool)).status == 200

    run(main())
    assert lookups == 2


def test_a_server_that_does_not_accept_is_given_up() -> None:
    async def main(_clock: object) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)):
                heard = await ask(UpstreamPool(origin(port), connect_timeout_s=5.0))
        reason = f"127.0.0.1:{port} did not accept a connection within 5 s"
        assert heard.failure == Failure(Stage.CONNECT, reason)

    run_virtual(main)


# -- reuse


def test_the_connection_used_last_is_used_next_and_too_many_are_not_kept(run: Run) -> None:
    peers: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            peers.append(writer.get_extra_info("peername")[1])
            writer.write(OK)

    async def main() -> None:
        async with serving(script) as port, pool_of(port, max_idle=2) as pool:
            await asyncio.gather(*(ask(pool) for _ in range(4)))
            await turns_until(lambda: pool.open == 2)
            assert repr(pool) == f"<UpstreamPool 127.0.0.1:{port}, 2 open, 2 idle, 0 busy>"
            peers.clear()
            for _ in range(3):
                await ask(pool)
            assert len(set(peers)) == 1

    run(main())


def test_a_sink_may_send_again_over_the_connection_just_freed(run: Run) -> None:
    class Again(Heard):
        def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
            super().on_read(head, data, ended)
            pool.send(REQUEST, second)

    async def main() -> None:
        nonlocal pool, second
        async with serving(answering(OK)) as port, pool_of(port) as pool:
            second = Heard()
            pool.send(REQUEST, Again())
            await second.over.wait()
            assert (second.status, pool.open) == (200, 1)

    pool: UpstreamPool
    second: Heard
    run(main())


@pytest.mark.parametrize("farewell", [b"", b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n"])
def test_an_idle_connection_that_the_server_ends_is_dropped_at_once(run: Run, farewell: bytes) -> None:
    bye = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await bye.wait()
        writer.write(farewell)

    async def main() -> None:
        async with serving(script) as port, pool_of(port) as pool:
            await ask(pool)
            assert pool.idle == 1
            bye.set()
            await turns_until(lambda: pool.open == 0)
            assert pool.idle == 0

    run(main())


def test_an_idle_connection_is_closed_after_its_time() -> None:
    async def main(clock: Any) -> None:
        async with serving(answering(OK)) as port:
            pool = UpstreamPool(origin(port), idle_timeout_s=60.0)
            await ask(pool)
            started_ns = clock.now_ns()
            while pool.open:  # noqa: ASYNC110 - in virtual time
                await asyncio.sleep(1.0)
            assert 60 <= (clock.now_ns() - started_ns) / 1e9 <= 122

    run_virtual(main)


def closing_the_second_time(served: list[int]) -> Script:
    """Each connection answers once, and closes when it has read another request, as if it had closed before."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(0)
        await read_request(reader)
        served[-1] += 1
        writer.write(OK)
        await read_request(reader)
        served[-1] += 1

    return script


def test_the_keep_alive_race_is_repaired_once_and_unseen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_connection, "_KEEP_ALIVE_RACE_S", 60.0)
    served: list[int] = []

    async def main() -> None:
        async with serving(closing_the_second_time(served)) as port, pool_of(port) as pool:
            for _ in range(3):
                heard = await ask(pool)
                assert (heard.failure, heard.body) == (None, b"{}")

    run(main())
    assert served == [2, 2, 1]


def test_a_server_that_closes_later_had_the_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_connection, "_KEEP_ALIVE_RACE_S", -1.0)
    served: list[int] = []

    async def main() -> None:
        async with serving(closing_the_second_time(served)) as port, pool_of(port) as pool:
            await ask(pool)
            heard = await ask(pool)
            reason = f"127.0.0.1:{port} closed the connection before it answered"
            assert heard.failure == Failure(Stage.SENT, reason)

    run(main())
    assert served == [2]


def test_a_second_such_end_is_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_connection, "_KEEP_ALIVE_RACE_S", 60.0)
    served = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while True:
            await read_request(reader)
            served += 1
            if served > 1:
                return
            writer.write(OK)

    async def main() -> None:
        async with serving(script) as port, pool_of(port) as pool:
            await ask(pool)
            heard = await ask(pool)
            reason = f"127.0.0.1:{port} closed the connection before it answered"
            assert heard.failure == Failure(Stage.SENT, reason)

    run(main())
    assert served == 3


@pytest.mark.parametrize("first", [CONTINUE, b"H"])
def test_a_request_is_not_repeated_once_a_byte_came(run: Run, first: bytes) -> None:
    async def main() -> None:
        async with serving(answering(OK, first, close=True)) as port, pool_of(port) as pool:
            await ask(pool)
            heard = await ask(pool)
            assert heard.failure is not None
            assert heard.failure.stage is Stage.REPLY

    run(main())


# -- cancelling


def test_a_call_cancelled_at_any_turn_of_its_opening_leaves_nothing(run: Run) -> None:
    async def script(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with serving(script) as port, pool_of(port) as pool:
            for turns in range(12):
                heard = Heard()
                call = pool.send(REQUEST, heard)
                for _ in range(turns):
                    await asyncio.sleep(0)
                call.cancel()
                call.cancel()
                assert (pool.idle, pool.busy, heard.over.is_set()) == (0, 0, False)

    run(main())
    gc.collect()  # a forgotten socket or task would warn


@pytest.mark.parametrize("answer", [b"", CHUNKED[:-5]], ids=["before the reply", "in the reply"])
def test_a_call_cancelled_later_closes_the_connection_at_once(run: Run, answer: bytes) -> None:
    async def main() -> None:
        reading, left = asyncio.Event(), asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(answer)
            reading.set()
            try:
                await reader.read()
            except ConnectionResetError:
                left.set()

        async with serving(script) as port, pool_of(port) as pool:
            heard = Heard()
            call = pool.send(REQUEST, heard)
            await reading.wait()
            if answer:
                await heard.more.wait()
            call.cancel()
            await left.wait()
            call.pause()
            call.resume()
            call.cancel()
            assert not heard.over.is_set()

    run(main())


def test_a_call_cancelled_in_the_middle_of_its_request(run: Run) -> None:
    async def main() -> None:
        begun, left = asyncio.Event(), asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            begun.set()
            try:
                await reader.readexactly(50_000_000)
            except (asyncio.IncompleteReadError, ConnectionResetError):
                left.set()

        async with serving(script) as port, pool_of(port) as pool:
            call = pool.send(b"POST / HTTP/1.1\r\nContent-Length: 50000000\r\n\r\n" + bytes(50_000_000), Heard())
            await begun.wait()
            call.cancel()
            await left.wait()

    run(main())


def test_a_sink_may_cancel_from_within(run: Run) -> None:
    class Enough(Heard):
        def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
            super().on_read(head, data, ended)
            call.cancel()

    async def main() -> None:
        nonlocal call
        async with serving(split(CHUNKED, 1)) as port, pool_of(port) as pool:
            heard = Enough()
            call = pool.send(REQUEST, heard)
            await heard.more.wait()
            await turns_until(lambda: pool.open == 0)
            assert (heard.reads, heard.over.is_set()) == (1, False)

    call: UpstreamCall
    run(main())


def test_close_lets_calls_end_and_abort_does_not(run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_request(reader)
                await go.wait()
                writer.write(OK)

        async with serving(script) as port, pool_of(port) as pool:
            ending = asyncio.create_task(ask(pool))
            await turns_until(lambda: pool.open)
            pool.close()
            assert pool.busy == 1
            go.set()
            assert (await ending).status == 200
            go.clear()
            sent, connecting = Heard(), Heard()
            call = pool.send(REQUEST, sent)
            await turns_until(lambda: call.connection)
            pool.send(REQUEST, connecting)
            pool.abort()
            assert sent.failure == Failure(Stage.SENT, f"{pool.netloc} was given up: the gate closes")
            assert connecting.failure == Failure(Stage.CONNECT, f"{pool.netloc} was given up: the gate closes")

    run(main())


# -- no leak


def moody(chance: random.Random) -> Script:
    """A server that answers well or badly, in pieces, and leaves when it likes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            answer = chance.choice((OK, CHUNKED, CONTINUE + CHUNKED, OK + b"X", b"junk", b"", CHUNKED[:-3]))
            await trickle(writer, answer, chance.randrange(1, 60))
            fate = chance.random()
            if fate < 0.05:
                writer.transport.abort()
            if fate < 0.1 or answer in (b"", CHUNKED[:-3]):
                return

    return script


async def fickle(pool: UpstreamPool, chance: random.Random) -> bool:
    """One call, which may be paused and cancelled anywhere; whether it came to its end."""
    heard = Heard()
    call = pool.send(REQUEST, heard)
    if chance.random() < 0.6:
        await heard.over.wait()
        return True
    for _ in range(chance.randrange(12)):
        await asyncio.sleep(0)
        if chance.random() < 0.3:
            call.pause()
    over = heard.over.is_set()
    call.cancel()
    await asyncio.sleep(0)
    assert heard.over.is_set() == over
    return over


def test_nothing_is_left_after_calls_of_every_fate(run: Run) -> None:
    chance = random.Random(7)

    async def main() -> int:
        async with serving(moody(chance)) as port, pool_of(port, max_idle=4) as pool:
            ended = 0
            for _ in range(60):
                ended += sum(await asyncio.gather(*(fickle(pool, chance) for _ in range(10))))
            return ended

    assert run(main()) > 300
    gc.collect()  # a forgotten socket or task would warn
