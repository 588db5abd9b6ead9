"""The gate's own small questions to an upstream: is it healthy, which model does it serve?"""

import asyncio
from dataclasses import dataclass, field

from loadstone.wire.upstream import Failure, Head, Stage, UpstreamPool

_MOST_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


@dataclass(frozen=True)
class NoAnswer:
    """Why none came."""

    reason: str
    refused: bool
    """There is no connection to be had, which is more than being slow."""


@dataclass
class _Listener:
    """Collects one small reply (wire.upstream.Sink)."""

    ended: "asyncio.Future[Answer | NoAnswer]"
    status: int = 0
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
        if head is not None:
            self.status = head.status
        self.size += len(data)
        if self.size <= _MOST_BYTES:
            self.parts.append(data)
        if ended and not self.ended.done():
            self.ended.set_result(Answer(self.status, b"".join(self.parts)))

    def on_failed(self, failure: Failure) -> None:
        if not self.ended.done():
            self.ended.set_result(NoAnswer(failure.reason, failure.stage is Stage.CONNECT))


async def ask(pool: UpstreamPool, request: bytes, timeout_s: float) -> Answer | NoAnswer:
    """Send ``request`` and wait for its reply, ``timeout_s`` at most."""
    ended: asyncio.Future[Answer | NoAnswer] = asyncio.get_running_loop().create_future()
    call = pool.send(request, _Listener(ended))
    try:
        async with asyncio.timeout(timeout_s):
            return await ended
    except TimeoutError:
        return NoAnswer(f"no answer within {timeout_s:g} s", False)
    finally:
        if not ended.done() or ended.cancelled():
            call.cancel()
