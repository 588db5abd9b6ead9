"""A folder of benchmark results as a run: one JSON file of ``vllm bench serve`` for each concurrency.

The files hold figures and no records, so levels are judged by their point values: nothing is known of their intervals
or of the load generator, and no answer from them is sure.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from loadstone.core.errors import UsageError
from loadstone.core.settings import LadderSettings, RuleSettings
from loadstone.core.verdict import Finding, LevelKind, LevelRow, RunVerdict, Verdict
from loadstone.measure.answer import Subject, limits_of, verdict_of
from loadstone.measure.backends import BACKENDS
from loadstone.measure.find import search_settings
from loadstone.measure.judged import Judged
from loadstone.measure.points import Point
from loadstone.measure.rules import Judgement, Rules
from loadstone.measure.runs import RunFolder
from loadstone.measure.search import SearchSettings
from loadstone.measure.steady import Throughput

_FIGURE = re.compile(r"(mean|median|p\d+(?:\.\d+)?)_(ttft|tpot|itl|e2el)_ms")
_UNKNOWN = "judged by the figures of {count} benchmark results: they tell no intervals, and nothing of the generator"


class _Result(msgspec.Struct):
    """The keys of a benchmark result that a verdict needs, beside its latencies."""

    request_throughput: float
    completed: int
    max_concurrency: int | None = None
    request_rate: float | str = "inf"
    failed: int | None = None
    num_prompts: int | None = None
    duration: float = 0.0
    date: str = ""
    model_id: str | None = None
    backend: str | None = None
    output_throughput: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """One file."""

    name: str
    concurrency: int
    result: _Result
    figures_ms: Mapping[str, float]
    """``mean_ttft`` … ``p99_e2el``; the median as p50."""

    @property
    def requests(self) -> int:
        return self.result.completed + self.failed

    @property
    def failed(self) -> int:
        if self.result.failed is not None:
            return self.result.failed
        return max(0, (self.result.num_prompts or 0) - self.result.completed)

    @property
    def success_rate(self) -> float:
        return self.result.completed / self.requests if self.requests else 0.0


def judge_benchmarks(folder: RunFolder, overrides: Mapping[str, Any]) -> Judged:
    """Judge a folder of benchmark results under ``find``'s default rules, ``overrides`` in place of some.

    Raises UsageError for a folder that holds none, and naming a file that cannot be used.
    """
    benchmarks, notes = read_benchmarks(folder.path)
    rules = replace(RuleSettings(), **overrides)
    streams = any(benchmark.figures_ms.get("mean_ttft", 0.0) > 0 for benchmark in benchmarks)
    ladder = LadderSettings(levels=",".join(str(benchmark.concurrency) for benchmark in benchmarks))
    search = search_settings(rules, ladder, streams)
    verdict = verdict_from(benchmarks, search, notes)
    last = benchmarks[-1].result
    measured_at = _when(last.date) or datetime.fromtimestamp((folder.path / benchmarks[-1].name).stat().st_mtime, UTC)
    endpoint, _ = BACKENDS.get(last.backend or "", ("", ""))
    subject = Subject(last.model_id or "", endpoint, "", str(folder.path))
    limits = limits_of(verdict, [], search, subject, None, measured_at)
    document = {
        "schema": 1,
        "command": f"loadstone judge {folder.path}",
        "created_at": measured_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {"rules": asdict(rules), "ladder": asdict(ladder)},
        "server": {"model": subject.model, "endpoint": subject.endpoint, "streams": streams},
    }
    return Judged(folder, document, verdict, limits)


def read_benchmarks(path: Path) -> tuple[list[Benchmark], list[str]]:
    """The closed-loop results in ``path``, ascending, and what is to be said of the others. Raises UsageError."""
    found: dict[int, Benchmark] = {}
    paced: list[str] = []
    for file in sorted(path.glob("*.json")):
        benchmark = _read(file)
        if benchmark is None:
            continue
        if benchmark.result.request_rate not in ("inf", math.inf):
            paced.append(file.name)
            continue
        other = found.setdefault(benchmark.concurrency, benchmark)
        if other is not benchmark:
            names = f"{other.name} and {file.name}"
            raise UsageError(f"{path}: {names} are both at concurrency {benchmark.concurrency}; keep one of them")
    if not found:
        raise UsageError(f"{path} holds neither a run (levels/) nor closed-loop results of vllm bench serve (*.json)")
    notes = [f"left out, as a request rate held them back: {', '.join(paced)}"] if paced else []
    return [found[concurrency] for concurrency in sorted(found)], notes


def _read(file: Path) -> Benchmark | None:
    """None for JSON that is no benchmark result."""
    try:
        document = msgspec.json.decode(file.read_bytes())
        if not isinstance(document, dict) or "request_throughput" not in document:
            return None
        result = msgspec.convert(document, _Result)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{file} cannot be read as a benchmark result: {error}") from None
    if result.max_concurrency is None or result.max_concurrency < 1:
        raise UsageError(f"{file} does not say its max_concurrency; run that benchmark with --max-concurrency")
    figures = {
        f"{'p50' if match[1] == 'median' else match[1]}_{match[2]}": float(value)
        for key, value in document.items()
        if (match := _FIGURE.fullmatch(key)) and isinstance(value, int | float)
    }
    return Benchmark(file.name, result.max_concurrency, result, figures)


def verdict_from(benchmarks: Sequence[Benchmark], search: SearchSettings, notes: Sequence[str]) -> RunVerdict:
    """The same lines and the same recommendation as from records, none of it sure."""
    judgements = [judge_figures(benchmark, search.rules, search.streams) for benchmark in benchmarks]
    pairs = list(zip(benchmarks, judgements, strict=True))
    points = [_point(benchmark, judgement) for benchmark, judgement in pairs]
    rows = [_row(ordinal, *pair, search.streams) for ordinal, pair in enumerate(pairs, 1)]
    verdict = verdict_of(points, rows, [], search, None)
    said = [*verdict.notes, *notes, _UNKNOWN.format(count=len(benchmarks))]
    line = verdict.measured_max_concurrency
    below = [p.concurrency for p in points if line is not None and p.concurrency <= line]
    if line is not None and below and below[-1] != line:
        said.insert(0, f"the highest level that was run and lies within {line} is {below[-1]}")
    return msgspec.structs.replace(verdict, sure=False, notes=said)


def judge_figures(benchmark: Benchmark, rules: Rules, streams: bool) -> Judgement:
    """The rules in their order, held against point values; a figure that the file lacks fails nothing."""
    rate, limit = benchmark.success_rate, rules.min_success
    text = f"success {100 * rate:.4g} % of {benchmark.requests}"
    verdict = Verdict.PASS if rate >= limit else Verdict.FAIL
    findings = [Finding("success", verdict, f"{text} {'≥' if rate >= limit else '<'} {100 * limit:g} %")]
    shares: list[tuple[float, str]] = []
    for rule, metric, stat, limit_ms in rules.latency(streams):
        value_ms = benchmark.figures_ms.get(f"{stat}_{metric}")
        name = f"{stat} {metric.upper()}"
        if value_ms is None:
            findings.append(Finding(rule, Verdict.PASS, f"the file has no {name}: nothing to hold against the limit"))
            continue
        holds = value_ms <= limit_ms
        said = f"{name} {value_ms:.4g} ms {'≤' if holds else '>'} {limit_ms:g} ms"
        findings.append(Finding(rule, Verdict.PASS if holds else Verdict.FAIL, said))
        shares.append((value_ms / limit_ms, said))
    failed = next((finding for finding in findings if finding.verdict is Verdict.FAIL), None)
    if failed is not None:
        return Judgement(Verdict.FAIL, failed.rule, failed.reason, False, findings)
    return Judgement(Verdict.PASS, "", max(shares)[1] if shares else findings[0].reason, False, findings)


def _point(benchmark: Benchmark, judgement: Judgement) -> Point:
    rps = benchmark.result.request_throughput
    return Point(
        concurrency=benchmark.concurrency,
        verdict=judgement.verdict,
        rule=judgement.rule,
        reason=judgement.reason,
        sure=False,
        requests=benchmark.requests,
        throughput=Throughput(rps, 0.0) if rps > 0 else None,
        supported=benchmark.concurrency,
    )


def _row(ordinal: int, benchmark: Benchmark, judgement: Judgement, streams: bool) -> LevelRow:
    result, failed = benchmark.result, benchmark.failed
    # A server that does not stream is written down with a TTFT of 0.
    figures = {f"{key}_ms": ms for key, ms in benchmark.figures_ms.items() if streams or key.endswith("e2el")}
    row = LevelRow(
        ordinal=ordinal,
        kind=LevelKind.LADDER,
        concurrency=benchmark.concurrency,
        verdict=judgement.verdict,
        rule=judgement.rule,
        reason=judgement.reason,
        requests=benchmark.requests,
        success_rate=benchmark.success_rate,
        error_rate=1 - benchmark.success_rate,
        throughput_rps=result.request_throughput or None,
        output_tps=result.output_throughput or None,
        failures={"failed": failed} if failed else {},
        sure=False,
        duration_s=result.duration,
        findings=judgement.findings,
    )
    return msgspec.structs.replace(row, **{key: ms for key, ms in figures.items() if hasattr(row, key)})


def _when(date: str) -> datetime | None:
    """vLLM's ``%Y%m%d-%H%M%S``, local time; None where the file says something else."""
    try:
        return datetime.strptime(date, "%Y%m%d-%H%M%S").astimezone(UTC)
    except ValueError:
        return None
