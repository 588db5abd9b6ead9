"""Any bytes in any pieces: what is read does not depend on the split, and a connection never breaks its order."""

import asyncio
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loadstone.wire.request_reader import PIECE_BYTES, IncomingRequest, RequestReader
from loadstone.wire.server import Headers, HttpServer, Response
from loadstone.wire.server_connection import ServerConnection
from plain import plain

MOST_BODY = 200
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

LINES = [
    b"GET / HTTP/1.1", b"POST /p?q HTTP/1.1", b"HEAD /h HTTP/1.1", b"GET / HTTP/1.0", b"POST http://y/z HTTP/1.1",
    b"CONNECT y:1 HTTP/1.1", b"PRI * HTTP/2.0", b"OPTIONS * HTTP/1.1", b"GET /",
]  # fmt: skip
HEADERS = [
    b"Host: x", b"Host: y", b"Content-Length: 5", b"Content-Length: 201", b"content-length: 0", b"Content-Length : 5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding: gzip, chunked", b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade",
    b"Upgrade: h2c", b"Expect: 100-continue", b"Expect: x", b" folded: 1", b"A: \0", b"A:", b": a", b"X: " + b"y" * 50,
]  # fmt: skip
BODIES = [
    b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"3;a=b\r\nabc\r\n0\r\nT: u\r\n\r\n", b"0\r\n\r\n", b"fffffffff\r\n",
    b"1\r\nab\r\n", b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n",
]  # fmt: skip

some_headers = st.lists(st.sampled_from(HEADERS), max_size=5)
messages = st.builds(
    lambda line, headers, end, body: line + end + b"".join(one + end for one in headers) + end + body,
    st.sampled_from(LINES),
    some_headers.map(lambda some: [b"Host: x", *some]) | some_headers,
    st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r"]),
    st.sampled_from(BODIES),
)
several = st.lists(messages, min_size=1, max_size=4).map(b"".join)


def spoilt(data: bytes, place: int, with_bytes: bytes) -> bytes:
    at = place % (len(data) + 1)
    return data[:at] + with_bytes + data[at + (place & 1) :]


hostile = st.one_of(
    st.binary(max_size=200), several, st.builds(spoilt, several, st.integers(0, 2000), st.binary(max_size=2))
)


def cut_up(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


def read(pieces: list[bytes]) -> tuple[list[tuple[IncomingRequest, bool]], int]:
    reader = RequestReader(MOST_BODY)
    for piece in pieces:
        reader.feed(piece)
    reader.close()
    return reader.ready, reader.error.status if reader.error else 0


@quick
@given(hostile, st.lists(st.integers(0, 5000), max_size=12))
def test_the_split_changes_nothing(data: bytes, cuts: list[int]) -> None:
    whole = plain(read([data]))
    assert plain(read(cut_up(data, cuts))) == whole
    assert plain(read([data[at : at + 1] for at in range(len(data))])) == whole


TOKEN = re.compile(rb"[a-z0-9!#$%&'*+\-.^_`|~]+")


@quick
@given(hostile)
def test_what_reaches_the_handler_is_sound(data: bytes) -> None:
    requests, _status = read([data])
    for request, _keep_alive in requests:
        names = [name for name, _value in request.headers]
        assert names.count(b"host") <= 1
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert request.version in ("1.0", "1.1")
        assert request.path.startswith("/") or (request.path, request.method) == ("*", "OPTIONS")
        assert len(request.body) <= MOST_BODY
        assert all(TOKEN.fullmatch(name) for name in names)
        assert not re.search(rb"[\x00-\x20\x7f-\xff]", request.target)
        assert not any(re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value) for _name, value in request.headers)
        announced = request.header(b"content-length")
        if request.header(b"transfer-encoding") is None:
            assert len(request.body) == int(announced or 0)
    assert all(keep_alive for _request, keep_alive in requests[:-1]), "nothing after a last request"


values = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(str.encode)
bodies = st.binary(max_size=MOST_BODY)


@st.composite
def requests_and_bytes(draw: st.DrawFn) -> tuple[tuple[str, str, bytes, bytes], bytes]:
    """A good request, and one of the ways to say it."""
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE"]))
    path = draw(st.text("abc/.-_~%1", max_size=20))
    query = draw(st.text("abc=&?/1", max_size=20)).encode()
    body = draw(bodies)
    extra = b"".join(b"X:%b %b\r\n" % (b" " * (len(value) % 3), value) for value in draw(st.lists(values)))
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=20))
        framing, sent = b"Transfer-Encoding: chunked\r\n", chunked(body, sizes, draw(st.booleans()))
    elif body:
        framing, sent = b"Content-Length: %d\r\n" % len(body), body
    else:
        framing = sent = b""
    upgrade = draw(st.sampled_from([b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"]))
    target = f"/{path}".encode() + (b"?" + query if query else b"")
    head = b"%b %b HTTP/1.1\r\nHost: x\r\n%b%b%b\r\n" % (method.encode(), target, upgrade, extra, framing)
    return (method, f"/{path}", query, body), head + sent


def chunked(body: bytes, sizes: list[int], adorned: bool) -> bytes:
    out, at, turn = b"", 0, 0
    extension, trailer = (b";a=b", b"Trailer: t\r\n") if adorned else (b"", b"")
    while at < len(body):
        piece = body[at : at + sizes[turn % len(sizes)]]
        out += b"%x%b\r\n%b\r\n" % (len(piece), extension, piece)
        at, turn = at + len(piece), turn + 1
    return out + b"0\r\n" + trailer + b"\r\n"


@quick
@given(st.lists(requests_and_bytes(), min_size=1, max_size=5), st.lists(st.integers(0, 5000), max_size=12))
def test_good_requests_are_read_as_they_were_meant(
    meant: list[tuple[tuple[str, str, bytes, bytes], bytes]], cuts: list[int]
) -> None:
    requests, status = read(cut_up(b"".join(data for _request, data in meant), cuts))
    assert status == 0
    assert [(one.method, one.path, one.query, one.body) for one, _ in requests] == [request for request, _data in meant]


@quick
@given(st.lists(st.binary(max_size=PIECE_BYTES), max_size=3))
def test_large_rubbish_is_survived(pieces: list[bytes]) -> None:
    read(pieces)


class FakeTransport(asyncio.Transport):
    """Takes everything, through its socket too, and says nothing."""

    def __init__(self) -> None:
        self.near, self._far = socket.socketpair()
        self._far.setblocking(False)
        super().__init__({"peername": ("1.2.3.4", 5), "socket": self.near})
        self._sent = b""
        self.closed = False
        self._finished = False

    @property
    def sent(self) -> bytes:
        with suppress(BlockingIOError):
            while data := self._far.recv(65_536):
                self._sent += data
        return self._sent

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert data
        assert not self._finished
        self.near.sendall(data)

    def write_eof(self) -> None:
        self._finished = True
        self.near.shutdown(socket.SHUT_WR)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = self._finished = True

    def abort(self) -> None:
        self.close()

    def pause_reading(self) -> None:
        assert not self.closed

    def resume_reading(self) -> None:
        assert not self.closed

    def release(self) -> None:
        self.near.close()
        self._far.close()


class Play:
    """A connection, a handler that numbers its requests, and what it was told."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.server = HttpServer(self._handle, max_body_bytes=MOST_BODY, on_reject=lambda _: self.rejected.append(1))
        self.connection = ServerConnection(self.server, self._loop)
        self.transport = FakeTransport()
        self.waiting: list[tuple[int, Response]] = []
        self.answered: list[int] = []
        self.left: list[int] = []
        self.rejected: list[int] = []
        self.errors: list[dict[str, Any]] = []
        self.failing = False
        self._taken = 0

    def _handle(self, _request: IncomingRequest, response: Response) -> None:
        assert not self.waiting, "one at a time"
        number = self._taken
        self._taken += 1
        response.on_disconnect = lambda: self.left.append(number)
        self.waiting.append((number, response))
        if self.failing:
            raise ZeroDivisionError

    def data(self, data: bytes) -> None:
        if not (self.transport.closed or self.connection._eof):
            self.connection.data_received(data)

    def reply(self) -> None:
        self._answer(lambda response, named: response.reply(200, named, b"whole"))

    def stream(self) -> None:
        def stream(response: Response, named: Headers) -> None:
            response.start(200, named)
            response.write(b"one")
            response.end()

        self._answer(stream)

    def _answer(self, how: Callable[[Response, Headers], None]) -> None:
        if self.waiting:
            number, response = self.waiting.pop()
            if not self.transport.closed:
                self.answered.append(number)
            how(response, [(b"number", b"%d" % number)])

    def fail(self) -> None:
        if self.waiting:
            self.waiting.pop()[1].fail()

    def pause(self) -> None:
        if not self.connection.congested:
            self.connection.pause_writing()

    def resume(self) -> None:
        if self.connection.congested:
            self.connection.resume_writing()

    def sweep(self) -> None:
        self.connection.overdue(self._loop.time() + 1000)

    def drain(self) -> None:
        self.server.draining = True
        self.connection.drain()

    def break_handler(self) -> None:
        self.failing = True

    def eof(self) -> None:
        if not (self.transport.closed or self.connection._eof) and not self.connection.eof_received():
            self.transport.close()


ACTIONS = ["reply", "reply", "stream", "fail", "pause", "resume", "sweep", "drain", "break_handler", "eof"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(hostile, several, st.sampled_from(ACTIONS)), max_size=15))
@example([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3, "pause", "reply", "resume", "reply", "eof", "reply"])
def test_a_connection_answers_in_order_whatever_happens(script: list[bytes | str]) -> None:
    async def main() -> None:
        play = Play()
        play.connection.connection_made(play.transport)
        for action in script:
            play.data(action) if isinstance(action, bytes) else getattr(play, action)()
            await asyncio.sleep(0)
        play.connection.connection_lost(None)
        assert play.left == [number for number, _response in play.waiting], "told once, where no answer was given"
        assert play.server.connections == set()
        numbers = re.findall(rb"\r\nnumber: (\d+)\r\n", play.transport.sent)
        assert [int(number) for number in numbers] == play.answered
        assert len(play.errors) <= play.failing
        assert len(play.rejected) <= 1
        await play.server.stop()
        play.transport.release()

    asyncio.run(main())


def test_a_connection_announced_while_the_server_stops_is_closed() -> None:
    async def main() -> None:
        server = HttpServer(lambda _request, _response: None)
        await server.start("127.0.0.1", 0)
        await server.stop()
        connection, transport = ServerConnection(server, asyncio.get_running_loop()), FakeTransport()
        connection.connection_made(transport)
        assert transport.closed
        connection.connection_lost(None)
        transport.release()

    asyncio.run(main())
