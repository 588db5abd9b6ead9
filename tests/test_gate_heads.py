"""One head over and over: who asks, where to and under which limits is told anew for each request."""

import pytest

from gates import ASK, CHAT, JSON, REPLY, answering, answers, enforced, gate_before, http, run
from loadstone.core.limits import Limits, PerClient
from loadstone.hold.api_keys import ApiKey, ApiKeys
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.gate import GateOptions
from loadstone.hold.upstreams import Dialing
from test_gate_quotas import remaining

PROXY = "127.0.0.1"
HOP = [JSON, (b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", b"https")]


def test_the_same_head_from_elsewhere_is_another_client() -> None:
    limits = Limits(per_client=PerClient(requests_per_minute=10))

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            for left in (9, 8, 7):
                for address in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
                    client = await rig.asking(address=address)
                    asked = await server.next()
                    assert asked.header(b"x-forwarded-for") == address.encode()
                    asked.answer()
                    assert remaining(await client.reply()) == left

    run(main())


def test_the_same_head_is_believed_from_a_trusted_proxy_alone() -> None:
    async def main() -> None:
        options = GateOptions(trusted=TrustedProxies.parse([PROXY]))
        async with gate_before(None, options=options) as (rig, [server]):
            for address, chain, scheme in [
                (PROXY, b"203.0.113.7, 127.0.0.1", b"https"),
                ("127.0.0.2", b"127.0.0.2", b"http"),
            ] * 3:
                client = await rig.asking(http(headers=HOP), address)
                asked = await server.next()
                assert asked.header(b"x-forwarded-for") == chain
                assert asked.header(b"x-forwarded-proto") == scheme
                asked.answer()
                await client.reply()

    run(main())


def test_a_wrong_key_stays_wrong_and_a_right_one_hidden() -> None:
    async def main() -> None:
        options = GateOptions(
            api_keys=ApiKeys([ApiKey(b"alpha", "a")]), admin_key="chief", dialing=Dialing(drop_authorization=True)
        )
        async with gate_before(answers, options=options) as (rig, [server]):
            for _ in range(3):
                for key, status in ((b"alpha", 200), (b"alphb", 401), (b"chief", 200)):
                    shown = http(headers=[JSON, (b"authorization", b"Bearer " + key)])
                    assert (await rig.once(shown)).status == status
                assert (await rig.once(http("GET", "/stats", b"", [(b"x-loadstone-admin", b"chief")]))).status == 200
                assert (await rig.once(http("GET", "/stats", b""))).status == 401
            assert server.total == 6
            await rig.ended(ok=6, unauthorized=3)

    run(main())


def test_every_request_on_a_kept_connection_has_an_id_and_a_body_of_its_own() -> None:
    async def main() -> None:
        async with gate_before(None) as (rig, [server]):
            client, ids = await rig.client(), set()
            for number in range(5):
                body = ASK[:-1] + b', "seed": %d}' % number
                client.send(http(body=body))
                asked = await server.next()
                assert asked.request.body == body
                ids.add(asked.header(b"x-request-id"))
                asked.answer()
                assert (await client.reply()).headers["x-request-id"].encode() in ids
            assert len(ids) == 5

    run(main())


def test_other_limits_hold_for_a_head_that_is_known() -> None:
    async def main() -> None:
        async with gate_before(None, limits=Limits(max_output_tokens=100)) as (rig, servers):
            [server] = servers
            for most in (100, 3, 100):
                rig.gate.apply(enforced(servers, Limits(max_output_tokens=most)))
                client = await rig.asking()
                asked = await server.next()
                assert (b'"max_tokens":3' in asked.request.body) == (most == 3)
                asked.answer()
                await client.reply()

    run(main())


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_head_is_written_for_the_server_that_it_goes_to(method: str) -> None:
    body = ASK if method == "POST" else b""

    async def main() -> None:
        async with gate_before(None, None) as (rig, servers):
            for _ in range(2):
                clients = [await rig.asking(http(method, CHAT, body)) for _ in servers]
                for server in servers:
                    asked = await server.next()
                    assert asked.header(b"host") == b"127.0.0.1:%d" % server.port
                    assert (asked.request.method, asked.request.body) == (method, body)
                    asked.answer()
                for client in clients:
                    assert (await client.reply(bodyless=method == "HEAD")).status == 200

    run(main())


def test_replies_under_one_head_tell_the_rates_of_each_client() -> None:
    own = [JSON, (b"x-ratelimit-limit", b"7"), (b"server", b"engine"), (b"retry-after", b"3")]
    limits = Limits(per_client=PerClient(requests_per_minute=10))

    async def main() -> None:
        async with gate_before(answering(200, REPLY, own), limits=limits) as (rig, servers):
            for left in (9, 8):
                reply = await rig.once()
                assert (reply.headers["x-ratelimit-limit"], remaining(reply)) == ("10", left)
                assert (reply.headers["server"], reply.headers["retry-after"]) == ("loadstone", "3")
            rig.gate.apply(enforced(servers, Limits()))
            assert (await rig.once(http("POST", CHAT))).headers["x-ratelimit-limit"] == "7"

    run(main())
