"""The states of a level: when its window opens and closes, what is judged, what happens when time runs out."""

import pytest

from loadstone.core.target import Break, Exchange, Request
from loadstone.core.verdict import LevelKind
from loadstone.measure.level import LevelPlan, LevelState, LiveView, Phase
from loadstone.measure.rules import Stance

SECOND = 1_000_000_000
T0 = 50 * SECOND


class Played:
    """A level of N slots whose requests are sent and ended by hand. Times in seconds since t0."""

    def __init__(
        self, n: int = 2, requests: int = 4, expected_s: float = 1.0, max_s: float | None = None, window_times: int = 5
    ) -> None:
        plan = LevelPlan(1, LevelKind.LADDER, n, requests, Stance.EXPLORE, window_times=window_times)
        max_ns = None if max_s is None else round(max_s * SECOND)
        self.state = LevelState(plan, T0, round(expected_s * SECOND), max_ns)
        self._slots: dict[int, Exchange] = {}

    def send(self, slot: int, at_s: float) -> Exchange:
        exchange = Exchange(Request("/", b"", len(self.state.exchanges)))
        exchange.slot = slot
        exchange.planned_ns = exchange.sent_ns = T0 + round(at_s * SECOND)
        self._slots[slot] = exchange
        self.state.on_send(exchange)
        return exchange

    def end(self, slot: int, at_s: float, status: int = 200, broken: Break | None = None) -> None:
        """The slot's request ends; as the generator does, the next one is sent before the level hears of it."""
        exchange = self._slots.pop(slot)
        exchange.end_ns, exchange.status, exchange.broken = T0 + round(at_s * SECOND), status, broken
        if slot < self.state.plan.concurrency:
            self.send(slot, at_s)
        self.state.on_done(exchange, exchange.end_ns)

    def run(self, request_s: float, from_s: float, until_s: float) -> None:
        """All slots in step, a reply every ``request_s`` divided by their number."""
        n = self.state.plan.concurrency
        for slot in range(n):
            if slot not in self._slots:
                self.send(slot, from_s + slot * request_s / n)
        turn = 0
        while (at_s := from_s + request_s * (1 + turn / n)) <= until_s + 1e-9:
            self.end(turn % n, at_s)
            turn += 1

    def window_s(self) -> tuple[float, float]:
        return (self.state.w0_ns - T0) / SECOND, (self.state.w1_ns - T0) / SECOND


# -- the window opens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends_s", "expected_s", "opens_s"),
    [
        ((1.0, 1.5), 1.0, 2.0),  # every slot is done, but two expected times have not passed
        ((1.0, 1.5), 2.0, 4.0),
        ((1.0, 4.5), 1.0, 4.5),  # time enough has passed, but one slot is not done
    ],
)
def test_the_window_opens_when_every_slot_is_done_and_two_request_times_have_passed(
    ends_s: tuple[float, float], expected_s: float, opens_s: float
) -> None:
    played = Played(n=2, expected_s=expected_s)
    just_before_ns = T0 + round((opens_s - 0.01) * SECOND)
    played.send(0, 0.0)
    played.send(1, 0.5)
    for slot, end_s in enumerate(ends_s):
        played.state.tick(min(just_before_ns, T0 + round(end_s * SECOND)))
        assert played.state.phase is Phase.WARMING
        played.end(slot, end_s)
    if ends_s[-1] < opens_s:
        played.state.tick(just_before_ns)
        assert (played.state.phase, played.state.sent) == (Phase.WARMING, 0)
        played.state.tick(T0 + round(opens_s * SECOND))
    assert played.state.phase is Phase.JUDGING
    assert played.window_s()[0] == opens_s


def test_an_inherited_request_counts_as_the_slots_first() -> None:
    played = Played(n=1)
    inherited = Exchange(Request("/", b"", 0))
    inherited.slot, inherited.sent_ns, inherited.end_ns, inherited.status = 0, T0 - SECOND, T0 + 2 * SECOND, 200
    played.send(0, 2.0)
    played.state.on_done(inherited, inherited.end_ns)
    assert played.state.phase is Phase.JUDGING
    assert played.state.mean_ns == SECOND, "what an earlier level sent tells nothing of this concurrency"


def test_a_slot_beyond_the_level_does_not_open_its_window() -> None:
    played = Played(n=1)
    beyond = Exchange(Request("/", b"", 0))
    beyond.slot, beyond.end_ns, beyond.status = 3, T0 + 9 * SECOND, 200
    played.send(0, 0.0)
    played.state.on_done(beyond, beyond.end_ns)
    assert played.state.phase is Phase.WARMING


def test_a_refused_slot_has_had_its_turn() -> None:
    played = Played(n=2)
    played.send(0, 0.0)
    played.send(1, 0.5)
    played.end(0, 2.1)
    played.end(1, 2.2, status=503)
    assert played.state.phase is Phase.JUDGING


def test_a_slot_that_hangs_does_not_keep_the_window_shut() -> None:
    played = Played(n=2, expected_s=2.0)
    played.send(1, 0.0)
    played.run(2.0, 0.0, 0.0)
    for turn in range(9):
        played.end(0, 2.0 * (turn + 1))
    played.state.tick(T0 + round(19.9 * SECOND))
    assert played.state.phase is Phase.WARMING
    played.state.tick(T0 + 20 * SECOND)
    assert played.state.phase is Phase.JUDGING, "ten request times have passed"


def test_the_request_sent_as_the_window_opens_is_judged() -> None:
    played = Played(n=1)
    played.send(0, 0.0)
    played.end(0, 2.5)
    assert played.state.phase is Phase.JUDGING
    assert [e.sent_ns - T0 for e in played.state.judged] == [2.5 * SECOND]


# -- and closes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_s", "requests", "window_times", "length_s"),
    [
        (1.0, 40, 5, 20.0),  # the plan: the 40th is sent 20 − 0.5 s after the first
        (1.0, 4, 5, 5.0),  # five request times
        (0.1, 4, 5, 2.0),  # two seconds
        (1.0, 4, 3, 3.0),  # a level that only adds to an earlier one may be shorter
    ],
)
def test_the_window_closes_when_the_plan_is_sent_and_it_is_long_enough(
    request_s: float, requests: int, window_times: int, length_s: float
) -> None:
    played = Played(n=2, requests=requests, expected_s=request_s, window_times=window_times)
    played.run(request_s, 0.0, 60 * request_s)
    start_s, end_s = played.window_s()
    assert end_s - start_s == pytest.approx(length_s, abs=0.51 * request_s)
    assert len(played.state.judged) >= requests
    assert played.state.phase is Phase.OVER


def test_judged_are_the_requests_sent_in_the_window_and_each_is_awaited() -> None:
    played = Played(n=2, requests=4)
    played.run(1.0, 0.0, 7.0)
    state = played.state
    assert state.phase is Phase.FOLLOWING
    assert all(state.w0_ns <= e.sent_ns < state.w1_ns for e in state.judged)
    outside = [e for e in state.exchanges if e not in state.judged]
    assert not any(state.w0_ns <= e.sent_ns < state.w1_ns for e in outside)
    played.end(1, 7.5)
    assert state.phase is Phase.FOLLOWING
    played.end(0, 8.0)
    assert state.phase is Phase.OVER
    assert all(e.done for e in state.judged)
    assert len([e for e in state.exchanges if not e.done]) == 2, "fillers keep both slots busy to the end"


def test_an_extension_judges_the_fillers_that_were_sent_meanwhile() -> None:
    played = Played(n=2, requests=4)
    played.run(1.0, 0.0, 9.0)
    state = played.state
    assert state.phase is Phase.OVER
    start_ns, before, fillers = state.w0_ns, state.sent, len(state.exchanges)
    state.extend(6, T0 + 9 * SECOND)
    assert (state.phase, state.planned) == (Phase.JUDGING, before + 6)
    played.run(1.0, 9.0, 16.0)
    assert state.w0_ns == start_ns, "the window simply goes on"
    assert state.phase is Phase.OVER
    assert state.sent >= before + 6
    assert len(state.judged) > before
    assert state.exchanges[fillers - 1] in state.judged


def test_an_extension_that_the_fillers_have_filled_already_is_only_followed() -> None:
    played = Played(n=2, requests=4)
    played.run(1.0, 0.0, 9.0)
    played.state.extend(1, T0 + 9 * SECOND)
    assert played.state.phase is Phase.FOLLOWING


# -- hanging --------------------------------------------------------------------------------------------------------


def test_a_request_that_hangs_is_given_up_long_after_all_others() -> None:
    played = Played(n=2, requests=4)
    played.run(1.0, 0.0, 3.0)
    hung = played.state.judged[-1]
    for second in range(4, 14):
        played.end(1 - hung.slot, float(second) + 0.2)
    state = played.state
    assert state.phase is Phase.FOLLOWING
    age_s = (hung.sent_ns - T0) / SECOND
    state.tick(T0 + round((age_s + 9.9) * SECOND))
    assert state.phase is Phase.FOLLOWING
    state.tick(T0 + round((age_s + 11.0) * SECOND))
    assert state.phase is Phase.OVER
    assert state.hung(T0 + round((age_s + 11.0) * SECOND)) == {hung}


def test_slow_requests_do_not_count_as_hung() -> None:
    played = Played(n=1, expected_s=20.0)
    played.send(0, 0.0)
    played.end(0, 60.0)
    assert played.state.hung(T0 + 120 * SECOND) == frozenset()


# -- out of time ----------------------------------------------------------------------------------------------------


def test_a_level_that_runs_out_of_time_is_judged_by_what_it_has() -> None:
    played = Played(n=2, requests=1000, max_s=10.0)
    played.run(1.0, 0.0, 12.0)
    assert played.state.phase is Phase.OVER
    assert played.state.ran_out
    assert played.window_s()[1] == pytest.approx(10.0, abs=0.51)
    assert 10 < len(played.state.judged) < 25


def test_a_level_that_never_gets_warm_ends_without_a_window() -> None:
    played = Played(n=1, max_s=3.0)
    played.send(0, 0.0)
    played.state.tick(T0 + 3 * SECOND)
    assert played.state.phase is Phase.OVER
    assert played.state.ran_out
    assert played.state.judged == []


def test_requests_that_do_not_end_are_overdue_after_twice_the_time() -> None:
    played = Played(n=1, max_s=10.0)
    assert not played.state.overdue(T0 + 19 * SECOND)
    assert played.state.overdue(T0 + 20 * SECOND)
    assert not Played(n=1).state.overdue(T0 + 10_000 * SECOND)


def test_the_mean_time_is_that_of_successes_and_at_first_the_expected_one() -> None:
    played = Played(n=2, expected_s=3.0)
    played.send(0, 0.0)
    played.send(1, 0.0)
    played.end(0, 0.1, status=503)
    assert played.state.mean_ns == 3 * SECOND
    played.end(1, 2.0)
    assert played.state.mean_ns == 2 * SECOND


# -- what is known while it runs ------------------------------------------------------------------------------------


def test_the_live_view_counts_the_waiting_by_their_age_and_leaves_failures_out() -> None:
    played = Played(n=4, requests=100)
    played.run(1.0, 0.0, 2.0)
    assert played.state.phase is Phase.JUDGING
    at_s = 2.6
    played.end(1, 2.25, status=503)
    judged = played.state.judged
    first_content = {judged[0]: judged[0].sent_ns + 100_000_000}
    live = LiveView(played.state, first_content.get, streams=True)
    view = live.view(T0 + round(at_s * SECOND))
    assert view.planned == 100
    ages_ms = [(at_s - (e.sent_ns - T0) / SECOND) * 1e3 for e in judged]
    assert [sample.ms for sample in view.latencies["ttft"]] == pytest.approx([100.0, *ages_ms[1:]])
    assert [sample.known for sample in view.latencies["ttft"]] == [True] + [False] * (len(judged) - 1)
    assert live.mean_ttft_ms() == 100.0
    played.end(judged[0].slot, 2.7, status=500)
    assert live.view(T0 + 3 * SECOND).failures == 1
    assert len(live.view(T0 + 3 * SECOND).latencies["e2el"]) == len(played.state.judged) - 1


def test_what_we_cut_or_could_not_send_is_no_failure_of_the_server() -> None:
    played = Played(n=3, requests=100)
    played.run(1.0, 0.0, 2.0)
    for slot, broken in enumerate((Break.CUT, Break.CLIENT, Break.DISCONNECT)):
        played.end(slot, 2.5)
        played.end(slot, 2.6, broken=broken, status=0)
    assert LiveView(played.state, lambda e: None, True).view(T0 + 3 * SECOND).failures == 1


def test_how_long_the_window_will_be_is_known_while_it_is_open() -> None:
    """Twenty requests at two in a second; five request times where the plan is shorter."""
    long, short = Played(n=2, requests=20), Played(n=2, requests=4)
    long.run(1.0, 0.0, 8.0)
    assert long.state.expected_window_ns(T0 + 8 * SECOND) / SECOND == pytest.approx(10.0, rel=0.1)
    short.run(1.0, 0.0, 4.0)
    assert short.state.expected_window_ns(T0 + 4 * SECOND) == 5 * SECOND
