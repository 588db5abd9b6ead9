"""The result cache: what it keeps, what it forgets, and a Redis that fails without failing anybody."""

import asyncio
import contextlib
import os
import random
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loadstone.core.errors import UsageError
from loadstone.serve.cache import CacheFigures, LruCache, Scope, model_fingerprint
from loadstone.serve.redis_cache import RedisCache
from set_clock import SetClock
from wire_servers import turns_until

S = 1_000_000_000
A, B, C = b"a" * 24, b"b" * 24, b"c" * 24
VECTOR = bytes(16)


# -- keys


def test_a_key_depends_on_all_that_the_vector_depends_on() -> None:
    scopes = [
        Scope("m", "text"),
        Scope("n", "text"),
        Scope("m", "image"),
        Scope("m", "text", {"quantization": "int8"}),
        Scope("m", "text", {"quantization": "int8", "normalize": True}),
        Scope('m", "text', ""),
    ]
    keys = [scope.key(item) for scope in scopes for item in ("", "a", "A", " a", "a\0")]
    assert len(set(keys)) == len(keys)
    assert Scope("m", "text", {"x": 1, "y": 2}).key("a") == Scope("m", "text", {"y": 2, "x": 1}).key(b"a")
    assert Scope("m", "text").key("a").hex() == Scope("m", "text").key("a").hex()
    assert Scope("m", "text").key("\ud800")


def test_a_fingerprint_knows_other_weights_under_the_same_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / "weights").write_bytes(b"abc")
    before = model_fingerprint(model)
    (model / ".cache").mkdir()
    (model / ".cache" / "downloaded").write_text("today")
    os.utime(model / "weights", (0, 0))
    assert model_fingerprint(model) == before
    assert model_fingerprint(model.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "weights").write_bytes(b"abd")
    assert model_fingerprint(tmp_path / "moved") != before


# -- in this process


def test_what_was_not_asked_for_longest_goes_first() -> None:
    async def main() -> None:
        cache = LruCache(2)
        await cache.put_many({A: b"1111", B: b"2222"})
        assert await cache.get_many([A, C, A]) == [b"1111", None, b"1111"]
        await cache.put_many({C: b"3333"})
        assert await cache.get_many([A, B, C]) == [b"1111", None, b"3333"]
        assert cache.figures() == CacheFigures("memory", hits=4, misses=2, entries=2, bytes=2 * 204)
        assert repr(cache) == "<LruCache 2 of 2 vectors, 0.0 MiB>"
        assert await cache.get_many([]) == []

    asyncio.run(main())


def test_the_bound_on_bytes_counts_what_entries_cost() -> None:
    async def main() -> None:
        cache = LruCache(100, max_bytes=1000)
        await cache.put_many({A: bytes(300), B: bytes(300)})
        assert cache.figures().bytes == 1000
        await cache.put_many({A: bytes(301)})
        assert [vector is not None for vector in await cache.get_many([A, B])] == [True, False]
        await cache.put_many({C: bytes(801)})
        assert (cache.figures().entries, cache.figures().bytes) == (0, 0)

    asyncio.run(main())


def test_without_room_nothing_is_kept() -> None:
    async def main() -> None:
        cache = LruCache(0)
        await cache.put_many({A: VECTOR})
        assert await cache.get_many([A]) == [None]

    asyncio.run(main())


def test_the_lru_cache_against_a_model() -> None:
    async def main() -> None:
        rng = random.Random(7)
        cache, model = LruCache(20, max_bytes=20 * 240), OrderedDict[bytes, bytes]()
        for _ in range(5000):
            key = bytes([rng.randrange(40)])
            if rng.random() < 0.5:
                model.pop(key, None)
                model[key] = bytes(rng.randrange(80))
                await cache.put_many({key: model[key]})
                while len(model) > 20 or sum(len(vector) + 200 for vector in model.values()) > 20 * 240:
                    model.popitem(last=False)
            else:
                assert await cache.get_many([key]) == [model.get(key)]
                if key in model:
                    model.move_to_end(key)
        figures = cache.figures()
        assert figures.entries == len(model)
        assert figures.bytes == sum(len(vector) + 200 for vector in model.values())

    asyncio.run(main())


# -- a Redis that fails


class Impostor:
    """A server that takes connections and is no Redis: silent, hanging up, or talking nonsense."""

    def __init__(self, says: bytes | None = None, *, hangs_up: bool = False) -> None:
        self.says = says
        self.hangs_up = hangs_up
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if not self.hangs_up:
            while await reader.read(65_536):
                writer.write(self.says or b"")
        writer.close()


@contextlib.asynccontextmanager
async def cache_on(
    server: Impostor, clock: SetClock, said: list[str], timeout_s: float = 0.05
) -> AsyncIterator[RedisCache]:
    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
    cache = RedisCache(url, len(VECTOR), said.append, clock.now_ns, timeout_s)
    yield cache
    await cache.close()
    listener.close()
    await turns_until(lambda: len(asyncio.all_tasks()) == 1)


IMPOSTORS = {
    "silent": Impostor(),
    "hangs up": Impostor(hangs_up=True),
    "HTTP": Impostor(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "a length that is none": Impostor(b"$many\r\n"),
    "an error": Impostor(b"-OOM command not allowed\r\n"),
    "loading": Impostor(b"-LOADING Redis is loading the dataset in memory\r\n"),
}


@pytest.mark.parametrize("server", IMPOSTORS.values(), ids=IMPOSTORS.keys())
def test_any_failure_is_a_miss_and_one_warning_a_minute(server: Impostor) -> None:
    async def main() -> None:
        said: list[str] = []
        clock = SetClock()
        async with cache_on(server, clock, said) as cache:
            for second in range(0, 61, 6):
                clock.ns = second * S
                assert await cache.get_many([A, B]) == [None, None]
                await cache.put_many({A: VECTOR})
            assert cache.figures() == CacheFigures("redis", hits=0, misses=22, failures=11)
            assert repr(cache) == "<RedisCache left alone, 0 hits, 22 misses, 11 failures>"
        assert len(said) == 2
        assert said[0].startswith("the result cache in Redis cannot be used (")
        assert said[0].endswith("): what it holds is computed again")

    asyncio.run(main())


def test_without_a_redis_nothing_waits() -> None:
    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"redis://:secret@127.0.0.1:{probe.getsockname()[1]}/0"
            said: list[str] = []
            cache = RedisCache(url, len(VECTOR), said.append, SetClock().now_ns)
            assert await asyncio.gather(*(cache.get_many([A]) for _ in range(300))) == [[None]] * 300
            await cache.close()
        assert len(said) == 1
        assert "secret" not in said[0]

    asyncio.run(main())


def test_a_crowd_does_not_queue_up_for_a_silent_redis() -> None:
    async def main() -> None:
        server = Impostor()
        async with cache_on(server, SetClock(), []) as cache:
            async with asyncio.timeout(20):
                await asyncio.gather(*(cache.get_many([A]) for _ in range(1000)))
            assert server.connections <= 8, "those under way when it was found out; nobody after them"

    asyncio.run(main())


def test_after_a_pause_one_request_tries_again() -> None:
    async def main() -> None:
        server, clock = Impostor(hangs_up=True), SetClock()
        async with cache_on(server, clock, []) as cache:
            tried = []
            for tenth in range(22):
                clock.ns = tenth * S // 10
                before = server.connections
                await asyncio.gather(cache.get_many([A]), cache.get_many([B])) if tenth else await cache.get_many([A])
                if server.connections > before:
                    tried.append(tenth)
            assert tried == [0, 10, 20]
            assert server.connections == 3

    asyncio.run(main())


def test_a_caller_may_leave_at_any_moment() -> None:
    async def main() -> None:
        async with cache_on(Impostor(), SetClock(), [], timeout_s=60.0) as cache:
            for turns in range(12):
                tasks = [asyncio.create_task(cache.get_many([A])) for _ in range(9)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                assert all(task.cancelled() for task in tasks)
            assert cache.figures() == CacheFigures("redis", hits=0, misses=0)

    asyncio.run(main())


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://:secret@127.0.0.1", "redis://:secret@127.0.0.1:port/0", ""])
def test_a_url_that_is_not_of_redis_is_an_error_of_use(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--redis: .*redis://127\.0\.0\.1:6379/0$") as caught:
        RedisCache(url, 4, print)
    assert "secret" not in str(caught.value)
