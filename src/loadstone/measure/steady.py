"""From records to figures: the steady-state window of a level, summarised once, with an error for each figure.

Judged are the requests *sent* in the window [w0, w1), each followed to its end. Throughput is over the window itself,
fractional, successes only. Several levels at one concurrency are pooled, each with its own window.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.stats import (
    Z_95,
    MeanEstimate,
    design_effect,
    fractional_throughput,
    mean_se,
    quantile,
    quantile_interval,
    throughput_se,
    wilson,
)
from loadstone.core.verdict import ClientFigures, LevelKind
from loadstone.measure.telemetry import ServerFigures

STEADY_WAVES = 3
"""Fewer request times than this in a window and its throughput is not used."""
MAX_SCATTER = 0.01
"""Standard error of a throughput, relative, from which on more requests are worth their time."""
Z_ONE_SIDED = 1.645
_OURS = frozenset({Outcome.CUT, Outcome.CLIENT})


class LevelMeta(msgspec.Struct, frozen=True):
    """What is known of a level beside its records: the ``loadstone`` object of ``result.json``. Seconds since t0."""

    ordinal: int
    kind: LevelKind
    concurrency: int
    planned_requests: int
    window_start_s: float
    window_end_s: float
    stopped_early: str = ""
    """Why the level was ended before its plan; empty where it ran in full."""
    started_at: str = ""
    """UTC, RFC 3339."""
    endpoint: str = "chat"
    streams: bool = True
    output_tokens_from: str = "usage"
    kernel_stamps: bool = False
    clock_step_ms: float = 0.0
    """How far the offset of the realtime clock moved during the level."""
    loopback: bool = False
    """The server runs on this machine: its memory is ours to judge."""
    through_gate: bool = False


@dataclass(frozen=True)
class LevelData:
    """One level as it lies in the run folder."""

    meta: LevelMeta
    records: Sequence[RequestRecord]
    server: ServerFigures

    @cached_property
    def judged(self) -> list[RequestRecord]:
        """Requests sent in the window, in send order; what we cut, or failed to send, says nothing of the server."""
        return sorted((r for r in self._sent_inside if r.outcome not in _OURS), key=lambda r: r.sent_s)

    @cached_property
    def client_failures(self) -> int:
        """Requests of the window that failed on this machine."""
        return sum(1 for r in self._sent_inside if r.outcome is Outcome.CLIENT)

    @property
    def _sent_inside(self) -> list[RequestRecord]:
        start_s, end_s = self.meta.window_start_s, self.meta.window_end_s
        return [r for r in self.records if start_s <= r.sent_s < end_s]

    @property
    def duration_s(self) -> float:
        return self.meta.window_end_s - self.meta.window_start_s

    @property
    def complete(self) -> bool:
        return not self.meta.stopped_early


@dataclass(frozen=True)
class Metric:
    """One latency over the judged requests. In ms, successes in send order; failures are infinite in quantiles."""

    values_ms: npt.NDArray[np.float64]
    infinite: int
    wave: int

    @cached_property
    def estimate(self) -> MeanEstimate:
        """Mean over successes and its standard error from wave means."""
        return mean_se(self.values_ms, self.wave)

    @property
    def mean_ms(self) -> float:
        return self.estimate.mean

    @property
    def cv(self) -> float:
        """Coefficient of variation of single values."""
        return float(self.values_ms.std() / self.values_ms.mean()) if self.values_ms.size > 1 else 0.0

    def quantile_ms(self, q: float) -> float:
        return quantile(self.values_ms, q, self.infinite)

    def stat(self, name: str) -> tuple[float, float, float]:
        """Value and interval of ``mean`` or ``p50`` … ``p99``; all NaN without values."""
        if not self.values_ms.size and not self.infinite:
            return math.nan, math.nan, math.nan
        if name == "mean":
            margin = Z_95 * self.estimate.se
            return self.mean_ms, self.mean_ms - margin, self.mean_ms + margin
        q = float(name[1:]) / 100
        low, high = quantile_interval(self.values_ms, q, self.infinite)
        return self.quantile_ms(q), low, high


@dataclass(frozen=True)
class Throughput:
    """Successful requests per second in steady state, with its standard error."""

    rps: float
    se_rps: float

    @property
    def low_rps(self) -> float:
        return self.rps - Z_95 * self.se_rps

    @property
    def high_rps(self) -> float:
        return self.rps + Z_95 * self.se_rps


@dataclass(frozen=True)
class Summary:
    """Everything that the rules look at, for all levels run at one concurrency."""

    concurrency: int
    requests: int
    successes: int
    failures: dict[str, int]
    success_effect: float
    """How much failures that come together widen the interval of the success rate."""
    hung_share: float
    """Share of the slots' time spent in requests that hung (timed out); 0 where none did."""
    throughput: Throughput | None
    """None where no level ran long enough in steady state."""
    output_tps: float | None
    ttft: Metric
    e2el: Metric
    itl: Metric
    tpot: Metric
    streams: bool
    no_content: int
    preempted_share: float
    """Preemptions for each judged request."""
    server: ServerFigures
    client: ClientFigures
    client_failures: int
    duration_s: float
    complete: bool
    stopped_early: str
    loopback: bool
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def success_rate(self) -> float:
        return self.successes / self.requests if self.requests else 0.0

    def success_interval(self, z: float = Z_95) -> tuple[float, float]:
        """Wilson's interval of the success rate; ``Z_ONE_SIDED`` gives the bounds of a one-sided 5 %."""
        return wilson(self.successes, self.requests, z, self.success_effect)

    @property
    def supported_concurrency(self) -> int:
        """What a PASS is evidence for: slots that stood empty for a share D of the time did not load the server."""
        return max(1, math.floor(self.concurrency * (1 - self.client.turnaround_share) + 1e-9))


def scatters(summary: Summary) -> bool:
    """Throughput is known too loosely for the gain of a doubling to be read from it."""
    x = summary.throughput
    return x is not None and x.se_rps > MAX_SCATTER * x.rps


def summarise(levels: Sequence[LevelData]) -> Summary:
    """Pool the levels, all run at one concurrency."""
    judged = [record for level in levels for record in level.judged]
    good = [record for record in judged if record.ok]
    wave = levels[0].meta.concurrency
    failures = Counter(str(r.outcome) for r in judged if not r.ok)
    effect = design_effect([[r.ok for r in part] for part in _waves(judged, wave)])
    metrics = {
        "ttft": _metric(judged, wave, _ttft_ms),
        "e2el": _metric(judged, wave, _e2el_ms),
        "tpot": _metric(judged, wave, _tpot_ms),
        "itl": _itl_metric(judged, wave),
    }
    return Summary(
        concurrency=wave,
        requests=len(judged),
        successes=len(good),
        failures=dict(failures),
        success_effect=effect,
        hung_share=max(_hung_share(level) for level in levels),
        throughput=_throughput(levels),
        output_tps=_output_tps(levels),
        ttft=metrics["ttft"],
        e2el=metrics["e2el"],
        itl=metrics["itl"],
        tpot=metrics["tpot"],
        streams=levels[0].meta.streams,
        no_content=sum(1 for r in good if levels[0].meta.streams and r.ttft_s is None),
        preempted_share=sum(level.server.preemptions or 0.0 for level in levels) / max(1, len(judged)),
        server=levels[-1].server,
        client=_client(levels),
        client_failures=sum(level.client_failures for level in levels),
        duration_s=sum(level.duration_s for level in levels),
        complete=any(level.complete for level in levels),
        stopped_early=levels[-1].meta.stopped_early,
        loopback=levels[0].meta.loopback,
        metrics=metrics,
    )


def _waves(records: Sequence[RequestRecord], wave: int) -> Iterable[Sequence[RequestRecord]]:
    return (records[start : start + wave] for start in range(0, len(records), max(1, wave)))


def _metric(judged: Sequence[RequestRecord], wave: int, value_ms: Callable[[RequestRecord], float | None]) -> Metric:
    values = [value for record in judged if record.ok and (value := value_ms(record)) is not None]
    infinite = sum(1 for record in judged if not record.ok)
    return Metric(np.array(values, dtype=float), infinite, wave)


def _itl_metric(judged: Sequence[RequestRecord], wave: int) -> Metric:
    """Gaps between chunks, pooled over all requests; a failed request adds none."""
    gaps = [np.array(record.itls_s) for record in judged if record.ok and record.itls_s]
    values = np.concatenate(gaps) * 1e3 if gaps else np.array([])
    per_request = values.size // max(1, len(gaps))
    return Metric(values, 0, max(1, wave * per_request))


def _ttft_ms(record: RequestRecord) -> float | None:
    return None if record.ttft_s is None else record.ttft_s * 1e3


def _e2el_ms(record: RequestRecord) -> float:
    return record.e2el_s * 1e3


def _tpot_ms(record: RequestRecord) -> float | None:
    """(E2EL − TTFT)/(output tokens − 1), vLLM's definition, from the choices-chunks."""
    if not record.output_tokens or record.output_tokens < 2:
        return None
    if record.first_choice_s is None or record.last_choice_s is None:
        return None
    return (record.last_choice_s - record.first_choice_s) / (record.output_tokens - 1) * 1e3


def _steady(level: LevelData) -> bool:
    times = [record.e2el_s for record in level.judged if record.ok]
    return level.complete and bool(times) and level.duration_s >= STEADY_WAVES * float(np.mean(times)) * 0.999


def _throughput(levels: Sequence[LevelData]) -> Throughput | None:
    """Average over the windows, weighted by their length."""
    parts: list[tuple[float, float, float]] = []
    for level in levels:
        if not _steady(level):
            continue
        window = level.meta.window_start_s, level.meta.window_end_s
        good = [record for record in level.records if record.ok]
        starts, ends = np.array([r.sent_s for r in good]), np.array([r.end_s for r in good])
        rps = fractional_throughput(starts, ends, *window)
        parts.append((level.duration_s, rps, max(throughput_se(starts, ends, *window), _renewal_se(level, rps))))
    if not parts:
        return None
    total = sum(duration for duration, _, _ in parts)
    rps = sum(duration * value for duration, value, _ in parts) / total
    se = math.sqrt(sum((duration * error) ** 2 for duration, _, error in parts)) / total
    return Throughput(rps, se)


def _renewal_se(level: LevelData, rps: float) -> float:
    """X·cv/√n: what slots that renew independently give at least. Eight correlated slices may agree by luck."""
    times_s = np.array([record.e2el_s for record in level.judged if record.ok])
    return rps * float(times_s.std()) / float(times_s.mean()) / math.sqrt(times_s.size)


def _output_tps(levels: Sequence[LevelData]) -> float | None:
    """Generated tokens per second of the window, each request's spread evenly over its time."""
    steady = [level for level in levels if _steady(level)]
    if not steady:
        return None
    tokens = 0.0
    for level in steady:
        start_s, end_s = level.meta.window_start_s, level.meta.window_end_s
        for record in level.records:
            if record.ok and record.output_tokens and record.e2el_s > 0:
                overlap = min(record.end_s, end_s) - max(record.sent_s, start_s)
                tokens += record.output_tokens * max(0.0, overlap) / record.e2el_s
    return tokens / sum(level.duration_s for level in steady)


def _hung_share(level: LevelData) -> float:
    """Share of N·T that time-outs took, those sent before the window included: a hung slot sends nothing in it."""
    start_s, end_s = level.meta.window_start_s, level.meta.window_end_s
    hung = sum(
        max(0.0, min(record.end_s, end_s) - max(record.sent_s, start_s))
        for record in level.records
        if record.outcome is Outcome.TIMEOUT
    )
    area = level.meta.concurrency * (end_s - start_s)
    return hung / area if area > 0 else 0.0


def _client(levels: Sequence[LevelData]) -> ClientFigures:
    """The worst of the levels' own figures: one bad client run is enough to doubt the pooled ones."""
    figures = [_client_of(level) for level in levels]
    return ClientFigures(
        late_p99_ms=max(f.late_p99_ms for f in figures),
        turnaround_share=max(f.turnaround_share for f in figures),
        lag_p99_ms=max(f.lag_p99_ms for f in figures),
        cpu=max(f.cpu for f in figures),
        run_queue_wait=max(f.run_queue_wait for f in figures),
        kernel_stamps=all(f.kernel_stamps for f in figures),
    )


def _client_of(level: LevelData) -> ClientFigures:
    judged = level.judged
    area = level.meta.concurrency * level.duration_s
    turnarounds = [record.turnaround_s for record in judged if record.turnaround_s is not None]
    late_ms = [max(0.0, record.late_s) * 1e3 for record in judged]
    return ClientFigures(
        late_p99_ms=quantile(late_ms, 0.99) if late_ms else 0.0,
        turnaround_share=sum(turnarounds) / area if area > 0 else 0.0,
        lag_p99_ms=quantile([r.lag_s * 1e3 for r in judged], 0.99) if judged else 0.0,
        cpu=level.server.client_cpu or 0.0,
        run_queue_wait=level.server.run_queue_wait or 0.0,
        kernel_stamps=level.meta.kernel_stamps,
    )
