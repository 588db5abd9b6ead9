"""What is known at each concurrency: all levels run there, pooled and held to the rules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadstone.core.records import Outcome
from loadstone.core.verdict import Verdict
from loadstone.measure.early import certain_failure, view_of
from loadstone.measure.rules import Judgement, Rules, Stance, judge, resource_findings
from loadstone.measure.steady import LevelData, Summary, Throughput, summarise


@dataclass(frozen=True)
class Service:
    """What a level that failed its latency was working on: its server is at its capacity, whatever else waits."""

    busy: float
    """Requests past their first token, on average; all in flight where nothing streams."""
    took_s: float
    """From there to the end."""

    @property
    def rps(self) -> float:
        """Little's law."""
        return self.busy / self.took_s


@dataclass(frozen=True)
class Point:
    """One concurrency, as the search sees it."""

    concurrency: int
    verdict: Verdict
    rule: str = ""
    """The rule that failed; empty where none did."""
    reason: str = ""
    sure: bool = True
    runs: int = 1
    full: bool = True
    """At least one run went on to its planned end, or its failure was exact."""
    requests: int = 0
    """Judged in full runs, pooled."""
    throughput: Throughput | None = None
    pressure: dict[str, float] | None = None
    """Value ÷ limit by rule, where it can be said: what the secant runs through."""
    accepted: int | None = None
    """Requests the server was working on when a refusing level ended: where its own limit seems to lie."""
    service: Service | None = None
    """Where a latency failed: a guess for the next levels, as it may rest on a level that was stopped early."""
    line_by_little: float | None = None
    """Where the latency that failed would just meet its limit, if the server were saturated already."""
    refuted: bool = False
    """Failed when it was run to confirm the answer."""
    supported: int = 0
    """Concurrency that a PASS is evidence for, the generator's own delays taken off; 0: the concurrency itself."""


def judge_level(level: LevelData, rules: Rules, stance: Stance) -> tuple[Summary, Judgement]:
    """One level by itself. Stopped early, it is judged by the evidence that stopped it."""
    summary = summarise([level])
    if level.complete:
        return summary, judge(summary, rules, stance)
    if summary.client_failures:
        return summary, judge(summary, rules, stance)
    findings = [finding for finding in resource_findings(summary, rules) if finding.verdict is Verdict.FAIL]
    certain = certain_failure(view_of(level), rules, level.meta.streams)
    if certain is not None:
        findings.insert(0 if certain.rule == "success" else len(findings), certain)
    if findings:
        first = findings[0]
        return summary, Judgement(first.verdict, first.rule, first.reason, True, findings)
    reason = f"{level.meta.stopped_early}; what was seen decides nothing under these rules"
    return summary, Judgement(Verdict.UNRESOLVED, "", reason, False, [])


def point_of(levels: Sequence[LevelData], rules: Rules) -> Point:
    """Pool all levels that were run at one concurrency, in running order."""
    runs, levels = len(levels), _warm(levels, rules)
    usable = [level for level in levels if level.complete and not _void(level, rules)]
    if usable and not _failed_early(levels[-1], rules):
        summary = summarise(usable)
        stance = Stance.CONFIRM if levels[-1].meta.kind == "confirm" else Stance.SETTLE
        judgement = judge(summary, rules, stance)
    else:
        summary, judgement = judge_level(levels[-1], rules, Stance.SETTLE)
    failed = judgement.rule if judgement.verdict is Verdict.FAIL else ""
    service = _service(levels[-1]) if failed.removeprefix("slo:") in ("ttft", "e2el") else None
    return Point(
        concurrency=summary.concurrency,
        verdict=judgement.verdict,
        rule=judgement.rule,
        reason=judgement.reason,
        sure=judgement.sure,
        runs=runs,
        full=bool(usable) or failed.split(":")[0] in ("success", "resource"),
        requests=summary.requests if usable else 0,
        throughput=summary.throughput if usable else None,
        pressure=_pressure(summary, levels[-1], rules),
        accepted=_accepted(levels[-1]) if summary.failures.get(Outcome.REFUSED) else None,
        service=service,
        line_by_little=_line_by_little(service, failed, rules.latency(summary.streams)),
        refuted=bool(failed) and levels[-1].meta.kind == "confirm",
        supported=summary.concurrency if _keeps_up(summary, rules) else summary.supported_concurrency,
    )


def _warm(levels: Sequence[LevelData], rules: Rules) -> Sequence[LevelData]:
    """Without the first level of a run where it failed and its repetition passed: it was cold, which says nothing."""
    first, *again = levels
    if not again or first.meta.ordinal != 1 or first.meta.kind == "confirm":
        return levels
    was_cold = (_verdict(first, rules), _verdict(again[0], rules)) == (Verdict.FAIL, Verdict.PASS)
    return again if was_cold else levels


def _verdict(level: LevelData, rules: Rules) -> Verdict:
    return judge_level(level, rules, Stance.SETTLE)[1].verdict


def _failed_early(level: LevelData, rules: Rules) -> bool:
    return not level.complete and _verdict(level, rules) is Verdict.FAIL


def _void(level: LevelData, rules: Rules) -> bool:
    return judge(summarise([level]), rules, Stance.SETTLE).verdict is Verdict.INVALID


def _keeps_up(summary: Summary, rules: Rules) -> bool:
    return summary.client.turnaround_share <= rules.resolution / 2


def _pressure(summary: Summary, level: LevelData, rules: Rules) -> dict[str, float]:
    pressure: dict[str, float] = {}
    view = None if level.complete else view_of(level)
    for rule, metric, stat, limit_ms in rules.latency(summary.streams):
        value_ms = summary.metrics[metric].stat(stat)[0]
        if view is not None and view.latencies.get(metric):
            samples = view.latencies[metric]
            value_ms = sum(sample.ms for sample in samples) / len(samples)
        if math.isfinite(value_ms) and value_ms > 0:
            pressure[rule] = value_ms / limit_ms
    if summary.server.kv_use:
        pressure["resource:kv"] = summary.server.kv_use / rules.max_kv_use
    return pressure


def _service(level: LevelData) -> Service | None:
    """None where too few requests ended in the window."""
    start_s, end_s = level.meta.window_start_s, level.meta.window_end_s
    alive = [r for r in level.records if r.outcome in (Outcome.OK, Outcome.CUT)]
    begun = [(r.sent_s + (r.ttft_s or 0.0), r) for r in alive if r.ttft_s is not None or not level.meta.streams]
    took_s = [r.end_s - first_s for first_s, r in begun if r.ok and start_s <= r.end_s < end_s]
    if len(took_s) < 2 or sum(took_s) <= 0:
        return None
    busy_s = sum(max(0.0, min(r.end_s, end_s) - max(first_s, start_s)) for first_s, r in begun)
    return Service(busy_s / (end_s - start_s), sum(took_s) / len(took_s))


def _line_by_little(service: Service | None, rule: str, limits: Sequence[tuple[str, str, str, float]]) -> float | None:
    """N = X·R (Little) with R at the limit: the wait for the first token that is allowed, and the service after it."""
    if service is None:
        return None
    limit_s = next(limit_ms for name, _, _, limit_ms in limits if name == rule) / 1e3
    return service.rps * (limit_s + (service.took_s if rule.endswith("ttft") else 0.0))


def _accepted(level: LevelData) -> int:
    """Requests in flight at the window's end that did not fail."""
    end_s = level.meta.window_end_s
    alive = (Outcome.OK, Outcome.CUT)
    return sum(1 for r in level.records if r.sent_s < end_s <= r.end_s and r.outcome in alive)
