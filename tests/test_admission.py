"""core.admission and what it is made of: tables of behaviour, properties, and overload in virtual time."""

import heapq
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.admission import Admission, AdmissionSettings, Refusal, State, Ticket, Want
from loadstone.core.drain import Drain
from loadstone.core.fairness import FairQueue
from loadstone.core.lazy_heap import LazyHeap
from loadstone.core.placement import Placement

S = 1_000_000_000
NEVER = 1 << 60


def gate(limit: int | None = 1, *, upstreams: int = 1, max_tokens: int | None = None, **settings: int) -> Admission:
    """An admission with upstreams u0, u1, …, and no bounds but those given."""
    admission = Admission(AdmissionSettings(**settings))
    for i in range(upstreams):
        admission.set_upstream(f"u{i}", limit, 1.0, max_tokens, 0)
    return admission


def want(client: str = "a", **more: int | None) -> Want:
    return Want(client, **{"deadline_ns": NEVER, **more})  # type: ignore[arg-type]


def states(tickets: list[Ticket]) -> str:
    """One letter each: Q, G, R or E."""
    return "".join(ticket.state.name[0] for ticket in tickets)


def taught(served_s: float = 1.0, count: int = 20, **settings: int) -> tuple[Admission, int]:
    """One slot that has served ``count`` requests one after the other, and the time after that."""
    admission, now_ns = gate(1, **settings), 0
    for _ in range(count):
        ticket = admission.offer(want(), now_ns)
        now_ns += round(served_s * S)
        admission.release(ticket, now_ns)
    return admission, now_ns


# Admitted, queued, refused


def test_room_first_then_the_queue_then_queue_full() -> None:
    admission = gate(2, max_queue=1)
    tickets = [admission.offer(want(), 0) for _ in range(4)]
    assert states(tickets) == "GGQR"
    assert tickets[3].refusal is Refusal.QUEUE_FULL
    assert (admission.in_flight, admission.queued, admission.waiting_since_ns) == (2, 1, 0)
    assert admission.release(tickets[0], 5) == [tickets[2]]
    assert (tickets[2].upstream, tickets[2].granted_ns, tickets[0].upstream) == ("u0", 5, None)


def overloaded(admission: Admission, rounds: int) -> None:
    """Twice what one slot takes is offered, for so many requests served."""
    running = [admission.offer(want(), 0)]
    for _ in range(rounds):
        running += [ticket for ticket in (admission.offer(want(), 0), admission.offer(want(), 0)) if is_granted(ticket)]
        running += admission.release(running.pop(0), 0)
    for ticket in running:
        admission.release(ticket, 0)


def is_granted(ticket: Ticket) -> bool:
    return ticket.state is State.GRANTED


def burst(admission: Admission) -> int:
    """How many of many at once may wait; all of it is over afterwards."""
    tickets = [admission.offer(want(), 0) for _ in range(20)]
    queued = admission.queued
    for ticket in tickets:
        admission.cancel(ticket, 0)
    return queued


def test_the_queue_is_shortened_while_overload_lasts_and_is_whole_again_afterwards() -> None:
    admission = gate(1, max_queue=6, standing_queue=3)
    assert burst(admission) == 6
    overloaded(admission, 100)
    assert burst(admission) == 3
    for _ in range(200):
        admission.release(admission.offer(want(), 0), 0)
    assert burst(admission) == 6


def test_a_queue_that_was_chosen_keeps_its_length_however_long_overload_lasts() -> None:
    admission = gate(1, max_queue=6)
    overloaded(admission, 200)
    assert burst(admission) == 6


def test_without_a_queue_nothing_waits_and_without_a_bound_all_do() -> None:
    assert states([gate(1, max_queue=0).offer(want(), 0)]) == "G"
    admission = gate(1, max_queue=0)
    assert states([admission.offer(want(), 0) for _ in range(3)]) == "GRR"
    assert gate(None).capacity is None
    admission = gate(1)
    assert states([admission.offer(want(), 0) for _ in range(300)]).count("Q") == 299


def test_the_total_bounds_all_upstreams_together() -> None:
    admission = gate(3, upstreams=2, max_total=4)
    tickets = [admission.offer(want(), 0) for _ in range(5)]
    assert states(tickets) == "GGGGQ"
    assert admission.capacity == 4
    assert admission.configure(AdmissionSettings(max_total=5), 0) == [tickets[4]]


def test_a_second_release_frees_nothing_and_release_of_a_waiting_one_cancels() -> None:
    admission = gate(1)
    running, first, second = (admission.offer(want(), 0) for _ in range(3))
    assert admission.release(first, 1) == []
    assert first.state is State.ENDED
    assert admission.release(running, 1) == [second]
    for _ in range(2):
        assert admission.release(running, 2) == admission.cancel(running, 2) == admission.settle(running, 9, 2) == []
        assert admission.move(running, 2) == []
    assert (admission.in_flight, admission.queued) == (1, 0)


def test_cancel_frees_the_place_or_the_turn() -> None:
    admission = gate(2, max_tokens=100)
    running = admission.offer(want("a", tokens=60), 0)
    dear = admission.offer(want("b", tokens=50), 0)
    cheap = admission.offer(want("c", tokens=40), 0)
    assert states([running, dear, cheap]) == "GQQ"
    assert admission.cancel(dear, 1) == [cheap]
    assert admission.cancel(running, 1) == []
    assert (admission.in_flight, admission.tokens_at("u0")) == (1, 40)


@pytest.mark.parametrize("make_late", [0, 7])
def test_what_is_past_its_deadline_is_refused_even_where_there_is_room(make_late: int) -> None:
    ticket = gate(1).offer(want(deadline_ns=make_late), 7)
    assert (ticket.state, ticket.refusal) == (State.REFUSED, Refusal.REQUEST_TIMEOUT)


def test_deadline_and_queue_time_out_end_the_wait_exactly_then() -> None:
    admission = gate(1, queue_timeout_ns=10)
    running = admission.offer(want(), 0)
    early, patient = admission.offer(want(deadline_ns=8), 2), admission.offer(want(), 3)
    assert (admission.next_tick_ns, admission.tick(7)) == (8, [])
    assert admission.tick(8) == [early]
    assert early.refusal is Refusal.REQUEST_TIMEOUT
    assert (admission.next_tick_ns, admission.tick(12)) == (13, [])
    assert admission.release(running, 13) == [patient], "late is late, also where no tick came in between"
    assert patient.refusal is Refusal.QUEUE_TIMEOUT
    assert (admission.next_tick_ns, admission.in_flight) == (None, 0)


# Upstreams


def test_nothing_up_refuses_at_once_and_the_queue_with_the_last() -> None:
    assert Admission(AdmissionSettings()).offer(want(), 0).refusal is Refusal.NO_UPSTREAM
    admission = gate(1, upstreams=2)
    running = [admission.offer(want(), 0) for _ in range(2)]
    waiting = [admission.offer(want(), 0) for _ in range(3)]
    assert admission.upstream_down("u0", 1) == []
    assert set(admission.upstream_down("u1", 1)) == set(waiting)
    assert {ticket.refusal for ticket in waiting} == {Refusal.NO_UPSTREAM}
    assert (states(running), admission.in_flight, admission.any_up, admission.capacity) == ("GG", 2, False, 0)
    assert admission.offer(want(), 2).refusal is Refusal.NO_UPSTREAM
    admission.upstream_up("u0", 3)
    assert admission.offer(want(), 3).state is State.QUEUED, "its old request still runs"


def test_least_outstanding_by_weight_and_limit_and_ties_rotate() -> None:
    gate_of_three = gate(10, upstreams=3)
    assert [gate_of_three.offer(want(), 0).upstream for _ in range(6)] == ["u0", "u1", "u2"] * 2
    for i in range(6):
        ticket = gate_of_three.offer(want(), 0)
        assert (ticket.upstream, gate_of_three.release(ticket, 0)) == (f"u{i % 3}", [])
    admission = gate(10, upstreams=2)
    admission.set_upstream("u1", 10, 3.0, None, 0)
    assert Counter(admission.offer(want(), 0).upstream for _ in range(8)) == {"u0": 2, "u1": 6}
    admission = gate(None, upstreams=2)
    admission.set_upstream("u1", None, 3.0, None, 0)
    assert Counter(admission.offer(want(), 0).upstream for _ in range(8)) == {"u0": 2, "u1": 6}


def test_a_lower_limit_cuts_nothing_and_grants_resume_below_it() -> None:
    admission = gate(3)
    running = [admission.offer(want(), 0) for _ in range(3)]
    waiting = admission.offer(want(), 0)
    assert admission.set_limit("u0", 1, 1) == []
    assert admission.release(running[0], 2) == admission.release(running[1], 2) == []
    assert admission.release(running[2], 2) == [waiting]
    more = [admission.offer(want(), 3) for _ in range(3)]
    assert admission.set_limit("u0", 3, 4) == more[:2]
    assert admission.set_limit("u0", None, 4) == more[2:]
    assert admission.limit_at("u0") is None


def test_a_removed_upstream_gets_nothing_and_is_known_until_it_is_empty() -> None:
    admission = gate(1, upstreams=2)
    running = [admission.offer(want(), 0) for _ in range(2)]
    admission.remove_upstream("u0", 0)
    assert admission.in_flight_at("u0") == 1
    assert admission.upstream_up("u0", 0) == []
    waiting = admission.offer(want(), 0)
    assert admission.release(running[0], 1) == []
    with pytest.raises(KeyError):
        admission.in_flight_at("u0")
    admission.remove_upstream("u1", 1)
    assert waiting.refusal is Refusal.NO_UPSTREAM
    admission.set_upstream("u1", 2, 1.0, None, 2)
    assert (admission.in_flight_at("u1"), admission.is_up("u1")) == (1, True)
    assert states([admission.offer(want(), 3), admission.offer(want(), 3)]) == "GQ"


def test_slow_start_grows_from_one_and_asks_to_be_ticked() -> None:
    admission = gate(5, slow_start_ns=100)
    admission.upstream_down("u0", 0)
    admission.upstream_up("u0", 1000)
    tickets = [admission.offer(want(), 1000) for _ in range(6)]
    assert states(tickets) == "GQQQQQ"
    seen = []
    while (when_ns := admission.next_tick_ns) is not None and when_ns < NEVER:
        granted = admission.tick(when_ns)
        seen.append((when_ns, admission.limit_at("u0"), len(granted)))
    assert seen == [(1025, 2, 1), (1050, 3, 1), (1075, 4, 1), (1100, 5, 1)]
    admission.upstream_up("u0", 1200)
    assert admission.limit_at("u0") == 5, "up again while it is up starts nothing anew"
    admission.upstream_down("u0", 1300)
    admission.upstream_up("u0", 1300, slow_start=False)
    assert admission.limit_at("u0") == 5


def test_slow_start_without_ticks_is_up_to_date_at_the_next_offer() -> None:
    admission = gate(3, slow_start_ns=100)
    admission.upstream_down("u0", 0)
    admission.upstream_up("u0", 0)
    assert states([admission.offer(want(), 60) for _ in range(3)]) == "GGQ"
    assert admission.next_tick_ns == 100
    assert len(admission.set_limit("u0", 9, 60)) == 1, "the growth goes on towards the new limit"
    assert admission.limit_at("u0") == 5


# Affinity


def spread(admission: Admission, prefixes: int = 200) -> dict[int, str | None]:
    """Where each prefix goes when nothing else runs."""
    homes = {}
    for prefix in range(prefixes):
        ticket = admission.offer(want(affinity=prefix), 0)
        homes[prefix] = ticket.upstream
        admission.release(ticket, 0)
    return homes


def test_a_prefix_has_one_home_and_only_those_of_a_lost_upstream_move() -> None:
    admission = gate(10, upstreams=4)
    homes = spread(admission)
    assert spread(admission) == homes
    assert min(Counter(homes.values()).values()) > 25
    admission.upstream_down("u2", 0)
    assert all(homes[prefix] in (home, "u2") for prefix, home in spread(admission).items())
    admission.upstream_up("u2", 0, slow_start=False)
    assert spread(admission) == homes


def test_weight_draws_prefixes() -> None:
    admission = gate(10, upstreams=2)
    admission.set_upstream("u1", 10, 3.0, None, 0)
    assert 120 < Counter(spread(admission).values())["u1"] < 180


def test_affinity_is_bounded_by_the_load_and_makes_nobody_wait() -> None:
    admission = gate(8, upstreams=4)
    tickets = [admission.offer(want(affinity=1), 0) for _ in range(33)]
    assert states(tickets) == "G" * 32 + "Q"
    assert tickets[0].upstream == tickets[1].upstream, "one prefix, one home"
    first = Counter(ticket.upstream for ticket in tickets[:8])
    assert max(first.values()) <= 1.25 * 2 + 2
    assert all(admission.in_flight_at(f"u{i}") == 8 for i in range(4))


# Token budget


def test_the_budget_holds_for_each_upstream_and_frees_what_was_settled() -> None:
    admission = gate(None, upstreams=2, max_tokens=100)
    first, second = admission.offer(want(tokens=60), 0), admission.offer(want(tokens=70), 0)
    third = admission.offer(want(tokens=50), 0)
    assert states([first, second, third]) == "GGQ"
    assert admission.settle(first, 50, 1) == [third]
    assert (admission.tokens_at("u0"), admission.tokens_at("u1")) == (100, 70)
    admission.settle(second, 130, 2)
    assert admission.tokens_at("u1") == 130, "a fact may pass the budget"
    for ticket in (first, second, third):
        admission.release(ticket, 3)
    assert admission.tokens_at("u0") == admission.tokens_at("u1") == 0


@pytest.mark.parametrize(("down", "tokens", "refusal"), [(0, 101, "OVER_BUDGET"), (1, 80, "NO_UPSTREAM")])
def test_dearer_than_everything_is_refused_at_once(down: int, tokens: int, refusal: str) -> None:
    admission = gate(1, max_tokens=100)
    admission.set_upstream("small", 1, 1.0, 50, 0)
    if down:
        admission.upstream_down("u0", 0)
    assert admission.offer(want(tokens=tokens), 0).refusal is Refusal[refusal]


def test_a_waiting_one_that_no_longer_fits_anywhere_does_not_block_the_rest() -> None:
    admission = gate(1, max_tokens=100)
    running, dear, cheap = (admission.offer(want(tokens=n), 0) for n in (10, 90, 10))
    assert admission.set_upstream("u0", 1, 1.0, 50, 1) == [dear]
    assert dear.refusal is Refusal.OVER_BUDGET
    assert admission.release(running, 2) == [cheap]


def test_the_dear_one_keeps_its_turn() -> None:
    admission = gate(None, max_tokens=100)
    running = [admission.offer(want("a", tokens=50), 0) for _ in range(2)]
    dear = admission.offer(want("b", tokens=90), 0)
    cheap = [admission.offer(want(client, tokens=1), 0) for client in "cde"]
    assert admission.release(running[0], 1) == [], "50 are free, and all wait for the one that needs 90"
    assert admission.release(running[1], 2) == [dear, *cheap]


# Turns


def test_higher_priority_first_then_first_come_within_a_client() -> None:
    admission = gate(1)
    running = admission.offer(want(), 0)
    low, high, low2 = (admission.offer(want(priority=p), 0) for p in (0, 5, 0))
    order = []
    while running is not None:
        changed = admission.release(running, 1)
        order += changed
        running = changed[0] if changed else None  # type: ignore[assignment]
    assert order == [high, low, low2]


def test_a_newcomer_of_higher_priority_goes_ahead_of_a_dear_one_even_where_the_queue_is_full() -> None:
    admission = gate(None, max_tokens=100, max_queue=1)
    admission.offer(want(tokens=60), 0)
    dear = admission.offer(want(tokens=50), 0)
    assert admission.offer(want(tokens=10), 0).refusal is Refusal.QUEUE_FULL
    assert admission.offer(want(tokens=10, priority=1), 0).state is State.GRANTED
    assert dear.state is State.QUEUED


def test_clients_take_turns_by_cost() -> None:
    """One of 30-token requests against one of 10-token requests: three of the latter for each of the former."""
    admission = gate(1)
    running = admission.offer(want("x"), 0)
    for _ in range(40):
        admission.offer(want("dear", tokens=30), 0)
        admission.offer(want("cheap", tokens=10), 0)
    served = Counter[str]()
    for now_ns in range(40):
        (running,) = admission.release(running, now_ns)
        served[running.want.client] += 1
    assert served == {"dear": 10, "cheap": 30}


@pytest.mark.parametrize("settle_while_running", [False, True])
def test_the_real_cost_counts_not_the_reserved(settle_while_running: bool) -> None:
    admission = gate(1)
    running = admission.offer(want("x"), 0)
    for _ in range(90):
        admission.offer(want("pessimist", tokens=1000), 0)
        admission.offer(want("exact", tokens=20), 0)
    served = Counter[str]()
    for now_ns in range(90):
        real = 10 if running.want.client == "pessimist" else 20
        if settle_while_running:
            assert admission.settle(running, real, now_ns) == []
        (running,) = admission.release(running, now_ns, None if settle_while_running else real)
        served[running.want.client] += 1
    assert served["pessimist"] == pytest.approx(60, abs=2)


def test_reservations_given_back_put_nobody_who_came_in_between_behind() -> None:
    admission = gate(100)
    greedy = [admission.offer(want("greedy", tokens=600), 0) for _ in range(99)]
    light = admission.offer(want("light", tokens=600), 0)
    waiting = [admission.offer(want("greedy", tokens=600), 0) for _ in range(50)]
    changed = [other for ticket in greedy[:3] for other in admission.release(ticket, 1, 50)]
    again = admission.offer(want("light", tokens=600), 1)
    changed += admission.release(greedy[3], 2, 50) + admission.release(greedy[4], 2, 50)
    assert light.state is again.state is State.GRANTED
    assert set(changed) == {*waiting[:4], again}


def test_an_idle_time_earns_no_credit() -> None:
    admission = gate(1)
    running = admission.offer(want("early", tokens=10), 0)
    for _ in range(50):
        admission.offer(want("busy", tokens=10), 0)
    for now_ns in range(25):
        (running,) = admission.release(running, now_ns)
    late = [admission.offer(want("early", tokens=10), 30) for _ in range(20)]
    clients = []
    for now_ns in range(31, 41):
        (running,) = admission.release(running, now_ns)
        clients.append(running.want.client)
    assert Counter(clients) == {"busy": 5, "early": 5}
    assert late[0].state is State.ENDED


def test_clients_that_left_are_forgotten() -> None:
    queue = FairQueue()
    for i in range(20_000):
        ticket = Ticket(want(f"client {i}", priority=i % 100), 0, 1)
        if i % 2:
            queue.push(ticket)
        queue.charge(ticket)
        if i % 2:
            queue.remove(ticket)
        queue.end(ticket)
    assert repr(queue) == "<FairQueue of 0, 0 clients>"
    assert len(queue._bands) <= 9


# Failover


def test_a_move_takes_a_free_place_elsewhere_and_gives_its_own_to_the_next() -> None:
    admission = gate(1, upstreams=2)
    ticket, other = admission.offer(want(), 0), admission.offer(want(), 0)
    admission.release(other, 0)
    assert admission.move(ticket, 5) == []
    assert (ticket.state, ticket.upstream, ticket.granted_ns) == (State.GRANTED, "u1", 5)
    assert (admission.in_flight_at("u0"), admission.in_flight) == (0, 1)
    second, waiting = admission.offer(want(), 6), admission.offer(want(), 6)
    assert admission.move(ticket, 7) == [waiting], "its place is free for others, it waits for u0"
    assert (ticket.state, waiting.upstream) == (State.QUEUED, "u1")
    assert (ticket.upstream, admission.queued) == (None, 1)
    assert admission.release(waiting, 8) == []
    assert admission.offer(want(), 8).state is State.GRANTED, "u1 is of no use to the moved one"
    assert admission.release(second, 9) == [ticket]
    assert ticket.upstream == "u0"


def test_the_moved_wait_before_all_others_in_the_order_of_their_turns() -> None:
    admission = gate(3, upstreams=2)
    tickets = [admission.offer(want(priority=p), i) for i, p in enumerate((0, 0, 0, 0, 1, 0))]
    waiting = admission.offer(want("b", priority=9), 6)
    lost = [ticket for ticket in tickets if ticket.upstream == "u0"]
    kept = [ticket for ticket in tickets if ticket.upstream == "u1"]
    assert admission.upstream_down("u0", 6) == []
    for i, ticket in enumerate(reversed(lost)):
        assert admission.move(ticket, 6 + i, frozenset({"u0"})) == []
    assert [admission.release(ticket, 7) for ticket in kept] == [[lost[2]], [lost[0]], [lost[1]]]
    assert admission.release(lost[0], 8) == [waiting]


def test_a_move_keeps_the_deadline_waits_in_a_full_queue_and_is_late_like_any_other() -> None:
    admission = gate(1, upstreams=2, max_queue=1, queue_timeout_ns=50)
    first, second = (admission.offer(want(deadline_ns=100), 0) for _ in range(2))
    third = admission.offer(want(deadline_ns=100), 10)
    admission.upstream_down("u0", 20)
    assert admission.move(first, 20) == []
    assert (states([first, second, third]), admission.queued) == ("QGQ", 2)
    assert admission.tick(60) == [third]
    assert admission.next_tick_ns == 70, "its wait begins anew"
    assert admission.tick(70) == [first]
    assert first.refusal is Refusal.QUEUE_TIMEOUT
    assert admission.move(second, 100) == []
    assert (second.refusal, admission.in_flight) == (Refusal.REQUEST_TIMEOUT, 0)


def test_a_dear_moved_one_keeps_its_turn_and_its_charge() -> None:
    admission = gate(None, max_tokens=100)
    dear = admission.offer(want("dear", tokens=90), 0)
    admission.set_upstream("u1", None, 1.0, 100, 0)
    rest = admission.offer(want("rest", tokens=60), 0)
    assert admission.move(dear, 1) == []
    assert dear.state is State.QUEUED
    cheap = admission.offer(want("cheap", tokens=70), 1)
    assert cheap.upstream == "u0", "u1 is kept for the dear one, u0 is of no use to it"
    late = [admission.offer(want("late", tokens=40), 1) for _ in range(2)]
    assert states(late) == "QQ"
    assert admission.move(cheap, 2) == [late[0], late[1]], "it waits behind the dear one, and others take u0"
    assert cheap.state is State.QUEUED
    assert admission.move(late[0], 2) == []
    assert late[0].state is State.QUEUED, "it would fit u1, but would come before the dear one"
    urgent = admission.offer(want("urgent", tokens=10, priority=1), 3)
    assert urgent.upstream == "u0"
    assert admission.move(urgent, 4) == [], "of higher priority it goes before the dear one, and is not listed"
    assert urgent.upstream == "u1"
    assert admission.release(rest, 5) == [dear]
    assert admission.release(dear, 6) == [cheap]
    assert (admission.queued, admission.tokens_at("u0"), admission.tokens_at("u1")) == (1, 40, 80)


def test_a_move_with_nowhere_to_go_is_refused() -> None:
    admission = gate(1, upstreams=3)
    tickets = [admission.offer(want(), 0) for _ in range(3)]
    waiting = admission.offer(want(), 0)
    assert admission.move(tickets[0], 1, frozenset({"u1", "u2"})) == [waiting]
    assert tickets[0].refusal is Refusal.NO_UPSTREAM
    assert admission.move(tickets[1], 2, frozenset({"u2"})) == []
    assert tickets[1].state is State.QUEUED
    assert admission.upstream_down("u0", 3) == [tickets[1]], "those stranded learn it at once"
    assert tickets[1].refusal is Refusal.NO_UPSTREAM


# The measuring client


def test_the_unlimited_take_no_limit_no_budget_and_no_turn() -> None:
    admission = gate(1, upstreams=2, max_tokens=10, max_queue=0, max_total=2)
    free = [admission.offer(want("m", tokens=1000, unlimited=True), 0) for _ in range(6)]
    assert [admission.in_flight_at(name) for name in ("u0", "u1")] == [3, 3]
    assert states([admission.offer(want(tokens=10), 0) for _ in range(3)]) == "GGR"
    assert (admission.in_flight, admission.tokens_at("u0")) == (8, 10)
    admission.move(free[0], 1)
    assert admission.settle(free[1], 5, 1) == []
    assert free[0].upstream == "u1"
    for ticket in free:
        admission.release(ticket, 2, 7)
    assert admission.in_flight == 2
    last = admission.offer(want(unlimited=True), 3)
    assert admission.move(last, 3, frozenset({"u0", "u1"})) == []
    assert last.refusal is Refusal.NO_UPSTREAM


# Predictions


def test_nothing_is_predicted_from_too_little() -> None:
    admission, now_ns = taught(count=19, queue_timeout_ns=1)
    assert admission.retry_after_s(now_ns) is None
    assert states([admission.offer(want(), now_ns) for _ in range(50)]) == "G" + "Q" * 49


def test_a_newcomer_that_would_wait_too_long_is_refused_at_once() -> None:
    admission, now_ns = taught(queue_timeout_ns=5 * S)
    tickets = [admission.offer(want(), now_ns) for _ in range(8)]
    assert states(tickets) == "GQQQQQRR"
    assert tickets[-1].refusal is Refusal.EXPECTED_WAIT
    assert admission.retry_after_s(now_ns) == pytest.approx(6)
    assert admission.expected_wait_s("newcomer", 0, now_ns) == pytest.approx(2), "fairness lets it pass the others"
    assert admission.expected_wait_s("a", 1, now_ns) == pytest.approx(1)
    assert admission.offer(want("newcomer"), now_ns).state is State.QUEUED


def test_wait_and_service_must_both_fit_before_the_deadline() -> None:
    admission, now_ns = taught()
    running = admission.offer(want(), now_ns)
    short = admission.offer(want(deadline_ns=now_ns + 19 * S // 10), now_ns)
    fits = admission.offer(want(deadline_ns=now_ns + 21 * S // 10), now_ns)
    assert (short.refusal, fits.state) == (Refusal.EXPECTED_WAIT, State.QUEUED)
    assert admission.next_tick_ns == now_ns + 11 * S // 10
    assert admission.tick(now_ns + 11 * S // 10) == [fits], "less is left than the service takes"
    assert fits.refusal is Refusal.QUEUE_TIMEOUT
    admission.release(running, now_ns + 2 * S)
    assert admission.offer(want(deadline_ns=now_ns + 2 * S + 1), now_ns + 2 * S).state is State.GRANTED


def test_a_stale_rate_refuses_nobody() -> None:
    admission, now_ns = taught(served_s=20, queue_timeout_ns=5 * S)
    assert admission.retry_after_s(now_ns) is not None
    now_ns += 81 * S
    assert admission.retry_after_s(now_ns) is None
    assert states([admission.offer(want(), now_ns) for _ in range(30)]) == "G" + "Q" * 29
    assert admission.next_tick_ns == now_ns + 5 * S


def test_little_traffic_is_not_taken_for_a_slow_server() -> None:
    """One short request every 10 s, then a burst: the queue drains by what a service takes, not at 0.1/s."""
    admission, now_ns = gate(1, queue_timeout_ns=5 * S), 0
    for _ in range(30):
        ticket = admission.offer(want(), now_ns)
        admission.release(ticket, now_ns + S)
        now_ns += 10 * S
    assert states([admission.offer(want(), now_ns) for _ in range(8)]) == "GQQQQQRR"


@given(st.lists(st.integers(0, 100 * S), min_size=1, max_size=60), st.integers(0, 300 * S), st.integers(0, 9))
def test_a_drain_knows_a_positive_rate_or_none(gaps_ns: list[int], later_ns: int, running: int) -> None:
    drain, now_ns = Drain(), 0
    for gap_ns in gaps_ns:
        now_ns += gap_ns
        drain.ended(now_ns, gap_ns // 2)
    rate_per_s = drain.rate_per_s(now_ns + later_ns, running)
    assert rate_per_s is None or (rate_per_s > 0 and len(gaps_ns) >= 20)
    assert (rate_per_s is None) <= (drain.service_ns == 0)


# Parts


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 5)), max_size=300))
def test_a_lazy_heap_is_a_sorted_dict(steps: list[tuple[int, int | None]]) -> None:
    heap, naive, order = LazyHeap[int](), dict[int, tuple[int, int]](), itertools.count()
    for item, key in steps:
        if key is None:
            heap.discard(item)
            naive.pop(item, None)
        else:
            heap.put(key, item)
            naive[item] = (key, next(order))
        assert heap.first() == min(naive, key=lambda it: naive[it], default=None)
        assert len(heap) == len(naive)
    assert len(heap._entries) <= 2 * len(heap) + 64


def test_a_lazy_heap_does_not_grow_with_its_changes() -> None:
    heap = LazyHeap[str]()
    for key in range(1000):
        heap.put(key, "moves")
        heap.put(key, f"leaves {key}")
        heap.discard(f"leaves {key}")
    assert len(heap._entries) <= 2 * len(heap) + 64


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 50)), max_size=60), st.data())
def test_everyone_that_waits_is_served_in_the_end(offers: list[tuple[str, int, int]], data: st.DataObject) -> None:
    admission = gate(2, max_tokens=60)
    tickets = [admission.offer(want(client, priority=p, tokens=n), 0) for client, p, n in offers]
    for now_ns in range(len(tickets)):
        running = [ticket for ticket in tickets if ticket.state is State.GRANTED]
        admission.release(data.draw(st.sampled_from(running)), now_ns, data.draw(st.none() | st.integers(0, 90)))
    assert set(states(tickets)) <= {"E"}
    for client, priority in {(client, p) for client, p, _ in offers}:
        grants = [it.granted_ns for it in tickets if (it.want.client, it.want.priority) == (client, priority)]
        assert grants == sorted(grants)  # type: ignore[type-var]


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 2000))
def test_slow_start_grows_steadily_and_its_next_growth_is_exact(limit: int, slow_ns: int, at_ns: int) -> None:
    places = Placement()
    places.put("u", limit, 1.0, None)
    places.take_down("u")
    places.bring_up("u", 0, slowly=True)
    places.grow(at_ns, slow_ns)
    now = places["u"].effective
    assert 1 <= now <= limit
    when_ns = places.next_growth_ns(slow_ns)
    if when_ns is None:
        assert (now, at_ns >= slow_ns) == (limit, True)
        return
    assert at_ns < when_ns <= slow_ns
    places.grow(when_ns - 1, slow_ns)
    assert places["u"].effective == now
    places.grow(when_ns, slow_ns)
    assert places["u"].effective > now or when_ns == slow_ns


# Overload in virtual time


class Server:
    """Requests through an admission in virtual time; each served for as long as it says, and all ticks kept."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.events: list[tuple[int, int, Ticket | Want, int]] = []
        self.order = itertools.count()
        self.tickets: list[Ticket] = []
        self.ended_ns: dict[Ticket, int] = {}
        self.service_ns: dict[Ticket, int] = {}

    def arrive(self, at_ns: int, request: Want, service_ns: int) -> None:
        heapq.heappush(self.events, (at_ns, next(self.order), request, service_ns))

    def run(self) -> None:
        while self.events:
            at_ns = self.events[0][0]
            tick_ns = self.admission.next_tick_ns
            if tick_ns is not None and tick_ns <= at_ns:
                self._start(self.admission.tick(tick_ns), tick_ns)
                continue
            _, _, what, service_ns = heapq.heappop(self.events)
            if isinstance(what, Want):
                ticket = self.admission.offer(what, at_ns)
                self.tickets.append(ticket)
                self.service_ns[ticket] = service_ns
                self._start([ticket], at_ns)
            else:
                self.ended_ns[what] = at_ns
                self._start(self.admission.release(what, at_ns), at_ns)

    def _start(self, tickets: list[Ticket], now_ns: int) -> None:
        for ticket in tickets:
            if ticket.state is State.GRANTED:
                heapq.heappush(self.events, (now_ns + self.service_ns[ticket], next(self.order), ticket, 0))


def test_a_light_client_hardly_waits_behind_a_greedy_one() -> None:
    server = Server(gate(2, max_queue=None))
    for _ in range(100):
        server.arrive(0, want("greedy", tokens=100), S)
    for second in range(1, 40, 4):
        server.arrive(second * S + S // 2, want("light", tokens=100), S)
    server.run()
    waits_ns = [it.granted_ns - it.offered_ns for it in server.tickets if it.want.client == "light"]  # type: ignore[operator]
    assert max(waits_ns) <= 3 * S // 2
    assert max(server.ended_ns.values()) == 55 * S, "and no slot was ever idle"


@pytest.mark.parametrize("queue", [20, None])
def test_ten_times_overload_does_not_collapse(queue: int | None) -> None:
    """What is granted nearly always ends in time, and all slots stay busy with it, whatever the queue's bound."""
    chance = random.Random(7)
    admission = Admission(AdmissionSettings(max_queue=queue, queue_timeout_ns=30 * S))
    admission.set_upstream("u", 4, 1.0, None, 0)
    server, now_ns = Server(admission), 0
    while now_ns < 300 * S:
        now_ns += round(chance.expovariate(20) * S)
        service_ns = round(chance.uniform(1, 3) * S)
        server.arrive(now_ns, Want(f"client {chance.randrange(50)}", now_ns + 12 * S), service_ns)
    server.run()
    in_time = [it for it, ended_ns in server.ended_ns.items() if ended_ns <= it.want.deadline_ns]
    assert len(in_time) >= 0.95 * len(server.ended_ns)
    assert sum(server.service_ns[it] for it in in_time) >= 0.93 * 4 * 300 * S
    refusals = Counter(it.refusal for it in server.tickets if it.state is State.REFUSED)
    at_once = refusals[Refusal.EXPECTED_WAIT] + refusals[Refusal.QUEUE_FULL]
    assert at_once >= 0.9 * refusals.total(), "most learn it at once"
    assert len(server.ended_ns) + refusals.total() == len(server.tickets)
    assert (admission.in_flight, admission.queued) == (0, 0)


def test_representations_tell_the_state() -> None:
    admission = gate(1, upstreams=2)
    tickets = [admission.offer(want(tokens=3), 0) for _ in range(3)]
    assert repr(admission) == ("<Admission: 2 in flight of 2, 1 queued, <Placement of 2 upstreams, 2 up, 2 in flight>>")
    assert repr(tickets[0]) == "<Ticket of a granted at u0, 3 tokens>"
    assert repr(tickets[2]) == "<Ticket of a queued, 3 tokens>"
