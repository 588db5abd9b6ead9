"""When is a level's failure certain? Pure, over what is known at one moment, live or read back from the run folder.

A request that is still waiting counts with its age, a lower bound of its latency: to leave it out would favour the
short ones, which finish first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadstone.core.early_stop import mean_certain, mean_exceeds
from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.stats import wilson
from loadstone.core.verdict import Finding, Verdict
from loadstone.measure.rules import MAX_PREEMPTED_SHARE, SUCCESS_PROOF_REQUESTS, Rules
from loadstone.measure.steady import LevelData
from loadstone.measure.telemetry import TelemetrySample, summarise_telemetry

_CERTAINTY_MARGIN = 1.05
"""A mean that is only just certain to be over its limit would still be UNRESOLVED by its interval."""

_LEAST_OVER = 3
_MOST = 0.55
"""Of a window whose end is not known to the second."""


@dataclass(frozen=True)
class Latency:
    """A latency in ms, or its lower bound while the request is still waiting."""

    ms: float
    known: bool


@dataclass(frozen=True)
class View:
    """The judged requests at one moment."""

    concurrency: int
    planned: int
    failures: int
    latencies: dict[str, Sequence[Latency]]
    """By metric (``ttft``, ``e2el``), in send order; failed requests are left out."""


def view_of(level: LevelData) -> View:
    """The view that an early stop was decided on, from the records of the level."""
    meta = level.meta
    inside = [r for r in level.records if meta.window_start_s <= r.sent_s < meta.window_end_s]
    inside.sort(key=lambda r: r.sent_s)
    alive = [r for r in inside if r.ok or r.outcome is Outcome.CUT]
    ttft = [_ttft(r) for r in alive if not (r.ok and r.ttft_s is None)]
    e2el = [Latency(r.e2el_s * 1e3, r.ok) for r in alive]
    failures = sum(1 for r in inside if not r.ok and r.outcome not in (Outcome.CUT, Outcome.CLIENT))
    return View(meta.concurrency, meta.planned_requests, failures, {"ttft": ttft, "e2el": e2el})


def _ttft(record: RequestRecord) -> Latency:
    if record.ttft_s is not None:
        return Latency(record.ttft_s * 1e3, True)
    return Latency(record.e2el_s * 1e3, False)


def certain_failure(view: View, rules: Rules, streams: bool) -> Finding | None:
    """The first rule that this level is certain to fail, whatever the requests still to come do."""
    planned = max(view.planned, SUCCESS_PROOF_REQUESTS)
    _, best = wilson(planned - min(view.failures, planned), planned)
    if best < rules.min_success:
        limit = f"{100 * rules.min_success:g} %"
        text = f"{view.failures} of at most {planned} requests failed; success can no longer reach {limit}"
        return Finding("success", Verdict.FAIL, text)
    for rule, metric, stat, limit_ms in rules.latency(streams):
        samples = view.latencies.get(metric)
        if not samples:
            continue
        failed = _mean_fails if stat == "mean" else _quantile_fails
        if failed(samples, view, stat, limit_ms):
            return Finding(rule, Verdict.FAIL, _so_far(metric, stat, samples, limit_ms))
    return None


def certain_shortage(
    samples: Sequence[TelemetrySample], elapsed: tuple[float, float], window_s: float, planned: int, rules: Rules
) -> Finding | None:
    """The same of the server's resources, for a window that began at ``elapsed[0]`` and has come to ``elapsed[1]``.

    Both in seconds since t0; ``window_s`` is how long the window will be, for ``planned`` requests. The median of KV
    use is certain once it was over its limit for more than half of that time.
    """
    start_s, now_s = elapsed
    preempted = summarise_telemetry(samples, start_s, now_s).preemptions or 0.0
    allowed = MAX_PREEMPTED_SHARE * max(planned, SUCCESS_PROOF_REQUESTS)
    if preempted > allowed:
        text = f"{preempted:.0f} preemptions so far; {allowed:.0f} would be 1 in 100 of {planned} requests"
        return Finding("resource:preemptions", Verdict.FAIL, text)
    kv_use = [s.server.kv_use for s in samples if s.server is not None and start_s <= s.t_s < now_s]
    full = sum(1 for use in kv_use if use is not None and use >= rules.max_kv_use)
    if full and full * (now_s - start_s) > _MOST * window_s * len(kv_use):
        text = f"KV cache use at or above {100 * rules.max_kv_use:g} % for most of the level already"
        return Finding("resource:kv", Verdict.FAIL, text)
    return None


def _mean_fails(samples: Sequence[Latency], view: View, stat: str, limit_ms: float) -> bool:
    # A single hiccup may outweigh a short plan; a server that is too slow is so more than once.
    if sum(1 for sample in samples if sample.ms > limit_ms) < _LEAST_OVER:
        return False
    done = sum(sample.ms for sample in samples if sample.known)
    pending = sum(sample.ms for sample in samples if not sample.known)
    if mean_certain(done, pending, limit_ms * _CERTAINTY_MARGIN, view.planned):
        return True
    return mean_exceeds(_settled_prefix(samples, limit_ms), view.concurrency, limit_ms)


def _settled_prefix(samples: Sequence[Latency], limit_ms: float) -> list[float]:
    """Values in send order up to the first that is neither known nor already over the limit."""
    prefix = []
    for sample in samples:
        if not sample.known and sample.ms <= limit_ms:
            break
        prefix.append(sample.ms)
    return prefix


def _quantile_fails(samples: Sequence[Latency], view: View, stat: str, limit_ms: float) -> bool:
    over = sum(1 for sample in samples if sample.ms > limit_ms) + view.failures
    planned = max(view.planned, over)
    _, best = wilson(planned - over, planned)
    return best < float(stat[1:]) / 100


def _so_far(metric: str, stat: str, samples: Sequence[Latency], limit_ms: float) -> str:
    values = np.array([sample.ms for sample in samples])
    value = float(values.mean()) if stat == "mean" else float(np.quantile(values, float(stat[1:]) / 100))
    waiting = sum(1 for sample in samples if not sample.known)
    still = f", {waiting} of them still waiting" if waiting else ""
    return f"{stat} {metric.upper()} {value:.0f} ms so far over {len(samples)} requests{still} > {limit_ms:g} ms"
