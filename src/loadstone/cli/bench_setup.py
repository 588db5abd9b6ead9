"""From the flags of ``bench`` to what is measured; what is wrong with them is found here, before any request."""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loadstone.cli.bench_settings import BenchSettings
from loadstone.core.api.endpoint import BodyOptions, Endpoint
from loadstone.core.errors import UsageError
from loadstone.core.settings import TIMEOUT_RANGE_S, check_range
from loadstone.measure.arrivals import Arrivals
from loadstone.measure.backends import resolve_endpoint
from loadstone.measure.bench import BenchPlan, plan_notes
from loadstone.measure.tokens import Tokenizer, load_tokenizer
from loadstone.measure.vllm_result import ResultSettings, parse_goodput, parse_metrics, parse_percentiles
from loadstone.measure.workload import WorkloadSettings

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logprobs",
)


@dataclass(frozen=True)
class Setup:
    base_url: str
    endpoint: Endpoint
    path: str
    headers: dict[str, str]
    ignore_eos: bool
    extra: dict[str, Any]
    workload: WorkloadSettings
    plan: BenchPlan
    tokenizer: Tokenizer | None
    result: ResultSettings
    """Its ``model_id`` is empty until the server has been asked, where --model is not given."""
    notes: tuple[str, ...]

    def body_options(self, model: str) -> BodyOptions:
        return BodyOptions(model=model, stream=self.endpoint.streams, ignore_eos=self.ignore_eos, extra=self.extra)


def setup_of(settings: BenchSettings, now: datetime) -> Setup:
    """Raises UsageError for flags that cannot be used."""
    _check_counts(settings)
    endpoint, path = resolve_endpoint(settings.backend, settings.endpoint)
    tokenizer_place = _tokenizer_place(settings)
    workload = _workload(settings)
    arrivals = Arrivals(
        rate_rps=settings.request_rate,
        burstiness=settings.burstiness,
        ramp=settings.ramp_up_strategy,
        ramp_start_rps=settings.ramp_up_start_rps,
        ramp_end_rps=settings.ramp_up_end_rps,
    )
    plan = BenchPlan(
        num_prompts=settings.num_prompts,
        arrivals=arrivals,
        max_concurrency=settings.max_concurrency,
        num_warmups=settings.num_warmups,
        seed=settings.seed,
        keep_text=settings.save_detailed or tokenizer_place is not None,
    )
    return Setup(
        base_url=settings.base_url or f"http://{_in_url(settings.host)}:{settings.port}",
        endpoint=endpoint,
        path=path,
        headers=_pairs("--header", settings.header),
        ignore_eos=settings.ignore_eos or workload.dataset_name == "random",
        extra=_extra(settings),
        workload=workload,
        plan=plan,
        tokenizer=None if tokenizer_place is None else load_tokenizer(tokenizer_place),
        result=_result(settings, endpoint, now),
        notes=(*plan_notes(plan), *_idle_flags(settings)),
    )


def _check_counts(settings: BenchSettings) -> None:
    if settings.num_prompts < 1:
        raise UsageError(f"--num-prompts {settings.num_prompts} must be at least 1")
    if settings.max_concurrency is not None and settings.max_concurrency < 1:
        raise UsageError(f"--max-concurrency {settings.max_concurrency} must be at least 1 (leave it out for no bound)")
    if settings.num_warmups < 0:
        raise UsageError(f"--num-warmups {settings.num_warmups} must be at least 0")
    check_range("--request-timeout-s", settings.request_timeout_s, *TIMEOUT_RANGE_S)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _workload(settings: BenchSettings) -> WorkloadSettings:
    input_ratio, output_ratio = _range_ratios(settings.random_range_ratio)
    custom_output_len = settings.custom_output_len if settings.output_len is None else settings.output_len
    return WorkloadSettings(
        # vLLM's random-rerank is random with a rerank backend.
        dataset_name="random" if settings.dataset_name == "random-rerank" else settings.dataset_name,
        dataset_path=settings.dataset_path,
        input_len=settings.random_input_len if settings.input_len is None else settings.input_len,
        output_len=settings.random_output_len if settings.output_len is None else settings.output_len,
        input_range_ratio=input_ratio,
        output_range_ratio=output_ratio,
        prefix_len=settings.random_prefix_len,
        batch_size=settings.random_batch_size,
        custom_output_len=custom_output_len,
        shuffle=not settings.disable_shuffle,
        seed=settings.seed,
    )


def _range_ratios(text: str) -> tuple[float, float]:
    try:
        ratio = json.loads(text)
        if isinstance(ratio, dict):
            return float(ratio["input"]), float(ratio["output"])
        return float(ratio), float(ratio)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'--random-range-ratio {text}: a number, or {{"input": 0.3, "output": 0.5}}') from error


def _pairs(flag: str, pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{flag} {pair}: expected KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def _extra(settings: BenchSettings) -> dict[str, Any]:
    sampling = {name: value for name in _SAMPLING if (value := getattr(settings, name)) is not None}
    if settings.extra_body is None:
        return sampling
    try:
        extra = json.loads(settings.extra_body)
    except ValueError as error:
        raise UsageError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise UsageError("--extra-body must be a JSON object")
    return sampling | extra


def _tokenizer_place(settings: BenchSettings) -> str | None:
    """What --tokenizer says, else the model's own folder where --model is one."""
    if settings.tokenizer is not None:
        return settings.tokenizer
    if settings.model is None or settings.skip_tokenizer_init or importlib.util.find_spec("tokenizers") is None:
        return None
    return settings.model if (Path(settings.model) / "tokenizer.json").is_file() else None


def _result(settings: BenchSettings, endpoint: Endpoint, now: datetime) -> ResultSettings:
    default_metrics = "ttft,tpot,itl" if endpoint.streams else "e2el"
    ramp: dict[str, str | float] = {}
    if settings.ramp_up_strategy is not None:
        ramp = {
            "ramp_up_strategy": settings.ramp_up_strategy,
            "ramp_up_start_rps": settings.ramp_up_start_rps or math.nan,
            "ramp_up_end_rps": settings.ramp_up_end_rps or math.nan,
        }
    return ResultSettings(
        date=now.strftime("%Y%m%d-%H%M%S"),
        backend=settings.backend,
        label=settings.label,
        model_id=settings.model or "",
        tokenizer_id=settings.tokenizer or settings.model,
        num_prompts=settings.num_prompts,
        metadata=_pairs("--metadata", settings.metadata),
        request_rate=settings.request_rate,
        burstiness=settings.burstiness,
        max_concurrency=settings.max_concurrency,
        ramp=ramp,
        pooling=not endpoint.streams,
        metrics=parse_metrics(settings.percentile_metrics or default_metrics),
        percentiles=parse_percentiles(settings.metric_percentiles),
        goodput_ms=parse_goodput(settings.goodput),
        detailed=settings.save_detailed,
    )


def _idle_flags(settings: BenchSettings) -> list[str]:
    idle = {
        "--trust-remote-code": settings.trust_remote_code,
        "--request-id-prefix": settings.request_id_prefix is not None,
        "--tokenizer-mode": settings.tokenizer_mode is not None,
    }
    return [f"{flag} has no effect here" for flag, given in idle.items() if given]
