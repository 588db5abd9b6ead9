"""The measuring client over TLS: stamps, chunks and failures as without it."""

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from loadstone.core.target import Break, Exchange
from loadstone.wire.tls import client_context
from wire_servers import OK, answering, client_of, read_request, request, serving

FOLDER = Path(__file__).with_name("data") / "tls"
LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(FOLDER / "server.crt", FOLDER / "server.key")
    return context


def trusting_context() -> ssl.SSLContext:
    context = client_context()
    context.load_verify_locations(FOLDER / "server.crt")
    return context


def send_to(server: ssl.SSLContext | None, client: ssl.SSLContext, answer: bytes = OK) -> Exchange:
    async def main() -> Exchange:
        async with (
            serving(answering(answer, close=True), tls=server) as port,
            client_of(port, scheme="https", tls=client) as target,
        ):
            return await target.send(request())

    return asyncio.run(main())


@pytest.mark.parametrize("runner", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_streams_and_large_bodies(version: ssl.TLSVersion, runner: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    body = b"x" * 2_000_000

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            received = (await read_request(reader))[2]
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(received), 100_000):
                part = received[start : start + 100_000]
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
            writer.write(b"0\r\n\r\n")

    async def main() -> None:
        server = server_context()
        server.maximum_version = version
        async with (
            serving(script, tls=server) as port,
            client_of(port, scheme="https", tls=trusting_context()) as target,
        ):
            first = await target.send(request(body=body))
            second = await target.send(request(body=body))
            for exchange in (first, second):
                assert (exchange.broken, exchange.error) == (None, "")
                assert exchange.log.body() == body
                assert exchange.sent_ns < exchange.log.first_ns() < exchange.end_ns
            assert first.connect_ns > 0
            assert second.connect_ns == 0

    runner(main())


def test_a_certificate_that_nobody_vouches_for() -> None:
    exchange = send_to(server_context(), client_context())
    assert (exchange.broken, exchange.error) == (
        Break.TLS,
        "TLS failed: certificate verify failed: self-signed certificate (SSL_CERT_FILE names those to trust)",
    )


def test_a_server_without_tls() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async def main() -> None:
        async with serving(script) as port, client_of(port, scheme="https", tls=client_context()) as target:
            exchange = await target.send(request())
            assert exchange.broken is Break.TLS
            assert exchange.error == "TLS failed: the server does not speak TLS on this port (try http://)"

    asyncio.run(main())


def test_a_server_that_hangs_up_in_the_handshake() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def main() -> None:
        async with serving(script) as port, client_of(port, scheme="https", tls=client_context()) as target:
            assert (await target.send(request())).broken in (Break.TLS, Break.DISCONNECT)

    asyncio.run(main())


def test_a_reply_that_the_end_of_the_tls_session_delimits() -> None:
    exchange = send_to(server_context(), trusting_context(), b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert (exchange.broken, exchange.log.body()) == (None, b"abc")


def test_a_stream_cut_short() -> None:
    exchange = send_to(server_context(), trusting_context(), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
    assert (exchange.broken, exchange.log.body()) == (Break.DISCONNECT, b"ab")


def test_http_spoken_to_a_tls_port_is_malformed_or_cut() -> None:
    async def main() -> None:
        async with serving(answering(OK), tls=server_context()) as port, client_of(port) as target:
            assert (await target.send(request())).broken in (Break.MALFORMED, Break.DISCONNECT)

    asyncio.run(main())
