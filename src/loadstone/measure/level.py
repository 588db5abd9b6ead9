"""One level while it runs: which requests are judged, when the window opens, when it closes, when it is over.

Theory of operation::

    WARMING ──every slot has finished a request, 2R̂ have passed──▶ JUDGING ──plan sent, 5R̄ and 2 s──▶ FOLLOWING ──▶ OVER
                                                                      ▲                                   │
                                                                      └──────────── extend ◀──────────────┘

Requests sent while JUDGING are the judged ones; while FOLLOWING they are awaited, and fillers keep N in flight. An
extension makes the fillers sent meanwhile judged too: the window simply goes on. Pure: ``now_ns`` is an argument.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from loadstone.core.target import Break, Exchange
from loadstone.core.verdict import LevelKind
from loadstone.measure.early import Latency, View
from loadstone.measure.rules import Stance

WARMUP_TIMES = 2
WINDOW_MIN_NS = 2_000_000_000
HUNG_TIMES = 10
HUNG_MIN_NS = 10_000_000_000


@dataclass(frozen=True)
class LevelPlan:
    """What the search asks for."""

    ordinal: int
    kind: LevelKind
    concurrency: int
    requests: int
    """To be judged, at first."""
    stance: Stance
    may_stop_early: bool = True
    window_times: int = 5
    """Least length of the window in mean request times; less where the level only adds to an earlier one."""
    most_requests: int = 0
    """To be judged where throughput scatters; 0: ``requests`` will do."""


class Phase(enum.Enum):
    WARMING = "warming"
    JUDGING = "judging"
    FOLLOWING = "following"
    OVER = "over"


class LevelState:
    """The requests of a level and where its window stands."""

    def __init__(self, plan: LevelPlan, t0_ns: int, expected_ns: int, max_ns: int | None) -> None:
        self.plan = plan
        self.phase = Phase.WARMING
        self.t0_ns = t0_ns
        self.w0_ns = 0
        self.w1_ns = 0
        self.expected_ns = expected_ns
        """R̂: what a request is expected to take at this concurrency."""
        self.stopped_ns = 0
        """When the level was stopped before its plan; 0 where it was not."""
        self.hung_at_ns = 0
        self.planned = plan.requests
        self.exchanges: list[Exchange] = []
        """Everything sent since t0, in send order."""
        self.ran_out = False
        """``--max-level-seconds`` ended the level."""
        self._max_ns = max_ns
        self._first_judged = 0
        self._judged_count = 0
        self._waiting: set[Exchange] = set()
        self._slots_done: set[int] = set()
        self._finished = 0
        self._finished_ns = 0
        self._longest_ns = 0

    def __repr__(self) -> str:
        where = f"{self.plan.ordinal} at {self.plan.concurrency}"
        return f"<Level {where}: {self.phase.value}, {self.sent} of {self.planned} sent>"

    @property
    def sent(self) -> int:
        """Judged requests sent so far."""
        if self.phase is Phase.WARMING:
            return 0
        return self._judged_count if self.w1_ns else len(self.exchanges) - self._first_judged

    @property
    def judged(self) -> list[Exchange]:
        """Judged requests in send order, finished or not."""
        return self.exchanges[self._first_judged : self._first_judged + self.sent]

    @property
    def mean_ns(self) -> int:
        """Mean end-to-end time of the successes so far (R̄); the expected one before there is any."""
        return self._finished_ns // self._finished if self._finished else self.expected_ns

    def expected_window_ns(self, now_ns: int) -> int:
        """How long the window will have been when it closes, as things go."""
        for_the_plan_ns = (now_ns - self.w0_ns) * self.planned // max(1, self.sent)
        return max(for_the_plan_ns, self.plan.window_times * self.mean_ns, WINDOW_MIN_NS)

    def on_send(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)

    def on_done(self, exchange: Exchange, now_ns: int) -> None:
        """``exchange`` has ended; it may be one that an earlier level sent."""
        if exchange.slot < self.plan.concurrency:
            self._slots_done.add(exchange.slot)
        self._waiting.discard(exchange)
        if exchange.broken is None and exchange.status < 400 and exchange.sent_ns >= self.t0_ns:
            took_ns = exchange.end_ns - exchange.sent_ns
            self._finished += 1
            self._finished_ns += took_ns
            self._longest_ns = max(self._longest_ns, took_ns)
        self.tick(now_ns)

    def tick(self, now_ns: int) -> None:
        """Move on where the time has come."""
        if self.phase is Phase.WARMING:
            self._maybe_open(now_ns)
        elif self.phase is Phase.JUDGING:
            self._maybe_close(now_ns)
        elif self.phase is Phase.FOLLOWING and (not self._waiting or self._hung(now_ns)):
            self.phase = Phase.OVER

    def extend(self, requests: int, now_ns: int) -> None:
        """Judge ``requests`` more; what was sent since the window closed counts."""
        self.planned = self.sent + requests
        self.phase = Phase.JUDGING
        self.w1_ns = 0
        self.tick(now_ns)

    def _maybe_open(self, now_ns: int) -> None:
        age_ns = now_ns - self.t0_ns
        if self._out_of_time(now_ns):
            self.w0_ns = self.w1_ns = now_ns
            self._first_judged = len(self.exchanges)
            self.ran_out = True
            self.phase = Phase.OVER
            return
        every_slot = len(self._slots_done) == self.plan.concurrency
        # A slot that hangs must not keep the window shut for the length of a time-out.
        hung = age_ns >= max(HUNG_TIMES * self.mean_ns, HUNG_MIN_NS)
        if (every_slot and age_ns >= WARMUP_TIMES * self.expected_ns) or hung:
            self.w0_ns = now_ns
            self._first_judged = self._first_sent_at(now_ns)
            self.phase = Phase.JUDGING

    def _first_sent_at(self, now_ns: int) -> int:
        first = len(self.exchanges)
        while first and self.exchanges[first - 1].sent_ns >= now_ns:
            first -= 1
        return first

    def _maybe_close(self, now_ns: int) -> None:
        length_ns = now_ns - self.w0_ns
        long_enough = length_ns >= max(self.plan.window_times * self.mean_ns, WINDOW_MIN_NS)
        if self._out_of_time(now_ns):
            self.ran_out = True
        elif self.sent < self.planned or not long_enough:
            return
        self._judged_count = self.sent
        # What is sent at this very moment has been counted.
        self.w1_ns = now_ns + 1
        self._waiting = {exchange for exchange in self.judged if not exchange.done}
        self.phase = Phase.FOLLOWING
        self.tick(now_ns)

    def _out_of_time(self, now_ns: int) -> bool:
        return self._max_ns is not None and now_ns - self.t0_ns >= self._max_ns

    def overdue(self, now_ns: int) -> bool:
        """The judged requests still do not end long after the level's time was up."""
        return self._max_ns is not None and now_ns - self.t0_ns >= 2 * self._max_ns

    def hung(self, now_ns: int) -> frozenset[Exchange]:
        """Requests in flight that are far older than anything that ever came back."""
        self.hung_at_ns = now_ns
        until = self._first_judged + self.sent
        return frozenset(e for e in self.exchanges[:until] if not e.done and now_ns - e.planned_ns > self._hung_ns())

    def _hung(self, now_ns: int) -> bool:
        return all(now_ns - exchange.planned_ns > self._hung_ns() for exchange in self._waiting)

    def _hung_ns(self) -> int:
        least_ns = HUNG_MIN_NS if self._max_ns is None else min(HUNG_MIN_NS, self._max_ns)
        return max(HUNG_TIMES * self.mean_ns, 3 * self._longest_ns, least_ns)


class LiveView:
    """The judged requests of a running level as ``early.certain_failure`` wants them; each is read once."""

    def __init__(self, state: LevelState, first_content_ns: Callable[[Exchange], int | None], streams: bool) -> None:
        self._state = state
        self._first_content_ns = first_content_ns
        self._streams = streams
        self._ttft_ms: dict[Exchange, float] = {}

    def view(self, now_ns: int) -> View:
        """What is known now."""
        ttft: list[Latency] = []
        e2el: list[Latency] = []
        failures = 0
        for exchange in self._state.judged:
            if exchange.done and (exchange.broken is not None or exchange.status >= 400):
                failures += exchange.broken not in (Break.CUT, Break.CLIENT)
                continue
            end_ns = exchange.end_ns or now_ns
            e2el.append(Latency((end_ns - (exchange.sent_ns or exchange.planned_ns)) / 1e6, exchange.done))
            if self._streams and (sample := self._ttft(exchange, now_ns)) is not None:
                ttft.append(sample)
        plan = self._state.plan
        return View(plan.concurrency, self._state.planned, failures, {"ttft": ttft, "e2el": e2el})

    def mean_ttft_ms(self) -> float | None:
        """Mean over what has been seen, for the display."""
        return sum(self._ttft_ms.values()) / len(self._ttft_ms) if self._ttft_ms else None

    def _ttft(self, exchange: Exchange, now_ns: int) -> Latency | None:
        known = self._ttft_ms.get(exchange)
        if known is not None:
            return Latency(known, True)
        sent_ns = exchange.sent_ns or exchange.planned_ns
        content_ns = self._first_content_ns(exchange)
        if content_ns is not None:
            self._ttft_ms[exchange] = (content_ns - sent_ns) / 1e6
            return Latency(self._ttft_ms[exchange], True)
        return None if exchange.done else Latency((now_ns - sent_ns) / 1e6, False)
