"""Whose turn it is: higher priority first, then fair between clients by served cost, then first come first served.

Each priority keeps a virtual counter for each client (VTC, arXiv 2401.00588). A grant charges the request's tokens to
it at once, 1 where they are unknown; the real cost corrects that later. The client with the least counter goes next; of
equal ones, the request that came first.

No hoarding
    A client that had nothing waiting starts at the *floor* when it comes, unless it stands higher: the least counter of
    those that wait, or where nobody does, the counter of the client served last. So an idle time earns no credit.
    A correction downwards stops where the latest newcomer started: that level may have been reached only by
    reservations, and a client that takes them back must not stand before all those that joined it there. Where
    newcomers keep coming the turns of a client that reserves too much may thus be counted dearer than they were, up to
    turn about; otherwise the account is exact.

Starvation
    The one whose turn it is keeps it until it is served or leaves, except that corrections may show that another has
    had less. Nothing ages: a priority waits for as long as a higher one has anything waiting.

Memory
    Clients with nothing waiting and nothing running are forgotten.
"""

from bisect import insort
from collections import OrderedDict

from loadstone.core.lazy_heap import LazyHeap
from loadstone.core.tickets import Share, Ticket

_BANDS_KEPT = 8
"""Empty priorities that may stay, so that the usual ones are not made anew for each request."""


class _Band:
    """One priority."""

    __slots__ = ("entry", "last", "priority", "shares", "turns", "waiting")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.shares: dict[str, Share] = {}
        self.turns: LazyHeap[Share] = LazyHeap()
        """The clients that wait, by (counter, order of their first ticket)."""
        self.waiting = 0
        self.last: Share | None = None
        """Served last."""
        self.entry = 0
        """Where the latest newcomer started."""

    def join(self, client: str) -> Share:
        """The client's share, level with the floor unless it has something waiting."""
        share = self.shares.get(client)
        if share is None:
            share = self.shares[client] = Share(client)
        if not share.waiting:
            least = self.last if not self.waiting else self.turns.first() or self.last
            floor = 0 if least is None else least.counter
            if share.counter <= floor:
                share.counter = self.entry = floor
        return share

    def place(self, share: Share) -> None:
        """Bring the share's place among the turns up to date."""
        if share.waiting:
            self.turns.put((share.counter, next(iter(share.waiting)).number), share)
        else:
            self.turns.discard(share)

    def forget_if_idle(self, share: Share) -> None:
        if not share.running and not share.waiting:
            self.shares.pop(share.client, None)


class FairQueue:
    """The waiting tickets in the order of their turns, and what each client was served."""

    __slots__ = ("_bands", "_numbers", "_order")

    def __init__(self) -> None:
        self._bands: dict[int, _Band] = {}
        self._order: list[_Band] = []
        """The priorities in which something waits, highest first."""
        self._numbers = 0

    def head(self) -> Ticket | None:
        """The one whose turn it is."""
        if not self._order:
            return None
        share = self._order[0].turns.first()
        assert share is not None
        assert share.waiting
        return next(iter(share.waiting))

    def leads(self, priority: int) -> bool:
        """Whether a newcomer would have the next turn: only before lower priorities, never before its equals."""
        return not self._order or priority > self._order[0].priority

    def push(self, ticket: Ticket) -> None:
        """Let it wait for its turn."""
        band = self._band(ticket.want.priority)
        share = band.join(ticket.want.client)
        self._numbers += 1
        ticket.number = self._numbers
        if share.waiting is None:
            share.waiting = OrderedDict()
        share.waiting[ticket] = None
        band.waiting += 1
        if band.waiting == 1:
            insort(self._order, band, key=lambda it: -it.priority)
        if len(share.waiting) == 1:
            band.place(share)

    def remove(self, ticket: Ticket) -> None:
        """It waits no longer."""
        band = self._bands[ticket.want.priority]
        share = band.shares[ticket.want.client]
        assert share.waiting is not None
        del share.waiting[ticket]
        band.waiting -= 1
        if not band.waiting:
            self._order.remove(band)
        band.place(share)
        self._tidy(band, share)

    def charge(self, ticket: Ticket) -> None:
        """It was granted: its client pays for it. One that waited is removed afterwards."""
        want = ticket.want
        band = self._band(want.priority)
        share = band.join(want.client)
        ticket.share = band.last = share
        ticket.charge = charge = want.tokens or 1
        share.counter += charge
        share.running += 1

    def correct(self, ticket: Ticket, tokens: int) -> None:
        """Its cost turned out to be ``tokens``."""
        share, tokens = ticket.share, max(1, tokens)
        assert share is not None
        more = tokens - ticket.charge
        if not more:
            return
        band = self._bands[ticket.want.priority]
        ticket.charge = tokens
        if more > 0 or share.counter + more >= band.entry:
            share.counter += more
        elif share.counter > band.entry:
            share.counter = band.entry
        if share.waiting:
            band.place(share)

    def end(self, ticket: Ticket, tokens: int | None = None) -> None:
        """It runs no longer; what it was charged stands, or becomes ``tokens``."""
        share = ticket.share
        assert share is not None
        if tokens is not None:
            self.correct(ticket, tokens)
        share.running -= 1
        if not share.running and not share.waiting:
            self._tidy(self._bands[ticket.want.priority], share)

    def ahead_of(self, client: str, priority: int) -> int:
        """About how many waiting tickets a newcomer would let go first, in O(priorities).

        All of higher priority; of its own, those of its client, and from each other client one for each turn that its
        own client would need, as far as so many wait at all.
        """
        ahead = 0
        for band in self._order:
            if band.priority < priority:
                break
            if band.priority > priority:
                ahead += band.waiting
                continue
            share = band.shares.get(client)
            own = len(share.waiting or ()) if share else 0
            others = len(band.turns) - (own > 0)
            ahead += min(band.waiting, own + others * (own + 1))
        return ahead

    def _band(self, priority: int) -> _Band:
        band = self._bands.get(priority)
        if band is None:
            band = self._bands[priority] = _Band(priority)
        return band

    def _tidy(self, band: _Band, share: Share) -> None:
        band.forget_if_idle(share)
        if not band.shares and len(self._bands) > _BANDS_KEPT:
            del self._bands[band.priority]

    def __repr__(self) -> str:
        waiting = sum(band.waiting for band in self._order)
        return f"<FairQueue of {waiting}, {sum(len(band.shares) for band in self._bands.values())} clients>"
