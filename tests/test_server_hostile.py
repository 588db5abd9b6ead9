"""What hostile clients send: the reader alone (whole, byte by byte, with trailing data), then real sockets."""

import asyncio
from collections.abc import Callable

import pytest

from loadstone.wire.request_reader import PIECE_BYTES, IncomingRequest, RequestReader
from loadstone.wire.server import Headers, Response
from raw_clients import GET, LAST, connected, exchange, listening, on_each_loop, run_on

MOST_BODY = 1000
POST = b"POST /p HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def get(line: bytes) -> bytes:
    """A GET with one more header line."""
    return b"GET / HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n"


REFUSED: dict[str, tuple[bytes, int]] = {
    # two lengths, or none that is clear
    "cl+te": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "te+cl": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
    "te chunked, identity": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "te identity": (POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", 501),
    "te gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "te xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "te quoted": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 501),
    "te vertical tab": (POST + b"Transfer-Encoding: chunked\x0b\r\n\r\n0\r\n\r\n", 400),
    "te twice": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "te identity, then chunked": (POST + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "te of HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "te empty": (POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n", 400),
    "te folded": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "cl twice": (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
    "cl twice, different": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "cl +5": (POST + b"Content-Length: +5\r\n\r\nabcde", 400),
    "cl 5, 5": (POST + b"Content-Length: 5, 5\r\n\r\nabcde", 400),
    "cl 5 5": (POST + b"Content-Length: 5 5\r\n\r\nabcde", 400),
    "cl -1": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "cl 0x5": (POST + b"Content-Length: 0x5\r\n\r\nabcde", 400),
    "cl 1_0": (POST + b"Content-Length: 1_0\r\n\r\nabcdeabcde", 400),
    "cl empty": (POST + b"Content-Length:\r\n\r\n", 400),
    "cl of 23 digits": (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
    "cl 2^64 - 1": (POST + b"Content-Length: 18446744073709551615\r\n\r\n", 413),
    "cl too large": (POST + b"Content-Length: 1001\r\n\r\n", 413),
    "cl of 100 MB, expecting 100": (POST + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n", 413),
    # lines and names
    "bare LF everywhere": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "bare LF after a header": (b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400),
    "bare LF at the end": (b"GET / HTTP/1.1\r\nHost: x\r\n\n", 400),
    "bare CR": (get(b"A: b\rC: d"), 400),
    "folded": (get(b"A: b\r\n c"), 400),
    "folded by a tab": (get(b"A: b\r\n\tc"), 400),
    "folded first": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "space before the colon": (POST + b"Content-Length : 3\r\n\r\nabc", 400),
    "tab before the colon": (POST + b"Content-Length\t: 3\r\n\r\nabc", 400),
    "no name": (get(b": c"), 400),
    "no colon": (get(b"abc"), 400),
    "NUL in a name": (get(b"A\0b: c"), 400),
    "high byte in a name": (get(b"A\x80: c"), 400),
    "bracket in a name": (get(b"A(b): c"), 400),
    "NUL in a value": (get(b"A: b\0c"), 400),
    "control byte in a value": (get(b"A: b\x01c"), 400),
    "DEL in a value": (get(b"A: b\x7fc"), 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (get(b"Host: x"), 400),
    "two Hosts of HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    # request lines
    "authority": (b"GET a.b:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "another scheme": (b"GET ftp://a.b/c HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "asterisk of GET": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "fragment": (b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "high byte in the target": (b"GET /\x80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "NUL in the target": (b"GET /a\0b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space in the target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space after the version": (b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    "CONNECT": (b"CONNECT a.b:80 HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    "RTSP": (b"DESCRIBE / RTSP/1.0\r\n\r\n", 501),
    "lower-case method": (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "unknown method": (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "HTTP/0.9": (b"GET / HTTP/0.9\r\n\r\n", 505),
    "no version": (b"GET /\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", 505),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "lower-case version": (b"GET / http/1.1\r\nHost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a response": (b"HTTP/1.1 200 OK\r\n\r\n", 400),
    "another expectation": (POST + b"Expect: money\r\nContent-Length: 3\r\n\r\nabc", 417),
    # too much
    "long header": (get(b"A: " + b"x" * 70_000), 431),
    "long name": (get(b"x" * 70_000 + b": a"), 431),
    "long target": (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "endless header": (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 300_000, 431),
    "300 headers": (get(b"\r\n".join([b"A: b"] * 300)), 431),
    "5,000 headers": (get(b"\r\n".join([b"A: b"] * 5000)), 431),
    # chunks
    "chunk size overflows": (CHUNKED + b"fffffffffffffffff\r\nabc", 400),
    "chunk of 2^64 - 1": (CHUNKED + b"ffffffffffffffff\r\n" + b"x" * 1001, 413),
    "chunk beyond the bound": (CHUNKED + b"3e9\r\n" + b"x" * 1001, 413),
    "chunks beyond the bound": (CHUNKED + b"1\r\nx\r\n" * 1001, 413),
    "negative chunk": (CHUNKED + b"-3\r\nabc", 400),
    "chunk 0x3": (CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", 400),
    "chunk without a size": (CHUNKED + b"\r\nabc\r\n0\r\n\r\n", 400),
    "chunk longer than its size": (CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", 400),
    "chunk size ended by LF": (CHUNKED + b"3\nabc\r\n0\r\n\r\n", 400),
    "space after a chunk size": (CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n", 400),
    "extension ended by LF": (CHUNKED + b"3;a\nabc\r\n0\r\n\r\n", 400),
    "NUL in an extension": (CHUNKED + b"3;\0\r\nabc\r\n0\r\n\r\n", 400),
    "endless extension": (CHUNKED + b"3;" + b"a" * 300_000, 400),
    "endless trailer": (CHUNKED + b"0\r\nA: " + b"x" * 300_000, 400),
    "length in the trailer": (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
    "coding in the trailer": (CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "folded trailer": (CHUNKED + b"0\r\nA: b\r\n c\r\n\r\n", 400),
    "more than the length": (POST + b"Content-Length: 3\r\n\r\nabc0\r\n\r\n", 400),
}
BEFORE_IT = {"more than the length": 1}
"""Requests that are complete before the wrong one."""


def read(data: bytes, piece: int) -> tuple[list[IncomingRequest], int]:
    """Requests and the status of the refusal, 0 for none."""
    reader = RequestReader(MOST_BODY)
    piece = min(piece, PIECE_BYTES)
    for start in range(0, len(data), piece):
        reader.feed(data[start : start + piece])
    requests = [request for request, _keep_alive in reader.ready]
    status = reader.error.status if reader.error else 0
    reader.close()
    return requests, status


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_however_it_is_split(data: bytes, status: int, request: pytest.FixtureRequest) -> None:
    before = next((count for name, count in BEFORE_IT.items() if f"[{name}]" in request.node.name), 0)
    for text, piece in (
        (data, len(data)),
        (data, 1),
        (data, 7),
        (data + GET, len(data) + len(GET)),
        (data + GET, 16384),
    ):
        requests, said = read(text, piece)
        assert (len(requests), said) == (before, status)


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\nHost: x", b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 9"])
def test_what_stands_behind_a_refusal_is_never_read(line: bytes) -> None:
    reader = RequestReader(MOST_BODY)
    reader.feed(line + b"\r\nHost: y\r\n\r\n" + GET)
    reader.feed(GET)
    assert reader.ready == []
    assert repr(reader) == "<RequestReader refused 400, 0 ready>"


ACCEPTED: dict[str, tuple[bytes, list[tuple[str, str, bytes, bytes]]]] = {
    "plain": (GET, [("GET", "/a", b"b=c", b"")]),
    "empty lines before it": (b"\r\n\r\n" + GET, [("GET", "/a", b"b=c", b"")]),
    "absolute": (b"GET http://y:1/c/d?e HTTP/1.1\r\nHost: x\r\n\r\n", [("GET", "/c/d", b"e", b"")]),
    "absolute without a path": (b"GET HTTP://y HTTP/1.1\r\nHost: x\r\n\r\n", [("GET", "/", b"", b"")]),
    "absolute with only a query": (b"GET http://y?e/f HTTP/1.1\r\nHost: x\r\n\r\n", [("GET", "/", b"e/f", b"")]),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [("OPTIONS", "*", b"", b"")]),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", [("GET", "/", b"", b"")]),
    "spaces around a length": (POST + b"Content-Length:  3 \r\n\r\nabc", [("POST", "/p", b"", b"abc")]),
    "coding in capitals": (POST + b"Transfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\n", [("POST", "/p", b"", b"")]),
    "extensions and trailers": (
        CHUNKED + b'3;a=b;c="d"\r\nabc\r\n2\r\nde\r\n0;x\r\nContent-Type: t\r\nHost: z\r\n\r\n',
        [("POST", "/p", b"", b"abcde")],
    ),
    "upgrade": (
        get(b"Connection: Upgrade\r\nUpgrade: h2c") + GET,
        [("GET", "/", b"", b""), ("GET", "/a", b"b=c", b"")],
    ),
    "upgrade with a body": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc" + GET,
        [("POST", "/p", b"", b"abc"), ("GET", "/a", b"b=c", b"")],
    ),
    "upgrade with chunks": (
        POST + b"Connection: Upgrade\r\nUpgrade: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + GET,
        [("POST", "/p", b"", b"abc"), ("GET", "/a", b"b=c", b"")],
    ),
    "last upgrade with a body": (
        POST + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc" + GET,
        [("POST", "/p", b"", b"abc")],
    ),
    "upgrade whose body looks like a request": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n%b" % (len(GET), GET),
        [("POST", "/p", b"", GET)],
    ),
    "after the last": (LAST + GET + b"\0", [("GET", "/last", b"", b"")]),
    "after the last of HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n" + GET, [("GET", "/", b"", b"")]),
    "1,000 upgrades": (get(b"Connection: Upgrade\r\nUpgrade: x") * 1000, [("GET", "/", b"", b"")] * 1000),
    "as many headers as may be": (get(b"\r\n".join([b"A: b"] * 255)), [("GET", "/", b"", b"")]),
    "as many bytes as may be": (
        POST + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000,
        [("POST", "/p", b"", b"x" * 1000)],
    ),
}


@pytest.mark.parametrize(("data", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_unusual_but_right_is_read_however_it_is_split(
    data: bytes, expected: list[tuple[str, str, bytes, bytes]]
) -> None:
    for piece in (len(data), 1, 7):
        requests, status = read(data, piece)
        assert status == 0
        assert [(one.method, one.path, one.query, one.body) for one in requests] == expected


def test_a_request_has_its_parts() -> None:
    ((one,), _) = read(b"GET http://y/c?d=e HTTP/1.0\r\nHost: x\r\nX-A:  b \t\r\nx-a:\r\nC: \x80\r\n\r\n", 5)
    assert (one.target, one.version, one.peer) == (b"http://y/c?d=e", "1.0", "")
    assert one.headers == [(b"host", b"x"), (b"x-a", b"b"), (b"x-a", b""), (b"c", b"\x80")]
    assert one.header(b"x-a") == b"b"
    assert one.header(b"none") is None


def test_trailers_are_not_headers() -> None:
    ((one,), _) = read(CHUNKED + b"0\r\nAuthorization: stolen\r\n\r\n", 1)
    assert one.header(b"authorization") is None


# -- on real sockets ------------------------------------------------------------------------------------------------

NewLoop = Callable[[], asyncio.AbstractEventLoop]


@on_each_loop
def test_the_whole_corpus_on_one_server(new_loop: NewLoop) -> None:
    """Refused, closed, counted; never handed to the handler, even what follows; and the server serves on."""
    seen: list[str] = []
    rejected: list[int] = []

    def handler(request: IncomingRequest, response: Response) -> None:
        seen.append(request.path)
        response.reply(200, [], b"served")

    async def main() -> None:
        async with listening(handler, max_body_bytes=MOST_BODY, on_reject=rejected.append) as (_server, port):
            for name, (data, status) in REFUSED.items():
                for piece in (0, 997):
                    received = await exchange(port, data + LAST, piece=piece)
                    refusal = received[received.index(b"HTTP/1.1 %d " % status) :]
                    assert b"connection: close\r\n" in refusal, name
                    assert rejected.pop() == status
                    assert seen == ["/p"] * BEFORE_IT.get(name, 0)
                    seen.clear()
            assert (await exchange(port, LAST)).endswith(b"served")

    run_on(new_loop, main())


def test_the_owner_words_its_refusals() -> None:
    def error_body(status: int, reason: str) -> tuple[Headers, bytes]:
        return [(b"content-type", b"application/json")], b'{"status": %d, "reason": "%b"}' % (status, reason.encode())

    async def main() -> None:
        async with listening(error_body=error_body) as (_server, port):
            received = await exchange(port, b"GET / HTTP/1.1\r\n\r\n")
            assert b"content-type: application/json\r\n" in received
            assert received.endswith(b'\r\n\r\n{"status": 400, "reason": "0 Host headers"}')

    asyncio.run(main())


@on_each_loop
@pytest.mark.parametrize("piece", [0, 1])
def test_pipelined_requests_of_all_kinds_are_answered_in_order(new_loop: NewLoop, piece: int) -> None:
    async def main() -> None:
        async with listening() as (_server, port):
            head = b"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n"
            post = POST + b"Content-Length: 3\r\n\r\nabc"
            chunks = CHUNKED + b"3\r\ndef\r\n0\r\n\r\n"
            received = await exchange(port, GET + head + post + chunks + head + LAST + GET, piece=piece)
            bodies = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 200 OK\r\n")[1:]]
            assert bodies == [b"GET /a b=c ", b"", b"POST /p  abc", b"POST /p  def", b"", b"GET /last  "]

    run_on(new_loop, main())


@on_each_loop
def test_http_1_0_stays_open_only_where_it_asks(new_loop: NewLoop) -> None:
    async def main() -> None:
        async with listening() as (_server, port):
            kept = b"GET /1 HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
            received = await exchange(port, kept + b"GET /2 HTTP/1.0\r\n\r\n" + kept)
            first, second = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
            assert first == b"content-length: 8\r\nconnection: keep-alive\r\n\r\nGET /1  "
            assert second == b"content-length: 8\r\nconnection: close\r\n\r\nGET /2  "

    run_on(new_loop, main())


@on_each_loop
def test_100_continue_waits_for_the_answers_before_it(new_loop: NewLoop) -> None:
    waiting: list[tuple[IncomingRequest, Response]] = []

    async def main() -> None:
        arrived = asyncio.Event()

        def later(request: IncomingRequest, response: Response) -> None:
            waiting.append((request, response))
            arrived.set()

        async with listening(later) as (_server, port), connected(port) as client:
            await client.send(GET + POST + b"Expect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
            await arrived.wait()
            waiting.pop()[1].reply(204, [], b"")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 204 No Content\r\n\r\n"
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            arrived.clear()
            await client.send(b"abc")
            await arrived.wait()
            request, response = waiting.pop()
            response.close_after = True
            response.reply(200, [], request.body)
            assert (await client.rest()).endswith(b"connection: close\r\n\r\nabc")

    run_on(new_loop, main())


@pytest.mark.parametrize(
    "data",
    [
        POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"Expect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
        b"GET /p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n",
    ],
    ids=["HTTP/1.0", "body at hand", "no body"],
)
def test_100_continue_is_left_out_where_nobody_waits_for_it(data: bytes) -> None:
    async def main() -> None:
        async with listening() as (_server, port):
            assert (await exchange(port, data)).startswith(b"HTTP/1.1 200 OK")

    asyncio.run(main())


@on_each_loop
def test_a_client_that_pipelines_without_end_is_no_longer_read(new_loop: NewLoop) -> None:
    waiting: list[Response] = []

    async def main() -> None:
        arrived = asyncio.Event()

        def later(_request: IncomingRequest, response: Response) -> None:
            waiting.append(response)
            arrived.set()

        async with listening(later) as (server, port), connected(port) as client:
            flood = asyncio.ensure_future(client.send(GET * 1_000_000))
            await arrived.wait()
            (connection,) = server.connections
            while not connection._paused:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
            waiting.pop().reply(200, [], b"")
            assert len(connection._backlog) < 1_000_000
            assert len(waiting) == 1
            flood.cancel()
            client.reset()

    run_on(new_loop, main())
