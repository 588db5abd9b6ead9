"""Whom a relay has to do with: the upstream that it was granted, the gate, and what it tells it in the end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from loadstone.core.outcomes import Outcome
from loadstone.hold.permits import Permits
from loadstone.hold.signals import Pace
from loadstone.wire.upstream import UpstreamCall

if TYPE_CHECKING:
    from loadstone.hold.relay import Relay


class Upstream(Protocol):
    """What a relay needs of the upstream that it was granted."""

    pace: Pace | None
    """Where the gaps between tokens are wanted."""

    def send(self, relay: "Relay") -> UpstreamCall: ...
    def good(self) -> None: ...
    def busy(self) -> None: ...
    def silent(self) -> None: ...
    def broken(self, reason: str) -> None: ...
    def unreachable(self, reason: str) -> None: ...


class Finished(msgspec.Struct, gc=False):
    """How a request ended; what it had come to by then, the relay tells."""

    outcome: Outcome
    ended_ns: int
    tokens: int | None
    """All tokens of the request where the server counted them."""
    output_tokens: int


class Shared(Protocol):
    """What all relays share: the gate."""

    @property
    def permits(self) -> Permits: ...
    @property
    def now_ns(self) -> Callable[[], int]: ...
    @property
    def upstream(self) -> Callable[[str], Upstream]: ...
    def any_up_besides(self, tried: frozenset[str]) -> bool: ...
    def wait_hint_s(self, outcome: Outcome) -> float: ...
    def standing_lines(self, relay: "Relay") -> bytes: ...
    def finished(self, relay: "Relay", finished: Finished) -> None: ...
