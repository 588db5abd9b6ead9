"""What N slots see of a profile in the long run: the service in a closed loop, with no client, network or search.

N slots are opened one after the other over about one request's lifetime R. Each is refilled at once after a success
and after a pause of R/4 (10 ms … 1 s) after a refusal, an error or a time-out. Judged are the requests sent in a window
of many lifetimes, each followed to its end while the loop goes on.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from loadstone.sim.profiles import Profile
from loadstone.sim.service import Fate, Service

_WARM_LIVES = 4
_LONGEST_WARM_LIVES = 20
_PAUSE_NS = (10_000_000, 1_000_000_000)
_NEVER_NS = 1 << 62


@dataclass(frozen=True)
class Steady:
    """Long-run figures at one concurrency."""

    success_share: float
    """Successes ÷ requests; where requests hang, slot-time spent in successes ÷ slot-time, if that is less."""
    mean_ttft_s: float
    throughput_rps: float
    median_kv_use: float
    """Weighted by time, 0 … 1."""
    preemptions_per_request: float


@dataclass(slots=True)
class _Call:
    sent_ns: int
    first_ns: int = 0


@dataclass
class _Window:
    """What is seen between two times."""

    from_ns: int
    until_ns: int
    sent: int = 0
    open: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    """One for each success."""
    success_ns: int = 0
    completions: float = 0.0
    """Each success counts by the share of its life inside the window."""
    kv_use: list[tuple[float, int]] = field(default_factory=list)
    """(use, nanoseconds)."""

    def holds(self, now_ns: int) -> bool:
        return self.from_ns <= now_ns < self.until_ns

    def succeed(self, call: _Call, now_ns: int) -> None:
        inside_ns = max(0, min(now_ns, self.until_ns) - max(call.sent_ns, self.from_ns))
        self.success_ns += inside_ns
        self.completions += inside_ns / (now_ns - call.sent_ns)
        if self.holds(call.sent_ns):
            self.ttfts_s.append((call.first_ns - call.sent_ns) / 1e9)


class ClosedLoop:
    """N slots on one service; call ``run`` once."""

    def __init__(
        self, profile: Profile, prompt_tokens: int, output_tokens: int, concurrency: int, request_timeout_s: float
    ) -> None:
        self._service = Service(profile)
        self._lengths = (prompt_tokens, output_tokens)
        self._concurrency = concurrency
        self._timeout_ns = round(request_timeout_s * 1e9)
        batch = min(concurrency, profile.max_num_seqs)
        self._life_ns = profile.step_s(batch, 0, batch * (prompt_tokens + output_tokens // 2)) * output_tokens * 1e9
        """First a guess that ignores prefill and waiting, then the mean of all successes."""
        self._successes = 0
        self._hung = False
        """Whether some request was never answered, or not in time."""
        self._now_ns = 0
        self._jobs = 0
        self._calls: dict[int, _Call] = {}
        self._opens_ns = [round(slot * self._life_ns / concurrency) for slot in range(concurrency)]
        self._timeouts: deque[tuple[int, int]] = deque()
        self._window = _Window(_NEVER_NS, _NEVER_NS)

    def run(self, lives: int, least_requests: int = 0) -> Steady:
        """Warm up, then watch a window of ``lives`` lifetimes and at least so many requests."""
        while self._now_ns < _WARM_LIVES * self._life_ns or self._knows_too_little():
            self._next_event()
        lives = max(lives, -(-least_requests // self._concurrency))
        from_ns = self._now_ns + 1
        window = _Window(from_ns, from_ns + round(lives * self._life_ns))
        self._window = window
        preempted = self._service.engine.preemptions_total
        while self._now_ns < window.until_ns:
            self._next_event()
        preempted = self._service.engine.preemptions_total - preempted
        while window.open:
            self._next_event()
        return self._summarise(window, preempted)

    def _knows_too_little(self) -> bool:
        """The first to end are the short ones: before each slot has ended a few, their mean says too little of a life.

        Where little succeeds there is nothing to wait for.
        """
        wanted = _WARM_LIVES * self._concurrency
        if self._service.profile.quiet or self._successes >= wanted:
            return False
        return self._now_ns < _LONGEST_WARM_LIVES * self._life_ns

    def _summarise(self, window: _Window, preempted: int) -> Steady:
        window_ns = window.until_ns - window.from_ns
        success_share = len(window.ttfts_s) / max(1, window.sent)
        if self._hung:
            success_share = min(success_share, window.success_ns / (self._concurrency * window_ns))
        return Steady(
            success_share=success_share,
            mean_ttft_s=fmean(window.ttfts_s) if window.ttfts_s else math.inf,
            throughput_rps=window.completions / window_ns * 1e9,
            median_kv_use=_weighted_median(window.kv_use),
            preemptions_per_request=preempted / max(1, window.sent),
        )

    def _next_event(self) -> None:
        step_ns = _NEVER_NS if self._service.next_ns is None else self._service.next_ns
        open_ns = self._opens_ns[0] if self._opens_ns else _NEVER_NS
        timeout_ns = self._next_timeout_ns()
        now_ns = min(step_ns, open_ns, timeout_ns)
        if self._window.holds(now_ns):
            self._window.kv_use.append((self._service.engine.kv_cache_usage, now_ns - self._now_ns))
        self._now_ns = now_ns
        if now_ns == step_ns:
            for job, _tokens, finished in self._service.advance():
                self._on_tokens(job, finished)
        elif now_ns == open_ns:
            heapq.heappop(self._opens_ns)
            self._send()
        else:
            self._time_out(self._timeouts.popleft()[1])

    def _next_timeout_ns(self) -> int:
        while self._timeouts and self._timeouts[0][1] not in self._calls:
            self._timeouts.popleft()
        return self._timeouts[0][0] if self._timeouts else _NEVER_NS

    def _send(self) -> None:
        self._jobs += 1
        judged = self._window.holds(self._now_ns)
        self._window.sent += judged
        fate = self._service.arrive(self._jobs, *self._lengths, self._now_ns)
        if fate in (Fate.SERVED, Fate.HUNG):
            self._window.open += judged
            self._hung = self._hung or fate is Fate.HUNG
            self._calls[self._jobs] = _Call(self._now_ns)
            self._timeouts.append((self._now_ns + self._timeout_ns, self._jobs))
        else:
            self._pause()

    def _pause(self) -> None:
        least_ns, most_ns = _PAUSE_NS
        pause_ns = min(max(round(self._life_ns / 4), least_ns), most_ns)
        heapq.heappush(self._opens_ns, self._now_ns + pause_ns)

    def _on_tokens(self, job: int, finished: bool) -> None:
        call = self._calls.get(job)
        if call is None:
            return
        call.first_ns = call.first_ns or self._now_ns
        if not finished:
            return
        self._close(job)
        self._window.succeed(call, self._now_ns)
        self._successes += 1
        weight = 1 / self._successes
        self._life_ns += (self._now_ns - call.sent_ns - self._life_ns) * weight
        self._send()

    def _time_out(self, job: int) -> None:
        self._close(job)
        self._hung = True
        self._service.leave(job)
        self._pause()

    def _close(self, job: int) -> None:
        call = self._calls.pop(job)
        self._window.open -= self._window.holds(call.sent_ns)

    def __repr__(self) -> str:
        return f"<ClosedLoop {self._concurrency} slots at {self._now_ns / 1e9:.3f} s, {self._service!r}>"


def _weighted_median(values: list[tuple[float, int]]) -> float:
    half = sum(weight for _value, weight in values) / 2
    passed = 0
    for value, weight in sorted(values):
        passed += weight
        if passed >= half:
            return value
    return 0.0
