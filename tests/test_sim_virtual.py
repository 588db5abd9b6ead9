"""Virtual time, and the simulator as a target in it."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from loadstone.core.target import Break, Exchange, Request
from loadstone.sim.clock import DeadlockError, VirtualClock, run_virtual
from loadstone.sim.profiles import MODEL, Profile
from loadstone.sim.target import SimTarget
from loadstone.sim.truth import Truth

PLAIN = Profile("plain", base_s=0.010)
SECOND = 1_000_000_000


# -- the loop -------------------------------------------------------------------------------------------------------


def test_ten_virtual_hours_of_timers_do_not_drift() -> None:
    async def main(clock: VirtualClock) -> list[int]:
        seen: list[int] = []
        ended = asyncio.Event()
        period_ns = 333_333_333

        def tick() -> None:
            seen.append(clock.now_ns())
            if clock.now_ns() >= 36_000 * SECOND:
                ended.set()
            else:
                clock.call_at(clock.now_ns() + period_ns, tick)

        clock.call_at(period_ns, tick)
        await ended.wait()
        return seen

    seen = run_virtual(main)
    assert seen == [333_333_333 * (i + 1) for i in range(len(seen))]
    assert len(seen) == 108_001


def test_timers_fire_in_order_never_early_and_not_when_cancelled() -> None:
    async def main(clock: VirtualClock) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        def note(name: str) -> Callable[[], None]:
            return lambda: seen.append((name, clock.now_ns()))

        clock.call_at(20, note("second"))
        clock.call_at(10, note("first"))
        clock.call_at(20, note("third"))
        cancelled = clock.call_at(15, note("never"))
        cancelled.cancel()
        last = clock.call_at(20, note("nor this"))
        clock.call_at(20, last.cancel)
        last.cancel()
        await asyncio.sleep(1)
        clock.call_at(5, note("past"))
        assert seen[-1][0] == "third"
        await asyncio.sleep(1)
        return seen

    assert run_virtual(main) == [("first", 10), ("second", 20), ("third", 20), ("past", SECOND)]


def test_asyncio_timers_and_ours_share_one_time() -> None:
    async def main(clock: VirtualClock) -> list[int]:
        times = []
        for _ in range(3):
            await asyncio.sleep(0.1)
            times.append(clock.now_ns())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return [*times, clock.now_ns()]

    assert run_virtual(main) == pytest.approx([0.1e9, 0.2e9, 0.3e9, 3600.3e9], abs=10)


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def main(clock: VirtualClock) -> None:
        clock.call_at(SECOND, lambda: None).cancel()
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="no timer is armed"):
        run_virtual(main)


def test_real_sockets_work_under_it() -> None:
    async def main(_clock: VirtualClock) -> bytes:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(4))
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server, asyncio.timeout(3600):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"ping")
            echoed = await reader.read()
            writer.close()
            await writer.wait_closed()
            return echoed

    assert run_virtual(main) == b"ping"


# -- the target -----------------------------------------------------------------------------------------------------


def ask(path: str = "/v1/chat/completions", **body: object) -> Request:
    return Request(path=path, body=json.dumps({"model": MODEL, **body}).encode(), index=0)


def chat(words: int = 12, tokens: int = 5, **body: object) -> Request:
    messages = [{"role": "user", "content": "word " * words}]
    return ask(messages=messages, max_tokens=tokens, stream=True, stream_options={"include_usage": True}, **body)


def play(profile: Profile, *requests: Request, until_s: float = 3600, timeout_s: float = 600) -> list[Exchange]:
    """Send all at once; what has ended by then."""

    async def main(clock: VirtualClock) -> list[Exchange]:
        target = SimTarget(profile, clock, request_timeout_s=timeout_s)
        ended: list[Exchange] = []
        for request in requests:
            target.start(Exchange(request), ended.append)
            assert not ended, "done is never called from within start"
        await asyncio.sleep(until_s)
        return ended

    return run_virtual(main)


def events(exchange: Exchange) -> list[tuple[int, dict[str, object]]]:
    """(time in ms, event) of a stream, [DONE] taken off."""
    seen = []
    for t_ns, data in exchange.log:
        assert data.endswith(b"\n\n")
        for event in data.removesuffix(b"\n\n").split(b"\n\n"):
            assert event.startswith(b"data: ")
            seen.append((t_ns // 1_000_000, event.removeprefix(b"data: ")))
    assert seen[-1][1] == b"[DONE]"
    return [(t_ms, json.loads(event)) for t_ms, event in seen[:-1]]


def test_a_chat_stream_is_what_vllm_would_send() -> None:
    (exchange,) = play(PLAIN, chat(words=12, tokens=3))
    assert (exchange.status, exchange.broken, exchange.sent_ns, exchange.end_ns) == (200, None, 0, 30_000_000)
    assert exchange.headers[b"content-type"].startswith(b"text/event-stream")
    role, first, second, third, usage = events(exchange)
    assert [t for t, _ in (role, first, second, third, usage)] == [10, 10, 20, 30, 30]
    assert role[1]["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    assert first[1]["choices"] == [{"index": 0, "delta": {"content": " lode"}, "finish_reason": None}]
    assert third[1]["choices"] == [{"index": 0, "delta": {"content": " lode"}, "finish_reason": "length"}]
    assert usage[1]["choices"] == []
    assert usage[1]["usage"] == {"prompt_tokens": 12, "total_tokens": 15, "completion_tokens": 3}


def test_completions_and_whole_replies() -> None:
    (stream,) = play(PLAIN, ask("/v1/completions", prompt="a b c", max_tokens=2, stream=True))
    assert [event["choices"] for _, event in events(stream)] == [
        [{"index": 0, "text": " lode", "finish_reason": None}],
        [{"index": 0, "text": " lode", "finish_reason": "length"}],
    ]
    (whole,) = play(PLAIN, ask("/v1/completions", prompt=[1, 2, 3, 4], max_tokens=2))
    reply = json.loads(whole.log.body())
    assert reply["choices"] == [{"index": 0, "text": " lode lode", "finish_reason": "length"}]
    assert reply["usage"] == {"prompt_tokens": 4, "total_tokens": 6, "completion_tokens": 2}
    (message,) = play(PLAIN, ask(messages=[{"role": "user", "content": [{"type": "text", "text": "a b"}]}]))
    reply = json.loads(message.log.body())
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": " lode" * 128}
    assert reply["usage"]["prompt_tokens"] == 2


def test_lengths_of_the_request_are_believed_and_noise_stops_early() -> None:
    request = Request("/v1/completions", b'{"prompt":"a","stream":false}', 0, input_tokens=700, output_tokens=40)
    (exchange,) = play(replace(PLAIN, length_cv=0.5), request)
    reply = json.loads(exchange.log.body())
    assert reply["usage"]["prompt_tokens"] == 700
    assert reply["usage"]["completion_tokens"] < 40
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_merged_chunks_carry_all_tokens() -> None:
    (exchange,) = play(replace(PLAIN, stream_interval=4), chat(tokens=10))
    texts = [event["choices"][0]["delta"]["content"] for _, event in events(exchange) if event["choices"]]  # type: ignore[index]
    assert [text.count("lode") for text in texts] == [0, 1, 3, 4, 2]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (Request("/v1/chat/completions", b"{", 0), 400, "not a valid request"),
        (Request("/v1/chat/completions", b'{"messages": 3}', 0), 400, "not a valid request"),
        (ask(), 400, "`messages` is missing"),
        (ask("/v1/completions", messages=[]), 400, "`prompt` is missing"),
        (ask("/v1/completions", prompt="x", max_tokens=0), 400, "max_tokens"),
        (ask("/v1/completions", prompt="x", max_tokens=1 << 30), 400, "KV cache"),
        (Request("/v1/completions", b'{"model": "gpt", "prompt": "x"}', 0), 404, "`gpt` does not exist"),
        (ask("/v1/embeddings"), 404, "no such endpoint"),
    ],
)
def test_bad_requests_are_answered_with_an_openai_error(request_: Request, status: int, message: str) -> None:
    (exchange,) = play(PLAIN, request_)
    error = json.loads(exchange.log.body())["error"]
    assert (exchange.status, error["code"]) == (status, status)
    assert message in error["message"]


def test_refusals_and_stray_errors_answer_at_once() -> None:
    refused, served = play(replace(PLAIN, refuse_beyond=1), chat(), chat())
    assert (refused.status, refused.end_ns, served.status) == (503, 0 or refused.sent_ns, 200)
    (error,) = play(replace(PLAIN, error_rate=1.0), chat())
    assert (error.status, json.loads(error.log.body())["error"]["type"]) == (500, "InternalServerError")


def test_a_hung_request_times_out() -> None:
    (exchange,) = play(replace(PLAIN, hang_rate=1.0), chat(), timeout_s=30)
    assert (exchange.broken, exchange.status, exchange.end_ns) == (Break.TIMEOUT, 0, 30 * SECOND)


@pytest.mark.parametrize(("outlives", "running"), [(False, "0.0"), (True, "1.0")])
def test_cancelling_ends_the_exchange_and_usually_the_work(outlives: bool, running: str) -> None:
    async def main(clock: VirtualClock) -> None:
        target = SimTarget(replace(PLAIN, work_outlives_client=outlives), clock)
        ended: list[Exchange] = []
        exchange = Exchange(chat(tokens=1000))
        target.start(exchange, ended.append)
        await asyncio.sleep(0.055)
        target.cancel(exchange)
        assert ended == [exchange]
        assert (exchange.broken, exchange.status, len(exchange.log)) == (Break.CUT, 200, 5)
        target.cancel(exchange)
        assert len(ended) == 1
        assert f'num_requests_running{{engine="0",model_name="{MODEL}"}} {running}' in target.metrics_text()
        await asyncio.sleep(20)
        assert len(exchange.log) == 5
        assert 'num_requests_running{engine="0",model_name="loadstone-sim"} 0.0' in target.metrics_text()

    run_virtual(main)


def test_metrics_are_in_vllms_names() -> None:
    async def main(clock: VirtualClock) -> str:
        target = SimTarget(replace(PLAIN, max_num_seqs=1, num_kv_blocks=10), clock)
        for _ in range(3):
            target.start(Exchange(chat(words=30, tokens=4)), lambda exchange: None)
        await asyncio.sleep(0.045)
        return target.metrics_text()

    values = dict(line.rsplit(" ", 1) for line in run_virtual(main).splitlines() if not line.startswith("#"))
    label = '{engine="0",model_name="loadstone-sim"}'
    assert values[f"vllm:num_requests_running{label}"] == "1.0"
    assert values[f"vllm:num_requests_waiting{label}"] == "1.0"
    assert float(values[f"vllm:kv_cache_usage_perc{label}"]) == pytest.approx(0.2)
    assert values[f"vllm:num_preemptions_total{label}"] == "0.0"
    assert values[f"vllm:prompt_tokens_total{label}"] == "30.0"
    assert values[f"vllm:generation_tokens_total{label}"] == "4.0"
    assert values['vllm:request_success_total{engine="0",model_name="loadstone-sim",finished_reason="length"}'] == "1.0"


@pytest.mark.parametrize("concurrency", [1, 8, 40])
def test_a_closed_loop_on_the_target_meets_the_truth(concurrency: int) -> None:
    profile = Profile("knee", base_s=0.020, per_decode_seq_s=0.000_5, max_num_seqs=32)

    async def main(clock: VirtualClock) -> float:
        target = SimTarget(profile, clock)
        ended: list[int] = []

        def refill(exchange: Exchange) -> None:
            ended.append(exchange.end_ns)
            target.start(Exchange(exchange.request), refill)

        for slot in range(concurrency):
            clock.call_at(slot * 20_000_000, lambda: target.start(Exchange(chat(words=10, tokens=32)), refill))
        await asyncio.sleep(600)
        return sum(end_ns > 300 * SECOND for end_ns in ended) / 300

    true_rps = Truth(profile, 10, 32).at(concurrency).throughput_rps
    assert run_virtual(main) == pytest.approx(true_rps, rel=0.01)
