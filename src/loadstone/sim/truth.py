"""The true load line of a profile, found without the search: by long closed loops on the service itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from loadstone.sim.profiles import Profile
from loadstone.sim.steady import ClosedLoop, Steady

_QUIET_LIVES = 12
_NOISY_LIVES = 40
_NOISY_REQUESTS = 8_000
_PER_OCTAVE = 8
_ONE_CHUNK = 1 << 30


@dataclass(frozen=True)
class TrueLine:
    """For each rule the largest N that holds it (0: none does); None where it holds as far as was looked."""

    success: int | None
    kv: int | None
    ttft: int | None
    gain: int | None

    @property
    def line(self) -> int | None:
        """The smallest of them."""
        lines = [n for n in (self.success, self.kv, self.ttft, self.gain) if n is not None]
        return min(lines, default=None)

    @property
    def binding(self) -> str:
        """The rule that sets the line: the first in the order of the rules, gain only below all others."""
        for rule in ("success", "kv", "ttft", "gain"):
            if self.line is not None and getattr(self, rule) == self.line:
                return rule
        return "ladder"


class Truth:
    """A profile's long-run behaviour under one workload, each concurrency run once.

    A profile that changes pace is taken at its last pace. Noise is averaged over, not left out: what is true is the
    mean that a search would converge to.
    """

    def __init__(
        self,
        profile: Profile,
        prompt_tokens: int = 512,
        output_tokens: int | None = None,
        *,
        request_timeout_s: float = 600.0,
        most: int = 1024,
    ) -> None:
        last_pace = profile.pace[-1:]
        self._profile = replace(
            profile, stream_interval=_ONE_CHUNK, pace=tuple((0.0, factor) for _from_s, factor in last_pace)
        )
        self._lengths = (prompt_tokens, output_tokens or profile.default_output_tokens)
        self._timeout_s = request_timeout_s
        self._most = most
        self._levels: dict[int, Steady] = {}

    def at(self, concurrency: int) -> Steady:
        """Long-run figures with ``concurrency`` slots."""
        level = self._levels.get(concurrency)
        if level is None:
            loop = ClosedLoop(self._profile, *self._lengths, concurrency, self._timeout_s)
            level = loop.run(_QUIET_LIVES) if self._profile.quiet else loop.run(_NOISY_LIVES, _NOISY_REQUESTS)
            self._levels[concurrency] = level
        return level

    def largest(self, holds: Callable[[Steady], bool]) -> int | None:
        """The largest N that ``holds``, by doubling and bisection; None where the most that is looked at still does."""
        low, high = 0, 1
        while holds(self.at(high)):
            if high == self._most:
                return None
            low, high = high, min(2 * high, self._most)
        while high - low > 1:
            middle = (low + high) // 2
            if holds(self.at(middle)):
                low = middle
            else:
                high = middle
        return low

    def gain_line(self, min_gain: float) -> int | None:
        """The largest N with G(N) = log2 X(√2·N) − log2 X(N/√2) ≥ log2(1 + min_gain), X interpolated log–log.

        Looks on until G stays below for half an octave, at most up to twice the ``most``; None where it never does.
        """
        least = math.log2(1 + min_gain)
        top = 16
        while top <= 2 * self._most:
            reach = math.floor(top / math.sqrt(2))
            passing = [n for n in range(2, reach + 1) if self._gain(n) >= least]
            line = passing[-1] if passing else 1
            if line < top / 2:
                return line
            top *= 2
        return None

    def _gain(self, concurrency: int) -> float:
        return self._log_throughput(concurrency * math.sqrt(2)) - self._log_throughput(concurrency / math.sqrt(2))

    def _log_throughput(self, concurrency: float) -> float:
        """log2 X between the two nearest points of a grid of integers, ``_PER_OCTAVE`` to a doubling."""
        place = math.log2(concurrency) * _PER_OCTAVE
        low = _grid(math.floor(place))
        high = _grid(math.floor(place) + 1)
        while high <= concurrency:
            low, high = high, high + 1
        low = min(low, math.floor(concurrency))
        share = math.log(concurrency / low) / math.log(high / low)
        return (1 - share) * self._log_at(low) + share * self._log_at(high)

    def _log_at(self, concurrency: int) -> float:
        throughput_rps = self.at(concurrency).throughput_rps
        return math.log2(throughput_rps) if throughput_rps > 0 else -math.inf


def _grid(place: int) -> int:
    return max(1, round(2 ** (place / _PER_OCTAVE)))


def true_line(
    profile: Profile,
    prompt_tokens: int = 512,
    output_tokens: int | None = None,
    *,
    min_success: float = 0.95,
    max_ttft_ms: float = 1000.0,
    max_kv_use: float = 0.95,
    min_gain: float = 0.2,
    request_timeout_s: float = 600.0,
    most: int = 1024,
) -> TrueLine:
    """The line of each rule under the method's definitions; ``output_tokens`` defaults to the profile's own."""
    truth = Truth(profile, prompt_tokens, output_tokens, request_timeout_s=request_timeout_s, most=most)
    return TrueLine(
        success=truth.largest(lambda level: level.success_share >= min_success),
        kv=truth.largest(lambda level: level.median_kv_use < max_kv_use and level.preemptions_per_request <= 0.01),
        ttft=truth.largest(lambda level: level.mean_ttft_s * 1000 <= max_ttft_ms),
        gain=truth.gain_line(min_gain),
    )
