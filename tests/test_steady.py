"""From records to figures: the judged set, throughput, failures in quantiles, hanging, pooling."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.records import Outcome, RequestRecord
from loadstone.measure.steady import Z_ONE_SIDED, LevelData, Summary, summarise
from loadstone.measure.telemetry import ServerFigures
from made_levels import level, meta, record

WINDOW = (10.0, 20.0)


def data(
    records: Sequence[RequestRecord], concurrency: int = 2, server: ServerFigures | None = None, **more: object
) -> LevelData:
    return LevelData(meta(concurrency, WINDOW, **more), records, server or ServerFigures())


def summary(*records: RequestRecord, concurrency: int = 2) -> Summary:
    return summarise([data(records, concurrency)])


# -- what is judged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent_s", "e2e_s", "judged"),
    [
        (9.999, 5.0, False),  # sent before it, though it ends inside
        (10.0, 0.1, True),
        (19.999, 50.0, True),  # followed to its end, however late
        (20.0, 0.1, False),
    ],
)
def test_judged_is_what_was_sent_in_the_window(sent_s: float, e2e_s: float, judged: bool) -> None:
    assert summary(record(0, sent_s, e2e_s=e2e_s)).requests == judged


def test_judged_requests_are_in_send_order() -> None:
    later, sooner = record(0, 12.0), record(1, 11.0)
    assert data([later, sooner]).judged == [sooner, later]


@pytest.mark.parametrize("outcome", [Outcome.CUT, Outcome.CLIENT])
def test_what_we_cut_or_could_not_send_is_neither_success_nor_failure(outcome: Outcome) -> None:
    found = summary(record(0, 11.0), record(1, 12.0, outcome=outcome))
    assert (found.requests, found.successes, found.failures) == (1, 1, {})
    assert found.client_failures == (outcome is Outcome.CLIENT)


def test_every_other_outcome_is_a_failure() -> None:
    failing = [o for o in Outcome if o not in (Outcome.OK, Outcome.CUT, Outcome.CLIENT)]
    found = summary(record(0, 10.5), *(record(i, 11.0 + i / 10, outcome=o) for i, o in enumerate(failing)))
    assert (found.requests, found.successes) == (len(failing) + 1, 1)
    assert found.failures == {str(outcome): 1 for outcome in failing}


def test_a_reply_without_content_is_a_success_without_ttft() -> None:
    found = summary(record(0, 11.0), record(1, 12.0, ttft_s=None))
    assert (found.successes, found.no_content, found.ttft.values_ms.size, found.ttft.infinite) == (2, 1, 1, 0)


# -- throughput -----------------------------------------------------------------------------------------------------


def test_throughput_counts_the_share_of_each_success_inside_the_window() -> None:
    """Two slots, four seconds a request: half a request a second, whatever the window cuts through."""
    records = [record(i, 4.0 * i + 2.0 * slot + 1.3, e2e_s=4.0) for i in range(8) for slot in range(2)]
    found = summarise([LevelData(meta(2, (7.0, 25.0)), records, ServerFigures())])
    assert found.throughput is not None
    assert found.throughput.rps == pytest.approx(0.5)


def test_failures_and_cut_requests_add_no_throughput() -> None:
    good = [record(i, 2.0 * i, e2e_s=2.0) for i in range(15)]
    bad = [record(i, 2.0 * i, e2e_s=2.0, outcome=o) for i, o in enumerate((Outcome.HTTP_ERROR, Outcome.CUT) * 4)]
    with_them, without = summarise([data(good + bad)]), summarise([data(good)])
    assert with_them.throughput == without.throughput is not None


@pytest.mark.parametrize(("e2e_s", "usable"), [(3.3, True), (3.4, False)])
def test_a_window_of_fewer_than_three_waves_has_no_throughput(e2e_s: float, usable: bool) -> None:
    records = [record(i, i * e2e_s, e2e_s=e2e_s) for i in range(12)]
    assert (summarise([data(records)]).throughput is not None) == usable
    assert (summarise([data(records)]).output_tps is not None) == usable


def test_a_level_that_was_stopped_has_no_throughput() -> None:
    assert summarise([level(4)]).throughput is not None
    stopped = summarise([level(4, stopped_early="it was slow")])
    assert (stopped.throughput, stopped.output_tps, stopped.complete) == (None, None, False)


def test_tokens_are_spread_over_their_request() -> None:
    records = [record(i, 2.0 * i, e2e_s=2.0, output_tokens=30) for i in range(15)]
    assert summarise([data(records)]).output_tps == pytest.approx(15.0)


@given(st.integers(1, 40), st.floats(0.05, 3.0))
def test_throughput_obeys_littles_law_on_a_full_loop(concurrency: int, e2e_s: float) -> None:
    found = summarise([level(concurrency, e2e_s=e2e_s)])
    assert found.throughput is not None
    assert found.throughput.rps == pytest.approx(concurrency / e2e_s, rel=1e-6)
    assert found.throughput.se_rps >= 0.002 * found.throughput.rps * 0.999


# -- latencies ------------------------------------------------------------------------------------------------------


def test_failures_are_infinite_in_quantiles_and_left_out_of_means() -> None:
    good = [record(i, 10.0 + i / 100, ttft_s=0.2) for i in range(98)]
    found = summary(*good, record(98, 11.0, outcome=Outcome.TIMEOUT), record(99, 11.1, outcome=Outcome.REFUSED))
    assert found.ttft.mean_ms == pytest.approx(200)
    assert found.ttft.quantile_ms(0.95) == pytest.approx(200)
    assert found.ttft.quantile_ms(0.99) == math.inf
    assert found.e2el.quantile_ms(0.99) == math.inf


def test_the_interval_of_a_quantile_is_open_where_there_are_too_few() -> None:
    found = summary(*(record(i, 10.0 + i / 100, ttft_s=0.2 + i / 1000) for i in range(100)))
    value, low, high = found.ttft.stat("p99")
    assert low < value < high == math.inf, "the maximum of a hundred is no upper bound of their p99"
    assert math.isfinite(found.ttft.stat("p50")[2])


def test_without_any_value_there_is_no_statistic() -> None:
    found = summary(record(0, 11.0, ttft_s=None))
    assert all(math.isnan(x) for x in (*found.ttft.stat("mean"), *found.ttft.stat("p99")))


def test_the_error_of_a_mean_is_that_of_its_waves() -> None:
    """Every wave holds the same four values: the mean is known far better than single values would tell."""
    waves = summarise([level(4, waves=22, ttft_s=(0.1, 0.2, 0.3, 0.4))])
    mixed = summarise([level(4, waves=22, ttft_s=(0.1, 0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.4))])
    assert waves.ttft.mean_ms == pytest.approx(250)
    assert waves.ttft.estimate.se < 1e-6
    assert mixed.ttft.estimate.se > 10


def test_time_per_output_token_is_vllms() -> None:
    found = summary(record(0, 11.0, first_choice_s=0.1, last_choice_s=1.0, output_tokens=10))
    assert found.tpot.mean_ms == pytest.approx(100)
    one_token = summary(record(0, 11.0, first_choice_s=0.1, last_choice_s=0.1, output_tokens=1))
    assert one_token.tpot.values_ms.size == 0


def test_gaps_between_chunks_are_pooled_over_requests() -> None:
    found = summary(record(0, 11.0, itls_s=[0.01, 0.03]), record(1, 12.0, itls_s=[0.02] * 6))
    assert found.itl.mean_ms == pytest.approx(20)
    assert found.itl.values_ms.size == 8


# -- hanging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent_s", "end_s", "share"),
    [
        (12.0, 17.0, 0.25),  # 5 s of 2 slots × 10 s
        (0.0, 120.0, 0.5),  # sent before the window, it held its slot all through it
        (5.0, 11.0, 0.05),
        (19.0, 139.0, 0.05),
        (0.0, 9.0, 0.0),
        (21.0, 141.0, 0.0),
    ],
)
def test_a_hung_request_counts_by_the_time_it_held_a_slot(sent_s: float, end_s: float, share: float) -> None:
    hung = record(0, sent_s, e2e_s=end_s - sent_s, outcome=Outcome.TIMEOUT)
    assert summary(hung, record(1, 11.0)).hung_share == pytest.approx(share)


def test_other_failures_are_not_hanging() -> None:
    assert summary(record(0, 10.0, e2e_s=9.0, outcome=Outcome.DISCONNECT)).hung_share == 0


# -- the client -----------------------------------------------------------------------------------------------------


def test_the_turnaround_share_is_of_slots_times_window() -> None:
    records = [record(i, 10.0 + i, turnaround_s=0.1) for i in range(10)] + [record(10, 10.5, turnaround_s=None)]
    assert summary(*records).client.turnaround_share == pytest.approx(1.0 / (2 * 10))


@pytest.mark.parametrize(("share", "supported"), [(0.0, 40), (0.02, 39), (0.05, 38), (0.5, 20), (0.999, 1)])
def test_a_pass_is_evidence_for_the_slots_that_were_not_empty(share: float, supported: int) -> None:
    per_request_s = share * 40 * 10 / 100
    records = [record(i, 10.0 + i / 20, turnaround_s=per_request_s) for i in range(100)]
    assert summary(*records, concurrency=40).supported_concurrency == supported


def test_lateness_is_against_the_plan() -> None:
    records = [record(i, 10.0 + i / 100, planned_s=10.0 + i / 100 - 0.003) for i in range(100)]
    assert summary(*records).client.late_p99_ms == pytest.approx(3.0)


# -- pooling --------------------------------------------------------------------------------------------------------


def test_two_levels_at_one_concurrency_are_pooled() -> None:
    one = level(4, waves=12, ttft_s=(0.1,), failed=[Outcome.HTTP_ERROR] * 2)
    two = level(4, waves=22, ttft_s=(0.4,), e2e_s=2.0)
    pooled = summarise([one, two])
    assert pooled.requests == 40 + 80
    assert pooled.successes == 38 + 80
    assert pooled.failures == {"http_error": 2}
    assert pooled.ttft.mean_ms == pytest.approx((38 * 100 + 80 * 400) / 118)
    assert pooled.ttft.infinite == 2
    assert pooled.duration_s == pytest.approx(10 * 1.0 + 20 * 2.0)
    assert pooled.throughput is not None
    first, second = summarise([one]).throughput, summarise([two]).throughput
    assert first is not None
    assert second is not None
    assert pooled.throughput.rps == pytest.approx((10 * first.rps + 40 * second.rps) / 50)


def test_of_pooled_levels_the_worst_client_counts() -> None:
    fine = level(2, server=ServerFigures(client_cpu=0.1, run_queue_wait=0.0), kernel_stamps=True)
    busy = level(2, server=ServerFigures(client_cpu=0.9, run_queue_wait=0.2))
    client = summarise([fine, busy]).client
    assert (client.cpu, client.run_queue_wait, client.kernel_stamps) == (0.9, 0.2, False)


def test_preemptions_are_counted_for_each_judged_request() -> None:
    levels = [level(4, server=ServerFigures(preemptions=2.0)), level(4, server=ServerFigures(preemptions=None))]
    assert summarise(levels).preempted_share == pytest.approx(2 / 80)


def test_a_success_rate_whose_failures_come_together_is_less_sure() -> None:
    spread = [record(i, 10 + i / 100, outcome=Outcome.HTTP_ERROR if i % 20 == 0 else Outcome.OK) for i in range(400)]
    clustered = [record(i, 10 + i / 100, outcome=Outcome.HTTP_ERROR if i < 20 else Outcome.OK) for i in range(400)]
    apart, together = summary(*spread, concurrency=20), summary(*clustered, concurrency=20)
    assert apart.success_rate == together.success_rate == 0.95
    (low_apart, high_apart), (low_together, high_together) = apart.success_interval(), together.success_interval()
    assert low_together < low_apart < 0.95 < high_apart < high_together


def test_zero_failures_prove_ninety_five_percent_from_about_sixty_requests() -> None:
    def low(n: int) -> float:
        return summary(*(record(i, 10 + i / 100) for i in range(n))).success_interval(Z_ONE_SIDED)[0]

    assert low(60) >= 0.95 > low(50)
