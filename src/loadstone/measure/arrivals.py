"""When each request of an open loop is due: offsets from t0, fixed before the first is sent.

Gaps are drawn, added up and, where the rate is constant, scaled so that n requests take exactly n / rate seconds, as
``vllm bench serve`` does: the same mean rate under every seed. The first request comes one gap after t0.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loadstone.core.errors import UsageError

Gap = Callable[[random.Random, float, float], float]
"""(random stream, requests per second, burstiness) → seconds to the next request."""


def _inf(rng: random.Random, rate_rps: float, burstiness: float) -> float:
    return 0.0


def _constant(rng: random.Random, rate_rps: float, burstiness: float) -> float:
    return 1.0 / rate_rps


def _poisson(rng: random.Random, rate_rps: float, burstiness: float) -> float:
    return rng.expovariate(rate_rps)


def _gamma(rng: random.Random, rate_rps: float, burstiness: float) -> float:
    return rng.gammavariate(burstiness, 1.0 / (rate_rps * burstiness))


ARRIVALS: dict[str, Gap] = {"inf": _inf, "constant": _constant, "poisson": _poisson, "gamma": _gamma}


def _linear(start_rps: float, end_rps: float, progress: float) -> float:
    return start_rps + (end_rps - start_rps) * progress


def _exponential(start_rps: float, end_rps: float, progress: float) -> float:
    return start_rps * math.pow(end_rps / start_rps, progress)


RAMPS: dict[str, Callable[[float, float, float], float]] = {"linear": _linear, "exponential": _exponential}


@dataclass(frozen=True)
class Arrivals:
    """How requests arrive: at one rate, or from ``ramp_start_rps`` to ``ramp_end_rps`` over the requests."""

    rate_rps: float = math.inf
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is Poisson, below 1 burstier, ``inf`` constant."""
    ramp: str | None = None
    ramp_start_rps: float | None = None
    ramp_end_rps: float | None = None

    def __post_init__(self) -> None:
        if not self.rate_rps > 0:
            raise UsageError(f"--request-rate {self.rate_rps:g} must be greater than 0 (inf: all at once)")
        if not self.burstiness > 0:
            raise UsageError(f"--burstiness {self.burstiness:g} must be greater than 0")
        if self.ramp is not None:
            self._check_ramp(self.ramp)

    def _check_ramp(self, ramp: str) -> None:
        if ramp not in RAMPS:
            raise UsageError(f"--ramp-up-strategy {ramp} is unknown; choose {' or '.join(RAMPS)}")
        if self.rate_rps != math.inf:
            raise UsageError("--ramp-up-strategy sets the rate by itself; leave out --request-rate")
        if self.ramp_start_rps is None or self.ramp_end_rps is None:
            raise UsageError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        if not 0 < self.ramp_start_rps <= self.ramp_end_rps:
            raise UsageError("--ramp-up-start-rps must be greater than 0 and at most --ramp-up-end-rps")

    @property
    def law(self) -> str:
        """Key of :data:`ARRIVALS`."""
        if self.ramp is None and self.rate_rps == math.inf:
            return "inf"
        if self.burstiness == math.inf:
            return "constant"
        return "poisson" if self.burstiness == 1.0 else "gamma"

    def rates_rps(self, count: int) -> Sequence[float]:
        """The rate in force at each request."""
        if self.ramp is None or self.ramp_start_rps is None or self.ramp_end_rps is None:
            return [self.rate_rps] * count
        rate = RAMPS[self.ramp]
        last = max(count - 1, 1)
        return [rate(self.ramp_start_rps, self.ramp_end_rps, index / last) for index in range(count)]


def offsets_ns(arrivals: Arrivals, count: int, seed: int) -> list[int]:
    """Due times of ``count`` requests in nanoseconds after t0, never decreasing; the same for the same seed."""
    rng = random.Random(f"arrivals/{seed}")
    gap = ARRIVALS[arrivals.law]
    due_s = list(accumulate(gap(rng, rate_rps, arrivals.burstiness) for rate_rps in arrivals.rates_rps(count)))
    scale = 1.0
    if arrivals.ramp is None and due_s and due_s[-1] > 0:
        scale = count / arrivals.rate_rps / due_s[-1]
    return [round(offset_s * scale * 1e9) for offset_s in due_s]
