"""core.admission against a naive model: plain lists, everything looked through anew after every step.

The model says which tickets change and to what; where several upstreams are equally loaded it follows the real choice.
Predictions stay out of it: fewer requests are released than they need.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loadstone.core.admission import Admission, AdmissionSettings, Refusal, State, Ticket, Want
from plain import but

NAMES = ("u", "v", "w")
MANY = 1 << 60
SLOW_START_NS = 40
QUEUE_TIMEOUT_NS = 60
LEARNT = 20
WANTS = st.builds(
    Want,
    client=st.sampled_from("abcd"),
    deadline_ns=st.sampled_from([0, 20, 90, MANY, MANY, MANY]),  # from now
    tokens=st.sampled_from([0, 1, 30, 60, 100, 120]),
    priority=st.sampled_from([0, 0, 0, 1]),
    affinity=st.none(),
    unlimited=st.sampled_from([False] * 9 + [True]),
)


@dataclass
class Server:
    limit: int | None
    budget: int | None
    weight: float = 1.0
    up: bool = True
    removed: bool = False
    since_ns: int | None = None

    def effective(self, now_ns: int) -> int:
        limit = MANY if self.limit is None else self.limit
        if self.since_ns is None or limit == MANY or now_ns - self.since_ns >= SLOW_START_NS:
            return limit
        return 1 + (limit - 1) * (now_ns - self.since_ns) // SLOW_START_NS

    def fits(self, tokens: int) -> bool:
        return self.budget is None or tokens <= self.budget


@dataclass(eq=False)
class Account:
    counter: int = 0


@dataclass(eq=False)
class Entry:
    """What the model holds of a ticket."""

    ticket: Ticket
    want: Want
    order: int
    tokens: int
    state: State = State.QUEUED
    refusal: Refusal | None = None
    at: str | None = None
    since_ns: int = 0
    avoid: frozenset[str] | None = None
    account: Account | None = None
    charge: int = 0


@dataclass
class Band:
    accounts: dict[str, Account] = field(default_factory=dict)
    last: Account | None = None
    entry: int = 0


class Model(RuleBasedStateMachine):
    @initialize(
        max_queue=st.sampled_from([0, 2, 6, None]),
        max_total=st.sampled_from([3, None]),
        timed=st.booleans(),
        servers=st.lists(st.tuples(st.sampled_from([1, 2, 4, None]), st.sampled_from([100, None])), max_size=3),
    )
    def start(
        self,
        max_queue: int | None,
        max_total: int | None,
        timed: bool,
        servers: list[tuple[int | None, int | None]],
    ) -> None:
        self.now_ns = 0
        self.settings = AdmissionSettings(max_queue, QUEUE_TIMEOUT_NS if timed else None, max_total, SLOW_START_NS)
        self.real = Admission(self.settings)
        self.servers: dict[str, Server] = {}
        self.entries: list[Entry] = []
        self.bands: dict[int, Band] = {}
        self.queued_so_far = 0
        self.releases = 0
        for name, (limit, budget) in zip(NAMES, servers, strict=False):
            self.set_upstream(name, limit, budget, 1.0)

    # What the naive model thinks

    def those(self, state: State) -> list[Entry]:
        return [entry for entry in self.entries if entry.state is state]

    def at(self, name: str) -> list[Entry]:
        return [entry for entry in self.those(State.GRANTED) if entry.at == name]

    def limited(self) -> list[Entry]:
        return [entry for entry in self.those(State.GRANTED) if not entry.want.unlimited]

    def tokens(self, name: str) -> int:
        return sum(entry.tokens for entry in self.at(name) if not entry.want.unlimited)

    def up(self) -> list[str]:
        return [name for name, server in self.servers.items() if server.up and not server.removed]

    def eligible(self, entry: Entry) -> set[str]:
        return {name for name in self.up() if self.servers[name].fits(entry.tokens)} - (entry.avoid or frozenset())

    def roomy(self, entry: Entry, reserved: set[str]) -> dict[str, float]:
        """Load by name of the upstreams that would take it now."""
        if self.settings.max_total is not None and len(self.limited()) >= self.settings.max_total:
            return {}
        found = {}
        for name in self.eligible(entry) - reserved:
            server, effective = self.servers[name], self.servers[name].effective(self.now_ns)
            running = [it for it in self.at(name) if not it.want.unlimited]
            if len(running) < effective and server.fits(self.tokens(name) + entry.tokens):
                found[name] = (len(self.at(name)) + 1) / (server.weight * (1 if effective == MANY else effective))
        return found

    def waiting(self, moved: bool) -> list[Entry]:
        """In the order of their turns."""
        entries = [entry for entry in self.those(State.QUEUED) if (entry.avoid is not None) == moved]
        if moved:
            return sorted(entries, key=lambda it: (-it.want.priority, it.ticket.offered_ns))
        return sorted(entries, key=lambda it: (-it.want.priority, self.standing(it), it.order))

    def standing(self, entry: Entry) -> tuple[int, int]:
        """The client's counter and its first in the queue: clients that are level don't mix."""
        mine = [it.order for it in self.queue_of(entry.want.priority) if it.want.client == entry.want.client]
        return self.bands[entry.want.priority].accounts[entry.want.client].counter, min(mine)

    def queue_of(self, priority: int) -> list[Entry]:
        return [it for it in self.those(State.QUEUED) if it.avoid is None and it.want.priority == priority]

    def join(self, want: Want) -> Account:
        band = self.bands.setdefault(want.priority, Band())
        account = band.accounts.setdefault(want.client, Account())
        queue = self.queue_of(want.priority)
        if all(it.want.client != want.client for it in queue):
            counters = [band.accounts[it.want.client].counter for it in queue]
            floor = min(counters) if counters else band.last.counter if band.last else 0
            if account.counter <= floor:
                account.counter = band.entry = floor
        return account

    def correct(self, entry: Entry, tokens: int) -> None:
        assert entry.account is not None
        more = max(1, tokens) - entry.charge
        entry.charge += more
        lowest = min(entry.account.counter, self.bands[entry.want.priority].entry)
        entry.account.counter = max(entry.account.counter + more, lowest)

    def forget_idle(self) -> None:
        for priority, band in self.bands.items():
            running = {id(it.account) for it in self.those(State.GRANTED) + self.waiting(True)}
            queued = {it.want.client for it in self.queue_of(priority)}
            band.accounts = {c: a for c, a in band.accounts.items() if c in queued or id(a) in running}

    def grant(self, entry: Entry, where: dict[str, float]) -> None:
        """At one of the least loaded: the one that was really chosen."""
        name = entry.ticket.upstream
        assert name in where, f"{name} is none of {where}"
        assert where[name] == min(where.values())
        if entry.account is None and not entry.want.unlimited:
            account = self.join(entry.want)
            entry.account, entry.charge = account, entry.want.tokens or 1
            account.counter += entry.charge
            self.bands[entry.want.priority].last = account
        entry.state, entry.at, entry.avoid = State.GRANTED, name, None

    def refuse(self, entry: Entry, refusal: Refusal) -> None:
        entry.state, entry.refusal, entry.at, entry.avoid = State.REFUSED, refusal, None, None

    def never(self, want: Want) -> Refusal | None:
        """Why no upstream that is up could ever take it."""
        if any(self.servers[name].fits(want.tokens) for name in self.up()):
            return None
        known = [server for server in self.servers.values() if not server.removed]
        fits = not known or any(server.fits(want.tokens) for server in known)
        return Refusal.NO_UPSTREAM if fits else Refusal.OVER_BUDGET

    def late(self, entry: Entry) -> Refusal | None:
        if self.now_ns >= entry.want.deadline_ns:
            return Refusal.REQUEST_TIMEOUT
        timeout_ns = self.settings.queue_timeout_ns
        waited_out = timeout_ns is not None and self.now_ns >= entry.since_ns + timeout_ns
        return Refusal.QUEUE_TIMEOUT if waited_out else None

    def let_go(self) -> list[Entry]:
        """All that change now, one after the other."""
        changed: list[Entry] = []
        while (entry := self.next_change()) is not None:
            changed.append(entry)
            self.forget_idle()
        return changed

    def next_change(self) -> Entry | None:
        reserved: set[str] = set()
        for entry in self.waiting(True):
            if reserved >= set(self.up()):
                return None
            if (refusal := self.late(entry)) is not None:
                self.refuse(entry, refusal)
                return entry
            if where := self.roomy(entry, reserved):
                self.grant(entry, where)
                return entry
            reserved |= self.eligible(entry)
        for entry in self.waiting(False)[:1]:
            if (refusal := self.late(entry) or self.never(entry.want)) is not None:
                self.refuse(entry, refusal)
                return entry
            if where := self.roomy(entry, reserved):
                self.grant(entry, where)
                return entry
        return None

    def reserved(self) -> set[str]:
        return set().union(*(self.eligible(entry) for entry in self.waiting(True)))

    def compare(self, changed: list[Ticket], also: list[Entry] | None = None) -> None:
        """The real change is the model's: the same tickets, each once, to the same states."""
        self.forget_idle()
        expected = (also or []) + self.let_go()
        assert sorted(map(id, changed)) == sorted(id(entry.ticket) for entry in expected)

    def find(self, data: st.DataObject, *which: State) -> Entry | None:
        found = [entry for entry in self.entries if entry.state in which]
        return data.draw(st.sampled_from(found)) if found else None

    # Steps

    @rule(how_many=st.integers(1, 4), data=st.data())
    def offers(self, how_many: int, data: st.DataObject) -> None:
        for _ in range(how_many):
            self.offer(data.draw(WANTS))

    def offer(self, want: Want) -> None:
        want = but(want, deadline_ns=self.now_ns + want.deadline_ns)
        entry = Entry(self.real.offer(want, self.now_ns), want, 0, want.tokens)
        queue = self.waiting(False)
        self.entries.append(entry)
        entry.state = State.ENDED  # none of the waiting until it is known
        if want.deadline_ns <= self.now_ns:
            return self.refuse(entry, Refusal.REQUEST_TIMEOUT)
        if want.unlimited:
            return self.place_unlimited(entry)
        if (refusal := self.never(want)) is not None:
            return self.refuse(entry, refusal)
        if not queue or want.priority > queue[0].want.priority:
            where = self.roomy(entry, self.reserved())
            if where:
                return self.grant(entry, where)
        if self.settings.max_queue is not None and len(self.those(State.QUEUED)) >= self.settings.max_queue:
            return self.refuse(entry, Refusal.QUEUE_FULL)
        self.join(want)
        self.queued_so_far += 1
        entry.state, entry.order, entry.since_ns = State.QUEUED, self.queued_so_far, self.now_ns
        return None

    def place_unlimited(self, entry: Entry) -> None:
        names = set(self.up()) - (entry.avoid or frozenset())
        if not names:
            return self.refuse(entry, Refusal.NO_UPSTREAM)
        loads = {}
        for name in names:
            effective = self.servers[name].effective(self.now_ns)
            share = self.servers[name].weight * (1 if effective == MANY else effective)
            loads[name] = (len(self.at(name)) + 1) / share
        # The real effective limit of a slow start may lag behind while nobody is held back by it.
        name = entry.ticket.upstream
        assert name in loads
        ramping = any(self.servers[it].since_ns is not None for it in names)
        return self.grant(entry, {name: 0.0} if ramping else loads)

    @precondition(lambda self: self.releases < LEARNT - 1)
    @rule(data=st.data(), served=st.none() | st.integers(0, 150))
    def release(self, data: st.DataObject, served: int | None) -> None:
        entry = self.find(data, State.GRANTED)
        if entry is None:
            return
        changed = self.real.release(entry.ticket, self.now_ns, served)
        self.releases += 1
        if served is not None and entry.account is not None:
            self.correct(entry, served)
        entry.state, entry.at = State.ENDED, None
        self.compare(changed)

    @rule(data=st.data(), tokens=st.integers(0, 150))
    def settle(self, data: st.DataObject, tokens: int) -> None:
        entry = self.find(data, State.GRANTED)
        if entry is None:
            return
        changed = self.real.settle(entry.ticket, tokens, self.now_ns)
        if entry.account is not None:
            entry.tokens = tokens
            self.correct(entry, tokens)
        self.compare(changed)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        entry = self.find(data, State.GRANTED, State.QUEUED)
        if entry is None:
            return
        changed = self.real.cancel(entry.ticket, self.now_ns)
        entry.state, entry.at, entry.avoid = State.ENDED, None, None
        self.compare(changed)

    @rule(data=st.data(), avoid=st.frozensets(st.sampled_from(NAMES), max_size=2))
    def move(self, data: st.DataObject, avoid: frozenset[str]) -> None:
        entry = self.find(data, State.GRANTED)
        if entry is None:
            return
        assert entry.at is not None
        changed = self.real.move(entry.ticket, self.now_ns, avoid)
        entry.avoid, entry.at, entry.state = avoid | {entry.at}, None, State.ENDED
        if self.now_ns >= entry.want.deadline_ns:
            self.refuse(entry, Refusal.REQUEST_TIMEOUT)
        elif entry.want.unlimited:
            self.place_unlimited(entry)
        elif not self.eligible(entry):
            self.refuse(entry, Refusal.NO_UPSTREAM)
        elif where := self.roomy(entry, self.reserved()):
            self.grant(entry, where)
        else:
            entry.state, entry.since_ns = State.QUEUED, self.now_ns
        self.forget_idle()
        if entry.state is State.QUEUED and entry.ticket.state is not State.QUEUED:
            changed.append(entry.ticket)  # it queued and its turn came at once; the ticket of a call is never listed
        self.compare(changed)

    @rule(passed_ns=st.sampled_from([1, 7, 25, 70]))
    def time_passes(self, passed_ns: int) -> None:
        """As the shell does it: a tick whenever one is asked for."""
        until_ns = self.now_ns + passed_ns
        while (when_ns := self.real.next_tick_ns) is not None and when_ns <= until_ns:
            self.tick(max(when_ns, self.now_ns))
            assert self.real.next_tick_ns is None or self.real.next_tick_ns > self.now_ns
        self.now_ns = until_ns
        for entry in self.those(State.QUEUED):
            assert self.late(entry) is None, "a tick was not asked for in time"
        assert self.next_change() is None, "a growth was not asked for in time"

    def tick(self, now_ns: int) -> None:
        self.now_ns = now_ns
        changed = self.real.tick(now_ns)
        late = [(entry, self.late(entry)) for entry in self.those(State.QUEUED)]
        for entry, refusal in late:
            if refusal is not None:
                self.refuse(entry, refusal)
        self.compare(changed, [entry for entry, refusal in late if refusal is not None])

    @rule(
        name=st.sampled_from(NAMES),
        limit=st.sampled_from([1, 2, 4, None]),
        budget=st.sampled_from([50, 100, None]),
        weight=st.sampled_from([1.0, 2.0]),
    )
    def set_upstream(self, name: str, limit: int | None, budget: int | None, weight: float) -> None:
        changed = self.real.set_upstream(name, limit, weight, budget, self.now_ns)
        server = self.servers.setdefault(name, Server(limit, budget))
        server.up, server.removed = server.up or server.removed, False
        server.limit, server.budget, server.weight = limit, budget, weight
        self.upstreams_changed(changed)

    @rule(data=st.data(), what=st.sampled_from(["up", "up at once", "down", "down", "remove", "limit"]))
    def change_upstream(self, data: st.DataObject, what: str) -> None:
        names = [name for name, server in self.servers.items() if not server.removed]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        server, real = self.servers[name], self.real
        if what == "limit":
            server.limit = data.draw(st.sampled_from([1, 3, None]))
            changed = real.set_limit(name, server.limit, self.now_ns)
        elif what == "remove":
            server.removed, server.up, server.since_ns = True, False, None
            changed = real.remove_upstream(name, self.now_ns)
        elif what == "down":
            server.up, server.since_ns = False, None
            changed = real.upstream_down(name, self.now_ns)
        else:
            server.since_ns = self.now_ns if what == "up" and not server.up else server.since_ns
            server.up = True
            changed = real.upstream_up(name, self.now_ns, slow_start=what == "up")
        self.upstreams_changed(changed)

    def upstreams_changed(self, changed: list[Ticket]) -> None:
        for server in self.servers.values():
            if server.since_ns is not None and server.effective(self.now_ns) == (server.limit or MANY):
                over = server.limit is None or self.now_ns - server.since_ns >= SLOW_START_NS
                server.since_ns = None if over else server.since_ns
        stranded = [entry for entry in self.waiting(True) if not self.eligible(entry)]
        for entry in stranded:
            self.refuse(entry, Refusal.NO_UPSTREAM)
        self.compare(changed, stranded)

    @rule(max_queue=st.sampled_from([1, 4, None]), max_total=st.sampled_from([2, 5, None]))
    def configure(self, max_queue: int | None, max_total: int | None) -> None:
        self.settings = AdmissionSettings(max_queue, self.settings.queue_timeout_ns, max_total, SLOW_START_NS)
        self.compare(self.real.configure(self.settings, self.now_ns))

    # What must always hold

    @invariant()
    def every_ticket_is_where_the_model_has_it(self) -> None:
        for entry in self.entries:
            ticket = entry.ticket
            assert (ticket.state, ticket.refusal, ticket.upstream) == (entry.state, entry.refusal, entry.at), ticket

    @invariant()
    def figures_are_those_of_the_tickets(self) -> None:
        if not hasattr(self, "real"):
            return
        granted, queued = self.those(State.GRANTED), self.those(State.QUEUED)
        assert (self.real.in_flight, self.real.queued) == (len(granted), len(queued))
        assert self.real.waiting_since_ns == min((entry.since_ns for entry in queued), default=None)
        assert self.real.any_up == bool(self.up())
        for name, server in self.servers.items():
            if not server.removed or self.at(name):
                assert self.real.in_flight_at(name) == len(self.at(name))
                assert self.real.tokens_at(name) == self.tokens(name) >= 0

    @invariant()
    def clients_stand_where_the_model_has_them(self) -> None:
        if not hasattr(self, "real"):
            return
        bands = self.real._fair._bands.items()
        counters = {(p, client): share.counter for p, band in bands for client, share in band.shares.items()}
        assert counters == {
            (p, client): account.counter for p, band in self.bands.items() for client, account in band.accounts.items()
        }

    @invariant()
    def nobody_waits_beside_a_place_that_fits_its_turn(self) -> None:
        if hasattr(self, "real") and not any(self.late(entry) for entry in self.those(State.QUEUED)):
            assert self.next_change() is None

    def teardown(self) -> None:
        """Everything ends, and nothing is left over."""
        if not hasattr(self, "real"):
            return
        for entry in self.entries:
            self.real.cancel(entry.ticket, self.now_ns)
        for ticket in [entry.ticket for entry in self.entries]:
            assert self.real.release(ticket, self.now_ns) == self.real.move(ticket, self.now_ns) == []
            assert self.real.cancel(ticket, self.now_ns) == self.real.settle(ticket, 7, self.now_ns) == []
        assert (self.real.in_flight, self.real.queued, self.real.next_tick_ns) == (0, 0, None)
        assert {entry.ticket.state for entry in self.entries} <= {State.ENDED, State.REFUSED}


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdmissionAgainstTheModel = Model.TestCase
