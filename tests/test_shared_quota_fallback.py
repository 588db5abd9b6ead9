"""Shared quotas while Redis is away: the gate goes on by itself, says so once, and tries again ever less often."""

import asyncio
import socket

import pytest

from loadstone.core.errors import UsageError
from loadstone.core.quota import Exceeded, QuotaSettings, Reservation
from loadstone.hold.shared_quota import SharedQuotas
from set_clock import SetClock

S = 1_000_000_000


class Listener:
    """A server that counts who connects and hangs up at once: there, but not Redis."""

    def __init__(self) -> None:
        self.connections = 0

    async def on_client(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.close()

    async def start(self) -> tuple[asyncio.Server, str]:
        server = await asyncio.start_server(self.on_client, "127.0.0.1", 0)
        return server, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


class Silence(Listener):
    """A server that takes connections and never says a word."""

    async def on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await reader.read()
        writer.close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_redis_the_gate_holds_the_same_quotas_by_itself() -> None:
    async def main() -> None:
        said: list[str] = []
        settings = QuotaSettings(10, 100, 1000)
        quotas = SharedQuotas(f"redis://:secret@127.0.0.1:{closed_port()}/0", settings, SetClock(), said.append)
        results = await asyncio.gather(*(quotas.reserve("ab", 10) for _ in range(100)))
        granted = [result for result in results if isinstance(result, Reservation)]
        assert len(granted) == 10
        assert results[-1] == Exceeded("minute", "requests", 10, 60.0)
        assert (await quotas.reserve("ab", 1001)) == Exceeded("minute", "tokens", 1000, 60.0, never=True)
        await quotas.refund(granted[0])
        await quotas.settle(granted[1], 500)
        assert [standing.remaining for standing in await quotas.standings("ab")] == [1, 91, 420]
        quotas.configure(QuotaSettings(requests_per_minute=9))
        assert isinstance(await quotas.reserve("ab", 10), Exceeded)
        assert len(said) == 1
        assert said[0].startswith("Redis does not answer (")
        assert said[0].endswith("): this gate counts quotas by itself until it does")
        assert "secret" not in said[0]
        assert repr(quotas) == "<SharedQuotas by itself: <Quotas 9 requests/minute; 1 clients>>"
        await quotas.close()

    asyncio.run(main())


def test_a_crowd_does_not_queue_up_for_a_redis_that_is_silent() -> None:
    async def main() -> None:
        said: list[str] = []
        listener = Silence()
        server, url = await listener.start()
        quotas = SharedQuotas(url, QuotaSettings(requests_per_minute=300), SetClock(), said.append, timeout_s=0.05)
        async with asyncio.timeout(20):
            results = await asyncio.gather(*(quotas.reserve("a", 1) for _ in range(1000)))
        assert sum(isinstance(result, Reservation) for result in results) == 300
        assert listener.connections <= 8, "those under way when it was found out; nobody after them"
        assert len(said) == 1
        await quotas.close()
        server.close()
        await server.wait_closed()

    asyncio.run(main())


def test_redis_is_tried_again_by_one_request_at_a_time_and_ever_less_often() -> None:
    async def main() -> None:
        said: list[str] = []
        clock, listener = SetClock(), Listener()
        server, url = await listener.start()
        quotas = SharedQuotas(url, QuotaSettings(requests_per_minute=1000), clock, said.append)
        tried: list[int] = []
        for _ in range(140):
            before = listener.connections
            await asyncio.gather(*(quotas.reserve("a", 1) for _ in range(2)))
            if listener.connections > before:
                tried.append(clock.ns // S)
            assert listener.connections - before <= (1 if tried and clock.ns else 2)
            clock.ns += S
        assert tried == [0, 1, 3, 7, 15, 31, 61, 91, 121]
        assert len(said) == 1
        await quotas.close()
        server.close()
        await server.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://:secret@127.0.0.1", "redis://:secret@127.0.0.1:port/0", ""])
def test_a_url_that_is_not_of_redis_is_an_error_of_use(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--redis: .*redis://127\.0\.0\.1:6379/0$") as caught:
        SharedQuotas(url, QuotaSettings(), SetClock(), print)
    assert "secret" not in str(caught.value)
