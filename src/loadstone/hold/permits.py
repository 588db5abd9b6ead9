"""The asyncio shell over ``core.admission``: who is told when a ticket changes, and the one timer of all that wait."""

from collections import deque
from collections.abc import Callable, Iterable

from loadstone.core.admission import Admission, State, Ticket, Want
from loadstone.core.clock import Clock, Timer

# An enumeration's members are slow to read in Python 3.11, and this one is read for every request.
_QUEUED = State.QUEUED

OnChange = Callable[[Ticket], None]


class Permits:
    """Tickets and whom they belong to. All calls are synchronous; a free slot is granted within ``take``."""

    def __init__(self, admission: Admission, clock: Clock) -> None:
        self.admission = admission
        self._clock = clock
        self._waiting: dict[Ticket, OnChange] = {}
        self._changed: deque[Ticket] = deque()
        self._telling = False
        self._timer: Timer | None = None
        self._timer_ns = 0

    def __repr__(self) -> str:
        return f"<Permits {self.admission!r}>"

    def take(self, want: Want, on_change: OnChange) -> Ticket:
        """Ask for a slot. ``on_change`` is called once, later, if the ticket has to queue."""
        ticket = self.admission.offer(want, self._clock.now_ns())
        if ticket.state is _QUEUED:
            self._wait(ticket, on_change)
        return ticket

    def move(self, ticket: Ticket, avoid: frozenset[str], on_change: OnChange) -> None:
        """Take a failed request elsewhere, keeping its turn; the ticket says at once what came of it."""
        changed = self.admission.move(ticket, self._clock.now_ns(), avoid)
        if ticket.state is _QUEUED:
            self._wait(ticket, on_change)
        self.tell([other for other in changed if other is not ticket])

    def release(self, ticket: Ticket, served_tokens: int | None = None) -> None:
        """The upstream's last byte has been read, or its connection closed. Further calls change nothing."""
        changed = self.admission.release(ticket, self._clock.now_ns(), served_tokens)
        if changed or self._waiting:
            self.tell(changed)

    def cancel(self, ticket: Ticket) -> None:
        """The client has left, waiting or served."""
        self._waiting.pop(ticket, None)
        self.tell(self.admission.cancel(ticket, self._clock.now_ns()))

    def _wait(self, ticket: Ticket, on_change: OnChange) -> None:
        self._waiting[ticket] = on_change
        self._arm()

    def tell(self, changed: Iterable[Ticket]) -> None:
        """Tell the owners of tickets that were granted or refused; one after the other, never one within another."""
        self._changed.extend(changed)
        if self._telling:
            return
        self._telling = True
        try:
            while self._changed:
                ticket = self._changed.popleft()
                on_change = self._waiting.pop(ticket, None)
                if on_change is not None:
                    on_change(ticket)
        finally:
            self._telling = False
        if self._waiting or self._timer is not None:
            self._arm()

    def _arm(self) -> None:
        """Any call may have moved the time of the next tick; where nothing waits, nothing can become due."""
        wanted_ns = self.admission.next_tick_ns if self._waiting else None
        if self._timer is not None and (wanted_ns is None or wanted_ns != self._timer_ns):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and wanted_ns is not None:
            self._timer_ns = wanted_ns
            self._timer = self._clock.call_at(wanted_ns, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.tell(self.admission.tick(self._clock.now_ns()))
        self._arm()

    def close(self) -> None:
        """Drop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
