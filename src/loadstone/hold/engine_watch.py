"""Reads an upstream's own figures from its ``/metrics``, once a second, where it has any."""

import asyncio
from collections.abc import Awaitable, Callable

from loadstone.core.clock import Clock
from loadstone.core.engine_metrics import read_engine_metrics
from loadstone.hold.signals import Reading

READ_EVERY_S = 1.0
ASK_AGAIN_S = 60.0
"""After an answer that it has no such page, or one that is no engine's."""


class EngineWatch:
    """``latest`` is None while the upstream tells nothing."""

    def __init__(self, ask: Callable[[], Awaitable[tuple[int, bytes] | None]], clock: Clock) -> None:
        """``ask`` gets the page: its status and body, or None where no answer came."""
        self.latest: Reading | None = None
        self._ask = ask
        self._clock = clock

    async def watch(self) -> None:
        """Read until cancelled."""
        while True:
            pause_s = await self.read()
            await asyncio.sleep(pause_s)

    async def read(self) -> float:
        """Read once; returns the seconds to let pass before the next time."""
        answer = await self._ask()
        self.latest = None
        if answer is None or answer[0] >= 500:
            return READ_EVERY_S
        status, body = answer
        if status != 200:
            return ASK_AGAIN_S
        metrics = read_engine_metrics(body.decode("utf-8", "replace"))
        if not metrics.engine:
            return ASK_AGAIN_S
        self.latest = Reading(self._clock.now_ns(), metrics)
        return READ_EVERY_S

    def __repr__(self) -> str:
        return f"<EngineWatch of {self.latest.metrics.engine if self.latest else 'nothing'}>"
