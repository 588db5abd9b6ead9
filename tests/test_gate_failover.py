"""Upstreams that refuse, break, are full, go away and come back: who is asked instead, and when nobody is."""

import asyncio
import ssl
from collections.abc import Callable

import pytest

import wire_servers
from gates import (
    ASK,
    REPLY,
    STREAM,
    Asked,
    Rig,
    Server,
    answering,
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
from loadstone.core.limits import Limits
from loadstone.hold.gate import GateOptions
from loadstone.hold.upstreams import Dialing
from servers import TLS

COMING_BACK = Limits(max_concurrency=11)


async def two(rig: Rig, servers: list[Server]) -> tuple[Asked, Server, Server]:
    """The request that was just made, where it is, and where it is not."""
    await until(lambda: any(server.running for server in servers))
    here, there = sorted(servers, key=lambda server: not server.running)
    return await here.next(), here, there


# -- elsewhere


@pytest.mark.parametrize("fails", [Asked.reset, Asked.hang_up], ids=["reset", "closed"])
def test_a_connection_that_breaks_before_the_reply_sends_the_request_elsewhere(fails: Callable[[Asked], None]) -> None:
    async def main() -> None:
        async with gate_before(None, None) as (rig, servers):
            client = await rig.asking()
            asked, here, there = await two(rig, servers)
            fails(asked)
            again = await there.next()
            assert again.request.body == asked.request.body == ASK
            assert again.header(b"x-request-id") == asked.header(b"x-request-id")
            again.answer()
            assert (await client.reply()).body == REPLY
            assert rig.upstream(here).up, "one broken reply proves nothing"
            await rig.ended(ok=1)

    run(main())


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateways_error_sends_the_request_elsewhere(status: int) -> None:
    async def main() -> None:
        async with gate_before(None, None) as (rig, servers):
            client = await rig.asking()
            asked, _here, there = await two(rig, servers)
            asked.answer(b"no", status)
            (await there.next()).answer()
            reply = await client.reply()
            assert (reply.status, reply.body) == (200, REPLY)
            assert "x-loadstone-reason" not in reply.headers
            await rig.ended(ok=1)

    run(main())


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_other_errors_are_the_answer(status: int) -> None:
    async def main() -> None:
        async with gate_before(answering(status, b"no"), answering(status, b"no")) as (rig, servers):
            assert (await rig.once()).body == b"no"
            assert sum(server.total for server in servers) == 1

    run(main())


def test_where_all_are_full_the_last_answer_counts() -> None:
    async def main() -> None:
        full = answering(503, b"full")
        async with gate_before(full, full, full, full) as (rig, servers):
            reply = await rig.once()
            assert (reply.status, reply.body) == (503, b"full")
            assert int(reply.headers["retry-after"]) >= 1
            assert sorted(server.total for server in servers) == [0, 1, 1, 1], "three attempts, no server twice"
            assert all(rig.upstream(server).up for server in servers), "busy is not broken"
            await rig.ended(upstream_error=1)

    run(main())


def test_nothing_is_tried_again_once_the_client_has_seen_a_byte() -> None:
    async def main() -> None:
        async with gate_before(None, None) as (rig, servers):
            client = await rig.asking(http(body=STREAM))
            asked, _here, there = await two(rig, servers)
            asked.stream()
            assert (await client.head()).status == 200
            asked.reset()
            [said] = events_of(await client.chunk())
            assert said["error"]["code"] == "upstream_error"
            assert there.total == 0
            await rig.ended(upstream_error=1)

    run(main())


def test_a_reply_that_breaks_within_its_head_is_not_asked_for_elsewhere() -> None:
    async def main() -> None:
        async with gate_before(None, None) as (rig, servers):
            client = await rig.asking()
            asked, _here, there = await two(rig, servers)
            asked.raw(b"HTTP/1.1 200 OK\r\nContent-")
            asked.hang_up()
            reply = await client.reply()
            assert (reply.status, reply.error["code"]) == (502, "upstream_error")
            assert there.total == 0, "it had been worked on"

    run(main())


def test_the_only_upstream_that_breaks_is_a_502() -> None:
    async def main() -> None:
        async with gate_before(Asked.reset) as (rig, [server]):
            reply = await rig.once()
            assert (reply.status, reply.error["code"]) == (502, "upstream_error")
            assert server.total == 1
            await rig.ended(upstream_error=1)

    run(main())


def test_a_failover_keeps_its_deadline() -> None:
    async def main() -> None:
        async with gate_before(None, None, limits=Limits(request_timeout_s=100)) as (rig, servers):
            client = await rig.asking()
            asked, _here, there = await two(rig, servers)
            rig.clock.jump(60)
            asked.reset()
            again = await there.next()
            rig.clock.jump(41)
            assert (await client.reply()).status == 504
            await asyncio.wait_for(again.left.wait(), 5)
            await rig.ended(request_timeout=1)

    run(main())


def test_a_failover_keeps_its_turn_and_the_place_it_had_is_free() -> None:
    async def main() -> None:
        async with gate_before(None, None, limits=Limits(max_concurrency=1, max_queue=5)) as (rig, servers):
            clients = [await rig.asking(), await rig.asking()]
            asked = [await server.next() for server in servers]
            clients += await rig.waiting(1, http(path="/v1/waits"))
            asked[0].reset()
            follower = await servers[0].next()
            assert follower.request.path == "/v1/waits", "the place that broke is free for those who may use it"
            clients += await rig.waiting(1, http(path="/v1/later"))
            asked[1].answer()
            moved = await servers[1].next()
            assert moved.header(b"x-request-id") == asked[0].header(b"x-request-id")
            moved.answer()
            follower.answer()
            await until(lambda: any(server.running for server in servers))
            for server in servers:
                for last in tuple(server.running):
                    assert last.request.path == "/v1/later"
                    last.answer()
            assert [(await client.reply()).status for client in clients] == [200] * 4
            assert [server.most for server in servers] == [1, 1]
            await rig.ended(ok=4)

    run(main())


def test_a_client_may_leave_while_its_request_waits_to_go_elsewhere() -> None:
    async def main() -> None:
        async with gate_before(None, None, limits=Limits(max_concurrency=1, max_queue=5)) as (rig, servers):
            client = await rig.asking()
            asked, _here, there = await two(rig, servers)
            await rig.asking()
            other = await there.next()
            asked.reset()
            await until(lambda: rig.queued == 1)
            client.close()
            await until(lambda: rig.queued == 0)
            other.answer()
            await rig.ended(ok=1, client_gone=1)

    run(main())


# -- down and up


def test_the_first_refused_connection_marks_an_upstream_down() -> None:
    async def main() -> None:
        async with gate_before(answers, answers) as (rig, [dead, alive]):
            for server in (dead, alive):
                await rig.probe(server)
            await dead.stop()
            for _ in range(10):
                assert (await rig.once()).status == 200
            down = rig.upstream(dead)
            assert (down.up, down.state) == (False, "down")
            assert f"127.0.0.1:{dead.port} refused the connection" in down.reason
            assert alive.total == 10
            assert (await rig.once(http("GET", "/health", b""))).status == 200
            await rig.ended(ok=10)

    run(main())


def test_a_dead_upstream_does_not_swallow_the_load() -> None:
    async def main() -> None:
        async with gate_before(answers, None, limits=Limits(max_concurrency=50)) as (rig, [dead, alive]):
            await dead.stop()
            clients = [await rig.asking() for _ in range(40)]
            await until(lambda: len(alive.running) == 40)
            assert rig.upstream(dead).in_flight == 0
            while alive.running:
                (await alive.next()).answer()
            assert {(await client.reply()).status for client in clients} == {200}
            await rig.ended(ok=40)

    run(main())


def test_it_returns_by_a_probe_and_slowly() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=COMING_BACK) as (rig, [server]):
            await server.stop()
            reply = await rig.once()
            assert (reply.status, reply.error["code"]) == (503, "no_upstream")
            assert int(reply.headers["retry-after"]) >= 1
            await server.start()
            assert (await rig.once()).status == 503, "only a probe brings it back"
            assert server.total == 0
            await rig.probe(server)
            assert (rig.upstream(server).up, rig.upstream(server).limit) == (True, 1)
            for elapsed_s, limit in ((5, 6), (5.1, 11)):
                rig.clock.jump(elapsed_s)
                assert (await rig.once()).status == 200
                assert rig.upstream(server).limit == limit
            await rig.ended(no_upstream=2, ok=2)

    run(main())


def test_an_upstream_that_calls_itself_unhealthy_gets_nothing_new() -> None:
    async def main() -> None:
        async with gate_before(None, None) as (rig, servers):
            client = await rig.asking()
            asked, here, there = await two(rig, servers)
            here.healthy = False
            await rig.probe(here)
            assert rig.upstream(here).reason == "GET /health answers 503"
            there.behave = answers
            assert [(await rig.once()).status for _ in range(5)] == [200] * 5
            assert here.total == 1
            asked.answer()
            assert (await client.reply()).status == 200, "what ran there runs on"
            here.healthy = True
            await rig.probe(here)
            assert rig.upstream(here).up
            await rig.ended(ok=6)

    run(main())


def test_when_the_last_one_goes_down_those_that_wait_learn_it_at_once() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_concurrency=1, max_queue=5)) as (rig, [server]):
            first = await rig.asking()
            asked = await server.next()
            waiting = await rig.waiting(2)
            server.healthy = False
            await rig.probe(server)
            for client in waiting:
                reply = await client.reply()
                assert (reply.status, reply.error["code"]) == (503, "no_upstream")
                assert int(reply.headers["retry-after"]) >= 1
            health = await rig.once(http("GET", "/health", b""))
            assert (health.status, health.document["status"]) == (503, "no upstream is up")
            asked.answer()
            assert (await first.reply()).status == 200
            await rig.ended(ok=1, no_upstream=2)

    run(main())


def test_where_none_is_up_nothing_waits_for_one() -> None:
    async def main() -> None:
        async with gate_before(answers, answers, limits=Limits(max_concurrency=1, max_queue=5)) as (rig, servers):
            for server in servers:
                await server.stop()
            first, *others = [await rig.once() for _ in range(4)]
            assert (first.status, first.error["code"]) == (503, "no_upstream")
            assert "refused the connection" in first.error["message"]
            assert {(other.status, other.error["code"]) for other in others} == {(503, "no_upstream")}
            assert not any(rig.upstream(server).up for server in servers)
            assert (await rig.once(http("GET", "/health", b""))).status == 503
            await rig.ended(no_upstream=4)

    run(main())


def test_replies_that_break_again_and_again_open_the_circuit() -> None:
    async def main() -> None:
        async with gate_before(Asked.reset) as (rig, [server]):
            for number in range(5):
                assert rig.upstream(server).state == "up", number
                assert (await rig.once()).status == 502
            assert (rig.upstream(server).state, rig.upstream(server).up) == ("open circuit", False)
            assert "5 broken replies in a row" in rig.upstream(server).reason
            assert (await rig.once()).error["code"] == "no_upstream"
            await rig.probe(server)
            assert rig.upstream(server).state == "open circuit", "not before it has cooled down"
            rig.clock.jump(2.1)
            await rig.probe(server)
            assert rig.upstream(server).state == "half open"
            assert (await rig.once()).status == 502
            rig.clock.jump(2.1)
            await rig.probe(server)
            assert rig.upstream(server).state == "open circuit", "twice as long"
            rig.clock.jump(2.1)
            await rig.probe(server)
            server.behave = answers
            assert (await rig.once()).status == 200
            assert rig.upstream(server).state == "up"
            await rig.ended(upstream_error=6, no_upstream=1, ok=1)

    run(main())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_are_answers_do_not_open_it(status: int) -> None:
    async def main() -> None:
        async with gate_before(answering(status)) as (rig, [server]):
            for _ in range(8):
                assert (await rig.once()).status == status
            assert rig.upstream(server).state == "up"

    run(main())


def test_a_good_reply_in_between_keeps_it_closed() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            for _ in range(3):
                for behave in (Asked.reset, Asked.reset, Asked.reset, Asked.reset, answers):
                    server.behave = behave
                    await rig.once()
            assert rig.upstream(server).state == "up"
            await rig.ended(upstream_error=12, ok=3)

    run(main())


def test_a_server_that_restarts_between_two_requests_is_not_missed() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            client = await rig.client()
            for _ in range(3):
                assert (await client.post()).status == 200
                await server.stop()
                await server.start()
            assert (await client.post()).status == 200
            await rig.ended(ok=4)

    run(main())


# -- reloads


def test_an_upstream_that_is_removed_finishes_what_it_streams() -> None:
    async def main() -> None:
        async with serving(None, answers) as [old, new], gated(old) as rig:
            client = await rig.asking(http(body=STREAM))
            asked = await old.next()
            asked.stream()
            asked.say(event("a"))
            await client.head()
            rig.gate.apply(enforced([new], Limits()))
            assert (await rig.once()).status == 200
            assert [it.name for it in rig.gate.now().upstreams] == [new.url]
            assert rig.in_flight == 1
            asked.say(event("b"))
            asked.end(event("c"))
            assert await client.chunk() + await client.chunk() + await client.chunk() == event("a") + event(
                "b"
            ) + event("c")
            await rig.ended(ok=2)
            assert (old.total, new.total) == (1, 1)
            await until(lambda: old.connections == 0)

    run(main())


def test_an_upstream_that_is_removed_may_still_break() -> None:
    async def main() -> None:
        async with serving(None, answers) as [old, new], gated(old) as rig:
            streaming = await rig.asking(http(body=STREAM))
            asked = await old.next()
            asked.stream()
            fresh = await rig.asking()
            waiting = await old.next()
            rig.gate.apply(enforced([new], Limits()))
            asked.reset()
            await streaming.head()
            [said] = events_of(await streaming.chunk())
            assert said["error"]["code"] == "upstream_error"
            waiting.reset()
            assert (await fresh.reply()).status == 200, "nothing had come: the new one answers"
            await rig.ended(ok=1, upstream_error=1)

    run(main())


def test_an_upstream_that_returns_begins_anew() -> None:
    async def main() -> None:
        async with serving(answers, answers) as [leaves, stays], gated(leaves, stays) as rig:
            await leaves.stop()
            await rig.probe(leaves)
            assert not rig.upstream(leaves).up
            rig.gate.apply(enforced([stays], Limits()))
            rig.gate.apply(enforced([leaves, stays], Limits()))
            assert [(await rig.once()).status for _ in range(6)] == [200] * 6
            assert not rig.upstream(leaves).up
            assert not rig.gate.permits.admission.is_up(leaves.url), "it is not asked first again and again"
            assert stays.total == 6
            await leaves.start()
            await rig.probe(leaves)
            rig.gate.apply(enforced([leaves], Limits()))
            for _ in range(5):
                assert (await rig.once()).status == 200
            assert rig.gate.upstreams[leaves.url].pool.idle == 1, "its connections are kept again"
            await rig.ended(ok=11)

    run(main())


# -- TLS


def test_an_upstream_may_speak_tls() -> None:
    serve, trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=TLS / "server.crt")
    serve.load_cert_chain(TLS / "server.crt", TLS / "server.key")

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                await reader.readexactly(len(ASK))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(REPLY), REPLY))

    async def main() -> None:
        async with wire_servers.serving(script, serve) as port:
            plan = Server()
            plan.port, plan.scheme = port, "https"
            async with gated(plan, options=GateOptions(dialing=Dialing(tls=trust))) as rig:
                assert [(await rig.once()).body for _ in range(3)] == [REPLY] * 3
                await rig.ended(ok=3)
            async with gated(plan) as rig:
                reply = await rig.once()
                assert (reply.status, reply.error["code"]) == (503, "no_upstream")
                assert "certificate" in rig.upstream(plan).reason

    run(main())
