"""The server under test, as everything that measures sees it: over HTTP, or simulated in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from loadstone.core.clock import Clock
from loadstone.core.engine_metrics import read_engine_metrics
from loadstone.core.errors import UnreachableError, UsageError
from loadstone.core.settings import TIMEOUT_RANGE_S, ServerSettings, check_range
from loadstone.core.target import Exchange, Request, Target
from loadstone.measure.machine import Machine
from loadstone.measure.probe import Fetched
from loadstone.measure.runner import Stamps
from loadstone.measure.telemetry import is_loopback
from loadstone.wire.client import HttpTarget, connect_target

ADMIN_HEADER = "X-Loadstone-Admin"
_METRICS_WAIT_S = 5.0
"""A page that never comes must not hold up the search for the length of a request's time-out."""


@dataclass(frozen=True)
class Server:
    """Where requests go, and what can be asked beside them."""

    base_url: str
    target: Target
    clock: Clock
    send: Callable[[Request], Awaitable[Exchange]]
    fetch: Callable[[str, str], Awaitable[Fetched]]
    """(method, path) → answer; raises UnreachableError where none comes."""
    stamps: Stamps | None
    machine: Machine | None
    """None in virtual time: this machine's load says nothing there."""
    close: Callable[[], None]

    @property
    def loopback(self) -> bool:
        return self.machine is not None and is_loopback(self.base_url)

    async def metrics(self) -> str | None:
        """Text of ``/metrics``; None where the server has none, or none in time."""
        try:
            async with asyncio.timeout(_METRICS_WAIT_S):
                reply = await self.fetch("GET", "/metrics")
        except (UnreachableError, TimeoutError):
            return None
        return reply.body.decode("utf-8", "replace") if reply.status == 200 else None

    async def idle(self) -> bool | None:
        """Whether nothing is running or waiting in the engine; None where it does not say."""
        text = await self.metrics()
        if text is None:
            return None
        metrics = read_engine_metrics(text)
        if metrics.running is None and metrics.waiting is None:
            return None
        return not (metrics.running or metrics.waiting)


async def connect_server(settings: ServerSettings, clock: Clock, *, api_key: str = "", admin_key: str = "") -> Server:
    """Resolve the server's name; nothing is sent yet. Raises UsageError and UnreachableError."""
    check_range("--request-timeout-s", settings.request_timeout_s, *TIMEOUT_RANGE_S)
    headers = parse_headers(settings.header)
    if admin_key:
        headers[ADMIN_HEADER] = admin_key
    target: HttpTarget = await connect_target(
        settings.base_url, clock, timeout_s=settings.request_timeout_s, api_key=api_key, headers=headers
    )
    return Server(
        base_url=settings.base_url,
        target=target,
        clock=clock,
        send=target.send,
        fetch=target.fetch,
        stamps=target,
        machine=Machine(),
        close=target.close,
    )


def parse_headers(pairs: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` pairs; raises UsageError for one that is none."""
    headers: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--header {pair!r}: give NAME=VALUE")
        headers[name.strip()] = value.strip()
    return headers
