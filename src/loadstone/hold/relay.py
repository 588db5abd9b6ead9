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

from typing import TYPE_CHECKING

from loadstone.core.admission import State, Ticket, Want
from loadstone.core.outcomes import Outcome
from loadstone.core.quota import Reservation, Standing
from loadstone.core.refusals import refusal_body, retry_after
from loadstone.hold.accounts import Account, Asked
from loadstone.hold.endings import DENIED, outcome_of, refusal_reply
from loadstone.hold.headers import ReplyLines, header_lines, reply_lines
from loadstone.hold.signals import Pace
from loadstone.hold.usage import UsageReader, tokens_of
from loadstone.wire.server import Response
from loadstone.wire.upstream import Failure, Head, Stage, UpstreamCall

if TYPE_CHECKING:
    from loadstone.hold.front import Front
    from loadstone.hold.upstreams import UpstreamServer

MOST_ATTEMPTS = 3
_ELSEWHERE = frozenset((502, 503, 504))
_BUSY = frozenset((429, 503))
_BROKEN = frozenset((502, 504))
_ANSWERED = frozenset((Outcome.OK, Outcome.BAD_REQUEST))
_CLOSING = frozenset((400, 401))
# An enumeration's members are slow to read in Python 3.11, and these are read for every request.
_QUEUED, _GRANTED = State.QUEUED, State.GRANTED
_NONE: frozenset[str] = frozenset()


class Finished:
    """How a request ended; what it had come to by then, the relay tells."""

    __slots__ = ("ended_ns", "outcome", "output_tokens", "tokens")

    def __init__(self, outcome: Outcome, ended_ns: int, tokens: int | None, output_tokens: int) -> None:
        self.outcome = outcome
        self.ended_ns = ended_ns
        self.tokens = tokens
        """All tokens of the request where the server counted them."""
        self.output_tokens = output_tokens


class Relay:
    """See the theory of operation above. It is the sink of its upstream call."""

    __slots__ = (
        "_avoid",
        "_call",
        "_document",
        "_open_ended",
        "_pace",
        "_shared",
        "_streams",
        "_token_ns",
        "_upstream",
        "_usage",
        "account",
        "arrived_ns",
        "asked",
        "attempts",
        "body",
        "deadline_ns",
        "ended",
        "error",
        "first_ns",
        "granted_ns",
        "request_id",
        "reservation",
        "response",
        "standings",
        "status",
        "ticket",
        "upstream_name",
    )

    def __init__(
        self,
        shared: "Front",
        asked: Asked,
        account: Account,
        body: bytes,
        request_id: bytes,
        response: Response,
        arrived_ns: int,
        deadline_ns: int,
    ) -> None:
        self.asked = asked
        self.account = account
        self.body = body
        """As it goes upstream, the same at every attempt."""
        self.request_id = request_id
        self.response = response
        self.arrived_ns = arrived_ns
        self.deadline_ns = deadline_ns
        self.ticket: Ticket | None = None
        self.reservation: Reservation | None = None
        """What it has taken from its client's quota."""
        self.standings: list[Standing] | None = None
        """How the client stood when this was asked for, where quotas are shared."""
        self.ended = False
        self._shared = shared
        self._upstream: UpstreamServer | None = None
        self.upstream_name = ""
        """The last that it was sent to."""
        self._call: UpstreamCall | None = None
        self._avoid = _NONE
        self.attempts = self.status = self._token_ns = 0
        self.granted_ns = 0
        """When it got its first permit; 0 where it got none."""
        self.first_ns = 0
        """When the first byte of the body came; 0 where none did."""
        self._streams = False
        self._open_ended = False
        """A stream without a length: there is room for one more event."""
        self._document = b""
        """The body of a reply that came in one piece."""
        self._usage: UsageReader | None = None
        self._pace: Pace | None = None
        self.error = ""

    def __repr__(self) -> str:
        state = self.ticket.state.value if self.ticket else "new"
        asked = self.asked
        return f"<Relay {asked.method} {asked.target.decode('latin-1')} {state} at {self.upstream_name or '-'}>"

    @property
    def running(self) -> bool:
        """It holds a permit."""
        return self.ticket is not None and self.ticket.state is _GRANTED

    def paid_for(self, outcome: Outcome) -> bool:
        """It got an answer, be it in part, or its client called it off while it was worked on. A 5xx is no answer."""
        if outcome is Outcome.CLIENT_GONE:
            return self.granted_ns != 0
        return outcome in _ANSWERED or (self.first_ns != 0 and self.status < 400)

    # -- towards a permit

    def begin(self, want: Want) -> None:
        """Ask for a place and go on as far as that leads."""
        self.response.on_disconnect = self.client_gone
        ticket = self.ticket = self._shared.permits.take(want, self._changed)
        if ticket.state is _GRANTED:
            self._send(ticket)
        elif ticket.state is not _QUEUED:
            self._changed(ticket)

    def _changed(self, ticket: Ticket) -> None:
        if ticket.state is _GRANTED:
            self._send(ticket)
        elif ticket.refusal is not None:
            self.refuse(DENIED[ticket.refusal], self.error)

    def _send(self, ticket: Ticket) -> None:
        place = ticket.place
        assert place is not None, "a granted ticket has its place"
        name = self.upstream_name = place.name
        if not self.granted_ns:
            self.granted_ns = ticket.granted_ns or self._shared.now_ns()
        self.attempts += 1
        upstream = self._upstream = self._shared.upstreams[name]
        self._pace = upstream.pace
        self._call = upstream.send(self)

    # -- what the upstream tells (wire.upstream.Sink)

    def on_read(self, head: Head | None, data: bytes, ended: bool) -> None:
        """A read's worth of the reply."""
        if head is None:
            self._go_on(data, ended)
            return
        status = self.status = head.status
        if status in _ELSEWHERE and self._moves_on(status):
            return
        lines = head.notes
        if not isinstance(lines, ReplyLines):
            lines = head.notes = reply_lines(head.headers)
        self._streams = lines.streams
        if not ended:
            self._open_ended = lines.streams and head.length is None
            self.response.start(status, self._lines(lines), head.length)
            self._go_on(data, ended)
            return
        if data:
            self._note(data, True)
        # First: what this client asks next finds the place free, and the reply tells of the quota as it is then.
        self._complete()
        if self.asked.method == "HEAD":
            self.response.start(status, self._lines(lines), head.length)
            self.response.end()
        else:
            self.response.reply(status, self._lines(lines), data)

    def _go_on(self, data: bytes, ended: bool) -> None:
        """Of a reply that has begun."""
        response = self.response
        if data:
            self._note(data, ended)
        if ended:
            self._complete()
            response.end(data)
            return
        if data:
            response.write(data)
        if response.congested and self._call is not None:
            response.on_drained = self._resume
            self._call.pause()

    def _resume(self) -> None:
        # The client's pause is not the engine's.
        self._token_ns = 0
        if self._call is not None:
            self._call.resume()

    def _note(self, data: bytes, ended: bool) -> None:
        if not self.first_ns:
            self.first_ns = self._shared.now_ns()
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

    def _lines(self, lines: ReplyLines) -> bytes:
        told = lines.of(self.request_id, self._shared.standing_lines(self))
        return told if self.status not in _BUSY else told + self._busy_lines(lines)

    def _busy_lines(self, lines: ReplyLines) -> bytes:
        """Who says no, and when to come back, where the upstream does not tell."""
        reason = b"x-loadstone-reason: upstream_busy\r\n"
        if lines.says_when:
            return reason
        hint_s = self._shared.wait_hint_s(Outcome.UPSTREAM_ERROR)
        return b"%bretry-after: %b\r\n" % (reason, retry_after(hint_s))

    def _complete(self) -> None:
        self._tell_upstream(self.status)
        self._end(outcome_of(self.status))

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
        if self.attempts >= MOST_ATTEMPTS or not self._another():
            return False
        self._tell_upstream(status)
        if self._call is not None:
            self._call.cancel()
        self.error = f"{self.upstream_name} answered {status}"
        self._move()
        return True

    def _another(self) -> bool:
        tried = self._avoid | {self.upstream_name}
        return self._shared.any_up_besides(tried)

    def on_failed(self, failure: Failure) -> None:
        """The upstream could not be reached, or its reply ended before its end."""
        self._call = None
        self.error = failure.reason
        upstream = self._upstream
        assert upstream is not None, "only an upstream that was sent to fails"
        # Before the upstream is marked down, so that this request is not among those that it refuses.
        if failure.stage is Stage.CONNECT:
            upstream.unreachable(failure.reason)
        else:
            upstream.broken(failure.reason)
        if self.response.started:
            self._break_off(Outcome.UPSTREAM_ERROR, failure.reason)
        elif failure.stage is not Stage.REPLY and self.attempts < MOST_ATTEMPTS and self._another():
            self._move()
        else:
            unreachable = failure.stage is Stage.CONNECT
            self.refuse(Outcome.NO_UPSTREAM if unreachable else Outcome.UPSTREAM_ERROR, failure.reason)

    def _move(self) -> None:
        assert self.ticket is not None, "only a granted request can move"
        self._call = None
        self.status = 0
        self._avoid |= {self.upstream_name}
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
        if self._upstream is not None and self._call is not None and not self.response.started:
            self._upstream.silent()
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
        self.status = refusal.status
        self.error = self.error or detail
        self._end(outcome)
        if refusal.status in _CLOSING:
            self.response.close_after = True
        ours = header_lines([*refusal.headers, (b"x-request-id", self.request_id)])
        self.response.reply(refusal.status, ours + self._shared.standing_lines(self), refusal.body)

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
        if self._document:
            tokens, output_tokens = tokens_of(self._document)
        else:
            tokens, output_tokens = self._usage.tokens() if self._usage is not None else (None, 0)
        ticket, shared = self.ticket, self._shared
        if ticket is not None:
            if ticket.state is _GRANTED:
                shared.permits.release(ticket, tokens)
            elif ticket.state is _QUEUED:
                shared.permits.cancel(ticket)
        finished = Finished(outcome, shared.now_ns(), tokens, output_tokens)
        self._call = None
        shared.finished(self, finished)
