"""The service's counters in Prometheus text, under vLLM's names."""

from loadstone.sim.profiles import MODEL
from loadstone.sim.service import Service

_GAUGES = (
    ("num_requests_running", "Number of requests in model execution batches."),
    ("num_requests_waiting", "Number of requests waiting to be processed."),
    ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."),
)
_COUNTERS = (
    ("num_preemptions_total", "Cumulative number of preemptions from the engine."),
    ("prompt_tokens_total", "Number of prefill tokens processed."),
    ("generation_tokens_total", "Number of generation tokens processed."),
    ("request_success_total", "Count of successfully processed requests."),
)


def metrics_text(service: Service) -> str:
    """The exposition text of one scrape."""
    engine = service.engine
    values: dict[str, float] = {
        "num_requests_running": engine.num_requests_running,
        "num_requests_waiting": engine.num_requests_waiting,
        "kv_cache_usage_perc": engine.kv_cache_usage,
        "num_preemptions_total": engine.preemptions_total,
        "prompt_tokens_total": engine.prompt_tokens_total,
        "generation_tokens_total": engine.generation_tokens_total,
        "request_success_total": engine.finished_total,
    }
    lines: list[str] = []
    for kind, metrics in (("gauge", _GAUGES), ("counter", _COUNTERS)):
        for name, help_text in metrics:
            labels = f'engine="0",model_name="{MODEL}"'
            if name == "request_success_total":
                labels += ',finished_reason="length"'
            lines.append(f"# HELP vllm:{name} {help_text}")
            lines.append(f"# TYPE vllm:{name} {kind}")
            lines.append(f"vllm:{name}{{{labels}}} {float(values[name])!r}")
    profile = service.profile
    lines.append("# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig")
    lines.append("# TYPE vllm:cache_config_info gauge")
    lines.append(
        f'vllm:cache_config_info{{block_size="{profile.block_size}",engine="0",'
        f'num_gpu_blocks="{profile.num_kv_blocks}"}} 1.0'
    )
    return "\n".join(lines) + "\n"
