"""The simulator as a server under test in virtual time: no sockets, ten minutes pass in seconds."""

import asyncio
from typing import NamedTuple

from loadstone.core.errors import UnreachableError
from loadstone.core.target import Exchange, Request
from loadstone.measure.server import Server
from loadstone.sim.clock import VirtualClock
from loadstone.sim.profiles import MODEL, Profile
from loadstone.sim.target import SimTarget

BASE_URL = "sim://virtual"
_MODELS = b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL.encode()


class _Answer(NamedTuple):
    status: int
    body: bytes


def virtual_server(profile: Profile, clock: VirtualClock, seed: int = 0, request_timeout_s: float = 120.0) -> Server:
    """A server of ``profile`` in virtual time; the same seed behaves the same."""
    target = SimTarget(profile, clock, seed=seed, request_timeout_s=request_timeout_s)

    async def send(request: Request) -> Exchange:
        exchange = Exchange(request)
        ended: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()
        target.start(exchange, ended.set_result)
        await ended
        return exchange

    async def fetch(method: str, path: str) -> _Answer:
        answers = {"/metrics": lambda: target.metrics_text().encode(), "/v1/models": lambda: _MODELS}
        if path not in answers:
            raise UnreachableError(f"{method} {path}: the simulator has no such page")
        return _Answer(200, answers[path]())

    return Server(
        base_url=BASE_URL,
        target=target,
        clock=clock,
        send=send,
        fetch=fetch,
        stamps=None,
        machine=None,
        close=lambda: None,
    )
