"""The rules, one by one and in their order; what is certain, what is open, what the client alone has done."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.core.records import Outcome
from loadstone.core.verdict import ClientFigures, Finding, Verdict
from loadstone.measure.rules import Rules, Slo, Stance, extension, judge, loose_end, requests_for
from loadstone.measure.steady import Metric, Summary, Throughput, summarise
from loadstone.measure.telemetry import ServerFigures
from made_levels import level

PLAIN = Rules()
EVERY_STANCE = pytest.mark.parametrize("stance", list(Stance))


def metric(mean_ms: float, se_ms: float = 0.0, *, n: int = 400, infinite: int = 0) -> Metric:
    """Values whose wave means have (nearly) that standard error: four to a wave, a wave high, the next one low."""
    waves = n // 4
    values = mean_ms + se_ms * math.sqrt(waves) * np.repeat(np.tile((1.0, -1.0), waves // 2), 4)
    return Metric(values, infinite, 4)


def summary(failures: int = 0, requests: int = 400, **changes: Any) -> Summary:
    """A level without any trouble but what is asked for."""
    plain = summarise([level(4, waves=2 + requests // 4, failed=[Outcome.HTTP_ERROR] * failures)])
    for name in ("ttft", "e2el", "tpot", "itl"):
        if name in changes:
            changes["metrics"] = {**plain.metrics, **changes.get("metrics", {}), name: changes[name]}
    return dataclasses.replace(plain, **changes)


def verdict(summary: Summary, rules: Rules = PLAIN, stance: Stance = Stance.EXPLORE) -> tuple[str, str, bool]:
    judgement = judge(summary, rules, stance)
    return judgement.verdict, judgement.rule, judgement.sure


# -- success --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "explore", "settle", "confirm"),
    [
        (0, "PASS", "PASS", "PASS"),
        (4, "PASS", "PASS", "PASS"),  # 99 %: shown to hold
        (16, "UNRESOLVED", "PASS", "PASS"),  # 96 %: the interval contains 95 %
        (20, "UNRESOLVED", "PASS", "PASS"),  # exactly 95 % is not below it
        (25, "UNRESOLVED", "FAIL", "PASS"),  # 93.75 %: not significant
        (60, "FAIL", "FAIL", "FAIL"),
        (400, "FAIL", "FAIL", "FAIL"),
    ],
)
def test_success(failures: int, explore: str, settle: str, confirm: str) -> None:
    found = summary(failures)
    judged = {stance: judge(found, Rules(max_ttft_ms=None), stance) for stance in Stance}
    assert {stance: j.verdict for stance, j in judged.items()} == {
        Stance.EXPLORE: explore, Stance.SETTLE: settle, Stance.CONFIRM: confirm,
    }  # fmt: skip
    for judgement in judged.values():
        assert judgement.rule == ("" if judgement.verdict is Verdict.PASS else "success")
        assert f"of {found.requests}" in judgement.findings[0].reason


def test_failures_are_named_in_the_reason() -> None:
    assert "(60 http_error)" in judge(summary(60), Rules()).reason


def test_a_short_level_without_failures_is_not_shown_to_fail() -> None:
    assert verdict(summary(requests=8)) == ("PASS", "", True)


@EVERY_STANCE
def test_hanging_requests_fail_by_the_slots_time_they_took(stance: Stance) -> None:
    assert verdict(summary(hung_share=0.06), stance=stance)[:2] == ("FAIL", "success")
    assert verdict(summary(hung_share=0.04), stance=stance)[0] == "PASS"


# -- resources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "changes", "rules", "rule"),
    [
        (ServerFigures(kv_use=0.95), {}, Rules(), "resource:kv"),
        (ServerFigures(kv_use=0.949), {}, Rules(), ""),
        (ServerFigures(kv_use=0.85), {}, Rules(max_kv_use=0.8), "resource:kv"),
        (ServerFigures(kv_use=0.5), {"preempted_share": 0.011}, Rules(), "resource:preemptions"),
        (ServerFigures(kv_use=0.5), {"preempted_share": 0.01}, Rules(), ""),
        (ServerFigures(restarted=True), {}, Rules(), "resource:restart"),
        (ServerFigures(host_memory_free=0.019), {"loopback": True}, Rules(), "resource:memory"),
        (ServerFigures(host_memory_free=0.021), {"loopback": True}, Rules(), ""),
        (ServerFigures(host_memory_free=0.001), {"loopback": False}, Rules(), ""),  # not the server's memory
        (ServerFigures(device_memory=0.99), {}, Rules(), ""),  # explains, but makes no verdict unless asked
        (ServerFigures(device_memory=0.91), {}, Rules(max_gpu_memory=0.9), "resource:gpu_memory"),
        (ServerFigures(device_memory=0.91, preallocates=True), {}, Rules(max_gpu_memory=0.9), ""),
        (ServerFigures(waiting=900.0), {}, Rules(), ""),
        (ServerFigures(waiting=5.0), {}, Rules(max_waiting=5), ""),
        (ServerFigures(waiting=5.5), {}, Rules(max_waiting=5), "resource:waiting"),
        (ServerFigures(host_cpu=1.0, device_use=1.0, running=9.0), {}, Rules(), ""),
    ],
)
@EVERY_STANCE
def test_resources(server: ServerFigures, changes: dict[str, Any], rules: Rules, rule: str, stance: Stance) -> None:
    found = summary(server=server, **changes)
    assert verdict(found, rules, stance) == ("FAIL" if rule else "PASS", rule, True)


# -- means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean_ms", "se_ms", "explore", "settle", "confirm"),
    [
        (976, 1, ("PASS", True), ("PASS", True), ("PASS", True)),
        (1001, 0.15, ("FAIL", True), ("FAIL", True), ("FAIL", True)),
        (990, 10, ("UNRESOLVED", False), ("PASS", False), ("PASS", False)),
        (1010, 10, ("UNRESOLVED", False), ("FAIL", False), ("PASS", False)),
        # Between 1.645 and 1.96 standard errors above: the answer is refuted, one-sided.
        (1018, 10, ("UNRESOLVED", False), ("FAIL", False), ("FAIL", True)),
        (1021, 10, ("FAIL", True), ("FAIL", True), ("FAIL", True)),
        (1000, 0, ("PASS", True), ("PASS", True), ("PASS", True)),
    ],
)
def test_a_mean_against_its_limit(
    mean_ms: float, se_ms: float, explore: tuple[str, bool], settle: tuple[str, bool], confirm: tuple[str, bool]
) -> None:
    found = summary(ttft=metric(mean_ms, se_ms))
    for stance, wanted in ((Stance.EXPLORE, explore), (Stance.SETTLE, settle), (Stance.CONFIRM, confirm)):
        got, rule, sure = verdict(found, stance=stance)
        assert (got, sure) == wanted, stance
        assert rule == ("" if got == "PASS" else "ttft")


@given(st.floats(1, 5000), st.floats(0, 100))
def test_the_stances_agree_wherever_the_interval_does_not_hold_the_limit(mean_ms: float, se_ms: float) -> None:
    found = summary(ttft=metric(mean_ms, se_ms))
    first = judge(found, Rules()).verdict
    if first is not Verdict.UNRESOLVED:
        assert {judge(found, Rules(), stance).verdict for stance in Stance} == {first}
    else:
        assert judge(found, Rules(), Stance.SETTLE).verdict is (
            Verdict.PASS if found.ttft.mean_ms <= 1000 else Verdict.FAIL
        )


def test_failures_do_not_move_a_mean() -> None:
    assert verdict(summary(ttft=metric(500, infinite=9)))[0] == "PASS"


@EVERY_STANCE
def test_a_rule_without_a_value_fails_nothing(stance: Stance) -> None:
    """Replies without content are successes: there is nothing to hold against the limit."""
    assert verdict(summary(ttft=Metric(np.array([]), 0, 4)), stance=stance) == ("PASS", "", True)


# -- quantiles ------------------------------------------------------------------------------------------------------


def spread(share_over: float, n: int) -> Metric:
    """``n`` values below 900 ms, but the given share of them at 1500 ms."""
    values = np.linspace(100.0, 900.0, n)
    over = round(share_over * n)
    return Metric(np.concatenate([values[: n - over], np.full(over, 1500.0)]), 0, 4)


@pytest.mark.parametrize(
    ("stat", "share_over", "n", "wanted"),
    [
        ("p99", 0.0, 1000, "PASS"),
        ("p99", 0.01, 1000, "UNRESOLVED"),
        ("p99", 0.03, 1000, "FAIL"),
        ("p95", 0.03, 1000, "PASS"),
        ("p95", 0.08, 1000, "FAIL"),
        ("p50", 0.4, 1000, "PASS"),
        ("p50", 0.6, 1000, "FAIL"),
        ("p99", 0.0, 100, "PASS"),  # below the line: not shown to fail is enough
    ],
)
def test_a_quantile_against_its_limit(stat: str, share_over: float, n: int, wanted: str) -> None:
    assert verdict(summary(ttft=spread(share_over, n)), Rules(ttft_stat=stat))[0] == wanted


def test_failures_are_infinite_in_a_quantile() -> None:
    found = summary(ttft=metric(100, n=400, infinite=40))
    assert verdict(found, Rules(ttft_stat="p95"))[:2] == ("FAIL", "ttft")
    assert verdict(found, Rules(ttft_stat="p50"))[0] == "PASS"


def test_the_confirmation_of_a_p99_needs_more_than_a_hundred_requests() -> None:
    few, many = summary(ttft=spread(0.0, 100)), summary(ttft=spread(0.0, 1000))
    rules = Rules(ttft_stat="p99")
    assert verdict(few, rules, Stance.CONFIRM) == ("PASS", "", False)
    assert verdict(many, rules, Stance.CONFIRM) == ("PASS", "", True)


# -- which rules there are, and their order -------------------------------------------------------------------------


def test_the_rules_in_their_order() -> None:
    slow = {name: metric(2000) for name in ("ttft", "e2el", "tpot")}
    rules = Rules(max_e2el_ms=500, slos=(Slo("tpot", "p99", 50), Slo("e2el", "mean", 100)))
    server = ServerFigures(kv_use=0.99)
    order = ["success", "resource:kv", "slo:tpot", "slo:e2el", "ttft", "e2el"]
    everything = judge(summary(80, server=server, **slow), rules)
    assert [f.rule for f in everything.findings if f.verdict is Verdict.FAIL] == order
    fixes: list[dict[str, Any]] = [
        {"failures": 80, "server": server, **slow},
        {"server": server, **slow},
        slow,
        {**slow, "tpot": metric(1)},
        {**slow, "tpot": metric(1), "e2el": metric(90)},
    ]
    for changes, rule in zip(fixes, ["success", "resource:kv", "slo:tpot", "slo:e2el", "ttft"], strict=True):
        assert judge(summary(**changes), rules).rule == rule


def test_a_failure_stands_before_what_is_open() -> None:
    assert verdict(summary(16, ttft=metric(1500)))[:2] == ("FAIL", "ttft")


def test_all_rules_are_listed_even_where_the_first_failed() -> None:
    rules = [f.rule for f in judge(summary(100, server=ServerFigures(kv_use=0.2)), Rules(max_e2el_ms=9e9)).findings]
    assert rules == ["success", "resource:kv", "resource:preemptions", "ttft", "e2el"]


@pytest.mark.parametrize(
    ("rules", "streams", "wanted"),
    [
        (Rules(), True, [("ttft", "mean", 1000)]),
        (Rules(), False, [("e2el", "mean", 1000)]),
        (Rules(ttft_stat="p99"), False, [("e2el", "p99", 1000)]),
        (Rules(max_ttft_ms=None), True, []),
        (Rules(max_e2el_ms=5000), True, [("ttft", "mean", 1000), ("e2el", "mean", 5000)]),
        (Rules(max_e2el_ms=5000), False, [("e2el", "mean", 5000)]),
        (Rules(slos=(Slo("itl", "p50", 9),)), True, [("slo:itl", "p50", 9), ("ttft", "mean", 1000)]),
    ],
)
def test_which_latencies_are_held_to_what(rules: Rules, streams: bool, wanted: list[tuple[str, str, float]]) -> None:
    assert [(rule, stat, limit) for rule, _, stat, limit in rules.latency(streams)] == wanted


def test_a_pass_says_how_near_it_came() -> None:
    found = summary(ttft=metric(976, 1), e2el=metric(2000))
    assert judge(found, Rules(max_e2el_ms=60_000)).reason == "mean TTFT 976 ± 2.0 ms ≤ 1000 ms"


# -- the client -----------------------------------------------------------------------------------------------------

VOID = [
    {"client": ClientFigures(turnaround_share=0.11)},
    {"client": ClientFigures(run_queue_wait=0.51, kernel_stamps=True)},
    {"client": ClientFigures(cpu=0.81)},
    {"client_failures": 1},
]
BELIEVED = [
    {"client": ClientFigures(turnaround_share=0.10)},
    {"client": ClientFigures(run_queue_wait=0.50)},
    {"client": ClientFigures(cpu=0.80)},
    {"client": ClientFigures(cpu=0.99, kernel_stamps=True)},
    {"client": ClientFigures(lag_p99_ms=30, late_p99_ms=30, run_queue_wait=0.2)},  # a shared machine, but a good level
]


@pytest.mark.parametrize("changes", VOID)
@EVERY_STANCE
def test_a_client_that_may_have_made_the_verdict_voids_it(changes: dict[str, Any], stance: Stance) -> None:
    assert verdict(summary(**changes), stance=stance) == ("INVALID", "client", True)
    assert verdict(summary(ttft=metric(5000), **changes), stance=stance)[0] == "INVALID"


@pytest.mark.parametrize("changes", BELIEVED)
def test_a_client_that_could_not_have_made_it_does_not(changes: dict[str, Any]) -> None:
    assert verdict(summary(**changes))[0] == "PASS"
    assert verdict(summary(ttft=metric(5000), **changes))[:2] == ("FAIL", "ttft")


@pytest.mark.parametrize("changes", VOID)
@pytest.mark.parametrize("outcome", [Outcome.HTTP_ERROR, Outcome.REFUSED, Outcome.DISCONNECT])
def test_the_servers_own_refusals_stand_whatever_the_client_did(changes: dict[str, Any], outcome: Outcome) -> None:
    refusing = summarise([level(4, waves=52, failed=[outcome] * 100)])
    assert verdict(dataclasses.replace(refusing, **changes))[:2] == ("FAIL", "success")


def test_what_failed_on_this_machine_is_never_the_servers_failure() -> None:
    """1,024 open files look like a full server: every request beyond them fails at once."""
    found = summarise([level(4, waves=52, failed=[Outcome.CLIENT] * 100)])
    for stance in Stance:
        assert verdict(found, stance=stance)[0] == "INVALID"


# -- how many requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stance", [Stance.EXPLORE, Stance.SETTLE])
def test_below_the_line_a_level_takes_what_it_is_given(stance: Stance) -> None:
    assert requests_for(stance, 10, 80, Rules(ttft_stat="p99"), True) == 80


@pytest.mark.parametrize(
    ("concurrency", "rules", "least"),
    [
        (1, Rules(), 60),  # what proves a success rate
        (10, Rules(), 80),
        (37, Rules(), 296),
        (1, Rules(ttft_stat="p50"), 60),
        (1, Rules(ttft_stat="p99"), 299),  # fewer have no upper bound of a p99
        (1, Rules(slos=(Slo("tpot", "p99", 50),)), 299),
        (100, Rules(ttft_stat="p99"), 1000),
    ],
)
def test_the_answers_own_level_takes_what_the_rules_need(concurrency: int, rules: Rules, least: int) -> None:
    needed = requests_for(Stance.CONFIRM, concurrency, 8 * concurrency, rules, True)
    assert least <= needed <= max(1.3 * least, 400)
    assert requests_for(Stance.CONFIRM, concurrency, 10_000, rules, True) == 10_000


def test_a_level_that_passed_gets_all_its_requests_where_its_interval_asks_for_them() -> None:
    steady = dataclasses.replace(summary(), throughput=Throughput(10.0, 0.09))
    scattered = dataclasses.replace(summary(), throughput=Throughput(10.0, 0.11))
    passed = judge(steady, Rules())
    assert (passed.verdict, passed.sure) == (Verdict.PASS, True)
    assert loose_end(steady, passed) == ""
    assert loose_end(scattered, passed) == "throughput scatters"
    assert "not sure" in loose_end(steady, dataclasses.replace(passed, sure=False))
    assert loose_end(scattered, dataclasses.replace(passed, verdict=Verdict.UNRESOLVED)) == ""


def open_finding(rule: str) -> Finding:
    return Finding(rule, Verdict.UNRESOLVED, "too close to tell")


@given(
    st.sampled_from(["success", "ttft"]),
    st.integers(1, 200),
    st.floats(0.01, 3.0),
    st.floats(0.5, 4.0),
    st.floats(-1.0, 20.0),
)
def test_an_open_level_grows_to_three_times_its_plan_at_most(
    rule: str, n: int, cv: float, grown: float, steepness: float
) -> None:
    planned = 8 * n
    values = 1000 * (1 + cv * np.tile((1.0, -1.0), 50))
    found = dataclasses.replace(
        summary(), concurrency=n, requests=round(grown * planned), metrics={"ttft": Metric(values, 0, n)}
    )
    more = extension(found, open_finding(rule), Rules(), planned, steepness)
    most = 3 * max(planned, 60 if rule == "success" else 0)
    assert 0 <= more <= max(0, most - found.requests)
    if found.requests >= most:
        assert more == 0, "then its point value decides"
    elif rule == "success":
        assert more == most - found.requests
    elif more and found.requests + n <= most:
        assert more >= n, "at least one more wave"


@pytest.mark.parametrize("steepness", [1.0, 2.0])
def test_a_mean_near_its_limit_asks_for_what_its_spread_needs(steepness: float) -> None:
    """n = τ(1.96·cv/(res·b))², τ = 2: where latency climbs steeply, little precision fixes the line."""
    values = 1000 * (1 + 0.25 * np.tile((1.0, -1.0), 50))
    found = dataclasses.replace(summary(), concurrency=1, requests=40, metrics={"ttft": Metric(values, 0, 10)})
    more = extension(found, open_finding("ttft"), Rules(), 80, steepness)
    assert more + 40 == pytest.approx(2 * (1.96 * 0.25 / (0.05 * steepness)) ** 2, abs=2)


# -- --slo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("tpot:p99:50", Slo("tpot", "p99", 50.0)),
        ("ttft:mean:0.5", Slo("ttft", "mean", 0.5)),
        ("itl:p50:1e2", Slo("itl", "p50", 100.0)),
        ("e2el:p90:20000", Slo("e2el", "p90", 20000.0)),
    ],
)
def test_slo(text: str, slo: Slo) -> None:
    assert Slo.parse(text) == slo
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize(
    "text",
    ["", "tpot", "tpot:p99", "tpot:p99:", "tpot:p99:fast", "tpot:p99:50:x", "tps:p99:50", "tpot:p98:50", "tpot:p99:0",
     "tpot:p99:-3", "tpot:p99:nan"],
)  # fmt: skip
def test_a_bad_slo_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"give .* for example tpot:p99:50"):
        Slo.parse(text)


def test_two_slos_of_one_metric_are_both_held() -> None:
    rules = Rules(max_ttft_ms=None, slos=(Slo("e2el", "mean", 5000), Slo("e2el", "p99", 500)))
    assert verdict(summary(e2el=metric(1000)), rules)[:2] == ("FAIL", "slo:e2el")
