"""The result cache of the embedding service in a real redis-server."""

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from loadstone.serve.cache import CacheFigures, Scope
from loadstone.serve.redis_cache import RedisCache
from set_clock import SetClock

SCOPE = Scope("model", "text")


class Server:
    """A redis-server on a Unix socket that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is not on PATH: install it (apt-get install redis-server)"
        self.command = [program, "--port", "0", "--unixsocket", str(folder / "redis.sock"), "--save", ""]
        self.url = f"unix://{folder / 'redis.sock'}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert any("eady to accept connections" in line for line in self.process.stdout)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


def vectors(number: int, dim: int) -> dict[bytes, bytes]:
    return {SCOPE.key(f"text {index}"): index.to_bytes(4, "big") * dim for index in range(number)}


def with_cache(server: Server, dim: int, main: Callable[[RedisCache, Any, SetClock, list[str]], Any]) -> None:
    async def run() -> None:
        clock, said = SetClock(), list[str]()
        cache = RedisCache(server.url, 4 * dim, said.append, clock.now_ns, timeout_s=5.0)
        client = redis.asyncio.Redis.from_url(server.url)
        await main(cache, client, clock, said)
        await client.aclose()
        await cache.close()

    asyncio.run(run())


def test_what_one_process_put_another_gets(server: Server) -> None:
    async def main(cache: RedisCache, client: Any, _clock: SetClock, said: list[str]) -> None:
        known = vectors(2048, 1152)
        await cache.put_many(known)
        other = RedisCache(server.url, 4 * 1152, said.append, timeout_s=5.0)
        unknown = SCOPE.key("another")
        found = await other.get_many([*known, unknown])
        assert found == [*known.values(), None]
        assert other.figures() == CacheFigures("redis", hits=2048, misses=1)
        assert await client.dbsize() == 2048
        assert 0 < await client.ttl(await client.randomkey()) <= 7 * 86_400
        assert said == []
        await other.close()

    with_cache(server, 1152, main)


def test_foreign_and_damaged_values_are_misses(server: Server) -> None:
    async def main(cache: RedisCache, client: Any, _clock: SetClock, _said: list[str]) -> None:
        first, second, third = vectors(3, 4).items()
        await cache.put_many(dict([first, second, third]))
        await client.set(b"loadstone:vector:" + first[0], b"short")
        await client.delete(b"loadstone:vector:" + second[0])
        await client.rpush(b"loadstone:vector:" + second[0], b"a list")
        assert await cache.get_many([first[0], second[0], third[0]]) == [None, None, third[1]]

    with_cache(server, 4, main)


def test_a_redis_that_goes_and_comes_back(server: Server) -> None:
    async def main(cache: RedisCache, _client: Any, clock: SetClock, said: list[str]) -> None:
        known = vectors(2, 4)
        await cache.put_many(known)
        server.stop()
        assert await cache.get_many(list(known)) == [None, None]
        server.start()
        await cache.put_many(known)
        assert await cache.get_many(list(known)) == [None, None], "it is left alone for a while"
        clock.ns += 1_000_000_000
        await cache.put_many(known)
        assert await cache.get_many(list(known)) == list(known.values())
        assert len(said) == 1

    with_cache(server, 4, main)


def test_a_redis_that_is_full_fails_nobody(server: Server) -> None:
    async def main(cache: RedisCache, client: Any, _clock: SetClock, said: list[str]) -> None:
        await client.config_set("maxmemory", "1")
        await cache.put_many(vectors(3, 4))
        assert len(said) == 1
        assert "maxmemory" in said[0]

    with_cache(server, 4, main)
