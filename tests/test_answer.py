"""What a run says in the end: ``verdict.json`` and ``limits.toml``, from levels made by hand."""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from loadstone.core.errors import EXIT_FAILED, EXIT_INVALID, EXIT_OK
from loadstone.core.limits import Limits, LimitsFile, dumps, loads
from loadstone.core.records import Outcome
from loadstone.core.verdict import LevelKind, RunVerdict, Verdict
from loadstone.measure.answer import Subject, limits_of
from loadstone.measure.book import RunBook
from loadstone.measure.find import exit_status
from loadstone.measure.rules import Rules, Slo
from loadstone.measure.search import SearchSettings
from loadstone.measure.steady import LevelData
from loadstone.measure.telemetry import ServerFigures
from made_levels import level, replace_meta

LADDER = (1, 2, 5, 10, 20, 50)
SETTINGS = SearchSettings(Rules(min_gain=0.0), LADDER)
NOW = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
SUBJECT = Subject("Qwen/Qwen3-8B", "chat", "http://127.0.0.1:8001", "runs/one")


def book(*levels: LevelData, settings: SearchSettings = SETTINGS) -> RunBook:
    numbered = [replace_meta(data, ordinal=place) for place, data in enumerate(levels, 1)]
    return RunBook(settings, numbered)


def verdict(*levels: LevelData, settings: SearchSettings = SETTINGS) -> RunVerdict:
    return book(*levels, settings=settings).verdict()


def passing(*concurrencies: int, **more: Any) -> list[LevelData]:
    """Levels long enough to be an answer: at least ten requests a slot, and sixty."""
    return [level(n, waves=2 + max(10, -(-60 // n)), **more) for n in concurrencies]


def slow(n: int, ttft_s: float = 1.104, **more: Any) -> LevelData:
    return level(n, waves=12, ttft_s=(ttft_s,), e2e_s=2.0, **more)


def refusing(n: int, **more: Any) -> LevelData:
    return level(n, waves=12, failed=[Outcome.REFUSED] * (2 * n), **more)


TO_TWENTY = passing(1, 2, 5, 10, 15, 20)
"""Everything up to 20 holds, and its recommended level has been run."""


# -- what binds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("above", "changes", "binding"),
    [
        (slow(21), {}, "ttft"),
        (refusing(21), {}, "success"),
        (level(21, server=ServerFigures(kv_use=0.97)), {}, "resource:kv"),
        (level(21, server=ServerFigures(restarted=True)), {}, "resource:restart"),
        (level(21, e2e_s=3.0), {"max_e2el_ms": 2500}, "e2el"),
        (level(21, e2e_s=3.0), {"slos": (Slo("e2el", "p95", 2500),)}, "slo:e2el"),
    ],
)
def test_the_answer_is_the_last_that_held_and_names_what_binds(
    above: LevelData, changes: dict[str, Any], binding: str
) -> None:
    settings = dataclasses.replace(SETTINGS, rules=dataclasses.replace(SETTINGS.rules, **changes))
    found = verdict(*TO_TWENTY, above, settings=settings)
    assert (found.measured_max_concurrency, found.recommended_concurrency, found.binding) == (20, 15, binding)
    assert (found.sure, found.non_monotone) == (True, False)
    assert exit_status(found) == EXIT_OK
    row = found.levels[-1]
    assert (row.verdict, row.rule, row.concurrency) == (Verdict.FAIL, binding, 21)
    assert found.claim.startswith("20 held: n = 200, success 100 %")
    assert f"; 21 failed: {row.reason}" in found.claim


def test_the_claim_says_what_was_seen() -> None:
    claim = verdict(*TO_TWENTY, slow(21)).claim
    assert "mean TTFT 100 ± 0.00 ms ≤ 1000 ms; 21 failed: mean TTFT 1104 ± 0.00 ms > 1000 ms" in claim
    assert "95 %" not in claim


def test_a_ladder_that_never_failed_is_a_lower_bound() -> None:
    settings = dataclasses.replace(SETTINGS, ladder=(1, 2, 5, 10, 20))
    found = verdict(*TO_TWENTY, settings=settings)
    assert (found.measured_max_concurrency, found.binding, found.half_of_failing) == (20, "ladder", None)
    assert "no level of the ladder failed" in found.claim


def late(n: int, share: float) -> LevelData:
    """A level whose slots stood empty for that share of the time."""
    plain = passing(n)[0]
    each_s = share * n * plain.duration_s / len(plain.judged)
    records = [msgspec.structs.replace(r, turnaround_s=each_s) for r in plain.records]
    return dataclasses.replace(plain, records=records)


def test_where_the_generator_gave_out_the_answer_is_a_lower_bound() -> None:
    found = verdict(*TO_TWENTY, late(21, 0.2), late(21, 0.2))
    assert (found.measured_max_concurrency, found.binding) == (20, "client")
    assert "21 could not be judged" in found.claim
    assert [row.verdict for row in found.levels[-2:]] == [Verdict.INVALID] * 2
    assert exit_status(found) == EXIT_OK


@pytest.mark.parametrize(("share", "measured"), [(0.0, 20), (0.02, 20), (0.06, 18), (0.09, 18)])
def test_a_pass_is_evidence_for_what_the_generator_kept_up(share: float, measured: int) -> None:
    """⌊N(1 − D)⌋, taken as N where D is within half the resolution."""
    found = verdict(*TO_TWENTY[:-1], late(20, share), slow(21))
    assert found.measured_max_concurrency == measured


@pytest.mark.parametrize(
    ("levels", "binding", "status"),
    [
        ([refusing(1)] * 2, "success", EXIT_FAILED),
        ([slow(1)] * 2, "ttft", EXIT_FAILED),
        ([late(1, 0.5)] * 2, "client", EXIT_INVALID),
        ([level(1, waves=70, failed=[Outcome.CLIENT] * 9)] * 2, "client", EXIT_INVALID),
    ],
)
def test_where_nothing_passed_there_is_no_answer(levels: Sequence[LevelData], binding: str, status: int) -> None:
    found = verdict(*levels)
    assert (found.measured_max_concurrency, found.recommended_concurrency) == (None, None)
    assert (found.binding, exit_status(found), found.sure) == (binding, status, False)
    assert "nothing below it was run" in found.claim
    assert limits_of(found, levels, SETTINGS, SUBJECT, 120.0, NOW) is None


def test_a_run_without_levels_says_nothing() -> None:
    found = verdict()
    assert (found.measured_max_concurrency, found.claim, found.levels) == (None, "nothing was judged", [])


def test_an_answer_on_a_point_value_is_not_sure() -> None:
    spread = level(21, waves=12, ttft_s=[1.5] * 21 + [0.55] * 21)
    found = verdict(*TO_TWENTY, spread)
    assert found.levels[-1].verdict is Verdict.FAIL
    assert not found.levels[-1].sure
    assert not found.sure


def test_a_search_that_was_ended_says_so() -> None:
    """Interrupted, or stopped by a gate: what was measured stands, but nobody has seen a level fail."""
    found = verdict(*passing(1, 2, 5))
    assert (found.measured_max_concurrency, found.sure) == (5, False)
    assert "no level that was run failed" in found.claim
    assert any(note.startswith("the search has not ended: 10 would be run next") for note in found.notes)


def test_a_failure_below_a_pass_is_told() -> None:
    found = verdict(*passing(1, 2, 5, 10, 15), slow(20), *passing(50))
    assert found.non_monotone
    assert found.measured_max_concurrency == 15


# -- the numbers beside it ------------------------------------------------------------------------------------------


def test_half_of_the_failing_level_stands_beside_ours() -> None:
    found = verdict(*TO_TWENTY, slow(50), slow(21))
    assert (found.half_of_failing, found.recommended_concurrency) == (25, 15)


def test_a_first_level_that_was_only_cold_is_no_failing_level() -> None:
    found = verdict(slow(1), *TO_TWENTY, slow(50), slow(21))
    assert (found.half_of_failing, found.measured_max_concurrency) == (25, 20)


@pytest.mark.parametrize(
    ("measured", "recommended", "noted"),
    [(1, 1, True), (2, 1, True), (3, 2, True), (5, 4, False), (9, 7, False), (20, 15, False)],
)
def test_the_recommended_limit_and_when_it_is_no_three_quarters(measured: int, recommended: int, noted: bool) -> None:
    settings = dataclasses.replace(SETTINGS, ladder=(measured,))
    found = verdict(*passing(recommended), *passing(*{measured} - {recommended}), settings=settings)
    assert found.recommended_concurrency == recommended
    assert any("no whole number lies between 70 % and 80 %" in note for note in found.notes) == noted


def test_another_headroom_has_its_own_band() -> None:
    found = verdict(*TO_TWENTY, slow(21), settings=dataclasses.replace(SETTINGS, headroom=0.5))
    assert found.recommended_concurrency == 10
    assert not any("no whole number" in note for note in found.notes)


def saturating(capacity: int, *concurrencies: int) -> list[LevelData]:
    return [passing(n, e2e_s=max(1.0, n / capacity))[0] for n in concurrencies]


GAIN = dataclasses.replace(SETTINGS, rules=Rules(max_ttft_ms=10_000))


def test_where_gain_binds_nothing_breaks() -> None:
    found = verdict(*saturating(16, 1, 2, 5, 10, 13, 14, 19, 20, 27, 50), settings=GAIN)
    assert found.binding == "gain"
    assert found.measured_max_concurrency == pytest.approx(1.18 * 16, rel=0.06)
    assert found.gain_line is not None
    assert found.gain_line.low <= found.gain_line.concurrency <= found.gain_line.high
    assert "nothing breaks" in found.claim


def test_the_knee_is_shown_even_where_the_rule_is_off() -> None:
    found = verdict(*saturating(16, 1, 2, 5, 10, 20, 50), settings=SETTINGS)
    assert found.binding == "ladder"
    assert found.gain_line is not None
    assert found.gain_line.concurrency < 50


def test_efficiency_and_peak() -> None:
    found = verdict(*saturating(16, 1, 2, 5, 10, 20, 50))
    assert found.best_efficiency is not None
    assert found.best_efficiency.rps_per_slot == pytest.approx(1.0)
    assert found.best_efficiency.concurrency <= 10
    assert found.peak_throughput_rps == pytest.approx(16.0)


def test_the_throughput_at_the_recommended_level_is_its_own() -> None:
    found = verdict(*saturating(16, 1, 2, 5, 10, 15, 20), slow(21))
    assert found.recommended_throughput_rps == pytest.approx(15.0)


def test_void_levels_are_shown_but_add_nothing() -> None:
    found = verdict(*TO_TWENTY[:-1], late(20, 0.3), TO_TWENTY[-1], slow(21))
    assert "20 held: n = 200," in found.claim
    assert [row.verdict for row in found.levels if row.concurrency == 20] == [Verdict.INVALID, Verdict.PASS]


# -- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_has_every_figure_of_the_contract() -> None:
    data = level(
        10,
        waves=52,
        ttft_s=(0.1, 0.2),
        failed=[Outcome.HTTP_ERROR] * 2,
        server=ServerFigures(kv_use=0.4, client_cpu=0.3),
    )
    row = verdict(data).levels[0]
    assert (row.ordinal, row.kind, row.concurrency, row.requests) == (1, LevelKind.LADDER, 10, 500)
    assert (row.success_rate, row.error_rate) == (pytest.approx(0.996), pytest.approx(0.004))
    assert row.failures == {"http_error": 2}
    assert row.mean_ttft_ms == pytest.approx(150, abs=1)
    assert (row.p50_ttft_ms, row.p99_ttft_ms) == (pytest.approx(150, abs=51), pytest.approx(200))
    assert (row.mean_e2el_ms, row.p99_e2el_ms) == (pytest.approx(1000), pytest.approx(1000))
    assert row.throughput_rps == pytest.approx(9.96, rel=0.01)
    assert row.server == {"kv_use": 0.4}
    assert row.client.cpu == 0.3
    names = msgspec.to_builtins(row).keys()
    assert {"mean_itl_ms", "p99_itl_ms", "output_tps", "p95_e2el_ms", "reason", "rule"} <= names


def test_a_quantile_among_the_failures_is_null() -> None:
    row = verdict(level(10, failed=[Outcome.TIMEOUT] * 5)).levels[0]
    assert row.p99_ttft_ms is None
    assert row.p50_ttft_ms is not None
    assert b"Infinity" not in msgspec.json.encode(row)
    assert b"NaN" not in msgspec.json.encode(verdict(level(10, failed=[Outcome.REFUSED] * 100)))


def test_a_level_that_was_stopped_has_no_throughput_and_says_why() -> None:
    stopped = replace_meta(refusing(50), stopped_early="too many failed")
    row = verdict(*TO_TWENTY, stopped).levels[-1]
    assert (row.verdict, row.rule, row.stopped_early, row.throughput_rps) == (Verdict.FAIL, "success", True, None)


# -- limits.toml ----------------------------------------------------------------------------------------------------


def limits(found: RunBook, timeout_s: float | None = 120.0) -> LimitsFile:
    file = limits_of(found.verdict(), found.levels, found.settings, SUBJECT, timeout_s, NOW)
    assert file is not None
    return file


def test_the_queue_follows_from_the_recommended_level() -> None:
    """X(M) = 15/s, W = 1 s − 0.1 s: 13 may wait, for W + 2.33·√13/15 s."""
    file = limits(book(*TO_TWENTY, slow(21)))
    assert file.limits == Limits(max_concurrency=15, max_queue=13, queue_timeout_s=1.46, request_timeout_s=120.0)


@pytest.mark.parametrize(
    ("rules", "more", "max_queue"),
    [
        (Rules(min_gain=0.0, max_ttft_ms=4000), {}, 20),  # a chat model queues no more than 20
        (Rules(min_gain=0.0, max_ttft_ms=None), {}, 15),  # without a TTFT limit: X·R
        (Rules(min_gain=0.0, max_ttft_ms=4000), {"streams": False}, 15),
    ],
)
def test_the_queue_under_other_rules(rules: Rules, more: dict[str, Any], max_queue: int) -> None:
    settings = dataclasses.replace(SETTINGS, rules=rules, streams=not more)
    above = slow(21, 5.0, **more) if rules.max_ttft_ms and not more else refusing(21, **more)
    file = limits(book(*passing(1, 2, 5, 10, 15, 20, **more), above, settings=settings))
    assert file.limits.max_queue == max_queue


def test_the_queue_is_never_left_longer_than_the_request_may_take() -> None:
    file = limits(book(*TO_TWENTY, slow(21)), timeout_s=1.5)
    assert file.limits.queue_timeout_s == pytest.approx(1.5 - 1.0)


def test_limits_have_a_queue_although_the_recommended_level_moved_after_it_was_run() -> None:
    file = limits(book(*passing(1, 2, 5, 10, 14, 20), slow(21)))
    assert file.limits.max_concurrency == 15
    assert file.limits.max_queue is not None
    assert file.limits.queue_timeout_s is not None


def test_the_evidence() -> None:
    run = book(*TO_TWENTY, slow(21))
    found = run.verdict()
    evidence = limits(run).evidence
    assert evidence is not None
    assert (evidence.measured_max_concurrency, evidence.headroom, evidence.binding) == (20, 0.75, "ttft")
    assert evidence.claim == found.claim
    assert evidence.throughput_rps == pytest.approx(15.0, abs=0.001)
    assert (evidence.measured_at, evidence.expires_at) == ("2026-11-20T10:00:00Z", "2026-12-20T10:00:00Z")
    assert (evidence.model, evidence.endpoint, evidence.base_url) == ("Qwen/Qwen3-8B", "chat", "http://127.0.0.1:8001")
    assert (evidence.run, evidence.through_gate) == ("runs/one", False)
    assert [(x.concurrency, x.throughput_rps) for x in evidence.levels][:3] == [(1, 1.0), (2, 2.0), (5, 5.0)]
    assert [x.concurrency for x in evidence.levels] == [1, 2, 5, 10, 15, 20, 21]


def test_find_writes_no_quotas_and_what_it_writes_is_read_back() -> None:
    file = limits(book(*TO_TWENTY, slow(21)))
    assert file.limits.per_client is None
    assert loads(dumps(file), "limits.toml") == file


def test_a_void_level_is_no_point_of_the_curve() -> None:
    evidence = limits(book(*TO_TWENTY, late(21, 0.3), late(21, 0.3))).evidence
    assert evidence is not None
    assert 21 not in [x.concurrency for x in evidence.levels]


def test_what_was_measured_through_a_gate_says_so() -> None:
    run = book(*TO_TWENTY, slow(21))
    subject = dataclasses.replace(SUBJECT, through_gate=True)
    file = limits_of(run.verdict(), run.levels, run.settings, subject, None, NOW)
    assert file is not None
    assert file.evidence is not None
    assert file.evidence.through_gate
