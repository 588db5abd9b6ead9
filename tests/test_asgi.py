"""The middleware's admission over raw ASGI calls, in virtual time: queue, quotas, shaping, refusals."""

import asyncio
import json
from typing import Any

import pytest

from asgi_calls import (
    CHAT,
    Call,
    busy,
    chat_body,
    fail,
    lost,
    reply,
    silent,
    slow,
    start,
    wrong,
)
from asgi_service import OPEN, Held, virtually
from loadstone.core.limits import Limits, PerClient
from loadstone.hold.asgi_messages import App, Receive, Scope, Send

JSON = [(b"content-type", b"application/json")]


# -- what passes


def test_a_request_comes_and_goes_byte_for_byte() -> None:
    body = b'{ "messages" : [],\n "n": 1 }'

    @virtually(OPEN)
    async def _(held: Held) -> None:
        call = await Call(held, [body[:5], body[5:9], b"", body[9:]]).done()
        assert (call.status, call.body, call.complete) == (200, body, True)
        assert held.model.asked == [call.scope]
        assert held.outcomes == {"ok": 1}


@pytest.mark.parametrize(
    ("path", "asked", "sent"),
    [
        (CHAT, {"max_tokens": 9000}, {"max_tokens": 64}),
        (CHAT + "/", {"max_tokens": 9000}, {"max_tokens": 64}),
        (CHAT, {"max_completion_tokens": 9000}, {"max_completion_tokens": 64}),
        (CHAT, {}, {"max_tokens": 16}),
        ("/embed_image", {"max_tokens": 9000}, {"max_tokens": 9000}),
    ],
)
def test_output_is_held_to_the_limits_and_its_length_told(path: str, asked: Any, sent: Any) -> None:
    @virtually(Limits(max_queue=10, max_output_tokens=64, default_output_tokens=16))
    async def _(held: Held) -> None:
        body = chat_body(**asked)
        length = b"%d" % len(body)
        call = await Call(held, body, path=path, headers=[*JSON, (b"content-length", length)]).done()
        assert json.loads(call.body) == json.loads(chat_body(**sent))
        assert dict(held.model.asked[0]["headers"])[b"content-length"] == b"%d" % len(call.body)
        assert dict(call.scope["headers"])[b"content-length"] == length


def test_both_families_of_rate_limit_headers_and_the_apps_own() -> None:
    @virtually(Limits(max_queue=10, per_client=PerClient(requests_per_minute=10)))
    async def _(held: Held) -> None:
        headers = (await Call(held).done()).headers
        assert headers["content-type"] == "application/json"
        assert headers["x-ratelimit-remaining"] == "9"
        assert headers["ratelimit-policy"] == '"minute";q=10;w=60'


# -- the queue


def test_one_runs_one_waits_and_the_third_is_refused() -> None:
    @virtually(Limits(max_concurrency=1, max_queue=1, queue_timeout_s=30.0), slow(2.0))
    async def _(held: Held) -> None:
        first, second = Call(held), Call(held)
        third = await Call(held).done()
        assert (third.status, third.error["code"]) == (503, "queue_full")
        assert "服务繁忙" in third.error["message"]
        assert (third.headers["x-loadstone-reason"], third.headers["retry-after"]) == ("queue_full", "30")
        assert held.standing == (1, 1)
        await first.done()
        assert (await second.done()).status == 200
        assert held.model.most == 1
        assert held.outcomes == {"ok": 2, "queue_full": 1}


def test_waiting_ends_at_its_bound() -> None:
    @virtually(Limits(max_concurrency=1, max_queue=5, queue_timeout_s=0.5), slow(9.0))
    async def _(held: Held) -> None:
        first, second = Call(held), Call(held)
        await second.done()
        assert (second.status, second.error["code"]) == (503, "queue_timeout")
        assert asyncio.get_running_loop().time() == pytest.approx(0.5)
        assert held.stats["oldest_in_flight_s"] == pytest.approx(0.5)
        await first.done()


def test_who_leaves_the_queue_frees_the_place_at_once() -> None:
    @virtually(Limits(max_concurrency=1, max_queue=1), slow(5.0))
    async def _(held: Held) -> None:
        first, second = Call(held), Call(held)
        await asyncio.sleep(1)
        second.leave()
        await second.done()
        assert asyncio.get_running_loop().time() == 1
        third = Call(held)
        await asyncio.sleep(1)
        assert held.standing == (1, 1)
        assert (await first.done(), await third.done())[1].status == 200
        assert second.sent == []
        assert held.outcomes == {"ok": 2, "client_gone": 1}


def test_a_token_budget_counts_every_choice() -> None:
    @virtually(Limits(max_queue=0, max_tokens_in_flight=100), slow(1.0))
    async def _(held: Held) -> None:
        first = Call(held, chat_body(max_tokens=20, n=3))
        busy = await Call(held, chat_body(max_tokens=20, n=3)).done()
        never = await Call(held, chat_body(max_tokens=200)).done()
        assert [busy.error["code"], never.error["code"]] == ["queue_full", "over_budget"]
        assert never.status == 400
        await first.done()


# -- quotas


def test_each_client_has_its_own_quota() -> None:
    @virtually(Limits(max_queue=10, per_client=PerClient(requests_per_minute=2)))
    async def _(held: Held) -> None:
        statuses = [(await Call(held, client="2001:db8::1").done()).status for _ in range(2)]
        neighbour = await Call(held, client="2001:db8::2").done()
        assert [*statuses, neighbour.status] == [200, 200, 429]
        assert neighbour.headers["retry-after"] == "60"
        assert neighbour.headers["x-ratelimit-remaining"] == "0"
        assert (await Call(held, client="2001:db8:1::1").done()).status == 200
        await asyncio.sleep(60)
        assert (await Call(held, client="2001:db8::2").done()).status == 200


@pytest.mark.parametrize(
    ("act", "outcome", "remaining"),
    [
        (reply, "ok", 4),
        (fail, "upstream_error", 5),
        (lost, "upstream_error", 5),
        (busy, "upstream_error", 5),
        (silent, "upstream_error", 5),
        (wrong, "bad_request", 4),
    ],
)
def test_what_the_app_refuses_or_fails_costs_nothing(act: App, outcome: str, remaining: int) -> None:
    @virtually(Limits(max_queue=10, per_client=PerClient(requests_per_minute=5)), act)
    async def _(held: Held) -> None:
        call = Call(held)
        raised = (await asyncio.gather(call.task, return_exceptions=True))[0]
        assert type(raised) is {fail: ZeroDivisionError, lost: asyncio.CancelledError}.get(act, type(None))
        assert held.outcomes == {outcome: 1}
        now_ns = held.service.clock.now_ns()
        assert held.service.quotas.standings("192.0.2.1", now_ns)[0].remaining == remaining


def test_a_refusal_gives_the_quota_back_before_it_is_told() -> None:
    @virtually(Limits(max_concurrency=1, max_queue=0, per_client=PerClient(requests_per_minute=5)), slow(1.0))
    async def _(held: Held) -> None:
        first = Call(held)
        refused = await Call(held).done()
        assert (refused.status, refused.headers["x-ratelimit-remaining"]) == (503, "4")
        await first.done()


def test_tokens_are_settled_from_usage() -> None:
    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send)
        body = b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}'
        await send({"type": "http.response.body", "body": body[:30], "more_body": True})
        await send({"type": "http.response.body", "body": body[30:]})

    @virtually(Limits(max_queue=10, per_client=PerClient(tokens_per_minute=1000)), act)
    async def _(held: Held) -> None:
        headers = (await Call(held, chat_body(max_tokens=500)).done()).headers
        assert int(headers["x-ratelimit-remaining-tokens"]) < 500
        assert held.service.quotas.standings("192.0.2.1", held.service.clock.now_ns())[0].remaining == 993
        assert held.stats["output_tokens"] == 2


def test_a_measuring_client_is_held_to_nothing() -> None:
    limits = Limits(max_concurrency=1, max_queue=0, per_client=PerClient(requests_per_minute=1))

    @virtually(limits, slow(1.0), admin_key="secret")
    async def _(held: Held) -> None:
        calls = [Call(held, headers=[(b"x-loadstone-admin", b"secret")]) for _ in range(5)]
        assert [(await call.done()).status for call in calls] == [200] * 5
        assert held.model.most == 5


def test_clients_may_be_named_by_the_service() -> None:
    def user(scope: Scope) -> str:
        return dict(scope["headers"])[b"x-user"].decode()

    @virtually(Limits(max_queue=10, per_client=PerClient(requests_per_minute=1)), client_of=user)
    async def _(held: Held) -> None:
        calls = [await Call(held, headers=[(b"x-user", name)]).done() for name in (b"ann", b"ann", b"bob")]
        assert [call.status for call in calls] == [200, 429, 200]


# -- bad requests


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        (b"{", JSON, None),
        (b"[1]", [], None),
        (chat_body(max_tokens=-1), JSON, "max_tokens"),
        (chat_body(max_tokens="many"), JSON, "max_tokens"),
        (chat_body(), [(b"content-type", b"text/plain")], None),
    ],
)
def test_bad_asks_never_reach_the_app(body: bytes, headers: list[tuple[bytes, bytes]], param: str | None) -> None:
    @virtually(OPEN)
    async def _(held: Held) -> None:
        call = await Call(held, body, headers=headers).done()
        assert (call.status, call.error["code"], call.error["param"]) == (400, "bad_request", param)
        assert held.model.asked == []
        assert held.outcomes == {"bad_request": 1}


@pytest.mark.parametrize("told", [True, False])
def test_a_body_beyond_the_bound_is_not_read_further(told: bool) -> None:
    @virtually(OPEN)
    async def _(held: Held) -> None:
        headers = [(b"content-length", b"1200")] if told else []
        call = await Call(held, [b"x" * 400] * 9, headers=headers).done()
        assert (call.status, call.error["code"]) == (413, "body_too_large")
        assert call.read == (0 if told else 3)
        assert held.outcomes == {"bad_request": 1}


def test_a_body_that_never_ends_is_cut_at_the_deadline() -> None:
    @virtually(Limits(max_queue=10, request_timeout_s=3.0))
    async def _(held: Held) -> None:
        call = await Call(held, b"{", endless=True).done()
        assert (call.status, call.error["code"]) == (504, "request_timeout")
        assert asyncio.get_running_loop().time() == 3
        left = Call(held, b"{", endless=True)
        await asyncio.sleep(1)
        left.leave()
        await left.done()
        assert (left.sent, held.outcomes) == ([], {"request_timeout": 1, "client_gone": 1})
