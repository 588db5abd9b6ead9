"""Who may go now, and where: the gate's bounded fair queue as a state machine.

Theory of operation
    ``offer`` makes a ticket GRANTED, QUEUED or REFUSED in one step: check, count and choice of an upstream cannot come
    apart. A GRANTED ticket holds one place (and its tokens) until ``release``, ``cancel`` or ``move``; whatever is
    called afterwards, and however often, changes nothing. Every call that can free room lets the next ones go and
    returns the *other* tickets that it granted or refused: the one it was called for is never among them, it tells its
    own state.
    Nothing happens between calls, so ``tick`` must be called at ``next_tick_ns``, which any call may move.

Turns
    Moved tickets first, among themselves by priority and age, then as ``fairness`` says. The one whose turn it is is
    never passed because it is dear: all that come after it wait until it fits. Only where a moved ticket can't go at
    all, at the upstreams it avoids, others go on. A newcomer goes ahead of those that wait only by its priority.

Refused at once
    NO_UPSTREAM where none is up that could ever take it (the queued ones too, when the last goes down), OVER_BUDGET,
    QUEUE_FULL, and EXPECTED_WAIT where the predicted wait exceeds the queue time-out, or wait and mean service together
    the time to its deadline. Where a place is free nothing is predicted: so a wrong estimate always gets corrected.

Overload
    Where the queue was derived from a measured curve (``standing_queue``) and more than one in ten of the last requests
    found it full, it is shortened, and starts are spaced out (``pacing``), a free place or not.

Refused while waiting
    QUEUE_TIMEOUT at the queue time-out, or once less time is left than the mean service takes; REQUEST_TIMEOUT at the
    deadline. A ticket that is late is never granted.

Limits
    A limit, budget or queue bound lowered below what is there cuts nothing; new ones go once it is kept again. A
    settled cost above the estimate may pass the budget, as it is a fact. All times are monotonic nanoseconds.
"""

from dataclasses import dataclass

from loadstone.core.drain import Drain
from loadstone.core.fairness import FairQueue
from loadstone.core.pacing import Pacing
from loadstone.core.placement import UNBOUNDED, Placement, Upstream
from loadstone.core.tickets import Refusal, State, Ticket, Want
from loadstone.core.waiting import Waiting

__all__ = ["Admission", "AdmissionSettings", "Refusal", "State", "Ticket", "Want"]

_NS = 1_000_000_000
_NONE: frozenset[str] = frozenset()
_OVERLOADED = 0.1
_MEMORY = 64
"""Over so many requests the share of those refused fades."""
# An enumeration's members are slow to read in Python 3.11, and these are read for every request.
_QUEUED, _GRANTED, _REFUSED, _ENDED = State.QUEUED, State.GRANTED, State.REFUSED, State.ENDED


@dataclass(frozen=True)
class AdmissionSettings:
    """Bounds of the whole gate; None is no bound."""

    max_queue: int | None = None
    """0: nothing waits. Moved tickets count, but are never refused for it."""
    queue_timeout_ns: int | None = None
    max_total: int | None = None
    """In flight over all upstreams."""
    slow_start_ns: int = 0
    standing_queue: int | None = None
    """Bound of the queue under lasting overload, while more than one in ten of the last requests were refused for it:
    what a burst needs only delays everyone then. None: ``max_queue`` holds throughout."""


class Admission:
    """The state machine. Upstream names that were never set raise KeyError."""

    __slots__ = ("_drain", "_fair", "_pacing", "_places", "_refused_share", "_settings", "_waiting")

    def __init__(self, settings: AdmissionSettings) -> None:
        self._places = Placement()
        self._fair = FairQueue()
        self._waiting = Waiting(self._fair)
        self._drain = Drain()
        self._pacing = Pacing()
        self._refused_share = 0.0
        """Of the last requests, those that the queue had no room for."""
        self._set(settings)

    def _set(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self._places.max_total = UNBOUNDED if settings.max_total is None else settings.max_total

    # Upstreams: all return the tickets that were granted or refused because of the change

    def set_upstream(
        self, name: str, limit: int | None, weight: float, max_tokens: int | None, now_ns: int
    ) -> list[Ticket]:
        """Add an upstream, which is up at once, or change one, which stays up or down as it is."""
        self._places.put(name, limit, weight, max_tokens)
        return self._upstreams_changed(now_ns)

    def remove_upstream(self, name: str, now_ns: int) -> list[Ticket]:
        """It gets nothing new; what runs there runs on, and its name is known until that has ended."""
        self._places.remove(name)
        return self._upstreams_changed(now_ns)

    def upstream_up(self, name: str, now_ns: int, *, slow_start: bool = True) -> list[Ticket]:
        """It is back. Nothing happens where it was up."""
        self._places.bring_up(name, now_ns, slowly=slow_start)
        return self._upstreams_changed(now_ns)

    def upstream_down(self, name: str, now_ns: int) -> list[Ticket]:
        """It gets nothing new; what runs there stays until it is moved, released or cancelled."""
        self._places.take_down(name)
        return self._upstreams_changed(now_ns)

    def set_limit(self, name: str, limit: int | None, now_ns: int) -> list[Ticket]:
        """Another limit for one upstream, at least 1."""
        self._places[name].limit = UNBOUNDED if limit is None else limit
        return self._upstreams_changed(now_ns)

    def configure(self, settings: AdmissionSettings, now_ns: int) -> list[Ticket]:
        """Other bounds; the queue time-out holds for those that wait as well, at the next tick."""
        self._set(settings)
        return self._let_go(now_ns)

    # Requests

    def offer(self, want: Want, now_ns: int) -> Ticket:
        """A new request: GRANTED, QUEUED or REFUSED."""
        ticket = Ticket(want, now_ns, want.tokens)
        if now_ns >= want.deadline_ns:
            return self._refuse(ticket, Refusal.REQUEST_TIMEOUT)
        if want.unlimited:
            self._place_unlimited(ticket, _NONE, now_ns)
            return ticket
        places = self._places
        if want.tokens > places.largest_budget:
            return self._refuse(ticket, self._why_never(want))
        waiting = self._waiting
        self._refused_share -= self._refused_share / _MEMORY
        alone = not waiting.by_age
        if alone and places.ramping:
            places.grow(now_ns, self._settings.slow_start_ns)
        if (alone or self._fair.leads(want.priority)) and not self._held_back(now_ns):
            upstream = places.take(want.tokens, want.affinity, self._reserved() if waiting.moved else _NONE)
            if upstream is not None:
                self._grant(ticket, upstream, now_ns)
                return ticket
        refusal = self._why_not_wait(want, now_ns)
        if refusal is not None:
            return self._refuse(ticket, refusal)
        waiting.add(ticket, now_ns)
        return ticket

    def release(self, ticket: Ticket, now_ns: int, served_tokens: int | None = None) -> list[Ticket]:
        """The request has ended; ``served_tokens`` is its real cost. A ticket that still waits is cancelled."""
        if ticket.state is not _GRANTED:
            return self.cancel(ticket, now_ns)
        assert ticket.place is not None
        assert ticket.granted_ns is not None
        if ticket.share is None:
            self._places.give_back_unlimited(ticket.place)
        else:
            self._drain.ended(now_ns, now_ns - ticket.granted_ns)
            self._places.give_back(ticket.place, ticket.tokens)
            self._fair.end(ticket, served_tokens)
        ticket.place, ticket.state = None, _ENDED
        return self._let_go(now_ns) if self._waiting.by_age else []

    def settle(self, ticket: Ticket, tokens: int, now_ns: int) -> list[Ticket]:
        """The real cost of a running request became known: what it holds of the budget and has to pay is that now."""
        if ticket.state is not _GRANTED or ticket.share is None:
            return []
        assert ticket.place is not None
        ticket.place.tokens += tokens - ticket.tokens
        ticket.tokens = tokens
        self._fair.correct(ticket, tokens)
        return self._let_go(now_ns) if self._waiting.by_age else []

    def cancel(self, ticket: Ticket, now_ns: int) -> list[Ticket]:
        """The client left, waiting or running."""
        if ticket.state is _GRANTED:
            if ticket.share is not None:
                self._drain.ended(now_ns, None)
            self._vacate(ticket)
        elif ticket.state is _QUEUED:
            self._waiting.remove(ticket)
        else:
            return []
        self._finish(ticket, _ENDED)
        return self._let_go(now_ns) if self._waiting.by_age else []

    def move(self, ticket: Ticket, now_ns: int, avoid: frozenset[str] = _NONE) -> list[Ticket]:
        """Failover of a GRANTED ticket to any upstream but its own and those to ``avoid``; others are left alone.

        Afterwards it is GRANTED elsewhere, or QUEUED before all others with its deadline, its charge and a queue time
        that begins anew, or REFUSED: NO_UPSTREAM where no other is up that could take it, REQUEST_TIMEOUT.
        """
        if ticket.state is not _GRANTED:
            return []
        assert ticket.place is not None
        avoid |= {ticket.place.name}
        self._vacate(ticket)
        if now_ns >= ticket.want.deadline_ns:
            self._finish(ticket, _REFUSED, Refusal.REQUEST_TIMEOUT)
        elif ticket.want.unlimited:
            self._place_unlimited(ticket, avoid, now_ns)
        elif not self._places.eligible(ticket.tokens, avoid):
            self._finish(ticket, _REFUSED, Refusal.NO_UPSTREAM)
        else:
            self._move_limited(ticket, avoid, now_ns)
        return [other for other in self._let_go(now_ns) if other is not ticket]

    def tick(self, now_ns: int) -> list[Ticket]:
        """Refuse those that are late and let go those that now may; returns both."""
        self._drain.forget_if_stale(now_ns)
        late = []
        while (ticket := self._waiting.oldest) and (refusal := self._why_late(ticket, now_ns)):
            late.append(self._drop(ticket, refusal))
        while (ticket := self._waiting.most_urgent) and (refusal := self._why_late(ticket, now_ns)):
            late.append(self._drop(ticket, refusal))
        return late + self._let_go(now_ns)

    @property
    def next_tick_ns(self) -> int | None:
        """When ``tick`` is next needed; None while nothing waits."""
        urgent, oldest, timeout_ns = self._waiting.most_urgent, self._waiting.oldest, self._settings.queue_timeout_ns
        if urgent is None or oldest is None:
            return None
        when_ns = urgent.want.deadline_ns - self._drain.service_ns
        if timeout_ns is not None:
            when_ns = min(when_ns, oldest.queued_ns + timeout_ns)
        growth_ns = self._places.next_growth_ns(self._settings.slow_start_ns)
        return min(due_ns for due_ns in (when_ns, growth_ns, self._pacing.due_ns) if due_ns is not None)

    # Figures

    @property
    def in_flight(self) -> int:
        """All that run, the unlimited ones too."""
        return self._places.in_flight

    @property
    def queued(self) -> int:
        return len(self._waiting.by_age)

    @property
    def waiting_since_ns(self) -> int | None:
        """Since when the one that has waited longest waits."""
        oldest = self._waiting.oldest
        return None if oldest is None else oldest.queued_ns

    @property
    def capacity(self) -> int | None:
        """How many may run at once on what is up now; None where there is no bound."""
        total = min(sum(upstream.effective for upstream in self._places.up), self._places.max_total)
        return None if total >= UNBOUNDED else total

    @property
    def any_up(self) -> bool:
        return bool(self._places.up)

    def is_up(self, name: str) -> bool:
        return self._places[name].up

    def in_flight_at(self, name: str) -> int:
        return self._places[name].in_flight

    def tokens_at(self, name: str) -> int:
        """Tokens of what runs there."""
        return self._places[name].tokens

    def limit_at(self, name: str) -> int | None:
        """Its effective limit, in slow start too, as of the last call that used it; None is no limit."""
        limit = self._places[name].effective
        return None if limit == UNBOUNDED else limit

    def retry_after_s(self, now_ns: int) -> float | None:
        """When all that wait now, and one more, will have been let go; None before the drain rate is known."""
        return self._wait_s(len(self._waiting.by_age), now_ns)

    def expected_wait_s(self, client: str, priority: int, now_ns: int) -> float | None:
        """What a newcomer would wait if it had to; None before the drain rate is known."""
        return self._wait_s(len(self._waiting.moved) + self._fair.ahead_of(client, priority), now_ns)

    def _wait_s(self, ahead: int, now_ns: int) -> float | None:
        rate_per_s = self._drain.rate_per_s(now_ns, self._places.running)
        return (ahead + 1) / rate_per_s if rate_per_s else None

    # Why not

    def _why_never(self, want: Want) -> Refusal:
        """Of one for which no upstream that is up is large enough."""
        return Refusal.NO_UPSTREAM if self._places.ever_fits(want.tokens) else Refusal.OVER_BUDGET

    def _why_not_wait(self, want: Want, now_ns: int) -> Refusal | None:
        """Of a newcomer that finds no place."""
        settings = self._settings
        bound = settings.max_queue
        if bound is not None:
            if settings.standing_queue is not None and self._overloaded:
                bound = settings.standing_queue
            if len(self._waiting.by_age) >= bound:
                self._refused_share += 1 / _MEMORY
                return Refusal.QUEUE_FULL
        wait_s = self.expected_wait_s(want.client, want.priority, now_ns)
        if wait_s is None:
            return None
        wait_ns = round(wait_s * _NS)
        too_long = settings.queue_timeout_ns is not None and wait_ns > settings.queue_timeout_ns
        too_late = now_ns + wait_ns + self._drain.service_ns > want.deadline_ns
        return Refusal.EXPECTED_WAIT if too_long or too_late else None

    def _why_late(self, ticket: Ticket, now_ns: int) -> Refusal | None:
        """Of one that waits."""
        left_ns = ticket.want.deadline_ns - now_ns
        if left_ns <= 0:
            return Refusal.REQUEST_TIMEOUT
        timeout_ns = self._settings.queue_timeout_ns
        waited_out = timeout_ns is not None and now_ns - ticket.queued_ns >= timeout_ns
        return Refusal.QUEUE_TIMEOUT if waited_out or left_ns <= self._drain.service_ns else None

    # The turns

    def _let_go(self, now_ns: int) -> list[Ticket]:
        """Grant all whose turn it is and who fit, refuse the late and hopeless met on the way; return both."""
        places, changed = self._places, list[Ticket]()
        if places.ramping:
            places.grow(now_ns, self._settings.slow_start_ns)
        reserved = self._let_moved_go(now_ns, changed) if self._waiting.moved else _NONE
        self._pacing.due_ns = None
        while (ticket := self._fair.head()) is not None:
            refusal = self._why_late(ticket, now_ns)
            if refusal is None and ticket.tokens > places.largest_budget:
                refusal = self._why_never(ticket.want)
            if refusal is not None:
                changed.append(self._drop(ticket, refusal))
                continue
            if self._held_back(now_ns):
                break
            upstream = places.take(ticket.tokens, ticket.want.affinity, reserved)
            if upstream is None:
                break
            self._grant(ticket, upstream, now_ns)
            self._waiting.remove(ticket)
            changed.append(ticket)
        return changed

    def _let_moved_go(self, now_ns: int, changed: list[Ticket]) -> set[str]:
        """The same for the moved; returns the upstreams that those still waiting keep from all others."""
        places, reserved = self._places, set[str]()
        for ticket in tuple(self._waiting.moved):
            if len(reserved) == len(places.up):
                break
            assert ticket.avoid is not None
            refusal = self._why_late(ticket, now_ns)
            if refusal is not None:
                changed.append(self._drop(ticket, refusal))
                continue
            upstream = places.take(ticket.tokens, ticket.want.affinity, ticket.avoid | reserved)
            if upstream is None:
                reserved |= places.eligible(ticket.tokens, ticket.avoid)
            else:
                self._waiting.remove(ticket)
                self._grant(ticket, upstream, now_ns)
                changed.append(ticket)
        return reserved

    def _reserved(self) -> set[str]:
        """What the moved that wait keep from all others."""
        places, reserved = self._places, set[str]()
        for ticket in self._waiting.moved:
            if len(reserved) == len(places.up):
                break
            assert ticket.avoid is not None
            reserved |= places.eligible(ticket.tokens, ticket.avoid)
        return reserved

    def _upstreams_changed(self, now_ns: int) -> list[Ticket]:
        """Follow the change of an upstream; the moved that have nowhere left to go learn it at once."""
        self._places.grow(now_ns, self._settings.slow_start_ns)
        stranded = [it for it in self._waiting.moved if not self._places.eligible(it.tokens, it.avoid or _NONE)]
        return [self._drop(ticket, Refusal.NO_UPSTREAM) for ticket in stranded] + self._let_go(now_ns)

    # The changes of state

    def _grant(self, ticket: Ticket, upstream: Upstream, now_ns: int) -> None:
        """It has been given a place there."""
        ticket.place = upstream
        ticket.state = _GRANTED
        ticket.granted_ns = now_ns
        if ticket.share is None:
            self._fair.charge(ticket)
        if self._paced and (rate_per_s := self._drain.rate_per_s(now_ns, self._places.running)):
            self._pacing.started(now_ns, rate_per_s)

    @property
    def _overloaded(self) -> bool:
        return self._refused_share > _OVERLOADED

    @property
    def _paced(self) -> bool:
        return self._overloaded and self._settings.standing_queue is not None

    def _held_back(self, now_ns: int) -> bool:
        return self._paced and self._pacing.holds_back(now_ns)

    def _place_unlimited(self, ticket: Ticket, avoid: frozenset[str], now_ns: int) -> None:
        upstream = self._places.least_loaded(avoid)
        if upstream is None:
            self._finish(ticket, _REFUSED, Refusal.NO_UPSTREAM)
            return
        self._places.take_unlimited(upstream)
        ticket.place, ticket.state, ticket.granted_ns = upstream, _GRANTED, now_ns

    def _move_limited(self, ticket: Ticket, avoid: frozenset[str], now_ns: int) -> None:
        upstream = self._places.take(ticket.tokens, ticket.want.affinity, avoid | self._reserved())
        if upstream is None:
            self._waiting.add_moved(ticket, now_ns, avoid)
        else:
            self._grant(ticket, upstream, now_ns)

    def _vacate(self, ticket: Ticket) -> None:
        """Give its place back; what it is next follows at once."""
        assert ticket.place is not None
        if ticket.share is None:
            self._places.give_back_unlimited(ticket.place)
        else:
            self._places.give_back(ticket.place, ticket.tokens)
        ticket.place = None

    def _drop(self, ticket: Ticket, refusal: Refusal) -> Ticket:
        self._waiting.remove(ticket)
        return self._refuse(ticket, refusal)

    def _refuse(self, ticket: Ticket, refusal: Refusal) -> Ticket:
        self._finish(ticket, _REFUSED, refusal)
        return ticket

    def _finish(self, ticket: Ticket, state: State, refusal: Refusal | None = None) -> None:
        ticket.state, ticket.refusal = state, refusal
        if ticket.share is not None:
            self._fair.end(ticket)

    def __repr__(self) -> str:
        return f"<Admission: {self.in_flight} in flight of {self.capacity}, {self.queued} queued, {self._places!r}>"
