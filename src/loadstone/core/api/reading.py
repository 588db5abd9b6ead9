"""From an exchange to a reply: what came back, when, and how it ended.

Theory of operation. A complete HTTP response with a 2xx status is read as a stream of events or as one JSON document,
whichever it turns out to be: a server may answer a stream request without streaming. A stream is complete when a
``finish_reason`` or ``[DONE]`` was seen. An event's time is the stamp of the read that completed it. Everything that
cannot be read is an outcome with one line of text; nothing here raises for what a server sent.
"""

from typing import Final

import msgspec

from loadstone.core.api.endpoint import Document, Endpoint
from loadstone.core.api.messages import message_of, one_line
from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.sse import SseParser
from loadstone.core.target import Break, Exchange

BREAKS: Final[dict[Break, Outcome]] = {
    Break.CONNECT: Outcome.REFUSED,
    Break.TLS: Outcome.TLS,
    Break.TIMEOUT: Outcome.TIMEOUT,
    Break.DISCONNECT: Outcome.DISCONNECT,
    Break.MALFORMED: Outcome.MALFORMED,
    Break.CLIENT: Outcome.CLIENT,
    Break.CUT: Outcome.CUT,
}
REFUSALS: Final = frozenset({429, 503})
DONE: Final = b"[DONE]"
_DECODER: Final = msgspec.json.Decoder(Document)


class Reply(msgspec.Struct):
    """What came back for one request. Times are monotonic nanoseconds; None where it did not happen."""

    outcome: Outcome = Outcome.OK
    error: str = ""
    first_content_ns: int | None = None
    """First chunk that carries content, reasoning or a tool call."""
    first_choice_ns: int | None = None
    last_choice_ns: int | None = None
    choice_gaps_ns: list[int] = []
    """Between consecutive chunks with a non-empty ``choices``."""
    chunks: int = 0
    """Chunks that carry content, reasoning or a tool call: a lower bound of the tokens, as chunks may coalesce."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""


class StreamReader:
    """Reads one stream of events as it comes; ``problem`` is set where it cannot be read on."""

    __slots__ = ("_endpoint", "_keep_text", "_parser", "_texts", "done", "events", "finished", "problem", "reply")

    def __init__(self, endpoint: Endpoint, keep_text: bool = False) -> None:
        self._endpoint = endpoint
        self._keep_text = keep_text
        self._parser = SseParser()
        self._texts: list[str] = []
        self.reply = Reply()
        self.events = 0
        self.done = False
        self.finished = False
        self.problem = ""

    def feed(self, t_ns: int, piece: bytes) -> None:
        """Take bytes received at ``t_ns``."""
        for event in self._parser.feed(piece):
            self.events += 1
            if event.data == DONE:
                self.done = True
            elif not self.problem:
                self._take(t_ns, event.data)

    def close(self) -> Reply:
        """The reply, once the last byte has been fed."""
        left = self._parser.leftover
        if left == DONE:
            self.done = True
        elif left and not self.problem and not self.done:
            self.problem = f"the stream ended in half an event: {one_line(left, 80)}"
        if not (self.problem or self.finished or self.done):
            self.problem = "the stream ended without finish_reason or [DONE]"
        self.reply.text = "".join(self._texts)
        if self.problem:
            self.reply.outcome = Outcome.MALFORMED
            self.reply.error = self.problem
        return self.reply

    def _take(self, t_ns: int, data: bytes) -> None:
        try:
            document = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.problem = f"event {self.events} of the stream cannot be read ({error}): {one_line(data, 80)}"
            return
        if document.error:
            self.problem = f"error event in the stream: {message_of(data)}"
            return
        _take_usage(self.reply, document)
        if document.choices:
            self._take_choices(t_ns, document)

    def _take_choices(self, t_ns: int, document: Document) -> None:
        reply = self.reply
        if reply.last_choice_ns is None:
            reply.first_choice_ns = t_ns
        else:
            reply.choice_gaps_ns.append(t_ns - reply.last_choice_ns)
        reply.last_choice_ns = t_ns
        carries = False
        for choice in document.choices or ():
            carries = carries or self._endpoint.carries_content(choice)
            self.finished = self.finished or bool(choice.finish_reason)
            if self._keep_text:
                self._texts.append(self._endpoint.text_of(choice))
        if carries:
            reply.chunks += 1
            if reply.first_content_ns is None:
                reply.first_content_ns = t_ns


def read(exchange: Exchange, endpoint: Endpoint, keep_text: bool = False) -> Reply:
    """What came back for a finished exchange; never raises for what the server sent."""
    reply = _read_response(exchange, endpoint, keep_text)
    if exchange.broken is None:
        return reply
    # After [DONE] or a whole JSON document nothing is missing, and an error status says more than the cut that follows.
    if exchange.broken is Break.DISCONNECT and (reply.outcome is Outcome.OK or exchange.status >= 400):
        return reply
    reply.outcome = BREAKS[exchange.broken]
    reply.error = exchange.error or exchange.broken.value
    return reply


def _read_response(exchange: Exchange, endpoint: Endpoint, keep_text: bool) -> Reply:
    if not 200 <= exchange.status < 300:
        return _read_error(exchange)
    body = exchange.log.body()
    head = body[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    content_type = exchange.headers.get(b"content-type", b"").lower()
    if content_type.startswith(b"text/event-stream") or head.startswith((b"data:", b"event:", b":")):
        reader = StreamReader(endpoint, keep_text)
        for t_ns, piece in exchange.log:
            reader.feed(t_ns, piece)
        if exchange.broken is not None and not reader.done:
            reader.problem = reader.problem or "cut off"
        return reader.close()
    return _read_document(body, head, content_type, endpoint, keep_text)


def _read_error(exchange: Exchange) -> Reply:
    outcome = Outcome.REFUSED if exchange.status in REFUSALS else Outcome.HTTP_ERROR
    message = message_of(exchange.log.body())
    return Reply(outcome=outcome, error=f"HTTP {exchange.status}" + (f": {message}" if message else ""))


def _read_document(body: bytes, head: bytes, content_type: bytes, endpoint: Endpoint, keep_text: bool) -> Reply:
    kind = one_line(content_type, 60) or "no content-type"
    if not head:
        return Reply(outcome=Outcome.MALFORMED, error=f"the body is empty ({kind})")
    try:
        document = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        wanted = "an event stream or JSON" if endpoint.streams else "JSON"
        return Reply(outcome=Outcome.MALFORMED, error=f"expected {wanted}, got {kind}: {message_of(body, 100)}")
    if document.error or not endpoint.answered(document):
        problem = "an error in a 200 reply" if document.error else f"JSON that is no {endpoint.name} reply"
        return Reply(outcome=Outcome.MALFORMED, error=f"{problem}: {message_of(body, 120)}")
    reply = Reply()
    _take_usage(reply, document)
    if keep_text:
        reply.text = "".join(endpoint.text_of(choice) for choice in document.choices or ())
    return reply


def _take_usage(reply: Reply, document: Document) -> None:
    usage = document.usage
    if usage is None:
        return
    # Rerankers and some embedding servers give only the total.
    reply.input_tokens = usage.total_tokens if usage.prompt_tokens is None else usage.prompt_tokens
    reply.output_tokens = usage.completion_tokens


def to_record(exchange: Exchange, endpoint: Endpoint, t0_ns: int, keep_text: bool = False) -> RequestRecord:
    """The record of a finished exchange, in seconds since ``t0_ns``.

    ``output_tokens`` is None where the server gives no ``usage``. A request that was never sent (connection refused)
    has its end as its sending time.
    """
    reply = read(exchange, endpoint, keep_text)
    sent_ns = exchange.sent_ns or exchange.end_ns
    request = exchange.request

    def since_sent(t_ns: int | None) -> float | None:
        return None if t_ns is None else (t_ns - sent_ns) / 1e9

    return RequestRecord(
        index=request.index,
        slot=exchange.slot,
        planned_s=(exchange.planned_ns - t0_ns) / 1e9,
        sent_s=(sent_ns - t0_ns) / 1e9,
        end_s=(exchange.end_ns - t0_ns) / 1e9,
        outcome=reply.outcome,
        status=exchange.status,
        error=reply.error,
        ttft_s=since_sent(reply.first_content_ns),
        first_choice_s=since_sent(reply.first_choice_ns),
        last_choice_s=since_sent(reply.last_choice_ns),
        itls_s=[gap_ns / 1e9 for gap_ns in reply.choice_gaps_ns],
        chunks=reply.chunks,
        input_tokens=request.input_tokens if reply.input_tokens is None else reply.input_tokens,
        output_tokens=reply.output_tokens,
        sequences=request.sequences,
        turnaround_s=exchange.turnaround_ns / 1e9 if exchange.turnaround_ns >= 0 else None,
        lag_s=exchange.lag_ns / 1e9,
        retry_after_s=_seconds(exchange.headers.get(b"retry-after")),
        reason=exchange.headers.get(b"x-loadstone-reason", b"").decode("latin-1"),
        text=reply.text,
    )


def _seconds(value: bytes | None) -> float | None:
    """``Retry-After`` in seconds; None where it is absent or a date."""
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        return None


class ContentWatch:
    """Live TTFT of a request in flight: reads only what is new, and only until content has been found."""

    __slots__ = ("_exchange", "_reader", "_seen")

    def __init__(self, exchange: Exchange, endpoint: Endpoint) -> None:
        self._exchange = exchange
        self._reader = StreamReader(endpoint)
        self._seen = 0

    def first_content_ns(self) -> int | None:
        """Stamp of the first content so far; cheap to ask again."""
        reply = self._reader.reply
        log = self._exchange.log
        if reply.first_content_ns is not None or self._seen == len(log):
            return reply.first_content_ns
        for position, (t_ns, piece) in enumerate(log):
            if position >= self._seen:
                self._seen = position + 1
                self._reader.feed(t_ns, piece)
                if reply.first_content_ns is not None:
                    break
        return reply.first_content_ns
