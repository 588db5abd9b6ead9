"""Replies good and bad: outcome, one line of text, and the times that count."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.api import ENDPOINTS
from loadstone.core.api.endpoint import BodyOptions, Prompt
from loadstone.core.api.messages import message_of
from loadstone.core.api.reading import ContentWatch, read, to_record
from loadstone.core.records import Outcome
from loadstone.core.target import Break, Exchange, Request

CHAT = ENDPOINTS["chat"]
SSE = b"text/event-stream; charset=utf-8"
JSON = b"application/json"

ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
HELLO = b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\n'
THINK = b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
THINK_NEW = b'data: {"choices":[{"delta":{"reasoning":"hm"}}]}\n\n'
TOOL = b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def exchange_of(*pieces: bytes, status: int = 200, content_type: bytes = SSE, broken: Break | None = None) -> Exchange:
    """Sent at 1,000 ns; piece i received at 1,010 + 10·i."""
    exchange = Exchange(Request(path="/x", body=b"{}", index=4, input_tokens=5))
    exchange.slot, exchange.planned_ns, exchange.sent_ns, exchange.status = 2, 900, 1_000, status
    exchange.headers = {b"content-type": content_type}
    for position, piece in enumerate(pieces):
        exchange.log.append(1_010 + 10 * position, piece)
    exchange.log.seal()
    exchange.end_ns = 1_010 + 10 * len(pieces)
    exchange.broken = broken
    return exchange


def test_a_stream_and_its_times() -> None:
    reply = read(exchange_of(ROLE, HELLO, HELLO, STOP, USAGE, DONE), CHAT, keep_text=True)
    assert reply.outcome is Outcome.OK
    assert (reply.first_choice_ns, reply.first_content_ns, reply.last_choice_ns) == (1_010, 1_020, 1_040)
    assert reply.choice_gaps_ns == [10, 10, 10]
    assert (reply.input_tokens, reply.output_tokens, reply.chunks, reply.text) == (7, 3, 2, "hellohello")


@pytest.mark.parametrize("first", [HELLO, THINK, THINK_NEW, TOOL])
def test_content_reasoning_and_tool_calls_are_the_first_token(first: bytes) -> None:
    assert read(exchange_of(ROLE, first, STOP, DONE), CHAT).first_content_ns == 1_020


def test_an_event_has_the_stamp_of_the_read_that_completed_it() -> None:
    assert read(exchange_of(HELLO[:9], HELLO[9:-1], HELLO[-1:], STOP), CHAT).first_content_ns == 1_030


@pytest.mark.parametrize(
    ("pieces", "outcome", "error"),
    [
        ((HELLO, STOP), Outcome.OK, ""),
        ((HELLO, DONE), Outcome.OK, ""),
        ((HELLO, STOP, DONE, DONE, DONE), Outcome.OK, ""),
        ((HELLO, STOP, b"data: [DONE]"), Outcome.OK, ""),
        ((HELLO, STOP, DONE, b": bye"), Outcome.OK, ""),
        ((ROLE, STOP, DONE), Outcome.OK, ""),
        ((HELLO + HELLO + STOP + DONE,), Outcome.OK, ""),
        ((HELLO,), Outcome.MALFORMED, "the stream ended without finish_reason or [DONE]"),
        ((HELLO, STOP[:30]), Outcome.MALFORMED, "the stream ended in half an event"),
        ((HELLO, b"data: {no json}\n\n", DONE), Outcome.MALFORMED, "event 2 of the stream cannot be read"),
        ((HELLO, b"data: \xff\xfe\n\n", DONE), Outcome.MALFORMED, "event 2 of the stream cannot be read"),
        ((HELLO, b'data: {"choices": 7}\n\n', DONE), Outcome.MALFORMED, "event 2 of the stream cannot be read"),
        (
            (HELLO, b'data: {"error":{"message":"out of\\nblocks"}}\n\n', DONE),
            Outcome.MALFORMED,
            "error event in the stream: out of blocks",
        ),
        ((), Outcome.MALFORMED, "the stream ended without finish_reason or [DONE]"),
    ],
)
def test_how_a_stream_ends(pieces: tuple[bytes, ...], outcome: Outcome, error: str) -> None:
    reply = read(exchange_of(*pieces), CHAT)
    assert reply.outcome is outcome
    assert reply.error.startswith(error)
    assert bool(reply.error) is bool(error)


def test_a_reply_without_content_is_a_success_without_ttft() -> None:
    record = to_record(exchange_of(ROLE, STOP, DONE), CHAT, t0_ns=0)
    assert record.ok
    assert (record.ttft_s, record.output_tokens, record.input_tokens, record.chunks) == (None, None, 5, 0)
    assert record.first_choice_s is not None


@pytest.mark.parametrize(
    ("status", "body", "content_type", "outcome", "error"),
    [
        (429, b'{"error":{"message":"slow down"}}', JSON, Outcome.REFUSED, "HTTP 429: slow down"),
        (503, b"", b"", Outcome.REFUSED, "HTTP 503"),
        (500, b'{"error":"boom"}', JSON, Outcome.HTTP_ERROR, "HTTP 500: boom"),
        (400, b'{"object":"error","message":"bad","code":400}', JSON, Outcome.HTTP_ERROR, "HTTP 400: bad"),
        (404, b'{"detail":"Not Found"}', JSON, Outcome.HTTP_ERROR, "HTTP 404: Not Found"),
        (
            422,
            b'{"detail":[{"loc":["body","ignore_eos"],"msg":"extra"}]}',
            JSON,
            Outcome.HTTP_ERROR,
            "HTTP 422: extra (body.ignore_eos)",
        ),
        (502, b"<html><title>Bad\nGateway</title>", b"text/html", Outcome.HTTP_ERROR, "HTTP 502: Bad Gateway"),
        (301, b"", b"", Outcome.HTTP_ERROR, "HTTP 301"),
        (
            200,
            b"<html><title>Welcome</title></html>",
            b"text/html",
            Outcome.MALFORMED,
            "expected an event stream or JSON, got text/html: Welcome",
        ),
        (200, b"", b"", Outcome.MALFORMED, "the body is empty (no content-type)"),
        (200, b'{"ok":true}', JSON, Outcome.MALFORMED, 'JSON that is no chat reply: {"ok":true}'),
        (200, b'{"error":{"message":"no"}}', JSON, Outcome.MALFORMED, "an error in a 200 reply: no"),
    ],
)
def test_responses_that_are_no_stream(
    status: int, body: bytes, content_type: bytes, outcome: Outcome, error: str
) -> None:
    reply = read(exchange_of(body, status=status, content_type=content_type), CHAT)
    assert (reply.outcome, reply.error) == (outcome, error)


def test_messages_are_one_short_line() -> None:
    line = message_of(msgspec.json.encode({"error": {"message": "x\n" * 500}}))
    assert len(line) == 200
    assert "\n" not in line


def test_a_whole_json_reply_to_a_stream_request_is_a_success() -> None:
    body = b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":1}}'
    reply = read(exchange_of(body, content_type=JSON), CHAT, keep_text=True)
    assert reply.outcome is Outcome.OK
    assert (reply.first_content_ns, reply.output_tokens, reply.text) == (None, 1, "hi")


@pytest.mark.parametrize("broken", list(Break))
def test_every_break_is_an_outcome_with_a_text(broken: Break) -> None:
    reply = read(exchange_of(ROLE, HELLO, broken=broken), CHAT)
    assert reply.outcome is not Outcome.OK
    assert reply.error
    assert reply.first_content_ns == 1_020


def test_a_cut_after_done_takes_nothing_and_an_error_status_outlives_it() -> None:
    assert read(exchange_of(HELLO, STOP, DONE, broken=Break.DISCONNECT), CHAT).outcome is Outcome.OK
    assert read(exchange_of(HELLO, STOP, broken=Break.DISCONNECT), CHAT).outcome is Outcome.DISCONNECT
    refused = exchange_of(b'{"err', status=503, content_type=JSON, broken=Break.DISCONNECT)
    assert read(refused, CHAT).outcome is Outcome.REFUSED


def test_a_request_never_sent_ends_where_it_began() -> None:
    exchange = Exchange(Request(path="/x", body=b"", index=0))
    exchange.planned_ns, exchange.end_ns, exchange.broken, exchange.error = 5, 2_000_000_000, Break.CONNECT, "refused"
    record = to_record(exchange, CHAT, t0_ns=0)
    assert (record.outcome, record.e2el_s, record.sent_s, record.error) == (Outcome.REFUSED, 0.0, 2.0, "refused")


def test_the_record_counts_from_the_actual_send() -> None:
    exchange = exchange_of(HELLO, HELLO, STOP, DONE)
    exchange.headers |= {b"retry-after": b"3", b"x-loadstone-reason": b"queue_full"}
    exchange.turnaround_ns, exchange.lag_ns = 50, 70
    record = to_record(exchange, CHAT, t0_ns=500)
    assert record.planned_s == pytest.approx(400e-9)
    assert record.sent_s == pytest.approx(500e-9)
    assert record.ttft_s == record.first_choice_s == pytest.approx(10e-9)
    assert record.last_choice_s == pytest.approx(30e-9)
    assert record.itls_s == pytest.approx([10e-9, 10e-9])
    assert (record.retry_after_s, record.reason, record.slot) == (3.0, "queue_full", 2)
    assert (record.turnaround_s, record.lag_s) == pytest.approx((50e-9, 70e-9))


@pytest.mark.parametrize(
    ("name", "body", "tokens"),
    [
        ("embeddings", b'{"data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":9,"total_tokens":9}}', 9),
        ("rerank", b'{"results":[{"index":0,"relevance_score":0.5}],"usage":{"total_tokens":11}}', 11),
        ("embed_text", b'{"embeddings":[[0.1]],"dim":1,"model":"m"}', None),
        ("embed_image", b'{"embeddings":[[0.1]],"dim":1,"usage":{"prompt_tokens":5}}', 5),
    ],
)
def test_pooling_replies(name: str, body: bytes, tokens: int | None) -> None:
    reply = read(exchange_of(body, content_type=JSON), ENDPOINTS[name])
    assert (reply.outcome, reply.input_tokens) == (Outcome.OK, tokens)
    assert read(exchange_of(b'{"data":[],"results":[],"embeddings":[]}', content_type=JSON), ENDPOINTS[name]).error


@given(st.lists(st.integers(1, 40), max_size=30), st.sampled_from([True, False]))
def test_content_watch_sees_what_reading_sees(lengths: list[int], speaks: bool) -> None:
    stream = ROLE + (HELLO if speaks else ROLE) + STOP + DONE
    exchange = exchange_of()
    watch = ContentWatch(exchange, CHAT)
    start = 0
    for position, length in enumerate([*lengths, len(stream)]):
        exchange.log.append(1_010 + position, stream[start : start + length])
        start += length
        seen = watch.first_content_ns()
        assert seen == watch.first_content_ns()
    assert watch.first_content_ns() == read(exchange, CHAT).first_content_ns
    assert (watch.first_content_ns() is not None) is speaks


def build(name: str, prompt: Prompt, options: BodyOptions, output_tokens: int | None = 8) -> object:
    return msgspec.json.decode(ENDPOINTS[name].build(prompt, output_tokens, options))


def test_bodies() -> None:
    options = BodyOptions(model="m", ignore_eos=True, extra={"temperature": 0, "max_tokens": 9})
    assert build("chat", Prompt(("hi",)), options) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
    }
    plain = BodyOptions(model="m", dropped=frozenset({"stream_options"}))
    assert build("completions", Prompt(("hi",)), plain) == {
        "model": "m",
        "prompt": "hi",
        "max_tokens": 8,
        "stream": True,
    }
    assert build("embeddings", Prompt(("a",)), options, None) == {
        "model": "m",
        "input": "a",
        "temperature": 0,
        "max_tokens": 9,
    }
    assert build("embeddings", Prompt(("a", "b")), plain) == {"model": "m", "input": ["a", "b"]}
    assert build("embed_text", Prompt(("a",)), plain) == {"text": "a"}
    assert build("embed_text", Prompt(("a", "b")), plain) == {"texts": ["a", "b"]}
    assert build("embed_image", Prompt(("iVBO",)), plain) == {"image": "iVBO"}
    assert build("embed_image", Prompt(("iVBO", "iVBP")), plain) == {"images": ["iVBO", "iVBP"]}
    assert build("rerank", Prompt(("q", "a", "b")), plain) == {"model": "m", "query": "q", "documents": ["a", "b"]}
    chat = Prompt(messages=[{"role": "system", "content": "s"}])
    assert build("chat", chat, BodyOptions(model="m", stream=False), None) == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}],
    }
