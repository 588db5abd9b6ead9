"""serve.batcher: tables, properties, a state machine against what is promised, and closed loops in simulated time."""

import heapq
from collections.abc import Callable, Sequence
from itertools import count, cycle

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loadstone.serve.batch_model import Company, RunTime
from loadstone.serve.batcher import Batcher, BatchFigures, BatchSettings, Entry, best_run

MS = 1_000_000


def lengths_of(batch: Sequence[Entry[int]]) -> list[int]:
    return [it.tokens for it in batch]


@pytest.mark.parametrize(
    ("offered", "max_items", "max_tokens", "expected"),
    [
        ([5], 8, 100, [5]),
        ([9, 3, 7], 8, 100, [3, 7, 9]),
        ([300], 8, 100, [300]),
        ([300, 5], 8, 100, [300]),
        ([5, 300, 6], 8, 100, [5, 6]),
        ([5, 5, 5], 2, 100, [5, 5]),
        ([30, 30, 30, 30], 8, 100, [30, 30, 30]),
        ([10, 50, 50], 8, 100, [10, 50]),
        ([20, 60, 10, 15], 8, 60, [10, 15, 20]),
    ],
    ids=str,
)
def test_a_batch_keeps_its_bounds_and_takes_the_oldest(
    offered: list[int], max_items: int, max_tokens: int, expected: list[int]
) -> None:
    batcher: Batcher[int] = Batcher(BatchSettings(max_items=max_items, max_tokens=max_tokens))
    for tokens in offered:
        batcher.offer(0, tokens, 0)
    assert lengths_of(batcher.take(0)) == expected


@pytest.mark.parametrize(
    ("offered", "max_items", "max_tokens", "expected"),
    [
        ([5], 8, 100, [5]),
        ([9, 3, 70], 8, 100, [3, 9, 70]),
        ([300, 5], 8, 100, [300]),
        ([5, 300, 6], 8, 100, [5]),
        ([5, 7, 6], 2, 100, [5, 7]),
        ([50, 10, 40, 1], 8, 100, [10, 40, 50]),
    ],
    ids=str,
)
def test_where_nothing_is_padded_as_many_go_as_fit_in_their_order(
    offered: list[int], max_items: int, max_tokens: int, expected: list[int]
) -> None:
    batcher: Batcher[int] = Batcher(BatchSettings(max_items=max_items, max_tokens=max_tokens, pads=False))
    for tokens in offered:
        batcher.offer(0, tokens, 0)
    assert lengths_of(batcher.take(0)) == expected
    assert batcher.figures(0).padding_share == 0.0


def test_equal_lengths_go_in_the_order_of_their_arrival() -> None:
    batcher: Batcher[int] = Batcher(BatchSettings(max_items=3))
    for payload in range(7):
        batcher.offer(payload, 12, payload)
    taken = []
    while batch := batcher.take(10):
        taken.append([it.payload for it in batch])
        batcher.finished(10)
    assert taken == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_cancelled_item_is_left_out_but_one_in_a_batch_stays() -> None:
    batcher: Batcher[str] = Batcher(BatchSettings())
    entries = [batcher.offer(name, 4, 0) for name in "abcd"]
    batcher.cancel(entries[0])
    batcher.cancel(entries[2])
    batcher.cancel(entries[2])
    batch = batcher.take(0)
    assert [it.payload for it in batch] == ["b", "d"]
    batcher.cancel(entries[1])
    assert repr(entries) == (
        "[<Entry of 4 tokens, cancelled>, <Entry of 4 tokens, cancelled>, "
        "<Entry of 4 tokens, cancelled>, <Entry of 4 tokens, taken>]"
    )
    assert batcher.figures(5 * MS) == BatchFigures(
        queued=0,
        running=2,
        running_s=0.005,
        batches=1,
        items=2,
        cancelled=2,
        mean_items_per_batch=2.0,
        padding_share=0.0,
        fixed_batch_s=0.0,
    )
    batcher.finished(6 * MS)
    assert batcher.due_ns is None
    assert repr(batcher) == "<Batcher: 0 waiting, 0 running, 1 batches>"


def learnt(fixed_ms: float, token_ms: float) -> Batcher[int]:
    """A batcher that has seen batches with these costs, one item each, and an answer long ago."""
    batcher: Batcher[int] = Batcher(BatchSettings())
    now_ns = 0
    for tokens in range(10, 50):
        now_ns += 1000 * MS
        batcher.offer(0, tokens, now_ns)
        assert batcher.take(now_ns)
        now_ns += round((fixed_ms + token_ms * tokens) * MS)
        batcher.finished(now_ns)
    return batcher


def test_an_outlier_that_costs_more_padding_than_a_batch_goes_alone() -> None:
    dear_padding, cheap_padding = learnt(4, 0.1), learnt(4, 0.001)
    for batcher in (dear_padding, cheap_padding):
        for tokens in (10, 11, 100, 12, 10):
            batcher.offer(0, tokens, 100_000 * MS)
    assert lengths_of(dear_padding.take(100_000 * MS)) == [10, 10, 11, 12]
    assert lengths_of(cheap_padding.take(100_000 * MS)) == [10, 10, 11, 12, 100]
    assert cheap_padding.figures(100_000 * MS).padding_share == pytest.approx(1 - (143 + 1180) / (500 + 1180))


def naive_best(lengths: list[int], always: int, bounds: BatchSettings, fixed_tokens: float) -> float:
    best = 0.0
    for start in range(always + 1):
        for end in range(always + 1, len(lengths) + 1):
            padded = lengths[end - 1] * (end - start)
            if end - start == 1 or (end - start <= bounds.max_items and padded <= bounds.max_tokens):
                best = max(best, sum(lengths[start:end]) / (fixed_tokens + padded))
    return best


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=24).map(sorted),
    where=st.floats(0, 1, exclude_max=True),
    max_items=st.integers(1, 12),
    max_tokens=st.integers(1, 400),
    fixed_tokens=st.floats(1, 1000),
)
def test_no_other_run_yields_more(
    lengths: list[int], where: float, max_items: int, max_tokens: int, fixed_tokens: float
) -> None:
    bounds, always = BatchSettings(max_items, max_tokens), int(where * len(lengths))
    start, end = best_run(lengths, always, bounds, fixed_tokens)
    assert start <= always < end
    padded = lengths[end - 1] * (end - start)
    assert end - start == 1 or (end - start <= max_items and padded <= max_tokens)
    best = naive_best(lengths, always, bounds, fixed_tokens)
    assert sum(lengths[start:end]) / (fixed_tokens + padded) == pytest.approx(best)


@pytest.mark.parametrize(
    ("runs", "fixed_ms", "fixed_tokens"),
    [
        ([(100, 9.0)] * 40, 0.0, 5000),
        ([(100, 9.0), (200, 14.0)] * 3, 0.0, 5000),
        ([(100, 9.0), (200, 14.0)] * 4, 4.0, 80),
        ([(100, 9.0), (200, 14.0)] * 40 + [(150, 11.5)] * 400, 4.0, 80),
        ([(100, 9.0), (200, 9.0)] * 8, 9.0, 5000),
        ([(100, 9.0), (200, 8.0)] * 8, 8.5, 5000),
        ([(100, 9.0), (200, 20.0)] * 8, 0.0, 32),
        ([(100, 19.0), (200, 34.0)] * 40 + [(100, 9.0), (200, 14.0)] * 400, 4.0, 80),
    ],
    ids=["one size", "too few", "two sizes", "remembered", "flat", "falling", "no fixed cost", "another load"],
)
def test_the_fixed_cost_is_learnt(runs: list[tuple[int, float]], fixed_ms: float, fixed_tokens: float) -> None:
    run_time = RunTime(5000)
    for tokens, ms in runs:
        run_time.learn(tokens, round(ms * MS))
    assert run_time.fixed_ns / MS == pytest.approx(fixed_ms, abs=0.01)
    assert run_time.fixed_tokens == pytest.approx(fixed_tokens, rel=0.01)


def test_a_run_time_and_a_company_tell_their_state() -> None:
    run_time = RunTime(5000)
    for tokens, ms in [(100, 9), (200, 14)] * 8:
        run_time.learn(tokens, ms * MS)
    assert repr(run_time) == "<RunTime 4.000 ms + 50.000 µs a token>"
    company = Company(8 * MS)
    company.answered(3, 1, 0)
    company.arrived(0)
    assert repr(company) == "<Company of 4, 1 came since, one in 8.000 ms>"


def followed(pace_ms: float, answered: int, waiting: int) -> Company:
    """After 200 batches of 8 whose clients came back at that pace, the last answer, at 0, was for others."""
    company = Company(10 * MS)
    for start_ms in range(-200_000, 0, 1000):
        company.answered(8, 0, start_ms * MS)
        for index in range(8):
            company.arrived(round((start_ms + (index + 1) * pace_ms) * MS))
    company.answered(answered, waiting, 0)
    return company


@pytest.mark.parametrize(
    ("pace_ms", "answered", "present", "waiting", "fixed_ms", "until_ms"),
    [
        (0.1, 1, 0, 1, 8, 0),
        (0.1, 8, 0, 1, 8, 1.6),
        (0.1, 8, 0, 7, 8, 1.6),
        (0.1, 8, 0, 8, 8, 0),
        (0.1, 8, 8, 8, 8, 1.6),
        (0.1, 8, 8, 16, 8, 0),
        (0.1, 80, 0, 79, 8, 10),
        (0.1, 99, 0, 80, 8, 0),
        (1.0, 8, 0, 7, 8, 10),
        (1.0, 8, 0, 7, 7, 0),
        (0.1, 8, 0, 1, 0, 0),
    ],
    ids=[
        "a lone client",
        "the first of eight",
        "all but one",
        "all",
        "half of sixteen",
        "all of sixteen",
        "no longer than allowed",
        "more would not pay",
        "slow, just worth it",
        "too slow",
        "batches cost nothing",
    ],
)
def test_when_company_is_waited_for(
    pace_ms: float, answered: int, present: int, waiting: int, fixed_ms: float, until_ms: float
) -> None:
    until_ns = followed(pace_ms, answered, present).until_ns(waiting, fixed_ms * MS)
    assert until_ns / MS == pytest.approx(until_ms, rel=0.02)


def test_clients_that_stay_away_are_soon_waited_for_no_more() -> None:
    company = followed(0.1, 8, 0)
    for at_ms in range(1000, 5000, 1000):
        company.arrived(at_ms * MS)
        company.answered(1, 1, at_ms * MS)
    assert company.until_ns(1, 4 * MS) == 0


class Batching(RuleBasedStateMachine):
    """Whatever the order of events, the promises hold."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = BatchSettings(max_items=5, max_tokens=100, max_wait_s=0.01)
        self.batcher: Batcher[int] = Batcher(self.settings)
        self.now_ns = self.answered_ns = self.offered = 0
        self.waiting: list[Entry[int]] = []
        self.running: list[Entry[int]] = []
        self.answered: list[int] = []
        self.cancelled: list[int] = []

    @rule(lengths=st.lists(st.integers(1, 130), min_size=1, max_size=8))
    def offer(self, lengths: list[int]) -> None:
        for tokens in lengths:
            self.waiting.append(self.batcher.offer(self.offered, tokens, self.now_ns))
            self.offered += 1

    @rule(by_ns=st.sampled_from([1, MS // 10, MS, 7 * MS, 50 * MS]))
    def advance(self, by_ns: int) -> None:
        self.now_ns += by_ns

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting + self.running))
        self.batcher.cancel(entry)
        if entry in self.waiting:
            self.waiting.remove(entry)
            self.cancelled.append(entry.payload)

    @precondition(lambda self: not self.running)
    @rule()
    def take(self) -> None:
        due_ns = self.batcher.due_ns
        batch = self.batcher.take(self.now_ns)
        assert bool(batch) == (due_ns is not None and due_ns <= self.now_ns)
        if batch:
            self.check(batch)
            self.waiting = [it for it in self.waiting if it not in batch]
            self.running = batch

    def check(self, batch: list[Entry[int]]) -> None:
        assert self.waiting[0] in batch
        assert all(it in self.waiting for it in batch)
        assert lengths_of(batch) == sorted(lengths_of(batch))
        assert len(batch) <= self.settings.max_items
        assert len(batch) == 1 or len(batch) * batch[-1].tokens <= self.settings.max_tokens

    @precondition(lambda self: self.running)
    @rule(in_one_run=st.booleans())
    def finish(self, in_one_run: bool) -> None:
        self.answered += [it.payload for it in self.running]
        self.running = []
        self.answered_ns = self.now_ns
        self.batcher.finished(self.now_ns, in_one_run=in_one_run)

    @invariant()
    def nobody_is_held_back_for_longer_than_allowed(self) -> None:
        due_ns = self.batcher.due_ns
        assert (due_ns is None) == (not self.waiting)
        if due_ns is not None:
            assert due_ns <= max(self.waiting[0].ready_ns, self.answered_ns + 10 * MS)

    @invariant()
    def figures_agree(self) -> None:
        figures = self.batcher.figures(self.now_ns)
        assert (figures.queued, figures.running) == (len(self.waiting), len(self.running))
        assert (figures.cancelled, figures.items) == (len(self.cancelled), len(self.answered) + len(self.running))
        assert 0 <= figures.padding_share < 1

    def teardown(self) -> None:
        """All that still wait get their turn, and each item was answered or cancelled once."""
        if self.running:
            self.finish(in_one_run=True)
        while self.waiting:
            self.now_ns = max(self.now_ns, self.batcher.due_ns or 0)
            self.take()
            self.finish(in_one_run=True)
        assert sorted(self.answered + self.cancelled) == list(range(self.offered))


Batching.TestCase.settings = how(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestBatching = Batching.TestCase


class ClosedLoop:
    """Clients that ask again as soon as they are answered, through a loop that needs ``ask_ms`` for each of them."""

    def __init__(self, clients: int, ask_ms: float, run_ms: Callable[[int], float], lengths: Sequence[int]) -> None:
        self.batcher: Batcher[None] = Batcher(BatchSettings())
        self.run_ms, self.ask_ns = run_ms, round(ask_ms * MS)
        self.lengths = cycle(lengths)
        self.events: list[tuple[int, int, list[Entry[None]] | None]] = []
        self.order = count()
        self.now_ns = self.loop_free_ns = self.idle_ns = self.free_since_ns = 0
        self.busy = False
        self.ask(clients)

    def ask(self, clients: int) -> None:
        for _ in range(clients):
            self.loop_free_ns = max(self.loop_free_ns, self.now_ns) + self.ask_ns
            heapq.heappush(self.events, (self.loop_free_ns, next(self.order), []))

    def run(self, batches: int) -> BatchFigures:
        while self.batcher.figures(self.now_ns).batches < batches:
            self.now_ns, _, answered = heapq.heappop(self.events)
            if answered:
                self.busy, self.free_since_ns = False, self.now_ns
                self.batcher.finished(self.now_ns)
                self.ask(len(answered))
            elif answered is not None:
                self.batcher.offer(None, next(self.lengths), self.now_ns)
            if not self.busy:
                self.take()
        return self.batcher.figures(self.now_ns)

    def take(self) -> None:
        if batch := self.batcher.take(self.now_ns):
            self.busy = True
            self.idle_ns += self.now_ns - self.free_since_ns
            run_ns = round(self.run_ms(len(batch) * batch[-1].tokens) * MS)
            heapq.heappush(self.events, (self.now_ns + run_ns, next(self.order), batch))
        elif due_ns := self.batcher.due_ns:
            heapq.heappush(self.events, (max(due_ns, self.now_ns), next(self.order), None))

    @property
    def idle_share(self) -> float:
        return self.idle_ns / self.now_ns


LENGTHS = [12, 30, 9, 22, 41, 17, 26, 13, 35, 20, 8, 28]


def test_where_batches_cost_the_same_whatever_is_in_them_all_clients_share_one() -> None:
    loop = ClosedLoop(64, ask_ms=0.05, run_ms=lambda tokens: 20 + 0.001 * tokens, lengths=LENGTHS)
    figures = loop.run(300)
    assert figures.mean_items_per_batch > 60
    assert figures.fixed_batch_s == pytest.approx(0.02, rel=0.1)


def test_where_tokens_cost_the_engine_never_stands_idle_and_padding_stays_small() -> None:
    loop = ClosedLoop(64, ask_ms=0.3, run_ms=lambda tokens: 4 + 0.1 * tokens, lengths=LENGTHS)
    figures = loop.run(300)
    assert loop.idle_share < 0.01
    assert figures.padding_share < 0.2
    assert figures.fixed_batch_s == pytest.approx(0.004, rel=0.1)


def test_a_lone_client_never_waits() -> None:
    loop = ClosedLoop(1, ask_ms=0.3, run_ms=lambda tokens: 20 + 0.001 * tokens, lengths=LENGTHS)
    figures = loop.run(100)
    assert figures.mean_items_per_batch == 1
    assert loop.idle_ns == 100 * loop.ask_ns
