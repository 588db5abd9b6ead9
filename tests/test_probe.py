"""The first request: fields a server rejects are left out, a no is explained in one line, lengths are calibrated."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest

from loadstone.core.api import ENDPOINTS
from loadstone.core.api.endpoint import BodyOptions
from loadstone.core.errors import LoadstoneError, RefusedError, UnreachableError
from loadstone.core.target import Break, Exchange, Request
from loadstone.measure import probe as probing
from loadstone.measure.calibrate import calibrate
from loadstone.measure.probe import first_model, probe, rehearse, when_ready

BASE = "http://server:8000"


class Answer(NamedTuple):
    status: int
    body: bytes


class FakeServer:
    """Counts tokens as ``overhead + len(text split by unit)``; says no where it is told to."""

    def __init__(self, unit: str = "word", overhead: int = 12, usage: bool = True, headers: bytes = b"fake") -> None:
        self.bodies: list[dict[str, Any]] = []
        self.no: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
        self.broken: Break | None = None
        self.models = Answer(200, b'{"data":[{"id":"m"},{"id":"n"}]}')
        self._unit, self._overhead, self._usage, self._server = unit, overhead, usage, headers

    def count(self, body: dict[str, Any]) -> int:
        if "query" in body:
            return sum(len(body["query"].split()) + len(text.split()) + 3 for text in body["documents"])
        text = body["messages"][0]["content"] if "messages" in body else body.get("prompt", body.get("input"))
        return self._overhead + (len(text) if self._unit == "byte" else len(re.findall(r"\w+", text)))

    async def send(self, request: Request) -> Exchange:
        body = msgspec.json.decode(request.body)
        self.bodies.append(body)
        exchange = Exchange(request)
        exchange.sent_ns, exchange.end_ns, exchange.broken = 1_000, 1_000 + 2_000_000, self.broken
        exchange.headers = {b"server": self._server, b"content-type": b"application/json"}
        refusal = self.no(body)
        if self.broken is not None:
            exchange.error = "told to"
        elif refusal:
            exchange.status = refusal[0]
            exchange.log.append(2_000, msgspec.json.encode({"error": {"message": refusal[1]}}))
        else:
            exchange.status = 200
            self._answer(exchange, body)
        return exchange

    def _answer(self, exchange: Exchange, body: dict[str, Any]) -> None:
        usage = {"usage": {"prompt_tokens": self.count(body), "completion_tokens": 1}} if self._usage else {}
        if not body.get("stream"):
            answers = {"choices": [{"message": {"content": "x"}}], "data": [{}], "results": [{}]}
            exchange.log.append(2_000, msgspec.json.encode(answers | usage))
            return
        exchange.headers[b"content-type"] = b"text/event-stream"
        chunk = {"choices": [{"delta": {"content": "x"}, "text": "x", "finish_reason": "length"}]}
        exchange.log.append(501_000, b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        if "stream_options" in body:
            exchange.log.append(502_000, b"data: " + msgspec.json.encode({"choices": []} | usage) + b"\n\n")
        exchange.log.append(503_000, b"data: [DONE]\n\n")

    async def fetch(self, method: str, path: str) -> Answer:
        assert (method, path) == ("GET", "/v1/models")
        return self.models


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_PAUSE_S", 0.0)
    monkeypatch.setattr(probing, "_READY_PAUSE_S", 0.0)


def run_probe(server: FakeServer, name: str = "chat", model: str = "m") -> probing.ProbeResult:
    endpoint = ENDPOINTS[name]
    options = BodyOptions(model=model, stream=endpoint.streams, ignore_eos=True)
    return asyncio.run(probe(server.send, server.fetch, endpoint, endpoint.path, options, BASE))


def rejecting(*fields: str, naming: bool) -> Callable[[dict[str, Any]], tuple[int, str] | None]:
    def no(body: dict[str, Any]) -> tuple[int, str] | None:
        wrong = [field for field in fields if field in body]
        return (400, f"unknown field {wrong[0]}" if naming else "bad request") if wrong else None

    return no


def test_a_server_that_takes_everything() -> None:
    result = run_probe(FakeServer())
    assert (result.e2e_s, result.ttft_s) == (0.002, 0.0005)
    assert result.streams
    assert result.has_usage
    assert not result.through_gate
    assert not result.notes
    assert not result.options.dropped


@pytest.mark.parametrize("name", ["embeddings", "rerank"])
def test_endpoints_that_do_not_stream(name: str) -> None:
    result = run_probe(FakeServer(), name)
    assert (result.streams, result.ttft_s, result.has_usage) == (False, None, True)


@pytest.mark.parametrize("naming", [True, False])
@pytest.mark.parametrize("fields", [("stream_options",), ("ignore_eos",), ("stream_options", "ignore_eos")])
def test_fields_that_the_server_rejects_are_left_out_and_said(fields: tuple[str, ...], naming: bool) -> None:
    server = FakeServer()
    server.no = rejecting(*fields, naming=naming)
    result = run_probe(server)
    assert result.options.dropped == set(fields)
    assert result.notes == tuple(f"the server rejects {name}: measured without it" for name in sorted(fields))
    assert not set(server.bodies[-1]) & set(fields)


def test_min_tokens_of_an_extra_body_is_left_out_too() -> None:
    server = FakeServer()
    server.no = rejecting("min_tokens", naming=True)
    options = BodyOptions(model="m", extra={"min_tokens": 5})
    chat = ENDPOINTS["chat"]
    result = asyncio.run(probe(server.send, server.fetch, chat, chat.path, options, BASE))
    assert result.options.dropped == {"min_tokens"}


def test_a_gate_is_recognised() -> None:
    assert run_probe(FakeServer(headers=b"loadstone")).through_gate


@pytest.mark.parametrize(
    ("status", "message", "model", "error", "text"),
    [
        (401, "no key", "m", RefusedError, "--api-key"),
        (403, "no key", "m", RefusedError, "--api-key"),
        (404, "no such model", "z", RefusedError, "no model 'z' .* it has: m, n"),
        (404, "Not Found", "m", RefusedError, "does not serve /v1/chat/completions .* check --base-url"),
        (400, "context too long", "m", RefusedError, "rejects the first request .*context too long"),
        (503, "Loading model", "m", RefusedError, "Loading model.* wait until it is ready"),
        (500, "boom", "m", RefusedError, "HTTP 500: boom"),
    ],
)
def test_a_no_is_explained(status: int, message: str, model: str, error: type[LoadstoneError], text: str) -> None:
    server = FakeServer()
    server.no = lambda body: (status, message)
    with pytest.raises(error, match=text) as caught:
        run_probe(server, model=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", list(Break))
def test_no_conversation_is_unreachable(broken: Break) -> None:
    server = FakeServer()
    server.broken = broken
    with pytest.raises(UnreachableError):
        run_probe(server)


def test_html_is_unreachable() -> None:
    server = FakeServer()

    async def send(request: Request) -> Exchange:
        exchange = Exchange(request)
        exchange.status, exchange.end_ns, exchange.headers = 200, 1, {b"content-type": b"text/html"}
        exchange.log.append(1, b"<title>Welcome to nginx!</title>")
        return exchange

    server.send = send  # type: ignore[method-assign]
    with pytest.raises(UnreachableError, match="got text/html: Welcome to nginx!"):
        run_probe(server)


def test_a_stray_error_is_no_verdict() -> None:
    server = FakeServer()
    server.no = lambda body: (500, "stray") if len(server.bodies) < 3 else None
    assert run_probe(server).has_usage
    assert len(server.bodies) == 3


def test_the_first_model() -> None:
    server = FakeServer()
    assert asyncio.run(first_model(server.fetch, ENDPOINTS["chat"])) == "m"
    for body in (b'{"data":[]}', b"<html>"):
        server.models = Answer(200, body)
        with pytest.raises(RefusedError, match="--model"):
            asyncio.run(first_model(server.fetch, ENDPOINTS["chat"]))
        assert asyncio.run(first_model(server.fetch, ENDPOINTS["embed_text"])) == "unnamed"
    server.models = Answer(401, b"")
    with pytest.raises(RefusedError, match="--api-key"):
        asyncio.run(first_model(server.fetch, ENDPOINTS["chat"]))


def test_waiting_until_the_server_is_ready() -> None:
    tries = []

    async def attempt() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise UnreachableError("not yet")
        return 7

    assert asyncio.run(when_ready(attempt, 60.0)) == 7
    tries.clear()
    with pytest.raises(UnreachableError, match="not yet"):
        asyncio.run(when_ready(attempt, -1.0))
    assert len(tries) == 1


# -- calibration


@pytest.mark.parametrize(("unit", "overhead"), [("word", 0), ("word", 31), ("byte", 0), ("byte", 40), ("byte", 7)])
@pytest.mark.parametrize("name", ["chat", "completions", "embeddings"])
@pytest.mark.parametrize("prefix", [0, 20])
def test_prompts_are_as_long_as_the_server_counts(unit: str, overhead: int, name: str, prefix: int) -> None:
    server = FakeServer(unit, overhead)
    endpoint = ENDPOINTS[name]
    sized = asyncio.run(calibrate(server.send, endpoint, "/x", BodyOptions(model="m"), 3, 200, prefix))
    assert not sized.notes
    assert len(server.bodies) == 3
    for tokens in (199, 200, 201, 202, 203, 512):
        text = sized.texts.text(0, 5, tokens)
        key = {"chat": "messages", "completions": "prompt", "embeddings": "input"}[name]
        assert server.count({key: [{"content": text}] if name == "chat" else text}) == tokens + prefix


def test_rerank_documents_have_their_own_length() -> None:
    server = FakeServer()
    sized = asyncio.run(calibrate(server.send, ENDPOINTS["rerank"], "/x", BodyOptions(model="m"), 3, 200))
    assert len(sized.texts.text(0, 0, 200).split()) == 200


def test_without_usage_a_word_is_a_token_and_it_is_said() -> None:
    server = FakeServer(usage=False)
    sized = asyncio.run(calibrate(server.send, ENDPOINTS["chat"], "/x", BodyOptions(model="m"), 3, 200))
    assert len(sized.texts.text(0, 0, 200).split()) == 200
    assert "no usage" in sized.notes[0]


def test_a_prompt_shorter_than_the_template_is_said() -> None:
    server = FakeServer(overhead=50)
    sized = asyncio.run(calibrate(server.send, ENDPOINTS["chat"], "/x", BodyOptions(model="m"), 3, 20))
    assert sized.notes == ("a prompt asked for as 20 tokens is 51 by the server's count",)


def test_a_prompt_that_is_too_long_is_refused_in_one_line() -> None:
    server = FakeServer()
    server.no = lambda body: (400, "maximum context is 100") if server.count(body) > 100 else None
    with pytest.raises(RefusedError, match="maximum context is 100"):
        asyncio.run(calibrate(server.send, ENDPOINTS["chat"], "/x", BodyOptions(model="m"), 3, 500))


def test_rehearsal() -> None:
    server = FakeServer()
    chat = ENDPOINTS["chat"]
    request = Request(path="/x", body=chat.build(probing.probe_prompt(chat, 5), 1, BodyOptions(model="m")), index=0)
    rehearsal = asyncio.run(rehearse(server.send, chat, request))
    assert (rehearsal.e2e_s, rehearsal.ttft_s, rehearsal.streams, rehearsal.has_usage) == (0.002, 0.0005, True, True)
    server.no = lambda body: (400, "too long")
    with pytest.raises(RefusedError, match="too long"):
        asyncio.run(rehearse(server.send, chat, request))
