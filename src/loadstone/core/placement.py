"""Which upstream takes a request: limits, token budgets, slow start, least outstanding, prefix affinity.

Room and choice
    An upstream has room while fewer run on it than its effective limit and its running tokens leave space for those of
    the request. Among those up with room the one with the least ``(in flight + 1) / (weight · effective limit)`` is
    chosen, the one chosen longest ago where they are equal. Without a limit the weight alone divides.

Affinity
    Requests with one prefix prefer one upstream (weighted rendezvous hashing: when an upstream comes or goes, only its
    own prefixes move). The preference counts while that upstream has room and is not more than a quarter and one slot
    above the mean load; otherwise the least loaded is chosen. So affinity makes nobody wait.

Slow start
    An upstream that comes back starts with a limit of 1, which grows linearly to its own in ``slow_start_ns``.
    An upstream without a limit has nothing to grow.
"""

import hashlib
import math
from collections.abc import Collection

UNBOUNDED = 1 << 62
"""Stands for "no limit" wherever integers are compared."""
_AFFINITY_LEEWAY = 1.25
_MASK = (1 << 64) - 1


class Upstream:
    """One model server. ``running`` and ``tokens`` are what counts against its limits, ``in_flight`` is everything."""

    __slots__ = (
        "budget",
        "effective",
        "in_flight",
        "key",
        "limit",
        "name",
        "ramp_from_ns",
        "removed",
        "running",
        "share",
        "tokens",
        "turn",
        "up",
        "weight",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        self.limit = UNBOUNDED
        self.effective = UNBOUNDED
        self.weight = 1.0
        self.share = 1.0
        self.budget = UNBOUNDED
        self.in_flight = 0
        self.running = 0
        self.tokens = 0
        self.turn = 0
        self.up = True
        self.removed = False
        self.ramp_from_ns: int | None = None

    def set_effective(self, limit: int) -> None:
        self.effective = limit
        self.share = self.weight if limit == UNBOUNDED else self.weight * limit

    def grow(self, now_ns: int, slow_start_ns: int) -> None:
        """Bring the effective limit up to date, and end the slow start when it is over."""
        elapsed_ns = slow_start_ns if self.ramp_from_ns is None else now_ns - self.ramp_from_ns
        if elapsed_ns >= slow_start_ns or self.limit == UNBOUNDED:
            self.ramp_from_ns = None
            self.set_effective(self.limit)
        else:
            self.set_effective(1 + (self.limit - 1) * elapsed_ns // slow_start_ns)

    def next_growth_ns(self, slow_start_ns: int) -> int:
        """When the effective limit next rises by one. Only during slow start, which a limit of 1 has none of."""
        assert self.ramp_from_ns is not None
        return self.ramp_from_ns + -(-self.effective * slow_start_ns // max(1, self.limit - 1))

    def __repr__(self) -> str:
        limit = "no limit" if self.effective == UNBOUNDED else self.effective
        return f"<Upstream {self.name} {'up' if self.up else 'down'}, {self.in_flight} in flight of {limit}>"


class Placement:
    """All upstreams. Names that were never set raise KeyError."""

    __slots__ = ("_by_name", "_turns", "largest_budget", "max_total", "ramping", "up")

    def __init__(self) -> None:
        self._by_name: dict[str, Upstream] = {}
        self.up: list[Upstream] = []
        self.ramping: set[Upstream] = set()
        """Those in slow start."""
        self._turns = 0
        self.max_total = UNBOUNDED
        self.largest_budget = -1
        """The most tokens that any upstream which is up would ever take; -1 where none is up."""

    @property
    def in_flight(self) -> int:
        """Everything that runs."""
        return sum([upstream.in_flight for upstream in self._by_name.values()])

    @property
    def running(self) -> int:
        """What runs and counts against limits: all but what was taken as unlimited."""
        return sum([upstream.running for upstream in self._by_name.values()])

    # Upstreams

    def __getitem__(self, name: str) -> Upstream:
        return self._by_name[name]

    def put(self, name: str, limit: int | None, weight: float, max_tokens: int | None) -> None:
        """Add an upstream, up and without slow start, or change one. One that was removed returns with what runs."""
        upstream = self._by_name.setdefault(name, Upstream(name))
        if upstream.removed:
            upstream.removed, upstream.up = False, True
        upstream.limit = UNBOUNDED if limit is None else limit
        upstream.weight = weight
        upstream.budget = UNBOUNDED if max_tokens is None else max_tokens
        self._changed()

    def remove(self, name: str) -> None:
        """Nothing new goes there; what runs keeps its place until it ends."""
        self.take_down(name)
        upstream = self._by_name[name]
        upstream.removed = True
        self._forget_if_gone(upstream)

    def bring_up(self, name: str, now_ns: int, *, slowly: bool) -> None:
        """Nothing happens where it is up already: a slow start goes on, none begins."""
        upstream = self._by_name[name]
        if upstream.up or upstream.removed:
            return
        upstream.up = True
        if slowly:
            upstream.ramp_from_ns = now_ns
            self.ramping.add(upstream)
        self._changed()

    def take_down(self, name: str) -> None:
        upstream = self._by_name[name]
        upstream.up = False
        upstream.ramp_from_ns = None
        self.ramping.discard(upstream)
        self._changed()

    def ever_fits(self, tokens: int) -> bool:
        """Whether any upstream, up or not, has so large a budget; True where there is none."""
        known = [upstream for upstream in self._by_name.values() if not upstream.removed]
        return not known or any(tokens <= upstream.budget for upstream in known)

    def _changed(self) -> None:
        self.up = [upstream for upstream in self._by_name.values() if upstream.up]
        self.largest_budget = max((upstream.budget for upstream in self.up), default=-1)

    def _forget_if_gone(self, upstream: Upstream) -> None:
        if upstream.removed and not upstream.in_flight:
            del self._by_name[upstream.name]

    # Slow start

    def grow(self, now_ns: int, slow_start_ns: int) -> None:
        """Bring the effective limits up to date."""
        for upstream in self._by_name.values():
            upstream.grow(now_ns, slow_start_ns)
            if upstream.ramp_from_ns is None:
                self.ramping.discard(upstream)

    def next_growth_ns(self, slow_start_ns: int) -> int | None:
        return min((upstream.next_growth_ns(slow_start_ns) for upstream in self.ramping), default=None)

    # Places

    def take(self, tokens: int, affinity: int | None, without: Collection[str]) -> Upstream | None:
        """Occupy a place, at none of those named ``without``; None where none has room."""
        upstream = self._choose(tokens, affinity, without)
        if upstream is not None:
            self._turns = upstream.turn = self._turns + 1
            upstream.in_flight += 1
            upstream.running += 1
            upstream.tokens += tokens
        return upstream

    def _choose(self, tokens: int, affinity: int | None, without: Collection[str]) -> Upstream | None:
        if self.max_total < UNBOUNDED and self.running >= self.max_total:
            return None
        best, least = None, 0.0
        if len(self.up) == 1 and not without:  # there is no choice, which is usually so
            (only,) = self.up
            return only if only.running < only.effective and only.tokens + tokens <= only.budget else None
        for upstream in self.up:
            if upstream.running >= upstream.effective or upstream.tokens + tokens > upstream.budget:
                continue
            if without and upstream.name in without:
                continue
            load = (upstream.in_flight + 1) / upstream.share
            if best is None or load < least or (load == least and upstream.turn < best.turn):
                best, least = upstream, load
        if best is None or affinity is None:
            return best
        preferred = self._preferred(affinity)
        roomy = preferred.running < preferred.effective and preferred.tokens + tokens <= preferred.budget
        return preferred if roomy and preferred.name not in without and self._bearable(preferred) else best

    def least_loaded(self, without: Collection[str]) -> Upstream | None:
        """The least loaded that is up, room or not."""
        fit = [upstream for upstream in self.up if upstream.name not in without]
        return min(fit, key=lambda it: ((it.in_flight + 1) / it.share, it.turn), default=None)

    def eligible(self, tokens: int, without: Collection[str]) -> set[str]:
        """Names of those up that could take the request once they have room."""
        return {it.name for it in self.up if tokens <= it.budget and it.name not in without}

    def take_unlimited(self, upstream: Upstream) -> None:
        """Occupy a place that counts as in flight and against no limit."""
        self._turns = upstream.turn = self._turns + 1
        upstream.in_flight += 1

    def give_back(self, upstream: Upstream, tokens: int) -> None:
        """Free what ``take`` occupied, with the tokens as they stand now."""
        upstream.in_flight -= 1
        upstream.running -= 1
        upstream.tokens -= tokens
        if upstream.removed:
            self._forget_if_gone(upstream)

    def give_back_unlimited(self, upstream: Upstream) -> None:
        upstream.in_flight -= 1
        if upstream.removed:
            self._forget_if_gone(upstream)

    def _preferred(self, affinity: int) -> Upstream:
        return max(self.up, key=lambda upstream: upstream.weight / -math.log(_uniform(upstream.key ^ affinity)))

    def _bearable(self, upstream: Upstream) -> bool:
        mean = sum([it.in_flight for it in self.up]) / math.fsum([it.share for it in self.up])
        return upstream.in_flight <= _AFFINITY_LEEWAY * mean * upstream.share + 1

    def __repr__(self) -> str:
        return f"<Placement of {len(self._by_name)} upstreams, {len(self.up)} up, {self.in_flight} in flight>"


def _uniform(seed: int) -> float:
    """A number strictly between 0 and 1 that depends evenly on all bits of ``seed``."""
    mixed = seed & _MASK
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed = ((mixed ^ (mixed >> 30)) * factor) & _MASK
    return ((mixed ^ (mixed >> 31)) + 1) / (_MASK + 3)
