"""Badly behaved model servers on real sockets. Each runs in a thread of its own, so that a whole command can be run."""

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MODEL = "stub"
TLS = Path(__file__).parent / "data" / "tls"
"""A self-signed certificate and its key."""
DONE = b"data: [DONE]\n\n"

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    body: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.body.get("max_tokens", 4))

    @property
    def usage(self) -> dict[str, int]:
        text = self.body["messages"][0]["content"] if "messages" in self.body else self.body.get("prompt", "")
        return {"prompt_tokens": len(text.split()) + 3, "completion_tokens": self.tokens}


class Peer:
    """One connection, as a behaviour sees it."""

    def __init__(self, writer: asyncio.StreamWriter, token_s: float) -> None:
        self._writer = writer
        self._token_s = token_s
        self.open = True

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def reply(self, status: int, body: bytes, kind: str = "application/json", *headers: str) -> None:
        """A whole reply."""
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}", f"Content-Type: {kind}", *headers]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
        await self.send(head.encode() + b"\r\n\r\n" + body)

    async def stream(self, events: list[bytes], *, whole: bool = True) -> None:
        """Events one by one, each after the time of a token; without ``whole`` the stream does not end."""
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            await asyncio.sleep(self._token_s)
            await self.send(b"%x\r\n%b\r\n" % (len(event), event))
        if whole:
            await self.send(b"0\r\n\r\n")

    def close(self) -> None:
        self.open = False


Behaviour = Callable[[Asked, Peer], Awaitable[None]]


def event(document: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(document).encode()


def delta(finish: str | None = None, **says: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": says, "finish_reason": finish}]})


def events_of(asked: Asked) -> list[bytes]:
    """A good stream: a chunk for each token, the end, ``usage`` where it is asked for, [DONE]."""
    events = [delta(content=f"w{place} ") for place in range(asked.tokens)] + [delta(finish="length")]
    if asked.body.get("stream_options", {}).get("include_usage"):
        events.append(event({"choices": [], "usage": asked.usage}))
    return [*events, DONE]


async def well(asked: Asked, peer: Peer) -> None:
    if asked.body.get("stream"):
        await peer.stream(events_of(asked))
        return
    message = {"role": "assistant", "content": "w " * asked.tokens}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    await peer.reply(200, json.dumps({"choices": [choice], "usage": asked.usage}).encode())


def streaming(change: Callable[[list[bytes]], list[bytes]], *, whole: bool = True) -> Behaviour:
    """Good but for the events of its streams; without ``whole`` the HTTP message is left unfinished."""

    async def behave(asked: Asked, peer: Peer) -> None:
        if asked.body.get("stream"):
            await peer.stream(change(events_of(asked)), whole=whole)
        else:
            await well(asked, peer)

    return behave


repeats_done = streaming(lambda events: [*events, DONE, DONE])
half_event = streaming(lambda events: [*events[:2], events[2][:25]])
coalesces = streaming(lambda events: [delta(content="w0 w1 w2 w3"), *events[-3:]])
no_content = streaming(lambda events: events[-3:])
role_first = streaming(lambda events: [delta(role="assistant", content=""), *events])
reasoning_first = streaming(lambda events: [delta(role="assistant", reasoning_content="hm "), *events])
error_event = streaming(lambda events: [events[0], event({"error": {"message": "CUDA out of memory"}})])
never_ends = streaming(lambda events: events[:2], whole=False)


async def closes_mid_stream(asked: Asked, peer: Peer) -> None:
    await never_ends(asked, peer)
    peer.close()


async def closes_at_once(asked: Asked, peer: Peer) -> None:
    peer.close()


async def no_usage(asked: Asked, peer: Peer) -> None:
    if asked.body.get("stream"):
        await peer.stream([*events_of(asked)[: asked.tokens + 1], DONE])
    else:
        await peer.reply(200, b'{"choices": [{"message": {"content": "w w"}, "finish_reason": "length"}]}')


async def close_delimited(asked: Asked, peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    await peer.send(b"".join(events_of(asked)))
    peer.close()


async def byte_by_byte(asked: Asked, peer: Peer) -> None:
    body = b"".join(events_of(asked))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    for byte in head + body:
        await peer.send(bytes([byte]))
        await asyncio.sleep(0)


async def html(asked: Asked, peer: Peer) -> None:
    await peer.reply(200, b"<html><title>Welcome to nginx!</title></html>", "text/html")


async def wants_key(asked: Asked, peer: Peer) -> None:
    await peer.reply(401, b'{"error": {"message": "Incorrect API key provided"}}')


async def knows_no_model(asked: Asked, peer: Peer) -> None:
    message = f"The model `{asked.body.get('model')}` does not exist."
    await peer.reply(404, json.dumps({"error": {"message": message}}).encode())


async def too_many(asked: Asked, peer: Peer) -> None:
    await peer.reply(429, b'{"error": {"message": "slow down"}}', "application/json", "Retry-After: 7")


async def breaks(asked: Asked, peer: Peer) -> None:
    await peer.reply(500, b'{"error": {"message": "EngineDeadError"}}')


def rejects(field: str, says: str) -> Behaviour:
    """400 for every request that has ``field``."""

    async def behave(asked: Asked, peer: Peer) -> None:
        if field in asked.body:
            await peer.reply(400, json.dumps({"error": {"message": says}}).encode())
        else:
            await well(asked, peer)

    return behave


class BadServer:
    """Behaves ``well`` for the first ``good`` generations, then as told in every ``every``-th of them."""

    def __init__(self, behave: Behaviour, good: int, every: int, token_s: float, pages: dict[str, Behaviour]) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        """Generations asked for, in order."""
        self._behave = behave
        self._good = good
        self._every = every
        self._token_s = token_s
        self._pages = {"/v1/models": _models, **pages}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def listen(self, tls: ssl.SSLContext | None) -> int:
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=tls)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(writer, self._token_s)
        try:
            while peer.open:
                await self._answer(await _read(reader), peer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            return
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, asked: Asked, peer: Peer) -> None:
        if asked.method == "GET":
            await self._pages.get(asked.path, _nothing_there)(asked, peer)
            return
        self.asked.append(asked)
        beyond = len(self.asked) - self._good
        await (self._behave if beyond > 0 and beyond % self._every == 0 else well)(asked, peer)

    def die(self) -> None:
        """Listen no more, cut every connection."""
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, path, _ = head.split(" ", 2)
    length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
    body = await reader.readexactly(int(length[1]) if length else 0)
    return Asked(method, path, json.loads(body) if body else {})


async def _models(asked: Asked, peer: Peer) -> None:
    await peer.reply(200, json.dumps({"data": [{"id": MODEL}]}).encode())


async def _nothing_there(asked: Asked, peer: Peer) -> None:
    await peer.reply(404, b'{"detail": "Not Found"}')


async def hangs(asked: Asked, peer: Peer) -> None:
    await asyncio.Event().wait()


@contextmanager
def serving(
    behave: Behaviour = well,
    *,
    good: int = 0,
    every: int = 1,
    token_s: float = 0.0,
    pages: dict[str, Behaviour] | None = None,
    tls: bool = False,
) -> Iterator[BadServer]:
    """A server on a free port; ``pages`` answer GET."""
    server = BadServer(behave, good, every, token_s, pages or {})
    loop = asyncio.new_event_loop()
    started, stopped = threading.Event(), asyncio.Event()

    async def run() -> None:
        port = await server.listen(_tls_context() if tls else None)
        server.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        started.set()
        await stopped.wait()
        server.die()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()


def _tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.crt", TLS / "server.key")
    return context
