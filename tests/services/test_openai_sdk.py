"""The gate as the openai SDK sees it, in front of a simulated engine."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from processes import MODEL, NO_QUOTAS, Running, gate_before, simulated, until

NO_QUEUE = (*NO_QUOTAS, "--max-concurrency", 1, "--max-queue", 0)
ENDLESS = 1_000_000
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with simulated() as engine:
        yield engine


@contextmanager
def client_of(gate: Running, *, key: str = "none", max_retries: int = 0) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gate.url}/v1", api_key=key, max_retries=max_retries) as client:
        yield client


def ask(client: OpenAI, tokens: int = 4) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=tokens)


def stream(client: OpenAI, tokens: int = 4) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
    )


def test_a_reply_is_the_same_whole_and_streamed(engine: Running) -> None:
    with gate_before(engine) as gate, client_of(gate) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        whole = ask(client, 16)
        chunks = list(stream(client, 16))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        assert whole.usage.completion_tokens == 16
        assert gate.stats()["output_tokens"] == 32
        assert gate.outcomes() == {"ok": 3}


def test_headers_tell_the_quota_that_is_left(engine: Running) -> None:
    with gate_before(engine) as gate, client_of(gate) as client:
        left = [
            client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=1).headers
            for _ in range(2)
        ]
        assert [headers["x-ratelimit-remaining-requests"] for headers in left] == ["9", "8"]
        assert len({headers["x-request-id"] for headers in left}) == 2


def test_a_stream_that_is_closed_frees_its_slot_and_the_engine(engine: Running) -> None:
    with gate_before(engine, options=(*NO_QUEUE, "--max-output-tokens", 0)) as gate, client_of(gate) as client:
        for _ in range(3):
            chunks = stream(client, ENDLESS)
            next(chunks)
            assert (gate.stats()["in_flight"], engine.in_engine()) == (1, 1)
            chunks.close()
            until(lambda: gate.stats()["in_flight"] == 0)
            until(lambda: engine.in_engine() == 0)
        assert ask(client).usage.completion_tokens == 4
        assert gate.outcomes() == {"ok": 1, "client_gone": 3}


def test_a_call_that_is_cancelled_frees_its_slot_or_its_place_in_the_queue(engine: Running) -> None:
    async def main(gate: Running) -> None:
        async with AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=0) as client:

            def call(tokens: int) -> "asyncio.Task[Any]":
                return asyncio.create_task(
                    client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=tokens)
                )

            async def reached(in_flight: int, queued: int) -> None:
                def there() -> bool:
                    stats = gate.stats()
                    return (stats["in_flight"], stats["queued"]) == (in_flight, queued)

                await asyncio.to_thread(until, there)

            runs, waits = call(ENDLESS), call(ENDLESS)
            await reached(1, 1)
            waits.cancel()
            await reached(1, 0)
            last = call(4)
            await reached(1, 1)
            runs.cancel()
            assert (await last).usage.completion_tokens == 4
            await asyncio.gather(runs, waits, return_exceptions=True)

    options = (*NO_QUOTAS, "--max-concurrency", 1, "--max-output-tokens", 0)
    with gate_before(engine, options=options) as gate:
        asyncio.run(main(gate))
        until(lambda: engine.in_engine() == 0)
        assert gate.outcomes() == {"ok": 1, "client_gone": 2}


def test_it_comes_back_when_the_gate_says(engine: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full gate: the second attempt finds the place that came free meanwhile."""
    options = (*NO_QUEUE, "--queue-timeout-s", 7, "--max-output-tokens", 0)
    with gate_before(engine, options=options) as gate, client_of(gate, max_retries=2) as client:
        held = stream(client, ENDLESS)
        next(held)
        waited_s: list[float] = []

        def sleep(seconds: float) -> None:
            waited_s.append(seconds)
            monkeypatch.undo()
            held.close()
            until(lambda: gate.stats()["in_flight"] == 0)

        monkeypatch.setattr(time, "sleep", sleep)
        assert ask(client).usage.completion_tokens == 4
        assert waited_s == [7]
        assert gate.outcomes() == {"ok": 1, "client_gone": 1, "queue_full": 1}


def test_a_spent_quota_is_a_rate_limit_error_with_its_time(engine: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with gate_before(engine, options=("--requests-per-minute", 1)) as gate, client_of(gate, max_retries=1) as client:
        ask(client)
        waited_s: list[float] = []
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", waited_s.append)
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client)
        assert (caught.value.status_code, caught.value.code) == (429, "rate_limit_exceeded")
        assert caught.value.type == "rate_limit_error"
        assert "too many requests: at most 1 requests per minute" in caught.value.message
        assert caught.value.response.headers["x-loadstone-reason"] == "rate_limited"
        assert len(waited_s) == 1
        assert 50 <= waited_s[0] <= 60
        assert abs(waited_s[0] - int(caught.value.response.headers["retry-after"])) <= 1
        assert gate.outcomes() == {"ok": 1, "rate_limited": 2}


def test_a_full_gate_is_an_error_of_the_server(engine: Running) -> None:
    with gate_before(engine, options=(*NO_QUEUE, "--max-output-tokens", 0)) as gate, client_of(gate) as client:
        held = stream(client, ENDLESS)
        next(held)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert (caught.value.status_code, caught.value.code, caught.value.type) == (503, "queue_full", "server_error")
        assert "服务繁忙 / service busy" in caught.value.message
        held.close()


def test_time_that_is_up_before_the_first_byte_is_a_504(engine: Running) -> None:
    options = (*NO_QUOTAS, "--request-timeout-s", 0.3, "--max-output-tokens", 0)
    with gate_before(engine, options=options) as gate, client_of(gate) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, ENDLESS)
        assert (caught.value.status_code, caught.value.code) == (504, "request_timeout")
        assert gate.outcomes() == {"request_timeout": 1}
        until(lambda: engine.in_engine() == 0)


def test_time_that_is_up_within_a_stream_is_an_error_too(engine: Running) -> None:
    options = (*NO_QUOTAS, "--request-timeout-s", 0.3, "--max-output-tokens", 0)
    with gate_before(engine, options=options) as gate, client_of(gate) as client:
        chunks = stream(client, ENDLESS)
        next(chunks)
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
        assert (caught.value.code, caught.value.type) == ("request_timeout", "server_error")
        assert gate.outcomes() == {"request_timeout": 1}
        until(lambda: engine.in_engine() == 0)


@pytest.mark.parametrize("tokens", [-1, "many", 1.5])
def test_what_makes_no_sense_is_a_bad_request(engine: Running, tokens: Any) -> None:
    with gate_before(engine) as gate, client_of(gate) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, tokens)
        assert (caught.value.code, caught.value.param) == ("bad_request", "max_tokens")
        assert ask(client).usage.completion_tokens == 4
        assert gate.outcomes() == {"bad_request": 1, "ok": 1}


def test_an_error_of_the_engine_comes_through(engine: Running) -> None:
    with (
        gate_before(engine) as gate,
        client_of(gate) as client,
        pytest.raises(openai.NotFoundError, match="`gpt` does not exist"),
    ):
        client.chat.completions.create(model="gpt", messages=MESSAGES)


def test_no_engine_at_all_is_said_so() -> None:
    with gate_before("http://127.0.0.1:9") as gate, client_of(gate) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert (caught.value.status_code, caught.value.code) == (503, "no_upstream")
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_key_is_wanted_where_there_are_keys(engine: Running, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-good alice\n")
    with gate_before(engine, options=("--api-key-file", tmp_path / "keys")) as gate:
        with client_of(gate, key="sk-bad") as client, pytest.raises(openai.AuthenticationError) as caught:
            ask(client)
        assert caught.value.code == "unauthorized"
        with client_of(gate, key="sk-good") as client:
            ask(client)
        assert [one["client"] for one in gate.stats()["clients"]["busiest"]] == ["127.0.0.1", "key:alice"]


def test_fifty_at_once_are_three_and_ten_and_the_rest_refused(engine: Running) -> None:
    async def main(gate: Running) -> None:
        async with AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=0) as client:
            ask = client.chat.completions.create
            held = [await ask(model=MODEL, messages=MESSAGES, max_tokens=ENDLESS, stream=True) for _ in range(3)]
            calls = [asyncio.create_task(ask(model=MODEL, messages=MESSAGES, max_tokens=2)) for _ in range(47)]
            await asyncio.to_thread(until, lambda: gate.outcomes().get("queue_full") == 37)
            assert (gate.stats()["in_flight"], gate.stats()["queued"], engine.in_engine()) == (3, 10, 3)
            for one in held:
                await one.close()
            results = await asyncio.gather(*calls, return_exceptions=True)
            refused = [result for result in results if isinstance(result, openai.InternalServerError)]
            assert {error.code for error in refused} == {"queue_full"}
            assert len(refused) == 37
            assert sum(isinstance(result, openai.types.chat.ChatCompletion) for result in results) == 10

    with gate_before(engine, options=(*NO_QUOTAS, "--max-output-tokens", 0)) as gate:
        asyncio.run(main(gate))
        assert gate.outcomes() == {"ok": 10, "queue_full": 37, "client_gone": 3}


def test_fifty_at_once_are_all_served_in_the_end(engine: Running) -> None:
    async def main(gate: Running) -> None:
        async with AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=20) as client:
            calls = [client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2) for _ in range(50)]
            replies = await asyncio.gather(*calls)
            assert all(reply.usage is not None and reply.usage.completion_tokens == 2 for reply in replies)

    with gate_before(engine, options=(*NO_QUOTAS, "--queue-timeout-s", 1)) as gate:
        asyncio.run(main(gate))
        assert gate.outcomes()["ok"] == 50
