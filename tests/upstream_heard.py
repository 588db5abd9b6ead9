"""What the tests of the gate's upstream connections share: a sink that listens, a pool that is checked, replies."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from loadstone.wire.origin import Origin
from loadstone.wire.upstream import Failure, Head, UpstreamPool
from wire_servers import Script, read_request, turns_until

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Run = Callable[[Coroutine[Any, Any, Any]], Any]

REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
HEAD_REQUEST = b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: u\r\n\r\n"


def runner(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> Run:
    """``asyncio.run`` on such a loop; whatever goes wrong in a callback or is left behind fails the test."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        reported: list[str] = []

        async def watched() -> Any:
            asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(str(context)))
            async with asyncio.timeout(20):
                result = await main
                await turns_until(lambda: len(asyncio.all_tasks()) == 1)
                return result

        with asyncio.Runner(loop_factory=new_loop) as loop:
            result = loop.run(watched())
        assert not reported, reported[0]
        return result

    return run


class Heard:
    """A sink that keeps what it hears, and checks the order."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.reads = 0
        self.failure: Failure | None = None
        self.over = asyncio.Event()
        self.more = asyncio.Event()

    def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
        assert not self.over.is_set()
        assert (self.head is None) == (head is not None), "the head comes first, and once"
        assert head is not None or data or ended, "an empty read is not told"
        self.head = self.head or head
        self.pieces.append(data)
        self.reads += 1
        self.more.set()
        if ended:
            self.over.set()

    def on_failed(self, failure: Failure) -> None:
        assert not self.over.is_set()
        assert "\n" not in failure.reason
        self.failure = failure
        self.over.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def status(self) -> int:
        return self.head.status if self.head is not None else 0


def origin(port: int, scheme: str = "http", host: str = "127.0.0.1") -> Origin:
    return Origin(scheme, host, port, "", False)


@asynccontextmanager
async def pool_of(port: int, **settings: Any) -> AsyncIterator[UpstreamPool]:
    pool = UpstreamPool(origin(port), **settings)
    try:
        yield pool
        assert pool.busy == 0
        await turns_until(lambda: pool.open == pool.idle)
    finally:
        pool.close()
        await turns_until(lambda: pool.open == 0)


async def ask(pool: UpstreamPool, data: bytes = REQUEST, *, head_only: bool = False) -> Heard:
    heard = Heard()
    pool.send(data, heard, head_only=head_only)
    assert heard.reads == 0, "nothing is told from within send"
    assert heard.failure is None
    await heard.over.wait()
    return heard


async def trickle(writer: asyncio.StreamWriter, answer: bytes, size: int) -> None:
    """Write ``answer`` in pieces of ``size``, each sent before the next is written, while the client is there."""
    for start in range(0, len(answer), size):
        if writer.is_closing():
            return
        writer.write(answer[start : start + size])
        await asyncio.sleep(0)


def split(answer: bytes, size: int, *, close: bool = False) -> Script:
    """Gives ``answer`` to each request in pieces of ``size``; with ``close`` to one only."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            await trickle(writer, answer, size)
            if close:
                return

    return script


def reply(status: bytes = b"200 OK", *lines: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"".join((b"HTTP/", version, b" ", status, b"\r\n", *(b"%b\r\n" % line for line in lines), b"\r\n", body))


CONTINUE = reply(b"100 Continue") + reply(b"103 Early Hints", b"Link: </a>", b"Content-Type: x")
