"""Wires the adaptive limit to the gate: what each upstream tells goes in, its limit comes out, twice a second."""

from collections.abc import Callable
from functools import partial

from loadstone.core.clock import Clock, Timer
from loadstone.hold.adapter import TICK_NS, Adapter
from loadstone.hold.configuration import Enforced
from loadstone.hold.permits import Permits
from loadstone.hold.signals import Pace, Signals
from loadstone.hold.upstreams import Upstreams, UpstreamServer


class Steering:
    """Runs from ``start`` to ``stop``; call ``follow`` whenever upstreams or limits were configured."""

    def __init__(self, permits: Permits, upstreams: Upstreams, clock: Clock, log: Callable[[str], None]) -> None:
        self._permits = permits
        self._upstreams = upstreams
        self._clock = clock
        self._adapter = Adapter(self._set_limit, log)
        self._timer: Timer | None = None

    def __repr__(self) -> str:
        return f"<Steering {self._adapter!r}>"

    def start(self) -> None:
        """Decide from now on."""
        self._timer = self._clock.call_at(self._clock.now_ns() + TICK_NS, self._tick)

    def stop(self) -> None:
        """Decide nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def follow(self, enforced: Enforced) -> None:
        """Begin with the configured limit of each upstream, or keep what was learnt over a reload."""
        curve = enforced.evidence.levels if enforced.evidence is not None else ()
        servers = self._upstreams.all()
        self._adapter.keep_only([server.plan.url for server in servers])
        for server in servers:
            url, ceiling = server.plan.url, server.plan.max_concurrency
            if ceiling is None:
                self._adapter.forget(url)
            else:
                server.pace = server.pace or Pace()
                self._adapter.follow(url, ceiling, curve, partial(self._sense, server), self._clock.now_ns())

    def reason(self, url: str) -> str:
        """What last changed the limit of an upstream; empty where nothing has."""
        return self._adapter.reason(url)

    def _sense(self, server: UpstreamServer) -> Signals:
        gaps_s, events = server.pace.take() if server.pace is not None else (0.0, 0)
        admission = self._permits.admission
        return Signals(
            in_flight=admission.in_flight_at(server.plan.url),
            queued=admission.queued,
            gaps_s=gaps_s,
            gap_events=events,
            replies=server.replies,
            busy_replies=server.busy_replies,
            engine=server.engine.latest,
        )

    def _set_limit(self, url: str, limit: int, now_ns: int) -> None:
        self._permits.tell(self._permits.admission.set_limit(url, limit, now_ns))

    def _tick(self) -> None:
        now_ns = self._clock.now_ns()
        self._adapter.tick(now_ns)
        self._timer = self._clock.call_at(now_ns + TICK_NS, self._tick)
