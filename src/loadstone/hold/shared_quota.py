"""Quotas that several gates share through Redis, by one Lua script and Redis's own clock.

While Redis cannot be used each gate goes on with quotas of its own: that lets through up to one quota for each gate,
where waiting would stop them all. Redis is tried again by a single request at a time, after 1 s, then 2 s, up to 30 s.
What was taken from one of the two is settled and refunded there, and nowhere else; what cannot be given back because
Redis is away counts until it leaves its window.
"""

import asyncio
import secrets
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from loadstone.core.clock import Clock
from loadstone.core.errors import UsageError
from loadstone.core.quota import (
    Exceeded,
    Quotas,
    QuotaSettings,
    Reservation,
    Standing,
    What,
    dearer_than_all,
    windows_of,
)

_SCRIPT = Path(__file__).with_name("shared_quota.lua")
_NS = 1_000_000_000
_FIRST_PAUSE_NS, _LONGEST_PAUSE_NS = 1 * _NS, 30 * _NS
_MOST_CONNECTIONS = 8
"""More only delay one another: the work is the gate's own, and Redis answers one at a time."""
_TIMEOUT_S = 0.25
_BOUNDS: tuple[tuple[str, What], ...] = (("minute", "requests"), ("hour", "requests"), ("minute", "tokens"))
"""As the script numbers them, from 1."""


class SharedQuotas:
    """``core.quota.Quotas`` in Redis: the same verbs, to be awaited, and the same results.

    Raises UsageError for a ``url`` that is not one of Redis; never for a Redis that does not answer, of which ``log``
    is told once, and once when it is back.
    """

    def __init__(
        self,
        url: str,
        settings: QuotaSettings,
        clock: Clock,
        log: Callable[[str], object],
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            # The URL may hold a password.
            raise UsageError(f"--redis: {error}; expected something like redis://127.0.0.1:6379/0") from None
        self._places = asyncio.Semaphore(_MOST_CONNECTIONS)
        self._script = self._redis.register_script(_SCRIPT.read_text("utf-8"))
        self._own = Quotas(settings)
        self._clock = clock
        self._log = log
        self._gate = secrets.token_hex(6)
        self._numbers = count()
        self._pause_ns = 0
        """How long Redis is being left alone; 0 while it answers."""
        self._retry_at_ns = 0

    def configure(self, settings: QuotaSettings) -> None:
        """Put other quotas in force, here; the counts stay."""
        self._own.configure(settings)

    async def reserve(self, client: str, tokens: int) -> Reservation | Exceeded:
        """Take one request and ``tokens`` from every window in one step, or nothing where one of them refuses.

        To be awaited to its end, even for a client that has left: cancelled, it may have taken what nobody gives back.
        """
        never = dearer_than_all(self._own.settings, tokens)
        if never is not None:
            return never
        name = f"{self._gate}-{next(self._numbers)}"
        reply = await self._run("reserve", client, name, tokens)
        if reply is None:
            return self._own.reserve(client, tokens, self._clock.now_ns())
        if reply[0]:
            return Reservation(client, tokens, reply[1] * 1000, name)
        window, what = _BOUNDS[reply[2] - 1]
        return Exceeded(window, what, self._bounds()[reply[2] - 1], reply[1] / 1e6)

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """Count ``tokens``, those really served, instead of those reserved. Closes the reservation."""
        if isinstance(reservation.held, str):
            await self._close("settle", reservation, tokens)
        else:
            self._own.settle(reservation, tokens, self._clock.now_ns())

    async def refund(self, reservation: Reservation) -> None:
        """Give everything back, as if the request had never come. Closes the reservation."""
        if isinstance(reservation.held, str):
            await self._close("refund", reservation, 0)
        else:
            self._own.refund(reservation, self._clock.now_ns())

    async def standings(self, client: str) -> list[Standing]:
        """How a client stands in each window, over all gates; in this one alone while Redis is away."""
        windows = windows_of(self._own.settings)
        reply = await self._run("standings", client, "", 0)
        if reply is None:
            return self._own.standings(client, self._clock.now_ns())
        return [
            Standing(
                window.name, window.what, window.limit, max(0, window.limit - used), reset_us / 1e6, window.window_s
            )
            for window, used, reset_us in zip(windows, reply[::2], reply[1::2], strict=True)
        ]

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _bounds(self) -> tuple[int, int, int]:
        """As the script takes them: 0 is no bound."""
        settings = self._own.settings
        return settings.requests_per_minute or 0, settings.requests_per_hour or 0, settings.tokens_per_minute or 0

    async def _close(self, verb: str, reservation: Reservation, tokens: int) -> None:
        name, reservation.held = reservation.held, None
        await self._run(verb, reservation.client, str(name), tokens)

    async def _run(self, verb: str, client: str, name: str, tokens: int) -> Any:
        """The script's reply, or None where Redis is away, be it found out while this one waited for its turn."""
        async with self._places:
            return await self._ask(verb, client, name, tokens)

    async def _ask(self, verb: str, client: str, name: str, tokens: int) -> Any:
        trying_again = self._pause_ns > 0
        if trying_again:
            now_ns = self._clock.now_ns()
            if now_ns < self._retry_at_ns:
                return None
            self._retry_at_ns = now_ns + self._pause_ns  # this request alone tries; the others go on without
        keys = [f"loadstone:quota:{{{client}}}:{part}" for part in ("minute", "hour", "tokens")]
        try:
            reply = await self._script(keys=keys, args=[verb, name, tokens, *self._bounds()])
        except (RedisError, OSError) as error:
            self._lost(error, trying_again)
            return None
        if trying_again:
            self._pause_ns = 0
            self._log("Redis answers again: quotas are shared between gates")
        return reply

    def _lost(self, error: Exception, trying_again: bool) -> None:
        if trying_again:
            self._pause_ns = min(2 * self._pause_ns, _LONGEST_PAUSE_NS)
        elif self._pause_ns:
            return  # one of several under way when Redis went; the first has said so
        else:
            self._pause_ns = _FIRST_PAUSE_NS
            self._log(f"Redis does not answer ({error}): this gate counts quotas by itself until it does")
        self._retry_at_ns = self._clock.now_ns() + self._pause_ns

    def __repr__(self) -> str:
        return f"<SharedQuotas {'by itself' if self._pause_ns else 'in Redis'}: {self._own!r}>"
