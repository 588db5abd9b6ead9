"""An ASGI server by hand: one request at a time, its messages seen one by one."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from loadstone.hold.asgi_messages import App, Message, Receive, Scope, Send

Entry = Callable[[Scope, Receive, Send], Awaitable[None]]
CHAT = "/v1/chat/completions"


def chat_body(**keys: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **keys}).encode()


class Call:
    """One request under way; ``leave`` is the client's hanging up."""

    def __init__(
        self,
        entry: Entry,
        body: bytes | list[bytes] = b"{}",
        *,
        path: str = CHAT,
        method: str = "POST",
        headers: list[tuple[bytes, bytes]] | None = None,
        client: str = "192.0.2.1",
        root_path: str = "",
        endless: bool = False,
    ) -> None:
        parts = [body] if isinstance(body, bytes) else body
        self._body = [
            {"type": "http.request", "body": part, "more_body": endless or at < len(parts)}
            for at, part in enumerate(parts, 1)
        ]
        self._gone = asyncio.Event()
        self.sent: list[Message] = []
        self.read = 0
        self.scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "root_path": root_path,
            "headers": headers or [],
            "client": (client, 40_000),
        }
        self.task = asyncio.get_running_loop().create_task(self._run(entry))

    async def _run(self, entry: Entry) -> None:
        await entry(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self.read < len(self._body):
            self.read += 1
            return self._body[self.read - 1]
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        # A server may make the app wait, before and after it takes a message.
        await asyncio.sleep(0)
        self.sent.append(message)
        await asyncio.sleep(0)

    def leave(self) -> None:
        self._gone.set()

    async def done(self) -> "Call":
        await self.task
        return self

    @property
    def status(self) -> int:
        """0 while there is none."""
        return self.sent[0]["status"] if self.sent else 0

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found

    @property
    def complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)


class Model:
    """An app under test. What it does is decided by ``act``; it keeps what it was asked."""

    def __init__(self, act: App | None = None) -> None:
        self._act = act or reply
        self.asked: list[Scope] = []
        self.running = 0
        self.most = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._act(scope, receive, send)
        finally:
            self.running -= 1


async def start(send: Send, status: int = 200, kind: bytes = b"application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})


async def reply(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the request's body back."""
    message = await receive()
    await start(send)
    await send({"type": "http.response.body", "body": message["body"]})


def slow(seconds: float) -> App:
    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(seconds)
        await reply(scope, receive, send)

    return act


async def fail(scope: Scope, receive: Receive, send: Send) -> None:
    raise ZeroDivisionError


async def lost(scope: Scope, receive: Receive, send: Send) -> None:
    work = asyncio.get_running_loop().create_future()
    work.cancel()
    await work


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    await start(send, 503)
    await send({"type": "http.response.body", "body": b"no"})


async def wrong(scope: Scope, receive: Receive, send: Send) -> None:
    await start(send, 422)
    await send({"type": "http.response.body", "body": b"no"})


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    await start(send)


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    await start(send, kind=b"text/event-stream")
    while True:
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await asyncio.sleep(1)


async def document(scope: Scope, receive: Receive, send: Send) -> None:
    await start(send)
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    await asyncio.Event().wait()
