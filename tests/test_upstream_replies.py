"""What the gate reads from an upstream: every kind of reply, split anywhere, and every way it can be wrong."""

from typing import Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.wire.upstream import Head, Stage
from loadstone.wire.upstream_reply import ReplyReader
from plain import plain
from upstream_heard import (
    CHUNKED,
    CONTINUE,
    HEAD_REQUEST,
    Run,
    ask,
    pool_of,
    reply,
    split,
)
from wire_servers import OK, answering, serving

REPLIES: dict[str, tuple[bytes, int, bytes, bool]] = {
    "length": (OK, 200, b"{}", True),
    "empty": (reply(b"200 OK", b"Content-Length: 0"), 200, b"", True),
    "chunked": (CHUNKED, 200, b"abcde", True),
    "interim": (CONTINUE + CONTINUE + CHUNKED, 200, b"abcde", True),
    "no content": (reply(b"204 No Content"), 204, b"", True),
    "not modified": (reply(b"304 Not Modified", b"Content-Length: 7"), 304, b"", True),
    "no reason": (reply(b"404", b"Content-Length: 1", body=b"x"), 404, b"x", True),
    "unknown status": (reply(b"529 Overloaded", b"Content-Length: 1", body=b"x"), 529, b"x", True),
    "close": (reply(b"200 OK", b"Content-Length: 1", b"Connection: close", body=b"x"), 200, b"x", False),
    "HTTP/1.0": (reply(b"200 OK", b"Content-Length: 1", body=b"x", version=b"1.0"), 200, b"x", False),
    "HTTP/1.0 kept": (
        reply(b"200 OK", b"Content-Length: 1", b"Connection: keep-alive", body=b"x", version=b"1.0"),
        200,
        b"x",
        True,
    ),
    "upgrade offered": (
        reply(b"200 OK", b"Content-Length: 1", b"Connection: upgrade", b"Upgrade: h2c", body=b"x"),
        200,
        b"x",
        True,
    ),
}


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize(("answer", "status", "body", "kept"), REPLIES.values(), ids=REPLIES.keys())
def test_replies_however_they_are_split(
    run: Run, answer: bytes, status: int, body: bytes, kept: bool, size: int
) -> None:
    async def main() -> None:
        async with serving(split(answer, size)) as port, pool_of(port) as pool:
            for _ in range(2):
                heard = await ask(pool)
                assert (heard.failure, heard.status, heard.body) == (None, status, body)
                assert (pool.idle, pool.busy) == (int(kept), 0)

    run(main())


@pytest.mark.parametrize("follows", [b"X", OK, b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"\0"])
@pytest.mark.parametrize("name", [name for name, reply in REPLIES.items() if reply[3]])
def test_what_follows_a_reply_is_dropped_with_the_connection(run: Run, name: str, follows: bytes) -> None:
    answer, status, body, _kept = REPLIES[name]

    async def main() -> None:
        async with serving(answering(answer + follows)) as port, pool_of(port) as pool:
            for _ in range(2):
                heard = await ask(pool)
                assert (heard.failure, heard.status, heard.body, pool.idle) == (None, status, body, 0)

    run(main())


def test_a_head_keeps_no_more_than_concerns_the_client(run: Run) -> None:
    head = reply(
        b"200 Fine by me",
        b"Content-Type: text/plain",
        b"Connection: keep-alive, X-Hop",
        b"connection: Other",
        b"Keep-Alive: timeout=5",
        b"X-Hop: 1",
        b"OTHER: 2",
        b"Proxy-Authenticate: Basic",
        b"Proxy-Connection: keep-alive",
        b"TE: trailers",
        b"Trailer: T",
        b"Upgrade: h2c",
        b"Set-Cookie: a=b",
        b"set-cookie: c=d\t\xff",
        b"Content-Length: 2",
        body=b"{}",
    )

    async def main() -> None:
        async with serving(answering(head, CHUNKED)) as port, pool_of(port) as pool:
            kept = [(b"content-type", b"text/plain"), (b"set-cookie", b"a=b"), (b"set-cookie", b"c=d\t\xff")]
            assert plain((await ask(pool)).head) == plain(Head(200, b"Fine by me", kept, 2))
            assert plain((await ask(pool)).head) == plain(Head(200, b"OK", [], None))

    run(main())


def test_a_whole_reply_in_one_read_is_told_once(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(CONTINUE + CHUNKED)) as port, pool_of(port) as pool:
            assert (await ask(pool)).reads == 1

    run(main())


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reply_to_head_has_a_length_and_no_body(run: Run, size: int) -> None:
    answers = (
        reply(b"200 OK", b"Content-Length: 5"),
        reply(b"200 OK", b"Transfer-Encoding: chunked"),
        reply(b"200 OK", b"Connection: close"),
        CONTINUE + reply(b"200 OK", b"Content-Length: 5", body=b"wrong"),
    )

    async def main() -> None:
        for answer, length in zip(answers, (5, None, None, 5), strict=True):
            async with serving(split(answer, size)) as port, pool_of(port) as pool:
                heard = await ask(pool, HEAD_REQUEST, head_only=True)
                assert plain(heard.head) == plain(Head(200, b"OK", [], length))
                assert (heard.body, heard.reads, heard.failure) == (b"", 1, None)

    run(main())


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reply_without_a_length_ends_with_the_connection(run: Run, size: int) -> None:
    answer = CONTINUE + reply(b"200 OK", b"Content-Type: a/b", body=b"0123456789" * 3)

    async def main() -> None:
        async with serving(split(answer, size, close=True)) as port, pool_of(port) as pool:
            heard = await ask(pool)
            assert (heard.failure, heard.body, pool.idle) == (None, b"0123456789" * 3, 0)
            assert heard.head is not None
            assert heard.head.length is None

    run(main())


REPLY, SENT = Stage.REPLY, Stage.SENT
BROKEN: dict[str, tuple[bytes, Stage, str]] = {
    "nothing": (b"", SENT, "closed the connection before it answered"),
    "half a head": (OK[:20], REPLY, "closed the connection in the middle of the reply"),
    "short body": (OK[:-1], REPLY, "closed the connection in the middle of the reply"),
    "short chunks": (CHUNKED[:-2], REPLY, "closed the connection in the middle of the reply"),
    "only interim": (CONTINUE, REPLY, "closed the connection in the middle of the reply"),
    "not HTTP": (b"\x16\x03\x01nonsense", REPLY, "sent a reply that is not HTTP/1.1 ("),
    "bare LF": (OK.replace(b"\r\n", b"\n"), REPLY, "not HTTP/1.1 ("),
    "two lengths": (reply(b"200 OK", b"Content-Length: 1", b"Content-Length: 2", body=b"xx"), REPLY, "Content-Length"),
    "length and chunks": (CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n", 1), REPLY, "Content-Length"),
    "folded": (reply(b"200 OK", b"A: b", b" c", b"Content-Length: 0"), REPLY, "not HTTP/1.1 ("),
    "bad chunk": (CHUNKED.replace(b"2;x=y", b"zz"), REPLY, "not HTTP/1.1 ("),
    "other coding": (CHUNKED.replace(b"chunked", b"gzip, chunked"), REPLY, "a transfer coding other than chunked"),
    "control in a value": (reply(b"200 OK", b"A: b\x01c", b"Content-Length: 0"), REPLY, "not HTTP/1.1 ("),
    "control in a name": (reply(b"200 OK", b"A\x01: b", b"Content-Length: 0"), REPLY, "not HTTP/1.1 ("),
    "control in the reason": (reply(b"200 O\x00K", b"Content-Length: 0"), REPLY, "control characters"),
    "upgraded": (reply(b"101 Switching", b"Connection: upgrade", b"Upgrade: x", body=b"hey"), REPLY, "nobody asked"),
    "switched": (reply(b"101 Switching"), REPLY, "a status that nobody asked for (101)"),
    "status 99": (reply(b"099 Odd", b"Content-Length: 0"), REPLY, "a status that nobody asked for (99)"),
    "large head": (reply(b"200 OK", b"A: " + b"b" * 66_000, b"Content-Length: 0"), REPLY, "more than 64 KiB"),
    "endless header": (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 700_000, REPLY, "more than 64 KiB"),
    "endless interim": (reply(b"102 Processing") * 40_000, REPLY, "more than 64 KiB"),
    "many headers": (reply(b"200 OK", *[b"A: b"] * 257, b"Content-Length: 0"), REPLY, "more than 256 headers"),
    "endless trailer": (CHUNKED[:-4] + b"u" * 700_000, REPLY, "more than 64 KiB"),
}


@pytest.mark.parametrize(("answer", "stage", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_replies_that_fail(run: Run, answer: bytes, stage: Stage, reason: str) -> None:
    async def main() -> None:
        async with serving(answering(answer, close=True)) as port, pool_of(port) as pool:
            heard = await ask(pool)
            assert heard.failure is not None
            assert heard.failure.stage is stage
            assert reason in heard.failure.reason
            assert heard.failure.reason.startswith(f"127.0.0.1:{port} ")
            assert pool.idle == 0

    run(main())


@pytest.mark.parametrize("name", [name for name, (answer, _, _) in BROKEN.items() if len(answer) < 500])
def test_replies_that_fail_do_so_byte_by_byte(run: Run, name: str) -> None:
    answer, stage, reason = BROKEN[name]

    async def main() -> None:
        async with serving(split(answer, 1, close=True)) as port, pool_of(port) as pool:
            heard = await ask(pool)
            assert heard.failure is not None
            assert (heard.failure.stage, reason in heard.failure.reason) == (stage, True)

    run(main())


# -- any split


def read(pieces: list[bytes], head_only: bool) -> tuple[Any, ...]:
    """What a reader makes of a reply in these pieces."""
    reader = ReplyReader()
    reader.begin(head_only)
    head, body = None, b""
    for piece in pieces:
        why = ""
        try:
            reader.feed(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            why = reader.refusal(error)
        assert why == ""
        head, body = head or reader.head, body + b"".join(reader.parts)
        reader.parts.clear()
        if reader.complete:
            break
    return head, body, reader.complete, reader.ends_with_connection, reader.reusable


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    token = st.from_regex(rb"[A-Za-z][A-Za-z0-9-]{0,12}", fullmatch=True).filter(
        lambda name: name.lower() not in (b"connection", b"content-length", b"transfer-encoding")
    )
    value = st.from_regex(rb"[!-~\x80-\xff]([ -~\x80-\xff]{0,20}[!-~\x80-\xff])?", fullmatch=True)
    lines = [b"%b: %b" % header for header in draw(st.lists(st.tuples(token, value), max_size=6))]
    body = draw(st.lists(st.binary(min_size=1, max_size=30), max_size=5))
    framing = draw(st.sampled_from(("length", "chunked", "none")))
    if framing == "length":
        lines.append(b"Content-Length: %d" % sum(map(len, body)))
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        body = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in body] + [b"0\r\n\r\n"]
    status = draw(st.sampled_from((b"200 OK", b"404 Not Found", b"503 ", b"429 Too Many Requests")))
    return draw(st.sampled_from((b"", CONTINUE))) + reply(status, *lines, body=b"".join(body))


@settings(max_examples=150, deadline=None)
@given(replies(), st.data(), st.booleans())
def test_any_split_of_a_reply_gives_the_same(answer: bytes, data: st.DataObject, head_only: bool) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=8)))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    whole = plain(read([answer], head_only))
    assert plain(read(pieces, head_only)) == whole
    assert plain(read([answer[i : i + 1] for i in range(len(answer))], head_only)) == whole
    head, _body, complete, ends_with_connection, _reusable = whole
    assert head is not None
    assert complete != ends_with_connection
