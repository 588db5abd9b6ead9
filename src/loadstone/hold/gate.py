"""The gate: every request's way from its head to a relay, a page of the gate's own, or a refusal.

No middleware maze, one straight line: own page? → draining? → key → body → quota → permit → relay. Each step either
goes on or answers; what a refused request had taken from its quota is given back.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from loadstone.core.admission import Admission, AdmissionSettings, Want
from loadstone.core.clock import Clock, Timer
from loadstone.core.outcomes import Outcome
from loadstone.core.quota import Exceeded, Quotas, Reservation, Standing
from loadstone.core.refusals import BadAskError, protocol_error_body
from loadstone.hold.access_log import AccessLog
from loadstone.hold.adapter import TICK_NS, Adapter
from loadstone.hold.api_keys import ApiKeys, is_admin, without_admin_key
from loadstone.hold.clients import Callers, TrustedProxies
from loadstone.hold.configuration import Enforced
from loadstone.hold.headers import Header, first, relayed_target, request_id
from loadstone.hold.pages import Pages
from loadstone.hold.permits import Permits
from loadstone.hold.rate_headers import rate_limit_headers
from loadstone.hold.relay import Finished, Job, Relay
from loadstone.hold.resources import Resources, Sampler
from loadstone.hold.shaping import Shaped, shape
from loadstone.hold.signals import Pace, Signals
from loadstone.hold.status import Ended, Now, Status, UpstreamNow
from loadstone.hold.upstreams import Dialing, Upstreams, UpstreamServer
from loadstone.wire.server import HttpServer, IncomingRequest, Response

if TYPE_CHECKING:
    # Importing Redis takes as long as everything else together, and few need it.
    from loadstone.hold.shared_quota import SharedQuotas

_NEVER_NS = 1 << 62
_SWEEP_NS = 100_000_000
_SLOW_START_NS = 10_000_000_000
_UNKNOWN_WAIT_S = 1.0
_UPSTREAM_BACK_S = 2.0
_LAST_BYTES_S = 5.0
_METADATA = ("/models",)
_SAFE = ("GET", "HEAD", "OPTIONS")
_WITH_BODY = ("POST", "PUT", "PATCH")


@dataclass(frozen=True)
class GateOptions:
    """What does not change while the gate runs."""

    trusted: TrustedProxies = field(default_factory=TrustedProxies)
    api_keys: ApiKeys | None = None
    admin_key: str = ""
    affinity: bool = False
    adaptive: bool = False
    unlimited: bool = False
    """No quotas and no admission for anyone: for measuring what stands behind."""
    max_body_bytes: int = 16 * 1024 * 1024
    dialing: Dialing = field(default_factory=Dialing)


class Gate:
    """One gate on one loop. ``start`` listens; ``apply`` puts other limits in force without dropping a request."""

    def __init__(
        self,
        enforced: Enforced,
        options: GateOptions,
        clock: Clock,
        log: Callable[[str], None],
        *,
        access_log: AccessLog | None = None,
        shared_quotas: "SharedQuotas | None" = None,
    ) -> None:
        self.enforced = enforced
        self.options = options
        self._warnings: dict[str, str] = {}
        self.draining = False
        self._clock = clock
        self._log = log
        self._access_log = access_log
        self._shared_quotas = shared_quotas
        self._admission = Admission(_admission_settings(enforced))
        self.permits = Permits(self._admission, clock)
        self.upstreams = Upstreams(self.permits, clock, options.dialing, log)
        self.quotas = Quotas(enforced.quotas)
        self._callers = Callers(options.trusted)
        self._adapter = Adapter(self._set_limit, log) if options.adaptive else None
        self._adapting: Timer | None = None
        self.status = Status(clock.now_ns() / 1e9)
        self._relays: dict[Relay, _Account] = {}
        self._sweeper: Timer | None = None
        self._empty: asyncio.Event = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._sampler = Sampler()
        self._pages = Pages(self, protected=bool(options.admin_key))
        self._id_prefix = os.urandom(6).hex().encode()
        self._ids = 0
        self.server = HttpServer(
            self.handle,
            name=b"loadstone",
            max_body_bytes=options.max_body_bytes,
            error_body=_protocol_error,
            on_reject=self._rejected,
        )

    def __repr__(self) -> str:
        return f"<Gate {self._admission!r}{' draining' if self.draining else ''}>"

    # -- life

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError where the address cannot be had, UsageError for a bad upstream."""
        bound = await self.server.start(host, port)
        self.upstreams.configure(self.enforced.upstreams)
        self._follow_upstreams()
        if self._adapter is not None:
            self._adapting = self._clock.call_at(self._clock.now_ns() + TICK_NS, self._adapt)
        self._sampler.start()
        return bound

    def apply(self, enforced: Enforced) -> None:
        """Put other limits in force; what runs or waits stays, and is judged by the new ones from now on."""
        self.enforced = enforced
        now_ns = self._clock.now_ns()
        self.permits.tell(self._admission.configure(_admission_settings(enforced), now_ns))
        self.upstreams.configure(enforced.upstreams)
        self._follow_upstreams()
        self.quotas.configure(enforced.quotas)
        if self._shared_quotas is not None:
            self._shared_quotas.configure(enforced.quotas)

    def _follow_upstreams(self) -> None:
        """The adaptive limit starts from the configured one, and keeps what it has learnt over a reload."""
        if self._adapter is None:
            return
        curve = self.enforced.evidence.levels if self.enforced.evidence is not None else ()
        self._adapter.keep_only([server.plan.url for server in self.upstreams.all()])
        for server in self.upstreams.all():
            ceiling = server.plan.max_concurrency
            if ceiling is None:
                self._adapter.forget(server.plan.url)
                continue
            server.pace = server.pace or Pace()
            self._adapter.follow(server.plan.url, ceiling, curve, partial(self._sense, server), self._clock.now_ns())

    def _sense(self, server: UpstreamServer) -> Signals:
        gaps_s, events = server.pace.take() if server.pace is not None else (0.0, 0)
        in_flight = self._admission.in_flight_at(server.plan.url)
        return Signals(
            in_flight=in_flight,
            queued=self._admission.queued,
            gaps_s=gaps_s,
            gap_events=events,
            replies=server.replies,
            busy_replies=server.busy_replies,
            engine=server.engine.latest,
        )

    def _set_limit(self, url: str, limit: int, now_ns: int) -> None:
        self.permits.tell(self._admission.set_limit(url, limit, now_ns))

    def _adapt(self) -> None:
        assert self._adapter is not None, "only called where the limit is adaptive"
        now_ns = self._clock.now_ns()
        self._adapter.tick(now_ns)
        self._adapting = self._clock.call_at(now_ns + TICK_NS, self._adapt)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse what is new, finish what waits or runs, then stop. /health says so meanwhile."""
        self.draining = True
        for relay in self._relays:
            relay.response.close_after = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle()
        except TimeoutError:
            self._log(f"{len(self._relays)} requests were cut: the time to drain is over")
        else:
            await self._send_the_last()
        await self.stop()

    async def _idle(self) -> None:
        if self._relays:
            self._empty.clear()
            await self._empty.wait()

    async def _send_the_last(self) -> None:
        """What has been answered may not have reached its client yet."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_BYTES_S):
                await self.server.drain()

    async def stop(self) -> None:
        """Stop listening and cut what is left."""
        await self.server.stop()
        await self.upstreams.close()
        self.permits.close()
        self._sampler.stop()
        for timer in (self._sweeper, self._adapting):
            if timer is not None:
                timer.cancel()
        self._sweeper = self._adapting = None
        if self._shared_quotas is not None:
            await self._shared_quotas.close()
        if self._access_log is not None:
            self._access_log.close()

    # -- what relays need (relay.Shared)

    def now_ns(self) -> int:
        return self._clock.now_ns()

    def upstream(self, name: str) -> UpstreamServer:
        return self.upstreams[name]

    def any_up_besides(self, tried: frozenset[str]) -> bool:
        """There is another upstream to try."""
        others = (server.plan.url for server in self.upstreams.all() if server.plan.url not in tried)
        return any(self._admission.is_up(url) for url in others)

    def wait_hint_s(self, outcome: Outcome) -> float:
        """When to come back: from the measured drain rate; before there is one, the shortest bound that applies."""
        if outcome in (Outcome.NO_UPSTREAM, Outcome.DRAINING):
            return _UPSTREAM_BACK_S
        measured_s = self._admission.retry_after_s(self._clock.now_ns())
        if measured_s is not None:
            return measured_s
        limits = self.enforced.limits
        bounds = [bound for bound in (limits.queue_timeout_s, limits.request_timeout_s) if bound is not None]
        return min(bounds, default=_UNKNOWN_WAIT_S)

    # -- figures

    @property
    def in_flight(self) -> int:
        """Requests that run or wait."""
        return len(self._relays)

    def warn(self, subject: str, warning: str) -> None:
        """What was found out while running: another model, a limits file that cannot be read; empty: all well again."""
        if self._warnings.get(subject, "") == warning:
            return
        if warning:
            self._warnings[subject] = warning
            self._log(warning)
        else:
            del self._warnings[subject]

    def resources(self) -> Resources:
        """The latest reading of this machine."""
        return self._sampler.latest

    def now(self) -> Now:
        """What runs at this moment."""
        admission = self._admission
        now_ns = self._clock.now_ns()
        oldest = next((relay for relay in self._relays if relay.running), None)
        return Now(
            in_flight=admission.in_flight,
            queued=len(self._relays) - admission.in_flight,
            oldest_in_flight_s=None if oldest is None else (now_ns - oldest.arrived_ns) / 1e9,
            capacity=admission.capacity,
            upstreams=tuple(self._upstream_now(server) for server in self.upstreams.all()),
            draining=self.draining,
            limits=self.enforced.limits_document(),
            evidence=self.enforced.evidence_document(),
            warnings=(*self.enforced.warnings, *self._warnings.values()),
            retry_after_s=admission.retry_after_s(now_ns),
        )

    def _upstream_now(self, server: UpstreamServer) -> UpstreamNow:
        admission, url = self._admission, server.plan.url
        engine = server.engine.latest
        return UpstreamNow(
            name=url,
            up=server.health.takes_requests,
            state=server.health.condition.value,
            in_flight=admission.in_flight_at(url),
            limit=admission.limit_at(url),
            configured_limit=server.plan.max_concurrency,
            weight=server.plan.weight,
            reason=server.health.reason or (self._adapter.reason(url) if self._adapter is not None else ""),
            kv_use=engine.metrics.kv_use if engine is not None else None,
        )

    # -- a request

    def handle(self, request: IncomingRequest, response: Response) -> None:
        """One request, whole."""
        admin = bool(self.options.admin_key) and is_admin(request.headers, self.options.admin_key)
        if self._pages.serve(request, response, admin=admin):
            return
        self.status.received()
        arrived_ns = self._clock.now_ns()
        account = self._account(request)
        self._ids += 1
        fresh_id = b"%b%x" % (self._id_prefix, self._ids)
        job = Job(
            request.method,
            relayed_target(request.target, request.path, request.query),
            without_admin_key(request.headers, self.options.admin_key) if admin else request.headers,
            request.body,
            request_id(first(request.headers, b"x-request-id"), fresh_id),
            request.peer.encode("ascii", "replace"),
            account.forwarded,
        )
        timeout_s = self.enforced.limits.request_timeout_s
        deadline_ns = _NEVER_NS if timeout_s is None else arrived_ns + int(timeout_s * 1e9)
        want = Want(account.client, deadline_ns, priority=account.priority, unlimited=admin or self.options.unlimited)
        relay = Relay(self, job, want, response, arrived_ns, account.headers, self._finished)
        self._relays[relay] = account
        if self.draining:
            response.close_after = True
            relay.refuse(Outcome.DRAINING)
        elif not (account.known or admin):
            relay.refuse(Outcome.UNAUTHORIZED, "send Authorization: Bearer KEY")
        else:
            self._shape(relay, request)

    def _shape(self, relay: Relay, request: IncomingRequest) -> None:
        """Hold the body to the limits, then ask for quota and place."""
        try:
            shaped = self._shaped(request)
        except BadAskError as error:
            coding = first(request.headers, b"content-encoding")
            unread = f"Content-Encoding {coding.decode('latin-1')} is not read here; send it as it is" if coding else ""
            relay.refuse(Outcome.BAD_REQUEST, unread or str(error), error.param)
            return
        relay.job.body = shaped.body
        if request.method in _SAFE and request.path.rstrip("/").endswith(_METADATA):
            relay.want = _wants(relay.want, shaped, affinity=False, unlimited=True)
            self._begin(relay)
            return
        relay.want = _wants(relay.want, shaped, affinity=self.options.affinity, unlimited=relay.want.unlimited)
        if relay.want.unlimited:
            self._begin(relay)
        elif self._shared_quotas is not None:
            self._in_background(self._reserve_shared(relay, self._shared_quotas))
        else:
            account = self._relays[relay]
            self._reserved(relay, self.quotas.reserve(account.client, shaped.tokens, self._clock.now_ns()))

    def _shaped(self, request: IncomingRequest) -> Shaped:
        """A server reads a path without its percent signs, and so must who holds it to limits. Raises BadAskError."""
        if request.method not in _WITH_BODY:
            return Shaped(request.body, 0)
        path = unquote(request.path) if "%" in request.path else request.path
        return shape(path, first(request.headers, b"content-type"), request.body, self.enforced.limits)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _reserve_shared(self, relay: Relay, quotas: "SharedQuotas") -> None:
        relay.response.on_disconnect = relay.client_gone
        reservation = await quotas.reserve(relay.want.client, relay.want.tokens)
        standings = await quotas.standings(relay.want.client)
        if relay.ended:
            if not isinstance(reservation, Exceeded):
                await quotas.refund(reservation)
            return
        self._relays[relay].standings = standings
        self._reserved(relay, reservation)

    def _reserved(self, relay: Relay, reservation: Reservation | Exceeded) -> None:
        if isinstance(reservation, Exceeded):
            detail = f"{reservation.limit} {reservation.what} a {reservation.window} are allowed"
            relay.refuse(Outcome.RATE_LIMITED, detail, wait_s=reservation.retry_after_s)
            return
        self._relays[relay].reservation = reservation
        self._begin(relay)

    def _begin(self, relay: Relay) -> None:
        if self._sweeper is None and relay.want.deadline_ns != _NEVER_NS:
            self._sweeper = self._clock.call_at(self._clock.now_ns() + _SWEEP_NS, self._sweep)
        relay.begin()

    def _sweep(self) -> None:
        """End what has run beyond its deadline; one timer for all, exact to a tenth of a second."""
        self._sweeper = None
        now_ns = self._clock.now_ns()
        for relay in [r for r in self._relays if r.running and r.want.deadline_ns <= now_ns]:
            relay.expire()
        if self._relays:
            self._sweeper = self._clock.call_at(now_ns + _SWEEP_NS, self._sweep)

    def _account(self, request: IncomingRequest) -> "_Account":
        """Who asks."""
        given = [value for name, value in request.headers if name == b"x-forwarded-for"]
        caller = self._callers.find(request.peer, given)
        forwarded = given if caller.proxied else []
        keys = self.options.api_keys
        if keys is None:
            return _Account(self, caller.key, caller.address, forwarded)
        key = keys.identify(request.headers)
        if key is None:
            return _Account(self, caller.key, caller.address, forwarded, known=False)
        return _Account(self, f"key:{key.name}", caller.address, forwarded, priority=key.priority)

    # -- ends

    def _finished(self, relay: Relay, finished: Finished) -> None:
        account = self._relays.pop(relay)
        self._settle(relay, account, finished)
        first_ns, granted_ns = finished.first_ns, finished.granted_ns
        self.status.ended(
            Ended(
                finished.outcome,
                account.client,
                finished.upstream,
                finished.admitted,
                (finished.ended_ns - finished.arrived_ns) / 1e9,
                (first_ns - finished.arrived_ns) / 1e9 if first_ns else None,
                ((granted_ns or finished.ended_ns) - finished.arrived_ns) / 1e9,
                finished.output_tokens,
            ),
            finished.ended_ns / 1e9,
        )
        if self._access_log is not None:
            self._access_log.write(relay, account.client, account.address, finished)
        if not self._relays:
            self._empty.set()

    def _settle(self, relay: Relay, account: "_Account", finished: Finished) -> None:
        """What was served is paid for; a request that was refused, by anyone, costs nothing."""
        reservation = account.reservation
        if reservation is None:
            return
        served = finished.paid_for
        if self._shared_quotas is not None:
            spent = _spent(relay, finished) if served else None
            self._in_background(_settle_shared(self._shared_quotas, reservation, spent))
        elif served:
            self.quotas.settle(reservation, _spent(relay, finished), finished.ended_ns)
        else:
            self.quotas.refund(reservation, finished.ended_ns)

    def _rejected(self, status: int) -> None:
        """The server refused what was no proper request."""
        self.status.received()
        now_s = self._clock.now_ns() / 1e9
        self.status.ended(Ended(Outcome.BAD_REQUEST, "", "", False, 0.0, None, 0.0, 0), now_s)


@dataclass(slots=True)
class _Account:
    """Whose request it is, and what it has taken from the quota."""

    gate: Gate
    client: str
    address: str
    forwarded: list[bytes]
    priority: int = 0
    known: bool = True
    reservation: Reservation | None = None
    standings: list[Standing] | None = None
    """How the client stood when this was asked for; from Redis, where quotas are shared."""

    def headers(self) -> list[Header]:
        """Where the client stands with its quota."""
        if self.standings is None:
            if not self.known:
                return []
            self.standings = self.gate.quotas.standings(self.client, self.gate.now_ns())
        return rate_limit_headers(self.standings)


async def _settle_shared(quotas: "SharedQuotas", reservation: Reservation, spent: int | None) -> None:
    if spent is None:
        await quotas.refund(reservation)
    else:
        await quotas.settle(reservation, spent)


def _wants(want: Want, shaped: Shaped, *, affinity: bool, unlimited: bool) -> Want:
    return Want(
        want.client,
        want.deadline_ns,
        tokens=shaped.tokens,
        priority=want.priority,
        affinity=shaped.affinity if affinity else None,
        unlimited=unlimited,
    )


def _spent(relay: Relay, finished: Finished) -> int:
    """Tokens as the server counted them; else the prompt as estimated and the output as seen."""
    if finished.tokens is not None:
        return finished.tokens
    prompt = -(-len(relay.job.body) // 4)
    return min(relay.want.tokens, prompt + finished.output_tokens)


def _admission_settings(enforced: Enforced) -> AdmissionSettings:
    limits = enforced.limits
    return AdmissionSettings(
        max_queue=limits.max_queue,
        queue_timeout_ns=None if limits.queue_timeout_s is None else int(limits.queue_timeout_s * 1e9),
        max_total=None,
        slow_start_ns=_SLOW_START_NS,
    )


def _protocol_error(status: int, reason: str) -> tuple[list[Header], bytes]:
    headers = [(b"content-type", b"application/json"), (b"x-loadstone-reason", b"bad_request")]
    return headers, protocol_error_body(status, reason)
