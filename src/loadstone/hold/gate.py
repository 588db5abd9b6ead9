"""The gate: its parts put together, its life, and what it tells about itself. A request's way is ``front``'s."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from loadstone.core.admission import Admission, AdmissionSettings
from loadstone.core.clock import Clock
from loadstone.core.refusals import protocol_error_body
from loadstone.hold.access_log import AccessLog
from loadstone.hold.api_keys import is_admin
from loadstone.hold.configuration import Enforced
from loadstone.hold.front import Front
from loadstone.hold.headers import Header
from loadstone.hold.options import GateOptions
from loadstone.hold.pages import Pages
from loadstone.hold.permits import Permits
from loadstone.hold.resources import Resources, Sampler
from loadstone.hold.status import Now, UpstreamNow
from loadstone.hold.steering import Steering
from loadstone.hold.upstreams import Upstreams, UpstreamServer
from loadstone.wire.server import HttpServer, IncomingRequest, Response

if TYPE_CHECKING:
    # Importing Redis takes as long as everything else together, and few need it.
    from loadstone.hold.shared_quota import SharedQuotas

_SLOW_START_NS = 10_000_000_000
_LAST_BYTES_S = 5.0


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
        self.permits = Permits(Admission(_admission_settings(enforced)), clock)
        # A key that opens the gate is the gate's own, and goes no further.
        dialing = replace(options.dialing, drop_authorization=options.api_keys is not None)
        self.upstreams = Upstreams(self.permits, clock, dialing, log)
        self.front = Front(
            enforced,
            options,
            self.permits,
            self.upstreams,
            clock,
            access_log=access_log,
            shared_quotas=shared_quotas,
        )
        self.status = self.front.status
        self._clock = clock
        self._log = log
        self._warnings: dict[str, str] = {}
        self._steering = Steering(self.permits, self.upstreams, clock, log) if options.adaptive else None
        self._sampler = Sampler()
        self._admin_key = options.admin_key
        self._pages = Pages(self, protected=bool(options.admin_key))
        self.server = HttpServer(
            self.handle,
            # A gate that limits nothing is not in the way of whoever measures what stands behind it.
            name=b"loadstone-open" if options.unlimited else b"loadstone",
            max_body_bytes=options.max_body_bytes,
            error_body=_protocol_error,
            on_reject=self.front.rejected,
        )

    def __repr__(self) -> str:
        return f"<Gate {self.front!r} {self.permits!r}>"

    # -- life

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError where the address cannot be had."""
        bound = await self.server.start(host, port)
        self.upstreams.configure(self.enforced.upstreams)
        if self._steering is not None:
            self._steering.follow(self.enforced)
            self._steering.start()
        self._sampler.start()
        return bound

    def apply(self, enforced: Enforced) -> None:
        """Put other limits in force; what runs or waits stays, and is judged by the new ones from now on."""
        self.enforced = enforced
        admission = self.permits.admission
        self.permits.tell(admission.configure(_admission_settings(enforced), self._clock.now_ns()))
        self.upstreams.configure(enforced.upstreams)
        if self._steering is not None:
            self._steering.follow(enforced)
        self.front.apply(enforced)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse what is new, finish what waits or runs, then stop. /health says so meanwhile."""
        self.front.drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self.front.until_empty()
        except TimeoutError:
            self._log(f"{self.in_flight} requests were cut: the time to drain is over")
        else:
            await self._send_the_last()
        await self.stop()

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
        if self._steering is not None:
            self._steering.stop()
        await self.front.close()

    # -- a request

    def handle(self, request: IncomingRequest, response: Response) -> None:
        """A page of the gate's own, or a request for an upstream."""
        key = self._admin_key
        admin = key != "" and is_admin(request.headers, key)
        if not self._pages.serve(request, response, admin=admin):
            self.front.handle(request, response, admin=admin)

    # -- what it tells (pages.Teller)

    @property
    def draining(self) -> bool:
        return self.front.draining

    @property
    def in_flight(self) -> int:
        """Requests that run or wait."""
        return self.front.in_flight

    def warn(self, subject: str, warning: str) -> None:
        """What was found out while running: another model, a limits file that cannot be read; empty: all well again."""
        if self._warnings.get(subject, "") == warning:
            return
        if warning:
            self._warnings[subject] = warning
            self._log(warning)
        else:
            del self._warnings[subject]

    def now_ns(self) -> int:
        return self._clock.now_ns()

    def resources(self) -> Resources:
        """The latest reading of this machine."""
        return self._sampler.latest

    def now(self) -> Now:
        """What runs at this moment."""
        admission = self.permits.admission
        return Now(
            in_flight=admission.in_flight,
            queued=self.front.in_flight - admission.in_flight,
            oldest_in_flight_s=self.front.oldest_s,
            capacity=admission.capacity,
            upstreams=tuple(self._upstream_now(server) for server in self.upstreams.all()),
            draining=self.draining,
            limits=self.enforced.limits_document(),
            evidence=self.enforced.evidence_document(),
            warnings=(*self.enforced.warnings, *self._warnings.values()),
            retry_after_s=admission.retry_after_s(self._clock.now_ns()),
            service=self.options.service(),
        )

    def _upstream_now(self, server: UpstreamServer) -> UpstreamNow:
        admission, url = self.permits.admission, server.plan.url
        engine = server.engine.latest
        steered = self._steering.reason(url) if self._steering is not None else ""
        return UpstreamNow(
            name=url,
            up=server.health.takes_requests,
            state=server.health.condition.value,
            in_flight=admission.in_flight_at(url),
            limit=admission.limit_at(url),
            configured_limit=server.plan.max_concurrency,
            weight=server.plan.weight,
            reason=server.health.reason or steered,
            kv_use=engine.metrics.kv_use if engine is not None else None,
        )


def _admission_settings(enforced: Enforced) -> AdmissionSettings:
    limits = enforced.limits
    return AdmissionSettings(
        max_queue=limits.max_queue,
        standing_queue=enforced.standing_queue,
        queue_timeout_ns=None if limits.queue_timeout_s is None else int(limits.queue_timeout_s * 1e9),
        slow_start_ns=_SLOW_START_NS,
    )


def _protocol_error(status: int, reason: str) -> tuple[list[Header], bytes]:
    headers = [(b"content-type", b"application/json"), (b"x-loadstone-reason", b"bad_request")]
    return headers, protocol_error_body(status, reason)
