"""The gate's upstream connections with large requests, under back-pressure, and over TLS."""

import asyncio
import random
import socket
import ssl
from pathlib import Path

import pytest

from loadstone.wire.tls import client_context
from loadstone.wire.upstream import Head, Stage, UpstreamCall, UpstreamPool
from upstream_heard import (
    REQUEST,
    Heard,
    Run,
    ask,
    origin,
    pool_of,
    reply,
)
from wire_servers import OK, answering, read_request, serving, turns_until

TLS_FOLDER = Path(__file__).with_name("data") / "tls"


def test_a_large_request_is_sent_whole_and_the_connection_reused(run: Run) -> None:
    body = random.Random(1).randbytes(8_000_000)
    received: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            received.append((await read_request(reader))[2])
            writer.write(OK)

    async def main() -> None:
        async with serving(script) as port, pool_of(port) as pool:
            for _ in range(2):
                await ask(pool, b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                assert pool.idle == 1

    run(main())
    assert received == [body, body]


def test_an_early_reply_is_passed_on_and_the_connection_closed(run: Run) -> None:
    refusal = reply(b"413 Content Too Large", b"Content-Length: 3", body=b"big")

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        await asyncio.Event().wait()

    async def main() -> None:
        async with serving(script) as port, pool_of(port) as pool:
            heard = await ask(pool, b"POST / HTTP/1.1\r\nContent-Length: 50000000\r\n\r\n" + bytes(50_000_000))
            assert (heard.status, heard.body, pool.idle) == (413, b"big", 0)

    run(main())


# -- back-pressure


@pytest.mark.parametrize("framing", [b"Content-Length: 3000000", b"Connection: close"])
def test_a_paused_reply_is_delivered_whole_though_the_server_has_closed(run: Run, framing: bytes) -> None:
    body = random.Random(2).randbytes(3_000_000)
    answer = reply(b"200 OK", framing, body=body)

    async def main() -> None:
        closed = asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_000_000)
            writer.write(answer)
            writer.close()
            closed.set()

        class Slow(Heard):
            def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
                super().on_read(head, data, ended)
                call.pause()
                if not ended:
                    asyncio.get_running_loop().call_soon(call.resume)

        async with serving(script) as port, pool_of(port) as pool:
            heard = Slow()
            call = pool.send(REQUEST, heard)
            await heard.more.wait()
            await closed.wait()
            await heard.over.wait()
            assert heard.failure is None
            assert heard.body == body
            assert heard.reads > 2

    run(main())


def test_nothing_is_read_while_paused(run: Run) -> None:
    async def main() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_request(reader)
                writer.write(reply(b"200 OK", b"Content-Length: 20000000", body=bytes(20_000_000)))

        async with serving(script) as port, pool_of(port) as pool:
            heard = Heard()
            call = pool.send(REQUEST, heard)
            call.pause()
            await turns_until(lambda: call.connection)
            for _ in range(50):
                await asyncio.sleep(0)
            assert heard.reads == 0
            call.resume()
            await heard.more.wait()
            call.pause()
            reads = heard.reads
            for _ in range(50):
                await asyncio.sleep(0)
            assert heard.reads == reads
            assert repr(call) == f"<UpstreamCall {pool.netloc} reply paused>"
            call.resume()
            await heard.over.wait()
            assert len(heard.body) == 20_000_000
            assert pool.idle == 1

    run(main())


def test_a_call_paused_at_its_very_end_leaves_the_connection_readable(run: Run) -> None:
    class Late(Heard):
        def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
            super().on_read(head, data, ended)
            call.pause()

    async def main() -> None:
        nonlocal call
        async with serving(answering(OK)) as port, pool_of(port) as pool:
            for _ in range(2):
                heard = Late()
                call = pool.send(REQUEST, heard)
                await heard.over.wait()
                assert (heard.status, pool.open, pool.idle) == (200, 1, 1)
                call.resume()

    call: UpstreamCall
    run(main())


# -- TLS


def trusting() -> ssl.SSLContext:
    context = client_context()
    context.load_verify_locations(TLS_FOLDER / "server.crt")
    return context


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS_FOLDER / "server.crt", TLS_FOLDER / "server.key")
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_replies_over_tls_with_back_pressure(run: Run, version: ssl.TLSVersion) -> None:
    body = random.Random(3).randbytes(2_000_000)

    class Slow(Heard):
        def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
            super().on_read(head, data, ended)
            self.call.pause()
            asyncio.get_running_loop().call_soon(self.call.resume)

        call: UpstreamCall

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _line, _headers, received = await read_request(reader)
        writer.write(reply(b"200 OK", b"Content-Length: %d" % len(received), body=received))
        await read_request(reader)
        writer.write(reply(b"200 OK", body=received))

    async def main() -> None:
        context = server_context()
        context.maximum_version = version
        async with serving(script, context) as port:
            pool = UpstreamPool(origin(port, "https"), tls=trusting())
            for kept in (1, 0):
                heard = Slow()
                heard.call = pool.send(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), heard)
                await heard.over.wait()
                assert heard.failure is None
                assert (heard.body == body, pool.idle, pool.busy) == (True, kept, 0)
            await turns_until(lambda: pool.open == 0)
            pool.close()

    run(main())


def test_failures_of_tls_are_one_clear_line(run: Run) -> None:
    async def reason(tls: ssl.SSLContext | None, port: int) -> str:
        pool = UpstreamPool(origin(port, "https"), tls=tls, connect_timeout_s=10)
        heard = await ask(pool)
        await turns_until(lambda: pool.open == 0)
        assert heard.failure is not None
        assert heard.failure.stage is Stage.CONNECT
        return heard.failure.reason.removeprefix(f"127.0.0.1:{port}: ")

    async def plain(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    async def hang_up(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def main() -> None:
        async with serving(answering(OK), server_context()) as port:
            untrusted = await reason(None, port)
        assert untrusted.startswith("TLS failed: certificate verify failed: self-signed certificate")
        async with serving(plain) as port:
            assert (
                await reason(trusting(), port) == "TLS failed: the server does not speak TLS on this port (try http://)"
            )
        async with serving(hang_up) as port:
            assert (await reason(trusting(), port)).startswith("no connection to 127.0.0.1:")

    run(main())
