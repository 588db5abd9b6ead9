"""From limits file, flags and defaults to what a gate enforces. Pure; every doubtful limit is refused or warned of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec

from loadstone.core.errors import UsageError
from loadstone.core.limits import Evidence, Limits, LimitsFile, PerClient
from loadstone.core.quota import QuotaSettings
from loadstone.core.settings import LimitSettings
from loadstone.hold.upstreams import UpstreamPlan, check_url

CAUTIOUS = Limits(
    max_concurrency=3,
    max_queue=10,
    request_timeout_s=120.0,
    max_output_tokens=512,
    default_output_tokens=100,
    per_client=PerClient(requests_per_minute=10, requests_per_hour=100),
)
"""Without a limits file: an 8B chat model in INT8 on a GPU of 10 GB."""

LONGEST_CHAT_QUEUE = 20
_PER_CLIENT = ("requests_per_minute", "requests_per_hour", "tokens_per_minute")


@dataclass(frozen=True)
class Enforced:
    """What a gate holds its upstreams and clients to."""

    limits: Limits
    upstreams: tuple[UpstreamPlan, ...]
    evidence: Evidence | None
    warnings: tuple[str, ...]
    standing_queue: int | None = None
    """Bound of the queue under lasting overload; None where the queue was not derived from a measured curve."""

    @property
    def quotas(self) -> QuotaSettings:
        per_client = self.limits.per_client or PerClient()
        return QuotaSettings(per_client.requests_per_minute, per_client.requests_per_hour, per_client.tokens_per_minute)

    def limits_document(self) -> dict[str, Any]:
        """The limits in force as JSON values; null is no bound."""
        document: dict[str, Any] = msgspec.to_builtins(self.limits)
        return document | {"per_client": msgspec.to_builtins(self.limits.per_client or PerClient())}

    def evidence_document(self) -> dict[str, Any] | None:
        """What the limits rest on, without the curve; None where they were written by hand."""
        if self.evidence is None:
            return None
        document: dict[str, Any] = msgspec.to_builtins(self.evidence)
        document.pop("level")
        return document


def enforce(
    file: LimitsFile | None,
    name: str,
    flags: LimitSettings,
    urls: Sequence[str],
    now: datetime,
    defaults: Limits = CAUTIOUS,
    *,
    together: bool = False,
    chat: bool = True,
) -> Enforced:
    """The limits in force: a flag beats the file ``name``, which beats ``defaults``; ``urls`` add to its upstreams.

    ``together``: the upstreams are replicas of one service, and max_concurrency is that of all of them together.
    ``chat``: what is served where no evidence says it.
    Raises UsageError for a limit that makes no sense, or one above the measured line without ``--force``.
    """
    limits = limits_in_force(file, flags, defaults)
    evidence = file.evidence if file is not None else None
    plans = _plans(file, urls, limits, flags)
    if not plans:
        raise UsageError("no upstream: give --upstream http://HOST:PORT, or [[upstream]] in the limits file")
    if evidence is not None and not flags.force:
        _check_line(plans, evidence, name)
    if together:
        plans = _divided(plans)
    chat = evidence.endpoint in ("chat", "completions") if evidence is not None else chat
    warnings = tuple(_warnings(limits, evidence, name, now, chat=chat))
    return Enforced(limits, plans, evidence, warnings, _standing_queue(limits, evidence, flags))


def limits_in_force(file: LimitsFile | None, flags: LimitSettings, defaults: Limits) -> Limits:
    """A flag beats the file, which beats the defaults. Raises UsageError for a limit that makes no sense."""
    return _overridden(file.limits if file is not None else defaults, flags)


def _standing_queue(limits: Limits, evidence: Evidence | None, flags: LimitSettings) -> int | None:
    """Half of a derived queue: the whole of it puts the mean time to first token at its limit, so that under lasting
    overload every second request would be served too late. A queue that somebody chose stays as it is."""
    derived = evidence is not None and flags.max_queue is None
    return max(1, limits.max_queue // 2) if derived and limits.max_queue else None


def _overridden(limits: Limits, flags: LimitSettings) -> Limits:
    changes = {
        key: _bound(key, getattr(flags, key))
        for key in Limits.__struct_fields__
        if key != "per_client" and getattr(flags, key) is not None
    }
    per_client = limits.per_client or PerClient()
    quotas = {key: _bound(key, getattr(flags, key)) for key in _PER_CLIENT if getattr(flags, key) is not None}
    changed = msgspec.structs.replace(per_client, **quotas)
    return msgspec.structs.replace(limits, **changes, per_client=changed)


def _bound(key: str, value: float) -> float | None:
    """0 is no bound, but a queue of 0 is none at all."""
    flag = f"--{key.replace('_', '-')}"
    if value < 0:
        raise UsageError(f"{flag} {value:g} must be at least 0; 0 is no bound")
    if key == "max_queue":
        return value
    return value or None


def _plans(
    file: LimitsFile | None, urls: Sequence[str], limits: Limits, flags: LimitSettings
) -> tuple[UpstreamPlan, ...]:
    plans: dict[str, UpstreamPlan] = {}
    for upstream in file.upstreams if file is not None else ():
        own = upstream.max_concurrency if flags.max_concurrency is None else None
        url = upstream.url.rstrip("/")
        plans[url] = UpstreamPlan(url, own or limits.max_concurrency, upstream.weight, limits.max_tokens_in_flight)
    for given in urls:
        url = given.rstrip("/")
        plans.setdefault(url, UpstreamPlan(url, limits.max_concurrency, 1.0, limits.max_tokens_in_flight))
    for url in plans:
        check_url(url)
    return tuple(plans.values())


def _divided(plans: Sequence[UpstreamPlan]) -> tuple[UpstreamPlan, ...]:
    """max_concurrency as even as can be, so that the sum is exact however many replicas there are."""
    total, replicas = plans[0].max_concurrency, len(plans)
    if total is None:
        return tuple(plans)
    if total < replicas:
        raise UsageError(f"{total} in flight for {replicas} replicas: lower --workers to {total}, or raise the limit")
    each, more = divmod(total, replicas)
    return tuple(replace(plan, max_concurrency=each + (i < more)) for i, plan in enumerate(plans))


def _check_line(plans: Sequence[UpstreamPlan], evidence: Evidence, name: str) -> None:
    line = evidence.measured_max_concurrency
    for plan in plans:
        if plan.max_concurrency is None or plan.max_concurrency > line:
            asked = "no bound" if plan.max_concurrency is None else str(plan.max_concurrency)
            raise UsageError(
                f"{plan.url}: max_concurrency {asked} is above the measured line of {line} ({name}); "
                "lower it, measure again with loadstone find, or insist with --force"
            )


def _warnings(limits: Limits, evidence: Evidence | None, name: str, now: datetime, *, chat: bool) -> list[str]:
    warnings = []
    if evidence is not None and datetime.fromisoformat(evidence.expires_at) <= now:
        warnings.append(f"{name} expired on {evidence.expires_at[:10]}: measure again with loadstone find")
    if evidence is not None and evidence.through_gate:
        warnings.append(f"{name} was measured through a gate: its limits may be that gate's, not the server's")
    if chat and limits.max_queue is not None and limits.max_queue > LONGEST_CHAT_QUEUE:
        warnings.append(
            f"a queue of {limits.max_queue} before a chat model is long: beyond {LONGEST_CHAT_QUEUE} most who wait "
            "have given up before they are served"
        )
    if limits.max_queue is None:
        warnings.append("the queue has no bound: max_queue is not set")
    return warnings


def model_warning(evidence: Evidence | None, url: str, served: Sequence[str]) -> str:
    """One line where the upstream serves another model than was measured; empty where all is well, or unknown."""
    if evidence is None or not served or evidence.model in served:
        return ""
    return f"the limits were measured for {evidence.model}, but {url} serves {', '.join(served[:3])}"
