"""ASGI's own terms, and the reply of an app as it passes by."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from loadstone.hold.endings import Header, Reply
from loadstone.hold.usage import UsageReader

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class WatchedReply:
    """The app's reply, as far as it has been sent. Times are monotonic nanoseconds, None before."""

    def __init__(self) -> None:
        self.status = 0
        self.streams = False
        self.first_ns: int | None = None
        """When the first byte of its body went out."""
        self.ending = False
        """Its last message is being sent."""
        self.last_ns: int | None = None
        """When that was done."""
        self._usage: UsageReader | None = None

    def __repr__(self) -> str:
        return f"<WatchedReply {self.status or 'not begun'}{' complete' if self.complete else ''}>"

    @property
    def complete(self) -> bool:
        """Its last byte has been sent."""
        return self.last_ns is not None

    def start(self, message: Message) -> list[Header]:
        """Take note of its head; returns the headers."""
        headers: list[Header] = list(message.get("headers", ()))
        self.status = message["status"]
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self.streams = kind.startswith(b"text/event-stream")
        return headers

    def feed(self, data: bytes, now_ns: int) -> None:
        """Take note of a piece of its body."""
        if self._usage is None:
            self.first_ns = now_ns
            self._usage = UsageReader(self.streams)
        self._usage.feed(bytes(data))

    def tokens(self) -> tuple[int | None, int]:
        """(all tokens of the request where the reply says so, output tokens)."""
        return self._usage.tokens() if self._usage is not None else (None, 0)


def is_last(message: Message) -> bool:
    """With this message a reply is complete."""
    if message["type"] == "http.response.body":
        return not message.get("more_body", False)
    return bool(message["type"] == "http.response.pathsend")


async def answer(send: Send, reply: Reply, extra: list[Header]) -> None:
    """Send a whole reply."""
    headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body)), *extra]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": False})
