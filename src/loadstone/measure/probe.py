"""The request that goes first: is the server there, does it take what we send, and how long does one request take?

A level must not fail for a field that the server doesn't know, or for a missing key. So what a level would count as
failures is said here in one line before anything is measured.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol, TypeVar

import msgspec

from loadstone.core.api.endpoint import OPTIONAL_FIELDS, BodyOptions, Endpoint, Prompt
from loadstone.core.api.reading import Reply, read
from loadstone.core.errors import LoadstoneError, RefusedError, UnreachableError
from loadstone.core.records import Outcome
from loadstone.core.target import Break, Exchange, Request
from loadstone.measure.pictures import PictureTexts
from loadstone.measure.texts import PROBES, pick_words

T = TypeVar("T")

Send = Callable[[Request], Awaitable[Exchange]]
"""Sends one request and waits for its end; a failure is in the exchange."""

PROBE_WORDS = 8
UNNAMED = "unnamed"
PROBE_OUTPUT_TOKENS = 4
_TRIES = 3
_PAUSE_S = 0.5
_READY_PAUSE_S = 1.0
_EVENTS = b"text/event-stream"
_STRAY = frozenset({Outcome.REFUSED, Outcome.HTTP_ERROR, Outcome.DISCONNECT, Outcome.MALFORMED})


class Fetched(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> bytes: ...


Fetch = Callable[[str, str], Awaitable[Fetched]]
"""(method, path) → the answer; raises UnreachableError where none comes."""


@dataclass(frozen=True)
class ProbeResult:
    """What the first request has told."""

    options: BodyOptions
    """Without the fields that the server rejects."""
    e2e_s: float
    ttft_s: float | None
    streams: bool
    """Content came in a stream, so there is a TTFT to judge."""
    has_usage: bool
    """The reply carried the number of tokens."""
    through_gate: bool
    """A Loadstone gate answered: it would measure itself."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsal:
    """One request of the workload, alone: what a level expects of the first replies."""

    e2e_s: float
    ttft_s: float | None
    streams: bool
    has_usage: bool


def probe_prompt(endpoint: Endpoint, words: int, position: int = 0) -> Prompt:
    """A prompt of ``words`` words; for rerank that is the document, behind a short query; an image has none."""
    if endpoint.name == "embed_image":
        return Prompt((PictureTexts(0).text(PROBES, position, 0),))
    text = " ".join(pick_words(0, PROBES, position, words))
    return Prompt(("what", text)) if endpoint.name == "rerank" else Prompt((text,))


async def probe(
    send: Send, fetch: Fetch, endpoint: Endpoint, path: str, options: BodyOptions, base_url: str
) -> ProbeResult:
    """Send one small request, without the optional fields that the server rejects.

    Raises UnreachableError where no conversation is possible and RefusedError where the answer stays a no. A stray
    error is no verdict: three tries.
    """

    async def ask(dropped: frozenset[str]) -> tuple[Exchange, Reply]:
        tried = replace(options, dropped=options.dropped | dropped)
        return await _ask(send, endpoint, path, tried)

    exchange, reply = await ask(frozenset())
    dropped: frozenset[str] = frozenset()
    if exchange.status in (400, 422) and reply.outcome is Outcome.HTTP_ERROR:
        for dropped in _suspects(reply.error, _sent_fields(endpoint, options)):
            retried, answer = await ask(dropped)
            if answer.outcome is Outcome.OK:
                exchange, reply = retried, answer
                break
    if reply.outcome is not Outcome.OK:
        await _explain(exchange, reply, fetch, path, options.model, base_url)
    return ProbeResult(
        options=replace(options, dropped=options.dropped | dropped),
        e2e_s=(exchange.end_ns - exchange.sent_ns) / 1e9,
        ttft_s=_ttft_s(exchange, reply),
        streams=reply.first_choice_ns is not None,
        has_usage=reply.input_tokens is not None,
        # "Server: loadstone", with or without a version; the simulator calls itself loadstone-sim.
        through_gate=exchange.headers.get(b"server", b"").lower().partition(b"/")[0].strip() == b"loadstone",
        notes=_notes(dropped, reply),
    )


def _notes(dropped: frozenset[str], reply: Reply) -> tuple[str, ...]:
    notes = [f"the server rejects {name}: measured without it" for name in sorted(dropped)]
    if reply.first_choice_ns is not None and reply.first_content_ns is None:
        notes.append("the first reply has no content: a reply like that has no time to first token")
    return tuple(notes)


async def when_ready(attempt: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """``attempt`` again and again until it succeeds or ``timeout_s`` are over; then its error is raised."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return await attempt()
        except LoadstoneError:
            if time.monotonic() + _READY_PAUSE_S > deadline_s:
                raise
            await asyncio.sleep(_READY_PAUSE_S)


async def rehearse(send: Send, endpoint: Endpoint, request: Request) -> Rehearsal:
    """One whole request of the workload; raises RefusedError where it cannot be served at all."""
    exchange, reply = await send_with_retries(send, endpoint, request)
    if reply.outcome is not Outcome.OK:
        raise RefusedError(f"the server fails a request of {request.input_tokens} tokens: {reply.error}")
    return Rehearsal(
        e2e_s=(exchange.end_ns - exchange.sent_ns) / 1e9,
        ttft_s=_ttft_s(exchange, reply),
        streams=reply.first_choice_ns is not None,
        has_usage=reply.output_tokens is not None,
    )


async def first_model(fetch: Fetch, endpoint: Endpoint) -> str:
    """The first model that ``/v1/models`` names; where it names none, ``unnamed`` if a request need not say which it
    is for. Raises RefusedError, UnreachableError."""
    try:
        names = await model_names(fetch)
    except UnreachableError as error:
        remedy = "is the server running? check --base-url (host, port, http or https)"
        raise UnreachableError(f"no list of models: {error}; {remedy}") from None
    if not names and not endpoint.names_model:
        return UNNAMED
    if not names:
        raise RefusedError("the server names no model at /v1/models; give --model NAME")
    return names[0]


async def model_names(fetch: Fetch) -> list[str]:
    """What ``/v1/models`` lists; empty where there is no such list."""
    listing = await fetch("GET", "/v1/models")
    if listing.status in (401, 403):
        raise RefusedError(f"the server wants a key (HTTP {listing.status}); give --api-key or set OPENAI_API_KEY")
    if listing.status != 200:
        return []
    try:
        return [model.id for model in msgspec.json.decode(listing.body, type=_Models).data]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def send_with_retries(send: Send, endpoint: Endpoint, request: Request) -> tuple[Exchange, Reply]:
    """Up to three tries where the error may be a stray one."""
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(_PAUSE_S)
        exchange = await send(request)
        reply = read(exchange, endpoint)
        if reply.outcome not in _STRAY or exchange.broken is Break.CONNECT or 400 <= exchange.status < 429:
            break
    return exchange, reply


async def _ask(send: Send, endpoint: Endpoint, path: str, options: BodyOptions) -> tuple[Exchange, Reply]:
    body = endpoint.build(probe_prompt(endpoint, PROBE_WORDS), PROBE_OUTPUT_TOKENS, options)
    return await send_with_retries(send, endpoint, Request(path=path, body=body, index=0))


def _sent_fields(endpoint: Endpoint, options: BodyOptions) -> list[str]:
    body = msgspec.json.decode(endpoint.build(probe_prompt(endpoint, 1), 1, options))
    return [name for name in OPTIONAL_FIELDS if name in body]


def _suspects(error: str, sent: list[str]) -> list[frozenset[str]]:
    """Sets of fields to leave out, in the order to try: those that the server names, each alone, all."""
    named = frozenset(name for name in sent if name in error)
    alone = [frozenset({name}) for name in sent]
    sets = [named, *alone, frozenset(sent)] if named else [*alone, frozenset(sent)]
    return [fields for position, fields in enumerate(sets) if fields and fields not in sets[:position]]


def _ttft_s(exchange: Exchange, reply: Reply) -> float | None:
    return None if reply.first_content_ns is None else (reply.first_content_ns - exchange.sent_ns) / 1e9


async def _explain(exchange: Exchange, reply: Reply, fetch: Fetch, path: str, model: str, base_url: str) -> NoReturn:
    if exchange.broken is not None:
        raise UnreachableError(_BREAK_TEXTS[exchange.broken].format(base_url=base_url, error=reply.error))
    status = exchange.status
    if status in (401, 403):
        raise RefusedError(f"{base_url} refuses us ({reply.error}); give --api-key or set OPENAI_API_KEY")
    if status in (400, 404):
        known = await _known_models(fetch)
        if known and model not in known:
            names = ", ".join(known[:8])
            raise RefusedError(f"{base_url} has no model {model!r} ({reply.error}); it has: {names} (--model)")
    if status in (404, 405):
        raise RefusedError(
            f"{base_url} does not serve {path} ({reply.error}); check --base-url, --endpoint and --model"
        )
    if reply.outcome is Outcome.MALFORMED and exchange.headers.get(b"content-type", b"").startswith(_EVENTS):
        raise RefusedError(f"{base_url} fails the first request ({reply.error}); its log should say why")
    if reply.outcome is Outcome.MALFORMED:
        raise UnreachableError(f"{base_url}{path} does not speak the OpenAI API: {reply.error}; check --base-url")
    if reply.outcome is Outcome.REFUSED:
        raise RefusedError(f"{base_url} takes no work ({reply.error}); wait until it is ready and idle")
    raise RefusedError(f"{base_url} rejects the first request ({reply.error})")


async def _known_models(fetch: Fetch) -> list[str]:
    """To explain a no by: nothing where the list is not to be had."""
    try:
        return await model_names(fetch)
    except LoadstoneError:
        return []


_BREAK_TEXTS = {
    Break.CONNECT: "{base_url} cannot be reached: {error}; is the server running? (--base-url)",
    Break.TLS: "no TLS connection with {base_url}: {error}; check the certificate or the scheme of --base-url",
    Break.TIMEOUT: "{base_url} did not answer the first request: {error} (--request-timeout-s)",
    Break.DISCONNECT: "{base_url} closed the connection before its first reply was complete: {error}",
    Break.MALFORMED: "{base_url} does not speak HTTP/1.1: {error}; check --base-url",
    Break.CLIENT: "this machine cannot send: {error}",
    Break.CUT: "the first request was cancelled",
}
