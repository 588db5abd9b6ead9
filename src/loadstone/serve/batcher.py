"""Which waiting items make the next batch, and when: token-budget batches that count padding, as a state machine.

Theory of operation
    Items are offered once they are prepared, and wait. Whoever runs the engine calls ``take`` the moment it is free,
    and ``finished`` when the batch is answered; one batch runs at a time. So the next batch is always at hand,
    prepared, and still takes in what arrives until the very moment it starts. Cancelled items are left out then.
    Nothing happens between calls; ``due_ns`` says from when on ``take`` would give a batch.

What a batch costs
    All rows are padded to the longest: ``longest x count`` padded tokens, at most ``max_tokens``; an item that is
    longer than that goes alone. For an engine that pads nothing it is the sum of the tokens. Besides, a batch has a
    fixed cost, whatever is in it, which is learnt from the batches run (``RunTime``). Both decide below; until the
    fixed cost is known, batches are filled and nothing waits for company.

What goes
    The item that has waited longest, always; so one that has k others before it goes within k + 1 batches. With it all
    the others, if they fit and their padding costs less than another batch would; else the neighbours in length that
    make the most real tokens for the cost of the batch. Where nothing is padded, as many as fit, in their order.

When
    At once, unless more are likely to come so soon that fewer, fuller batches get more done (``Company``): then when
    the expected ones are there, when it is full, when they stay away, or after ``max_wait_s`` with the engine free. A
    lone client never waits. Nor does anyone while the engine is slow beside its fixed cost, as on CPUs: it goes on
    computing while the clients of the last batch come back.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Generic, TypeVar

import msgspec

from loadstone.serve.batch_model import Company, RunTime

T = TypeVar("T")

_NS = 1_000_000_000
_LOOK_AHEAD = 8
"""So many full batches of waiting items are looked through for neighbours: all that take more would cost too much."""


@dataclass(frozen=True)
class BatchSettings:
    """Bounds of a batch, of the time that an item is held back for company, and of the threads that prepare items."""

    max_items: int = 256
    max_tokens: int = 16384
    """Padded tokens of a batch: its longest item times their number."""
    pads: bool = True
    """The engine does."""
    max_wait_s: float = 0.01
    prepare_threads: int = 2


class BatchFigures(msgspec.Struct, frozen=True):
    """What a batcher does now, and did since it was made."""

    queued: int
    running: int
    running_s: float
    """For how long the batch that runs now has."""
    batches: int
    items: int
    cancelled: int
    """Items that were cancelled before they were in a batch."""
    mean_items_per_batch: float
    padding_share: float
    """Of all tokens computed, those that were padding."""
    fixed_batch_s: float
    """What a batch costs whatever is in it; 0.0 until it is known."""


class Entry(Generic[T]):
    """An item that was offered; ``cancelled`` may become true at any time, in a batch too."""

    __slots__ = ("cancelled", "payload", "ready_ns", "taken", "tokens")

    def __init__(self, payload: T, tokens: int, ready_ns: int) -> None:
        self.payload = payload
        self.tokens = tokens
        self.ready_ns = ready_ns
        self.taken = False
        self.cancelled = False

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled else "taken" if self.taken else "waiting"
        return f"<Entry of {self.tokens} tokens, {state}>"


class Batcher(Generic[T]):
    """The state machine. All times are monotonic nanoseconds."""

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._run_time = RunTime(settings.max_tokens)
        self._company = Company(round(settings.max_wait_s * _NS))
        self._waiting: deque[Entry[T]] = deque()
        """By age, with the cancelled ones; the first is never one of them."""
        self._queued = self._queued_tokens = 0
        self._running = self._running_tokens = self._started_ns = 0
        self._batches = self._items = self._cancelled = self._real_tokens = self._padded_tokens = 0

    def offer(self, payload: T, tokens: int, now_ns: int) -> Entry[T]:
        """A prepared item of ``tokens`` (≥ 1) waits from now on."""
        entry = Entry(payload, tokens, now_ns)
        self._waiting.append(entry)
        self._queued += 1
        self._queued_tokens += tokens
        self._company.arrived(now_ns)
        return entry

    def cancel(self, entry: Entry[T]) -> None:
        """Nobody waits for its result any more. One that is in a batch stays in it."""
        if entry.taken or entry.cancelled:
            entry.cancelled = True
            return
        entry.cancelled = True
        self._cancelled += 1
        self._queued -= 1
        self._queued_tokens -= entry.tokens
        while self._waiting and self._waiting[0].cancelled:
            self._waiting.popleft()

    @property
    def due_ns(self) -> int | None:
        """From when on ``take`` gives a batch, if nothing else happens; None where nothing waits."""
        if not self._queued:
            return None
        ready_ns, settings = self._waiting[0].ready_ns, self._settings
        if self._queued >= settings.max_items or self._queued_tokens >= settings.max_tokens:
            return ready_ns
        return max(ready_ns, self._company.until_ns(self._queued, self._run_time.fixed_ns))

    def take(self, now_ns: int) -> list[Entry[T]]:
        """The next batch, shortest first, to be run at once; empty where nothing is due."""
        due_ns = self.due_ns
        if due_ns is None or now_ns < due_ns:
            return []
        batch = self._choose()
        for entry in batch:
            entry.taken = True
        self._waiting = deque(it for it in self._waiting if not (it.taken or it.cancelled))
        real_tokens = sum(it.tokens for it in batch)
        self._queued -= len(batch)
        self._queued_tokens -= real_tokens
        self._started_ns = now_ns
        self._running = len(batch)
        self._running_tokens = len(batch) * batch[-1].tokens if self._settings.pads else real_tokens
        self._batches += 1
        self._items += len(batch)
        self._real_tokens += real_tokens
        self._padded_tokens += self._running_tokens
        return batch

    def finished(self, now_ns: int, *, in_one_run: bool = True) -> None:
        """The batch that was taken last is answered; not ``in_one_run``: it failed, and its time tells nothing."""
        if in_one_run:
            self._run_time.learn(self._running_tokens, now_ns - self._started_ns)
        self._company.answered(self._running, self._queued, now_ns)
        self._running = self._running_tokens = 0

    def figures(self, now_ns: int) -> BatchFigures:
        return BatchFigures(
            queued=self._queued,
            running=self._running,
            running_s=(now_ns - self._started_ns) / _NS if self._running else 0.0,
            batches=self._batches,
            items=self._items,
            cancelled=self._cancelled,
            mean_items_per_batch=self._items / max(1, self._batches),
            padding_share=1 - self._real_tokens / self._padded_tokens if self._padded_tokens else 0.0,
            fixed_batch_s=self._run_time.fixed_ns / _NS,
        )

    def _choose(self) -> list[Entry[T]]:
        settings = self._settings
        oldest = self._waiting[0]
        alive = (it for it in self._waiting if not it.cancelled)
        if not settings.pads:
            return sorted(_prefix(alive, settings), key=_tokens_of)
        pool = sorted(islice(alive, _LOOK_AHEAD * settings.max_items), key=_tokens_of)
        if len(pool) == self._queued and self._fit_well(len(pool), pool[-1].tokens):
            return pool
        lengths = [it.tokens for it in pool]
        # The sort is stable: the oldest is the first of its length.
        start, end = best_run(lengths, bisect_left(lengths, oldest.tokens), settings, self._run_time.fixed_tokens)
        return pool[start:end]

    def _fit_well(self, count: int, longest: int) -> bool:
        """All that wait make one batch, and any two batches in its place would cost more."""
        padded = count * longest
        if count > self._settings.max_items or padded > self._settings.max_tokens:
            return False
        return padded - self._queued_tokens <= self._run_time.fixed_tokens

    def __repr__(self) -> str:
        return f"<Batcher: {self._queued} waiting, {self._running} running, {self._batches} batches>"


def _tokens_of(entry: Entry[T]) -> int:
    return entry.tokens


def _prefix(entries: Iterable[Entry[T]], settings: BatchSettings) -> list[Entry[T]]:
    """The first one, and as many of those behind it as fit."""
    batch: list[Entry[T]] = []
    tokens = 0
    for entry in islice(entries, settings.max_items):
        tokens += entry.tokens
        if batch and tokens > settings.max_tokens:
            break
        batch.append(entry)
    return batch


def best_run(lengths: Sequence[int], always: int, settings: BatchSettings, fixed_tokens: float) -> tuple[int, int]:
    """(start, end) of those consecutive ``lengths`` (ascending), the one at ``always`` among them, that have the most
    real tokens for each token that their batch costs, padding and the fixed cost counted."""
    before = [0, *accumulate(lengths)]
    best, best_yield = (always, always + 1), 0.0
    for last in range(always, len(lengths)):
        longest = lengths[last]
        room = max(1, min(settings.max_items, settings.max_tokens // longest))
        if last >= always + room:
            break
        if last + 1 < min(always + room, len(lengths)) and lengths[last + 1] == longest:
            continue  # one more of this length adds no padding
        start = _best_start(lengths, before, max(0, last + 1 - room), always, last, fixed_tokens)
        cost = fixed_tokens + longest * (last + 1 - start)
        real_share = (before[last + 1] - before[start]) / cost
        if real_share > best_yield:
            best, best_yield = (start, last + 1), real_share
    return best


def _best_start(
    lengths: Sequence[int], before: Sequence[int], least: int, most: int, last: int, fixed_tokens: float
) -> int:
    """From where on, ``least`` to ``most``, the items up to ``last`` have the best yield; ``before``: sums of lengths.
    By bisection: once a shorter item doesn't raise the yield, one that is shorter still doesn't either."""
    longest, end = lengths[last], before[last + 1]

    def pays(start: int) -> bool:
        cost_without = fixed_tokens + longest * (last - start)
        return lengths[start] * cost_without > longest * (end - before[start + 1])

    return bisect_left(range(most), True, lo=least, key=pays)
