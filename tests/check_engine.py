"""What every chat engine must do, whoever wrote it: run over HTTP against its base URL.

Each check is a function of one ``Engine``; ``CHECKS`` lists them for ``pytest.mark.parametrize``. Where an engine is
known to differ, its ``Engine`` says so and the check holds it to that instead: nothing is left out in silence.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from processes import fetch, open_reply, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "Tell me more, please."
TOKENS = 24
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Engine:
    """An engine under test, with what is known of it."""

    base_url: str
    model: str
    slots: int
    """Requests it generates at once."""
    context_tokens: int
    """Room of one request, prompt and reply together."""
    running: Callable[[], float]
    """Requests in the engine now, running or waiting."""
    generated: Callable[[], float]
    """Tokens that it has generated so far, whoever they were for."""
    checks_model: bool = True
    """Refuses a model name that is not its own."""
    refuses_over_long_reply: bool = False
    """Refuses a prompt that fits with a max_tokens that does not, instead of ending the reply where the room ends."""
    over_long: tuple[str, str] = ("code", "context_length_exceeded")
    """By which key of the error, and what it says, a prompt that does not fit is known."""
    usage_rides: bool = False
    """The usage of a plain completion's stream comes with its last choice, not in an event of its own."""
    loses_held_text: bool = False
    """A stream that ends at its full length while the end of the text could begin a stop string loses that end."""
    finishes_documents: bool = False
    """A reply that is not streamed is computed to its end, whoever has left."""
    lenient: frozenset[str] = frozenset()
    """Wrong values, by their name in ``WRONG``, that are taken in silence."""
    unnamed: frozenset[str] = frozenset()
    """Wrong values that are refused without a word about the key."""
    counts_stop: bool = True
    """The tokens of a stop string are counted in completion_tokens."""


class Streamed(NamedTuple):
    """One stream, read to its end."""

    roles: list[str]
    pieces: list[str]
    finish_reasons: list[str]
    usage: dict[str, Any] | None
    order: list[str]
    """role | content | finish | usage | done, as they came; runs of one kind once."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "messages is a text": ("messages", {"messages": "hello"}),
    "messages is empty": ("messages", {"messages": []}),
    "max_tokens is a text": ("max_tokens", {"max_tokens": "many"}),
    "max_tokens is negative": ("max_tokens", {"max_tokens": -5}),
    "temperature is a text": ("temperature", {"temperature": "hot"}),
    "temperature is negative": ("temperature", {"temperature": -1}),
    "top_p is above 1": ("top_p", {"top_p": 1.5}),
    "stop is a number": ("stop", {"stop": 5}),
    "stream is a text": ("stream", {"stream": "yes"}),
}


def body_of(engine: Engine, path: str = CHAT, **keys: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if path == CHAT else {"prompt": PROMPT}
    return {"model": engine.model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **asked, **keys}


def ask(engine: Engine, path: str = CHAT, **keys: Any) -> dict[str, Any]:
    """The document that answers a request that does not stream."""
    answer = fetch(engine.base_url, path, body_of(engine, path, **keys))
    assert answer.status == 200, answer.body
    document: dict[str, Any] = json.loads(answer.body.decode("utf-8", errors="strict"))
    return document


def text_of(document: dict[str, Any]) -> str:
    (choice,) = document["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def stream(engine: Engine, path: str = CHAT, **keys: Any) -> Streamed:
    keys = {"stream": True, "stream_options": {"include_usage": True}} | keys
    with open_reply(engine.base_url, path, body_of(engine, path, **keys)) as reply:
        assert reply.status == 200, reply.read()
        assert reply.headers.get_content_type() == "text/event-stream"
        return _read(reply.read().decode("utf-8", errors="strict"))


def refused(engine: Engine, status: int, path: str = CHAT, **keys: Any) -> dict[str, Any]:
    """The error that a request must be refused with."""
    answer = fetch(engine.base_url, path, body_of(engine, path, **keys))
    assert answer.status == status, (answer.status, answer.body)
    error: dict[str, Any] = answer.document["error"]
    assert error["message"]
    return error


def check_health_and_models(engine: Engine) -> None:
    assert fetch(engine.base_url, "/health").status == 200
    models = fetch(engine.base_url, "/v1/models").document
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == [engine.model]


def check_a_stream_has_its_order(engine: Engine) -> None:
    with_usage = stream(engine)
    assert with_usage.order == ["role", "content", "finish", "usage", "done"]
    assert with_usage.roles == ["assistant"]
    assert len(with_usage.pieces) > 1
    assert with_usage.finish_reasons == ["length"]
    assert stream(engine, stream_options=None).order == ["role", "content", "finish", "done"]
    ends = ["finish", "done"] if engine.usage_rides else ["finish", "usage", "done"]
    assert stream(engine, COMPLETIONS).order == ["content", *ends]


def check_a_stream_says_what_a_document_says(engine: Engine) -> None:
    for path in (CHAT, COMPLETIONS):
        document, streamed = ask(engine, path), stream(engine, path)
        assert text_of(document) == streamed.text
        assert [document["choices"][0]["finish_reason"]] == streamed.finish_reasons
        assert streamed.usage is not None
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert document["usage"][key] == streamed.usage[key]


def check_max_tokens_and_usage_are_exact(engine: Engine) -> None:
    for path in (CHAT, COMPLETIONS):
        prompts = set()
        for tokens in (1, 2, 7):
            document = ask(engine, path, max_tokens=tokens)
            usage = document["usage"]
            assert usage["completion_tokens"] == tokens
            assert usage["total_tokens"] == usage["prompt_tokens"] + tokens
            assert document["choices"][0]["finish_reason"] == "length"
            prompts.add(usage["prompt_tokens"])
        assert len(prompts) == 1
    assert ask(engine, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def check_stop_strings_are_never_said(engine: Engine) -> None:
    whole = text_of(ask(engine))
    several = whole[5:9]
    for stop in (whole[3], several, [several], ["no such thing", several]):
        first = stop[-1] if isinstance(stop, list) else stop
        before = whole[: whole.index(first)]
        document, streamed = ask(engine, stop=stop), stream(engine, stop=stop)
        assert text_of(document) == streamed.text == before
        assert [document["choices"][0]["finish_reason"]] == streamed.finish_reasons == ["stop"]
        assert streamed.usage is not None
        assert document["usage"]["completion_tokens"] == streamed.usage["completion_tokens"] <= TOKENS
        if engine.counts_stop:
            # A token is a character in the models under test.
            assert streamed.usage["completion_tokens"] == len(before) + len(first)


def check_the_beginning_of_a_stop_string_is_said_after_all(engine: Engine) -> None:
    whole = text_of(ask(engine))
    almost = whole[-3:] + "\x01"
    assert text_of(ask(engine, stop=almost)) == whole
    streamed = stream(engine, stop=almost).text
    assert streamed == whole or (engine.loses_held_text and whole.startswith(streamed))


def check_leaving_frees_the_slot(engine: Engine) -> None:
    """What nobody waits for is not computed to its end, and what comes next runs at once."""
    before = engine.generated()
    for _ in range(2):
        with _streams(engine, engine.slots):
            pass
    with _streams(engine, engine.slots):
        assert engine.running() <= engine.slots
    until(lambda: engine.running() == 0)
    assert engine.generated() - before < 3 * engine.slots * _endless(engine) / 2
    assert ask(engine, max_tokens=2)["usage"]["completion_tokens"] == 2


def check_leaving_before_a_document_frees_the_slot(engine: Engine) -> None:
    """The same where the reply is not streamed."""
    before = engine.generated()
    tokens = 512 if engine.finishes_documents else _endless(engine)
    where = urlsplit(engine.base_url)
    connection = HTTPConnection(str(where.hostname), where.port)
    connection.request("POST", CHAT, json.dumps(body_of(engine, max_tokens=tokens)), JSON)
    until(lambda: engine.running() > 0)
    connection.close()
    until(lambda: engine.running() == 0)
    assert (engine.generated() - before >= tokens) == engine.finishes_documents


def check_slots_advance_together(engine: Engine) -> None:
    """All slots are under way at once, and one request more waits until a place is free."""
    with ThreadPoolExecutor(1) as pool:
        with _streams(engine, engine.slots) as replies:
            waiting = pool.submit(ask, engine, max_tokens=2)
            until(lambda: engine.running() == engine.slots + 1)
            for _ in range(3):
                for reply in replies:
                    _next_event(reply)
            assert not waiting.done()
        assert waiting.result()["usage"]["completion_tokens"] == 2


def check_many_at_once_say_what_one_says(engine: Engine) -> None:
    alone = text_of(ask(engine))
    with ThreadPoolExecutor(3 * engine.slots) as pool:
        told = list(pool.map(lambda _: stream(engine), range(3 * engine.slots)))
    assert [len(one.text) for one in told] == [len(alone)] * len(told)
    assert {one.usage["completion_tokens"] for one in told if one.usage} == {TOKENS}


def check_an_over_long_prompt_is_refused(engine: Engine) -> None:
    long = "x" * (2 * engine.context_tokens)
    asks: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": long}]},
        COMPLETIONS: {"prompt": long},
    }
    for path, asked in asks.items():
        for streaming in (False, True):
            error = refused(engine, 400, path, stream=streaming, **asked)
            key, says = engine.over_long
            assert error[key] == says


def check_a_reply_ends_where_the_room_ends(engine: Engine) -> None:
    if engine.refuses_over_long_reply:
        refused(engine, 400, max_tokens=2 * engine.context_tokens)
        return
    messages = [{"role": "user", "content": "x" * (engine.context_tokens - 128)}]
    document = ask(engine, messages=messages, max_tokens=2 * engine.context_tokens)
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["total_tokens"] in (engine.context_tokens, engine.context_tokens + 1)


def check_wrong_types_are_refused(engine: Engine) -> None:
    for name, (param, keys) in WRONG.items():
        answer = fetch(engine.base_url, CHAT, body_of(engine, **keys))
        if name in engine.lenient:
            assert answer.status == 200, name
        else:
            assert answer.status == 400, (name, answer.status, answer.body)
            error = answer.document["error"]
            named = param in (error.get("param") or "") or param in error["message"]
            assert named != (name in engine.unnamed), (name, answer.body)
    assert fetch(engine.base_url, CHAT, {"model": engine.model}).status == 400


def check_an_unknown_model_is_told(engine: Engine) -> None:
    if not engine.checks_model:
        assert ask(engine, model="no-such-model", max_tokens=1)["usage"]["completion_tokens"] == 1
        return
    assert "no-such-model" in refused(engine, 404, model="no-such-model")["message"]


def check_text_is_whole(engine: Engine) -> None:
    """A prompt of many scripts is taken, and no reply holds half a character."""
    messages = [{"role": "user", "content": "héllo 你好 👩‍🚀"}]
    for temperature in (0, 1):
        streamed = stream(engine, messages=messages, temperature=temperature)
        assert "\ufffd" not in streamed.text
        assert streamed.text


CHECKS: list[Callable[[Engine], None]] = [
    check_health_and_models,
    check_a_stream_has_its_order,
    check_a_stream_says_what_a_document_says,
    check_max_tokens_and_usage_are_exact,
    check_stop_strings_are_never_said,
    check_the_beginning_of_a_stop_string_is_said_after_all,
    check_leaving_frees_the_slot,
    check_leaving_before_a_document_frees_the_slot,
    check_slots_advance_together,
    check_many_at_once_say_what_one_says,
    check_an_over_long_prompt_is_refused,
    check_a_reply_ends_where_the_room_ends,
    check_wrong_types_are_refused,
    check_an_unknown_model_is_told,
    check_text_is_whole,
]


@contextmanager
def _streams(engine: Engine, count: int) -> Iterator[list[HTTPResponse]]:
    """Streams that would fill the engine's room, each of which has said something; leaving hangs up on all."""
    body = body_of(engine, max_tokens=_endless(engine), stream=True)
    with ExitStack() as open_ones:
        replies = [open_ones.enter_context(open_reply(engine.base_url, CHAT, body)) for _ in range(count)]
        for reply in replies:
            _next_event(reply)
        yield replies


def _endless(engine: Engine) -> int:
    """Tokens of a reply that takes far longer than hanging up."""
    return engine.context_tokens - 256


def _next_event(reply: HTTPResponse) -> None:
    assert reply.readline().startswith(b"data: {")
    assert reply.readline().strip() == b""


def _read(text: str) -> Streamed:
    read = Streamed([], [], [], None, [])
    for line in text.splitlines():
        if line.startswith("data: "):
            read = _with_event(read, line.removeprefix("data: "))
    return read._replace(order=[kind for kind, last in pairwise([*reversed(read.order), ""]) if kind != last][::-1])


def _with_event(read: Streamed, data: str) -> Streamed:
    if data == "[DONE]":
        read.order.append("done")
        return read
    document = json.loads(data)
    read = read._replace(usage=document.get("usage") or read.usage)
    if not document["choices"]:
        read.order.append("usage")
        return read
    (choice,) = document["choices"]
    said = choice.get("delta", choice)
    if said.get("role"):
        read.roles.append(said["role"])
        read.order.append("role")
    if piece := said.get("content") or said.get("text"):
        read.pieces.append(piece)
        read.order.append("content")
    if choice["finish_reason"] is not None:
        read.finish_reasons.append(choice["finish_reason"])
        read.order.append("finish")
    return read
