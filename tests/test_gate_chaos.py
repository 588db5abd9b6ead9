"""Everything at once: clients that leave, servers that break and die, limits that change, time that flies."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest

from gates import (
    ASK,
    JSON,
    STREAM,
    Asked,
    Client,
    Rig,
    Server,
    enforced,
    event,
    gated,
    http,
    run,
    serving,
    until,
)
from loadstone.core.limits import Limits, PerClient
from loadstone.hold.gate import GateOptions

WORKERS, EACH = 25, 40
SEEN = {"whole": "ok"} | {
    reason: reason for reason in ("queue_full", "queue_timeout", "request_timeout", "upstream_error", "bad_request")
}
"""What clients see, and as what the gate counts it."""
DONE = b"data: [DONE]\n\n"
LIMITS = (
    Limits(max_concurrency=4, max_queue=25, queue_timeout_s=20, request_timeout_s=60),
    Limits(max_concurrency=5, max_queue=20, request_timeout_s=30, max_tokens_in_flight=300),
    Limits(max_concurrency=6, max_queue=0, request_timeout_s=90, per_client=PerClient(requests_per_minute=200)),
    Limits(
        max_concurrency=20,
        max_queue=5,
        queue_timeout_s=5,
        request_timeout_s=45,
        per_client=PerClient(tokens_per_minute=5000),
    ),
)


# -- servers


def answers(asked: Asked, dice: random.Random) -> None:
    asked.answer()


def streams(asked: Asked, dice: random.Random, ends: Callable[[Asked], None] = lambda asked: asked.end(DONE)) -> None:
    asked.stream()
    left = dice.randint(1, 20)

    def more() -> None:
        nonlocal left
        if asked.left.is_set():
            return
        if left == 0:
            ends(asked)
            return
        left -= 1
        asked.say(event("word"))
        asyncio.get_running_loop().call_soon(more)

    more()


def dies_in_the_stream(asked: Asked, dice: random.Random) -> None:
    streams(asked, dice, dice.choice((Asked.reset, Asked.hang_up)))


def breaks(asked: Asked, dice: random.Random) -> None:
    dice.choice((Asked.reset, Asked.hang_up))(asked)


def hangs(asked: Asked, dice: random.Random) -> None:
    """Until the gate gives up."""


def refuses(asked: Asked, dice: random.Random) -> None:
    asked.answer(b'{"error": {}}', dice.choice((400, 404, 429, 500, 502, 503, 504)))


def talks_nonsense(asked: Asked, dice: random.Random) -> None:
    asked.raw(b"HTTP/9 what?\r\n\r\n")


def ends_with_its_connection(asked: Asked, dice: random.Random) -> None:
    asked.raw(b"HTTP/1.1 200 OK\r\n\r\n[1, 2]")
    asked.hang_up()


MOODS = {
    answers: 40,
    streams: 30,
    dies_in_the_stream: 6,
    breaks: 6,
    hangs: 5,
    refuses: 8,
    talks_nonsense: 2,
    ends_with_its_connection: 3,
}


def moody(dice: random.Random) -> Callable[[Asked], None]:
    """A server that behaves differently each time."""

    def behave(asked: Asked) -> None:
        [mood] = dice.choices(tuple(MOODS), tuple(MOODS.values()))
        mood(asked, dice)

    return behave


# -- clients


async def ending(client: Client) -> tuple[str, bool]:
    """The one way in which a request ends, as its client sees it, and whether the connection may be used again."""
    try:
        head = await client.head()
    except (asyncio.IncompleteReadError, ConnectionError):
        return "cut before the reply", False
    try:
        body = await client.body(head)
    except (asyncio.IncompleteReadError, ConnectionError):
        return "cut in the reply" if head.status == 200 else "cut in a refusal", False
    stays = head.headers.get("connection") != "close"
    if head.status != 200:
        return head.headers.get("x-loadstone-reason", f"status {head.status}"), stays
    return "whole" if body.endswith((DONE, b"}", b"]")) else f"neither whole nor cut: {body[-100:]!r}", stays


async def leaves(client: Client, dice: random.Random) -> None:
    for _ in range(dice.choice((0, 1, 3, 10, 50))):
        await asyncio.sleep(0)
    dice.choice((Client.close, Client.reset))(client)


async def one_request(client: Client, dice: random.Random) -> tuple[str, bool]:
    """How it ended, and whether the connection may be used again."""
    data = http(body=dice.choice((ASK, STREAM, STREAM)), version=dice.choice(("1.1", "1.1", "1.0")))
    luck = dice.random()
    if luck < 0.04:
        client.send(dice.choice((b"nonsense\r\n\r\n", http(body=b"{"), http(body=b'{"max_tokens": -1}'))))
    elif luck < 0.08:
        client.send(data[:-10])
        await leaves(client, dice)
        return "left while uploading", False
    elif luck < 0.10:
        client.send(http(headers=[JSON, (b"x-loadstone-admin", b"sesame")]))
    else:
        client.send(data)
    if 0.10 <= luck < 0.28:
        await leaves(client, dice)
        return "left", False
    if 0.28 <= luck < 0.34:
        client.finish_sending()
        return (await ending(client))[0], False
    return await ending(client)


async def worker(rig: Rig, dice: random.Random, endings: Counter[str]) -> None:
    client, stays = None, False
    for _ in range(EACH):
        if client is None or not stays:
            client = await rig.client(f"127.0.0.{dice.randint(1, 5)}")
        how, stays = await one_request(client, dice)
        endings[how] += 1
        if not stays or dice.random() < 0.3:
            stays = False
            client.close()


# -- what else goes wrong


async def troubles(rig: Rig, servers: list[Server], dice: random.Random, over: asyncio.Event) -> None:
    """Servers are killed and started again, limits change, and minutes pass in between."""
    while not over.is_set():
        for _ in range(dice.randint(20, 200)):
            await asyncio.sleep(0)
        rig.clock.jump(dice.choice((0.5, 2, 6, 15)))
        server = dice.choice(servers)
        if not server.up:
            await server.start()
        elif dice.random() < 0.1:
            await server.stop()
        if dice.random() < 0.2:
            rig.gate.apply(enforced(dice.choice((servers, servers[:2], servers[1:])), dice.choice(LIMITS)))
        for upstream in rig.gate.upstreams.all():
            await upstream.probe()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_nothing_is_lost_and_nothing_leaks_whatever_happens(seed: int) -> None:
    async def main() -> None:
        dice = random.Random(seed)
        endings: Counter[str] = Counter()
        behaviours = [moody(random.Random(100 * seed + number)) for number in range(3)]
        options = GateOptions(admin_key="sesame")
        async with serving(*behaviours) as servers, gated(*servers, limits=LIMITS[0], options=options) as rig:
            over = asyncio.Event()
            trouble = asyncio.create_task(troubles(rig, servers, dice, over))
            workers = [worker(rig, random.Random(1000 * seed + number), endings) for number in range(WORKERS)]
            await asyncio.gather(*workers)
            over.set()
            await trouble
            rig.clock.jump(200)
            await until(lambda: rig.gate.in_flight == 0)

            assert sum(endings.values()) == WORKERS * EACH
            unclear = [how for how in endings if how.startswith(("neither", "cut in a refusal", "cut before"))]
            assert not unclear, endings
            outcomes = Counter(await rig.outcomes())
            for seen, counted in SEEN.items():
                assert endings[seen] <= outcomes[counted], (seen, endings, outcomes)
            assert endings["whole"] > EACH
            stayed = sum(endings.values()) - endings["left"] - endings["left while uploading"]
            assert stayed <= sum(outcomes.values()) <= stayed + endings["left"]
            assert 0 < outcomes["client_gone"] <= endings["left"]

            assert not rig.gate.permits._waiting
            admission = rig.gate.permits.admission
            for upstream in rig.gate.upstreams.all():
                pool = upstream.pool
                assert (pool.busy, pool.open - pool.idle) == (0, 0)
                assert (admission.in_flight_at(upstream.plan.url), admission.tokens_at(upstream.plan.url)) == (0, 0)
            assert all(not server.running for server in servers)
            rig.hang_up()
            await until(lambda: not rig.gate.server.connections)

    run(main())
