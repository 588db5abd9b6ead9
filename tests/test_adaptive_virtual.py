"""The adaptive limit before a simulated engine, in virtual time: admission, tokens, ``/metrics`` and all."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean, median

import pytest

from loadstone.core.admission import Admission, AdmissionSettings, State, Ticket, Want
from loadstone.core.limits import EvidenceLevel
from loadstone.hold.adapter import TICK_NS, Adapter
from loadstone.hold.engine_watch import EngineWatch
from loadstone.hold.signals import Pace, Signals
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.driver import Driver
from loadstone.sim.metrics import metrics_text
from loadstone.sim.profiles import Profile
from loadstone.sim.service import Fate, Service

NS = 1_000_000_000
UPSTREAM = "engine"
PROMPT, OUTPUT = 256, 64


@dataclass
class Served:
    """One admitted request."""

    granted_ns: int
    first_ns: int = 0
    last_ns: int = 0
    tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return (self.first_ns - self.granted_ns) / 1e9

    @property
    def e2el_s(self) -> float:
        return (self.last_ns - self.granted_ns) / 1e9

    @property
    def itl_s(self) -> float:
        return (self.last_ns - self.first_ns) / 1e9 / max(1, self.tokens - 1)


class Scene:
    """Open-loop Poisson load on an admission with one upstream, a simulated engine; adaptive where it has a curve."""

    def __init__(
        self, clock: VirtualClock, profile: Profile, limit: int, curve: Sequence[EvidenceLevel] | None, seed: int = 1
    ) -> None:
        self.clock = clock
        self.service = Service(profile, seed)
        self.served: list[Served] = []
        self.gaps_s: list[float] = []
        self.limits: list[tuple[float, int]] = []
        """(seconds, limit) at each tick."""
        self.lines: list[str] = []
        self._driver = Driver(self.service, clock)
        self._admission = Admission(AdmissionSettings(max_queue=20, queue_timeout_ns=5 * NS))
        self._admission.set_upstream(UPSTREAM, limit, 1.0, None, 0)
        self._pace = Pace()
        self._random = Random(seed)
        self._replies = self._busy = 0
        self._engine = EngineWatch(self._metrics, clock)
        self._adapter = Adapter(self._set_limit, self.lines.append)
        if curve is not None:
            self._adapter.follow(UPSTREAM, limit, curve, self._sense, 0)

    async def run(self, *phases: tuple[float, float]) -> None:
        """``phases``: (requests a second, seconds)."""
        watching = asyncio.ensure_future(self._engine.watch())
        self._tick()
        for rate_rps, seconds in phases:
            until_ns = self.clock.now_ns() + round(seconds * NS)
            while rate_rps and (pause_s := self._random.expovariate(rate_rps)) * NS < until_ns - self.clock.now_ns():
                await asyncio.sleep(pause_s)
                self._offer()
            await asyncio.sleep((until_ns - self.clock.now_ns()) / NS)
        watching.cancel()

    async def _metrics(self) -> tuple[int, bytes]:
        return 200, metrics_text(self.service).encode()

    def _tick(self) -> None:
        now_ns = self.clock.now_ns()
        self._adapter.tick(now_ns)
        limit = self._admission.limit_at(UPSTREAM)
        assert limit is not None
        self.limits.append((now_ns / NS, limit))
        self._go(self._admission.tick(now_ns))
        self.clock.call_at(now_ns + TICK_NS, self._tick)

    def _sense(self) -> Signals:
        admission = self._admission
        in_flight, queued = admission.in_flight_at(UPSTREAM), admission.queued
        return Signals(in_flight, queued, *self._pace.take(), self._replies, self._busy, self._engine.latest)

    def _set_limit(self, name: str, limit: int, now_ns: int) -> None:
        self._go(self._admission.set_limit(name, limit, now_ns))

    def _offer(self) -> None:
        now_ns = self.clock.now_ns()
        ticket = self._admission.offer(Want("client", 1 << 62), now_ns)
        if ticket.state is State.GRANTED:
            self._send(ticket)

    def _go(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if ticket.state is State.GRANTED:
                self._send(ticket)

    def _send(self, ticket: Ticket) -> None:
        one = Served(self.clock.now_ns())

        def on_tokens(tokens: int, finished: bool) -> None:
            now_ns = self.clock.now_ns()
            if one.last_ns:
                self._pace.add(now_ns - one.last_ns, tokens - one.tokens)
                self.gaps_s.append((now_ns - one.last_ns) / NS)
            else:
                one.first_ns = now_ns
            one.last_ns, one.tokens = now_ns, tokens
            if finished:
                self._replies += 1
                self.served.append(one)
                self._go(self._admission.release(ticket, now_ns))

        fate, _job = self._driver.arrive(PROMPT, OUTPUT, on_tokens)
        if fate is not Fate.SERVED:
            self._busy += 1
            self._go(self._admission.release(ticket, self.clock.now_ns()))

    # What was seen

    def limits_within(self, from_s: float, until_s: float) -> list[int]:
        return [limit for at_s, limit in self.limits if from_s <= at_s < until_s]

    def within(self, from_s: float, until_s: float) -> list[Served]:
        """Those admitted then."""
        return [one for one in self.served if from_s <= one.granted_ns / NS < until_s]


def mean_itl_s(served: Sequence[Served]) -> float:
    return fmean(one.itl_s for one in served)


def mean_ttft_s(served: Sequence[Served]) -> float:
    return fmean(one.ttft_s for one in served)


def measured(profile: Profile, concurrencies: Sequence[int]) -> list[EvidenceLevel]:
    """The curve, as ``find`` would have written it for the profile at its first pace."""
    return [_level(replace(profile, pace=profile.pace[:1]), concurrency) for concurrency in concurrencies]


def _level(profile: Profile, concurrency: int) -> EvidenceLevel:
    async def main(clock: VirtualClock) -> Scene:
        scene = Scene(clock, profile, concurrency, None)
        life_s = OUTPUT * profile.step_s(concurrency, 0, 0)
        # The places fill over a request's life: filled at once they would stay in step, and prompts come in bursts.
        await scene.run((concurrency / life_s, life_s), (3 * concurrency / life_s, 30 - life_s))
        return scene

    scene = run_virtual(main)
    steady = scene.within(8, 24)
    return EvidenceLevel(
        concurrency=concurrency,
        throughput_rps=len(steady) / 16,
        ttft_p50_ms=median(one.ttft_s for one in steady) * 1e3,
        itl_p50_ms=median(scene.gaps_s) * 1e3,
        e2el_mean_ms=fmean(one.e2el_s for one in steady) * 1e3,
    )


STEEP = Profile("steep", base_s=0.004, per_decode_seq_s=0.0015, per_prefill_token_s=0.00002)
"""Most of a step's time is its sequences': fewer of them make it faster, as at a real engine near its line."""
CEILING = 24
HEAVY_RPS = 20.0
"""Twice what it serves at the ceiling."""
HALF_SPEED = ((0.0, 1.0), (60.0, 2.0), (180.0, 1.0))
"""Twice as long steps from 60 s to 180 s."""


@pytest.fixture(scope="module")
def curve() -> list[EvidenceLevel]:
    return measured(STEEP, (1, 2, 5, 10, 20, CEILING))


def play(
    profile: Profile, limit: int, curve: Sequence[EvidenceLevel], *phases: tuple[float, float], seed: int = 1
) -> Scene:
    async def main(clock: VirtualClock) -> Scene:
        scene = Scene(clock, profile, limit, curve, seed)
        await scene.run(*phases)
        return scene

    return run_virtual(main)


def test_an_engine_at_half_speed_is_followed_within_a_minute_and_so_is_its_recovery(
    curve: list[EvidenceLevel],
) -> None:
    scene = play(replace(STEEP, pace=HALF_SPEED), CEILING, curve, (HEAVY_RPS, 260))
    assert set(scene.limits_within(1, 60)) == {CEILING}
    assert set(scene.limits_within(90, 180)) <= {11, 12, 13}
    assert set(scene.limits_within(240, 260)) == {CEILING}
    before, followed, after = scene.within(10, 50), scene.within(120, 170), scene.within(220, 250)
    assert mean_itl_s(followed) < 1.25 * mean_itl_s(before)
    assert mean_itl_s(after) < 1.05 * mean_itl_s(before)
    assert mean_ttft_s(followed) < 1.25 * mean_ttft_s(before)
    assert mean_ttft_s(after) < 1.05 * mean_ttft_s(before)
    assert [line.split(":")[1] for line in scene.lines] == [" limit 24 → 23", " limit 23 → 24"]


def test_without_it_the_same_engine_breaks_its_promise() -> None:
    async def main(clock: VirtualClock) -> Scene:
        scene = Scene(clock, replace(STEEP, pace=HALF_SPEED), CEILING, None)
        await scene.run((HEAVY_RPS, 180))
        return scene

    scene = run_virtual(main)
    before, slowed = scene.within(10, 50), scene.within(120, 170)
    assert mean_itl_s(slowed) > 1.9 * mean_itl_s(before)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_moves_it_by_a_step_or_two(seed: int) -> None:
    noisy = replace(STEEP, step_cv=0.5)
    curve = measured(noisy, (1, 5, 10, CEILING))
    scene = play(replace(noisy, pace=HALF_SPEED), CEILING, curve, (HEAVY_RPS, 260), seed=seed)
    assert min(scene.limits_within(0, 60)) >= CEILING - 2
    settled = scene.limits_within(110, 180)
    assert 0.4 * CEILING <= min(settled) <= max(settled) <= min(settled) + 3
    assert min(scene.limits_within(240, 260)) >= CEILING - 2


@pytest.mark.parametrize("cv", [0.0, 0.5])
def test_a_healthy_engine_at_its_line_is_left_alone_for_ten_minutes(cv: float) -> None:
    profile = replace(STEEP, step_cv=cv, length_cv=cv)
    scene = play(profile, CEILING, measured(profile, (1, 5, 10, CEILING)), (HEAVY_RPS, 600))
    assert min(scene.limits_within(0, 600)) >= 0.9 * CEILING


def test_prompts_that_are_read_between_the_tokens_are_part_of_the_measured_pace() -> None:
    profile = Profile("prefill", base_s=0.008, per_decode_seq_s=0.000_1, per_prefill_token_s=0.000_1)
    curve = measured(profile, (1, 5, 10, CEILING))
    scene = play(profile, CEILING, curve, (HEAVY_RPS, 120))
    assert fmean(scene.gaps_s) * 1e3 > 1.3 * (curve[-1].itl_p50_ms or 0), "by the median it would look slow"
    assert min(scene.limits_within(0, 120)) == CEILING


def test_an_idle_limit_is_never_raised(curve: list[EvidenceLevel]) -> None:
    profile = replace(STEEP, pace=((0.0, 1.0), (30.0, 2.0), (80.0, 1.0)))
    scene = play(profile, CEILING, curve, (HEAVY_RPS, 80), (0, 120), (1.5, 60), (HEAVY_RPS, 40))
    lowered = scene.limits_within(85, 86)[0]
    assert lowered < 0.7 * CEILING
    assert set(scene.limits_within(85, 260)) == {lowered}, "nothing ran, then far fewer than the limit"
    assert scene.limits[-1][1] == CEILING


@pytest.mark.parametrize(
    ("changes", "most"),
    [({"max_num_seqs": 16}, 20), ({"refuse_beyond": 16}, 18), ({"num_kv_blocks": 300}, 19)],
    ids=["waiting", "busy", "preempting"],
)
def test_by_hand_the_engine_itself_tells_how_much_it_takes(changes: dict[str, int], most: int) -> None:
    scene = play(replace(STEEP, **changes), CEILING, [], (HEAVY_RPS, 120))  # type: ignore[arg-type]
    assert 13 <= min(scene.limits_within(20, 120)) <= max(scene.limits_within(20, 120)) <= most


def test_by_hand_a_healthy_engine_is_left_alone() -> None:
    scene = play(STEEP, CEILING, [], (HEAVY_RPS, 120))
    assert set(scene.limits_within(0, 120)) == {CEILING}
