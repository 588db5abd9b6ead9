"""Gates that never were, for what shows a gate's figures: each call of ``stats`` is a second later."""

import random
from typing import Any

from loadstone.core.outcomes import Outcome
from loadstone.hold.resources import Gpu, Resources
from loadstone.hold.status import Ended, Now, Status, UpstreamNow

HOSTILE = '<img src=x onerror="problems.push(1)">'

LIMITS = {
    "max_concurrency": 3,
    "max_queue": 10,
    "queue_timeout_s": 30.0,
    "request_timeout_s": 120.0,
    "max_output_tokens": 512,
    "default_output_tokens": 100,
    "max_tokens_in_flight": None,
    "per_client": {"requests_per_minute": 10, "requests_per_hour": 100, "tokens_per_minute": None},
}
EVIDENCE = {
    "measured_max_concurrency": 4,
    "headroom": 0.75,
    "binding": "ttft",
    "claim": "4 held: n = 400, success 100 %, mean TTFT 640 ± 9 ms; 5 failed: 1104 ± 21 ms",
    "measured_at": "2026-11-20T10:00:00Z",
    "expires_at": "2026-12-20T10:00:00Z",
    "model": "Qwen/Qwen3-8B",
    "endpoint": "chat",
    "base_url": "http://127.0.0.1:8001",
    "through_gate": False,
    "level": [{"concurrency": 1, "throughput_rps": 1.2}, {"concurrency": 4, "throughput_rps": 3.9}],
}


def ended(outcome: Outcome = Outcome.OK, *, client: str = "10.0.0.1", upstream: str = "", **figures: Any) -> Ended:
    """A request that ended; one that has an upstream was admitted."""
    fields: dict[str, Any] = {"latency_s": 2.0, "ttft_s": None, "wait_s": 0.0, "output_tokens": 0} | figures
    return Ended(outcome=outcome, client=client, upstream=upstream, admitted=bool(upstream), **fields)


def upstream(name: str = "http://127.0.0.1:8001", **fields: Any) -> UpstreamNow:
    defaults: dict[str, Any] = {
        "up": True,
        "state": "up",
        "in_flight": 0,
        "limit": 3,
        "configured_limit": 3,
        "weight": 1.0,
        "reason": "",
    }
    return UpstreamNow(name=name, **(defaults | fields))


def now(*upstreams: UpstreamNow, **fields: Any) -> Now:
    limits = [one.limit for one in upstreams if one.up and one.limit is not None]
    defaults: dict[str, Any] = {
        "in_flight": sum(one.in_flight for one in upstreams),
        "queued": 0,
        "oldest_in_flight_s": None,
        "capacity": sum(limits),
        "draining": False,
        "limits": LIMITS,
        "evidence": None,
        "warnings": (),
        "retry_after_s": None,
    }
    return Now(upstreams=upstreams, **(defaults | fields))


class MadeGate:
    """``empty``: nobody has asked yet. ``busy``: full, some refused. ``troubled``: one upstream down, hostile names."""

    def __init__(self, scene: str) -> None:
        self.scene = scene
        self._random = random.Random(1)
        self._second = 0
        self._waiting = 0
        self._status = Status(0.0)

    def stats(self) -> dict[str, Any]:
        """The document of ``/stats``, a second after the one before."""
        self._second += 1
        make = {"empty": self._empty, "busy": self._busy, "troubled": self._troubled}[self.scene]
        return make()

    def _empty(self) -> dict[str, Any]:
        return self._status.stats(now(upstream()), self._second, Resources(0.02, 0.31))

    def _busy(self) -> dict[str, Any]:
        rush = 0.5 if self._second % 60 < 30 else 0.9
        for _ in range(self._random.randint(1, 9)):
            client = f"10.0.0.{self._random.randint(1, 12)}"
            if self._random.random() < rush:
                ttft_s = self._random.lognormvariate(-1.6, 0.5)
                figures = {"ttft_s": ttft_s, "latency_s": ttft_s + self._random.random() * 5, "output_tokens": 80}
                self._end(ended(client=client, upstream="http://127.0.0.1:8001", wait_s=ttft_s / 2, **figures))
            else:
                self._end(ended(Outcome.RATE_LIMITED if client[-1] == "1" else Outcome.QUEUE_FULL, client=client))
        queued = self._random.randint(0, 9)
        while self._waiting < 3 + queued:
            self._status.received()
            self._waiting += 1
        while self._waiting > 3 + queued:
            self._status.ended(ended(Outcome.CLIENT_GONE), self._second)
            self._waiting -= 1
        one = upstream(in_flight=3, kv_use=0.62)
        state = now(one, queued=queued, oldest_in_flight_s=4.2, evidence=EVIDENCE, retry_after_s=2.0)
        return self._status.stats(state, self._second, Resources(0.41, 0.55, Gpu(0.93, 0.88)))

    def _troubled(self) -> dict[str, Any]:
        self._end(ended(upstream="http://gpu-1.example:8001", ttft_s=2.5, latency_s=9.0, output_tokens=300))
        self._end(ended(Outcome.UPSTREAM_ERROR, client=HOSTILE, upstream="http://gpu-2.example:8001"))
        self._end(ended(Outcome.BAD_REQUEST, client="a-very-long-client-name-" * 6))
        state = now(
            upstream("http://gpu-1.example:8001", in_flight=0, state="slow start", limit=1),
            upstream("http://gpu-2.example:8001", up=False, state="down", reason=f"connection refused {HOSTILE}"),
            evidence=EVIDENCE,
            warnings=("the limits file expired on 2026-10-20; measure again", HOSTILE),
        )
        return self._status.stats(state, self._second, Resources(0.97, 0.88, Gpu(0.95, None)))

    def _end(self, one: Ended) -> None:
        self._status.received()
        self._status.ended(one, self._second)
