"""One request through a service that admits its own: from the server's ``receive`` to the app and back.

Theory of operation::

    READING ──▶ QUEUED ──granted──▶ RUNNING ──▶ ENDED
       └──────────┴─ refused, gone, out of time ──▶ ENDED

The server's own task goes this way in one straight line, inside one cancel scope. The body is read whole before
anything is taken, so that nobody holds a slot while uploading. From then on a listener is the only reader of the
server's ``receive``: it ends when the client has left, and the app is told so by its own ``receive``.

The slot belongs to the app's coroutine. It is given back in ``_end``, once, when the coroutine has ended, whatever made
it end; a background task that runs after the reply is part of it. Cancelling goes through an AnyIO scope, because that
waits for a handler in a worker thread, which nothing can stop: while it computes, its slot is not free.

Client gone: one that waits ends at once. An app that runs receives ``http.disconnect`` and has a second to end in its
own way, then it is cancelled.

Out of time: the client is answered at that moment, by 504 or an error event that ends the stream; the app is cancelled,
and what it still sends goes nowhere. A reply that has begun and is no stream stays incomplete: the server closes its
connection.
"""

import asyncio

import anyio

from loadstone.core.admission import State, Ticket, Want
from loadstone.core.clock import Timer
from loadstone.core.outcomes import Outcome
from loadstone.core.quota import Exceeded, Reservation
from loadstone.core.refusals import BadAskError, refusal_body
from loadstone.hold.api_keys import is_admin
from loadstone.hold.asgi_messages import App, Message, Receive, Scope, Send, WatchedReply, answer, is_last
from loadstone.hold.endings import (
    DENIED,
    Reply,
    outcome_of,
    refusal_reply,
    spent_tokens,
    too_large_reply,
)
from loadstone.hold.headers import first
from loadstone.hold.service import APP, Service
from loadstone.hold.shaping import Shaped, shape
from loadstone.hold.status import Ended

SAFE = frozenset(("GET", "HEAD", "OPTIONS"))

_NEVER_NS = 1 << 62
_GRACE_NS = 1_000_000_000
_LAST_WORDS_S = 5.0
_BUSY = frozenset((429, 503))


class _RefusalError(Exception):
    """Ends the straight line: this request is answered by us."""

    def __init__(self, outcome: Outcome, reply: Reply) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome
        self.reply = reply


class Passage:
    """See the theory of operation. ``run`` once; it returns, or raises what the app raised."""

    def __init__(self, service: Service, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        self._service = service
        self._app = app
        self._asked = scope
        self._receive_from_server = receive
        self._send_to_server = send
        self._headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self._client = service.client(scope)
        self._arrived_ns = service.clock.now_ns()
        self._deadline_ns = _NEVER_NS
        self._cancelling = anyio.CancelScope()
        self._grace: Timer | None = None
        self._listener: asyncio.Task[Message] | None = None
        self._last_words: asyncio.Task[None] | None = None
        self._turn: asyncio.Future[None] | None = None
        self._ticket: Ticket | None = None
        self._reservation: Reservation | None = None
        self._shaped = Shaped(b"", 0)
        self._told = False
        self._reply = WatchedReply()
        self._outcome: Outcome | None = None
        self._gone = False

    def __repr__(self) -> str:
        state = self._ticket.state.value if self._ticket else "reading"
        return f"<Passage {self._asked['method']} {self._asked['path']} of {self._client}, {state}>"

    async def run(self) -> None:
        """From arrival to outcome."""
        self._service.received()
        self._deadline_ns = self._service.deadlines.add(self._expire) or _NEVER_NS
        refused: Reply | None = None
        try:
            with self._cancelling:
                await self._pass()
        except _RefusalError as error:
            if self._outcome is None:
                self._outcome, refused = error.outcome, error.reply
        except asyncio.CancelledError:
            if _is_cancelled() and not self._reply.complete:
                # By whoever runs us, a server that stops: nobody waits for the answer.
                self._gone = True
            raise
        finally:
            self._end()
            if self._last_words is not None:
                await self._last_words
        if refused is not None:
            await answer(self._send_to_server, refused, self._service.rate_headers(self._client))

    async def _pass(self) -> None:
        body = await self._read()
        if body is None:
            return
        self._shaped = self._shape(body)
        self._listener = asyncio.get_running_loop().create_task(self._listen())
        self._listener.add_done_callback(self._left)
        await self._take()
        if not self._gone:
            await self._app(self._scope(body), self._receive, self._send)

    # -- towards a slot

    async def _read(self) -> bytes | None:
        """The whole body; None where the client left before its end."""
        bound = self._service.rules.max_body_bytes
        claimed = first(self._headers, b"content-length") or b""
        more = not claimed.isdigit() or int(claimed) <= bound
        parts: list[bytes] = []
        size = 0
        while more and size <= bound:
            message = await self._receive_from_server()
            if message["type"] == "http.disconnect":
                self._gone = True
                return None
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = message.get("more_body", False)
        if size > bound or not parts:
            # What is left of it is the server's to drop: closing on unread bytes would tear the answer away.
            raise _RefusalError(Outcome.BAD_REQUEST, too_large_reply(bound))
        return b"".join(parts)

    def _shape(self, body: bytes) -> Shaped:
        if self._asked["method"] in SAFE:
            return Shaped(body, 0)
        limits = self._service.rules.enforced.limits
        try:
            return shape(self._asked["path"].rstrip("/"), first(self._headers, b"content-type"), body, limits)
        except BadAskError as error:
            reply = refusal_reply(Outcome.BAD_REQUEST, 0, str(error), error.param)
            raise _RefusalError(Outcome.BAD_REQUEST, reply) from None

    async def _take(self) -> None:
        """Quota, then a slot; in the queue this waits to be called."""
        service, tokens = self._service, self._shaped.tokens
        admin_key = service.rules.admin_key
        admin = bool(admin_key) and is_admin(self._headers, admin_key)
        if not admin:
            taken = service.quotas.reserve(self._client, tokens, service.clock.now_ns())
            if isinstance(taken, Exceeded):
                detail = f"at most {taken.limit} {taken.what} per {taken.window}"
                reply = refusal_reply(Outcome.RATE_LIMITED, taken.retry_after_s, detail)
                raise _RefusalError(Outcome.RATE_LIMITED, reply)
            self._reservation = taken
        want = Want(self._client, self._deadline_ns, tokens, unlimited=admin)
        ticket = self._ticket = service.permits.take(want, self._called)
        if ticket.state is State.QUEUED:
            self._turn = asyncio.get_running_loop().create_future()
            await self._turn
        if ticket.refusal is not None:
            outcome = DENIED[ticket.refusal]
            raise _RefusalError(outcome, refusal_reply(outcome, service.wait_hint_s()))
        if ticket.state is State.GRANTED:
            service.began(ticket, self._arrived_ns)

    def _called(self, ticket: Ticket) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    # -- the app's side

    def _scope(self, body: bytes) -> Scope:
        """As the server gave it, unless the body has another length now."""
        shaped = self._shaped.body
        if shaped is body:
            return self._asked
        length = b"%d" % len(shaped)
        headers = [(name, length if name == b"content-length" else value) for name, value in self._headers]
        return {**self._asked, "headers": headers}

    async def _receive(self) -> Message:
        if not self._told:
            self._told = True
            return {"type": "http.request", "body": self._shaped.body, "more_body": False}
        assert self._listener is not None, "the app runs after the listener was started"
        return await asyncio.shield(self._listener)

    async def _send(self, message: Message) -> None:
        if self._outcome is not None:
            return
        reply = self._reply
        if message["type"] == "http.response.start":
            headers = reply.start(message)
            message = {**message, "headers": [*headers, *self._service.rate_headers(self._client)]}
        elif message["type"] == "http.response.body" and message.get("body"):
            reply.feed(message["body"], self._service.clock.now_ns())
        reply.ending = reply.ending or is_last(message)
        await self._send_to_server(message)
        if reply.ending and not reply.complete:
            reply.last_ns = self._service.clock.now_ns()

    # -- what may happen at any time

    async def _listen(self) -> Message:
        while (message := await self._receive_from_server())["type"] != "http.disconnect":
            pass
        return message

    def _left(self, listener: asyncio.Task[Message]) -> None:
        """The client has left; servers say so after a complete reply, too."""
        if listener.cancelled() or self._reply.ending:
            return
        self._gone = True
        if self._ticket is not None and self._ticket.state is State.GRANTED:
            clock = self._service.clock
            self._grace = clock.call_at(clock.now_ns() + _GRACE_NS, self._cut)
            return
        if self._ticket is not None:
            self._service.permits.cancel(self._ticket)
        self._cancelling.cancel()

    def _cut(self) -> None:
        if not self._reply.ending:
            self._cancelling.cancel()

    def _expire(self) -> None:
        if self._reply.complete or self._gone:
            return
        self._outcome = Outcome.REQUEST_TIMEOUT
        self._pay(*self._reply.tokens())
        self._last_words = asyncio.get_running_loop().create_task(self._tell_expired())
        self._cancelling.cancel()

    async def _tell_expired(self) -> None:
        reply = self._reply
        if reply.status and (reply.ending or not reply.streams):
            return
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                if reply.status:
                    event = b"data: %b\n\n" % refusal_body(Outcome.REQUEST_TIMEOUT, "its time is up")
                    await self._send_to_server({"type": "http.response.body", "body": event, "more_body": False})
                else:
                    headers = self._service.rate_headers(self._client)
                    await answer(self._send_to_server, refusal_reply(Outcome.REQUEST_TIMEOUT, 0), headers)
        except TimeoutError:
            # The client does not read; the server closes the connection of what stays incomplete.
            return

    # -- the end

    def _end(self) -> None:
        service, reply, ticket = self._service, self._reply, self._ticket
        service.deadlines.remove(self._expire)
        if self._grace is not None:
            self._grace.cancel()
        if self._listener is not None:
            self._listener.cancel()
        counted, output_tokens = reply.tokens()
        admitted = ticket is not None and ticket.granted_ns is not None
        if ticket is not None and ticket.state is State.GRANTED:
            service.permits.release(ticket, counted)
        elif ticket is not None:
            service.permits.cancel(ticket)
        self._pay(counted, output_tokens)
        ended_ns = service.clock.now_ns() if reply.last_ns is None else reply.last_ns
        granted_ns = ticket.granted_ns if ticket is not None and ticket.granted_ns is not None else ended_ns
        service.ended(
            ticket,
            Ended(
                self._conclusion(),
                self._client,
                APP if admitted else "",
                admitted,
                (ended_ns - self._arrived_ns) / 1e9,
                None if reply.first_ns is None else (reply.first_ns - self._arrived_ns) / 1e9,
                (granted_ns - self._arrived_ns) / 1e9,
                output_tokens,
            ),
        )

    def _conclusion(self) -> Outcome:
        if self._outcome is not None:
            return self._outcome
        if self._gone:
            return Outcome.CLIENT_GONE
        # Without its last byte the app has failed: it raised, or returned too early.
        return outcome_of(self._reply.status) if self._reply.complete else Outcome.UPSTREAM_ERROR

    def _pay(self, counted: int | None, output_tokens: int) -> None:
        """What was served is paid for; a request that was refused, by anyone, costs nothing."""
        if self._reservation is None:
            return
        reply, shaped, now_ns = self._reply, self._shaped, self._service.clock.now_ns()
        if reply.status not in _BUSY and (reply.first_ns is not None or (reply.complete and reply.status < 400)):
            spent = spent_tokens(counted, output_tokens, len(shaped.body), shaped.tokens)
            self._service.quotas.settle(self._reservation, spent, now_ns)
        else:
            self._service.quotas.refund(self._reservation, now_ns)


def _is_cancelled() -> bool:
    """The running task itself was cancelled, not something that it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
