"""``limits.toml``: what was measured, written down so that it can be enforced; and how the limits follow from it."""

import math
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import tomli_w
from msgspec import Meta

from loadstone.core.errors import UsageError

SCHEMA = 1

_Positive = Annotated[int, Meta(ge=1)]
_Seconds = Annotated[float, Meta(gt=0)]
_Rfc3339 = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")]


class PerClient(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quotas: policy, not capacity, so ``find`` never writes them."""

    requests_per_minute: _Positive | None = None
    requests_per_hour: _Positive | None = None
    tokens_per_minute: _Positive | None = None


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table ``[limits]``; None is no bound."""

    max_concurrency: _Positive | None = None
    """In flight at one upstream, which is what was measured; a gate's total is the sum over healthy upstreams."""
    max_queue: Annotated[int, Meta(ge=0)] | None = None
    """Waiting at the gate at most; beyond it 503."""
    queue_timeout_s: _Seconds | None = None
    request_timeout_s: _Seconds | None = None
    """From arrival to the last byte: queue, connect and generation together."""
    max_output_tokens: _Positive | None = None
    default_output_tokens: _Positive | None = None
    max_tokens_in_flight: _Positive | None = None
    """Prompt and max output tokens admitted at once, for one upstream."""
    per_client: PerClient | None = None


class Upstream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[upstream]]``."""

    url: str
    max_concurrency: _Positive | None = None
    weight: Annotated[float, Meta(gt=0)] = 1.0


class EvidenceLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One point of the measured curve."""

    concurrency: _Positive
    throughput_rps: float
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    itl_p50_ms: float | None = None
    e2el_mean_ms: float | None = None


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the limits come from; absent where they were written by hand."""

    measured_max_concurrency: _Positive
    headroom: Annotated[float, Meta(gt=0, le=1)]
    binding: str
    """success | ttft | e2el | gain | resource:<name> | slo:<metric> | ladder | client"""
    claim: str
    throughput_rps: float | None = None
    """At ``max_concurrency``, in a run of its own."""
    measured_at: _Rfc3339
    expires_at: _Rfc3339
    model: str
    endpoint: str
    base_url: str
    through_gate: bool = False
    run: str | None = None
    levels: list[EvidenceLevel] = msgspec.field(default_factory=list, name="level")


class LimitsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    limits: Limits = Limits()
    upstreams: list[Upstream] = msgspec.field(default_factory=list, name="upstream")
    evidence: Evidence | None = None


def loads(text: str, name: str) -> LimitsFile:
    """Read ``limits.toml``; ``name`` is the file as the user knows it.

    Raises UsageError, naming file and key, on text that is not TOML, another ``schema``, an unknown key or a bad value.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not TOML: {error}") from error
    schema = document.pop("schema", None)
    if schema != SCHEMA or isinstance(schema, bool):
        said = "has no schema" if schema is None else f"has schema = {schema!r}"
        raise UsageError(f"{name} {said}; this version of loadstone reads schema = {SCHEMA}")
    try:
        return msgspec.convert(document, LimitsFile)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}: {_in_toml_terms(str(error))}") from error


def dumps(file: LimitsFile) -> str:
    """The text of ``limits.toml``: key order as documented, an absent key for each None."""
    document = msgspec.to_builtins(file)
    return f"schema = {SCHEMA}\n" + "".join(
        f"{heading}\n{tomli_w.dumps(table)}" for heading, table in _tables(document)
    )


def _tables(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Heading and scalars of each table, in the order of the file. tomli_w alone would write small tables in line."""
    limits = document["limits"]
    yield "[limits]", _scalars(limits)
    if limits["per_client"] is not None:
        yield "[limits.per_client]", _scalars(limits["per_client"])
    for upstream in document["upstream"]:
        yield "[[upstream]]", _scalars(upstream)
    evidence = document["evidence"]
    if evidence is not None:
        yield "[evidence]", _scalars(evidence)
        for level in evidence["level"]:
            yield "[[evidence.level]]", _scalars(level)


def _scalars(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None and not isinstance(value, dict | list)}


def _in_toml_terms(message: str) -> str:
    """msgspec's words with the path as it is written in the file: ``$.limits.max_queue`` → ``limits.max_queue``."""
    message = message.replace("Object contains unknown field", "unknown key").replace(
        "Object missing required field", "missing key"
    )
    what, _, path = message.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    return f"{where}: {what}" if where else what


HEADROOM_BAND = 0.05
"""How far the recommended share may lie from the headroom asked for, to be a whole number."""
_CHAT_QUEUE_AT_MOST = 20
_LEAST_QUEUE_TIMEOUT_S = 0.1
_P99 = 2.33


def recommend(measured: int, headroom: float = 0.75) -> int:
    """The limit for a measured maximum N: the integer in [0.7N, 0.8N] nearest 0.75N, the lower of two.

    Where that holds none, ⌊0.8N⌋ but at least 1. Another ``headroom`` moves the band, 0.05 to either side and not
    beyond N.
    """
    low, high = (headroom - HEADROOM_BAND) * measured, min(headroom + HEADROOM_BAND, 1.0) * measured
    inside = range(max(1, math.ceil(low - 1e-9)), math.floor(high + 1e-9) + 1)
    if not inside:
        return max(1, math.floor(high + 1e-9))
    return min(inside, key=lambda n: (round(abs(n - headroom * measured), 9), n))


def derive_limits(
    recommended: int,
    throughput_rps: float,
    wait_s: float,
    p99_latency_s: float,
    *,
    chat: bool,
    request_timeout_s: float | None = None,
) -> Limits:
    """Concurrency, queue and queue time-out from what was measured at the recommended level M itself.

    ``wait_s`` is W, what a request may wait on top of its own latency: the TTFT limit − TTFT(M), or R(M) where there is
    no such limit. max_queue = ⌊X(M)·W⌋, at most 20 for a chat model and never below 0; queue_timeout_s = W +
    2.33·√max_queue/X(M), at most ``request_timeout_s`` − ``p99_latency_s`` and at least 0.1 s, less being only jitter.
    Without throughput no queue can be derived, and none is written.
    """
    if throughput_rps <= 0:
        return Limits(max_concurrency=recommended, request_timeout_s=request_timeout_s)
    allowed_s = max(0.0, wait_s)
    max_queue = math.floor(throughput_rps * allowed_s + 1e-9)
    if chat:
        max_queue = min(max_queue, _CHAT_QUEUE_AT_MOST)
    timeout_s = allowed_s + _P99 * math.sqrt(max_queue) / throughput_rps
    if request_timeout_s is not None:
        timeout_s = min(timeout_s, request_timeout_s - p99_latency_s)
    return Limits(
        max_concurrency=recommended,
        max_queue=max_queue,
        queue_timeout_s=round(max(timeout_s, _LEAST_QUEUE_TIMEOUT_S), 3),
        request_timeout_s=request_timeout_s,
    )
