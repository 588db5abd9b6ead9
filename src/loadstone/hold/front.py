"""A request's way from its head to a relay, and back. Every step goes on or answers; none waits for another request.

One straight line: draining? → key → body → quota → permit → relay, and once it has ended: settle or refund its quota,
count its outcome, write its line. What a refused request had taken is given back.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from loadstone.core.admission import Want
from loadstone.core.clock import Clock, Timer
from loadstone.core.outcomes import Outcome
from loadstone.core.quota import Exceeded, Quotas, Reservation
from loadstone.core.refusals import BadAskError
from loadstone.hold.access_log import AccessLog
from loadstone.hold.accounts import Asked, account_of, read_asked
from loadstone.hold.clients import Callers
from loadstone.hold.configuration import Enforced
from loadstone.hold.endings import spent_tokens, wait_hint_s
from loadstone.hold.options import GateOptions
from loadstone.hold.permits import Permits
from loadstone.hold.rate_headers import RateLines, rate_limit_lines
from loadstone.hold.relay import Finished, Relay
from loadstone.hold.shaping import Shaped, shape_kind
from loadstone.hold.status import Ended, Status
from loadstone.hold.upstreams import Upstreams
from loadstone.wire.server import IncomingRequest, Response

if TYPE_CHECKING:
    # Importing Redis takes as long as everything else together, and few need it.
    from loadstone.hold.shared_quota import SharedQuotas

_NEVER_NS = 1 << 62
_SWEEP_NS = 100_000_000
_UPSTREAM_BACK_S = 2.0
# An enumeration's members are slow to read in Python 3.11, and this one is read for every request.
_OK = Outcome.OK


class Front:
    """All requests between their arrival and their outcome. It is what relays share."""

    def __init__(
        self,
        enforced: Enforced,
        options: GateOptions,
        permits: Permits,
        upstreams: Upstreams,
        clock: Clock,
        *,
        access_log: AccessLog | None,
        shared_quotas: "SharedQuotas | None",
    ) -> None:
        self.permits = permits
        self.quotas = Quotas(enforced.quotas)
        self.status = Status(clock.now_ns() / 1e9)
        self.draining = False
        self.now_ns: Callable[[], int] = clock.now_ns
        self.upstreams = upstreams
        self._enforced = enforced
        self._options = options
        self._unlimited, self._by_affinity = options.unlimited, options.affinity
        self._clock = clock
        self._access_log = access_log
        self._shared_quotas = shared_quotas
        self._callers = Callers(options.trusted)
        self._relays: dict[Relay, None] = {}
        self._sweeper: Timer | None = None
        self._empty = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._id_prefix = os.urandom(6).hex().encode()
        self._ids = 0
        self._set(enforced)

    def __repr__(self) -> str:
        return f"<Front {len(self._relays)} requests{' draining' if self.draining else ''}>"

    def apply(self, enforced: Enforced) -> None:
        """Other limits and quotas from now on; what runs or waits keeps its own deadline."""
        self.quotas.configure(enforced.quotas)
        self._set(enforced)
        if self._shared_quotas is not None:
            self._shared_quotas.configure(enforced.quotas)

    def _set(self, enforced: Enforced) -> None:
        self._enforced = enforced
        timeout_s = enforced.limits.request_timeout_s
        self._limits = enforced.limits
        self._timeout_ns = None if timeout_s is None else int(timeout_s * 1e9)
        self._rate_lines = RateLines(self.quotas.windows)

    def drain(self) -> None:
        """Refuse what is new."""
        self.draining = True
        for relay in self._relays:
            relay.response.close_after = True

    async def until_empty(self) -> None:
        """Wait for everything that runs or waits."""
        while self._relays:
            self._empty.clear()
            await self._empty.wait()

    async def close(self) -> None:
        """Stop the timer, finish what is owed to shared quotas, close the log."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._shared_quotas is not None:
            await self._shared_quotas.close()
        if self._access_log is not None:
            self._access_log.close()

    # -- figures

    @property
    def in_flight(self) -> int:
        """Requests that run or wait."""
        return len(self._relays)

    @property
    def oldest_s(self) -> float | None:
        """Age of the oldest request that holds a permit; None where none does."""
        oldest = next((relay for relay in self._relays if relay.running), None)
        return None if oldest is None else (self.now_ns() - oldest.arrived_ns) / 1e9

    # -- a request

    def handle(self, request: IncomingRequest, response: Response, *, admin: bool) -> None:
        """One request, whole, for an upstream."""
        self.status.received()
        arrived_ns = self.now_ns()
        head = request.head
        asked = head.notes
        if not isinstance(asked, Asked):
            asked = head.notes = read_asked(head, self._options.api_keys, self._options.admin_key, admin=admin)
        account = account_of(request.peer, asked, self._callers)
        self._ids += 1
        request_id = asked.request_id or b"%b%d" % (self._id_prefix, self._ids)
        deadline_ns = _NEVER_NS if self._timeout_ns is None else arrived_ns + self._timeout_ns
        relay = Relay(self, asked, account, request.body, request_id, response, arrived_ns, deadline_ns)
        self._relays[relay] = None
        if self._sweeper is None and self._timeout_ns is not None:
            self._sweeper = self._clock.call_at(arrived_ns + _SWEEP_NS, self._sweep)
        if self.draining:
            response.close_after = True
            relay.refuse(Outcome.DRAINING)
        elif not (account.known or admin):
            relay.refuse(Outcome.UNAUTHORIZED, "send Authorization: Bearer KEY")
        else:
            self._shape(relay, admin or self._unlimited)

    def _shape(self, relay: Relay, unlimited: bool) -> None:
        """Hold the body to the limits, then ask for quota and place."""
        asked, account = relay.asked, relay.account
        kind = asked.kind
        try:
            shaped = Shaped(relay.body, 0) if kind is None else shape_kind(kind, relay.body, self._limits)
        except BadAskError as error:
            coding = asked.content_encoding
            unread = f"Content-Encoding {coding.decode('latin-1')} is not read here; send it as it is" if coding else ""
            relay.refuse(Outcome.BAD_REQUEST, unread or str(error), error.param)
            return
        relay.body = shaped.body
        want = Want(
            account.client,
            relay.deadline_ns,
            shaped.tokens,
            account.priority,
            shaped.affinity if self._by_affinity else None,
            unlimited or asked.metadata,
        )
        if want.unlimited:
            relay.begin(want)
        elif self._shared_quotas is not None:
            self._in_background(self._reserve_shared(relay, want, self._shared_quotas))
        else:
            self._reserved(relay, want, self.quotas.reserve(account.client, shaped.tokens, relay.arrived_ns))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _reserve_shared(self, relay: Relay, want: Want, quotas: "SharedQuotas") -> None:
        relay.response.on_disconnect = relay.client_gone
        reservation = await quotas.reserve(want.client, want.tokens)
        standings = await quotas.standings(want.client)
        if relay.ended:
            if not isinstance(reservation, Exceeded):
                await quotas.refund(reservation)
            return
        relay.standings = standings
        self._reserved(relay, want, reservation)

    def _reserved(self, relay: Relay, want: Want, reservation: Reservation | Exceeded) -> None:
        if isinstance(reservation, Exceeded):
            detail = f"at most {reservation.limit} {reservation.what} per {reservation.window}"
            relay.refuse(Outcome.RATE_LIMITED, detail, wait_s=reservation.retry_after_s)
            return
        relay.reservation = reservation
        relay.begin(want)

    def _sweep(self) -> None:
        """End what has run beyond its deadline; one timer for all, exact to a tenth of a second."""
        self._sweeper = None
        now_ns = self.now_ns()
        for relay in [r for r in self._relays if r.deadline_ns <= now_ns and r.running]:
            relay.expire()
        if self._relays:
            self._sweeper = self._clock.call_at(now_ns + _SWEEP_NS, self._sweep)

    # -- what relays need

    def any_up_besides(self, tried: frozenset[str]) -> bool:
        """There is another upstream to try."""
        others = [server.plan.url for server in self.upstreams.all() if server.plan.url not in tried]
        return any(self.permits.admission.is_up(url) for url in others)

    def wait_hint_s(self, outcome: Outcome) -> float:
        """When to come back."""
        if outcome in (Outcome.NO_UPSTREAM, Outcome.DRAINING):
            return _UPSTREAM_BACK_S
        evidence = self._enforced.evidence
        throughput_rps = evidence.throughput_rps if evidence is not None else None
        return wait_hint_s(self.permits.admission.retry_after_s(self.now_ns()), self._enforced.limits, throughput_rps)

    def standing_lines(self, relay: Relay) -> bytes:
        """Where a client stands with its quota."""
        if relay.standings is not None:
            return rate_limit_lines(relay.standings)
        account = relay.account
        return self._rate_lines.of(self.quotas.spare(account.client, self.now_ns())) if account.known else b""

    def finished(self, relay: Relay, finished: Finished) -> None:
        """The one end of a request: quota, figures, log."""
        del self._relays[relay]
        if relay.reservation is not None:
            self._settle(relay, relay.reservation, finished)
        arrived_ns, first_ns, ended_ns = relay.arrived_ns, relay.first_ns, finished.ended_ns
        granted_ns = relay.granted_ns
        self.status.ended(
            Ended(
                finished.outcome,
                relay.account.client,
                relay.upstream_name,
                granted_ns != 0,
                (ended_ns - arrived_ns) / 1e9,
                (first_ns - arrived_ns) / 1e9 if first_ns else None,
                ((granted_ns or ended_ns) - arrived_ns) / 1e9,
                finished.output_tokens,
            ),
            ended_ns / 1e9,
        )
        if self._access_log is not None:
            self._access_log.write(relay, finished)
        if not self._relays:
            self._empty.set()

    def _settle(self, relay: Relay, reservation: Reservation, finished: Finished) -> None:
        """What was served is paid for; a request that was refused, by anyone, costs nothing."""
        spent = None
        if finished.outcome is _OK or relay.paid_for(finished.outcome):
            spent = spent_tokens(finished.tokens, finished.output_tokens, len(relay.body), reservation.tokens)
        if self._shared_quotas is not None:
            self._in_background(_settle_shared(self._shared_quotas, reservation, spent))
        elif spent is not None:
            self.quotas.settle(reservation, spent, finished.ended_ns)
        else:
            self.quotas.refund(reservation, finished.ended_ns)

    def rejected(self, status: int) -> None:
        """The server refused what was no proper request."""
        self.status.received()
        self.status.ended(Ended(Outcome.BAD_REQUEST, "", "", False, 0.0, None, 0.0, 0), self.now_ns() / 1e9)


async def _settle_shared(quotas: "SharedQuotas", reservation: Reservation, spent: int | None) -> None:
    if spent is None:
        await quotas.refund(reservation)
    else:
        await quotas.settle(reservation, spent)
