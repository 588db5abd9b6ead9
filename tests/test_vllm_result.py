"""The JSON and the block of ``vllm bench serve``: keys, order, definitions, labels to the letter."""

import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.core.errors import UsageError
from loadstone.core.records import Outcome, RequestRecord
from loadstone.measure.vllm_result import (
    ResultSettings,
    most_in_flight,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    printed,
    vllm_result,
)

SETUP = ["date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"]
TRAFFIC = ["request_rate", "burstiness", "max_concurrency"]
GENERATION = [
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
]
DETAILS = [
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
]


def record(index: int, sent_s: float, **fields: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "index": index,
        "slot": 0,
        "planned_s": 0.0,
        "sent_s": sent_s,
        "end_s": sent_s + 1.1,
        "outcome": Outcome.OK,
        "status": 200,
        "ttft_s": 0.3,
        "first_choice_s": 0.2,
        "last_choice_s": 1.0,
        "itls_s": [0.1, 0.3, 0.4],
        "chunks": 3,
        "input_tokens": 10,
        "output_tokens": 5,
    }
    return RequestRecord(**(values | fields))


FAILED = {
    "outcome": Outcome.REFUSED,
    "status": 503,
    "error": "HTTP 503: full",
    "first_choice_s": None,
    "last_choice_s": None,
    "itls_s": [],
    "output_tokens": None,
    "ttft_s": None,
}
RECORDS = [record(0, 0.0), record(1, 0.5), record(2, 0.6, **FAILED), record(3, 2.0, output_tokens=1, itls_s=[0.8])]


def settings(**fields: Any) -> ResultSettings:
    return ResultSettings(date="20261120-100000", backend="vllm", model_id="m", num_prompts=4, **fields)


def test_keys_in_the_order_of_the_contract() -> None:
    chosen = settings(metadata={"tp": "2"}, max_concurrency=8, percentiles=(50.0, 99.0, 99.9), detailed=True)
    result = vllm_result(RECORDS, chosen, 4.0, loadstone={"x": 1})
    metrics = [
        f"{statistic}_{name}_ms"
        for name in ("ttft", "tpot", "itl")
        for statistic in ("mean", "median", "std", "p50", "p99", "p99.9")
    ]
    assert list(result) == [*SETUP, "tp", *TRAFFIC, *GENERATION, *DETAILS, *metrics, "loadstone"]
    short = vllm_result(RECORDS, settings(), 4.0)
    assert [key for key in short if not key.endswith("_ms")] == [*SETUP, *TRAFFIC, *GENERATION]
    assert short["request_rate"] == "inf"
    assert short["request_goodput"] is None


def test_definitions() -> None:
    result = vllm_result(RECORDS, settings(metrics=("ttft", "tpot", "itl", "e2el"), detailed=True), 4.0)
    assert (result["completed"], result["failed"]) == (3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 11)
    assert result["request_throughput"] == 0.75
    assert result["output_throughput"] == 11 / 4
    assert result["total_token_throughput"] == 41 / 4
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx(200)
    itls = [0.1, 0.3, 0.4, 0.1, 0.3, 0.4, 0.8]
    assert result["mean_itl_ms"] == pytest.approx(np.mean(itls) * 1e3)
    assert result["p99_itl_ms"] == pytest.approx(np.percentile(itls, 99) * 1e3)
    assert result["mean_e2el_ms"] == pytest.approx(1000)
    assert result["output_lens"] == [5, 5, 0, 1]
    assert result["ttfts"] == [0.2, 0.2, 0.0, 0.2]
    assert result["errors"] == ["", "", "HTTP 503: full", ""]
    assert result["queue_times"] == [0.0, 0.5, 0.6, 2.0]
    assert result["start_times"] == [0.0, 0.5, 0.6, 2.0]
    # Chunks come at 0.2 0.3 0.6 1.0 | 0.7 0.8 1.1 1.5 | 2.2 3.0 s.
    assert result["max_output_tokens_per_s"] == 5.0
    assert result["max_concurrent_requests"] == 3


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    slow = [record(0, 0.0), record(1, 0.0, first_choice_s=0.5), record(2, 0.0, output_tokens=1)]
    for limits, good in [({"ttft": 300.0}, 2), ({"ttft": 300.0, "tpot": 100.0}, 1), ({"e2el": 999.0}, 0)]:
        result = vllm_result(slow, settings(goodput_ms=limits), 1.0)
        assert result["request_goodput"] == good


def test_pooling() -> None:
    records = [
        record(i, float(i), first_choice_s=None, last_choice_s=None, itls_s=[], output_tokens=None, sequences=4)
        for i in range(2)
    ]
    result = vllm_result(records, settings(pooling=True, metrics=("e2el",)), 2.0)
    assert [key for key in result if key not in SETUP + TRAFFIC] == [
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_input_sequences",
        "request_throughput",
        "input_sequence_throughput",
        "total_token_throughput",
        "mean_e2el_ms",
        "median_e2el_ms",
        "std_e2el_ms",
        "p99_e2el_ms",
    ]
    assert result["input_sequence_throughput"] == 4.0
    assert result["mean_e2el_ms"] == pytest.approx(1100)


def test_nothing_completed() -> None:
    result = vllm_result([record(0, 0.0, **FAILED)], settings(), 1.0)
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 1, 0.0)
    assert result["max_output_tokens_per_s"] == 0.0


def test_most_in_flight_does_not_count_a_slot_twice() -> None:
    records = [record(i, i * 1.0, end_s=i + 1.0) for i in range(5)]
    assert most_in_flight(records) == 1


def test_the_printed_block() -> None:
    chosen = settings(max_concurrency=8, request_rate=2.5, goodput_ms={"ttft": 300.0}, metrics=("ttft", "e2el"))
    text = printed(vllm_result(RECORDS, chosen, 4.0), chosen)
    assert text.splitlines() == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3         ",
        "Failed requests:                         1         ",
        "Maximum request concurrency:             8         ",
        "Request rate configured (RPS):           2.50      ",
        "Benchmark duration (s):                  4.00      ",
        "Total input tokens:                      30        ",
        "Total generated tokens:                  11        ",
        "Request throughput (req/s):              0.75      ",
        "Request goodput (req/s):                 0.75      ",
        "Output token throughput (tok/s):         2.75      ",
        "Peak output token throughput (tok/s):    5.00      ",
        "Peak concurrent requests:                3         ",
        "Total token throughput (tok/s):          10.25     ",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          200.00    ",
        "Median TTFT (ms):                        200.00    ",
        "P99 TTFT (ms):                           200.00    ",
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms):                          1000.00   ",
        "Median E2EL (ms):                        1000.00   ",
        "P99 E2EL (ms):                           1000.00   ",
        "==================================================",
    ]


@pytest.mark.parametrize(
    ("pattern", "field", "value"),
    [("Successful requests:", 3, "3"), ("Request throughput", 4, "0.75"), ("Mean TTFT", 4, "200.00")],
)
def test_what_shell_scripts_read_of_it(tmp_path: Path, pattern: str, field: int, value: str) -> None:
    log = tmp_path / "level.log"
    log.write_text(printed(vllm_result(RECORDS, settings(), 4.0), settings()))
    command = f"grep '{pattern}' {log} | awk '{{print ${field}}}'"
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout == value + "\n"


def test_flags() -> None:
    assert parse_metrics("ttft, e2el") == ("ttft", "e2el")
    assert parse_percentiles("50,99.9") == (50.0, 99.9)
    assert parse_goodput(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}
    for call, text in [
        (lambda: parse_metrics("tps"), "ttft, tpot, itl, e2el"),
        (lambda: parse_percentiles("p99"), "p99"),
        (lambda: parse_percentiles("101"), "between 0 and 100"),
        (lambda: parse_goodput(["itl:5"]), "METRIC:MILLISECONDS"),
        (lambda: parse_goodput(["ttft"]), "METRIC:MILLISECONDS"),
    ]:
        with pytest.raises(UsageError, match=text):
            call()


def test_infinite_settings_are_words_in_the_json() -> None:
    result = vllm_result(RECORDS, settings(burstiness=math.inf, request_rate=3.0), 4.0)
    assert (result["burstiness"], result["request_rate"]) == ("inf", 3.0)
