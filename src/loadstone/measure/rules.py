"""The rules that a level is held to, in their order; the first that fails is the one that binds.

success → resource:<name> → slo:<metric> → ttft / e2el. The fourth rule of the progressive method, the throughput gain,
is a property of the whole curve and lives in ``measure.curve``. Before all of them stands the question whether the
client's own error could flip the verdict.

A threshold is UNRESOLVED while its interval contains the limit. A level below the line needs only "not shown to fail";
the answer itself is refuted only by a significant violation, since the true line can never be proven from one side.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadstone.core.errors import UsageError
from loadstone.core.records import Outcome
from loadstone.core.stats import Z_95, needed_for_mean, quantile_interval, wilson
from loadstone.core.verdict import Finding, Verdict
from loadstone.measure.steady import Z_ONE_SIDED, Metric, Summary, scatters

SUCCESS_PROOF_REQUESTS = 60
"""Zero failures prove a success rate of 95 % only from n = 59."""
QUANTILE_REQUESTS = 10
"""Judged for each slot, at least, where a quantile is held to a limit."""
MAX_EXTENSION = 3
"""An unresolved level may grow to this many times its plan."""
MAX_TURNAROUND_SHARE = 0.10
MAX_RUN_QUEUE_WAIT = 0.50
MAX_CPU_WITHOUT_STAMPS = 0.80
MAX_PREEMPTED_SHARE = 0.01
MIN_HOST_MEMORY_FREE = 0.02

SLO_METRICS = ("ttft", "tpot", "itl", "e2el")
SLO_STATS = ("mean", "p50", "p90", "p95", "p99")


class Stance(enum.Enum):
    """What a level is run for: how much must be shown before it counts."""

    EXPLORE = "explore"
    """Below or around the line: UNRESOLVED asks for more requests."""
    SETTLE = "settle"
    """No more requests are to be had: the point value decides, and is marked as not sure."""
    CONFIRM = "confirm"
    """The answer's own level: refuted only by a significant violation, one-sided 5 %."""


@dataclass(frozen=True)
class Slo:
    """``metric:stat:limit_ms``, such as ``tpot:p99:50``."""

    metric: str
    stat: str
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Raises UsageError where ``text`` is not of the form ``metric:stat:limit_ms``."""
        parts = text.split(":")
        try:
            slo = cls(parts[0], parts[1], float(parts[2]))
        except (IndexError, ValueError):
            slo = cls("", "", 0.0)
        known = slo.metric in SLO_METRICS and slo.stat in SLO_STATS
        if len(parts) != 3 or not known or not 0 < slo.limit_ms < math.inf:
            form = f"{'|'.join(SLO_METRICS)}:{'|'.join(SLO_STATS)}:milliseconds"
            raise UsageError(f"--slo {text!r} cannot be read: give {form}, for example tpot:p99:50")
        return slo

    def __str__(self) -> str:
        return f"{self.metric}:{self.stat}:{self.limit_ms:g}"


@dataclass(frozen=True)
class Rules:
    """Where a level fails. Latency limits in ms, None = no such rule."""

    min_success: float = 0.95
    max_ttft_ms: float | None = 1000.0
    ttft_stat: str = "mean"
    max_e2el_ms: float | None = None
    min_gain: float = 0.2
    """A doubling must raise throughput by this share; 0 switches the rule off."""
    max_kv_use: float = 0.95
    max_waiting: int | None = None
    max_gpu_memory: float | None = None
    slos: tuple[Slo, ...] = ()
    resolution: float = 0.05

    def latency(self, streams: bool) -> list[tuple[str, str, str, float]]:
        """(rule, metric, stat, limit_ms) in their order. Where nothing streams the TTFT rule judges E2EL."""
        limits = [(f"slo:{slo.metric}", slo.metric, slo.stat, slo.limit_ms) for slo in self.slos]
        e2el_limit_ms = self.max_e2el_ms
        if streams and self.max_ttft_ms is not None:
            limits.append(("ttft", "ttft", self.ttft_stat, self.max_ttft_ms))
        elif not streams and e2el_limit_ms is None:
            e2el_limit_ms = self.max_ttft_ms
        if e2el_limit_ms is not None:
            limits.append(("e2el", "e2el", self.ttft_stat if not streams else "mean", e2el_limit_ms))
        return limits


@dataclass(frozen=True)
class Judgement:
    """All findings of a level and the one that decides."""

    verdict: Verdict
    rule: str
    reason: str
    sure: bool
    findings: list[Finding]


def judge(summary: Summary, rules: Rules, stance: Stance = Stance.EXPLORE) -> Judgement:
    """Hold a level to the rules. Pure: the same records and rules give the same judgement."""
    success = _success(summary, rules, stance)
    voided = _voided(summary)
    if voided is not None and not _failed_by_its_own_word(summary, rules):
        return Judgement(Verdict.INVALID, "client", voided.reason, True, [voided])
    if summary.requests == 0 and success.verdict is Verdict.UNRESOLVED:
        return Judgement(Verdict.UNRESOLVED, success.rule, success.reason, False, [success])
    findings = [success, *resource_findings(summary, rules)]
    for rule, metric, stat, limit_ms in rules.latency(summary.streams):
        findings.append(_threshold(rule, summary.metrics[metric], stat, limit_ms, stance))
    return _decide(findings, summary, rules, stance)


def _decide(findings: Sequence[Finding], summary: Summary, rules: Rules, stance: Stance) -> Judgement:
    failed = next((f for f in findings if f.verdict is Verdict.FAIL), None)
    open_ones = [f for f in findings if f.verdict is Verdict.UNRESOLVED]
    every = list(findings)
    if failed is not None:
        return Judgement(Verdict.FAIL, failed.rule, failed.reason, True, every)
    if not open_ones:
        closest = _closest(summary, rules) or findings[0].reason
        return Judgement(Verdict.PASS, "", closest, True, every)
    if stance is Stance.EXPLORE:
        return Judgement(Verdict.UNRESOLVED, open_ones[0].rule, open_ones[0].reason, False, every)
    refuted = next((f for f in open_ones if stance is Stance.SETTLE and not _point_holds(f, summary, rules)), None)
    if refuted is not None:
        return Judgement(Verdict.FAIL, refuted.rule, refuted.reason, False, every)
    return Judgement(Verdict.PASS, "", open_ones[0].reason, False, every)


def _closest(summary: Summary, rules: Rules) -> str:
    """The latency rule that comes nearest to its limit, in words: what a PASS is worth saying."""
    shares = []
    for _, metric, stat, limit_ms in rules.latency(summary.streams):
        value, low, high = summary.metrics[metric].stat(stat)
        if math.isfinite(value):
            shares.append((value / limit_ms, f"{_latency(metric, stat, value, low, high)} ≤ {limit_ms:g} ms"))
    return max(shares)[1] if shares else ""


def _point_holds(finding: Finding, summary: Summary, rules: Rules) -> bool:
    if finding.rule == "success":
        return summary.success_rate >= rules.min_success
    for rule, metric, stat, limit_ms in rules.latency(summary.streams):
        if rule == finding.rule and not summary.metrics[metric].stat(stat)[0] <= limit_ms:
            return False
    return True


def _success(summary: Summary, rules: Rules, stance: Stance) -> Finding:
    limit = rules.min_success
    shown_low, shown_high = summary.success_interval()
    proven, _ = summary.success_interval(Z_ONE_SIDED)
    best = summary.success_interval(Z_ONE_SIDED if stance is Stance.CONFIRM else Z_95)[1]
    rate = (
        f"success {_percent(summary.success_rate)} [{100 * shown_low:.1f}–{100 * shown_high:.1f}] of {summary.requests}"
    )
    if summary.failures:
        rate += f" ({', '.join(f'{count} {name}' for name, count in sorted(summary.failures.items()))})"
    if 1 - summary.hung_share < limit:
        hung = f"requests that hung held {100 * summary.hung_share:.1f} % of the slots' time"
        return Finding("success", Verdict.FAIL, f"{hung}; {100 * (1 - limit):g} % is allowed")
    if summary.requests == 0:
        return Finding("success", Verdict.UNRESOLVED, "no request was judged")
    if summary.success_rate < limit and (stance is Stance.SETTLE or best < limit):
        return Finding("success", Verdict.FAIL, f"{rate} < {100 * limit:g} %")
    if not summary.failures or proven >= limit:
        return Finding("success", Verdict.PASS, rate)
    return Finding("success", Verdict.UNRESOLVED, f"{rate}, limit {100 * limit:g} %")


def _failed_by_its_own_word(summary: Summary, rules: Rules) -> bool:
    """Status, reset and refused connection are the server's evidence whatever the client's state; a time-out is not."""
    told = sum(count for name, count in summary.failures.items() if name != Outcome.TIMEOUT)
    _, best = wilson(summary.requests - told, summary.requests, Z_95, summary.success_effect)
    return best < rules.min_success


def _voided(summary: Summary) -> Finding | None:
    """The client's own failures: whatever the figures say, they say it of this machine."""
    client = summary.client
    reason = None
    if summary.client_failures:
        reason = f"{summary.client_failures} requests failed on this machine (open files, ports, buffers)"
    elif client.turnaround_share > MAX_TURNAROUND_SHARE:
        reason = f"slots stood empty {100 * client.turnaround_share:.0f} % of the time waiting for the generator"
    elif client.run_queue_wait > MAX_RUN_QUEUE_WAIT:
        reason = f"the generator waited for a core {100 * client.run_queue_wait:.0f} % of the time"
    elif client.cpu > MAX_CPU_WITHOUT_STAMPS and not client.kernel_stamps:
        reason = f"the generator used {100 * client.cpu:.0f} % of a core and has no kernel time-stamps"
    return None if reason is None else Finding("client", Verdict.INVALID, reason)


def resource_findings(summary: Summary, rules: Rules) -> list[Finding]:
    server = summary.server
    checks: list[tuple[str, bool, str]] = []
    if server.kv_use is not None:
        kv = f"median KV cache use {100 * server.kv_use:.1f} % (limit {100 * rules.max_kv_use:g} %)"
        checks.append(("kv", server.kv_use >= rules.max_kv_use, kv))
        preempted = f"{100 * summary.preempted_share:.1f} preemptions per 100 requests (limit 1)"
        checks.append(("preemptions", summary.preempted_share > MAX_PREEMPTED_SHARE, preempted))
    if server.restarted:
        checks.append(("restart", True, "the engine restarted during the level"))
    if summary.loopback and server.host_memory_free is not None:
        free = f"free memory of this host fell to {100 * server.host_memory_free:.1f} % (limit 2 %)"
        checks.append(("memory", server.host_memory_free < MIN_HOST_MEMORY_FREE, free))
    if rules.max_gpu_memory is not None and server.device_memory is not None and not server.preallocates:
        gpu = f"GPU memory reached {100 * server.device_memory:.1f} % (limit {100 * rules.max_gpu_memory:g} %)"
        checks.append(("gpu_memory", server.device_memory > rules.max_gpu_memory, gpu))
    if rules.max_waiting is not None and server.waiting is not None:
        waiting = f"median {server.waiting:g} requests waiting inside the engine (limit {rules.max_waiting})"
        checks.append(("waiting", server.waiting > rules.max_waiting, waiting))
    return [
        Finding(f"resource:{name}", Verdict.FAIL if failed else Verdict.PASS, text) for name, failed, text in checks
    ]


def _threshold(rule: str, metric: Metric, stat: str, limit_ms: float, stance: Stance) -> Finding:
    value, low, high = metric.stat(stat)
    if math.isnan(value):
        return Finding(
            rule, Verdict.PASS, f"no reply has a {metric_label(rule)}: nothing to hold against {limit_ms:g} ms"
        )
    name = rule.removeprefix("slo:")
    text = _latency(name, stat, value, low, high)
    lower = low if stance is not Stance.CONFIRM else _one_sided(metric, stat)[0]
    if lower > limit_ms:
        return Finding(rule, Verdict.FAIL, f"{text} > {limit_ms:g} ms")
    # An infinite upper bound of a quantile only says that there are few requests: not shown to fail.
    explored = high if math.isfinite(high) else value
    shown = _one_sided(metric, stat)[1] if stance is Stance.CONFIRM else explored
    if shown <= limit_ms:
        return Finding(rule, Verdict.PASS, f"{text} ≤ {limit_ms:g} ms")
    return Finding(rule, Verdict.UNRESOLVED, f"{text}, limit {limit_ms:g} ms")


def _one_sided(metric: Metric, stat: str) -> tuple[float, float]:
    """Bounds that the true value passes with 5 % each."""
    if stat == "mean":
        margin = Z_ONE_SIDED * metric.estimate.se
        return metric.mean_ms - margin, metric.mean_ms + margin
    return quantile_interval(metric.values_ms, float(stat[1:]) / 100, metric.infinite, Z_ONE_SIDED)


def metric_label(rule: str) -> str:
    """``slo:ttft`` → TTFT."""
    return rule.removeprefix("slo:").upper()


def _latency(metric: str, stat: str, value: float, low: float, high: float) -> str:
    label = f"{stat} {metric.upper()}"
    if stat == "mean":
        return (
            f"{label} {_ms(value)} ± {_ms((high - low) / 2)} ms"
            if math.isfinite(high - low)
            else f"{label} {_ms(value)} ms"
        )
    return f"{label} {_ms(value)} ms [{_ms(low)}–{_ms(high)}]"


def _ms(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "0"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def requests_for(stance: Stance, concurrency: int, base: int, rules: Rules, streams: bool) -> int:
    """Requests to judge at first: ``base``, raised at the answer to what its rules need."""
    if stance is not Stance.CONFIRM:
        return base
    needed = [base, SUCCESS_PROOF_REQUESTS]
    for _, _, stat, _ in rules.latency(streams):
        if stat != "mean":
            # The rule of three: from this many on, the largest of them bounds the quantile at 95 %.
            needed += [QUANTILE_REQUESTS * concurrency, math.ceil(3 / (1 - float(stat[1:]) / 100))]
    return max(needed)


def undecided(summary: Summary, judgement: Judgement, rules: Rules) -> Finding | None:
    """The finding that more requests would settle: of an UNRESOLVED level, or of a confirmation that holds only
    because its violation is not significant yet."""
    open_ones = [finding for finding in judgement.findings if finding.verdict is Verdict.UNRESOLVED]
    if judgement.verdict is Verdict.UNRESOLVED:
        return next(iter(open_ones), None)
    if judgement.verdict is Verdict.PASS:
        return next((finding for finding in open_ones if not _point_holds(finding, summary, rules)), None)
    return None


def loose_end(summary: Summary, judgement: Judgement) -> str:
    """Why a level that passed is worth the most requests it may have; empty where those that it has will do."""
    if judgement.verdict is not Verdict.PASS:
        return ""
    if not judgement.sure:
        return f"{judgement.reason}: not sure"
    return "throughput scatters" if scatters(summary) else ""


def extension(summary: Summary, finding: Finding, rules: Rules, planned: int, steepness: float) -> int:
    """Requests still to judge before an open finding is settled by its point value; 0 when it has had its share.

    ``steepness`` is b = dln(latency)/dlnN here: where a latency climbs steeply, little precision fixes the line.
    """
    most = MAX_EXTENSION * max(planned, SUCCESS_PROOF_REQUESTS if finding.rule == "success" else 0)
    target = most
    for rule, metric, stat, _ in rules.latency(summary.streams):
        if rule == finding.rule and stat == "mean":
            target = needed_for_mean(summary.metrics[metric].cv, rules.resolution, max(1.0, steepness))
            if summary.requests >= target:
                return 0
    target = min(max(target, summary.requests + summary.concurrency), most)
    return max(0, target - summary.requests)
