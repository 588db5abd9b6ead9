"""The answer of a run, recomputed from its levels alone: ``verdict.json`` and what ``limits.toml`` says of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from loadstone.core.limits import (
    HEADROOM_BAND,
    Evidence,
    EvidenceLevel,
    Limits,
    LimitsFile,
    derive_limits,
    recommend,
)
from loadstone.core.settings import RuleSettings
from loadstone.core.verdict import NOT_ENDED, BestEfficiency, GainLine, LevelKind, LevelRow, RunVerdict, Verdict
from loadstone.measure.curve import Curve
from loadstone.measure.points import Point, judge_level
from loadstone.measure.rules import Judgement, Stance
from loadstone.measure.search import Ask, Bracket, Candidate, SearchSettings, bracket_of, candidate_of
from loadstone.measure.steady import LevelData, Metric, Summary, summarise

EXPIRES_AFTER = timedelta(days=30)


@dataclass(frozen=True)
class Subject:
    """What was measured, for the evidence."""

    model: str
    endpoint: str
    base_url: str
    run: str
    through_gate: bool = False


def row_of(level: LevelData, settings: SearchSettings) -> LevelRow:
    """One level as it stands in ``verdict.json``."""
    stance = Stance.CONFIRM if level.meta.kind is LevelKind.CONFIRM else Stance.SETTLE
    summary, judgement = judge_level(level, settings.rules, stance)
    return _row(level, summary, judgement)


def _row(level: LevelData, summary: Summary, judgement: Judgement) -> LevelRow:
    throughput = summary.throughput
    ttft_margin = 1.96 * summary.ttft.estimate.se
    return LevelRow(
        ordinal=level.meta.ordinal,
        kind=level.meta.kind,
        concurrency=summary.concurrency,
        verdict=judgement.verdict,
        rule=judgement.rule,
        reason=judgement.reason,
        requests=summary.requests,
        success_rate=summary.success_rate,
        error_rate=1 - summary.success_rate if summary.requests else 0.0,
        throughput_rps=throughput.rps if throughput else None,
        throughput_low_rps=throughput.low_rps if throughput else None,
        throughput_high_rps=throughput.high_rps if throughput else None,
        output_tps=summary.output_tps,
        mean_ttft_ms=_finite(summary.ttft.mean_ms),
        ttft_low_ms=_finite(summary.ttft.mean_ms - ttft_margin),
        ttft_high_ms=_finite(summary.ttft.mean_ms + ttft_margin),
        p50_ttft_ms=_quantile(summary.ttft, 0.5),
        p95_ttft_ms=_quantile(summary.ttft, 0.95),
        p99_ttft_ms=_quantile(summary.ttft, 0.99),
        mean_e2el_ms=_finite(summary.e2el.mean_ms),
        p50_e2el_ms=_quantile(summary.e2el, 0.5),
        p95_e2el_ms=_quantile(summary.e2el, 0.95),
        p99_e2el_ms=_quantile(summary.e2el, 0.99),
        mean_tpot_ms=_finite(summary.tpot.mean_ms),
        p99_tpot_ms=_quantile(summary.tpot, 0.99),
        mean_itl_ms=_finite(summary.itl.mean_ms),
        p50_itl_ms=_quantile(summary.itl, 0.5),
        p95_itl_ms=_quantile(summary.itl, 0.95),
        p99_itl_ms=_quantile(summary.itl, 0.99),
        no_content=summary.no_content,
        failures=summary.failures,
        sure=judgement.sure,
        stopped_early=not level.complete,
        duration_s=summary.duration_s,
        server=summary.server.as_row(),
        client=summary.client,
        findings=judgement.findings,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quantile(metric: Metric, q: float) -> float | None:
    """Null without values, and where the quantile falls among the failures."""
    return _finite(metric.quantile_ms(q)) if metric.values_ms.size else None


def verdict_of(
    points: Sequence[Point],
    rows: list[LevelRow],
    levels: Sequence[LevelData],
    settings: SearchSettings,
    following: Ask | None,
) -> RunVerdict:
    """The whole of ``verdict.json``; ``rows`` and ``levels`` in running order, ``points`` by concurrency.

    ``levels`` is empty where only figures are known; ``following`` is what a search would run next, None at its end.
    """
    bracket = bracket_of(points)
    candidate = candidate_of(points, settings)
    measured = _measured(candidate, points)
    recommended = None if measured is None else recommend(measured, settings.headroom)
    usable = _usable(levels, rows)
    return RunVerdict(
        measured_max_concurrency=measured,
        recommended_concurrency=recommended,
        half_of_failing=_half_of_failing(points, settings),
        binding=_binding(candidate, bracket),
        claim=_claim(candidate, bracket, points, usable, settings, following),
        best_efficiency=_best_efficiency(points),
        gain_line=_gain_line(candidate, points, settings),
        non_monotone=_non_monotone(points, bracket),
        peak_throughput_rps=max((p.throughput.rps for p in points if p.throughput), default=None),
        levels=rows,
        sure=candidate is not None
        and following is None
        and _is_sure(candidate, bracket, points, settings.rules.min_gain, settings.rules.resolution),
        recommended_throughput_rps=_throughput_at(recommended, points),
        notes=_notes(measured, recommended, settings, following),
    )


def _measured(candidate: Candidate | None, points: Sequence[Point]) -> int | None:
    """A generator that kept slots waiting has loaded the server with less than it was told to."""
    if candidate is None:
        return None
    here = _at(candidate.concurrency, points)
    return candidate.concurrency if here is None else min(candidate.concurrency, here.supported)


def _at(concurrency: int | None, points: Sequence[Point]) -> Point | None:
    return next((p for p in points if p.concurrency == concurrency), None)


def _binding(candidate: Candidate | None, bracket: Bracket) -> str:
    if candidate is not None:
        return candidate.binding
    if bracket.high is None:
        return ""
    return "client" if bracket.high.verdict is Verdict.INVALID else bracket.high.rule


def _usable(levels: Sequence[LevelData], rows: Sequence[LevelRow]) -> list[LevelData]:
    """Levels that ran to their end and were not voided; ``rows`` are theirs. None where only figures are known."""
    pairs = zip(levels, rows, strict=bool(levels))
    return [level for level, row in pairs if level.complete and row.verdict is not Verdict.INVALID]


def _half_of_failing(points: Sequence[Point], settings: SearchSettings) -> int | None:
    """Of the lowest level of the ladder whose failure stands: one that passed when it was run again is none."""
    failing = [p.concurrency for p in points if p.verdict is Verdict.FAIL and p.concurrency in settings.ladder]
    return failing[0] // 2 if failing else None


def _best_efficiency(points: Sequence[Point]) -> BestEfficiency | None:
    known = [(p.throughput.rps / p.concurrency, p.concurrency) for p in points if p.throughput]
    if not known:
        return None
    rps_per_slot, concurrency = max(known)
    return BestEfficiency(concurrency, rps_per_slot)


def _gain_line(candidate: Candidate | None, points: Sequence[Point], settings: SearchSettings) -> GainLine | None:
    estimate = candidate.gain if candidate else None
    if estimate is None:
        # Shown even where the rule is off: the knee is worth knowing.
        estimate = Curve.of(points).gain_under_line(settings.rules.min_gain or RuleSettings.min_gain)
    if estimate is None or not estimate.reached:
        return None
    # Where nothing bounds it from above, it is at least not shown to lie beyond what was run.
    high = estimate.high if math.isfinite(estimate.high) else max(estimate.line, points[-1].concurrency)
    return GainLine(max(1, round(estimate.line)), max(1, math.floor(estimate.low)), math.ceil(high))


def _non_monotone(points: Sequence[Point], bracket: Bracket) -> bool:
    if bracket.high is None or bracket.high.verdict is not Verdict.FAIL:
        return False
    return any(p.verdict is Verdict.PASS and p.concurrency > bracket.high.concurrency for p in points)


def _is_sure(
    candidate: Candidate, bracket: Bracket, points: Sequence[Point], min_gain: float, resolution: float
) -> bool:
    here = _at(candidate.concurrency, points)
    if here is None or not here.sure:
        return False
    if candidate.binding in ("gain", "ladder", "client"):
        return True
    gain = Curve.of(points).gain_under_line(min_gain)
    if gain is not None and gain.low * (1 + resolution) < candidate.concurrency:
        # Noise leaves room for a gain line below: that this rule binds is not shown.
        return False
    return bracket.high is None or bracket.high.sure


def _throughput_at(concurrency: int | None, points: Sequence[Point]) -> float | None:
    here = _at(concurrency, points)
    return here.throughput.rps if here is not None and here.throughput else None


def _claim(
    candidate: Candidate | None,
    bracket: Bracket,
    points: Sequence[Point],
    levels: Sequence[LevelData],
    settings: SearchSettings,
    following: Ask | None,
) -> str:
    """What was seen, in one sentence; never "95 % sure"."""
    if candidate is None:
        if bracket.high is None:
            return "nothing was judged"
        return f"{bracket.high.concurrency} {_fell(bracket.high)}: {bracket.high.reason}; nothing below it was run"
    parts = [_held(candidate, points, levels, settings)]
    gain = _gain_line(candidate, points, settings)
    if candidate.gain is not None and gain is not None:
        least = f"a doubling gains less than {100 * settings.rules.min_gain:g} %"
        parts.append(f"{least} beyond {gain.concurrency} [{gain.low}–{gain.high}]; nothing breaks there")
    elif bracket.high is not None:
        parts.append(f"{bracket.high.concurrency} {_fell(bracket.high)}: {bracket.high.reason}")
    elif following is None:
        parts.append("no level of the ladder failed: the line is above it")
    else:
        parts.append("no level that was run failed")
    unresolved = [p for p in points if p.verdict is Verdict.UNRESOLVED and p.concurrency > candidate.concurrency]
    if unresolved and candidate.gain is None:
        parts.append(_unresolved(unresolved, candidate))
    return "; ".join(parts)


def _fell(point: Point) -> str:
    return "could not be judged" if point.verdict is Verdict.INVALID else "failed"


def _held(candidate: Candidate, points: Sequence[Point], levels: Sequence[LevelData], settings: SearchSettings) -> str:
    here = _at(candidate.concurrency, points)
    same = [x for x in levels if x.meta.concurrency == candidate.concurrency]
    if here is None:
        return f"{candidate.concurrency} lies between levels that held"
    if not same:
        return f"{candidate.concurrency} held: n = {here.requests}, {here.reason}"
    summary = summarise(same)
    low, high = summary.success_interval()
    success = f"success {100 * summary.success_rate:.4g} % [{100 * low:.1f}–{100 * high:.1f}]"
    seen = f"{candidate.concurrency} held: n = {summary.requests}, {success}"
    return f"{seen}, {here.reason}" if settings.rules.latency(summary.streams) and here.reason else seen


def _unresolved(unresolved: Sequence[Point], candidate: Candidate) -> str:
    names = ", ".join(str(p.concurrency) for p in unresolved)
    more = 10 * max(p.concurrency for p in unresolved)
    return f"unresolved between {candidate.concurrency} and {names}; about {more} more requests would settle it"


def _notes(measured: int | None, recommended: int | None, settings: SearchSettings, following: Ask | None) -> list[str]:
    notes: list[str] = []
    if following is not None:
        why = f" ({following.why})" if following.why else ""
        notes.append(f"{NOT_ENDED}: {following.concurrency} would be run next{why}")
    if measured is None or recommended is None:
        return notes
    low, high = settings.headroom - HEADROOM_BAND, min(settings.headroom + HEADROOM_BAND, 1.0)
    if not low * measured - 1e-9 <= recommended <= high * measured + 1e-9:
        between = f"{100 * low:.0f} % and {100 * high:.0f} %"
        notes.append(f"no whole number lies between {between} of {measured}: {recommended} is recommended")
    return notes


def limits_of(
    verdict: RunVerdict,
    levels: Sequence[LevelData],
    settings: SearchSettings,
    subject: Subject,
    request_timeout_s: float | None,
    now: datetime,
) -> LimitsFile | None:
    """What ``limits.toml`` says; None where nothing passed."""
    measured, recommended = verdict.measured_max_concurrency, verdict.recommended_concurrency
    if measured is None or recommended is None:
        return None
    usable = [level for level in _usable(levels, verdict.levels) if level.meta.concurrency <= measured]
    limits = Limits(max_concurrency=recommended, request_timeout_s=request_timeout_s)
    if usable:
        # The recommended level itself, or, where the line moved after that was run, the nearest: never no queue bound.
        nearest = min((level.meta.concurrency for level in usable), key=lambda n: abs(math.log(n / recommended)))
        same = [level for level in usable if level.meta.concurrency == nearest]
        limits = _derived(summarise(same), recommended, settings, request_timeout_s)
    evidence = Evidence(
        measured_max_concurrency=measured,
        headroom=settings.headroom,
        binding=verdict.binding,
        claim=verdict.claim,
        throughput_rps=_rounded(verdict.recommended_throughput_rps),
        measured_at=_rfc3339(now),
        expires_at=_rfc3339(now + EXPIRES_AFTER),
        model=subject.model,
        endpoint=subject.endpoint,
        base_url=subject.base_url,
        through_gate=subject.through_gate,
        run=subject.run,
        levels=_evidence_levels(verdict.levels),
    )
    return LimitsFile(limits=limits, evidence=evidence)


def _derived(summary: Summary, recommended: int, settings: SearchSettings, timeout_s: float | None) -> Limits:
    throughput_rps = summary.throughput.rps if summary.throughput else 0.0
    latency_s = summary.e2el.mean_ms / 1e3
    limit_ms = settings.rules.max_ttft_ms
    if summary.streams and limit_ms is not None and summary.ttft.values_ms.size:
        wait_s = (limit_ms - summary.ttft.stat(settings.rules.ttft_stat)[0]) / 1e3
    else:
        wait_s = latency_s
    p99_ms = summary.e2el.quantile_ms(0.99)
    p99_s = p99_ms / 1e3 if math.isfinite(p99_ms) else latency_s
    return derive_limits(recommended, throughput_rps, wait_s, p99_s, chat=summary.streams, request_timeout_s=timeout_s)


def _evidence_levels(rows: Sequence[LevelRow]) -> list[EvidenceLevel]:
    """The measured curve: the last run at each concurrency that has a throughput and was not voided."""
    valid = (row for row in rows if row.verdict is not Verdict.INVALID)
    latest = {row.concurrency: row for row in valid if row.throughput_rps is not None}
    return [
        EvidenceLevel(
            concurrency=row.concurrency,
            throughput_rps=_rounded(row.throughput_rps) or 0.0,
            ttft_p50_ms=_rounded(row.p50_ttft_ms),
            ttft_p99_ms=_rounded(row.p99_ttft_ms),
            itl_p50_ms=_rounded(row.p50_itl_ms),
            e2el_mean_ms=_rounded(row.mean_e2el_ms),
        )
        for _, row in sorted(latest.items())
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
