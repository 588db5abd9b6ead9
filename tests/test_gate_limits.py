"""What is held back, for how long, in which order, and what is said to those that are refused."""

import asyncio
import socket
from contextlib import closing

import pytest

from gates import (
    ASK,
    CHAT,
    EVENTS,
    JSON,
    REPLY,
    STREAM,
    Client,
    Rig,
    Server,
    answers,
    enforced,
    event,
    events_of,
    gate_before,
    gated,
    http,
    run,
    serving,
    until,
)
from loadstone.core.limits import Limits, Upstream
from loadstone.hold.api_keys import ApiKey, ApiKeys
from loadstone.hold.gate import GateOptions
from loadstone.hold.upstreams import Dialing


def asks(tokens: int, size: int = 100, **more: object) -> bytes:
    """A request of ``size`` bytes, so a quarter as many prompt tokens, and so much output."""
    extra = "".join(f', "{key}": {value}' for key, value in more.items())
    start = f'{{"messages": [], "max_tokens": {tokens}{extra}, "x": "'.encode()
    return start + b"x" * (size - len(start) - 2) + b'"}'


async def ends_with(client: Client, status: int, code: str) -> dict[str, str]:
    """The refusal that this client gets; returns its headers."""
    reply = await client.reply()
    assert (reply.status, reply.error["code"]) == (status, code)
    assert reply.headers["x-loadstone-reason"] in (code, "expected_wait")
    return reply.headers


# -- how many


def test_never_more_streams_at_once_than_the_limit_however_long_they_last() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=3, max_queue=17)) as (rig, [server]):
            clients = {f"/v1/{number}": await rig.asking(http(path=f"/v1/{number}")) for number in range(20)}
            await until(lambda: rig.queued == 17 and len(server.running) == 3)
            assert rig.in_flight == 3
            rig.clock.jump(7200)
            assert (await rig.once()).error["code"] == "queue_full"
            for number in range(20):
                asked = await server.next()
                client = clients[asked.request.path]
                asked.stream()
                asked.say(event("a"))
                assert rig.in_flight == min(3, 20 - number)
                if number % 3 == 0:
                    client.reset()
                    await asked.left.wait()
                elif number % 3 == 1:
                    asked.reset()
                else:
                    asked.end()
            await rig.ended(ok=6, client_gone=7, upstream_error=7, queue_full=1)
            assert server.most == 3

    run(main())


def test_a_place_is_free_when_the_last_byte_has_been_read_not_when_the_client_has_it() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=1)) as (rig, [server]):
            first = await rig.asking(http(body=STREAM))
            [second] = await rig.waiting(1)
            asked = await server.next()
            asked.stream()
            asked.end(event("all"))
            follower = await server.next()
            assert not asked.left.is_set()
            follower.answer()
            assert (await second.reply()).status == 200
            assert (await first.reply()).body == event("all")
            await rig.ended(ok=2)
            assert server.most == 1

    run(main())


def test_without_a_bound_nothing_waits() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits()) as (rig, [server]):
            clients = [await rig.asking() for _ in range(100)]
            await until(lambda: len(server.running) == 100)
            stats = await rig.stats()
            assert (stats["in_flight"], stats["queued"], stats["capacity"]) == (100, 0, None)
            while server.running:
                (await server.next()).answer()
            assert {(await client.reply()).status for client in clients} == {200}
            await rig.ended(ok=100)

    run(main())


def test_a_new_limit_is_in_force_at_once_and_drops_nothing() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=9)) as (rig, [server]):
            clients = [await rig.asking()]
            clients += await rig.waiting(5)
            rig.gate.apply(enforced([server], Limits(max_concurrency=4, max_queue=9)))
            await until(lambda: len(server.running) == 4)
            assert (rig.in_flight, rig.queued) == (4, 2)
            rig.gate.apply(enforced([server], Limits(max_concurrency=2, max_queue=0)))
            assert (rig.in_flight, rig.queued) == (4, 2)
            assert (await rig.once()).error["code"] == "queue_full"
            for left in (4, 3):
                (await server.next()).answer()
                await until(lambda left=left: rig.in_flight == left - 1)
            assert rig.queued == 2
            for _ in range(4):
                (await server.next()).answer()
            assert {(await client.reply()).status for client in clients} == {200}
            await rig.ended(ok=6, queue_full=1)

    run(main())


# -- the queue


def test_the_queue_is_served_in_order() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=5)) as (rig, [server]):
            await rig.asking()
            for number in range(5):
                await rig.waiting(1, http(path=f"/v1/x/{number}"))
            order = []
            for _ in range(6):
                asked = await server.next()
                order.append(asked.request.path)
                asked.answer()
            assert order == [CHAT, *(f"/v1/x/{number}" for number in range(5))]
            await rig.ended(ok=6)

    run(main())


def test_clients_take_turns_however_many_requests_one_of_them_has_waiting() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=20)) as (rig, [server]):
            await rig.asking()
            for number in range(4):
                await rig.waiting(1, http(path=f"/v1/greedy/{number}"))
            for number in range(2):
                await rig.waiting(1, http(path=f"/v1/modest/{number}"), "127.0.0.2")
            order = []
            for _ in range(7):
                asked = await server.next()
                order.append(asked.request.path)
                asked.answer()
            assert order[0] == CHAT
            assert set(order[1:5]) > {"/v1/modest/0", "/v1/modest/1"}, order
            assert [path for path in order if "greedy" in path] == [f"/v1/greedy/{n}" for n in range(4)]

    run(main())


def test_turns_are_counted_in_tokens_and_not_in_requests() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=40)) as (rig, [server]):
            await rig.asking(http(path="/v1/first"))
            await rig.waiting(4, http(body=asks(975)))
            await rig.waiting(8, http(body=asks(75)), "127.0.0.2")
            sizes = []
            (await server.next()).answer()
            for _ in range(12):
                asked = await server.next()
                sizes.append(asked.document["max_tokens"])
                asked.answer(b'{"choices": []}')
            assert sizes.index(975, sizes.index(975) + 1) > 7, "of 1,000 tokens for one the other gets ten times 100"
            assert (sizes.count(975), sizes.count(75)) == (4, 8)

    run(main())


def test_a_key_of_higher_priority_goes_first() -> None:
    keys = ApiKeys([ApiKey(b"low", "low"), ApiKey(b"high", "high", 5)])

    def asking(key: bytes) -> bytes:
        return http(path=f"/v1/{key.decode()}", headers=[JSON, (b"authorization", b"Bearer " + key)])

    async def main() -> None:
        limits = Limits(max_concurrency=1, max_queue=5)
        async with gate_before(None, limits=limits, options=GateOptions(api_keys=keys)) as (rig, [server]):
            await rig.asking(asking(b"low"))
            await rig.waiting(1, asking(b"low"))
            await rig.waiting(1, asking(b"high"))
            (await server.next()).answer()
            asked = await server.next()
            assert asked.request.path == "/v1/high"
            asked.answer()

    run(main())


def test_a_full_queue_says_so_at_once_in_both_languages_and_when_to_come_back() -> None:
    limits = Limits(max_concurrency=1, max_queue=1, queue_timeout_s=7, request_timeout_s=120)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            await rig.asking()
            await server.next()
            await rig.waiting(1)
            client = await rig.client()
            for _ in range(3):
                reply = await client.post()
                assert reply.status == 503
                assert reply.headers["retry-after"] == "7"
                assert reply.headers["x-loadstone-reason"] == "queue_full"
                assert reply.error["type"] == "server_error"
                assert reply.error["code"] == "queue_full"
                assert reply.error["message"].startswith("服务繁忙 / service busy")
            assert (await rig.outcomes()) == {"queue_full": 3}

    run(main())


def test_who_has_waited_long_enough_is_told() -> None:
    limits = Limits(max_concurrency=1, max_queue=5, queue_timeout_s=30, request_timeout_s=120)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            first = await rig.asking()
            asked = await server.next()
            [waits] = await rig.waiting(1)
            rig.clock.jump(29)
            [later] = await rig.waiting(1)
            assert rig.queued == 2
            rig.clock.jump(1.1)
            headers = await ends_with(waits, 503, "queue_timeout")
            assert int(headers["retry-after"]) >= 1
            assert rig.queued == 1
            asked.answer()
            (await server.next()).answer()
            assert (await later.reply()).status == (await first.reply()).status == 200
            await rig.ended(ok=2, queue_timeout=1)

    run(main())


def test_nobody_waits_who_would_not_be_served_in_time() -> None:
    limits = Limits(max_concurrency=1, max_queue=50, queue_timeout_s=25)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            client = await rig.client()
            for _ in range(20):
                client.send(http())
                asked = await server.next()
                rig.clock.jump(10)
                asked.answer()
                assert (await client.reply()).status == 200
            await rig.asking()
            await server.next()
            await rig.waiting(2)
            refused = await rig.asking()
            headers = await ends_with(refused, 503, "queue_timeout")
            assert headers["x-loadstone-reason"] == "expected_wait"
            assert 20 <= int(headers["retry-after"]) <= 31
            assert (await rig.outcomes()) == {"ok": 20, "expected_wait": 1}

    run(main())


def test_who_waits_is_dropped_once_the_time_left_is_less_than_a_service_takes() -> None:
    limits = Limits(max_concurrency=1, max_queue=50, request_timeout_s=60)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            client = await rig.client()
            for _ in range(20):
                client.send(http())
                asked = await server.next()
                rig.clock.jump(20)
                asked.answer()
                assert (await client.reply()).status == 200
            await rig.asking()
            asked = await server.next()
            rig.clock.jump(5)
            [waits] = await rig.waiting(1)
            rig.clock.jump(39)
            assert rig.queued == 1
            rig.clock.jump(1.5)
            await ends_with(waits, 503, "queue_timeout")
            assert await rig.outcomes() == {"ok": 20, "queue_timeout": 1}
            asked.answer()

    run(main())


# -- one deadline


def test_one_deadline_covers_the_queue_and_the_generation() -> None:
    limits = Limits(max_concurrency=1, max_queue=5, request_timeout_s=120)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            await rig.asking()
            asked = await server.next()
            [waits] = await rig.waiting(1)
            rig.clock.jump(100)
            asked.answer()
            asked = await server.next()
            rig.clock.jump(19)
            assert rig.in_flight == 1
            rig.clock.jump(1.1)
            await ends_with(waits, 504, "request_timeout")
            await asyncio.wait_for(asked.left.wait(), 5)
            await rig.ended(ok=1, request_timeout=1)

    run(main())


def test_the_deadline_ends_a_wait() -> None:
    limits = Limits(max_concurrency=1, max_queue=5, queue_timeout_s=500, request_timeout_s=120)

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            first = await rig.asking()
            asked = await server.next()
            rig.clock.jump(1)
            [waits] = await rig.waiting(1)
            rig.clock.jump(119.5)
            await ends_with(first, 504, "request_timeout")
            await asyncio.wait_for(asked.left.wait(), 5)
            await server.next()
            rig.clock.jump(1)
            await ends_with(waits, 504, "request_timeout")
            assert rig.in_flight == 0

    run(main())


def test_the_deadline_ends_a_stream_with_an_event_and_a_document_without() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(request_timeout_s=60)) as (rig, [server]):
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            asked.say(event("Hel"))
            other = await rig.asking()
            second = await server.next()
            second.response.start(200, [JSON], 100)
            second.say(b"[")
            await client.head()
            await other.head()
            assert await client.chunk() == event("Hel")
            rig.clock.jump(61)
            [said] = events_of(await client.chunk())
            assert said["error"]["code"] == "request_timeout"
            assert await client.rest() == b""
            assert await other.rest() == b"["
            await asked.left.wait()
            await second.left.wait()
            await rig.ended(request_timeout=2)

    run(main())


def test_the_deadline_ends_a_connection_that_does_not_come_about() -> None:
    with closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]

        async def main() -> None:
            with closing(socket.create_connection(("127.0.0.1", port))):
                server = Server(answers)
                server.port = port
                options = GateOptions(dialing=Dialing(connect_timeout_s=60))
                async with gated(
                    server, limits=Limits(max_concurrency=1, request_timeout_s=60), options=options
                ) as rig:
                    client = await rig.asking()
                    await until(lambda: rig.in_flight == 1)
                    rig.clock.jump(61)
                    await ends_with(client, 504, "request_timeout")
                    await rig.ended(request_timeout=1)

        run(main())


def test_a_request_without_a_byte_shows_until_its_deadline() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=2, request_timeout_s=100)) as (rig, [server]):
            assert (await rig.stats())["oldest_in_flight_s"] is None
            stuck = await rig.asking()
            await server.next()
            rig.clock.jump(40)
            await rig.asking()
            asked = await server.next()
            rig.clock.jump(40)
            assert (await rig.stats())["oldest_in_flight_s"] == pytest.approx(80, abs=2)
            rig.clock.jump(21)
            await ends_with(stuck, 504, "request_timeout")
            assert (await rig.stats())["oldest_in_flight_s"] == pytest.approx(61, abs=2)
            asked.answer()
            await rig.ended(ok=1, request_timeout=1)

    run(main())


# -- tokens


def test_what_could_never_fit_is_refused_at_once() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=Limits(max_queue=5, max_tokens_in_flight=200)) as (rig, [server]):
            await ends_with(await rig.asking(http(body=asks(176))), 400, "over_budget")
            await ends_with(await rig.asking(http(body=asks(60, n=3))), 400, "over_budget")
            assert (await rig.once(http(body=asks(175)))).status == 200
            assert server.total == 1
            await rig.ended(over_budget=2, ok=1)

    run(main())


def test_a_token_budget_holds_back_what_does_not_fit_yet() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_queue=5, max_tokens_in_flight=200)) as (rig, [server]):
            await rig.asking(http(body=asks(75)))
            first = await server.next()
            await rig.asking(http(body=asks(60)))
            second = await server.next()
            await rig.waiting(1, http(body=asks(50)))
            second.answer(REPLY)
            third = await server.next()
            assert rig.queued == 0
            assert rig.gate.permits.admission.tokens_at(server.url) == 175
            first.answer()
            third.answer()
            await rig.ended(ok=3)
            assert rig.gate.permits.admission.tokens_at(server.url) == 0

    run(main())


# -- several upstreams


def test_each_upstream_has_its_own_limit() -> None:
    async def main() -> None:
        async with serving(None, None) as servers:
            own = [Upstream(servers[0].url, max_concurrency=1), Upstream(servers[1].url, max_concurrency=4)]
            async with gated(limits=Limits(max_concurrency=9, max_queue=5), own=own) as rig:
                assert (await rig.stats())["capacity"] == 5
                [await rig.asking() for _ in range(8)]
                await until(lambda: rig.queued == 3 and [server.most for server in servers] == [1, 4])
                while rig.gate.in_flight:
                    for server in servers:
                        for asked in tuple(server.running):
                            asked.answer()
                    await asyncio.sleep(0)
                assert [server.most for server in servers] == [1, 4]
                await rig.ended(ok=8)

    run(main())


def test_weights_divide_the_load() -> None:
    async def main() -> None:
        async with serving(None, None) as servers:
            own = [Upstream(servers[0].url, weight=1.0), Upstream(servers[1].url, weight=3.0)]
            async with gated(limits=Limits(), own=own) as rig:
                for number in range(40):
                    await rig.asking()
                    await until(lambda number=number: rig.in_flight == number + 1)
                await until(lambda: sum(server.total for server in servers) == 40)
                assert [server.total for server in servers] == [10, 30]

    run(main())


def test_requests_spread_over_equal_upstreams() -> None:
    async def main() -> None:
        async with gate_before(None, None, None, limits=Limits(max_concurrency=5)) as (rig, servers):
            for number in range(9):
                await rig.asking()
                await until(lambda number=number: rig.in_flight == number + 1)
            await until(lambda: sum(server.total for server in servers) == 9)
            assert [server.total for server in servers] == [3, 3, 3]

    run(main())


def test_affinity_keeps_a_prefix_at_one_upstream_while_it_has_room() -> None:
    def asking(number: int) -> bytes:
        return http(body=b'{"messages": [{"role": "system", "content": "prefix %d"}], "max_tokens": 5}' % number)

    async def main() -> None:
        options = GateOptions(affinity=True)
        async with gate_before(answers, answers, answers, limits=Limits(max_concurrency=2), options=options) as (
            rig,
            servers,
        ):
            used = []
            for number in range(12):
                before = [server.total for server in servers]
                for _ in range(5):
                    assert (await rig.once(asking(number))).status == 200
                grown = [server.total - count for server, count in zip(servers, before, strict=True)]
                assert sorted(grown) == [0, 0, 5]
                used.append(grown.index(5))
            assert len(set(used)) > 1, "different prefixes go to different places"

    run(main())


# -- what is not held back


def test_models_are_listed_while_every_place_is_taken() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=0)) as (rig, [server]):
            await rig.asking(http(body=STREAM))
            await server.next()
            client = await rig.asking(http("GET", "/v1/models", b""))
            (await server.next()).answer(b'{"data": []}', headers=[EVENTS])
            assert (await client.reply()).body == b'{"data": []}'
            assert (await rig.once(http("GET", "/v1/other", b""))).status == 503

    run(main())


async def _full(rig: Rig, server: Server) -> None:
    await rig.asking()
    await server.next()
    assert (await rig.once()).status == 503


def test_the_admin_key_lifts_every_limit_and_goes_no_further() -> None:
    async def main() -> None:
        limits = Limits(max_concurrency=1, max_queue=0, max_tokens_in_flight=100)
        async with gate_before(None, limits=limits, options=GateOptions(admin_key="sesame")) as (rig, [server]):
            await _full(rig, server)
            for header in ((b"x-loadstone-admin", b"sesame"), (b"authorization", b"Bearer sesame")):
                client = await rig.asking(http(body=asks(5000), headers=[JSON, header]))
                asked = await server.next()
                assert not [it for it in asked.request.headers if b"sesame" in it[1]]
                asked.answer()
                assert (await client.reply()).status == 200
            kept = [JSON, (b"x-loadstone-admin", b"sesame"), (b"authorization", b"Bearer engine")]
            client = await rig.asking(http(headers=kept))
            asked = await server.next()
            assert asked.header(b"authorization") == b"Bearer engine"
            asked.answer()
            await client.reply()
            for wrong in (b"sesam", b"", b"Sesame"):
                assert (await rig.once(http(headers=[JSON, (b"x-loadstone-admin", wrong)]))).status == 503

    run(main())


def test_an_open_gate_holds_nobody_back() -> None:
    async def main() -> None:
        options = GateOptions(unlimited=True)
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=0), options=options) as (rig, [server]):
            clients = [await rig.asking(http(body=ASK)) for _ in range(10)]
            await until(lambda: len(server.running) == 10)
            while server.running:
                (await server.next()).answer()
            replies = [await client.reply() for client in clients]
            assert {(reply.status, reply.headers["server"]) for reply in replies} == {(200, "loadstone-open")}

    run(main())
