"""``serve chat`` with the clients that people have: the guide's own lines, curl, ab, wrk and the openai SDK."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from openai import OpenAI

from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model
from processes import CHAT, NO_QUOTAS, Running, engine_figure, fetch, running, until
from service_examples import check_wrk, example, figure, run

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
ENDLESS = 50_000
ONE_PLACE = (*NO_QUOTAS, "--max-concurrency", 1, "--max-queue", 0, "--max-output-tokens", 0)
LOAD = ("curl's reply", "/stats", "/health")


@pytest.fixture(scope="module")
def model() -> str:
    """Random weights; a token is a character."""
    return str(cached_model(TinyShape()))


def serving(model: str, *words: object, **environment: str) -> Any:
    return running("serve", "chat", "--model", model, "--port", 0, *words, **environment)


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with serving(model, *NO_QUOTAS) as service:
        yield service


@contextmanager
def client_of(service: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# -- the guide's own lines


def load(service: Running) -> tuple[dict[str, Any], str]:
    """The three documents that curl gets, by what was asked for, and what ab and wrk say."""
    printed = example("chat_load.sh", service.url, SECONDS_OF_LOAD="1")
    *documents, rest = printed.split("\n", len(LOAD))
    return dict(zip(LOAD, map(json.loads, documents), strict=True)), rest


def test_the_guides_lines_under_its_limits(model: str) -> None:
    with serving(model) as service:
        documents, told = load(service)
        assert documents["curl's reply"]["usage"]["completion_tokens"] == 64
        assert documents["/stats"]["outcomes"]["ok"] == 1
        assert (documents["/health"]["capacity"], documents["/health"]["engine"]) == (3, "llamacpp")
        assert figure(told, "Complete requests") == 100
        assert figure(told, "Failed requests") == 0
        assert figure(told, "Non-2xx responses") == 91
        check_wrk(told)
        assert service.outcomes() == {"ok": 10, "rate_limited": 91}  # /stats and /health are no requests


def test_the_guides_lines_without_quotas(model: str) -> None:
    with serving(model, *NO_QUOTAS) as service:
        _, told = load(service)
        assert figure(told, "Complete requests") == 100
        assert figure(told, "Failed requests") == figure(told, "Non-2xx responses") == 0
        check_wrk(told)
        assert service.outcomes() == {"ok": 101}


def test_the_guides_ab_line_as_it_stands(model: str) -> None:
    with serving(model) as service:
        words = ("-n", 100, "-c", 5, "-p", "request.json", "-T", "application/json")
        told = run("ab", *words, service.url + CHAT)
        assert figure(told, "Complete requests") == 100
        assert figure(told, "Non-2xx responses") == 90
        assert "(Connect: 0, Receive: 0, Length: " in told  # replies differ in length, and nothing else
        assert "Exceptions: 0)" in told
        assert service.outcomes() == {"ok": 10, "rate_limited": 90}


@pytest.mark.parametrize(("concurrency", "threads"), [(2, 2), (3, 4), (4, 4)])
def test_the_scenarios_of_the_guide(concurrency: int, threads: int, model: str) -> None:
    told = {"MAX_CONCURRENT": str(concurrency), "WORKERS": "1", "THREADS": str(threads)}
    with serving(model, **told) as service:
        health = fetch(service.url, "/health").document
        assert (health["capacity"], health["workers"], health["threads"]) == (concurrency, 1, threads)
        assert health["limits"]["max_queue"] == 10


# -- one request to each endpoint, as it stands in examples/services


def test_curl_gets_a_plain_completion(service: Running) -> None:
    body = ("-H", "Content-Type: application/json", "-d", "@completion_request.json")
    reply = json.loads(run("curl", "-sS", *body, f"{service.url}/v1/completions"))
    assert (reply["object"], reply["usage"]["completion_tokens"]) == ("text_completion", 32)
    assert len(reply["choices"][0]["text"]) == 32


def test_the_client_prints_the_reply(service: Running) -> None:
    printed = example("chat_client.py", service.url, "你好")
    assert len(printed) == 64 + len("\n")


# -- the openai SDK


@pytest.mark.parametrize("streams", [False, True])
def test_the_sdk_has_a_chat(service: Running, streams: bool) -> None:
    more: Any = {"stream": True, "stream_options": {"include_usage": True}} if streams else {}
    with client_of(service) as client:
        name = client.models.list().data[0].id
        reply: Any = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=16, **more)
        chunks = list(reply) if streams else []
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usage = chunks[-1].usage if streams else reply.usage
    assert len(text if streams else reply.choices[0].message.content) == usage.completion_tokens == 16
    assert (chunks[-2] if streams else reply).choices[0].finish_reason == "length"


@pytest.mark.parametrize("streams", [False, True])
def test_the_sdk_has_a_prompt_completed(service: Running, model: str, streams: bool) -> None:
    with client_of(service) as client:
        reply: Any = client.completions.create(model=model, prompt="A loadstone is", max_tokens=16, stream=streams)
        texts = [chunk.choices[0].text for chunk in reply if chunk.choices] if streams else [reply.choices[0].text]
    assert len("".join(texts)) == 16
    assert len(texts) == 1 or streams


def test_the_sdk_is_given_100_tokens_where_it_asks_for_none_and_never_more_than_512(
    service: Running, model: str
) -> None:
    with client_of(service) as client:
        asked: list[Any] = [{}, {"max_tokens": 4000}, {"max_completion_tokens": 4000}]
        replies: list[Any] = [client.chat.completions.create(model=model, messages=MESSAGES, **more) for more in asked]
    assert [reply.usage.completion_tokens for reply in replies] == [100, 512, 512]


def test_a_stream_that_the_sdk_gives_up_frees_its_place_and_the_slot(model: str) -> None:
    with serving(model, *ONE_PLACE, "--max-num-seqs", 1, "--max-model-len", 60_000) as service:
        engine = fetch(service.url, "/health").document["engines"][0]["url"]
        with client_of(service) as client:

            def ask(tokens: int, **more: Any) -> Any:
                return client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=tokens, **more)

            stream = ask(ENDLESS, stream=True)
            next(iter(stream))
            assert service.stats()["in_flight"] == 1
            with pytest.raises(openai.InternalServerError) as refused:
                ask(4)
            assert (refused.value.status_code, refused.value.code) == (503, "queue_full")
            stream.close()
            until(lambda: service.stats()["in_flight"] == 0)
            until(lambda: engine_figure(engine, "llamacpp:requests_processing", "llamacpp:requests_deferred") == 0)
            assert ask(4).usage.completion_tokens == 4
        assert service.outcomes() == {"ok": 1, "client_gone": 1, "queue_full": 1}
