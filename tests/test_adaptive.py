"""The adaptive limit as a pure state machine, and the two small shells around it."""

import asyncio
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.engine_metrics import EngineMetrics
from loadstone.core.limits import EvidenceLevel
from loadstone.hold.adapter import Adapter
from loadstone.hold.adaptive import AdaptiveLimit
from loadstone.hold.engine_watch import ASK_AGAIN_S, READ_EVERY_S, EngineWatch
from loadstone.hold.measured_curve import MeasuredCurve
from loadstone.hold.signals import Pace, Pressure, Reading, Signals, Slowness
from loadstone.sim.clock import VirtualClock, run_virtual

NS = 1_000_000_000
HALF_NS = NS // 2


def level(concurrency: int, **figures: float) -> EvidenceLevel:
    return EvidenceLevel(concurrency=concurrency, **{"throughput_rps": 1.0, **figures})


CURVE = [
    level(10, throughput_rps=10, itl_p50_ms=20, ttft_p50_ms=100, e2el_mean_ms=1100),
    level(20, throughput_rps=15, itl_p50_ms=30, ttft_p50_ms=100, e2el_mean_ms=1600),
]


# -- the measured curve -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concurrency", "gap_ms"), [(1, 20), (10, 20), (math.sqrt(200), math.sqrt(600)), (20, 30), (500, 30)]
)
def test_gaps_are_interpolated_on_logarithms_and_held_beyond_the_ends(concurrency: float, gap_ms: float) -> None:
    assert MeasuredCurve(CURVE).gap_s(concurrency) == pytest.approx(gap_ms / 1e3)


def test_the_order_of_the_levels_does_not_matter() -> None:
    assert MeasuredCurve(CURVE[::-1]).gap_s(20) == MeasuredCurve(CURVE).gap_s(20)


def test_prompts_read_between_the_tokens_show_in_the_mean_gap_though_not_in_the_median() -> None:
    busy = level(20, itl_p50_ms=22, ttft_p50_ms=100, e2el_mean_ms=2100)
    assert MeasuredCurve([CURVE[0], busy]).gap_s(20) == pytest.approx(0.040)


@pytest.mark.parametrize("ttft_ms", [None, math.nan, math.inf, 5000.0])
def test_where_the_time_of_a_reply_is_unknown_the_median_counts(ttft_ms: float | None) -> None:
    odd = EvidenceLevel(concurrency=20, throughput_rps=15, itl_p50_ms=30, ttft_p50_ms=ttft_ms, e2el_mean_ms=1600)
    assert MeasuredCurve([CURVE[0], odd]).gap_s(20) == pytest.approx(0.030)


def test_before_the_first_token_by_littles_law() -> None:
    assert MeasuredCurve(CURVE).before_first_token(10) == pytest.approx(1.0)
    assert MeasuredCurve(CURVE).before_first_token(20) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "levels", [[], [level(10, e2el_mean_ms=50)], [level(10, itl_p50_ms=0), level(20, itl_p50_ms=-1)]]
)
def test_where_nothing_streamed_there_is_nothing_to_compare(levels: list[EvidenceLevel]) -> None:
    curve = MeasuredCurve(levels)
    assert curve.gap_s(10) is None
    assert curve.before_first_token(10) is None


@given(
    st.lists(
        st.builds(
            EvidenceLevel,
            concurrency=st.integers(1, 2000),
            throughput_rps=st.floats(0, 1e4),
            ttft_p50_ms=st.none() | st.floats(allow_nan=True),
            itl_p50_ms=st.none() | st.floats(allow_nan=True),
            e2el_mean_ms=st.none() | st.floats(allow_nan=True),
        ),
        max_size=5,
    ),
    st.integers(1, 3000),
)
def test_no_evidence_whatever_breaks_it(levels: list[EvidenceLevel], concurrency: int) -> None:
    curve = MeasuredCurve(levels)
    for figure in (curve.gap_s(concurrency), curve.before_first_token(concurrency)):
        assert figure is None or figure >= 0


# -- pace and slowness ------------------------------------------------------------------------------------------------


def test_pace_sums_up_and_begins_anew() -> None:
    pace = Pace()
    pace.add(20_000_000, 1)
    pace.add(60_000_000, 3)
    assert repr(pace) == "<Pace 4 events in 0.080 s>"
    assert pace.take() == (0.08, 4)
    assert pace.take() == (0.0, 0)


def test_a_long_silence_counts_as_two_seconds() -> None:
    pace = Pace()
    pace.add(40 * NS, 1)
    assert pace.take() == (2.0, 1)


def tokens(slowness: float, in_flight: int = 20, gap_s: float = 0.030) -> Signals:
    """Half a second of streams that many times slower than ``CURVE``."""
    events = round(in_flight * 0.5 / (gap_s * slowness))
    return Signals(in_flight, 5, gaps_s=events * gap_s * slowness, gap_events=events)


def test_slowness_is_known_after_two_seconds_of_tokens_and_forgotten_without() -> None:
    slowness = Slowness(MeasuredCurve(CURVE))
    seen = []
    for i in range(1, 7):
        slowness.add(tokens(2.0), i * HALF_NS)
        seen.append(slowness.value)
    assert seen == [None] * 4 + [pytest.approx(2.0)] * 2
    assert not slowness.learning
    slowness.add(Signals(0, 0), 63 * NS)
    assert slowness.value is None
    assert not slowness.learning


def test_slowness_follows_a_change_within_seconds() -> None:
    slowness = Slowness(MeasuredCurve(CURVE))
    for i in range(1, 60):
        slowness.add(tokens(1.0), i * HALF_NS)
    for i in range(60, 80):
        slowness.add(tokens(2.0), i * HALF_NS)
    assert slowness.value is not None
    assert 1.6 < slowness.value < 2.0
    assert repr(slowness) == f"<Slowness {slowness.value:.2f}>"


def test_fewer_in_flight_are_held_to_the_gap_of_fewer() -> None:
    slowness = Slowness(MeasuredCurve(CURVE))
    for i in range(1, 9):
        slowness.add(tokens(1.5, in_flight=10, gap_s=0.020), i * HALF_NS)
    assert slowness.value == pytest.approx(1.5)


# -- the engine's own signals -----------------------------------------------------------------------------------------


def engine(at_s: float, **figures: float) -> Signals:
    return Signals(20, 0, engine=Reading(round(at_s * NS), EngineMetrics(engine="vllm", **figures)))


@pytest.mark.parametrize(
    ("curve", "figures", "reason"),
    [
        ([], {"waiting": 3}, "3 requests wait inside the engine"),
        ([], {"waiting": 2}, ""),
        (CURVE, {"waiting": 5}, "5 requests wait inside the engine"),
        (CURVE, {"waiting": 4}, ""),
        ([level(20, e2el_mean_ms=50, itl_p50_ms=1)], {"waiting": 19}, ""),
        ([], {"kv_use": 0.95}, "the KV cache is 95% full"),
        ([], {"kv_use": 0.94}, ""),
        ([], {}, ""),
    ],
)
def test_a_figure_that_is_there_at_two_readings_lasts(
    curve: list[EvidenceLevel], figures: dict[str, float], reason: str
) -> None:
    pressure = Pressure(MeasuredCurve(curve))
    assert pressure.lasting(engine(1, **figures), NS) == ""
    assert pressure.lasting(engine(1, **figures), NS + HALF_NS) == "", "the same reading counts once"
    assert pressure.lasting(engine(2, **figures), 2 * NS) == reason


def test_what_is_seen_now_and_then_does_not_last() -> None:
    pressure = Pressure(MeasuredCurve([]))
    for at_s in range(0, 20, 2):
        assert pressure.lasting(engine(at_s, kv_use=0.99), at_s * NS) == ""
        assert pressure.lasting(engine(at_s + 1, kv_use=0.50), (at_s + 1) * NS) == ""


def test_preemptions_count_while_they_grow_and_not_after_a_restart() -> None:
    pressure = Pressure(MeasuredCurve([]))
    totals = [7, 8, 9, 9, 2, 3, 3]
    reasons = [pressure.lasting(engine(i, preemptions_total=total), i * NS) for i, total in enumerate(totals)]
    assert [bool(reason) for reason in reasons] == [False, False, True, False, False, False, False]
    assert reasons[2] == "the engine preempts requests"


def test_busy_replies_count_while_they_grow() -> None:
    pressure = Pressure(MeasuredCurve([]))
    reasons = [pressure.lasting(Signals(5, 0, busy_replies=n), i * HALF_NS) for i, n in enumerate([40, 40, 41, 43, 43])]
    assert [bool(reason) for reason in reasons] == [False, False, False, True, False]


# -- the limit --------------------------------------------------------------------------------------------------------


def drive(limit: AdaptiveLimit, signals: Signals, from_s: float, seconds: float) -> list[int]:
    """The limits decided on while the same is seen each half second, requests always at the limit."""
    return [limit.decide(signals, round((from_s + i / 2) * NS)) for i in range(int(seconds * 2))]


def test_half_the_speed_is_half_the_limit_and_back_step_by_step() -> None:
    limit = AdaptiveLimit(20, CURVE)
    assert set(drive(limit, tokens(1.0), 0, 30)) == {20}
    lowered = drive(limit, tokens(2.1), 30, 60)
    assert all(0 <= before - after <= 1 for before, after in pairwise(lowered))
    assert lowered[-1] == 10
    assert limit.reason == "limit 11 → 10: tokens come 2.0 × slower than measured"
    raised = drive(limit, tokens(1.0), 90, 60)
    assert all(0 <= after - before <= 1 for before, after in pairwise(raised))
    assert raised[-1] == 20
    assert limit.reason == "limit 19 → 20: the engine keeps up"


def test_an_engine_that_recovers_in_part_is_given_that_part() -> None:
    limit = AdaptiveLimit(40, CURVE)
    assert drive(limit, tokens(2.5), 0, 60)[-1] in (17, 18)
    assert drive(limit, tokens(1.6), 60, 60)[-1] in (23, 24)
    assert limit.reason == "limit 22 → 23: tokens come only 1.7 × slower"


@pytest.mark.parametrize("slowness", [0.3, 1.0, 1.2])
def test_what_is_about_as_measured_is_left_alone(slowness: float) -> None:
    limit = AdaptiveLimit(20, CURVE)
    assert set(drive(limit, tokens(slowness), 0, 60)) == {20}
    assert limit.reason == ""


def test_a_large_limit_moves_in_larger_steps() -> None:
    limit = AdaptiveLimit(1000, CURVE)
    lowered = drive(limit, tokens(2.0), 0, 60)
    assert lowered[-1] in range(490, 560)
    assert max(a - b for a, b in pairwise(lowered)) == 10


def lowered_by_pressure() -> AdaptiveLimit:
    """16 of 20 at 4 s, at a hand-written limit."""
    limit = AdaptiveLimit(20, [])
    for at_s in range(5):
        limit.decide(engine(at_s, kv_use=1.0), at_s * NS)
    assert limit.limit == 16
    return limit


@pytest.mark.parametrize(
    ("signals", "rises"),
    [
        (Signals(16, 0, gaps_s=1.0, gap_events=50), True),
        (Signals(3, 1, gaps_s=1.0, gap_events=50), True),
        (Signals(15, 0, gaps_s=1.0, gap_events=50), False),
        (Signals(16, 5), False),
    ],
    ids=["reached", "queued", "idle", "hung"],
)
def test_it_rises_after_a_rest_only_where_it_is_used_and_something_comes(signals: Signals, rises: bool) -> None:
    limit = lowered_by_pressure()
    assert set(drive(limit, signals, 4.5, 14)) == {16}
    assert (max(drive(limit, signals, 18.5, 40)) > 16) == rises


def test_whole_replies_are_a_sign_of_life_where_nothing_streams() -> None:
    limit = lowered_by_pressure()
    for i in range(100):
        limit.decide(Signals(16, 1, replies=i), 20 * NS + i * HALF_NS)
    assert limit.limit == 20


def test_it_never_goes_below_one() -> None:
    limit = AdaptiveLimit(3, [])
    assert [limit.decide(engine(i, kv_use=1.0), i * NS) for i in range(8)] == [3, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("ceiling", "limit_after"), [(30, 16), (18, 16), (10, 10)])
def test_a_reload_keeps_what_was_lowered_below_the_new_ceiling(ceiling: int, limit_after: int) -> None:
    limit = lowered_by_pressure()
    assert limit.configure(ceiling, []) == limit_after
    assert repr(limit) == f"<AdaptiveLimit {limit_after} of {ceiling}, <Slowness unknown>>"


def test_a_reload_raises_what_stood_at_the_ceiling() -> None:
    assert AdaptiveLimit(20, CURVE).configure(30, CURVE) == 30


def test_a_reload_with_another_curve_forgets_how_slow_it_was() -> None:
    limit = AdaptiveLimit(20, CURVE)
    drive(limit, tokens(2.0), 0, 30)
    limit.configure(20, [level(20, itl_p50_ms=60)])
    assert drive(limit, tokens(2.0), 30, 60)[-1] == 20


signals = st.builds(
    Signals,
    in_flight=st.integers(0, 40),
    queued=st.integers(0, 3),
    gaps_s=st.floats(0, 20),
    gap_events=st.integers(0, 500),
    replies=st.integers(0, 5),
    busy_replies=st.integers(0, 5),
    engine=st.none()
    | st.builds(
        Reading,
        st.integers(0, 60 * NS),
        st.builds(
            EngineMetrics,
            waiting=st.none() | st.floats(0, 40),
            kv_use=st.none() | st.floats(0, 1),
            preemptions_total=st.none() | st.floats(0, 40),
        ),
    ),
)


@given(st.integers(1, 30), st.sampled_from([[], CURVE]), st.lists(signals, max_size=80))
def test_always_within_bounds_a_step_at_a_time_and_never_raised_while_idle(
    ceiling: int, curve: list[EvidenceLevel], seen: list[Signals]
) -> None:
    limit = AdaptiveLimit(ceiling, curve)
    used_ns = -math.inf
    for i, one in enumerate(seen):
        now_ns = i * HALF_NS
        before = limit.limit
        if one.in_flight >= before or one.queued:
            used_ns = now_ns
        after = limit.decide(one, now_ns)
        assert 1 <= after <= ceiling
        assert abs(after - before) <= 1
        assert after <= before or now_ns - used_ns < 2 * NS


# -- the shells -------------------------------------------------------------------------------------------------------


def test_the_adapter_puts_changes_in_force_and_tells_where_the_ceiling_is_left_and_regained() -> None:
    set_limits: list[tuple[str, int, int]] = []
    lines: list[str] = []
    adapter = Adapter(lambda *change: set_limits.append(change), lines.append)
    slow, steady = [tokens(2.1)], [tokens(1.0)]
    adapter.follow("slow", 20, CURVE, lambda: slow[0], 0)
    adapter.follow("steady", 20, CURVE, lambda: steady[0], 0)
    assert repr(adapter) == "<Adapter slow 20 of 20, steady 20 of 20>"
    for i in range(120):
        adapter.tick(i * HALF_NS)
    assert [limit for _, limit, _ in set_limits] == list(range(19, 9, -1))
    assert {name for name, _, _ in set_limits} == {"slow"}
    assert adapter.reason("slow") == "limit 11 → 10: tokens come 2.1 × slower than measured"
    assert adapter.reason("steady") == adapter.reason("unknown") == ""
    slow[0] = tokens(1.0)
    for i in range(120, 240):
        adapter.tick(i * HALF_NS)
    assert lines == [
        "slow: limit 20 → 19: tokens come 2.1 × slower than measured",
        "slow: limit 19 → 20: the engine keeps up",
    ]


def test_the_adapter_after_a_reload() -> None:
    set_limits: list[tuple[str, int, int]] = []
    adapter = Adapter(lambda *change: set_limits.append(change), lambda _line: None)
    adapter.follow("engine", 20, CURVE, lambda: tokens(2.1), 0)
    for i in range(120):
        adapter.tick(i * HALF_NS)
    set_limits.clear()
    adapter.follow("engine", 16, CURVE, lambda: tokens(2.1), 60 * NS)
    assert set_limits == [("engine", 10, 60 * NS)], "the reload has put the whole limit in force"
    adapter.forget("engine")
    adapter.forget("engine")
    assert repr(adapter) == "<Adapter follows nothing>"


PAGE = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 2\n"


@pytest.mark.parametrize(
    ("answer", "known", "pause_s"),
    [
        ((200, PAGE), True, READ_EVERY_S),
        ((404, b"not found"), False, ASK_AGAIN_S),
        ((401, b""), False, ASK_AGAIN_S),
        ((200, b"<html>\xff</html>"), False, ASK_AGAIN_S),
        ((503, b""), False, READ_EVERY_S),
        (None, False, READ_EVERY_S),
    ],
)
def test_what_an_answer_means_for_the_next_question(
    answer: tuple[int, bytes] | None, known: bool, pause_s: float
) -> None:
    async def main(clock: VirtualClock) -> None:
        answers = [(200, PAGE), answer]

        async def ask() -> tuple[int, bytes] | None:
            return answers.pop(0)

        watch = EngineWatch(ask, clock)
        assert repr(watch) == "<EngineWatch of nothing>"
        await watch.read()
        assert repr(watch) == "<EngineWatch of vllm>"
        assert await watch.read() == pause_s
        assert (watch.latest is not None) == known

    run_virtual(main)


def test_it_reads_once_a_second_and_rests_for_a_minute_where_there_is_no_page() -> None:
    async def main(clock: VirtualClock) -> list[int]:
        asked: list[int] = []

        async def ask() -> tuple[int, bytes]:
            asked.append(clock.now_ns() // NS)
            return (404, b"") if len(asked) == 4 else (200, PAGE)

        watch = EngineWatch(ask, clock)
        watching = asyncio.ensure_future(watch.watch())
        await asyncio.sleep(64.5)
        assert watch.latest is not None
        assert watch.latest.at_ns == 64 * NS
        assert watch.latest.metrics.waiting == 2
        watching.cancel()
        return asked

    assert run_virtual(main) == [0, 1, 2, 3, 63, 64]
