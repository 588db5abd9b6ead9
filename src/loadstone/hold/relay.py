"""One request through the gate, from its ticket to its outcome. Callbacks, no task of its own.

Theory of operation::

    QUEUED ──granted──▶ SENT ──head──▶ REPLYING ──last byte──▶ ENDED
      │                  │ ▲               │
      └─refused──▶ ENDED │ └─elsewhere─┐   └─broken, expired, client gone──▶ ENDED
                         └─broken──────┘

Until the first byte has reached the client a failed request goes elsewhere, with its deadline and its turn; after that
an error is an event in the stream, then the connection closes. Whatever happens, ``_end`` runs exactly once: it gives
the permit back, settles or refunds the quota, and counts one outcome. The client's pace is the upstream's: while the
client does not read, the upstream is not read.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from loadstone.core.admission import State, Ticket, Want
from loadstone.core.outcomes import Outcome
from loadstone.core.refusals import refusal_body, retry_after
from loadstone.hold.accounts import Account
from loadstone.hold.endings import DENIED, outcome_of, refusal_reply
from loadstone.hold.headers import Header, header_lines, reply_lines
from loadstone.hold.permits import Permits
from loadstone.hold.signals import Pace
from loadstone.hold.usage import UsageReader, tokens_of
from loadstone.wire.server import Response
from loadstone.wire.upstream import Failure, Head, Stage, UpstreamCall

MOST_ATTEMPTS = 3
_ELSEWHERE = frozenset((502, 503, 504))
_BUSY = frozenset((429, 503))
_BROKEN = frozenset((502, 504))
_ANSWERED = frozenset((Outcome.OK, Outcome.BAD_REQUEST))
_CLOSING = frozenset((400, 401))
# An enumeration's members are slow to read in Python 3.11, and these are read for every request.
_QUEUED, _GRANTED = State.QUEUED, State.GRANTED


class Upstream(Protocol):
    """What a relay needs of the upstream that it was granted."""

    pace: Pace | None
    """Where the gaps between tokens are wanted."""

    def send(self, job: "Job", sink: "Relay") -> UpstreamCall: ...
    def good(self) -> None: ...
    def busy(self) -> None: ...
    def broken(self, reason: str) -> None: ...
    def unreachable(self, reason: str) -> None: ...


class Job(msgspec.Struct, gc=False):
    """What goes upstream, the same at every attempt."""

    method: str
    target: bytes
    headers: list[Header]
    body: bytes
    request_id: bytes
    peer: bytes
    forwarded: list[bytes]


class Finished(msgspec.Struct, gc=False):
    """What became of a request, for the quota, the figures and the log."""

    outcome: Outcome
    status: int
    upstream: str
    granted_ns: int
    """When it got its first permit; 0 where it got none."""
    first_ns: int
    """When the first byte of the body came; 0 where none did."""
    ended_ns: int
    tokens: int | None
    """All tokens of the request where the server counted them."""
    output_tokens: int
    attempts: int
    error: str

    @property
    def paid_for(self) -> bool:
        """It got an answer, be it in part, or its client called it off while it was worked on. A 5xx is no answer."""
        if self.outcome is Outcome.CLIENT_GONE:
            return self.granted_ns != 0
        return self.outcome in _ANSWERED or (self.first_ns != 0 and self.status < 400)


class Shared(Protocol):
    """What all relays share: the gate."""

    @property
    def permits(self) -> Permits: ...
    @property
    def now_ns(self) -> Callable[[], int]: ...
    @property
    def upstream(self) -> Callable[[str], Upstream]: ...
    def any_up_besides(self, tried: frozenset[str]) -> bool: ...
    def wait_hint_s(self, outcome: Outcome) -> float: ...
    def standing_lines(self, account: Account) -> bytes: ...
    def finished(self, relay: "Relay", finished: Finished) -> None: ...


class Relay:
    """See the theory of operation above. It is the sink of its upstream call."""

    __slots__ = (
        "_attempts",
        "_avoid",
        "_call",
        "_document",
        "_error",
        "_first_ns",
        "_granted_ns",
        "_open_ended",
        "_pace",
        "_shared",
        "_status",
        "_streams",
        "_token_ns",
        "_upstream",
        "_upstream_name",
        "_usage",
        "account",
        "arrived_ns",
        "deadline_ns",
        "ended",
        "job",
        "response",
        "ticket",
    )

    def __init__(
        self,
        shared: Shared,
        job: Job,
        account: Account,
        response: Response,
        arrived_ns: int,
        deadline_ns: int,
    ) -> None:
        self.job = job
        self.account = account
        self.response = response
        self.arrived_ns = arrived_ns
        self.deadline_ns = deadline_ns
        self.ticket: Ticket | None = None
        self.ended = False
        self._shared = shared
        self._upstream: Upstream | None = None
        self._call: UpstreamCall | None = None
        self._document = b""
        """The body of a reply that came in one piece."""
        self._usage: UsageReader | None = None
        self._avoid: frozenset[str] = frozenset()
        self._attempts = 0
        self._granted_ns = 0
        self._pace: Pace | None = None
        self._token_ns = 0
        self._first_ns = 0
        self._status = 0
        self._streams = False
        self._open_ended = False
        """A stream without a length: there is room for one more event."""
        self._upstream_name = ""
        self._error = ""

    def __repr__(self) -> str:
        state = self.ticket.state.value if self.ticket else "new"
        return f"<Relay {self.job.method} {self.job.target.decode('latin-1')} {state} at {self._upstream_name or '-'}>"

    @property
    def running(self) -> bool:
        """It holds a permit."""
        return self.ticket is not None and self.ticket.state is _GRANTED

    # -- towards a permit

    def begin(self, want: Want) -> None:
        """Ask for a place and go on as far as that leads."""
        self.response.on_disconnect = self.client_gone
        ticket = self.ticket = self._shared.permits.take(want, self._changed)
        if ticket.state is not _QUEUED:
            self._changed(ticket)

    def _changed(self, ticket: Ticket) -> None:
        if ticket.state is _GRANTED:
            self._send(ticket)
        elif ticket.refusal is not None:
            self.refuse(DENIED[ticket.refusal], self._error)

    def _send(self, ticket: Ticket) -> None:
        name = ticket.upstream
        assert name is not None, "a granted ticket names its upstream"
        self._upstream_name = name
        if not self._granted_ns:
            self._granted_ns = ticket.granted_ns or self._shared.now_ns()
        self._attempts += 1
        upstream = self._upstream = self._shared.upstream(name)
        self._pace = upstream.pace
        self._call = upstream.send(self.job, self)

    # -- what the upstream tells (wire.upstream.Sink)

    def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
        """A read's worth of the reply."""
        if head is not None:
            self._status = head.status
            if head.status in _ELSEWHERE and self._moves_on(head.status):
                return
            self._streams = _is_stream(head)
            self._open_ended = self._streams and head.length is None
        if data:
            self._note(data, ended)
        if ended:
            # First: what this client asks next finds the place free, and the reply tells of the quota as it is then.
            self._complete()
        response = self.response
        if head is not None and ended and self.job.method != "HEAD":
            response.reply(head.status, self._lines(head), data)
            return
        if head is not None:
            response.start(head.status, self._lines(head), head.length)
        self._pass_on(data, ended)
        if response.congested and self._call is not None:
            response.on_drained = self._resume
            self._call.pause()

    def _resume(self) -> None:
        # The client's pause is not the engine's.
        self._token_ns = 0
        if self._call is not None:
            self._call.resume()

    def _pass_on(self, data: bytes, ended: bool) -> None:
        if data:
            self.response.write(data)
        if ended:
            self.response.end()

    def _note(self, data: bytes, ended: bool) -> None:
        if not self._first_ns:
            self._first_ns = self._shared.now_ns()
        if self._usage is None:
            if ended and not self._streams:
                self._document = data
                return
            self._usage = UsageReader(self._streams)
        events = self._usage.feed(data)
        if events and self._pace is not None:
            self._count_pace(self._pace, events, ended)

    def _count_pace(self, pace: Pace, events: int, ended: bool) -> None:
        """The engine's pace, gap by gap; the last read holds what is no token, the first has no gap before it."""
        now_ns = self._shared.now_ns()
        if self._token_ns and not ended:
            pace.add(now_ns - self._token_ns, events)
        self._token_ns = now_ns

    def _lines(self, head: Head) -> bytes:
        rates = self._shared.standing_lines(self.account)
        lines = reply_lines(head.headers, self.job.request_id, streams=self._streams, rates=rates)
        return lines if head.status not in _BUSY else lines + self._busy_lines(head)

    def _busy_lines(self, head: Head) -> bytes:
        """Who says no, and when to come back, where the upstream does not tell."""
        lines = b"x-loadstone-reason: upstream_busy\r\n"
        if any(name == b"retry-after" for name, _ in head.headers):
            return lines
        hint_s = self._shared.wait_hint_s(Outcome.UPSTREAM_ERROR)
        return b"%bretry-after: %b\r\n" % (lines, retry_after(hint_s))

    def _complete(self) -> None:
        self._tell_upstream(self._status)
        self._end(outcome_of(self._status))

    def _tell_upstream(self, status: int) -> None:
        assert self._upstream is not None, "only an upstream that was sent to replies"
        if status in _BUSY:
            self._upstream.busy()
        elif status in _BROKEN:
            self._upstream.broken(f"it answered {status}")
        else:
            self._upstream.good()

    def _moves_on(self, status: int) -> bool:
        """A gateway's error, or a full server: the reply is dropped where another upstream may do better."""
        if self._attempts >= MOST_ATTEMPTS or not self._another():
            return False
        self._tell_upstream(status)
        if self._call is not None:
            self._call.cancel()
        self._error = f"{self._upstream_name} answered {status}"
        self._move()
        return True

    def _another(self) -> bool:
        tried = self._avoid | {self._upstream_name}
        return self._shared.any_up_besides(tried)

    def on_failed(self, failure: Failure) -> None:
        """The upstream could not be reached, or its reply ended before its end."""
        self._call = None
        self._error = failure.reason
        upstream = self._upstream
        assert upstream is not None, "only an upstream that was sent to fails"
        # Before the upstream is marked down, so that this request is not among those that it refuses.
        if failure.stage is Stage.CONNECT:
            upstream.unreachable(failure.reason)
        else:
            upstream.broken(failure.reason)
        if self.response.started:
            self._break_off(Outcome.UPSTREAM_ERROR, failure.reason)
        elif failure.stage is not Stage.REPLY and self._attempts < MOST_ATTEMPTS and self._another():
            self._move()
        else:
            unreachable = failure.stage is Stage.CONNECT
            self.refuse(Outcome.NO_UPSTREAM if unreachable else Outcome.UPSTREAM_ERROR, failure.reason)

    def _move(self) -> None:
        assert self.ticket is not None, "only a granted request can move"
        self._call = None
        self._status = 0
        self._avoid |= {self._upstream_name}
        self._shared.permits.move(self.ticket, self._avoid, self._changed)
        if self.ticket.state is not _QUEUED:
            self._changed(self.ticket)

    # -- ends

    def client_gone(self) -> None:
        """The client has left: its place is free, and the upstream stops."""
        self._cut()
        self._end(Outcome.CLIENT_GONE)

    def expire(self) -> None:
        """Its time is up while it runs."""
        self._cut()
        if self.response.started:
            self._break_off(Outcome.REQUEST_TIMEOUT, "its time is up")
        else:
            self.refuse(Outcome.REQUEST_TIMEOUT)

    def _cut(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def refuse(self, outcome: Outcome, detail: str = "", param: str | None = None, wait_s: float | None = None) -> None:
        """Answer with an error of the gate's own; nothing of a reply has gone out."""
        hint_s = self._shared.wait_hint_s(outcome) if wait_s is None else wait_s
        refusal = refusal_reply(outcome, hint_s, detail, param)
        self._status = refusal.status
        self._error = self._error or detail
        self._end(outcome)
        if refusal.status in _CLOSING:
            self.response.close_after = True
        ours = header_lines([*refusal.headers, (b"x-request-id", self.job.request_id)])
        self.response.reply(refusal.status, ours + self._shared.standing_lines(self.account), refusal.body)

    def _break_off(self, outcome: Outcome, reason: str) -> None:
        """The reply has begun: an event says why it ends; the connection closes, so that no one takes it for whole."""
        if self._open_ended:
            apart = b"\n\n" if self._usage is not None and self._usage.within_event else b""
            self.response.write(b"%bdata: %b\n\n" % (apart, refusal_body(outcome, reason)))
        self._end(outcome)
        self.response.fail()

    def _end(self, outcome: Outcome) -> None:
        if self.ended:
            return
        self.ended = True
        self.response.on_disconnect = None
        self.response.on_drained = None
        tokens, output_tokens = self._tokens()
        ticket, shared = self.ticket, self._shared
        if ticket is not None:
            if ticket.state is _GRANTED:
                shared.permits.release(ticket, tokens)
            elif ticket.state is _QUEUED:
                shared.permits.cancel(ticket)
        finished = Finished(
            outcome,
            self._status,
            self._upstream_name,
            self._granted_ns,
            self._first_ns,
            shared.now_ns(),
            tokens,
            output_tokens,
            self._attempts,
            self._error,
        )
        self._call = None
        shared.finished(self, finished)

    def _tokens(self) -> tuple[int | None, int]:
        if self._document:
            return tokens_of(self._document)
        return self._usage.tokens() if self._usage is not None else (None, 0)


def _is_stream(head: Head) -> bool:
    for name, value in head.headers:
        if name == b"content-type":
            return value.startswith(b"text/event-stream")
    return False
