"""Scripted HTTP servers on real sockets, for the tests of the client."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from loadstone.core.target import Request
from loadstone.wire.client import HttpTarget, connect_target
from loadstone.wire.clock import MonotonicClock

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def request(path: str = "/v1/completions", body: bytes = b"{}") -> Request:
    return Request(path=path, body=body, index=0)


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    """Request line, headers in lower case, body. Raises IncompleteReadError at the end of the connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return head[0], headers, await reader.readexactly(int(headers["content-length"]))


def answering(*answers: bytes, close: bool = False) -> Script:
    """Each connection gives these answers in turn, the last one for ever; with ``close`` it ends after them."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(answers)
        while left:
            await read_request(reader)
            writer.write(left[0])
            await writer.drain()
            if len(left) > 1 or close:
                left.pop(0)

    return script


async def turns_until(condition: Callable[[], object]) -> None:
    """Let the loop turn until the condition holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Run ``script`` for each connection; yields the port. A client that leaves ends its script quietly."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, ssl.SSLError):
            return
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await turns_until(lambda: not tasks)


@asynccontextmanager
async def client_of(
    port: int, *, scheme: str = "http", timeout_s: float = 30.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpTarget]:
    clock = MonotonicClock(asyncio.get_running_loop())
    target = await connect_target(f"{scheme}://127.0.0.1:{port}", clock, timeout_s=timeout_s, tls=tls)
    try:
        yield target
    finally:
        target.close()
        clock.close()
        await asyncio.sleep(0)
