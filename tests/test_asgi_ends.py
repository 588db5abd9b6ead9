"""How requests through the middleware end, in virtual time: out of time, the client gone; and that nothing leaks."""

import asyncio
import json

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_calls import Call, document, fail, reply, silent, slow, stream
from asgi_service import OPEN, Held, virtually
from loadstone.core.limits import Limits, PerClient
from loadstone.hold.asgi_messages import App, Message, Receive, Scope, Send

# -- out of time


def test_at_the_deadline_the_app_is_cancelled_and_the_client_told() -> None:
    limits = Limits(max_concurrency=1, max_queue=1, request_timeout_s=3.0, per_client=PerClient(requests_per_minute=5))

    @virtually(limits, slow(60.0))
    async def _(held: Held) -> None:
        first, second = await asyncio.gather(Call(held).done(), Call(held).done())
        for call in (first, second):
            assert (call.status, call.error["code"]) == (504, "request_timeout")
            assert call.headers["x-loadstone-reason"] == "request_timeout"
            assert call.headers["x-ratelimit-remaining"] == "5"
        assert asyncio.get_running_loop().time() == 3
        assert (held.model.running, len(held.model.asked)) == (0, 1)
        assert held.outcomes == {"request_timeout": 2}
        assert held.service.quotas.standings("192.0.2.1", held.service.clock.now_ns())[0].remaining == 5


def test_a_stream_out_of_time_ends_with_an_error_event() -> None:
    @virtually(Limits(max_queue=10, request_timeout_s=2.5), stream)
    async def _(held: Held) -> None:
        call = await Call(held).done()
        *events, last = call.body.split(b"\n\n")[:-1]
        assert events == [b"data: {}"] * 3
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "request_timeout"
        assert call.complete
        assert held.outcomes == {"request_timeout": 1}


def test_a_document_out_of_time_stays_incomplete() -> None:
    @virtually(Limits(max_queue=10, request_timeout_s=2.0), document)
    async def _(held: Held) -> None:
        call = await Call(held).done()
        assert (call.body, call.complete) == (b"half", False)
        assert held.outcomes == {"request_timeout": 1}


def test_an_app_that_answers_too_late_is_not_heard_and_keeps_its_slot_meanwhile() -> None:
    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        # As a worker thread that nothing can stop.
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(4)
        await reply(scope, receive, send)

    @virtually(Limits(max_concurrency=1, max_queue=0, request_timeout_s=2.0), stubborn)
    async def _(held: Held) -> None:
        call = Call(held)
        await asyncio.sleep(3)
        assert (call.status, call.complete, held.standing) == (504, True, (1, 0))
        assert (await Call(held).done()).status == 503
        await call.done()
        assert (asyncio.get_running_loop().time(), len(call.sent)) == (4, 2)
        assert held.outcomes == {"request_timeout": 1, "queue_full": 1}


def test_one_whose_wait_and_time_end_together_is_answered_once() -> None:
    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(9)

    @virtually(Limits(max_concurrency=1, max_queue=1, request_timeout_s=3.0), stubborn)
    async def _(held: Held) -> None:
        first = Call(held)
        await asyncio.sleep(1)
        second = await Call(held).done()
        assert asyncio.get_running_loop().time() == 4
        assert (second.status, len(second.sent)) == (504, 2)
        await first.done()
        assert held.outcomes == {"request_timeout": 2}


def test_what_runs_after_the_reply_has_no_deadline_but_holds_its_slot() -> None:
    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(scope, receive, send)
        await asyncio.sleep(60)

    @virtually(Limits(max_concurrency=1, max_queue=0, request_timeout_s=2.0), act)
    async def _(held: Held) -> None:
        call = Call(held)
        await asyncio.sleep(1)
        assert call.complete
        call.leave()
        assert (await Call(held).done()).status == 503
        await call.done()
        assert asyncio.get_running_loop().time() == 60
        assert held.outcomes == {"ok": 1, "queue_full": 1}
        assert held.stats["latency_s"]["p99"] < 1


# -- the client leaves


def test_an_app_that_listens_ends_by_itself() -> None:
    heard: list[Message] = []

    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        heard.append(await receive())
        await asyncio.sleep(0.5)
        heard.append(await receive())

    @virtually(OPEN, act)
    async def _(held: Held) -> None:
        call = Call(held)
        await asyncio.sleep(1)
        call.leave()
        await call.done()
        assert asyncio.get_running_loop().time() == 1.5
        assert heard == [{"type": "http.disconnect"}] * 2
        assert held.outcomes == {"client_gone": 1}


@pytest.mark.parametrize("act", [slow(60.0), stream])
def test_an_app_that_does_not_listen_is_cancelled_a_second_later(act: App) -> None:
    @virtually(Limits(max_concurrency=1, max_queue=1), act)
    async def _(held: Held) -> None:
        call, waiting = Call(held), Call(held)
        await asyncio.sleep(1.2)
        call.leave()
        await call.done()
        assert asyncio.get_running_loop().time() == pytest.approx(2.2)
        await asyncio.sleep(0)
        assert held.model.running == 1
        waiting.leave()
        await waiting.done()
        assert held.outcomes == {"client_gone": 2}


def test_an_app_that_answers_in_its_last_second_goes_on() -> None:
    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def then_more(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        await act(scope, receive, send)
        await asyncio.sleep(60)

    @virtually(OPEN, then_more)
    async def _(held: Held) -> None:
        call = Call(held)
        await asyncio.sleep(0.5)
        call.leave()
        await call.done()
        assert asyncio.get_running_loop().time() == 61
        assert held.outcomes == {"client_gone": 1}


def test_who_leaves_just_as_a_place_comes_free_does_not_start() -> None:
    leaving: list[Call] = []

    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        leaving[0].leave()
        await asyncio.sleep(0)

    @virtually(Limits(max_concurrency=1, max_queue=1), act)
    async def _(held: Held) -> None:
        first = Call(held)
        leaving.append(Call(held))
        await asyncio.gather(first.done(), leaving[0].done())
        assert (len(held.model.asked), held.outcomes) == (1, {"client_gone": 1, "upstream_error": 1})


def test_a_server_that_stops_cancels_and_nothing_is_left() -> None:
    @virtually(Limits(max_concurrency=1, max_queue=5), slow(60.0))
    async def _(held: Held) -> None:
        calls = [Call(held), Call(held), Call(held, b"", endless=True)]
        await asyncio.sleep(1)
        for call in reversed(calls):
            call.task.cancel()
            await asyncio.wait([call.task])
            assert call.task.cancelled()
        assert held.outcomes == {"client_gone": 3}


# -- whatever happens

ACTS: dict[str, App] = {
    "reply": slow(0.5),
    "stream": stream,
    "document": document,
    "fail": fail,
    "silent": silent,
    "hang": slow(1e6),
}
PLANS = st.tuples(
    st.sampled_from(sorted(ACTS)),
    st.sampled_from(["ann", "bob"]),
    st.integers(0, 40),
    st.sampled_from(["stays", "stays", "leaves", "is cancelled"]),
    st.integers(0, 60),
)


@given(st.lists(PLANS, min_size=1, max_size=25))
def test_nothing_leaks_and_each_request_ends_once(plans: list[tuple[str, str, int, str, int]]) -> None:
    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        await ACTS[scope["path"].strip("/")](scope, receive, send)

    async def one(held: Held, plan: tuple[str, str, int, str, int]) -> Call:
        name, client, arrives, end, after = plan
        await asyncio.sleep(arrives / 10)
        call = Call(held, path=f"/{name}", client=client)
        loop = asyncio.get_running_loop()
        ends = {"stays": lambda: None, "leaves": call.leave, "is cancelled": call.task.cancel}
        loop.call_later(after / 10, ends[end])
        await asyncio.wait([call.task])
        if not call.task.cancelled():
            error = call.task.exception()
            assert error is None or (name == "fail" and isinstance(error, ZeroDivisionError))
        return call

    limits = Limits(
        max_concurrency=2,
        max_queue=3,
        queue_timeout_s=1.5,
        request_timeout_s=4.0,
        per_client=PerClient(requests_per_minute=12),
    )

    @virtually(limits, act)
    async def _(held: Held) -> None:
        calls = await asyncio.gather(*(one(held, plan) for plan in plans))
        assert held.stats["received"] == len(plans)
        assert (held.model.running, held.model.most <= 2) == (0, True)
        assert len(asyncio.all_tasks()) == 1
        refused = [call for call in calls if call.status in (429, 503)]
        assert all("retry-after" in call.headers and "x-loadstone-reason" in call.headers for call in refused)
        assert held.stats["refused"] == len(refused)
        said = [len(call.sent) for call in calls]
        await asyncio.sleep(100)
        assert said == [len(call.sent) for call in calls]
        assert all(standing.remaining == 12 for standing in held.service.quotas.standings("ann", _now(held)))


def _now(held: Held) -> int:
    return held.service.clock.now_ns()
