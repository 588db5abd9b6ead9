"""The measuring client against scripted servers on real sockets."""

import asyncio
import errno
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from loadstone.core.errors import UnreachableError, UsageError
from loadstone.core.target import Break, Exchange
from loadstone.wire import connection, stamps
from loadstone.wire.client import HttpTarget, connect_target
from loadstone.wire.clock import MonotonicClock
from wire_servers import OK, Script, answering, client_of, read_request, request, serving, turns_until

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


def exchange_with(script: Script, *, requests: int = 1, timeout_s: float = 30.0) -> list[Exchange]:
    """Send some requests, one after another, to a server that follows ``script``."""

    async def main() -> list[Exchange]:
        async with serving(script) as port, client_of(port, timeout_s=timeout_s) as target:
            return [await target.send(request()) for _ in range(requests)]

    return asyncio.run(main())


COMPLETE = {
    "content-length": (OK, b"{}"),
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", b"abcde"),
    "interim responses first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nServer: x\r\n\r\n" + OK,
        b"{}",
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "connection: close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", b"x"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x"),
    "lower-case head": (b"HTTP/1.1 200 ok\r\ncontent-length: 1\r\n\r\nx", b"x"),
}


@pytest.mark.parametrize("runner", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize(("wire", "body"), COMPLETE.values(), ids=COMPLETE.keys())
def test_complete_replies_whole_and_byte_by_byte(
    wire: bytes, body: bytes, runner: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            line, _, _ = await read_request(reader)
            step = 1 if "drip" in line else len(wire)
            for start in range(0, len(wire), step):
                writer.write(wire[start : start + step])
                await writer.drain()

    async def main() -> None:
        async with serving(dripping) as port, client_of(port) as target:
            for path in ("/whole", "/drip", "/whole"):
                exchange = await target.send(request(path))
                assert exchange.broken is None, exchange.error
                assert exchange.status // 100 == 2
                assert exchange.log.body() == body
                assert 0 < exchange.sent_ns <= exchange.end_ns <= time.monotonic_ns()
                assert all(exchange.sent_ns <= t_ns <= exchange.end_ns for t_ns, _ in exchange.log)

    runner(main())


def test_what_the_server_reads() -> None:
    seen: list[tuple[str, dict[str, str], bytes]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(OK)

    async def main() -> None:
        async with serving(script) as port:
            clock = MonotonicClock(asyncio.get_running_loop())
            target = await connect_target(
                f"http://127.0.0.1:{port}/api/v1/",
                clock,
                timeout_s=5,
                api_key="secret",
                headers={"X-Extra": "1", "accept": "*/*"},
            )
            await target.send(request("/v1/chat/completions", b'{"a": 1}'))
            await target.send(request("/rerank"))
            await target.fetch("GET", "/metrics")
            target.close()
            clock.close()

    asyncio.run(main())
    line, headers, body = seen[0]
    assert line == "POST /api/v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer secret"
    assert headers["content-type"] == "application/json"
    assert headers["x-extra"] == "1"
    assert headers["accept"] == "*/*"
    assert headers["user-agent"].startswith("loadstone/")
    assert headers["host"].startswith("127.0.0.1:")
    assert body == b'{"a": 1}'
    assert [line for line, _, _ in seen[1:]] == ["POST /api/v1/rerank HTTP/1.1", "GET /api/metrics HTTP/1.1"]


def test_only_the_useful_headers_are_kept() -> None:
    head = b"Server: loadstone\r\nRetry-After: 3\r\nX-Loadstone-Reason: queue_full\r\nX-Other: 1\r\nDate: x\r\n"
    (exchange,) = exchange_with(answering(b"HTTP/1.1 503 Busy\r\n" + head + b"Content-Length: 0\r\n\r\n"))
    assert exchange.status == 503
    assert exchange.headers == {b"server": b"loadstone", b"retry-after": b"3", b"x-loadstone-reason": b"queue_full"}


def test_a_reply_that_the_end_of_the_connection_delimits_is_complete() -> None:
    (exchange,) = exchange_with(answering(b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nabc", close=True))
    assert (exchange.broken, exchange.status, exchange.log.body()) == (None, 200, b"abc")
    assert exchange.end_ns == exchange.log.last_ns()


CHUNKED_START = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"
BROKEN = {
    "closed at once": (b"", Break.DISCONNECT, "closed the connection before it answered", b""),
    "closed in the head": (b"HTTP/1.1 200 OK\r\nSer", Break.DISCONNECT, "in the middle of the response head", b""),
    "closed in a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", Break.DISCONNECT, "of the reply", b"ab"),
    "closed in a stream": (CHUNKED_START, Break.DISCONNECT, "in the middle of the reply", b"ab"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", Break.MALFORMED, "not HTTP/1.1", b""),
    "bad chunk size": (CHUNKED_START + b"zz\r\n", Break.MALFORMED, "not HTTP/1.1", b"ab"),
    "switched protocols": (
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        Break.MALFORMED,
        "",
        b"",
    ),
}


@pytest.mark.parametrize(("wire", "broken", "error", "body"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_replies_are_data(wire: bytes, broken: Break, error: str, body: bytes) -> None:
    (exchange,) = exchange_with(answering(wire, close=True))
    assert exchange.broken is broken
    assert error in exchange.error
    assert "\n" not in exchange.error
    assert exchange.log.body() == body
    assert exchange.done


def test_a_reset_in_the_middle_keeps_what_came() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED_START)
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    (exchange,) = exchange_with(script)
    assert exchange.broken is Break.DISCONNECT
    assert exchange.log.body() == b"ab"


def test_idle_connections_are_used_again_last_in_first_out() -> None:
    connections: list[list[str]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[str] = []
        connections.append(mine)
        while True:
            mine.append((await read_request(reader))[0].split()[1])
            writer.write(OK)

    async def main() -> None:
        async with serving(script) as port, client_of(port) as target:
            await asyncio.gather(target.send(request("/a")), target.send(request("/a")))
            assert repr(target).endswith("0 in flight, 2 idle>")
            for _ in range(3):
                assert (await target.send(request("/b"))).connect_ns == 0

    asyncio.run(main())
    assert sorted(connections, key=len) == [["/a"], ["/a", "/b", "/b", "/b"]]


def test_a_pooled_connection_that_died_is_no_failure_of_the_server() -> None:
    served = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await read_request(reader)
        served += 1
        if served == 1:
            writer.write(OK)
            await read_request(reader)  # the second request of this connection dies unanswered
            return
        writer.write(OK)
        await reader.read()

    first, second = exchange_with(script, requests=2)
    assert first.connect_ns > 0
    assert (second.broken, second.status, served) == (None, 200, 2)
    assert second.sent_ns > first.end_ns


def test_a_reused_connection_that_is_dropped_late_is_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_KEEP_ALIVE_RACE_NS", 0)
    served = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)

    first, second = exchange_with(script, requests=2)
    assert (first.status, second.broken, served) == (200, Break.DISCONNECT, 1)
    assert second.error == "the server closed the connection before it answered"


def test_a_server_that_closes_twice_without_a_byte_is_a_disconnect() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, _ = await read_request(reader)
        if "good" in line:
            writer.write(OK)
            await read_request(reader)

    async def main() -> None:
        async with serving(script) as port, client_of(port) as target:
            assert (await target.send(request("/good"))).broken is None
            exchange = await target.send(request("/bad"))
            assert exchange.broken is Break.DISCONNECT
            assert exchange.error == "the server closed the connection before it answered"

    asyncio.run(main())


def test_a_second_reply_in_the_same_read_is_no_part_of_the_first() -> None:
    served = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        await read_request(reader)
        writer.write(OK + OK)
        await read_request(reader)

    first, second = exchange_with(script, requests=2)
    assert (first.broken, first.log.body(), second.broken, second.log.body()) == (None, b"{}", None, b"{}")
    assert served == 2, "a connection that says more than it was asked is not used again"


def test_an_idle_connection_that_speaks_or_ends_leaves_the_pool() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await writer.drain()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")

    async def main() -> None:
        async with serving(script) as port, client_of(port) as target:
            for _ in range(3):
                exchange = await target.send(request())
                assert (exchange.broken, exchange.status) == (None, 200)
            await turns_until(lambda: "0 idle" in repr(target))

    asyncio.run(main())


def test_bytes_behind_a_complete_reply_are_not_the_next_reply() -> None:
    first, second = exchange_with(answering(OK + OK.replace(b"200", b"500"), OK), requests=2)
    assert [first.status, second.status] == [200, 200]


def test_a_large_request_is_written_in_parts() -> None:
    body = b"x" * 8_000_000
    received: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            received.append(len((await read_request(reader))[2]))
            writer.write(OK)

    async def main() -> None:
        async with serving(script) as port, client_of(port) as target:
            for _ in range(2):
                assert (await target.send(request(body=body))).status == 200

    asyncio.run(main())
    assert received == [len(body)] * 2


def test_a_refusal_of_a_large_request_is_read_although_the_server_hangs_up() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async def main() -> None:
        async with serving(script) as port, client_of(port) as target:
            exchange = await target.send(request(body=b"x" * 8_000_000))
            assert (exchange.status, exchange.broken) == (413, None)

    asyncio.run(main())


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(CHUNKED_START)
    await reader.read()


def test_time_out() -> None:
    (exchange,) = exchange_with(_hang, timeout_s=0.05)
    assert exchange.broken is Break.TIMEOUT
    assert exchange.error == "no complete reply within 0.05 s"
    assert exchange.end_ns - exchange.sent_ns >= 40_000_000
    assert exchange.log.body() == b"ab"


TIMEOUT_S = 0.05
PARTIAL = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"


@pytest.mark.parametrize("stamped", [True, False], ids=["kernel stamps", "clock"])
@pytest.mark.parametrize("runner", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (OK, b"", None),
        (PARTIAL, b"", Break.TIMEOUT),
        (b"", OK, Break.TIMEOUT),
        (PARTIAL + b"x" * 1_000_000, b"", Break.CLIENT),
    ],
    ids=["complete in time", "incomplete", "complete too late", "held back by us"],
)
def test_whose_time_out_it_is_when_the_client_reads_too_late(
    before: bytes,
    after: bytes,
    expected: Break | None,
    runner: Callable[[Coroutine[Any, Any, None]], None],
    stamped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop is held past the deadline; the server wrote ``before`` it and ``after`` it."""
    if not stamped:
        monkeypatch.setattr(stamps, "_SO_TIMESTAMPNS", 9999)  # a system that does not know it

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with client_of(listener.getsockname()[1], timeout_s=TIMEOUT_S) as target:
                assert target.kernel_stamps == stamped
                exchange = Exchange(request())
                ended = asyncio.get_running_loop().create_future()
                target.start(exchange, ended.set_result)
                await turns_until(lambda: exchange.sent_ns)
                peer, _ = listener.accept()
                with peer:
                    peer.recv(65536)
                    peer.setblocking(False)
                    if before:
                        peer.send(before)
                    hold_until(exchange.sent_ns + int(TIMEOUT_S * 1e9))
                    if after:
                        peer.send(after)
                    await ended
        unknown = (expected is Break.TIMEOUT and after) or expected is None
        assert exchange.broken is (Break.CLIENT if unknown and not stamped else expected)
        if exchange.broken is Break.CLIENT:
            assert exchange.error == "bytes waited unread past the time-out"

    runner(main())


def hold_until(when_ns: int) -> None:
    while time.monotonic_ns() <= when_ns:
        pass


def test_one_timer_serves_many_time_outs_and_an_error_in_done_stops_none_of_them() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reported: list[BaseException | None] = []
        loop.set_exception_handler(lambda _, context: reported.append(context.get("exception")))
        ended: list[Exchange] = []
        all_ended = loop.create_future()

        def done(exchange: Exchange) -> None:
            ended.append(exchange)
            if len(ended) == 5:
                all_ended.set_result(None)
            raise RuntimeError("from done")

        async with serving(_hang) as port, client_of(port, timeout_s=0.05) as target:
            for _ in range(5):
                target.start(Exchange(request()), done)
            await all_ended
            await asyncio.sleep(0)
            assert repr(target).endswith("0 in flight, 0 idle>")
        assert [exchange.broken for exchange in ended] == [Break.TIMEOUT] * 5
        assert len(reported) == 5
        assert all(isinstance(error, RuntimeError) for error in reported)

    asyncio.run(main())


def test_an_error_in_done_reaches_the_loop_and_the_connection_goes_on() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reported = loop.create_future()
        loop.set_exception_handler(lambda _, context: reported.set_result(context["exception"]))

        def done(exchange: Exchange) -> None:
            raise RuntimeError("from done")

        async with serving(answering(OK)) as port, client_of(port) as target:
            target.start(Exchange(request()), done)
            assert isinstance(await reported, RuntimeError)
            assert (await target.send(request())).connect_ns == 0

    asyncio.run(main())


def test_done_is_called_once_and_never_from_within_start_or_cancel() -> None:
    async def main() -> None:
        calls: list[Exchange] = []
        async with serving(answering(OK)) as port, client_of(port) as target:
            exchanges = [Exchange(request()) for _ in range(4)]
            for exchange in exchanges:
                target.start(exchange, calls.append)
            assert calls == []
            target.cancel(exchanges[0])
            target.cancel(exchanges[0])
            assert calls == []
            await turns_until(lambda: len(calls) == 4)
            for exchange in exchanges:
                target.cancel(exchange)
            await asyncio.sleep(0)
        assert sorted(map(id, calls)) == sorted(map(id, exchanges))
        assert [exchange.broken for exchange in exchanges] == [Break.CUT, None, None, None]

    asyncio.run(main())


def test_cancelling_closes_the_connection_at_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        started, left = loop.create_future(), loop.create_future()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(CHUNKED_START)
            started.set_result(None)
            try:
                await reader.read()
            except ConnectionResetError as error:
                left.set_result(error)

        async with serving(script) as port, client_of(port) as target:
            sending = asyncio.ensure_future(target.send(request()))
            await started
            sending.cancel()
            assert isinstance(await left, ConnectionResetError)
            assert repr(target).endswith("0 in flight, 0 idle>")
            with pytest.raises(asyncio.CancelledError):
                await sending

    asyncio.run(main())


def test_close_cuts_what_runs() -> None:
    async def main() -> None:
        ended = asyncio.get_running_loop().create_future()
        exchange = Exchange(request())
        async with serving(_hang) as port, client_of(port) as target:
            target.start(exchange, ended.set_result)
            await turns_until(lambda: exchange.status)
        assert await ended is exchange
        assert exchange.broken is Break.CUT

    asyncio.run(main())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_refused_connection() -> None:
    async def main() -> None:
        port = free_port()
        async with client_of(port) as target:
            exchange = await target.send(request())
            assert (exchange.broken, exchange.error) == (Break.CONNECT, f"connection refused by 127.0.0.1:{port}")
            assert exchange.sent_ns == 0
            with pytest.raises(UnreachableError, match=r"GET /metrics: connection refused by 127\.0\.0\.1"):
                await target.fetch("GET", "/metrics")

    asyncio.run(main())


def test_the_next_address_is_tried() -> None:
    async def main() -> None:
        async with serving(answering(OK)) as port, client_of(port) as target:
            target._wire.addresses.insert(0, (socket.AF_INET, ("127.0.0.1", free_port())))
            assert (await target.send(request())).status == 200
            assert target._wire.addresses[0] == (socket.AF_INET, ("127.0.0.1", port))

    asyncio.run(main())


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_limits_of_this_machine_are_not_the_servers_fault(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object) -> socket.socket:
        raise OSError(code, "limit")

    async def main() -> None:
        async with serving(answering(OK)) as port, client_of(port) as target:
            with monkeypatch.context() as patch:
                patch.setattr(connection.socket, "socket", no_socket)
                exchange = await target.send(request())
            assert exchange.broken is Break.CLIENT
            assert exchange.error.startswith("this machine: ")
            assert (await target.send(request())).broken is None

    asyncio.run(main())


def test_a_connection_that_does_not_come_about_times_out() -> None:
    async def main() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            async with client_of(port, timeout_s=0.05) as target:
                exchanges = await asyncio.gather(*(target.send(request()) for _ in range(8)))
                errors = {exchange.error for exchange in exchanges}
                assert {exchange.broken for exchange in exchanges} == {Break.TIMEOUT}
                assert f"no connection with 127.0.0.1:{port} within the time-out" in errors

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("127.0.0.1:8000", UsageError, "http"),
        ("localhost:8000", UsageError, "the scheme is 'localhost'"),
        ("ftp://host", UsageError, "the scheme is 'ftp'"),
        ("http://", UsageError, "no host"),
        ("http://host:port", UsageError, "host:port"),
        ("http://user:pass@host", UsageError, "--api-key"),
        ("http://host/?a=1", UsageError, "no query"),
        ("http://no-such-host.invalid", UnreachableError, "host 'no-such-host.invalid' is unknown"),
    ],
)
def test_base_urls_that_cannot_be_used(url: str, error: type[Exception], words: str) -> None:
    async def main() -> None:
        clock = MonotonicClock(asyncio.get_running_loop())
        try:
            await connect_target(url, clock, timeout_s=1)
        finally:
            clock.close()

    with pytest.raises(error) as raised:
        asyncio.run(main())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("header", [{"Host": "x"}, {"A b": "x"}, {"A": "x\r\nB: y"}, {"A": "é"}])
def test_headers_that_cannot_be_sent(header: dict[str, str]) -> None:
    async def main() -> HttpTarget:
        return await connect_target(
            "http://127.0.0.1:1", MonotonicClock(asyncio.get_running_loop()), timeout_s=1, headers=header
        )

    with pytest.raises(UsageError, match="header"):
        asyncio.run(main())


def test_many_streams_at_once_keep_every_chunk_and_its_order() -> None:
    events = [b"data: %d\n\n" % n for n in range(200)]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in events:
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(b"0\r\n\r\n")

    async def main() -> None:
        async with serving(script) as port, client_of(port) as target:
            exchanges = await asyncio.gather(*(target.send(request()) for _ in range(64)))
            for exchange in exchanges:
                assert exchange.broken is None
                assert exchange.log.body() == b"".join(events)
                stamps_ns = [t_ns for t_ns, _ in exchange.log]
                assert stamps_ns == sorted(stamps_ns)
                assert exchange.sent_ns < stamps_ns[0]
                assert b"".join(data for _, data in exchange.log) == exchange.log.body()

    asyncio.run(main())
