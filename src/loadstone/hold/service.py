"""What all requests of one service share that admits them itself: permits, quotas, figures. One for each event loop."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from loadstone.core.admission import Admission, AdmissionSettings, Ticket
from loadstone.core.clock import Clock
from loadstone.core.quota import Quotas
from loadstone.hold.asgi_messages import Scope
from loadstone.hold.clients import Callers, TrustedProxies
from loadstone.hold.configuration import Enforced
from loadstone.hold.deadlines import Deadlines
from loadstone.hold.endings import Header, wait_hint_s
from loadstone.hold.headers import header_pairs
from loadstone.hold.permits import Permits
from loadstone.hold.rate_headers import rate_limit_lines
from loadstone.hold.resources import Sampler
from loadstone.hold.status import Ended, Now, Status, UpstreamNow

APP = "app"
"""The name under which the service stands in figures, where a gate has its upstreams."""


@dataclass(frozen=True)
class Rules:
    """What does not change while the service runs."""

    enforced: Enforced
    trusted: TrustedProxies
    admin_key: str
    client_of: Callable[[Scope], str] | None
    max_body_bytes: int
    tells: bool
    """Somebody reads ``stats``, so the machine is watched as well."""


class Service:
    """The shared state. ``received`` and ``ended`` once for each request, ``began`` in between where it got a slot."""

    def __init__(self, rules: Rules, clock: Clock) -> None:
        limits = rules.enforced.limits
        now_ns = clock.now_ns()
        self.rules = rules
        self.clock = clock
        self._admission = Admission(AdmissionSettings(limits.max_queue, _ns(limits.queue_timeout_s)))
        self._admission.set_upstream(APP, limits.max_concurrency, 1.0, limits.max_tokens_in_flight, now_ns)
        self.permits = Permits(self._admission, clock)
        self.deadlines = Deadlines(clock, _ns(limits.request_timeout_s))
        self.quotas = Quotas(rules.enforced.quotas)
        self._callers = Callers(rules.trusted)
        self._status = Status(now_ns / 1e9)
        self._under_way = 0
        self._running: dict[Ticket, int] = {}
        self._sampler = Sampler()
        if rules.tells:
            self._sampler.start()

    def __repr__(self) -> str:
        return f"<Service {self._admission!r}, {self._under_way} under way>"

    @property
    def idle(self) -> bool:
        """No request waits or runs."""
        return self._under_way == 0

    def client(self, scope: Scope) -> str:
        """Under whom the quotas of a request are counted."""
        if self.rules.client_of is not None:
            return self.rules.client_of(scope)
        peer = scope.get("client")
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        return self._callers.find(peer[0] if peer else "", forwarded).key

    def rate_headers(self, client: str) -> list[Header]:
        """How the client stands now."""
        return header_pairs(rate_limit_lines(self.quotas.standings(client, self.clock.now_ns())))

    def wait_hint_s(self) -> float:
        """When one that is refused for want of room may come back."""
        return wait_hint_s(self._admission.retry_after_s(self.clock.now_ns()), self.rules.enforced.limits)

    def received(self) -> None:
        """A request has arrived."""
        self._under_way += 1
        self._status.received()

    def began(self, ticket: Ticket, arrived_ns: int) -> None:
        """It got a slot."""
        self._running[ticket] = arrived_ns

    def ended(self, ticket: Ticket | None, ended: Ended) -> None:
        """It is over."""
        self._under_way -= 1
        if ticket is not None:
            self._running.pop(ticket, None)
        self._status.ended(ended, self.clock.now_ns() / 1e9)

    def stats(self) -> bytes:
        """The document of ``/stats``, as a gate tells it; JSON."""
        now_ns = self.clock.now_ns()
        return msgspec.json.encode(self._status.stats(self._now(now_ns), now_ns / 1e9, self._sampler.latest))

    def _now(self, now_ns: int) -> Now:
        admission, enforced = self._admission, self.rules.enforced
        in_flight = admission.in_flight
        limit = enforced.limits.max_concurrency
        oldest_ns = min(self._running.values(), default=None)
        return Now(
            in_flight=in_flight,
            queued=self._under_way - in_flight,
            oldest_in_flight_s=None if oldest_ns is None else (now_ns - oldest_ns) / 1e9,
            capacity=admission.capacity,
            upstreams=(UpstreamNow(APP, True, "up", in_flight, limit, limit, 1.0, ""),),
            draining=False,
            limits=enforced.limits_document(),
            evidence=enforced.evidence_document(),
            warnings=enforced.warnings,
            retry_after_s=admission.retry_after_s(now_ns),
        )

    def close(self) -> None:
        """Drop the timers and stop watching the machine."""
        self.permits.close()
        self.deadlines.close()
        self._sampler.stop()


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
