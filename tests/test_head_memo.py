"""Heads that are not read twice: whatever comes is understood as if they were."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadstone.wire.head_memo import LONGEST_BYTES, HeadMemo
from loadstone.wire.request_head import RequestHead
from loadstone.wire.request_reader import PIECE_BYTES, IncomingRequest, RequestReader
from loadstone.wire.server import Response
from loadstone.wire.upstream_reply import Head, ReplyReader
from plain import plain
from raw_clients import GET, LAST, connected, echo, listening, on_each_loop, run_on
from test_server_fuzz import cut_up, hostile, quick
from test_server_hostile import ACCEPTED, CHUNKED, POST, REFUSED, get
from test_upstream_replies import REPLIES, replies

MOST_BODY = 1000
BODY = POST + b"Content-Length: 5\r\n\r\nhello"
HELLO = POST + b"Content-Length: 5\r\n\r\n"

Read = tuple[list[tuple[IncomingRequest, bool]], int]


def read(pieces: list[bytes], memo: HeadMemo[RequestHead] | None) -> Read:
    """Requests and the status of the refusal, 0 for none, as a connection reads them; without a memo nothing is known.

    Each request is answered before the next piece comes.
    """
    reader = RequestReader(MOST_BODY, memo or HeadMemo())
    requests: list[tuple[IncomingRequest, bool]] = []
    for piece in pieces:
        known = None if memo is None else reader.recognise(piece)
        if known is not None:
            requests.append((known, True))
            continue
        reader.feed(piece)
        requests += reader.ready
        reader.ready.clear()
    reader.close()
    return requests, reader.error.status if reader.error else 0


def primed(*also: bytes) -> HeadMemo[RequestHead]:
    """Knows all that can be known of the two corpora, and of these bytes."""
    memo: HeadMemo[RequestHead] = HeadMemo()
    for data in (*(data for data, _ in ACCEPTED.values()), *(data for data, _ in REFUSED.values()), BODY, *also):
        read([data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)], memo)
    return memo


EVERYTHING = {**REFUSED, **ACCEPTED, "body": (BODY, 0), "more than a body": (BODY + b"x", 0)}


@pytest.mark.parametrize("data", [data for data, _ in EVERYTHING.values()], ids=EVERYTHING)
def test_the_corpus_is_read_as_if_no_head_were_known(data: bytes) -> None:
    for before in ([], [GET], [BODY], [HELLO, b"hello"]):
        for piece in (PIECE_BYTES, 1, 7) if len(data) < 1000 else (PIECE_BYTES,):
            pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
            memo = primed(data)
            for _ in range(2):
                assert plain(read([*before, *pieces], memo)) == plain(read([*before, *pieces], None))


@quick
@given(st.lists(hostile, min_size=1, max_size=4), st.lists(st.integers(0, 5000), max_size=4))
@example([BODY, HELLO, b"hello", GET], [])
@example([HELLO + b"GET /s", b" HTTP/1.1\r\n\r\n"], [])
def test_any_bytes_are_read_as_if_no_head_were_known(pieces: list[bytes], cuts: list[int]) -> None:
    memo: HeadMemo[RequestHead] = HeadMemo()
    for sent in (pieces, cut_up(b"".join(pieces), cuts), pieces):
        given_pieces = [piece for piece in sent if piece]
        assert plain(read(given_pieces, memo)) == plain(read(given_pieces, None))


def test_a_request_is_recognised_only_whole_and_alone() -> None:
    memo = primed()
    reader = RequestReader(MOST_BODY, memo)
    known = reader.recognise(BODY)
    assert known is not None
    assert (known.method, known.path, known.body) == ("POST", "/p", b"hello")
    for other in (BODY + b"x", BODY[:-1], BODY + GET, HELLO, b"", b"\r\n" + BODY, BODY.replace(b"5", b"05")):
        assert reader.recognise(other) is None
    reader.feed(HELLO)
    assert reader.recognise(GET) is None, "it is the body"
    reader.feed(b"hello")
    assert reader.recognise(GET) is not None
    reader.feed(LAST)
    assert reader.recognise(GET) is None, "the connection closes"


@pytest.mark.parametrize(
    "data",
    [
        LAST,
        GET + GET,
        b"GET / HTTP/1.0\r\n\r\n",
        CHUNKED + b"0\r\n\r\n",
        get(b"Expect: 100-continue"),
        POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        get(b"Connection: Upgrade\r\nUpgrade: h2c"),
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
        POST + b"Content-Length: 2\r\n\r\n{}\r\n",
        b"\r\n\r\n" + GET,
        get(b"A: " + b"x" * LONGEST_BYTES),
        BODY[:-1],
    ],
)
def test_what_is_not_kept(data: bytes) -> None:
    memo: HeadMemo[RequestHead] = HeadMemo()
    read([data], memo)
    assert repr(memo) == "<HeadMemo of 0>"


def test_few_heads_are_kept_the_latest_of_them() -> None:
    memo: HeadMemo[RequestHead] = HeadMemo()
    heads = [get(b"X-Request-Id: %d" % i) for i in range(1000)]
    for head in heads:
        read([head], memo)
    assert list(memo.known) == heads[-256:]


@on_each_loop
@pytest.mark.parametrize("ends", [LAST, b"", GET[:9], b"\0"], ids=["last", "end of file", "cut short", "rubbish"])
def test_what_comes_behind_a_request_that_was_recognised_has_its_turn(
    new_loop: Callable[[], asyncio.AbstractEventLoop], ends: bytes
) -> None:
    held: asyncio.Queue[tuple[IncomingRequest, Response]] = asyncio.Queue()

    async def main() -> None:
        async with listening(lambda *asked: held.put_nowait(asked)) as (_server, port), connected(port) as client:
            for sent in (BODY, BODY, BODY + BODY + GET + ends):
                if sent != BODY:
                    # It is being answered when the others come.
                    await client.send(BODY)
                    request, response = await held.get()
                await client.send(sent)
                if sent != BODY:
                    client.writer.write_eof()
                    echo(request, response)
                for _ in range(sent.count(b"HTTP/1.1")):
                    request, response = await held.get()
                    echo(request, response)
            received = await client.rest()
            assert received.count(b"POST /p  hello") == 5
            assert received.count(b"GET /a b=c ") == 1
            assert received.count(b"GET /last") == (ends == LAST)
            assert received.count(b"400 Bad Request") == (ends == b"\0")

    run_on(new_loop, main())


# -- replies


def hear(pieces: list[bytes], memo: HeadMemo[Head] | None, *, head_only: bool = False) -> tuple[object, ...]:
    """What a connection makes of a reply in these pieces; without a memo nothing is known."""
    reader = ReplyReader(memo or HeadMemo())
    reader.begin(head_only)
    head, body = None, b""
    for piece in pieces:
        whole = None if memo is None else reader.recognise(piece)
        if whole is not None:
            return *whole, True, False, reader.reusable
        first = not reader.begun
        try:
            reader.feed(piece)
        except Exception as error:
            if why := reader.refusal(error):
                return (why,)
        head, part = head or reader.head, b"".join(reader.parts)
        body += part
        reader.parts.clear()
        if reader.complete:
            if first and memo is not None and head is not None:
                reader.remember(piece, head, part)
            break
    return head, body, reader.complete, reader.ends_with_connection, reader.reusable


@pytest.mark.parametrize("follows", [b"", b"X", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"\0"])
@pytest.mark.parametrize("answer", [answer for answer, *_ in REPLIES.values()], ids=REPLIES)
def test_replies_are_read_as_if_no_head_were_known(answer: bytes, follows: bytes) -> None:
    memo: HeadMemo[Head] = HeadMemo()
    for head_only in (False, True, False):
        for pieces in ([answer], [answer + follows], [answer[:-1], answer[-1:]], [answer]):
            assert plain(hear(pieces, memo, head_only=head_only)) == plain(hear(pieces, None, head_only=head_only))


@settings(max_examples=60, deadline=None)
@given(st.lists(replies(), min_size=1, max_size=3), st.binary(max_size=3), st.booleans())
def test_any_reply_is_read_as_if_no_head_were_known(answers: list[bytes], follows: bytes, head_only: bool) -> None:
    memo: HeadMemo[Head] = HeadMemo()
    for answer in (*answers, *answers):
        for data in (answer, answer + follows, answer[:-1], answer):
            assert plain(hear([data], memo, head_only=head_only)) == plain(hear([data], None, head_only=head_only))


def test_a_reply_that_leaves_the_connection_open_is_recognised() -> None:
    memo: HeadMemo[Head] = HeadMemo()
    for answer, *_ in REPLIES.values():
        hear([answer], memo)
    known = {name for name, (answer, *_) in REPLIES.items() if ReplyReader(memo).recognise(answer)}
    assert known == {"length", "empty", "no reason", "unknown status", "HTTP/1.0 kept", "upgrade offered"}
