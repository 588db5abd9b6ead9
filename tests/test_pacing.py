"""Under lasting overload starts are spaced out: equally long replies do not begin and end in step."""

import heapq
import random
from dataclasses import dataclass

import pytest

from loadstone.core.admission import Admission, AdmissionSettings, Refusal, State, Ticket, Want
from loadstone.core.pacing import Pacing

SLOTS = 40
SERVICE_NS = 800_000_000
RATE_PER_S = SLOTS / SERVICE_NS * 1e9
TIMEOUT_NS = 250_000_000
NEVER = 10**18


@dataclass
class Overload:
    """What came of 10 × as many requests as the server takes, the first part left out."""

    ended: int
    waits_ns: list[int]
    refusals: list[Refusal]
    most_started_at_once: int
    """Within a tenth of a service time."""


def overload(standing: int | None, service_spread: float, seconds: int = 40) -> Overload:
    """Poisson arrivals at a server with ``SLOTS`` places and a queue; times in nanoseconds."""
    rng = random.Random(5)
    settings = AdmissionSettings(max_queue=12, queue_timeout_ns=TIMEOUT_NS, standing_queue=standing)
    admission = Admission(settings)
    admission.set_upstream("u", SLOTS, 1.0, None, 0)
    running: list[tuple[int, int, Ticket]] = []
    seen = Overload(0, [], [], 0)
    starts: list[int] = []
    now_ns, arrival_ns, warm_ns, number = 0, 0, 10 * 10**9, 0

    def start(ticket: Ticket) -> None:
        nonlocal number
        number += 1
        service_ns = int(SERVICE_NS * (1 + service_spread * rng.uniform(-1, 1)))
        heapq.heappush(running, (now_ns + service_ns, number, ticket))
        if now_ns > warm_ns:
            starts.append(now_ns)
            seen.waits_ns.append(now_ns - ticket.offered_ns)

    def changed(tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.state is State.GRANTED:
                start(ticket)
            elif ticket.refusal is not None and now_ns > warm_ns:
                seen.refusals.append(ticket.refusal)

    while now_ns < seconds * 10**9:
        tick_ns = admission.next_tick_ns
        now_ns = min(
            arrival_ns, running[0][0] if running else NEVER, NEVER if tick_ns is None else max(tick_ns, now_ns)
        )
        if running and running[0][0] <= now_ns:
            seen.ended += now_ns > warm_ns
            changed(admission.release(heapq.heappop(running)[2], now_ns))
        elif arrival_ns <= now_ns:
            changed([admission.offer(Want("a", deadline_ns=NEVER), now_ns)])
            arrival_ns += round(rng.expovariate(10 * RATE_PER_S) * 1e9)
        else:
            changed(admission.tick(now_ns))
    window_ns = SERVICE_NS // 10
    seen.most_started_at_once = max(sum(at <= other < at + window_ns for other in starts) for at in starts[::7])
    return seen


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
def test_starts_are_spread_and_hardly_anyone_waits_in_vain(spread: float) -> None:
    seen = overload(6, spread)
    assert seen.ended / 30 >= 0.95 * RATE_PER_S
    assert seen.most_started_at_once <= SLOTS / 4
    assert seen.refusals.count(Refusal.QUEUE_TIMEOUT) < 0.01 * len(seen.refusals)
    assert sorted(seen.waits_ns)[int(0.99 * len(seen.waits_ns))] < TIMEOUT_NS


def test_a_queue_that_was_chosen_is_not_paced() -> None:
    seen = overload(None, 0.0)
    assert seen.most_started_at_once >= SLOTS / 2
    assert seen.refusals.count(Refusal.QUEUE_TIMEOUT) > 0.02 * len(seen.refusals)


def test_a_late_start_does_not_delay_the_next() -> None:
    pacing = Pacing()
    assert not pacing.holds_back(0)
    pacing.started(1_000_000_000, 80.0)  # 10 ms between starts
    assert pacing.holds_back(1_009_999_999)
    assert pacing.due_ns == 1_010_000_000
    assert not pacing.holds_back(1_010_000_000)
    assert pacing.due_ns is None
    pacing.started(1_014_000_000, 80.0)
    assert pacing.holds_back(1_019_999_999)
    assert not pacing.holds_back(1_020_000_000)
    pacing.started(2_000_000_000, 80.0)
    assert pacing.holds_back(2_009_999_999)
