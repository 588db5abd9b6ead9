"""Puts the adaptive limits of all upstreams in force, twice a second."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from loadstone.core.limits import EvidenceLevel
from loadstone.hold.adaptive import AdaptiveLimit
from loadstone.hold.signals import Signals

TICK_NS = 500_000_000


@dataclass(slots=True)
class _Followed:
    adaptive: AdaptiveLimit
    sense: Callable[[], Signals]


class Adapter:
    """Call ``tick`` every ``TICK_NS``. Upstreams without a limit have none to lower and are not followed."""

    def __init__(self, set_limit: Callable[[str, int, int], object], log: Callable[[str], object]) -> None:
        """``set_limit(name, limit, now_ns)`` puts a limit in force; ``log`` is told of ceilings left or regained."""
        self._set_limit = set_limit
        self._log = log
        self._followed: dict[str, _Followed] = {}

    def follow(
        self, name: str, ceiling: int, curve: Sequence[EvidenceLevel], sense: Callable[[], Signals], now_ns: int
    ) -> None:
        """Begin with ``ceiling`` in force; or, after a reload, go on with what was learnt."""
        followed = self._followed.get(name)
        if followed is None:
            self._followed[name] = _Followed(AdaptiveLimit(ceiling, curve), sense)
            return
        followed.sense = sense
        self._set_limit(name, followed.adaptive.configure(ceiling, curve), now_ns)

    def forget(self, name: str) -> None:
        """The upstream is gone, or has no limit any more."""
        self._followed.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all others."""
        for name in [name for name in self._followed if name not in names]:
            self.forget(name)

    def tick(self, now_ns: int) -> None:
        """Decide on each limit, and put those that changed in force."""
        for name, followed in tuple(self._followed.items()):
            before = followed.adaptive.limit
            limit = followed.adaptive.decide(followed.sense(), now_ns)
            if limit == before:
                continue
            self._set_limit(name, limit, now_ns)
            if followed.adaptive.ceiling in (before, limit):
                self._log(f"{name}: {followed.adaptive.reason}")

    def reason(self, name: str) -> str:
        """What last changed the limit of an upstream; empty where nothing has, or it is not followed."""
        followed = self._followed.get(name)
        return followed.adaptive.reason if followed is not None else ""

    def __repr__(self) -> str:
        limits = (f"{name} {it.adaptive.limit} of {it.adaptive.ceiling}" for name, it in self._followed.items())
        return f"<Adapter {', '.join(limits) or 'follows nothing'}>"
