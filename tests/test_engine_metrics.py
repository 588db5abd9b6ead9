"""``/metrics`` of real engines, and text that no engine should write."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.engine_metrics import EngineMetrics, read_engine_metrics

DATA = Path(__file__).parent / "data"


def test_vllm_as_it_writes() -> None:
    metrics = read_engine_metrics((DATA / "metrics_vllm.txt").read_text())
    assert metrics.engine == "vllm"
    assert (metrics.running, metrics.waiting, metrics.in_server) == (8.0, 4.0, 12.0)
    assert metrics.kv_use == pytest.approx(0.00305213, rel=1e-4)
    assert metrics.preemptions_total == 0.0
    assert (metrics.prompt_tokens_total, metrics.generation_tokens_total) == (8642.0, 22567.0)
    assert metrics.started_at_s == 1.79515834137e09
    assert metrics.preallocates


def test_older_vllm_names_and_several_engines() -> None:
    metrics = read_engine_metrics("""
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:gpu_cache_usage_perc{engine="1",model_name="m"} 0.75
process_start_time_seconds 1.7e+09
""")
    assert (metrics.running, metrics.waiting, metrics.kv_use) == (8.0, 2.0, 0.75)
    assert metrics.started_at_s == 1.7e9
    assert metrics.preemptions_total is None


def test_sglang() -> None:
    metrics = read_engine_metrics("""
sglang:num_running_reqs{model_name="m",tp_rank="0"} 16.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 3.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.9
sglang:num_retracted_reqs{model_name="m"} 1.0
sglang:num_retracted_requests_total{model_name="m"} 48.0
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
sglang:generation_tokens_total{model_name="m"} 7.557572e+06
""")
    assert metrics == EngineMetrics("sglang", 16.0, 3.0, 0.9, 48.0, 8128902.0, 7557572.0)
    assert metrics.preallocates


def test_llamacpp() -> None:
    metrics = read_engine_metrics("""
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 512
llamacpp:tokens_predicted_total 1024
llamacpp:predicted_tokens_seconds nan
llamacpp:requests_processing 4
llamacpp:requests_deferred 46
""")
    assert metrics == EngineMetrics("llamacpp", 4.0, 46.0, None, None, 512.0, 1024.0)


def test_text_embeddings_inference() -> None:
    metrics = read_engine_metrics('te_queue_size 7\nte_request_count{method="single"} 12\n')
    assert (metrics.engine, metrics.waiting, metrics.running, metrics.in_server) == ("tei", 7.0, None, None)
    assert not metrics.preallocates


@pytest.mark.parametrize(
    ("line", "running"),
    [
        ('vllm:num_requests_running{model_name="a}b \\" c{"} 2 1395066363000', 2.0),
        ("vllm:num_requests_running 2e0", 2.0),
        ("vllm:num_requests_running\t1.5\r", 1.5),
        ("vllm:num_requests_running{} 1", 1.0),
        ("vllm:num_requests_running NaN", None),
        ("vllm:num_requests_running +Inf", None),
        ("vllm:num_requests_running", None),
        ("vllm:num_requests_running{model_name=", None),
        ("vllm:num_requests_running twelve", None),
        ("vllm:num_requests_running_created 12", None),
        ("# vllm:num_requests_running 12", None),
    ],
)
def test_one_line(line: str, running: float | None) -> None:
    assert read_engine_metrics(line).running == running


def test_a_value_that_is_not_finite_does_not_spoil_its_neighbours() -> None:
    metrics = read_engine_metrics(
        'vllm:kv_cache_usage_perc{engine="0"} NaN\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n'
    )
    assert metrics.kv_use == 0.5


@pytest.mark.parametrize("text", ["", "\n", "<html>not found</html>", "go_goroutines 12\n"])
def test_nothing_known(text: str) -> None:
    assert read_engine_metrics(text) == EngineMetrics()


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert read_engine_metrics(text + "\nte_queue_size 1").waiting == 1.0


@given(st.text(alphabet='vllm:num_requests_running{}="\\ 12e.', max_size=60))
def test_any_tail_is_read(tail: str) -> None:
    read_engine_metrics("vllm:num_requests_running" + tail)
