"""All tickets that wait: in the order of their turns, of their arrival and of their deadlines."""

from bisect import insort
from collections import OrderedDict

from loadstone.core.fairness import FairQueue
from loadstone.core.lazy_heap import LazyHeap
from loadstone.core.tickets import State, Ticket


class Waiting:
    """Tickets that were moved stand apart, before all others."""

    __slots__ = ("_deadlines", "by_age", "fair", "moved")

    def __init__(self, fair: FairQueue) -> None:
        self.fair = fair
        self.moved: list[Ticket] = []
        """Those that wait after a move, by priority and age; all others wait in ``fair``."""
        self.by_age: OrderedDict[Ticket, None] = OrderedDict()
        """All of them, the one that has waited longest first."""
        self._deadlines: LazyHeap[Ticket] = LazyHeap()

    @property
    def oldest(self) -> Ticket | None:
        return next(iter(self.by_age), None)

    @property
    def most_urgent(self) -> Ticket | None:
        """The one with the earliest deadline."""
        return self._deadlines.first()

    def add(self, ticket: Ticket, now_ns: int) -> None:
        """A newcomer waits for its turn."""
        self._enter(ticket, now_ns)
        self.fair.push(ticket)

    def add_moved(self, ticket: Ticket, now_ns: int, avoid: frozenset[str]) -> None:
        """It waits again, anywhere but there."""
        self._enter(ticket, now_ns)
        ticket.avoid = avoid
        insort(self.moved, ticket, key=lambda it: (-it.want.priority, it.offered_ns))

    def remove(self, ticket: Ticket) -> None:
        """It waits no longer. One that is granted must be charged for before, lest its client be forgotten between."""
        del self.by_age[ticket]
        self._deadlines.discard(ticket)
        if ticket.avoid is None:
            self.fair.remove(ticket)
        else:
            self.moved.remove(ticket)
            ticket.avoid = None

    def _enter(self, ticket: Ticket, now_ns: int) -> None:
        ticket.state = State.QUEUED
        ticket.queued_ns = now_ns
        self.by_age[ticket] = None
        self._deadlines.put(ticket.want.deadline_ns, ticket)

    def __repr__(self) -> str:
        return f"<Waiting: {len(self.by_age)}, {len(self.moved)} of them moved>"
