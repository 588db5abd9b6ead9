"""The middleware in a real service: Starlette and FastAPI under uvicorn, over sockets."""

import asyncio
import importlib.util
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from loadstone.asgi import AdmissionMiddleware

EXAMPLE = Path(__file__).parent.parent / "examples" / "fastapi_limits.py"
CHAT = "/v1/chat/completions"


class Connection:
    """A client's own, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self._writer.write(f"{head}\r\n\r\n".encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:])

    async def reply(self) -> tuple[int, dict[str, str], Any]:
        status, headers = await self.head()
        return status, headers, json.loads(await self._reader.readexactly(int(headers["content-length"])))

    async def chunk(self) -> bytes:
        size = int(await self._reader.readline(), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[Callable[[], Coroutine[Any, Any, Connection]]]:
    """uvicorn in this loop; yields how to connect."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="on", ws="none", http="httptools", access_log=False, log_level="critical")
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    opened: list[Connection] = []

    async def connect() -> Connection:
        opened.append(Connection(*await asyncio.open_connection(*listening.getsockname())))
        return opened[-1]

    try:
        yield connect
    finally:
        for connection in opened:
            await connection.close()
        server.should_exit = True
        await running


def starlette(handler: Callable[[Request], Any], **limits: Any) -> Starlette:
    app = Starlette(routes=[Route(CHAT, handler, methods=["POST"])])
    app.add_middleware(AdmissionMiddleware, stats_path="/stats", **limits)
    return app


async def stats(connection: Connection) -> dict[str, Any]:
    connection.send("GET", "/stats")
    return (await connection.reply())[2]


async def until(connection: Connection, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Asks for the figures until they are as wanted."""
    async with asyncio.timeout(20):
        while not wanted(found := await stats(connection)):
            pass
    return found


def test_the_example_gives_a_fastapi_service_its_limits() -> None:
    spec = importlib.util.spec_from_file_location("fastapi_limits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def main() -> None:
        async with served(module.app) as connect:
            statuses, ask = [], await connect()
            for at in range(12):
                ask.send("POST", CHAT, b'{"max_tokens": %d}' % at)
                status, headers, reply = await ask.reply()
                statuses.append(status)
                assert headers["x-ratelimit-remaining"] == str(max(0, 9 - at))
            assert statuses == [200] * 10 + [429] * 2
            assert (reply["error"]["code"], headers["retry-after"].isdigit()) == ("rate_limit_exceeded", True)
            ask.send("GET", "/health")
            assert (await ask.reply())[2] == {"status": "ok"}
            assert (await stats(ask))["outcomes"]["ok"] == 10

    asyncio.run(main())


def test_a_thread_keeps_its_slot_until_it_ends() -> None:
    computing, go = threading.Event(), threading.Event()

    def model(request: Request) -> Response:
        computing.set()
        assert go.wait(20)
        return PlainTextResponse("done")

    async def main() -> None:
        async with served(starlette(model, max_concurrency=1, max_queue=0, request_timeout_s=2)) as connect:
            first, second, third = await connect(), await connect(), await connect()
            first.send("POST", CHAT, b"{}")
            assert (await first.reply())[0] == 504
            assert computing.is_set()
            second.send("POST", CHAT, b"{}")
            assert (await second.reply())[2]["error"]["code"] == "queue_full"
            assert (await stats(third))["in_flight"] == 1
            go.set()
            found = await until(third, lambda figures: figures["in_flight"] == 0)
            assert (found["outcomes"]["request_timeout"], found["outcomes"]["queue_full"]) == (1, 1)

    asyncio.run(main())


def test_streams_pass_chunk_by_chunk_and_a_client_that_leaves_stops_them() -> None:
    ended = []

    async def words() -> AsyncIterator[str]:
        try:
            while True:
                yield "data: {}\n\n"
                await anyio.sleep(0.01)
        finally:
            ended.append("words")

    async def model(request: Request) -> Response:
        assert (await request.json())["max_tokens"] == 512
        return StreamingResponse(words(), media_type="text/event-stream")

    async def main() -> None:
        async with served(starlette(model, max_concurrency=1, max_queue=1)) as connect:
            first, second, third = await connect(), await connect(), await connect()
            first.send("POST", CHAT, b'{"max_tokens": 9999, "stream": true}')
            status, headers = await first.head()
            assert (status, headers["x-ratelimit-limit-requests"]) == (200, "10")
            assert [await first.chunk() for _ in range(3)] == [b"data: {}\n\n"] * 3
            second.send("POST", CHAT, b'{"max_tokens": 9999}')
            await until(third, lambda figures: figures["queued"] == 1)
            await first.close()
            assert (await second.head())[0] == 200
            assert ended == ["words"]
            await second.close()
            found = await until(third, lambda figures: figures["in_flight"] == 0)
            assert (found["outcomes"]["client_gone"], found["received"]) == (2, 2)

    asyncio.run(main())


def test_who_leaves_the_queue_and_who_sends_too_much() -> None:
    go = asyncio.Event()

    async def model(request: Request) -> Response:
        await go.wait()
        return JSONResponse(len(await request.body()))

    async def main() -> None:
        app = starlette(model, max_concurrency=1, max_queue=5, max_body_bytes=1000)
        async with served(app) as connect:
            first, second, third = await connect(), await connect(), await connect()
            first.send("POST", CHAT, b'{"max_tokens": 1}')
            await until(third, lambda figures: figures["in_flight"] == 1)
            second.send("POST", CHAT, b"{}")
            await until(third, lambda figures: figures["queued"] == 1)
            await second.close()
            found = await until(third, lambda figures: figures["queued"] == 0)
            assert (found["in_flight"], found["outcomes"]["client_gone"]) == (1, 1)
            go.set()
            assert (await first.reply())[2] == len(b'{"max_tokens": 1}')
            third.send("POST", CHAT, b"x" * 100_000)
            status, _, reply = await third.reply()
            assert (status, reply["error"]["code"]) == (413, "body_too_large")
            assert (await stats(third))["outcomes"]["bad_request"] == 1

    asyncio.run(main())
