"""Clients that are slow, that leave, that read nothing; draining. Real sockets, in virtual time where time passes."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loadstone.sim.clock import DeadlockError, VirtualClock, run_virtual
from loadstone.wire.server import HttpServer, IncomingRequest, Response
from raw_clients import GET, LAST, RawClient, connected, exchange, listening, on_each_loop, run_on
from wire_servers import turns_until

NewLoop = Callable[[], asyncio.AbstractEventLoop]
POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"


def virtually(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def run(_clock: VirtualClock) -> Any:
        return await main()

    return run_virtual(run)


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def gone(server: HttpServer, every_s: float = 0.0) -> None:
    while server.connections:  # noqa: ASYNC110 - what is waited for has no event of its own
        await asyncio.sleep(every_s)


class Holding:
    """A handler that keeps every response, and counts the clients that left."""

    def __init__(self) -> None:
        self.kept: list[Response] = []
        self.left = 0
        self.drained = 0
        self.changed = asyncio.Event()

    def __call__(self, _request: IncomingRequest, response: Response) -> None:
        response.on_disconnect = self._leave
        response.on_drained = self._drain
        self.kept.append(response)
        self.changed.set()

    def _leave(self) -> None:
        self.left += 1
        self.changed.set()

    def _drain(self) -> None:
        self.drained += 1
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def taken(self, client: RawClient, data: bytes = GET) -> Response:
        """Send a request and wait until it is here."""
        count = len(self.kept)
        await client.send(data)
        await self.until(lambda: len(self.kept) > count)
        return self.kept[-1]


# -- deadlines ------------------------------------------------------------------------------------------------------


async def dripped(port: int, at_once: bytes, data: bytes) -> tuple[bytes, float]:
    """Send ``data`` at a byte a second; what came back, and after how long."""
    async with connected(port) as client:
        await client.send(at_once)
        start_s = now_s()
        reading = asyncio.ensure_future(client.rest())
        for byte in data:
            await client.send(bytes([byte]))
            if (await asyncio.wait([reading], timeout=1.0))[0]:
                break
        return await reading, now_s() - start_s


CHUNKED = b"POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("at_once", "slowly", "least_s", "what"),
    [
        (b"", LAST, 10, b"the head"),
        (b"", b"G", 10, b"the head"),
        (GET, LAST, 10, b"the head"),
        (POST, b"x" * 99, 60, b"the body"),
        (CHUNKED, b"1;a=b\r\nx\r\n" * 20, 60, b"the body"),
    ],
    ids=["head", "first byte", "second head", "body", "chunks"],
)
def test_a_request_that_comes_too_slowly_is_answered_408(
    at_once: bytes, slowly: bytes, least_s: float, what: bytes
) -> None:
    rejected: list[int] = []

    async def main() -> None:
        async with listening(on_reject=rejected.append) as (_server, port):
            received, after_s = await dripped(port, at_once, slowly)
            refusal = received[received.index(b"HTTP/1.1 408 Request Timeout\r\n") :]
            assert what in refusal
            assert least_s <= after_s <= least_s + 3
        assert rejected == [408]

    virtually(main)


def test_a_body_that_keeps_coming_has_its_time() -> None:
    async def main() -> None:
        size = 8 * 1024 * 1024
        async with listening() as (_server, port), connected(port) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(80):
                await client.send(b"x" * (size // 80))
                await asyncio.sleep(1.5)
            await client.send(b"x" * (size % 80))
            assert (await client.rest()).startswith(b"HTTP/1.1 200 OK")
            assert now_s() > 115

    virtually(main)


def test_a_client_may_take_its_time_between_requests_but_not_for_ever() -> None:
    async def main() -> None:
        async with listening() as (server, port), connected(port) as client:
            for _ in range(3):
                await asyncio.sleep(70)
                await client.send(GET)
                assert (await client.reader.readuntil(b"b=c ")).startswith(b"HTTP/1.1 200 OK")
            start_s = now_s()
            assert await client.rest() == b"", "closed without a word"
            assert 75 <= now_s() - start_s <= 77
            assert not server.connections

    virtually(main)


def test_empty_lines_keep_no_connection_open() -> None:
    async def main() -> None:
        async with listening() as (_server, port):
            received, after_s = await dripped(port, b"", b"\r\n" * 200)
            assert received == b""
            assert 75 <= after_s <= 77

    virtually(main)


def test_an_answer_may_take_any_time() -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (_server, port), connected(port) as client:
            response = await holding.taken(client, LAST)
            await asyncio.sleep(3600)
            response.reply(200, [], b"late")
            assert (await client.rest()).endswith(b"late")

    virtually(main)


def test_without_connections_no_timer_runs() -> None:
    async def main() -> None:
        async with listening() as (_server, port):
            await exchange(port, LAST)
            await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        virtually(main)


def test_a_refused_client_that_stays_is_cut() -> None:
    async def main() -> None:
        async with listening() as (server, port), connected(port) as client:
            await client.send(b"bad\r\n\r\n")
            assert (await client.rest()).startswith(b"HTTP/1.1 400 ")
            while server.connections:
                await client.send(b"more")
                await asyncio.sleep(0.5)
            assert 2 <= now_s() <= 5

    virtually(main)


# -- back-pressure --------------------------------------------------------------------------------------------------

LARGE = b"x" * 16 * 1024 * 1024


@pytest.mark.parametrize("ended", [False, True])
def test_a_client_that_reads_nothing_is_cut(ended: bool) -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (server, port), connected(port) as client:
            response = await holding.taken(client)
            response.start(200, [], len(LARGE))
            response.write(LARGE)
            assert response.congested
            if ended:
                response.end()
            start_s = now_s()
            await gone(server, 1.0)
            assert 30 <= now_s() - start_s <= 33
            assert holding.left == (0 if ended else 1)

    virtually(main)


def test_a_client_that_reads_slowly_gets_all_and_the_writer_is_told_when_to_go_on() -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (_server, port), connected(port) as client:
            response = await holding.taken(client, LAST)
            response.start(200, [], 3 * len(LARGE))
            for turn in range(3):
                response.write(LARGE)
                assert response.congested
                while holding.drained == turn:
                    await client.reader.readexactly(1024 * 1024)
                    await asyncio.sleep(20)
                assert not response.congested
            response.end()
            assert len(await client.rest()) > 0
            assert now_s() > 300
            assert holding.left == 0

    virtually(main)


@on_each_loop
def test_the_next_request_waits_until_the_client_has_caught_up(new_loop: NewLoop) -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (_server, port), connected(port) as client:
            (await holding.taken(client, GET + LAST)).reply(200, [], LARGE)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(holding.kept) == 1
            await client.reader.readuntil(b"\r\n\r\n")
            await client.reader.readexactly(len(LARGE))
            await holding.until(lambda: len(holding.kept) == 2)
            holding.kept[1].reply(200, [], b"second")
            assert (await client.rest()).endswith(b"second")

    run_on(new_loop, main())


# -- leaving --------------------------------------------------------------------------------------------------------


@on_each_loop
@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("state", ["waiting", "held", "streaming", "pipelining"])
def test_the_handler_learns_at_once_that_the_client_has_left(new_loop: NewLoop, reset: bool, state: str) -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (server, port), connected(port) as client:
            response = await holding.taken(client, GET * 3 if state == "pipelining" else GET)
            if state in ("held", "streaming"):
                response.start(200, [])
            if state == "streaming":
                response.write(b"one")
                await client.reader.readuntil(b"one\r\n")
            if reset:
                client.reset()
            else:
                client.writer.close()
            await holding.until(lambda: holding.left == 1)
            await gone(server)
            response.start(200, []) if not response.started else response.write(b"dropped")
            response.end()
            assert (holding.left, len(holding.kept)) == (1, 1)

    run_on(new_loop, main())


@on_each_loop
@pytest.mark.parametrize("data", [b"", b"GET / HT", POST, POST + b"x" * 50, b"bad\r\n\r\n"])
@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_client_may_leave_in_any_other_state(new_loop: NewLoop, data: bytes, reset: bool) -> None:
    async def main() -> None:
        async with listening() as (server, port):
            async with connected(port) as client:
                await client.send(data)
                await turns_until(lambda: server.connections)
                if reset:
                    client.reset()
            await gone(server)

    run_on(new_loop, main())


@on_each_loop
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_only_stops_sending_gets_its_answers(new_loop: NewLoop, version: bytes, streamed: bool) -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (server, port), connected(port) as client:
            request = b"GET / HTTP/%b\r\nHost: x\r\nConnection: keep-alive\r\n\r\n" % version
            response = await holding.taken(client, request * 2)
            client.writer.write_eof()
            (connection,) = server.connections
            await turns_until(lambda: connection._eof)
            response.reply(200, [], b"first")
            await holding.until(lambda: len(holding.kept) == 2)
            if streamed:
                holding.kept[1].start(200, [])
                holding.kept[1].write(b"second")
                holding.kept[1].end()
            else:
                holding.kept[1].reply(200, [], b"second")
            received = await client.rest()
            assert received.count(b"HTTP/1.1 200 OK\r\n") == 2
            assert b"first" in received
            assert b"second" in received
            assert holding.left == 0

    run_on(new_loop, main())


@on_each_loop
def test_a_client_that_stops_sending_in_mid_stream_gets_the_rest(new_loop: NewLoop) -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (server, port), connected(port) as client:
            response = await holding.taken(client)
            response.start(200, [])
            response.write(b"one")
            await client.reader.readuntil(b"one\r\n")
            client.writer.write_eof()
            (connection,) = server.connections
            await turns_until(lambda: connection._eof)
            response.write(b"two")
            response.end()
            assert await client.rest() == b"03\r\ntwo\r\n0\r\n\r\n"

    run_on(new_loop, main())


# -- ends -----------------------------------------------------------------------------------------------------------


@on_each_loop
def test_the_framing_is_the_one_asked_for(new_loop: NewLoop) -> None:
    def handler(request: IncomingRequest, response: Response) -> None:
        status, length = int(request.path[1:]), int(request.query) if request.query else None
        response.start(status, [], length)
        response.write(b"hell")
        response.end(b"o")

    async def main() -> None:
        async with listening(handler) as (_server, port):

            async def answer(method: bytes, target: bytes, version: bytes = b"1.1") -> bytes:
                request = b"%b %b HTTP/%b\r\nHost: x\r\nConnection: close\r\n\r\n" % (method, target, version)
                return (await exchange(port, request)).partition(b"\r\n")[2]

            close = b"connection: close\r\n\r\n"
            assert await answer(b"GET", b"/200?5") == b"content-length: 5\r\n" + close + b"hello"
            chunked = b"transfer-encoding: chunked\r\n" + close
            assert await answer(b"GET", b"/200") == chunked + b"4\r\nhell\r\n1\r\no\r\n0\r\n\r\n"
            assert await answer(b"GET", b"/200", b"1.0") == close + b"hello"
            assert await answer(b"HEAD", b"/200?77") == b"content-length: 77\r\n" + close
            assert await answer(b"HEAD", b"/200") == chunked
            assert await answer(b"GET", b"/204?5") == close
            assert await answer(b"GET", b"/304") == close
            assert await answer(b"GET", b"/599?5") == b"content-length: 5\r\n" + close + b"hello"

    run_on(new_loop, main())


@pytest.mark.parametrize("written", [b"four", b"sixsix"])
def test_a_body_of_another_length_than_promised_cuts_the_connection(written: bytes) -> None:
    async def main() -> None:
        errors: list[str] = []

        def handler(_request: IncomingRequest, response: Response) -> None:
            response.start(200, [], 5)
            with pytest.raises(RuntimeError) as caught:
                response.end(written)
            errors.append(str(caught.value))

        async with listening(handler) as (_server, port):
            received = await exchange(port, GET * 2)
            assert received.count(b"200 OK") == 1
            assert b"sixsix" not in received
        assert errors in (
            ["<Response ended> ended 1 bytes short"],
            ["<Response ended> got 1 bytes more than it promised"],
        )

    asyncio.run(main())


@on_each_loop
@pytest.mark.parametrize(("version", "length"), [(b"1.1", None), (b"1.1", 9), (b"1.0", None)])
def test_a_failure_in_mid_stream_can_be_told(new_loop: NewLoop, version: bytes, length: int | None) -> None:
    async def main() -> None:
        holding = Holding()
        async with listening(holding) as (_server, port), connected(port) as client:
            response = await holding.taken(client, b"GET / HTTP/%b\r\nHost: x\r\n\r\n" % version + GET)
            response.start(200, [], length)
            response.write(b"one")
            assert (await client.reader.readuntil(b"one")).startswith(b"HTTP/1.1 200")
            response.fail()
            response.fail()
            if version == b"1.0":
                with pytest.raises(ConnectionResetError):
                    await client.rest()
            else:
                assert await client.rest() in (b"\r\n", b"")
            with pytest.raises(RuntimeError):
                response.write(b"two")
            assert (holding.left, len(holding.kept)) == (0, 1)

    run_on(new_loop, main())


@on_each_loop
def test_draining_answers_what_runs_and_closes_the_rest(new_loop: NewLoop) -> None:
    async def main() -> None:
        holding = Holding()
        server = HttpServer(holding)
        port = await server.start("127.0.0.1", 0)
        async with connected(port) as fresh, connected(port) as idle, connected(port) as busy, connected(port) as late:
            (await holding.taken(idle)).reply(204, [], b"")
            await idle.reader.readuntil(b"\r\n\r\n")
            waiting = await holding.taken(busy, GET * 2)
            await late.send(POST + b"x")
            await turns_until(lambda: len(server.connections) == 4 and "body" in repr(server.connections))
            draining = asyncio.ensure_future(server.drain())
            assert await fresh.rest() == b""
            assert await idle.rest() == b""
            assert repr(server) == "<HttpServer draining, 2 connections>"
            waiting.reply(200, [], b"last words")
            received = await busy.rest()
            assert b"connection: close\r\n" in received
            assert received.endswith(b"last words"), "and no answer to the one behind it"
            (await holding.taken(late, b"x" * 99)).reply(200, [], b"late")
            assert (await late.rest()).endswith(b"late")
            busy.writer.close()
            late.writer.close()
            await draining
        with pytest.raises(OSError, match="onnect"):
            await asyncio.open_connection("127.0.0.1", port)
        await server.stop()
        assert holding.left == 0

    run_on(new_loop, main())


@on_each_loop
def test_small_pieces_are_not_kept_back(new_loop: NewLoop) -> None:
    options: list[int] = []

    async def main() -> None:
        async with listening() as (server, port), connected(port) as client:
            await client.send(GET)
            await client.reader.readuntil(b"b=c ")
            (connection,) = server.connections
            peer = connection._transport.get_extra_info("socket")
            options.append(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    run_on(new_loop, main())
    assert options[0] != 0


def test_a_failing_handler_of_a_later_request_is_not_the_earlier_ones_fault() -> None:
    async def main() -> None:
        reported: list[str] = []
        holding = Holding()

        def handler(request: IncomingRequest, response: Response) -> None:
            holding(request, response)
            if request.path == "/last":
                raise ZeroDivisionError("bug")

        server = HttpServer(handler)
        port = await server.start("127.0.0.1", 0)
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context["message"]))
        async with connected(port) as client:
            (await holding.taken(client, GET + LAST)).reply(200, [], b"fine")
            await holding.until(lambda: holding.left == 1)
        await server.stop()
        assert reported == ["GET /last could not be handled"]

    asyncio.run(main())
