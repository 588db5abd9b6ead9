"""A service under limits, run to its end in virtual time."""

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from asgi_calls import Model
from loadstone.core.clock import Clock
from loadstone.core.limits import Limits, LimitsFile
from loadstone.core.settings import LimitSettings
from loadstone.hold.asgi_messages import App, Receive, Scope, Send
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.configuration import enforce
from loadstone.hold.passage import Passage
from loadstone.hold.service import Rules, Service
from loadstone.sim.clock import VirtualClock, run_virtual

OPEN = Limits(max_queue=10)


class Held:
    """A service under limits, on a virtual clock."""

    def __init__(self, clock: Clock, limits: Limits, act: App | None = None, **rules: Any) -> None:
        enforced = enforce(LimitsFile(limits), "", LimitSettings(), ["http://app"], datetime(2026, 1, 1, tzinfo=UTC))
        given = {"admin_key": "", "client_of": None, "max_body_bytes": 1000, "tells": False} | rules
        self.model = Model(act)
        self.service = Service(Rules(enforced, TrustedProxies(), **given), clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Passage(self.service, self.model, scope, receive, send).run()

    @property
    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.service.stats())
        return found

    @property
    def outcomes(self) -> dict[str, int]:
        return {name: count for name, count in self.stats["outcomes"].items() if count}

    @property
    def standing(self) -> tuple[int, int]:
        return self.stats["in_flight"], self.stats["queued"]


def virtually(limits: Limits, act: App | None = None, **rules: Any) -> Callable[..., None]:
    """Run a test's coroutine function with a service; afterwards nothing is left in it."""

    def decorate(test: Callable[[Held], Awaitable[None]]) -> None:
        async def main(clock: VirtualClock) -> None:
            held = Held(clock, limits, act, **rules)
            await test(held)
            stats = held.stats
            assert (stats["in_flight"], stats["queued"]) == (0, 0)
            assert sum(stats["outcomes"].values()) == stats["received"]
            admission = held.service.permits.admission
            assert (held.service.idle, admission.in_flight, admission.queued) == (True, 0, 0)
            assert "0 requests" in repr(held.service.deadlines)
            assert stats["oldest_in_flight_s"] is None
            held.service.close()

        run_virtual(main)

    return decorate
