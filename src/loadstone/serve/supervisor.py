"""Keeps a service's engines running: starts them, waits for the first, restarts them, stops them with the parent."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from loadstone.core.errors import UnreachableError
from loadstone.serve.child import free_ports
from loadstone.serve.lifecycle import Patience, State
from loadstone.serve.replica import Replica, ReplicaPlan


class Supervisor:
    """Engines, each on a loopback port of its own, within the running asyncio loop.

    An engine that crashes after it has been up, or that gives nothing any more, is started again; one that cannot
    start is left alone. ``say`` gets one line with the remedy for each such event, ``on_change`` is called after each
    change of a replica's state.
    """

    def __init__(
        self,
        plans: Sequence[ReplicaPlan],
        clock_ns: Callable[[], int],
        say: Callable[[str], None],
        on_change: Callable[[], None],
        patience: Patience | None = None,
    ) -> None:
        ports = free_ports(len(plans))
        self.replicas: Sequence[Replica] = [
            Replica(plan, port, patience or Patience(), clock_ns, say, self._changed)
            for plan, port in zip(plans, ports, strict=True)
        ]
        self._say = say
        self._on_change = on_change
        self._lives: list[asyncio.Task[None]] = []
        self._first_up = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Supervisor {self.replicas!r}>"

    async def start(self) -> None:
        """Start all; returns when the first is ready.

        Raises UnreachableError where one dies before that, or is not ready in its time. All are stopped then, and also
        where this call is cancelled.
        """
        self._lives = [asyncio.create_task(self._live(replica)) for replica in self.replicas]
        first_up = asyncio.create_task(self._first_up.wait())
        try:
            done, _ = await asyncio.wait({first_up, *self._lives}, return_when=asyncio.FIRST_COMPLETED)
            if done != {first_up}:
                await self.stop()
                raise UnreachableError(next(one.last_error for one in self.replicas if one.state is State.FAILED))
        except asyncio.CancelledError:
            await self.stop()
            raise
        finally:
            first_up.cancel()

    async def stop(self) -> None:
        """End of input, then SIGTERM, then SIGKILL for each; returns when all are gone. Further calls do nothing."""
        lives, self._lives = self._lives, []
        for life in lives:
            life.cancel()
        ended = await asyncio.gather(*lives, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        for error in ended:
            if error is not None and not isinstance(error, asyncio.CancelledError):
                raise error

    def report_stalled(self, url: str) -> None:
        """Requests run at ``url`` but no byte has come for long: start that engine again. It must be up."""
        for replica in self.replicas:
            if replica.url == url:
                replica.stalled()

    def document(self) -> list[dict[str, Any]]:
        """What /health tells of the engines."""
        return [replica.document() for replica in self.replicas]

    async def _live(self, replica: Replica) -> None:
        await replica.live()
        if self._first_up.is_set():  # before that, ``start`` raises it
            self._say(f"{replica.last_error}; it is not started again")

    def _changed(self) -> None:
        if any(replica.state is State.UP for replica in self.replicas):
            self._first_up.set()
        self._on_change()
