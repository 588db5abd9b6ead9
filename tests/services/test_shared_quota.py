"""Shared quotas against a real redis-server: several gates, one count."""

import asyncio
import random
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio

from loadstone.core.quota import Exceeded, Quotas, QuotaSettings, Reservation
from loadstone.hold.shared_quota import SharedQuotas
from set_clock import SetClock

S = 1_000_000_000
SETTINGS = QuotaSettings(10, 100, 1000)

_AGE = """
for _, key in ipairs(redis.call('KEYS', 'loadstone:*')) do
  if redis.call('TYPE', key).ok == 'zset' then
    for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      redis.call('ZINCRBY', key, -tonumber(ARGV[1]), id)
    end
  end
end
"""
"""Everything is that many microseconds older: passes time without waiting for it."""


class Server:
    """A redis-server of its own on a Unix socket, without persistence."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program = program
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.start()

    def start(self) -> None:
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen([self.program, *arguments], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "eady to accept connections" in line:
                return
        raise AssertionError(f"redis-server ended with status {self.process.wait()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = shutil.which("redis-server")
    assert program, "redis-server is not on PATH: install it (apt-get install redis-server)"
    server = Server(program, tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


class Gates:
    """Several gates on one empty Redis."""

    def __init__(self, server: Server, settings: QuotaSettings, number: int) -> None:
        self.said: list[str] = []
        self.clock = SetClock()
        self.all = [SharedQuotas(server.url, settings, self.clock, self.said.append, 5.0) for _ in range(number)]
        self.redis = redis.asyncio.Redis.from_url(server.url)

    async def age(self, seconds: float) -> None:
        await self.redis.eval(_AGE, 0, str(round(seconds * 1e6)))  # type: ignore[misc]

    async def close(self) -> None:
        await self.redis.aclose()
        for gate in self.all:
            await gate.close()


def with_gates(
    server: Server, talk: Callable[[Gates], Awaitable[None]], settings: QuotaSettings = SETTINGS, number: int = 2
) -> None:
    async def main() -> None:
        gates = Gates(server, settings, number)
        await gates.redis.flushall()
        await gates.redis.script_flush()
        try:
            async with asyncio.timeout(30):
                await talk(gates)
            assert gates.said == []
        finally:
            await gates.close()

    asyncio.run(main())


def granted(results: list[Reservation | Exceeded]) -> list[Reservation]:
    return [result for result in results if isinstance(result, Reservation)]


def test_four_gates_together_let_exactly_the_quota_through(server: Server) -> None:
    async def talk(gates: Gates) -> None:
        results = await asyncio.gather(*(gates.all[i % 4].reserve("ab", 10) for i in range(100)))
        assert len(granted(results)) == 10
        refusal = next(result for result in results if isinstance(result, Exceeded))
        assert (refusal.window, refusal.what, refusal.limit, refusal.never) == ("minute", "requests", 10, False)
        assert 50 < refusal.retry_after_s <= 60
        assert isinstance(await gates.all[0].reserve("somebody else", 10), Reservation)

    with_gates(server, talk, number=4)


def test_a_place_comes_free_when_the_oldest_leaves_its_window(server: Server) -> None:
    async def talk(gates: Gates) -> None:
        one, other = gates.all
        for _ in range(9):
            await one.reserve("a", 1)
        await gates.age(30)
        await one.reserve("a", 1)
        await gates.age(29)
        refusal = await other.reserve("a", 1)
        assert isinstance(refusal, Exceeded)
        assert 0 < refusal.retry_after_s <= 1
        await gates.age(1)
        assert [standing.remaining for standing in await other.standings("a")] == [9, 90, 999]
        for _ in range(9):
            assert isinstance(await other.reserve("a", 1), Reservation)
        refusal = await one.reserve("a", 1)
        assert isinstance(refusal, Exceeded)
        assert 25 < refusal.retry_after_s <= 30

    with_gates(server, talk)


def test_a_refund_or_settlement_by_one_gate_is_seen_by_all_and_happens_once(server: Server) -> None:
    async def talk(gates: Gates) -> None:
        one, other = gates.all
        kept, refused = granted([await one.reserve("a", 300), await one.reserve("a", 400)])
        for _ in range(2):
            await one.refund(refused)
        await one.settle(refused, 5)
        assert [standing.remaining for standing in await other.standings("a")] == [9, 99, 700]
        await one.settle(kept, 900)
        await one.settle(kept, 1)
        await one.refund(kept)
        assert [standing.remaining for standing in await other.standings("a")] == [9, 99, 100]
        refusal = await other.reserve("a", 101)
        assert isinstance(refusal, Exceeded)
        assert refusal.what == "tokens"
        assert await other.reserve("a", 1001) == Exceeded("minute", "tokens", 1000, 60.0, never=True)

    with_gates(server, talk)


def test_what_has_left_its_window_is_not_given_back(server: Server) -> None:
    async def talk(gates: Gates) -> None:
        old = granted([await gates.all[0].reserve("a", 300) for _ in range(2)])
        await gates.age(61)
        await gates.all[0].reserve("a", 7)
        await gates.all[0].refund(old[0])
        await gates.all[0].settle(old[1], 900)
        assert [standing.remaining for standing in await gates.all[1].standings("a")] == [9, 98, 993]

    with_gates(server, talk)


def test_keys_expire_by_themselves_and_none_is_left_without_a_time(server: Server) -> None:
    async def talk(gates: Gates) -> None:
        reservation, other = granted([await gates.all[0].reserve("a", 300), await gates.all[0].reserve("b", 300)])
        await gates.all[0].settle(reservation, 5)
        await gates.all[0].refund(other)
        await gates.all[0].standings("c")
        left_ms = {key.decode(): await gates.redis.pttl(key) for key in await gates.redis.keys()}
        assert left_ms.keys() >= {f"loadstone:quota:{{a}}:{part}" for part in ("minute", "hour", "tokens")}
        assert all(0 < ms <= (3_600_000 if key.endswith("hour") else 60_000) for key, ms in left_ms.items())
        # A reservation whose keys are gone creates no new ones.
        late = granted([await gates.all[0].reserve("d", 1) for _ in range(2)])
        await gates.redis.flushall()
        await gates.all[0].settle(late[0], 7)
        await gates.all[0].refund(late[1])
        assert await gates.redis.keys() == []

    with_gates(server, talk)


@pytest.mark.parametrize(
    "settings", [SETTINGS, QuotaSettings(requests_per_hour=5), QuotaSettings(tokens_per_minute=70)]
)
def test_it_decides_as_the_quotas_in_memory_do(server: Server, settings: QuotaSettings) -> None:
    async def talk(gates: Gates) -> None:
        chance = random.Random(1)
        memory, now_ns = Quotas(settings), 0
        pairs: list[tuple[Reservation, Reservation]] = []
        for _ in range(400):
            gate = chance.choice(gates.all)
            verb = chance.choice(["age", "reserve", "reserve", "reserve", "settle", "refund"])
            if verb == "age":
                # No sum of these is a window, so that the few seconds of the test itself make no difference.
                age_s = chance.choice([7, 7, 7, 700])
                now_ns += age_s * S
                await gates.age(age_s)
            elif verb == "reserve":
                tokens = chance.randint(1, 75)
                shared, own = await gate.reserve("a", tokens), memory.reserve("a", tokens, now_ns)
                assert type(shared) is type(own)
                if isinstance(shared, Reservation) and isinstance(own, Reservation):
                    pairs.append((shared, own))
                elif isinstance(shared, Exceeded) and isinstance(own, Exceeded):
                    assert (shared.window, shared.what, shared.limit) == (own.window, own.what, own.limit)
                    assert abs(shared.retry_after_s - own.retry_after_s) < 5
            elif pairs:
                shared, own = pairs.pop(chance.randrange(len(pairs)))
                if verb == "settle":
                    await gate.settle(shared, 40)
                    memory.settle(own, 40, now_ns)
                else:
                    await gate.refund(shared)
                    memory.refund(own, now_ns)
            ours = [(one.name, one.what, one.limit, one.remaining) for one in memory.standings("a", now_ns)]
            theirs = [(one.name, one.what, one.limit, one.remaining) for one in await gate.standings("a")]
            assert theirs == ours

    with_gates(server, talk, settings)


def test_a_redis_that_dies_and_returns_is_lived_without_meanwhile(tmp_path: Path, server: Server) -> None:
    async def main() -> None:
        mortal = Server(server.program, tmp_path)
        gates = Gates(mortal, SETTINGS, 1)
        gate = gates.all[0]
        shared = granted([await gate.reserve("a", 1) for _ in range(10)])
        assert isinstance(await gate.reserve("a", 1), Exceeded)
        mortal.stop()
        assert len(granted([await gate.reserve("a", 1) for _ in range(11)])) == 10
        await gate.refund(shared[0])
        await gate.settle(shared[1], 5)
        mortal.start()
        own = await gate.reserve("b", 1)
        assert repr(gate).startswith("<SharedQuotas by itself")
        gates.clock.ns += 2 * S
        assert isinstance(await gate.reserve("a", 1), Reservation)
        assert repr(gate).startswith("<SharedQuotas in Redis")
        assert isinstance(own, Reservation)
        await gate.refund(own)
        assert [one.remaining for one in await gate.standings("b")] == [10, 100, 1000]
        assert [line.partition(" (")[0] for line in gates.said] == [
            "Redis does not answer",
            "Redis answers again: quotas are shared between gates",
        ]
        await gates.close()
        mortal.stop()

    asyncio.run(main())
