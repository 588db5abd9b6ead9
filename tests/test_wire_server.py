"""The HTTP/1.1 server side on real sockets: whole, byte by byte, and with everything a client can get wrong."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from loadstone.wire.server import HttpServer, IncomingRequest, Response

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """``asyncio.run`` on each of the loops that the server must work on."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main)

    return run


def echo(request: IncomingRequest, response: Response) -> None:
    text = f"{request.method} {request.path} {request.query.decode()} ".encode() + request.body
    response.reply(200, [(b"content-type", b"text/plain")], text)


def serve(
    run: Run,
    handler: Callable[[IncomingRequest, Response], None],
    talk: Callable[[int], Awaitable[None]],
    max_body_bytes: int = 1000,
) -> None:
    """Run ``talk(port)`` against a server; afterwards no connection may be left."""

    async def main() -> None:
        server = HttpServer(handler, name=b"test", max_body_bytes=max_body_bytes)
        port = await server.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(20):
                await talk(port)
        finally:
            await server.stop()
        assert repr(server) == "<HttpServer stopped, 0 connections>"

    run(main())


async def exchange(port: int, data: bytes, pieces: int = 1, eof: bool = False) -> bytes:
    """Send ``data`` (in so many writes) and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    size = -(-len(data) // pieces)
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        await writer.drain()
        if pieces > 1:
            await asyncio.sleep(0)
    received = await reader.read()
    writer.close()
    await writer.wait_closed()
    return received


GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSE = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nhost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
CHUNKED = (
    b"POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    b"3\r\nhel\r\n2;ext=1\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"
)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("post", [POST, CHUNKED])
def test_requests_are_read_however_they_are_split(run: Run, post: bytes, pieces: int) -> None:
    async def talk(port: int) -> None:
        received = await exchange(port, GET + post, pieces)
        first, second = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert first == b"content-type: text/plain\r\ncontent-length: 11\r\nserver: test\r\n\r\nGET /a b=c "
        assert second.endswith(b"connection: close\r\n\r\nPOST /p  hello")

    serve(run, echo, talk)


def test_pipelined_requests_are_answered_in_order_one_at_a_time(run: Run) -> None:
    waiting: list[tuple[IncomingRequest, Response]] = []

    def later(request: IncomingRequest, response: Response) -> None:
        assert not waiting, "the next request waits for the answer to the one before"
        waiting.append((request, response))

        def answer() -> None:
            request, response = waiting.pop()
            echo(request, response)

        asyncio.get_running_loop().call_soon(answer)

    async def talk(port: int) -> None:
        data = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % i for i in range(200)) + CLOSE
        received = await exchange(port, data)
        assert received.count(b"200 OK") == 201
        paths = [part.split(b" ")[0] for part in received.split(b"GET ")[1:]]
        assert paths == [*(b"/%d" % i for i in range(200)), b"/last"]

    serve(run, later, talk)


def test_a_streamed_reply_is_chunked_and_plain_for_http_1_0(run: Run) -> None:
    def stream(_request: IncomingRequest, response: Response) -> None:
        response.start(200, [(b"content-type", b"text/event-stream")])
        response.write(b"one ")
        response.write(b"")
        response.write(b"two")
        response.end()

    async def talk(port: int) -> None:
        received = await exchange(port, CLOSE)
        assert received.endswith(b"connection: close\r\n\r\n4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")
        assert b"transfer-encoding: chunked" in received
        old = await exchange(port, b"GET / HTTP/1.0\r\n\r\n")
        assert b"transfer-encoding" not in old
        assert old.endswith(b"\r\n\r\none two")
        head = await exchange(port, CLOSE.replace(b"GET", b"HEAD"))
        assert head.endswith(b"\r\n\r\n")
        assert b"one" not in head

    serve(run, stream, talk)


def test_a_head_reply_has_the_length_but_no_body(run: Run) -> None:
    async def talk(port: int) -> None:
        received = await exchange(port, CLOSE.replace(b"GET", b"HEAD"))
        assert b"content-length: 12\r\n" in received
        assert received.endswith(b"\r\n\r\n")

    serve(run, echo, talk)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001, 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 300 + b"\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    ],
)
def test_what_cannot_be_taken_is_refused_and_the_connection_closed(run: Run, data: bytes, status: int) -> None:
    def never(_request: IncomingRequest, _response: Response) -> None:
        raise AssertionError("the handler must not see this")

    async def talk(port: int) -> None:
        received = await exchange(port, data)
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close\r\n" in received

    serve(run, never, talk)


def test_a_bad_request_behind_a_good_one_waits_its_turn(run: Run) -> None:
    async def talk(port: int) -> None:
        received = await exchange(port, GET + b"bad\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"HTTP/1.1 400 Bad Request" in received

    serve(run, echo, talk)


def test_an_upgrade_is_ignored(run: Run) -> None:
    async def talk(port: int) -> None:
        upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        received = await exchange(port, upgrade + upgrade + CLOSE)
        assert received.count(b"HTTP/1.1 200 OK") == 3

    serve(run, echo, talk)


def test_expect_100_continue_is_answered_before_the_body(run: Run) -> None:
    async def talk(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head, body = POST.split(b"\r\n\r\n")
        writer.write(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.read()).endswith(b"hello")
        writer.close()
        await writer.wait_closed()

    serve(run, echo, talk)


def test_the_handler_is_told_once_when_the_client_leaves(run: Run) -> None:
    async def main() -> None:
        left = asyncio.Event()
        arrived = asyncio.Event()
        kept: list[Response] = []

        def hold(_request: IncomingRequest, response: Response) -> None:
            response.start(200, [])
            response.write(b"x")
            response.on_disconnect = left.set
            kept.append(response)
            arrived.set()

        async def talk(port: int) -> None:
            _reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            await arrived.wait()
            writer.close()
            await writer.wait_closed()
            await left.wait()
            kept[0].write(b"dropped")
            kept[0].end()

        server = HttpServer(hold)
        port = await server.start("127.0.0.1", 0)
        async with asyncio.timeout(20):
            await talk(port)
        await server.stop()

    run(main())


def test_a_response_is_given_once(run: Run) -> None:
    def twice(_request: IncomingRequest, response: Response) -> None:
        with pytest.raises(RuntimeError, match="takes no data"):
            response.write(b"early")
        with pytest.raises(RuntimeError, match="cannot end"):
            response.end()
        response.reply(200, [], b"first")
        with pytest.raises(RuntimeError, match="started before"):
            response.reply(200, [], b"second")
        with pytest.raises(RuntimeError, match="takes no data"):
            response.write(b"late")

    async def talk(port: int) -> None:
        assert (await exchange(port, CLOSE)).endswith(b"\r\n\r\nfirst")

    serve(run, twice, talk)


def test_a_failing_handler_closes_the_connection_and_is_reported(run: Run) -> None:
    def fail(_request: IncomingRequest, _response: Response) -> None:
        raise ZeroDivisionError("bug")

    async def main() -> list[str]:
        reported: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: reported.append(repr(context.get("exception")))
        )
        server = HttpServer(fail)
        port = await server.start("127.0.0.1", 0)
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionResetError):
                assert await exchange(port, GET) == b""
        await server.stop()
        return reported

    assert run(main()) == ["ZeroDivisionError('bug')"]
