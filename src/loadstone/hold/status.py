"""What the gate tells about itself: ``/stats`` for people and programs, ``/metrics`` for Prometheus, ``/health``.

Theory of operation. A request is counted once when it arrives and once when it ends, in exactly one outcome; what lies
between is told by whoever runs it (``Now``). So the outcomes sum to received − in flight − queued at every moment.
Everything is kept in fixed memory. Latencies and shares over "recent" reach back ``latencies.WINDOW_S``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loadstone import __version__
from loadstone.core.outcomes import REFUSED, Outcome
from loadstone.hold.exposition import Exposition
from loadstone.hold.latencies import REQUEST_BOUNDS_S, TTFT_BOUNDS_S, WAIT_BOUNDS_S, WINDOW_S, Latencies
from loadstone.hold.resources import Resources
from loadstone.hold.tallies import Clients, Past, Tally

_RATE_SPAN_S = 60.0
_MOST_CLIENTS_SHOWN = 20
# An enumeration's members are slow to read in Python 3.11, and this one is read for every request.
_OK = Outcome.OK


class Ended:
    """One request that has ended."""

    __slots__ = ("admitted", "client", "latency_s", "outcome", "output_tokens", "ttft_s", "upstream", "wait_s")

    def __init__(
        self,
        outcome: Outcome,
        client: str,
        upstream: str,
        admitted: bool,
        latency_s: float,
        ttft_s: float | None,
        wait_s: float,
        output_tokens: int,
    ) -> None:
        self.outcome = outcome
        self.client = client
        """Who asked; empty where that could not be told."""
        self.upstream = upstream
        """The last that it was sent to; empty where none."""
        self.admitted = admitted
        """It held a slot."""
        self.latency_s = latency_s
        """From arrival to the end."""
        self.ttft_s = ttft_s
        """From arrival to the first byte of the reply's body; None where none came."""
        self.wait_s = wait_s
        """In the queue."""
        self.output_tokens = output_tokens


@dataclass(frozen=True)
class UpstreamNow:
    """One upstream at this moment."""

    name: str
    """Its URL."""
    up: bool
    state: str
    """up | down | open circuit | half open | slow start | draining"""
    in_flight: int
    limit: int | None
    """In force; None is no bound."""
    configured_limit: int | None
    weight: float
    reason: str
    """Why it is down; empty where it is up."""
    kv_use: float | None = None
    """KV cache in use, 0 … 1, where the upstream tells it."""


@dataclass(frozen=True)
class Now:
    """What runs at this moment, as the admission knows it."""

    in_flight: int
    queued: int
    oldest_in_flight_s: float | None
    capacity: int | None
    """In flight at most, over the upstreams that are up; None is no bound."""
    upstreams: tuple[UpstreamNow, ...]
    draining: bool
    limits: Mapping[str, Any]
    """The table ``[limits]`` in force, as JSON takes it."""
    evidence: Mapping[str, Any] | None
    warnings: tuple[str, ...]
    retry_after_s: float | None
    """What a request refused now would be told."""
    service: Mapping[str, Any] = field(default_factory=dict)
    """What /health tells of the model service behind this gate."""


class Status:
    """Counts what is received and how it ends. ``now_s`` is monotonic seconds everywhere."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._received = 0
        self._outcomes = dict.fromkeys(Outcome, 0)
        self._all = Tally()
        self._upstreams: dict[str, Tally] = {}
        self._past = Past(int(WINDOW_S))
        self._clients = Clients(WINDOW_S, now_s)
        self._latency = Latencies(REQUEST_BOUNDS_S)
        self._ttft = Latencies(TTFT_BOUNDS_S)
        self._wait = Latencies(WAIT_BOUNDS_S)

    def received(self) -> None:
        """A request has arrived."""
        self._received += 1

    def ended(self, ended: Ended, now_s: float) -> None:
        """A request that was received has ended: once for each. ``now_s`` never goes back."""
        if now_s >= self._past.next_mark_s:
            self._past.mark(now_s, self._all)
        outcome, admitted, output_tokens = ended.outcome, ended.admitted, ended.output_tokens
        self._outcomes[outcome] += 1
        self._all.add(outcome, admitted, output_tokens)
        if ended.client:
            self._clients.at(ended.client, now_s).add(outcome, admitted, output_tokens)
        if ended.upstream:
            self._upstream_tally(ended.upstream).add(outcome, admitted, output_tokens)
        if admitted:
            self._wait.add(now_s, ended.wait_s)
        if outcome is _OK:
            self._latency.add(now_s, ended.latency_s)
        if ended.ttft_s is not None:
            self._ttft.add(now_s, ended.ttft_s)

    def _upstream_tally(self, name: str) -> Tally:
        tally = self._upstreams.get(name)
        if tally is None:
            tally = self._upstreams[name] = Tally()
        return tally

    # -- what is told

    def stats(self, now: Now, now_s: float, resources: Resources) -> dict[str, Any]:
        """The document of ``/stats``. Durations in seconds, shares 0 … 1, None where a figure isn't known.

        ``latency_s`` is that of requests that succeeded, ``ttft_s`` that of all with a first byte; ``error_rate`` is
        (upstream_error + request_timeout) / admitted, where ``admitted`` is how many of those that ended held a slot.
        """
        recent = self._past.growth(self._all, WINDOW_S, now_s)
        return {
            "version": __version__,
            "uptime_s": now_s - self._began_s,
            "draining": now.draining,
            "in_flight": now.in_flight,
            "queued": now.queued,
            "capacity": now.capacity,
            "oldest_in_flight_s": now.oldest_in_flight_s,
            "retry_after_s": now.retry_after_s,
            "received": self._received,
            "admitted": self._all.admitted,
            "outcomes": {str(outcome): count for outcome, count in self._outcomes.items()},
            "failed": self._all.failed,
            "refused": self._all.refused,
            "error_rate": self._all.error_rate(),
            "refusal_rate": self._all.refusal_rate(),
            "output_tokens": self._all.output_tokens,
            "latency_s": self._latency.summary(now_s),
            "ttft_s": self._ttft.summary(now_s),
            "queue_wait_s": self._wait.summary(now_s),
            "recent": {
                "window_s": WINDOW_S,
                "requests": recent.requests,
                "error_rate": recent.error_rate(),
                "refusal_rate": recent.refusal_rate(),
            },
            "last_minute": self._last_minute(now_s),
            "upstreams": [self._upstream(upstream) for upstream in now.upstreams],
            "clients": self._busiest_clients(now_s),
            "resources": msgspec.to_builtins(resources),
            "limits": dict(now.limits),
            "evidence": now.evidence,
            "warnings": list(now.warnings),
        }

    def health(self, now: Now) -> tuple[int, dict[str, Any]]:
        """Status and document of ``/health``: 503 while draining or when no upstream is up."""
        any_up = any(upstream.up for upstream in now.upstreams)
        state = "draining" if now.draining else "ok" if any_up else "no upstream is up"
        return 200 if state == "ok" else 503, {
            "status": state,
            "version": __version__,
            "in_flight": now.in_flight,
            "queued": now.queued,
            "capacity": now.capacity,
            "upstreams": [_plain(upstream) for upstream in now.upstreams],
            "limits": dict(now.limits),
            "warnings": list(now.warnings),
            **now.service,
        }

    def metrics(self, now: Now, now_s: float) -> bytes:
        """The text of ``/metrics``."""
        page = Exposition("loadstone_gate_")
        page.counter("received", "Requests that have arrived.", {"": self._received})
        outcomes = {str(outcome): float(count) for outcome, count in self._outcomes.items()}
        page.counter("requests", "Requests that have ended, by outcome.", outcomes, "outcome")
        refused = {reason: count for reason, count in outcomes.items() if reason in REFUSED}
        page.counter("refused", "Requests that were refused, by reason.", refused, "reason")
        page.counter("output_tokens", "Tokens generated.", {"": self._all.output_tokens})
        page.gauge("in_flight", "Requests at an upstream.", {"": now.in_flight})
        page.gauge("queued", "Requests waiting.", {"": now.queued})
        oldest = {"": now.oldest_in_flight_s or 0.0}
        page.gauge("oldest_in_flight_seconds", "Age of the oldest request in flight, 0 where none is.", oldest)
        page.gauge("uptime_seconds", "Since the gate began.", {"": now_s - self._began_s})
        self._upstream_metrics(page, now.upstreams)
        page.gauge("limits", "Limits in force; one that is absent is no bound.", dict(_numbers(now.limits)), "limit")
        page.histogram("ttft_seconds", "Arrival to first byte of the reply.", self._ttft)
        page.histogram("request_seconds", "Arrival to last byte, requests that succeeded.", self._latency)
        page.histogram("queue_wait_seconds", "Time in the queue, admitted requests.", self._wait)
        return page.text()

    def _upstream_metrics(self, page: Exposition, upstreams: tuple[UpstreamNow, ...]) -> None:
        tallies = {upstream.name: self._upstreams.get(upstream.name, Tally()) for upstream in upstreams}
        by = "upstream"
        page.gauge("upstream_up", "1 where the upstream is up.", {u.name: float(u.up) for u in upstreams}, by)
        page.gauge("upstream_in_flight", "Requests at this upstream.", {u.name: u.in_flight for u in upstreams}, by)
        limits = {u.name: u.limit for u in upstreams if u.limit is not None}
        page.gauge("upstream_limit", "Limit in force at this upstream.", limits, by)
        requests = {name: tally.requests for name, tally in tallies.items()}
        page.counter("upstream_requests", "Requests that ended at this upstream.", requests, by)
        failed = {name: tally.failed for name, tally in tallies.items()}
        page.counter("upstream_errors", "Of those, the ones that failed or timed out.", failed, by)

    def _last_minute(self, now_s: float) -> dict[str, float]:
        """Each second, over the last minute or since the start."""
        last = self._past.growth(self._all, _RATE_SPAN_S, now_s)
        span_s = max(1.0, now_s - max(self._began_s, int(now_s) - _RATE_SPAN_S))
        return {
            "span_s": span_s,
            "requests_per_s": last.requests / span_s,
            "ok_per_s": last.ok / span_s,
            "refused_per_s": last.refused / span_s,
            "output_tokens_per_s": last.output_tokens / span_s,
        }

    def _upstream(self, upstream: UpstreamNow) -> dict[str, Any]:
        return _plain(upstream) | _counts(self._upstreams.get(upstream.name, Tally()))

    def _busiest_clients(self, now_s: float) -> dict[str, Any]:
        busiest = self._clients.busiest(_MOST_CLIENTS_SHOWN, now_s)
        return {
            "span_s": now_s - self._clients.since_s,
            "busiest": [{"client": client} | _counts(tally) for client, tally in busiest],
        }

    def __repr__(self) -> str:
        return f"<Status {self._received} received, {self._all.requests} ended>"


def _counts(tally: Tally) -> dict[str, int]:
    names = ("requests", "ok", "refused", "failed", "output_tokens")
    return {name: getattr(tally, name) for name in names}


def _plain(upstream: UpstreamNow) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(upstream)
    return plain


def _numbers(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The limits that are set, those per client as ``per_client.requests_per_minute``."""
    found: list[tuple[str, float]] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((prefix + key, float(value)))
    return found
