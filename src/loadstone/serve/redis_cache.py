"""``serve.cache.ResultCache`` in Redis, which may fail, stall or talk nonsense at any time: then all is a miss.

A Redis that failed is left alone for a second, or each request would wait out its time-out; then one request tries it
again. Vectors go after a week, so that those of a model no longer served don't stay for ever.

The time-out is ours, around connecting, sending and reading together: the client's own goes through
``asyncio.wait_for``, which can lose a caller's cancellation before Python 3.12.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from loadstone.core.errors import UsageError
from loadstone.serve.cache import CacheFigures

_PREFIX = b"loadstone:vector:"
_TIMEOUT_S = 0.05
_KEEP_S = 7 * 86_400
_MOST_CONNECTIONS = 8
_AT_ONCE = 128
"""Vectors in one command: half a megabyte fits into the time-out."""
_FAILURES = (RedisError, OSError, ValueError)
"""ValueError: the parser's, for what is not Redis at the other end."""
_NS = 1_000_000_000
_PAUSE_NS = 1 * _NS
_WARN_EVERY_NS = 60 * _NS


class RedisCache:
    """Vectors of ``vector_bytes`` each; a value of another length is a miss.

    Raises UsageError for a ``url`` that is not one of Redis. ``warn`` is told of failures, once a minute at most.
    """

    def __init__(
        self,
        url: str,
        vector_bytes: int,
        warn: Callable[[str], object],
        clock_ns: Callable[[], int] = time.monotonic_ns,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            # The URL may hold a password.
            raise UsageError(f"--redis: {error}; expected something like redis://127.0.0.1:6379/0") from None
        self._vector_bytes = vector_bytes
        self._warn = warn
        self._clock_ns = clock_ns
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(_MOST_CONNECTIONS)
        self._away_until_ns: int | None = None
        self._warned_ns: int | None = None
        self._hits = self._misses = self._failures = 0

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``ResultCache``."""
        found: list[bytes | None] = []
        for start in range(0, len(keys), _AT_ONCE):
            found += await self._get(keys[start : start + _AT_ONCE])
        hits = len(keys) - found.count(None)
        self._hits += hits
        self._misses += len(keys) - hits
        return found

    async def put_many(self, results: Mapping[bytes, bytes]) -> None:
        """See ``ResultCache``."""
        items = list(results.items())
        for start in range(0, len(items), _AT_ONCE):
            await self._put(items[start : start + _AT_ONCE])

    async def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        names = [_PREFIX + key for key in keys]
        values = await self._tried(lambda: self._redis.mget(names))
        return [None] * len(keys) if values is None else [self._vector(value) for value in values]

    async def _put(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for key, vector in items:
            pipeline.set(_PREFIX + key, vector, ex=_KEEP_S)
        await self._tried(pipeline.execute)

    async def _tried(self, command: Callable[[], Awaitable[list[Any]]]) -> list[Any] | None:
        """The reply, or None where Redis failed or is being left alone, be it found out while this one waited."""
        async with self._places:
            if not self._may_try():
                return None
            try:
                async with asyncio.timeout(self._timeout_s):
                    reply = await command()
            except _FAILURES as error:
                self._failed(str(error) or f"no answer within {self._timeout_s * 1000:g} ms")
                return None
            self._away_until_ns = None
            return reply

    def _vector(self, value: object) -> bytes | None:
        return value if isinstance(value, bytes) and len(value) == self._vector_bytes else None

    def _may_try(self) -> bool:
        if self._away_until_ns is None:
            return True
        now_ns = self._clock_ns()
        if now_ns < self._away_until_ns:
            return False
        self._away_until_ns = now_ns + _PAUSE_NS  # this one alone tries; the others go on without
        return True

    def _failed(self, reason: str) -> None:
        now_ns = self._clock_ns()
        self._failures += 1
        self._away_until_ns = now_ns + _PAUSE_NS
        if self._warned_ns is None or now_ns - self._warned_ns >= _WARN_EVERY_NS:
            self._warned_ns = now_ns
            self._warn(f"the result cache in Redis cannot be used ({reason}): what it holds is computed again")

    def figures(self) -> CacheFigures:
        """See ``ResultCache``."""
        return CacheFigures("redis", self._hits, self._misses, failures=self._failures)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def __repr__(self) -> str:
        state = "in use" if self._away_until_ns is None else "left alone"
        return f"<RedisCache {state}, {self._hits} hits, {self._misses} misses, {self._failures} failures>"
