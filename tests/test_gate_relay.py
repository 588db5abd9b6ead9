"""Bytes through the gate on real sockets: order, framing, back-pressure, disconnects, and odd ways to speak HTTP."""

import asyncio
import gzip
import json
import os
import zlib

import pytest

from gates import (
    ASK,
    CHAT,
    EVENTS,
    JSON,
    REPLY,
    STREAM,
    Asked,
    Client,
    answering,
    answers,
    event,
    events_of,
    gate_before,
    http,
    run,
    until,
)
from loadstone.core.limits import Limits
from loadstone.hold.gate import GateOptions
from loadstone.hold.upstreams import Dialing
from loadstone.wire.request_reader import Phase

ONE = Limits(max_concurrency=1, max_queue=0)


# -- streams


def test_each_piece_of_a_stream_arrives_before_the_next_is_sent() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            head = await client.head()
            assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
            assert head.headers["x-accel-buffering"] == "no"
            for number in range(20):
                asked.say(event(f"w{number}"))
                assert await client.chunk() == event(f"w{number}")
            asked.end(b"data: [DONE]\n\n")
            assert await client.chunk() == b"data: [DONE]\n\n"
            assert await client.chunk() == b""
            await rig.ended(ok=1)

    run(main())


def test_the_head_of_a_stream_does_not_wait_for_its_first_event() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            assert (await client.head()).status == 200
            assert rig.in_flight == 1
            asked.end()
            assert await client.chunk() == b""

    run(main())


async def _fill(asked: Asked, total: int) -> list[int]:
    """Let the server write as fast as it is read; returns the growing list of what it could write."""
    written = [0]

    def more() -> None:
        while not asked.response.congested and written[-1] < total:
            asked.say(bytes(65536))
            written.append(written[-1] + 65536)

    asked.response.on_drained = more
    more()
    return written


async def _stands_still(written: list[int]) -> None:
    seen, turns = -1, 0
    while turns < 300:
        await asyncio.sleep(0)
        turns = turns + 1 if len(written) == seen else 0
        seen = len(written)


def test_a_client_that_does_not_read_stops_the_server_and_gets_it_all_later() -> None:
    total = 64 * 1024 * 1024

    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            written = await _fill(asked, total)
            await _stands_still(written)
            assert asked.response.congested, "the server is held up"
            assert written[-1] < total
            [slow] = rig.gate.server.connections
            waiting = slow._transport.get_write_buffer_size()
            assert waiting < 1024 * 1024, "what the gate itself holds is bounded"
            assert rig.in_flight == 1
            await client.head()
            received = 0
            while received < total:
                received += len(await client.chunk())
            asked.end()
            assert await client.chunk() == b""
            await rig.ended(ok=1)

    run(main())


def test_a_client_that_never_reads_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.wire.server._SWEEP_S", 0.01)

    async def main() -> None:
        async with gate_before(None, limits=ONE) as (rig, [server]):
            rig.gate.server.write_stall_s = 0.05
            await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            await _fill(asked, 64 * 1024 * 1024)
            await asyncio.wait_for(asked.left.wait(), 5)
            await rig.ended(client_gone=1)
            assert rig.in_flight == 0

    run(main())


@pytest.mark.parametrize("length", [None, 120, 4000], ids=["chunked", "with a short length", "with a long length"])
@pytest.mark.parametrize("dies", [Asked.hang_up, Asked.reset], ids=["closed", "reset"])
def test_a_stream_that_breaks_ends_with_an_error_event(dies: object, length: int | None) -> None:
    async def main() -> None:
        async with gate_before(None, limits=ONE) as (rig, [server]):
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream(length)
            asked.say(event("Hel"))
            head = await client.head()
            if length is None:
                assert await client.chunk() == event("Hel")
                dies(asked)  # type: ignore[operator]
                [said] = events_of(await client.chunk())
                assert said["error"]["code"] == "upstream_error"
                assert f"127.0.0.1:{server.port}" in said["error"]["message"]
                assert await client.rest() == b"", "no last chunk: nobody takes it for whole"
            else:
                assert int(head.headers["content-length"]) == length
                assert await client.some(len(event("Hel"))) == event("Hel")
                dies(asked)  # type: ignore[operator]
                assert len(event("Hel") + await client.rest()) < length
            await rig.ended(upstream_error=1)

    run(main())


def test_an_error_event_stands_apart_from_an_event_that_was_cut() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            asked.say(event("Hel") + b'data: {"choi')
            await client.head()
            received = await client.chunk()
            asked.reset()
            received += await client.chunk()
            *_, cut, said, _ = received.split(b"\n\n")
            assert cut == b'data: {"choi'
            assert json.loads(said.removeprefix(b"data: "))["error"]["code"] == "upstream_error"

    run(main())


def test_a_document_that_breaks_is_cut_short_without_a_word() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking()
            asked = await server.next()
            asked.response.start(200, [JSON], 1000)
            asked.say(b'{"half": ')
            await client.head()
            assert await client.some(9) == b'{"half": '
            asked.reset()
            assert await client.rest() == b""
            await rig.ended(upstream_error=1)

    run(main())


def test_a_broken_stream_resets_a_client_of_http_1_0_as_nothing_else_tells_it() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(body=STREAM, version="1.0"))
            asked = await server.next()
            asked.stream()
            asked.say(event("Hel"))
            await client.head()
            assert await client.some(len(event("Hel"))) == event("Hel")
            asked.reset()
            with pytest.raises(ConnectionResetError):
                await client.rest()
            await rig.ended(upstream_error=1)

    run(main())


# -- clients that leave


@pytest.mark.parametrize("leaves", [Client.close, Client.reset], ids=["close", "reset"])
@pytest.mark.parametrize("begun", [False, True], ids=["before the reply", "in the stream"])
def test_a_client_that_leaves_stops_the_server_and_frees_its_place(leaves: object, begun: bool) -> None:
    async def main() -> None:
        async with gate_before(None, limits=ONE) as (rig, [server]):
            client = await rig.asking(http(body=STREAM if begun else ASK))
            asked = await server.next()
            if begun:
                asked.stream()
                asked.say(event("Hel"))
                await client.head()
                assert await client.chunk() == event("Hel")
            assert (await rig.once()).error["code"] == "queue_full"
            leaves(client)  # type: ignore[operator]
            await asyncio.wait_for(asked.left.wait(), 5)
            await until(lambda: rig.in_flight == 0)
            follower = await rig.asking()
            (await server.next()).answer()
            assert (await follower.reply()).status == 200
            await rig.ended(queue_full=1, client_gone=1, ok=1)
            assert server.most == 1

    run(main())


def test_a_client_that_leaves_the_queue_makes_room_there() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=1)) as (rig, [server]):
            first = await rig.asking()
            running = await server.next()
            [waits] = await rig.waiting(1)
            assert (await rig.once()).status == 503
            waits.close()
            await until(lambda: rig.queued == 0)
            [successor] = await rig.waiting(1)
            running.answer()
            assert (await first.reply()).status == 200
            (await server.next()).answer()
            assert (await successor.reply()).status == 200
            await rig.ended(ok=2, client_gone=1, queue_full=1)
            assert server.total == 2, "who left was never sent on"

    run(main())


def test_a_client_that_leaves_while_it_uploads_was_never_a_request() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=ONE) as (rig, [server]):
            client = await rig.asking(http()[:-10])
            await until(lambda: len(rig.gate.server.connections) == 1)
            assert (rig.in_flight, rig.queued) == (0, 0), "a slow upload holds no place"
            assert (await rig.once()).status == 200
            client.close()
            await rig.ended(ok=1)
            assert server.total == 1

    run(main())


def test_a_client_that_only_stops_sending_still_gets_its_answer() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=1)) as (rig, [server]):
            client = await rig.asking()
            client.finish_sending()
            asked = await server.next()
            [waits] = await rig.waiting(1)
            waits.finish_sending()
            asked.answer()
            assert (await client.reply()).body == REPLY
            (await server.next()).answer()
            assert (await waits.reply()).body == REPLY
            assert await waits.rest() == b""
            await rig.ended(ok=2)

    run(main())


# -- framing


def test_replies_with_a_length_pass_byte_for_byte() -> None:
    body = os.urandom(3_000_001)

    async def main() -> None:
        async with gate_before(answering(200, body, [(b"content-type", b"audio/wav")])) as (rig, [server]):
            reply = await rig.once(http("GET", "/v1/audio?x=%20y&z", b""))
            assert reply.body == body
            assert reply.headers["content-length"] == str(len(body))
            assert reply.headers["content-type"] == "audio/wav"
            server.behave = answers
            assert (await rig.once()).body == REPLY

    run(main())


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"])
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/anything?a=b"])
def test_every_method_is_relayed(method: str, path: str) -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            body = ASK if method in ("PUT", "PATCH") else b""
            client = await rig.asking(http(method, path, body))
            asked = await server.next()
            assert (asked.request.method, asked.request.target.decode(), asked.request.body) == (method, path, body)
            asked.answer(b"12345", headers=[(b"allow", b"GET, POST")])
            reply = await client.reply(bodyless=method == "HEAD")
            assert (reply.status, reply.headers["allow"], reply.headers["content-length"]) == (200, "GET, POST", "5")
            assert reply.body == (b"" if method == "HEAD" else b"12345")
            client.send(http("GET", "/v1/models", b""))
            (await server.next()).answer()
            assert (await client.reply()).status == 200, "the connection is still in step"

    run(main())


@pytest.mark.parametrize("status", [204, 304])
def test_replies_without_a_body_keep_the_connection_in_step(status: int) -> None:
    async def main() -> None:
        async with gate_before(answering(status, b"")) as (rig, _servers):
            client = await rig.client()
            for _ in range(3):
                assert (await client.post()).status == status
            await rig.ended(ok=3)

    run(main())


def test_interim_replies_are_swallowed() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking()
            asked = await server.next()
            asked.raw(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
            asked.raw(b"HTTP/1.1 100 Continue\r\n\r\n")
            asked.answer(b"[1]")
            reply = await client.reply()
            assert (reply.status, reply.body) == (200, b"[1]")
            assert "link" not in reply.headers
            await rig.ended(ok=1)

    run(main())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_reply_that_ends_with_its_connection_is_whole(version: str) -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(version=version))
            asked = await server.next()
            asked.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[1, ")
            asked.raw(b"2]")
            asked.hang_up()
            reply = await client.reply()
            assert reply.body == b"[1, 2]"
            assert ("transfer-encoding" in reply.headers) is (version == "1.1")
            await rig.ended(ok=1)

    run(main())


@pytest.mark.parametrize("keep", [False, True])
def test_clients_of_http_1_0_are_answered_in_their_own_way(keep: bool) -> None:
    headers = [JSON, (b"connection", b"Keep-Alive")] if keep else [JSON]

    async def main() -> None:
        async with gate_before(answers) as (rig, _servers):
            client = await rig.client()
            for _ in range(3 if keep else 1):
                client.send(http(headers=headers, version="1.0"))
                reply = await client.reply()
                assert reply.headers["connection"] == ("keep-alive" if keep else "close")
                assert reply.body == REPLY
                assert "transfer-encoding" not in reply.headers
            if not keep:
                assert await client.rest() == b""

    run(main())


def test_a_stream_to_http_1_0_ends_with_its_connection() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(body=STREAM, headers=[JSON, (b"connection", b"keep-alive")], version="1.0"))
            asked = await server.next()
            asked.stream()
            asked.say(event("a"))
            asked.end(event("b"))
            reply = await client.reply()
            assert "transfer-encoding" not in reply.headers
            assert reply.body == event("a") + event("b")
            await rig.ended(ok=1)

    run(main())


def test_a_chunked_request_goes_on_whole_with_its_length() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\nTrailer: T\r\n\r\n"
                b'9\r\n{"input":\r\n4;x=y\r\n "a"\r\n1\r\n}\r\n0\r\nT: u\r\n\r\n'
            )
            asked = await server.next()
            assert asked.request.body == b'{"input": "a"}'
            assert asked.header(b"content-length") == b"14"
            assert asked.header(b"transfer-encoding") is None
            assert asked.header(b"trailer") is None
            asked.answer()
            assert (await client.reply()).status == 200

    run(main())


def test_a_client_that_expects_100_gets_it_before_it_sends_its_body() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            head, body = http(headers=[JSON, (b"expect", b"100-continue")]).split(b"\r\n\r\n")
            client = await rig.asking(head + b"\r\n\r\n")
            assert (await client.head()).status == 100
            client.send(body)
            asked = await server.next()
            assert asked.header(b"expect") is None
            assert asked.request.body == ASK
            asked.answer()
            assert (await client.reply()).status == 200

    run(main())


def test_pipelined_requests_of_one_client_need_one_place() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=ONE) as (rig, [server]):
            client = await rig.asking(http() * 5)
            assert [(await client.reply()).status for _ in range(5)] == [200] * 5
            assert server.total == 5
            await rig.ended(ok=5)

    run(main())


# -- the request as the server gets it


def test_a_body_that_asks_for_nothing_beyond_the_limits_is_not_touched() -> None:
    body = b'{ "messages":[{"role":"user","content":"\\u4f60"}],\n "max_tokens": 5 , "temperature": 1.50}'

    async def main() -> None:
        async with gate_before(None, limits=Limits(max_output_tokens=512)) as (rig, [server]):
            client = await rig.asking(http(body=body))
            asked = await server.next()
            assert asked.request.body == body
            asked.answer()
            await client.reply()

    run(main())


@pytest.mark.parametrize(
    "path",
    [CHAT, f"{CHAT}?x=1", "/v1/completions", "/v1/chat/complet%69ons", "//v1/chat/completions", "http://x" + CHAT],
)
def test_the_server_sees_no_more_output_tokens_than_allowed(path: str) -> None:
    limits = Limits(max_output_tokens=512, default_output_tokens=100)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            for asks, gets in ((9999, 512), (7, 7), (None, 100)):
                client = await rig.asking(http(path=path, body=b'{"max_tokens": %b}' % json.dumps(asks).encode()))
                asked = await server.next()
                assert asked.document["max_tokens"] == gets
                assert int(asked.header(b"content-length") or 0) == len(asked.request.body)
                asked.answer()
                assert (await client.reply()).status == 200

    run(main())


def test_a_target_with_a_host_goes_on_as_a_path() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            for given, wanted in (
                (f"http://elsewhere.example:81{CHAT}?a=b", f"{CHAT}?a=b"),
                ("http://elsewhere.example/v1/x", "/v1/x"),
                ("http://elsewhere.example", "/"),
            ):
                client = await rig.asking(http(path=given))
                asked = await server.next()
                assert asked.request.target.decode() == wanted
                assert asked.header(b"host") == f"127.0.0.1:{server.port}".encode()
                asked.answer()
                assert (await client.reply()).status == 200

    run(main())


def test_headers_of_one_connection_stay_there_in_both_directions() -> None:
    headers = [
        JSON,
        (b"connection", b"x-mine, keep-alive"),
        (b"x-mine", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"te", b"trailers"),
        (b"upgrade", b"h2c"),
        (b"proxy-authorization", b"Basic x"),
        (b"accept-encoding", b"gzip"),
        (b"x-forwarded-for", b"6.6.6.6"),
        (b"x-real-ip", b"6.6.6.6"),
        (b"forwarded", b"for=6.6.6.6"),
        (b"x-request-id", b"call-7"),
        (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        (b"authorization", b"Bearer engine"),
        (b"via", b"1.0 before"),
        (b"x-custom", b"kept"),
    ]

    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking(http(headers=headers))
            asked = await server.next()
            got = dict(asked.request.headers)
            assert not {b"x-mine", b"te", b"upgrade", b"proxy-authorization", b"accept-encoding"} & set(got)
            assert not {b"x-real-ip", b"forwarded", b"connection", b"keep-alive"} & set(got)
            assert got[b"x-forwarded-for"] == b"127.0.0.1"
            assert got[b"via"] == b"1.0 before, 1.1 loadstone"
            assert got[b"x-request-id"] == b"call-7"
            assert got[b"traceparent"].startswith(b"00-0af7")
            assert got[b"authorization"] == b"Bearer engine"
            assert got[b"x-custom"] == b"kept"
            asked.answer(
                headers=[
                    JSON,
                    (b"connection", b"x-ours"),
                    (b"x-ours", b"1"),
                    (b"set-cookie", b"a"),
                    (b"set-cookie", b"b"),
                ]
            )
            reply = await client.reply()
            assert "x-ours" not in reply.headers
            assert reply.headers["set-cookie"] == "a\nb"
            assert reply.headers["x-request-id"] == "call-7"
            assert reply.headers["via"] == "1.1 loadstone"
            assert reply.headers["server"] == "loadstone"

    run(main())


def test_the_upstreams_own_key_replaces_the_clients() -> None:
    options = GateOptions(dialing=Dialing(authorization=b"Bearer engine"))

    async def main() -> None:
        async with gate_before(None, options=options) as (rig, [server]):
            client = await rig.asking(http(headers=[JSON, (b"authorization", b"Bearer mine"), (b"x-api-key", b"mine")]))
            asked = await server.next()
            assert [value for name, value in asked.request.headers if name == b"authorization"] == [b"Bearer engine"]
            assert asked.header(b"x-api-key") is None
            asked.answer()
            await client.reply()

    run(main())


# -- what the server answers


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (400, "bad_request"),
        (404, "bad_request"),
        (422, "bad_request"),
        (500, "upstream_error"),
        (502, "upstream_error"),
    ],
)
def test_an_error_of_the_server_passes_with_its_body(status: int, outcome: str) -> None:
    body = b'{"error": {"message": "not today", "code": 40}}'

    async def main() -> None:
        async with gate_before(answering(status, body)) as (rig, _servers):
            client = await rig.client()
            for _ in range(2):
                reply = await client.post()
                assert (reply.status, reply.body) == (status, body)
                assert "x-loadstone-reason" not in reply.headers
            await rig.ended(**{outcome: 2})

    run(main())


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_says_when_to_come_back_or_the_gate_does(status: int) -> None:
    async def main() -> None:
        async with gate_before(answering(status, b"full")) as (rig, [server]):
            reply = await rig.once()
            assert (reply.status, reply.body) == (status, b"full")
            assert reply.headers["x-loadstone-reason"] == "upstream_busy"
            assert int(reply.headers["retry-after"]) >= 1
            server.behave = answering(status, b"full", [(b"retry-after", b"17"), (b"x-loadstone-reason", b"forged")])
            reply = await rig.once()
            assert reply.headers["retry-after"] == "17"
            assert reply.headers["x-loadstone-reason"] == "upstream_busy"
            await rig.ended(upstream_error=2)

    run(main())


@pytest.mark.parametrize(
    "nonsense",
    [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n"],
)
def test_a_reply_that_is_none_becomes_a_502(nonsense: bytes) -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client = await rig.asking()
            asked = await server.next()
            asked.raw(nonsense)
            reply = await client.reply()
            assert (reply.status, reply.error["code"]) == (502, "upstream_error")
            await asyncio.wait_for(asked.left.wait(), 5)
            await rig.ended(upstream_error=1)

    run(main())


# -- bad requests


HOSTILE = [
    b"nonsense\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nX: b\r\n folded\r\nContent-Length: 0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\nHost: a\nContent-Length: 0\n\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nX\x00Y: b\r\nContent-Length: 0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX",
    b"POST /v1/x HTTP/3.0\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 104857600\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n6400000\r\n",
]


def test_hostile_requests_never_reach_a_server_and_are_counted() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            for hostile in HOSTILE:
                client = await rig.asking(hostile)
                if b"6400000\r\n" in hostile:
                    client.send(bytes(17 * 1024 * 1024))
                reply = await client.reply()
                assert reply.status in (400, 413, 431, 501, 505), hostile[:80]
                assert reply.headers["connection"] == "close"
                assert set(reply.error) == {"message", "type", "code", "param"}
                client.close()
            assert server.total == 0
            await rig.ended(bad_request=len(HOSTILE))

    run(main())


def test_a_body_of_100_mb_is_refused_by_its_head() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            head = http(body=b"x", headers=[JSON, (b"expect", b"100-continue")]).replace(b": 1\r\n", b": 104857600\r\n")
            reply = await rig.once(head[:-1])
            assert (reply.status, reply.error["code"]) == (413, "body_too_large")
            assert server.total == 0

    run(main())


@pytest.mark.parametrize("begun", [b"POST /v1/x HT", http()[:-30]], ids=["head", "body"])
def test_a_request_that_does_not_get_done_is_refused_and_holds_no_place(
    monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr("loadstone.wire.server._SWEEP_S", 0.01)

    async def main() -> None:
        async with gate_before(answers, limits=ONE) as (rig, [server]):
            rig.gate.server.allowed_s = dict.fromkeys(Phase, 0.05)
            client = await rig.asking(begun)
            reply = await client.reply()
            assert (reply.status, reply.error["code"]) == (408, "bad_request")
            assert await client.rest() == b""
            assert server.total == 0
            await rig.ended(bad_request=1)

    run(main())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"messages": [], "max_tokens": -1}', "max_tokens"),
        (b'{"messages": [], "max_tokens": "many"}', "max_tokens"),
        (b'{"messages": [], "max_completion_tokens": 1.5}', "max_completion_tokens"),
        (b'{"messages": [], "max_tokens": 1e400}', "max_tokens"),
        (b'{"messages": [], "n": 0}', "n"),
        (b'{"messages": "\xff", "max_tokens": 9999}', None),
        (b'{"messages": [], "x": "\xff", "max_tokens": 9999}', None),
        (b'{"messages": [], "x": 1e999, "max_tokens": 9999}', None),
        (b'{"prompt": ["\xff"]}', None),
        (gzip.compress(ASK), None),
    ],
)
def test_json_that_makes_no_sense_is_refused_and_the_connection_closed(body: bytes, param: str | None) -> None:
    async def main() -> None:
        async with gate_before(answers, limits=Limits(max_concurrency=1, max_output_tokens=512)) as (rig, [server]):
            client = await rig.client()
            reply = await client.post(body)
            assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "bad_request", param)
            assert await client.rest() == b""
            assert server.total == 0
            await rig.ended(bad_request=1)

    run(main())


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_body_is_refused_in_words_that_say_so(coding: str) -> None:
    body = gzip.compress(ASK) if coding == "gzip" else zlib.compress(ASK)

    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            reply = await rig.once(http(body=body, headers=[JSON, (b"content-encoding", coding.encode())]))
            assert reply.status == 400
            assert f"Content-Encoding {coding}" in reply.error["message"]
            assert server.total == 0

    run(main())


def test_the_wrong_content_type_is_named() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            reply = await rig.once(http(headers=[(b"content-type", b"text/plain")]))
            assert reply.status == 400
            assert "text/plain" in reply.error["message"]
            assert server.total == 0

    run(main())


def test_other_bodies_are_none_of_the_gates_business() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            body = os.urandom(2000)
            client = await rig.asking(
                http(
                    path="/v1/audio/transcriptions",
                    body=body,
                    headers=[(b"content-type", b"multipart/form-data; boundary=x")],
                )
            )
            asked = await server.next()
            assert asked.request.body == body
            assert asked.header(b"content-type") == b"multipart/form-data; boundary=x"
            asked.answer(b"text", headers=[EVENTS])
            assert (await client.reply()).body == b"text"

    run(main())


def test_connections_to_the_server_are_used_again() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            await rig.probe(server)
            await rig.once()
            before = server.connections
            for _ in range(20):
                assert (await rig.once()).status == 200
            assert server.connections == before

    run(main())
