"""One level as ``vllm bench serve`` reports it: the same JSON keys in the same order, the same printed block.

Definitions are vLLM's: lists in seconds and summaries in ms, over successes only, counted from the actual send;
throughputs divide by the whole duration, the drain included. TTFT is the first chunk with ``choices``; E2EL ends with
the last one. ``loadstone``, the last key, holds what Loadstone judges by.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loadstone.core.errors import UsageError
from loadstone.core.records import RequestRecord

METRICS: dict[str, tuple[str, str]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class ResultSettings:
    """What the JSON repeats of the flags, and what is computed of the records."""

    date: str
    """``%Y%m%d-%H%M%S``."""
    backend: str
    model_id: str
    num_prompts: int
    label: str | None = None
    tokenizer_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Flattened to the top level."""
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp: Mapping[str, str | float] = field(default_factory=dict)
    """``ramp_up_strategy``, ``ramp_up_start_rps``, ``ramp_up_end_rps``, where there is a ramp."""
    pooling: bool = False
    """Embeddings and rerank: no tokens come back."""
    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    detailed: bool = False


def parse_metrics(text: str) -> tuple[str, ...]:
    """``ttft,tpot`` → names; raises UsageError for one that is none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--percentile-metrics {name} is unknown; choose of {', '.join(METRICS)}")
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    """``50,99.9`` → numbers; raises UsageError for what is none between 0 and 100."""
    try:
        percentiles = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"--metric-percentiles {text}: {error}") from error
    if not all(0 <= percentile <= 100 for percentile in percentiles):
        raise UsageError(f"--metric-percentiles {text}: each must be between 0 and 100")
    return percentiles


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """``ttft:200`` pairs → metric and its limit in ms; raises UsageError."""
    limits_ms: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = -1.0
        if name not in GOODPUT_METRICS or not limit_ms >= 0:
            raise UsageError(f"--goodput {pair}: expected METRIC:MILLISECONDS with one of {', '.join(GOODPUT_METRICS)}")
        limits_ms[name] = limit_ms
    return limits_ms


def vllm_result(
    records: Sequence[RequestRecord],
    settings: ResultSettings,
    duration_s: float,
    loadstone: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON of one level. Records come in send order, their ``output_tokens`` filled in."""
    result = _setup(settings)
    result |= (_pooling if settings.pooling else _generation)(records, settings, duration_s)
    for name in settings.metrics:
        result |= _summary(name, latencies_ms(records, name), settings.percentiles)
    if loadstone is not None:
        result["loadstone"] = dict(loadstone)
    return result


def latencies_ms(records: Sequence[RequestRecord], metric: str) -> npt.NDArray[np.float64]:
    """All values of a metric over the successes; an array of their own, as there may be ten million gaps."""
    good = (record for record in records if record.ok)
    if metric == "itl":
        values_s = (gap_s for record in good for gap_s in record.itls_s)
    else:
        each_s = (_METRIC_OF[metric](record) for record in good)
        values_s = (value_s for value_s in each_s if value_s is not None)
    values_ms = np.fromiter(values_s, np.float64)
    values_ms *= 1e3
    return values_ms


def _ttft_s(record: RequestRecord) -> float | None:
    return record.first_choice_s


def _e2el_s(record: RequestRecord) -> float:
    return record.e2el_s if record.last_choice_s is None else record.last_choice_s


def _tpot_s(record: RequestRecord) -> float | None:
    tokens = record.output_tokens or 0
    if tokens <= 1 or record.first_choice_s is None:
        return None
    return (_e2el_s(record) - record.first_choice_s) / (tokens - 1)


def _queued_s(record: RequestRecord) -> float:
    return record.late_s


def _e2el_with_queue_s(record: RequestRecord) -> float:
    return record.late_s + _e2el_s(record)


_METRIC_OF: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft": _ttft_s,
    "tpot": _tpot_s,
    "e2el": _e2el_s,
    "client_queue_time": _queued_s,
    "e2el_including_client_queue": _e2el_with_queue_s,
}


def _percentile_word(percentile: float) -> str:
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)


def _setup(settings: ResultSettings) -> dict[str, Any]:
    return {
        "date": settings.date,
        "endpoint_type": settings.backend,
        "backend": settings.backend,
        "label": settings.label,
        "model_id": settings.model_id,
        "tokenizer_id": settings.tokenizer_id,
        "num_prompts": settings.num_prompts,
        **settings.metadata,
        "request_rate": "inf" if settings.request_rate == math.inf else settings.request_rate,
        "burstiness": "inf" if settings.burstiness == math.inf else settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        **settings.ramp,
    }


def _generation(records: Sequence[RequestRecord], settings: ResultSettings, duration_s: float) -> dict[str, Any]:
    good = [record for record in records if record.ok]
    input_tokens = sum(record.input_tokens or 0 for record in good)
    output_tokens = sum(record.output_tokens or 0 for record in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration_s,
        "request_goodput": _good_enough(good, settings.goodput_ms) / duration_s if settings.goodput_ms else None,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "max_output_tokens_per_s": _busiest_second(good),
        "max_concurrent_requests": most_in_flight(records),
    }
    if settings.detailed:
        result |= {
            "input_lens": [record.input_tokens or 0 for record in records],
            "output_lens": [(record.output_tokens or 0) if record.ok else 0 for record in records],
            "ttfts": [record.first_choice_s or 0.0 for record in records],
            "itls": [record.itls_s for record in records],
            "latencies": [_e2el_s(record) for record in records],
            "start_times": [record.sent_s for record in records],
            "queue_times": [record.late_s for record in records],
            "generated_texts": [record.text for record in records],
            "errors": [record.error for record in records],
        }
    return result


def _pooling(records: Sequence[RequestRecord], settings: ResultSettings, duration_s: float) -> dict[str, Any]:
    good = [record for record in records if record.ok]
    input_tokens = sum(record.input_tokens or 0 for record in good)
    sequences = sum(record.sequences for record in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": input_tokens,
        "total_input_sequences": sequences,
        "request_throughput": len(good) / duration_s,
        "input_sequence_throughput": sequences / duration_s,
        "total_token_throughput": input_tokens / duration_s,
    }
    if settings.detailed:
        result |= {
            "input_lens": [record.input_tokens or 0 for record in records],
            "latencies": [_e2el_s(record) for record in records],
            "queue_times": [record.late_s for record in records],
            "errors": [record.error for record in records],
        }
    return result


def _good_enough(good: Sequence[RequestRecord], limits_ms: Mapping[str, float]) -> int:
    """Requests that meet every limit; a metric that a request has not (TPOT of one token) meets any."""
    return sum(
        all((_METRIC_OF[name](record) or 0.0) * 1e3 <= limit_ms for name, limit_ms in limits_ms.items())
        for record in good
    )


def _busiest_second(good: Sequence[RequestRecord]) -> float:
    """Most chunks in one second, seconds counted from the first send."""
    if not good:
        return 0.0
    start_s = min(record.sent_s for record in good)
    chunks = np.zeros(math.floor(max(record.end_s for record in good) - start_s) + 2, dtype=np.int64)
    for record in good:
        if record.first_choice_s is not None:
            times_s = record.sent_s - start_s + record.first_choice_s + np.cumsum([0.0, *record.itls_s])
            np.add.at(chunks, times_s.astype(np.int64), 1)
    return float(chunks.max())


def most_in_flight(records: Sequence[RequestRecord]) -> int:
    """Most requests in flight at once, exact: by a sweep over sends and ends."""
    events = [(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records]
    in_flight = most = 0
    for _, change in sorted(events):
        in_flight += change
        most = max(most, in_flight)
    return most


def _summary(name: str, values_ms: npt.NDArray[np.float64], percentiles: Sequence[float]) -> dict[str, float]:
    """Reorders ``values_ms``."""
    if not values_ms.size:
        values_ms = np.zeros(1)
    summary = {
        f"mean_{name}_ms": float(values_ms.mean()),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(values_ms.std()),
    }
    for percentile in percentiles:
        summary[f"p{_percentile_word(percentile)}_{name}_ms"] = float(
            np.percentile(values_ms, percentile, overwrite_input=True)
        )
    return summary


def printed(result: Mapping[str, Any], settings: ResultSettings) -> str:
    """The block that ``vllm bench serve`` prints; people's scripts look for these labels."""
    lines = [f"{' Serving Benchmark Result ':=^50}", *_counts(result, settings)]
    for name in settings.metrics:
        short, title = METRICS[name]
        lines.append(f"{title:-^50}")
        lines.append(_line(f"Mean {short} (ms):", result[f"mean_{name}_ms"]))
        lines.append(_line(f"Median {short} (ms):", result[f"median_{name}_ms"]))
        words = map(_percentile_word, settings.percentiles)
        lines += [_line(f"P{word} {short} (ms):", result[f"p{word}_{name}_ms"]) for word in words]
    return "\n".join([*lines, "=" * 50])


_COUNTS = (
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Input throughput (inputs/s):", "input_sequence_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)


def _counts(result: Mapping[str, Any], settings: ResultSettings) -> list[str]:
    lines = [_line("Successful requests:", result["completed"]), _line("Failed requests:", result["failed"])]
    if settings.max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", settings.max_concurrency))
    if settings.request_rate != math.inf:
        lines.append(_line("Request rate configured (RPS):", float(settings.request_rate)))
    return lines + [_line(label, result[key]) for label, key in _COUNTS if result.get(key) is not None]


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"
