"""Quotas: exact cases, then against a naive log that remembers everything."""

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loadstone.core.quota import Exceeded, Quotas, QuotaSettings, Reservation, Standing, spare_of

S = 1_000_000_000
MINUTE, HOUR = 60 * S, 3600 * S


def taken(result: Reservation | Exceeded) -> Reservation:
    assert isinstance(result, Reservation), result
    return result


def test_a_burst_of_a_hundred_gets_ten_and_the_rest_learn_when_to_come_back() -> None:
    quotas = Quotas(QuotaSettings(requests_per_minute=10, requests_per_hour=100))
    results = [quotas.reserve("ab", 100, i * S // 10) for i in range(100)]
    assert [isinstance(result, Reservation) for result in results] == [True] * 10 + [False] * 90
    assert results[10] == Exceeded("minute", "requests", 10, 59.0)
    assert isinstance(quotas.reserve("somebody else", 100, 10 * S), Reservation)
    # The tenth of them left at 60.9 s: one place for each that leaves, at exactly its time.
    assert quotas.reserve("ab", 100, MINUTE - 1) == Exceeded("minute", "requests", 10, 1e-9)
    assert isinstance(quotas.reserve("ab", 100, MINUTE), Reservation)
    assert quotas.reserve("ab", 100, MINUTE) == Exceeded("minute", "requests", 10, 0.1)


def test_the_window_that_takes_longest_is_the_one_named() -> None:
    quotas = Quotas(QuotaSettings(2, 3, 100))
    for at_s in (0, 100, 101):
        taken(quotas.reserve("a", 50, at_s * S))
    assert quotas.reserve("a", 1, 102 * S) == Exceeded("hour", "requests", 3, 3498.0)
    assert quotas.reserve("a", 1, 3599 * S) == Exceeded("hour", "requests", 3, 1.0)
    taken(quotas.reserve("a", 100, 3600 * S))
    assert quotas.reserve("a", 1, 3601 * S) == Exceeded("hour", "requests", 3, 99.0)


def test_a_token_refusal_waits_for_as_many_entries_as_it_needs() -> None:
    quotas = Quotas(QuotaSettings(requests_per_minute=60, tokens_per_minute=100))
    for at_s, tokens in ((0, 30), (10, 30), (20, 40)):
        taken(quotas.reserve("a", tokens, at_s * S))
    for tokens, wait_s in ((1, 30.0), (30, 30.0), (31, 40.0), (60, 40.0), (61, 50.0), (100, 50.0)):
        assert quotas.reserve("a", tokens, 30 * S) == Exceeded("minute", "tokens", 100, wait_s)


def test_a_request_dearer_than_the_whole_quota_never_passes() -> None:
    quotas = Quotas(QuotaSettings(tokens_per_minute=100))
    for client in ("new", "known"):
        assert quotas.reserve(client, 101, 0) == Exceeded("minute", "tokens", 100, 60.0, never=True)
        taken(quotas.reserve("known", 1, 0))
    assert repr(quotas) == "<Quotas 100 tokens/minute; 1 clients>"


def test_tokens_are_settled_to_what_was_served_and_only_once() -> None:
    quotas = Quotas(QuotaSettings(requests_per_hour=60, tokens_per_minute=100))
    first = taken(quotas.reserve("a", 80, 0))
    assert isinstance(quotas.reserve("a", 21, 1), Exceeded)
    quotas.settle(first, 30, 2)
    quotas.settle(first, 0, 2)
    quotas.refund(first, 2)
    assert quotas.standings("a", 2)[1].remaining == 70
    second = taken(quotas.reserve("a", 70, 3))
    quotas.settle(second, 500, 4)
    assert quotas.standings("a", 5)[1].remaining == 0, "more than was reserved is counted as well"
    assert quotas.reserve("a", 1, 5) == Exceeded("minute", "tokens", 100, 60 - 2e-9)
    assert quotas.standings("a", MINUTE + 4)[1].remaining == 100


def test_a_refund_restores_exactly_and_only_once() -> None:
    quotas = Quotas(QuotaSettings(2, 2, 10))
    kept = taken(quotas.reserve("a", 5, 0))
    before = quotas.standings("a", 1)
    refused = taken(quotas.reserve("a", 5, 1))
    assert [standing.remaining for standing in quotas.standings("a", 1)] == [0, 0, 0]
    for _ in range(3):
        quotas.refund(refused, 1)
        assert quotas.standings("a", 1) == before
    quotas.settle(refused, 5, 1)
    assert quotas.standings("a", 1) == before
    quotas.refund(kept, 2)
    assert repr(quotas).endswith("0 clients>"), "nothing is left of a client whose requests were all refunded"


@pytest.mark.parametrize("close_at", [MINUTE, HOUR - 1, HOUR, 5 * HOUR])
def test_what_has_left_its_window_is_neither_settled_nor_refunded_there(close_at: int) -> None:
    quotas = Quotas(QuotaSettings(5, 5, 100))
    old = [taken(quotas.reserve("a", 10, 0)) for _ in range(2)]
    taken(quotas.reserve("a", 7, close_at))
    quotas.refund(old[0], close_at)
    quotas.settle(old[1], 90, close_at)
    minute, hour, tokens = quotas.standings("a", close_at)
    assert (minute.remaining, tokens.remaining) == (4, 93)
    assert hour.remaining == (3 if close_at < HOUR else 4)


def test_standings_say_when_the_next_place_comes_free() -> None:
    quotas = Quotas(QuotaSettings(10, 100, 1000))
    fresh = [
        Standing("minute", "requests", 10, 10, 60.0, 60),
        Standing("hour", "requests", 100, 100, 3600.0, 3600),
        Standing("minute", "tokens", 1000, 1000, 60.0, 60),
    ]
    assert quotas.standings("a", 0) == fresh
    for at_s in (0, 20):
        taken(quotas.reserve("a", 300, at_s * S))
    assert quotas.standings("a", 30 * S) == [
        Standing("minute", "requests", 10, 8, 30.0, 60),
        Standing("hour", "requests", 100, 98, 3570.0, 3600),
        Standing("minute", "tokens", 1000, 400, 30.0, 60),
    ]
    assert quotas.standings("a", 2 * HOUR) == fresh


@pytest.mark.parametrize(
    "bounds",
    [QuotaSettings(), QuotaSettings(2), QuotaSettings(None, 2), QuotaSettings(None, None, 9), QuotaSettings(2, 2, 9)],
)
def test_what_is_left_is_the_tightest_of_the_windows_that_are_set(bounds: QuotaSettings) -> None:
    quotas = Quotas(bounds)
    for now_ns in (0, 1, 20 * S, MINUTE, HOUR + 1):
        spare, of_all = quotas.spare("a", now_ns), spare_of(quotas.standings("a", now_ns))
        assert (spare.window, spare.requests, spare.requests_reset_s) == (
            (of_all.window, of_all.requests, of_all.requests_reset_s)
        )
        if bounds.tokens_per_minute is not None:
            assert (spare.tokens, spare.tokens_reset_s) == (of_all.tokens, of_all.tokens_reset_s)
        quotas.reserve("a", 3, now_ns)


def test_without_quotas_nothing_is_refused_or_kept() -> None:
    quotas = Quotas(QuotaSettings())
    reservations = [taken(quotas.reserve("a", 10**9, 0)) for _ in range(1000)]
    quotas.refund(reservations[0], 0)
    quotas.settle(reservations[1], 5, 0)
    assert quotas.standings("a", 0) == []
    assert repr(quotas) == "<Quotas none; 0 clients>"


def test_a_reload_keeps_the_counts() -> None:
    quotas = Quotas(QuotaSettings(requests_per_minute=10))
    last = [taken(quotas.reserve("a", 1, i * S)) for i in range(10)][-1]
    quotas.configure(QuotaSettings(requests_per_minute=3, requests_per_hour=100))
    assert quotas.reserve("a", 1, 10 * S) == Exceeded("minute", "requests", 3, 57.0), "eight must leave"
    quotas.refund(last, 10 * S)
    assert [standing.remaining for standing in quotas.standings("a", 10 * S)] == [0, 91]
    quotas.configure(QuotaSettings())
    taken(quotas.reserve("a", 1, 10 * S))
    quotas.configure(QuotaSettings(requests_per_minute=10))
    assert quotas.standings("a", 10 * S)[0].remaining == 1


def test_idle_clients_are_dropped_as_new_ones_come() -> None:
    quotas = Quotas(QuotaSettings(requests_per_minute=10))
    for i in range(5000):
        taken(quotas.reserve(f"2001:db8:0:{i:x}::/64", 1, 0))
    for i in range(2500):
        taken(quotas.reserve(f"new {i}", 1, MINUTE + i))
    assert repr(quotas).endswith(" 2500 clients>")


def test_a_sprayer_of_addresses_is_bounded_and_a_forgotten_reservation_harms_nobody() -> None:
    quotas = Quotas(QuotaSettings(requests_per_minute=2), most_clients=100)
    forgotten = [taken(quotas.reserve(f"client {i}", 1, 0)) for i in range(1000)]
    assert repr(quotas).endswith(" 100 clients>")
    for i in range(2):
        taken(quotas.reserve("client 0", 1, i))
    quotas.refund(forgotten[0], 1)
    assert isinstance(quotas.reserve("client 0", 1, 1), Exceeded)


def test_a_client_that_is_served_again_is_not_the_one_forgotten() -> None:
    quotas = Quotas(QuotaSettings(requests_per_minute=3), most_clients=2)
    for client in ("steady", "a", "steady", "b", "steady"):
        taken(quotas.reserve(client, 1, 0))
    assert isinstance(quotas.reserve("steady", 1, 0), Exceeded)


@given(st.lists(st.integers(0, 200_000_000), max_size=300))
def test_large_quotas_are_counted_in_steps_but_never_let_more_through(gaps_ns: list[int]) -> None:
    """60 tokens per minute and no bound on requests: each window holds at most 60, and at least what 60.06 s would."""
    quotas = Quotas(QuotaSettings(tokens_per_minute=60))
    now_ns, granted = 0, list[int]()
    for gap_ns in gaps_ns:
        now_ns += gap_ns
        if isinstance(quotas.reserve("a", 1, now_ns), Reservation):
            granted.append(now_ns)
            assert sum(at_ns > now_ns - MINUTE for at_ns in granted) <= 60
        else:
            assert sum(at_ns > now_ns - MINUTE - 60_000_000 for at_ns in granted) >= 60


def test_large_quotas_hold_a_bounded_log_and_refund_from_it() -> None:
    quotas = Quotas(QuotaSettings(tokens_per_minute=1_000_000))
    reservations = [taken(quotas.reserve("a", 1, i * S // 5000)) for i in range(10_000)]
    entries = {id(reservation.held[1]) for reservation in reservations}  # type: ignore[index]
    assert len(entries) <= 35, "two seconds in steps of 60 ms"
    for reservation in reservations[::2]:
        quotas.refund(reservation, 2 * S)
    assert quotas.standings("a", 2 * S)[0].remaining == 995_000


@dataclass
class Taken:
    """One request in the naive log."""

    client: str
    at_ns: int
    tokens: int


class AgainstANaiveLog(RuleBasedStateMachine):
    """Every reservation, settlement and refund, in any order, against a list that is counted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = QuotaSettings(3, 5, 20)
        self.quotas = Quotas(self.settings)
        self.now_ns = 0
        self.log: list[Taken] = []
        self.open: list[tuple[Reservation, Taken]] = []
        self.closed: list[Reservation] = []

    def used(self, client: str, window_ns: int) -> list[Taken]:
        return [one for one in self.log if one.client == client and one.at_ns > self.now_ns - window_ns]

    def fits(self, client: str, tokens: int) -> bool:
        minute, hour = self.settings.requests_per_minute, self.settings.requests_per_hour
        in_minute = self.used(client, MINUTE)
        per_minute = self.settings.tokens_per_minute
        return (
            (minute is None or len(in_minute) < minute)
            and (hour is None or len(self.used(client, HOUR)) < hour)
            and (per_minute is None or sum(one.tokens for one in in_minute) + tokens <= per_minute)
        )

    @rule(gap=st.one_of(st.integers(0, 3), st.sampled_from([S, 20 * S, MINUTE - 1, MINUTE, 900 * S, HOUR])))
    def pass_time(self, gap: int) -> None:
        self.now_ns += gap

    @rule(client=st.sampled_from("ab"), tokens=st.integers(0, 25))
    def reserve(self, client: str, tokens: int) -> None:
        fits = self.fits(client, tokens)
        result = self.quotas.reserve(client, tokens, self.now_ns)
        assert isinstance(result, Reservation) == fits
        if isinstance(result, Reservation):
            one = Taken(client, self.now_ns, tokens)
            self.log.append(one)
            self.open.append((result, one))
        elif not result.never:
            now_ns = self.now_ns
            wait_ns = round(result.retry_after_s * S)
            self.now_ns = now_ns + wait_ns
            assert self.fits(client, tokens), "it may come back then"
            self.now_ns = now_ns + wait_ns - 1
            assert not self.fits(client, tokens), "and not before"
            self.now_ns = now_ns

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def settle(self, data: st.DataObject, tokens: int) -> None:
        reservation, one = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.quotas.settle(reservation, tokens, self.now_ns)
        one.tokens = tokens
        self.closed.append(reservation)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        reservation, one = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.quotas.refund(reservation, self.now_ns)
        self.log = [other for other in self.log if other is not one]
        self.closed.append(reservation)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def close_again(self, data: st.DataObject) -> None:
        reservation = data.draw(st.sampled_from(self.closed))
        self.quotas.refund(reservation, self.now_ns)
        self.quotas.settle(reservation, 7, self.now_ns)

    @rule(minute=st.integers(1, 4), hour=st.integers(3, 6), tokens=st.one_of(st.none(), st.integers(5, 30)))
    def configure(self, minute: int, hour: int, tokens: int | None) -> None:
        self.settings = QuotaSettings(minute, hour, tokens)
        self.quotas.configure(self.settings)

    @invariant()
    def standings_are_what_the_log_says(self) -> None:
        for client in "ab":
            for standing in self.quotas.standings(client, self.now_ns):
                counted = self.used(client, standing.window_s * S)
                used = sum(one.tokens for one in counted) if standing.what == "tokens" else len(counted)
                assert standing.remaining == max(0, standing.limit - used)
                first_ns = min((one.at_ns for one in counted), default=self.now_ns)
                assert standing.reset_s == pytest.approx((first_ns - self.now_ns) / S + standing.window_s)

    @invariant()
    def what_is_left_is_what_the_standings_say(self) -> None:
        for client in "ab":
            spare = self.quotas.spare(client, self.now_ns)
            of_all = spare_of(self.quotas.standings(client, self.now_ns))
            if self.settings.tokens_per_minute is None:
                of_all = msgspec.structs.replace(of_all, tokens=spare.tokens, tokens_reset_s=spare.tokens_reset_s)
            assert spare == of_all

    @invariant()
    def nobody_is_remembered_for_nothing(self) -> None:
        clients = int(repr(self.quotas).rsplit(" ", 2)[1])
        assert clients <= len({one.client for one in self.log})


TestAgainstANaiveLog = AgainstANaiveLog.TestCase
TestAgainstANaiveLog.settings = settings(max_examples=150, stateful_step_count=40)
