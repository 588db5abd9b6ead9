"""Clients that say exactly the bytes they are told to, for the tests of the server side."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from loadstone.wire.server import Handler, HttpServer, IncomingRequest, Response

GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

on_each_loop = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


def run_on(new_loop: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


def echo(request: IncomingRequest, response: Response) -> None:
    response.reply(200, [], f"{request.method} {request.path} {request.query.decode()} ".encode() + request.body)


@asynccontextmanager
async def listening(handler: Handler = echo, **settings: Any) -> AsyncIterator[tuple[HttpServer, int]]:
    """A server and its port. Afterwards no connection may be left, and no error may have reached the loop."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    server = HttpServer(handler, **settings)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.stop()
    assert errors == []
    assert repr(server) == "<HttpServer stopped, 0 connections>"


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes, *, piece: int = 0) -> None:
        """``piece`` bytes at a time, 0 for all at once. A server that has closed is no error."""
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), piece or len(data) or 1):
                self.writer.write(data[start : start + (piece or len(data))])
                await self.writer.drain()
                if piece:
                    await asyncio.sleep(0)

    async def rest(self) -> bytes:
        """All until the server closes."""
        return await self.reader.read()

    def reset(self) -> None:
        """Leave so that the other side sees an error."""
        self.writer.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.writer.transport.abort()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(port: int, data: bytes, *, piece: int = 0) -> bytes:
    """Send and read until the server closes."""
    async with connected(port) as client:
        await client.send(data, piece=piece)
        return await client.rest()
