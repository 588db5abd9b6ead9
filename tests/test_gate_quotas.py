"""Who may ask how often: exact counts, by address and by key, nothing for what was refused, and what is said of it."""

import asyncio
import math

import pytest

from gates import (
    ASK,
    CHAT,
    JSON,
    REPLY,
    STREAM,
    Asked,
    Reply,
    Rig,
    answering,
    answers,
    enforced,
    event,
    gate_before,
    http,
    run,
    until,
)
from loadstone.core.limits import Limits, PerClient
from loadstone.hold.api_keys import ApiKey, ApiKeys
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.configuration import CAUTIOUS
from loadstone.hold.gate import GateOptions
from loadstone.hold.upstreams import Dialing

TEN = Limits(per_client=PerClient(requests_per_minute=10))
KEYS = ApiKeys([ApiKey(b"alpha", "a"), ApiKey(b"beta", "b"), ApiKey(b"gamma", "a")])
BEHIND_A_PROXY = GateOptions(trusted=TrustedProxies.parse(["127.0.0.1"]))


def shows(key: bytes) -> bytes:
    return http(headers=[JSON, (b"authorization", b"Bearer " + key)])


def through(*hops: bytes) -> bytes:
    return http(headers=[JSON, *((b"x-forwarded-for", hop) for hop in hops)])


async def statuses(rig: Rig, count: int, data: bytes | None = None, address: str = "127.0.0.1") -> dict[int, int]:
    """How many of so many requests are answered how."""
    replies = [(await rig.once(data, address)).status for _ in range(count)]
    return {status: replies.count(status) for status in set(replies)}


def remaining(reply: Reply) -> int:
    return int(reply.headers["x-ratelimit-remaining"])


# -- exact counts


def test_of_a_hundred_requests_from_five_connections_exactly_ten_are_answered() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=CAUTIOUS) as (rig, [server]):
            left = iter(range(100))
            seen: list[int] = []

            async def connection() -> None:
                client = await rig.client()
                seen.extend([(await client.post()).status for _ in left])

            await asyncio.gather(*(connection() for _ in range(5)))
            assert (seen.count(200), seen.count(429)) == (10, 90)
            assert server.total == 10
            await rig.ended(ok=10, rate_limited=90)

    run(main())


def test_the_minute_slides_and_the_hour_bounds_it() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=CAUTIOUS) as (rig, _servers):
            for _ in range(10):
                assert await statuses(rig, 12) == {200: 10, 429: 2}
                rig.clock.jump(58)
                assert await statuses(rig, 1) == {429: 1}
                rig.clock.jump(3)
            reply = await rig.once()
            assert reply.status == 429
            assert "at most 100 requests per hour" in reply.error["message"]
            assert 2900 <= int(reply.headers["retry-after"]) <= 3600
            rig.clock.jump(int(reply.headers["retry-after"]))
            assert await statuses(rig, 12) == {200: 10, 429: 2}

    run(main())


def test_retry_after_is_when_a_place_in_the_window_comes_free() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN) as (rig, _servers):
            await statuses(rig, 1)
            rig.clock.jump(40)
            await statuses(rig, 9)
            reply = await rig.once()
            assert 15 <= int(reply.headers["retry-after"]) <= 20
            rig.clock.jump(int(reply.headers["retry-after"]))
            assert await statuses(rig, 3) == {200: 1, 429: 2}

    run(main())


def test_a_reload_changes_the_quota_and_keeps_the_counts() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN) as (rig, servers):
            await statuses(rig, 10)
            rig.gate.apply(enforced(servers, Limits(per_client=PerClient(requests_per_minute=12))))
            assert await statuses(rig, 5) == {200: 2, 429: 3}

    run(main())


# -- who asks


def test_each_address_has_its_own_quota() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN) as (rig, _servers):
            assert await statuses(rig, 12) == {200: 10, 429: 2}
            assert await statuses(rig, 12, address="127.0.0.2") == {200: 10, 429: 2}

    run(main())


@pytest.mark.parametrize("name", [b"x-forwarded-for", b"x-real-ip", b"forwarded", b"x-client-ip", b"true-client-ip"])
def test_a_client_cannot_choose_its_address(name: bytes) -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN) as (rig, _servers):
            seen = []
            for number in range(20):
                header = (name, b"for=10.0.0.%d" % number if name == b"forwarded" else b"10.0.0.%d" % number)
                seen.append((await rig.once(http(headers=[JSON, header]))).status)
            assert seen == [200] * 10 + [429] * 10

    run(main())


def test_behind_a_trusted_proxy_the_last_hop_it_names_is_the_client() -> None:
    async def main() -> None:
        async with gate_before(None, limits=TEN, options=BEHIND_A_PROXY) as (rig, [server]):
            client = await rig.asking(through(b"6.6.6.6, 203.0.113.7"))
            asked = await server.next()
            assert asked.header(b"x-forwarded-for") == b"6.6.6.6, 203.0.113.7, 127.0.0.1"
            asked.answer()
            assert (await client.reply()).status == 200
            server.behave = answers
            for number in range(9):
                assert (await rig.once(through(b"10.9.9.%d, 203.0.113.7" % number))).status == 200
            assert (await rig.once(through(b"198.51.100.1", b"203.0.113.7"))).status == 429
            assert await statuses(rig, 1, through(b"203.0.113.8")) == {200: 1}
            assert await statuses(rig, 11, through(b"203.0.113.7"), "127.0.0.2") == {200: 10, 429: 1}

    run(main())


def test_an_ipv6_client_is_its_whole_64() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN, options=BEHIND_A_PROXY) as (rig, _servers):
            seen = [(await rig.once(through(b"2001:db8:0:7::%x" % number))).status for number in range(1, 13)]
            assert seen == [200] * 10 + [429] * 2
            assert (await rig.once(through(b"2001:db8:0:8::1"))).status == 200
            clients = (await rig.stats())["clients"]["busiest"]
            assert {it["client"]: it["requests"] for it in clients} == {"2001:db8:0:7::/64": 12, "2001:db8:0:8::/64": 1}

    run(main())


def test_quotas_by_key_follow_the_key_and_not_the_address() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN, options=GateOptions(api_keys=KEYS)) as (rig, _servers):
            assert await statuses(rig, 6, shows(b"alpha")) == {200: 6}
            assert await statuses(rig, 6, shows(b"alpha"), "127.0.0.2") == {200: 4, 429: 2}
            assert await statuses(rig, 1, shows(b"gamma")) == {429: 1}, "two keys of one name are one client"
            assert await statuses(rig, 11, shows(b"beta")) == {200: 10, 429: 1}

    run(main())


def test_without_a_valid_key_nothing_is_relayed() -> None:
    async def main() -> None:
        options = GateOptions(api_keys=KEYS, dialing=Dialing(drop_authorization=True))
        async with gate_before(None, limits=TEN, options=options) as (rig, [server]):
            for wrong in (http(), shows(b"alph"), shows(b"alphaa"), shows(b""), http("GET", "/v1/models", b"")):
                client = await rig.asking(wrong)
                reply = await client.reply()
                assert (reply.status, reply.error["code"]) == (401, "unauthorized")
                assert reply.headers["www-authenticate"] == "Bearer"
                assert "x-ratelimit-limit" not in reply.headers
                assert await client.rest() == b"", "and the connection is closed"
            assert server.total == 0
            client = await rig.asking(http(headers=[JSON, (b"x-api-key", b"alpha")]))
            asked = await server.next()
            assert b"alpha" not in b"".join(value for _name, value in asked.request.headers), (
                "the key is the gate's own"
            )
            asked.answer()
            assert (await client.reply()).status == 200
            await rig.ended(unauthorized=5, ok=1)

    run(main())


# -- what is said


def test_both_families_of_headers_tell_the_standing_on_success_and_on_refusal() -> None:
    limits = Limits(per_client=PerClient(requests_per_minute=2, requests_per_hour=100, tokens_per_minute=1000))

    async def main() -> None:
        async with gate_before(answers, limits=limits) as (rig, _servers):
            first, _second, refused = [await rig.once() for _ in range(3)]
            assert first.headers["x-ratelimit-limit"] == "2"
            assert remaining(first) == 1
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            assert first.headers["x-ratelimit-limit-tokens"] == "1000"
            assert first.headers["x-ratelimit-remaining-tokens"] == "995", "settled from usage"
            assert first.headers["ratelimit-policy"] == '"minute";q=2;w=60, "hour";q=100;w=3600'
            assert first.headers["ratelimit"].startswith('"minute";r=1;t=')
            assert refused.status == 429
            assert (refused.error["code"], refused.error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            assert refused.headers["x-loadstone-reason"] == "rate_limited"
            assert remaining(refused) == 0
            assert refused.headers["ratelimit"].startswith('"minute";r=0;t=')
            assert 1 <= int(refused.headers["retry-after"]) <= 60

    run(main())


def test_what_a_server_says_of_quotas_gives_way_to_the_gates_and_else_passes() -> None:
    own = [JSON, (b"x-ratelimit-limit", b"7"), (b"x-ratelimit-remaining", b"6")]

    async def main() -> None:
        async with gate_before(answering(200, REPLY, own), limits=TEN) as (rig, servers):
            assert (await rig.once()).headers["x-ratelimit-limit"] == "10"
            rig.gate.apply(enforced(servers, Limits()))
            assert (await rig.once()).headers["x-ratelimit-limit"] == "7"

    run(main())


# -- what costs nothing


def test_what_is_refused_is_given_back() -> None:
    limits = Limits(
        max_concurrency=1,
        max_queue=1,
        queue_timeout_s=5,
        request_timeout_s=60,
        max_tokens_in_flight=1000,
        per_client=PerClient(requests_per_minute=10, tokens_per_minute=5000),
    )

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):

            async def spends_nothing(reply: Reply, status: int, left: int) -> None:
                assert (reply.status, remaining(reply)) == (status, left)
                [minute, tokens] = rig.gate.front.quotas.standings("127.0.0.1", rig.clock.now_ns())
                assert (minute.remaining, tokens.remaining > 4900) == (left, True)

            holds = await rig.asking(address="127.0.0.2")
            asked = await server.next()
            await spends_nothing(await rig.once(http(body=ASK.replace(b"5", b"2000"))), 400, 10)
            [waits] = await rig.waiting(1)
            await spends_nothing(await rig.once(), 503, 9)
            rig.clock.jump(5.1)
            await spends_nothing(await waits.reply(), 503, 10)
            [leaves] = await rig.waiting(1)
            leaves.close()
            await until(lambda: rig.queued == 0)
            asked.answer()
            await holds.reply()
            for status in (429, 500, 503):
                client = await rig.asking()
                (await server.next()).answer(b'{"error": {}}', status)
                await spends_nothing(await client.reply(), status, 10)
            server.behave = Asked.reset
            await spends_nothing(await rig.once(), 502, 10)
            server.behave = None
            client = await rig.asking()
            asked = await server.next()
            rig.clock.jump(61)
            await spends_nothing(await client.reply(), 504, 10)
            await asked.left.wait()
            await server.stop()
            await spends_nothing(await rig.once(), 503, 10)

    run(main())


def test_what_was_worked_on_is_paid_for() -> None:
    async def main() -> None:
        async with gate_before(None, limits=TEN) as (rig, [server]):

            def left() -> int:
                return rig.gate.front.quotas.standings("127.0.0.1", rig.clock.now_ns())[0].remaining

            client = await rig.asking()
            (await server.next()).answer(b'{"error": {}}', 400)
            assert remaining(await client.reply()) == 9, "the server has read it and says no"
            leaver = await rig.asking()
            asked = await server.next()
            leaver.close()
            await asked.left.wait()
            await until(lambda: rig.in_flight == 0)
            assert left() == 8, "else hanging up before the answer would lift every quota"
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            asked.say(event("a"))
            await client.head()
            asked.reset()
            await client.rest()
            assert left() == 7

    run(main())


def test_models_and_the_admin_cost_nothing() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=TEN, options=GateOptions(admin_key="sesame")) as (rig, _servers):
            assert await statuses(rig, 12, http("GET", "/v1/models", b"")) == {200: 12}
            admin = http(headers=[JSON, (b"x-loadstone-admin", b"sesame")])
            assert await statuses(rig, 12, admin) == {200: 12}
            assert await statuses(rig, 11) == {200: 10, 429: 1}
            assert await statuses(rig, 1, admin) == {200: 1}

    run(main())


# -- tokens


def tokens_left(rig: Rig) -> int:
    return rig.gate.front.quotas.standings("127.0.0.1", rig.clock.now_ns())[0].remaining


@pytest.mark.parametrize("usage", [True, False], ids=["usage is told", "events are counted"])
def test_tokens_are_reserved_first_and_settled_by_what_was_served(usage: bool) -> None:
    limits = Limits(max_output_tokens=50, per_client=PerClient(tokens_per_minute=200))
    body = STREAM.replace(b'"max_tokens": 5', b'"max_tokens": 50')
    reserved = math.ceil(len(body) / 4) + 50

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            client = await rig.asking(http(body=body))
            asked = await server.next()
            assert tokens_left(rig) == 200 - reserved
            asked.stream()
            for _ in range(7):
                asked.say(event("w"))
            if usage:
                asked.say(b'data: {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}\n\n')
            asked.end(b"data: [DONE]\n\n")
            await client.reply()
            assert tokens_left(rig) == 200 - (11 + 7 if usage else math.ceil(len(body) / 4) + 7)
            stats = await rig.stats()
            assert stats["output_tokens"] == 7

    run(main())


def test_a_token_quota_refuses_what_does_not_fit_and_says_when_or_never() -> None:
    async def main() -> None:
        limits = Limits(per_client=PerClient(tokens_per_minute=100))
        async with gate_before(None, limits=limits) as (rig, [server]):
            hopeless = await rig.once(http(body=ASK.replace(b'"max_tokens": 5', b'"max_tokens": 500')))
            assert (hopeless.status, hopeless.error["code"]) == (429, "rate_limit_exceeded")
            assert "at most 100 tokens per minute" in hopeless.error["message"]
            big = http(body=ASK.replace(b'"max_tokens": 5', b'"max_tokens": 60'))
            client = await rig.asking(big)
            asked = await server.next()
            assert (await rig.once(big)).status == 429
            asked.answer()
            assert (await client.reply()).headers["x-ratelimit-remaining-tokens"] == "95"
            client = await rig.asking(big)
            (await server.next()).answer()
            assert (await client.reply()).status == 200
            await rig.ended(ok=2, rate_limited=2)

    run(main())


def test_choices_are_counted_in_the_cost() -> None:
    async def main() -> None:
        limits = Limits(per_client=PerClient(tokens_per_minute=100))
        async with gate_before(None, limits=limits) as (rig, [server]):
            await rig.asking(http(body=ASK[:-1] + b', "n": 4}'))
            await server.next()
            assert tokens_left(rig) == 100 - math.ceil((len(ASK) + 8) / 4) - 20

    run(main())


def test_paths_that_generate_nothing_have_no_default_output() -> None:
    async def main() -> None:
        limits = Limits(max_output_tokens=50, default_output_tokens=20, per_client=PerClient(tokens_per_minute=100))
        async with gate_before(None, limits=limits) as (rig, [server]):
            await rig.asking(http(path="/v1/embeddings", body=b'{"input": "abcdef"}'))
            assert (await server.next()).request.body == b'{"input": "abcdef"}'
            assert tokens_left(rig) == 95
            await rig.asking(http("GET", CHAT, b""))
            await server.next()
            assert tokens_left(rig) == 95

    run(main())
