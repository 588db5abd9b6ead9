"""What model servers say of themselves on ``/metrics``, in one vocabulary.

Prometheus text of vLLM (V1 and the older names), SGLang, llama.cpp and Text Embeddings Inference. The simulator speaks
vLLM's names.
"""

import math
import re
from collections.abc import Mapping

import msgspec


class EngineMetrics(msgspec.Struct, frozen=True, omit_defaults=True):
    """One reading. Each figure is None where the server does not tell it; counters run from the server's start."""

    engine: str = ""
    """vllm | sglang | llamacpp | tei, empty where none is recognised."""
    running: float | None = None
    """Requests being worked on, summed over data-parallel engines."""
    waiting: float | None = None
    """Requests queued inside the server, summed likewise."""
    kv_use: float | None = None
    """KV cache in use, 0 … 1; of the fullest engine where there are several."""
    preemptions_total: float | None = None
    prompt_tokens_total: float | None = None
    generation_tokens_total: float | None = None
    started_at_s: float | None = None
    """Start of the oldest process, Unix seconds: another value means that the server was restarted."""

    @property
    def preallocates(self) -> bool:
        """Whether the engine takes its device memory at the start, so that memory in use says nothing of load."""
        return self.engine in _PREALLOCATING

    @property
    def in_server(self) -> float | None:
        """Running and waiting together; None where either is unknown."""
        if self.running is None or self.waiting is None:
            return None
        return self.running + self.waiting


_PREALLOCATING = frozenset({"vllm", "sglang", "llamacpp"})

_Names = Mapping[str, tuple[str, ...]]

# For each figure its names, newest first; the first that is present counts.
_ENGINES: Mapping[str, _Names] = {
    "vllm": {
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "kv_use": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "preemptions_total": ("vllm:num_preemptions_total",),
        "prompt_tokens_total": ("vllm:prompt_tokens_total",),
        "generation_tokens_total": ("vllm:generation_tokens_total",),
    },
    "sglang": {
        "running": ("sglang:num_running_reqs",),
        "waiting": ("sglang:num_queue_reqs",),
        "kv_use": ("sglang:token_usage",),
        # sglang:num_retracted_reqs is a gauge of the last batch, not a count.
        "preemptions_total": ("sglang:num_retracted_requests_total",),
        "prompt_tokens_total": ("sglang:prompt_tokens_total",),
        "generation_tokens_total": ("sglang:generation_tokens_total",),
    },
    "llamacpp": {
        "running": ("llamacpp:requests_processing",),
        "waiting": ("llamacpp:requests_deferred",),
        "kv_use": ("llamacpp:kv_cache_usage_ratio",),
        "prompt_tokens_total": ("llamacpp:prompt_tokens_total",),
        "generation_tokens_total": ("llamacpp:tokens_predicted_total",),
    },
    "tei": {"waiting": ("te_queue_size",)},
}
_START = "process_start_time_seconds"
_WANTED = frozenset(name for names in _ENGINES.values() for group in names.values() for name in group) | {_START}

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# A label value may hold any character, an escaped quote or a closing brace included; a time-stamp may follow.
_REST = re.compile(r'(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?\s*$')


def read_engine_metrics(text: str) -> EngineMetrics:
    """Read a ``/metrics`` page. Lines that are not understood are passed over, as are values that are not finite."""
    series = _series(text)
    engine = next((name for name, figures in _ENGINES.items() if _speaks(figures, series)), "")
    figures = {figure: _figure(figure, names, series) for figure, names in _ENGINES.get(engine, {}).items()}
    started_at_s = min(series[_START]) if _START in series else None
    return EngineMetrics(engine=engine, started_at_s=started_at_s, **figures)


def _series(text: str) -> dict[str, list[float]]:
    """The finite values of each wanted metric, whatever its labels."""
    series: dict[str, list[float]] = {}
    for line in text.splitlines():
        name = _NAME.match(line)
        if name is None or name[0] not in _WANTED:
            continue
        rest = _REST.match(line, name.end())
        value = _number(rest[1]) if rest else None
        if value is not None:
            series.setdefault(name[0], []).append(value)
    return series


def _number(token: str) -> float | None:
    try:
        value = float(token)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _speaks(figures: _Names, series: Mapping[str, list[float]]) -> bool:
    return any(name in series for names in figures.values() for name in names)


def _figure(figure: str, names: tuple[str, ...], series: Mapping[str, list[float]]) -> float | None:
    values = next((series[name] for name in names if name in series), None)
    if values is None:
        return None
    return max(values) if figure == "kv_use" else sum(values)
