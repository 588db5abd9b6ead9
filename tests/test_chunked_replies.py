"""A whole chunk in one read is taken without the parser: whatever comes, the outcome is the parser's."""

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loadstone.core.target import Break, Exchange, Request
from loadstone.wire.connection import Call, Connection, State, Wire
from loadstone.wire.origin import parse_origin
from loadstone.wire.poller import LoopPoller
from loadstone.wire.reply import lone_chunk
from loadstone.wire.stamps import Receiver

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes, length: str = "x") -> bytes:
    return b"%s\r\n%s\r\n" % (format(len(data), length).encode(), data)


@pytest.mark.parametrize(
    ("received", "data"),
    {
        **{chunk(b"x" * length): b"x" * length for length in (1, 15, 16, 255, 256, 4095)},
        chunk(b"\r\n\r\n"): b"\r\n\r\n",
        chunk(b"x" * 4096): b"",
        chunk(b"x" * 10, "X"): b"",
        chunk(b"x" * 10, "02x"): b"",
        b"f\r\n" + b"x" * 16 + b"\r\n": b"",
        b"10\r\n" + b"x" * 15 + b"\r\n": b"",
        b"a;e\r\n" + b"x" * 10 + b"\r\n": b"",
        b"a\r\n" + b"x" * 11 + b"\n": b"",
        chunk(b"ab") + chunk(b"cd"): b"",
        chunk(b"ab")[:-1]: b"",
        chunk(b"ab") + b"3": b"",
        END: b"",
        b"\r\n": b"",
        b"": b"",
    }.items(),
)
def test_only_one_whole_chunk_is_taken(received: bytes, data: bytes) -> None:
    buffer = bytearray(received + b"\r\nof an earlier read\r\n")
    assert lone_chunk(buffer, memoryview(buffer), len(received)) == data


@dataclass
class Told:
    """The owner of a connection, who writes down how its call ended."""

    finished_calls: list[Call] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)

    def finished(self, connection: Connection, call: Call) -> None:
        self.finished_calls.append(call)

    def failed(self, call: Call, broken: Break, error: str) -> None:
        self.breaks.append(broken)

    def stale(self, call: Call) -> None:
        raise AssertionError("not reused")

    def lost(self, connection: Connection) -> None:
        """Bytes behind the reply: the connection is not used again."""


@contextmanager
def connected(owner: Told, exchange: Exchange) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection that has sent the request of ``exchange``, and the server's end of it."""
    loop = asyncio.new_event_loop()
    receiver, poller = Receiver(), LoopPoller(loop)
    wire = Wire(loop, parse_origin("http://127.0.0.1:1"), [], None, 10**12, receiver, poller)
    connection = Connection(wire, owner)
    near, far = socket.socketpair()
    near.setblocking(False)
    connection._sock, connection.state = near, State.READY
    connection.send(Call(exchange, b"POST", lambda _: None, time.monotonic_ns()))
    try:
        yield connection, far
    finally:
        connection.close()
        far.close()
        receiver.close()
        loop.close()


def read_by_us(pieces: list[bytes]) -> tuple[bytes, bool, bool]:
    """The body, whether it is complete, and whether it is no HTTP."""
    owner, exchange = Told(), Exchange(Request("/", b"", 0))
    with connected(owner, exchange) as (connection, far):
        for piece in pieces:
            if connection.state is State.READY and not owner.finished_calls:
                far.send(piece)
                connection.read()
    return exchange.log.body(), bool(owner.finished_calls), Break.MALFORMED in owner.breaks


class Parsed:
    """What the parser alone makes of it."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.body, self.complete, self.malformed = b"", False, False
        parser = httptools.HttpResponseParser(self)
        for piece in pieces:
            if not self.complete and not self.malformed:
                try:
                    parser.feed_data(piece)
                except httptools.HttpParserError:
                    self.malformed = not self.complete

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


FIRST = chunk(b"a")
AMBIGUOUS = chunk(b"x" * 10 + b"\r\n" + b"y" * 14)
"""Cut behind the first digit of its length 1a, what follows looks like a whole chunk of ten."""

chunks = st.lists(
    st.builds(
        chunk, st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), st.sampled_from(["x"] * 8 + ["X", "04x"])
    ),
    max_size=12,
)


@given(
    chunks, st.lists(st.integers(0, 500), max_size=6), st.none() | st.tuples(st.integers(0, 500), st.integers(0, 255))
)
@example([FIRST, AMBIGUOUS], [len(HEAD + FIRST) + 1, len(HEAD + FIRST + b"1a\r\n") + 12], None)
def test_the_outcome_is_that_of_the_parser(sent: list[bytes], cuts: list[int], damage: tuple[int, int] | None) -> None:
    body = bytearray(b"".join(sent) + END)
    if damage is not None:
        body[damage[0] % len(body)] = damage[1]
    edges = [len(HEAD + b"".join(sent[:count])) for count in range(len(sent) + 1)]
    for pieces in (cut(HEAD + bytes(body), cuts), cut(HEAD + bytes(body), edges + cuts)):
        parsed = Parsed(pieces)
        assert read_by_us(pieces) == (parsed.body, parsed.complete, parsed.malformed)
